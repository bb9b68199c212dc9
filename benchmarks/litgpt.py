"""litgpt's pretraining, unchanged, from the weights and on the blocks that all programs share.

The models of litgpt have rotary positions, so litgpt is measured on a GPT-NeoX: the architecture of Pythia, which both
litgpt and transformers support.
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

# Tokens that no measurement reaches. With more, litgpt's estimate of the remaining time exceeds a timedelta.
_ENDLESS = 10**11


def has_litgpt(python: str) -> bool:
    """Return whether litgpt is installed for this Python interpreter."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('litgpt') is None)"
    return subprocess.run([python, "-c", code], check=False, capture_output=True).returncode == 0


def run_litgpt(
    setting: Setting, gate: Gate, extra: Callable[[], Mapping[str, Any]], precision: str | None = None
) -> None:
    """Run `litgpt pretrain` with its defaults, except for sizes and hyperparameters, and without saving; it compiles.

    As by default, all weights decay and every step writes a record.

    Args:
        setting: a setting with a GPT-NeoX.
        gate: called after every record.
        extra: returns the values of a report besides the loss.
        precision: value of litgpt's option; None: its own choice, which is bf16 even on a CPU that emulates bf16.
    """
    import torch
    from litgpt import pretrain
    from litgpt.args import EvalArgs, TrainArgs

    pretrain.choose_logger = lambda *_, **__: _recorder(gate, extra)
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


def _recorder(gate: Gate, extra: Callable[[], Mapping[str, Any]]) -> Any:
    """A logger that calls the gate with the record of every step."""
    from lightning.fabric.loggers.logger import Logger

    class Recorder(Logger):
        name = "gate"
        version = 0

        def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
            gate.after_update(metrics["loss"], extra)

        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            pass

    return Recorder()


def _blocks(setting: Setting) -> Any:
    """The blocks of the setting as a data module of litgpt; one block of zeros for the validation at its start."""
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
    """Write the weights, converted by litgpt's own function; return litgpt's configuration of the model."""
    import torch
    from litgpt import Config
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_gpt_neox
    from safetensors.torch import load_file

    hf_config = json.loads((start_dir / "config.json").read_text())
    config = Config(
        name="benchmark",
        block_size=block_size,
        n_layer=hf_config["num_hidden_layers"],
        n_head=hf_config["num_attention_heads"],
        n_embd=hf_config["hidden_size"],
        intermediate_size=hf_config["intermediate_size"],
        vocab_size=hf_config["vocab_size"],
        padded_vocab_size=hf_config["vocab_size"],
        rotary_percentage=hf_config["rope_parameters"]["partial_rotary_factor"],
    )
    weights: dict[str, torch.Tensor] = {}
    copy_weights_gpt_neox(config, weights, load_file(start_dir / "model.safetensors"))
    folder.mkdir()
    torch.save(weights, folder / "lit_model.pth")
    return config
