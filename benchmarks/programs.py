"""The measured programs of `benchmarks.throughput`, each in its own process: `python -m benchmarks.programs NAME FILE`.

All start from the weights of one folder, read the same blocks in the same order, and train with AdamW at a constant
rate, without dropout. FILE contains the `Setting` as JSON.

ours               the step of the trainer in a long run, with the trainer's choices for this machine (`compiled`)
ours_eager         as ours, with --torch_compile false, as in a short run
ours_full_trainer  `python -m llm.trainers.gpt` itself, while ours is the step alone. It reads and shuffles the ids
                   itself and writes a record every ten steps, TensorBoard included; no evaluation, no checkpoints
ours_fp32          as ours, with --mixed_precision no
ours_returning     as ours, but freed memory is returned to the system, as in the other programs
ours_kfac          as ours_eager, with --kfac; also ours_kfac_inverse and ours_kfac_spread
nanogpt            nanoGPT's unchanged train.py, with its defaults except for sizes and hyperparameters. By default it
                   prints a line per step, which waits for the loss on an accelerator (its configurations: every ten)
nanogpt_bf16       as nanogpt, with bf16 autocast, which nanoGPT does not use on a CPU
nanogpt_compile    as nanogpt, compiled also where its README says --compile=False (on a CPU)
run_clm            the training step of transformers' run_clm_no_trainer.py, from a `datasets` table, with Accelerate
run_clm_bf16       as run_clm, under `accelerate launch --mixed_precision bf16`
trainer            transformers.Trainer on the same table
litgpt             litgpt's pretraining with its defaults, always compiled; for a GPT-NeoX only
litgpt_fp32        as litgpt, with --precision 32-true: by default it uses bf16 even on a CPU that emulates bf16
gemm               no step: the rate of matrix products on this machine

run_clm would not predict the last target of a block; it gets that target too, so that all programs predict the same.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gate import Gate
from benchmarks.gemm import measure_gemm
from benchmarks.litgpt import run_litgpt
from benchmarks.settings import BETAS, LEARNING_RATE, WEIGHT_DECAY, Setting
from llm.data.batches.row import Row

# Steps between factor updates, and between updates of the inverses or eigenbases.
KFAC_INTERVAL = 10


@dataclass
class StoredBlocks:
    """The blocks of the setting in their order, repeated without end: a `BlockSource` of `llm.data.batches.loader`."""

    setting: Setting

    def __post_init__(self) -> None:
        self.block_size = self.setting.block_size
        self._blocks = list(self.setting.blocks())

    @property
    def num_blocks(self) -> int | None:
        """None: the blocks repeat without end."""
        return None

    def num_unread(self, num_samples: int) -> int:
        """Return 0, because the blocks repeat without end."""
        return 0

    def block(self, sample: int, seed: int) -> Row:
        """Return the block of a sample, a row with ids int64 [block_size + 1]; the seed is ignored."""
        return Row(self._blocks[sample % len(self._blocks)])


def run_ours(setting: Setting, gate: Gate, *extra_args: str, keeps_memory: bool = True) -> None:
    """Run the updater that `llm.training.run` builds, without the callbacks that follow a step."""
    import torch

    from llm.config.options import Options
    from llm.config.reader import read_options
    from llm.data.batches.loader import training_batches
    from llm.models.compile import is_compiled
    from llm.models.config import read_config
    from llm.models.flops import flops_per_token
    from llm.system.allocator import return_freed_memory
    from llm.training.accelerator import start_compute
    from llm.training.build import build_language_model, build_updater
    from llm.training.plan import plan_run, plan_schedule
    from llm.training.seeding import seed_weights
    from llm.training.updaters.base import NO_VOTES

    args = [*trainer_args(setting), "--max_train_steps", "1000000", *extra_args]
    options = read_options(Options, args, prog="benchmark", description="")
    machine = start_compute(options.training)
    if not keeps_memory:
        return_freed_memory()
    samples = StoredBlocks(setting)
    plan = plan_run(options.training, samples, num_ranks=1, seed=1)
    seed_weights(plan.seed)
    config = read_config(options.model)
    language_model = build_language_model(options, options.model, config, None, machine, plan)
    updater = build_updater(options, machine, language_model, plan_schedule(options, plan), plan)
    batches = training_batches(
        samples,
        seed=plan.seed,
        first_step=0,
        num_steps=plan.num_steps,
        micro_batch=plan.micro_batch,
        accumulation=plan.accumulation,
        rank=0,
        num_ranks=1,
        num_workers=options.data.dataloader_num_workers,
        device=machine.world.device,
    )
    precision = machine.accelerator.mixed_precision
    gate.facts |= {
        "arithmetic": "fp32" if precision == "no" else precision,
        "flops_per_token": flops_per_token(language_model.model, setting.block_size),
        "says": str(machine),
        "threads": torch.get_num_threads(),
        "compiled": is_compiled(language_model),
        "kfac": next(iter(updater.summary()), None),
    }
    for step, micro_batches in enumerate(batches):
        gate.after_update(updater.update(micro_batches, step, votes=NO_VOTES).loss, _peak_memory)


def run_ours_full_trainer(setting: Setting, gate: Gate) -> None:
    """Run the command of the trainer, with the gate as one more callback after each step."""
    import torch
    from accelerate.state import AcceleratorState

    from llm.models.compile import is_compiled
    from llm.trainers.gpt import main
    from llm.training import run
    from llm.training.loop import Callback, run_updates
    from llm.training.triggers import every

    def run_gated_updates(updater: Any, batches: Any, state: Any, callbacks: Any, **kwargs: Any) -> bool:
        precision = AcceleratorState().mixed_precision
        gate.facts |= {
            "arithmetic": "fp32" if precision == "no" else precision,
            "threads": torch.get_num_threads(),
            "compiled": is_compiled(updater.model),
        }
        gate_callback = Callback(every(1), lambda report: gate.after_update(report.loss, _peak_memory))
        return run_updates(updater, batches, state, [*callbacks, gate_callback], **kwargs)

    run.run_updates = run_gated_updates
    with tempfile.TemporaryDirectory() as name:
        args = [
            *trainer_args(setting),
            *("--train_dir", setting.data_dir, "--tokenizer_name", setting.start_dir),
            *("--validation_split_percentage", "0", "--save_minutes", "0", "--max_train_steps", "1000000"),
            *("--output_dir", name),
        ]
        main(args)


def trainer_args(setting: Setting) -> list[str]:
    """Return the arguments of the trainer for the model and the hyperparameters of all programs."""
    return [
        *("--model_name_or_path", setting.start_dir, "--block_size", str(setting.block_size)),
        *("--per_device_train_batch_size", str(setting.micro_batch), "--learning_rate", str(LEARNING_RATE)),
        *("--weight_decay", str(WEIGHT_DECAY), "--adam_beta1", str(BETAS[0]), "--adam_beta2", str(BETAS[1])),
        *("--lr_scheduler_type", "constant", "--seed", "1"),
    ]


def run_nanogpt(setting: Setting, gate: Gate, *, bf16: bool = False, compiled: bool = False) -> None:
    """Run nanoGPT's train.py, which reads the weights from a checkpoint and draws the blocks in their order."""
    import torch

    from benchmarks.nanogpt import endless, run_train_py

    assert setting.nanogpt_dir is not None
    folder = Path(setting.nanogpt_dir)
    on_cpu = setting.device == "cpu"
    starts = _block_starts(setting)

    def draw(*_: object, **__: object) -> Any:
        return torch.tensor([next(starts) for _ in range(setting.micro_batch)])

    is_first_update = True

    def after_update(variables: dict[str, Any]) -> None:
        nonlocal is_first_update
        if is_first_update:
            is_first_update = False
            names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
            uses_autocast = bf16 or not on_cpu
            arithmetic = names[variables["ptdtype"]] if uses_autocast else "fp32"
            compiles = bool(variables["compile"])
            gate.facts = {"arithmetic": arithmetic, "compiled": compiles, "threads": torch.get_num_threads()}
        gate.after_update(variables["loss"], _peak_memory)

    torch.randint = draw  # get_batch of nanoGPT draws the starts of its blocks with it
    args = [
        *("--init_from=resume", f"--out_dir={setting.start_dir}", f"--dataset={setting.data_dir}"),
        *(f"--device={setting.device}", "--gradient_accumulation_steps=1"),
        *(f"--batch_size={setting.micro_batch}", f"--block_size={setting.block_size}"),
        *(f"--learning_rate={LEARNING_RATE}", f"--weight_decay={WEIGHT_DECAY}"),
        *(f"--beta1={BETAS[0]}", f"--beta2={BETAS[1]}"),
        *([f"--compile={compiled}"] if on_cpu or compiled else []),
        *(["--dtype=bfloat16"] if bf16 else []),
    ]
    with tempfile.TemporaryDirectory() as name:
        bf16_file = Path(name, "train.py") if bf16 and on_cpu else None
        run_train_py(folder, endless(args), after_update=after_update, bf16_file=bf16_file)


