"""nanoGPT, run as it is: its own `train.py`, and a hook where that prints the line of an iteration."""

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
# On a CPU its loop takes no autocast whatever the dtype; these words are all that bf16 there has to change.
_NO_AUTOCAST = "nullcontext() if device_type == 'cpu' else "
_NEVER = 1_000_000_000
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def require_nanogpt(folder: Path) -> None:
    """Ends with one line where the folder is not nanoGPT's, or its train.py is none that is known here."""
    for name in ("train.py", "model.py", "configurator.py"):
        if not (folder / name).is_file():
            sys.exit(f"--nanogpt {folder}: no {name} there; give a checkout of karpathy/nanoGPT")
    text = (folder / "train.py").read_text()
    if _NO_AUTOCAST not in text or 'print(f"iter {iter_num}' not in text:
        sys.exit(f"--nanogpt {folder}: another train.py than that of karpathy/nanoGPT")


def run_train_py(
    folder: Path,
    words: Sequence[str],
    *,
    after_update: Callable[[dict[str, Any]], None],
    after_evaluation: Callable[[], None] = lambda: None,
    bf16_file: Path | None = None,
) -> None:
    """Runs its train.py in this process.

    Args:
        folder: of nanoGPT.
        words: its arguments; `--log_interval=1` is added, so that it says a line an iteration.
        after_update: called behind every update, with the script's own variables.
        after_evaluation: called behind every evaluation of its own.
        bf16_file: where a copy is put, and run, that takes autocast on a CPU too; None runs it as it stands.
    """

    def hear(*said: object, **_: object) -> None:
        line = str(said[0]) if said else ""
        if line.startswith("iter "):
            after_update(vars(sys.modules[_MODULE]))
        elif line.startswith("step "):
            after_evaluation()

    script = folder / "train.py"
    if bf16_file is not None:
        bf16_file.write_text(script.read_text().replace(_NO_AUTOCAST, ""))
        script = bf16_file
    os.chdir(folder)  # it opens its configurator there
    sys.path.insert(0, str(folder))
    sys.argv = [str(script), *words, "--log_interval=1"]
    runpy.run_path(str(script), init_globals={"print": hear}, run_name=_MODULE)


def write_checkpoint(folder: Path, start_dir: Path, *, bias: bool, **hyperparameters: Any) -> None:
    """Its `ckpt.pt` beside an HF GPT-2's weights, with a fresh optimizer: what `--init_from=resume` goes on from.

    Args:
        folder: of nanoGPT.
        start_dir: of the HF model, and of the file.
        bias: whether it trains biases; as shipped it does not. Those of the start are zero.
        hyperparameters: what its `configure_optimizers` takes.
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
    own = {name: weights[name].t() if name.endswith(_TRANSPOSED) else weights[name] for name in model.state_dict()}
    model.load_state_dict(own)
    optimizer = model.configure_optimizers(**hyperparameters)
    checkpoint = {
        "model": model.state_dict(),
        "model_args": arguments,
        "optimizer": optimizer.state_dict(),
        "iter_num": 1,  # at 0 it would evaluate
        "best_val_loss": 1e9,
        "config": {},
    }
    torch.save(checkpoint, start_dir / "ckpt.pt")


def endless(words: Sequence[str]) -> list[str]:
    """Its arguments for a run without an end, an evaluation or a change of the learning rate."""
    return [*words, f"--max_iters={_NEVER}", f"--eval_interval={_NEVER}", "--decay_lr=False"]


def prepare_characters(folder: Path, text: Path, data_dir: Path) -> None:
    """`train.bin`, `val.bin` and `meta.pkl` of a text, by its own prepare.py, which finds the text and fetches none."""
    shutil.copy(folder / "data/shakespeare_char/prepare.py", data_dir / "prepare.py")
    shutil.copy(text, data_dir / "input.txt")
    subprocess.run([sys.executable, str(data_dir / "prepare.py")], check=True, stdout=subprocess.DEVNULL)
