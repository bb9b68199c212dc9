"""The common start of all programs of `benchmarks.throughput`: weights, a tokenizer, and token ids."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.settings import BETAS, LEARNING_RATE, WEIGHT_DECAY, Setting

# Exponent that makes small ids more frequent, so that the loss falls from the first step on.
_SKEW = 3
# The statements of the training loop of run_clm_no_trainer.py, in this order.
_RUN_CLM_STEP = (
    "AdamW(",
    "model(**batch)",
    "accelerator.backward(loss)",
    "optimizer.step()",
    "lr_scheduler.step()",
    "optimizer.zero_grad()",
)

# Values of a configuration besides its sizes. GPT-NeoX has no dropout by default, and no default for the inner width.
_CONFIG_VALUES: dict[str, Callable[[Size], dict[str, Any]]] = {
    "gpt2": lambda _: dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    "gpt_neox": lambda size: {"intermediate_size": 4 * size.width},
}


@dataclass(frozen=True)
class Size:
    """Sizes of a model and of its steps.

    Attributes:
        layers: number of layers.
        heads: number of heads per layer.
        width: width of the model.
        block: targets per block.
        batch: blocks per step.
        vocabulary: size of the vocabulary.
        updates: steps of each program per round.
    """

    layers: int
    heads: int
    width: int
    block: int
    batch: int
    vocabulary: int
    updates: int


def write_start(
    folder: Path,
    size: Size,
    num_updates: int,
    device: str,
    nanogpt_dir: Path | None,
    *,
    model_type: str = "gpt2",
    nanogpt_bias: bool = False,
    seed: int = 0,
) -> Setting:
    """Write the start of all programs; at 124M all use nanoGPT's padded vocabulary.

    Args:
        folder: an existing, empty folder to write to.
        size: sizes of the model and of its steps.
        num_updates: number of steps that the ids suffice for.
        device: `cpu` or `cuda`.
        nanogpt_dir: folder of nanoGPT; None if it is not measured.
        model_type: `gpt2`, or `gpt_neox`, which litgpt supports and nanoGPT does not.
        nanogpt_bias: whether nanoGPT trains biases; it does not by default.
        seed: seed of the weights.
    """
    from benchmarks.nanogpt import write_checkpoint

    start_dir = folder / "start"
    data_dir = folder / "data"
    data_dir.mkdir()
    _write_model(start_dir, size, model_type, seed)
    shares = np.random.default_rng(0).random(num_updates * size.batch * size.block + 1) ** _SKEW
    (shares * size.vocabulary).astype(np.uint16).tofile(data_dir / "train.bin")
    if nanogpt_dir is not None:
        write_checkpoint(
            nanogpt_dir,
            start_dir,
            bias=nanogpt_bias,
            weight_decay=WEIGHT_DECAY,
            learning_rate=LEARNING_RATE,
            betas=BETAS,
            device_type=device,
        )
    return Setting(
        start_dir=str(start_dir),
        model_type=model_type,
        data_dir=str(data_dir),
        block_size=size.block,
        micro_batch=size.batch,
        num_updates=num_updates,
        device=device,
        nanogpt_dir=None if nanogpt_dir is None else str(nanogpt_dir),
    )


def _write_model(folder: Path, size: Size, model_type: str, seed: int) -> None:
    """Write a random model without dropout, and a tokenizer of its vocabulary, for `from_pretrained`."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=size.vocabulary,
        max_position_embeddings=size.block,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        bos_token_id=0,
        eos_token_id=0,
        **_CONFIG_VALUES[model_type](size),
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    vocabulary = {f"<{number}>": number for number in range(size.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<0>").save_pretrained(folder)


def require_run_clm(file: Path) -> None:
    """Exit with one line if the training step of the file is not the one that `benchmarks.programs` runs.

    Raises:
        SystemExit: the file is missing, or its step differs.
    """
    if not file.is_file():
        sys.exit(f"--run_clm {file}: no such file")
    text = file.read_text()
    offset = 0
    for statement in _RUN_CLM_STEP:
        offset = text.find(statement, offset)
        if offset < 0:
            sys.exit(
                f"--run_clm {file}: no `{statement}` in the expected order, so its step is not the one that this "
                "benchmark runs; give run_clm_no_trainer.py of the installed transformers"
            )
    if "clip_grad_norm_" in text:
        sys.exit(f"--run_clm {file}: it clips gradients, which the step that this benchmark runs does not")