def _block_starts(setting: Setting) -> Iterator[int]:
    """Index of the first token of each block, repeated without end."""
    while True:
        yield from range(0, setting.num_updates * setting.micro_batch * setting.block_size, setting.block_size)


def run_run_clm(setting: Setting, gate: Gate, *, precision: str | None = None) -> None:
    """Run the step of run_clm_no_trainer.py: with scheduler, accumulation and progress bar, without clipping."""
    import torch
    from accelerate import Accelerator
    from torch.utils.data import DataLoader
    from tqdm.auto import tqdm
    from transformers import AutoModelForCausalLM, default_data_collator, get_scheduler

    accelerator = Accelerator(mixed_precision=precision)
    model: Any = AutoModelForCausalLM.from_pretrained(setting.start_dir)
    loader: Any = DataLoader(
        _table(setting), shuffle=False, collate_fn=default_data_collator, batch_size=setting.micro_batch
    )
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer: Any = torch.optim.AdamW(groups, lr=LEARNING_RATE)
    scheduler: Any = get_scheduler("constant", optimizer)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    precision = accelerator.mixed_precision
    gate.facts |= {"arithmetic": "fp32" if precision == "no" else precision, "threads": torch.get_num_threads()}
    bar = tqdm(range(setting.num_updates))
    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            bar.update(1)
        gate.after_update(loss.detach(), _peak_memory)


