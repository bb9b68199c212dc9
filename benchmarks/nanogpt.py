"""nanoGPT, run unchanged: its `train.py`, with a hook on the line that it prints for each iteration."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_MODULE = "nanogpt_train"
# On a CPU its loop uses no autocast, whatever the dtype. For bf16 on a CPU only this expression has to be removed.
_NO_AUTOCAST = "nullcontext() if device_type == 'cpu' else "
# A number of iterations that no measurement reaches.
_NEVER = 1_000_000_000
# Weights that HuggingFace stores transposed.
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def require_nanogpt(folder: Path) -> None:
    """Exit with one line if the folder is not a checkout of nanoGPT, or its train.py is an unknown one.

    Raises:
        SystemExit: a file is missing, or train.py differs.
    """
    for name in ("train.py", "model.py", "configurator.py"):
        if not (folder / name).is_file():
            sys.exit(f"--nanogpt {folder}: no {name} in this folder; give a checkout of karpathy/nanoGPT")
    text = (folder / "train.py").read_text()
    if _NO_AUTOCAST not in text or 'print(f"iter {iter_num}' not in text:
        sys.exit(f"--nanogpt {folder}: unknown train.py; give a checkout of karpathy/nanoGPT")


def run_train_py(
    folder: Path,
    args: Sequence[str],
    *,
    after_update: Callable[[dict[str, Any]], None],
    after_evaluation: Callable[[], None] = lambda: None,
    bf16_file: Path | None = None,
) -> None:
    """Run its train.py in this process.

    Args:
        folder: folder of nanoGPT.
        args: arguments of train.py; `--log_interval=1` is added, so that it prints a line per iteration.
        after_update: called after every step, with the global variables of the script.
        after_evaluation: called after every evaluation of the script.
        bf16_file: file for a copy of the script that uses autocast on a CPU too; None: run the unchanged script.
    """

    def on_print(*values: object, **_: object) -> None:
        line = str(values[0]) if values else ""
        if line.startswith("iter "):
            after_update(vars(sys.modules[_MODULE]))
        elif line.startswith("step "):
            after_evaluation()

    script = folder / "train.py"
    if bf16_file is not None:
        bf16_file.write_text(script.read_text().replace(_NO_AUTOCAST, ""))
        script = bf16_file
    os.chdir(folder)  # the script opens its configurator by a relative path
    sys.path.insert(0, str(folder))
    sys.argv = [str(script), *args, "--log_interval=1"]
    runpy.run_path(str(script), init_globals={"print": on_print}, run_name=_MODULE)


def write_checkpoint(folder: Path, start_dir: Path, *, bias: bool, **hyperparameters: Any) -> None:
    """Write nanoGPT's `ckpt.pt`, with the weights of an HF GPT-2 and a new optimizer, for `--init_from=resume`.

    Args:
        folder: folder of nanoGPT.
        start_dir: folder of the HF model; the file is written there.
        bias: whether nanoGPT trains biases; it does not by default. The biases of the start are zero.
        hyperparameters: arguments of nanoGPT's `configure_optimizers`.
    """
    import torch
    from transformers import GPT2LMHeadModel

    sys.path.insert(0, str(folder))
    model_module: Any = __import__("model")
    source = GPT2LMHeadModel.from_pretrained(start_dir)
    config = source.config
    arguments = {
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "block_size": config.n_positions,
        "bias": bias,
        "vocab_size": config.vocab_size,
        "dropout": 0.0,
    }
    model = model_module.GPT(model_module.GPTConfig(**arguments))
    weights = source.state_dict()
    assert not any(value.any() for name, value in weights.items() if name.endswith(".bias"))
    nanogpt_weights = {
        name: weights[name].t() if name.endswith(_TRANSPOSED) else weights[name] for name in model.state_dict()
    }
    model.load_state_dict(nanogpt_weights)
    optimizer = model.configure_optimizers(**hyperparameters)
    checkpoint = {
        "model": model.state_dict(),
        "model_args": arguments,
        "optimizer": optimizer.state_dict(),
        "iter_num": 1,  # nanoGPT evaluates in iteration 0
        "best_val_loss": 1e9,
        "config": {},
    }
    torch.save(checkpoint, start_dir / "ckpt.pt")


def endless(args: Sequence[str]) -> list[str]:
    """Return the arguments of train.py for a run without an end, evaluations or changes of the learning rate."""
    return [*args, f"--max_iters={_NEVER}", f"--eval_interval={_NEVER}", "--decay_lr=False"]


def prepare_characters(folder: Path, text: Path, data_dir: Path) -> None:
    """Write `train.bin`, `val.bin` and `meta.pkl` of a text with nanoGPT's prepare.py, which then downloads nothing."""
    shutil.copy(folder / "data/shakespeare_char/prepare.py", data_dir / "prepare.py")
    shutil.copy(text, data_dir / "input.txt")
    subprocess.run([sys.executable, str(data_dir / "prepare.py")], check=True, stdout=subprocess.DEVNULL)
