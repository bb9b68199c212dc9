"""litgpt's pretraining as it is, from weights that were given to all programs, on their blocks.

Its models have rotary positions, so that it is measured on a GPT-NeoX, as which it and transformers know Pythia.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gate import Gate
from benchmarks.settings import BETAS, LEARNING_RATE, WEIGHT_DECAY, Setting

_ENDLESS = 10**11  # tokens; more than that, and its time that remains leaves the range of a timedelta


def has_litgpt(python: str) -> bool:
    """Whether that interpreter finds it."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('litgpt') is None)"
    return subprocess.run([python, "-c", code], check=False, capture_output=True).returncode == 0


def run_litgpt(
    setting: Setting, gate: Gate, also: Callable[[], Mapping[str, Any]], precision: str | None = None
) -> None:
    """`litgpt pretrain` at its defaults, but for sizes, hyperparameters and what it would save; it always compiles.

    Every weight decays there, and a record of every update is made, as by default.

    Args:
        setting: with a GPT-NeoX in it.
        gate: stands behind every record.
        also: what an answer says beside the loss.
        precision: as its option; None: what it chooses, which is bf16 also where a CPU only emulates that.
    """
    import torch
    from litgpt import pretrain
    from litgpt.args import EvalArgs, TrainArgs

    pretrain.choose_logger = lambda *_, **__: _records(gate, also)
    precision = precision or pretrain.get_default_supported_precision(training=True)
    arithmetic = {"32": "fp32", "bf16": "bf16", "16": "fp16"}[precision.split("-")[0]]
    gate.facts |= {"arithmetic": arithmetic, "compiled": True, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as name:
        checkpoint = Path(name, "start")
        config = _write_checkpoint(checkpoint, Path(setting.start_dir), setting.block_size)
        pretrain.setup(
            "",
            model_config=config,
            out_dir=Path(name, "out"),
            initial_checkpoint_dir=checkpoint,
            devices=1,
            precision=precision,
            data=_blocks(setting),
            train=TrainArgs(
                save_interval=None,
                global_batch_size=setting.micro_batch,
                micro_batch_size=setting.micro_batch,
                max_tokens=_ENDLESS,
                max_norm=1.0,
                min_lr=LEARNING_RATE,
                lr_warmup_steps=0,
                tie_embeddings=False,
            ),
            eval=EvalArgs(interval=_ENDLESS, max_iters=1, final_validation=False),
            optimizer={
                "class_path": "torch.optim.AdamW",
                "init_args": {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "betas": BETAS},
            },
        )


def _records(gate: Gate, also: Callable[[], Mapping[str, Any]]) -> Any:
    """A logger that gets the record of every update, behind which the gate stands."""
    from lightning.fabric.loggers.logger import Logger

    class Records(Logger):
        name, version = "gate", 0

        def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
            gate.passed(metrics["loss"], also)

        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            pass

    return Records()


def _blocks(setting: Setting) -> Any:
    """The setting's blocks as litgpt takes its data; one of zeros to validate, which it does once at the start."""
    import torch
    from litgpt.data import DataModule
    from torch.utils.data import DataLoader

    class Blocks(DataModule):
        def connect(self, *_: Any, **__: Any) -> None:
            pass

        def train_dataloader(self) -> Any:
            blocks = torch.from_numpy(np.stack(list(setting.blocks())))
            return DataLoader(blocks, batch_size=setting.micro_batch)

        def val_dataloader(self) -> Any:
            return DataLoader(torch.zeros(1, setting.block_size + 1, dtype=torch.int64))

    return Blocks()


def _write_checkpoint(folder: Path, start_dir: Path, block_size: int) -> Any:
    """The weights as litgpt's own conversion gives them; its configuration of them."""
    import torch
    from litgpt import Config
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_gpt_neox
    from safetensors.torch import load_file

    given = json.loads((start_dir / "config.json").read_text())
    config = Config(
        name="benchmark",
        block_size=block_size,
        n_layer=given["num_hidden_layers"],
        n_head=given["num_attention_heads"],
        n_embd=given["hidden_size"],
        intermediate_size=given["intermediate_size"],
        vocab_size=given["vocab_size"],
        padded_vocab_size=given["vocab_size"],
        rotary_percentage=given["rope_parameters"]["partial_rotary_factor"],
    )
    weights: dict[str, torch.Tensor] = {}
    copy_weights_gpt_neox(config, weights, load_file(start_dir / "model.safetensors"))
    folder.mkdir()
    torch.save(weights, folder / "lit_model.pth")
    return config