def run_trainer(setting: Setting, gate: Gate) -> None:
    """Run transformers.Trainer with its defaults, except for the hyperparameters; it saves nothing."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, default_data_collator

    class LossKeepingTrainer(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            result = super().compute_loss(*args, **kwargs)
            self.newest_loss = (result[0] if isinstance(result, tuple) else result).detach()
            return result

    class GateCallback(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            gate.after_update(trainer.newest_loss, _peak_memory)

    with tempfile.TemporaryDirectory() as name:
        arguments = TrainingArguments(
            output_dir=name,
            per_device_train_batch_size=setting.micro_batch,
            max_steps=setting.num_updates,
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,  # otherwise it removes the targets of the last tokens
            use_cpu=setting.device == "cpu",
        )
        trainer: Any = LossKeepingTrainer(
            model=AutoModelForCausalLM.from_pretrained(setting.start_dir),
            args=arguments,
            train_dataset=_table(setting),
            data_collator=default_data_collator,
            callbacks=[GateCallback()],
        )
        gate.facts |= {"arithmetic": "bf16" if arguments.bf16 else "fp32", "threads": torch.get_num_threads()}
        trainer.train()


def _table(setting: Setting) -> Any:
    """Rows as run_clm makes them, with an attention mask of ones, and with the targets of all tokens."""
    from datasets import Dataset

    blocks = np.stack(list(setting.blocks()))
    columns = {"input_ids": blocks[:, :-1], "attention_mask": np.ones_like(blocks[:, :-1]), "labels": blocks[:, :-1]}
    return Dataset.from_dict({**columns, "shift_labels": blocks[:, 1:]})


def _peak_memory() -> dict[str, Any]:
    """Peak of memory in bytes since the last call."""
    import torch

    from llm.system.memory import peak_bytes, reset_peak_bytes

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = peak_bytes(device)
    reset_peak_bytes(device)
    return {"peak_bytes": peak}


_EAGER = ("--torch_compile", "false")
_KFAC_INTERVALS = ("--kfac_factor_update_steps", str(KFAC_INTERVAL), "--kfac_inv_update_steps", str(KFAC_INTERVAL))
_KFAC = (*_EAGER, "--kfac", *_KFAC_INTERVALS)

PROGRAMS: dict[str, Callable[[Setting, Gate], None]] = {
    "ours": run_ours,
    "ours_eager": lambda setting, gate: run_ours(setting, gate, *_EAGER),
    "ours_full_trainer": run_ours_full_trainer,
    "ours_fp32": lambda setting, gate: run_ours(setting, gate, "--mixed_precision", "no"),
    "ours_returning": lambda setting, gate: run_ours(setting, gate, keeps_memory=False),
    "ours_kfac": lambda setting, gate: run_ours(setting, gate, *_KFAC),
    "ours_kfac_inverse": lambda setting, gate: run_ours(setting, gate, *_KFAC, "--kfac_method", "inverse"),
    "ours_kfac_spread": lambda setting, gate: run_ours(setting, gate, *_KFAC, "--kfac_spread"),
    "nanogpt": run_nanogpt,
    "nanogpt_bf16": lambda setting, gate: run_nanogpt(setting, gate, bf16=True),
    "nanogpt_compile": lambda setting, gate: run_nanogpt(setting, gate, compiled=True),
    "run_clm": run_run_clm,
    "run_clm_bf16": lambda setting, gate: run_run_clm(setting, gate, precision="bf16"),
    "trainer": run_trainer,
    "litgpt": lambda setting, gate: run_litgpt(setting, gate, _peak_memory),
    "litgpt_fp32": lambda setting, gate: run_litgpt(setting, gate, _peak_memory, "32-true"),
    "gemm": lambda setting, gate: measure_gemm(setting.device, gate),
}


if __name__ == "__main__":
    # Before the imports of any library that may print something.
    GATE = Gate()
    PROGRAMS[sys.argv[1]](Setting.read(Path(sys.argv[2])), GATE)
