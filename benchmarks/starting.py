"""What all programs of `benchmarks.throughput` start from: weights, a tokenizer, and ids."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.settings import BETAS, LEARNING_RATE, WEIGHT_DECAY, Setting

# Ids below are this many times as likely as if all were: a loss that falls from the first update on.
_SKEW = 3
# In this order they stand in the loop of run_clm_no_trainer.py.
_STEP_OF_RUN_CLM = (
    "AdamW(",
    "model(**batch)",
    "accelerator.backward(loss)",
    "optimizer.step()",
    "lr_scheduler.step()",
    "optimizer.zero_grad()",
)

# What a configuration says beside sizes; that of GPT-NeoX has no dropout by itself, and no rule for the inner width.
_OF_TYPE: dict[str, Callable[[Size], dict[str, Any]]] = {
    "gpt2": lambda _: dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    "gpt_neox": lambda size: {"intermediate_size": 4 * size.width},
}


@dataclass(frozen=True)
class Size:
    """A model and its update.

    Attributes:
        layers: of the model.
        heads: of a layer.
        width: of the model.
        block: targets of a block.
        batch: blocks of an update.
        vocabulary: ids of the model.
        updates: of each program in a round.
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
    """Writes what the programs start from; at 124M all have the padded vocabulary that nanoGPT has by itself.

    Args:
        folder: where; it is there, and empty.
        size: of the model and its updates.
        num_updates: that there are ids for.
        device: `cpu` or `cuda`.
        nanogpt_dir: nanoGPT's folder; None where it is not measured.
        model_type: `gpt2`, or `gpt_neox`, which nanoGPT has not and litgpt has.
        nanogpt_bias: whether it trains biases; as shipped it does not.
        seed: of the weights.
    """
    from benchmarks.nanogpt import write_checkpoint

    start_dir, data_dir = folder / "start", folder / "data"
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
    """A random model without dropout, and a tokenizer with its vocabulary, as `from_pretrained` loads them."""
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
        **_OF_TYPE[model_type](size),
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = {f"<{number}>": number for number in range(size.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<0>").save_pretrained(folder)


def require_run_clm(file: Path) -> None:
    """Ends with one line where the file's step is not the one that `benchmarks.programs` runs."""
    if not file.is_file():
        sys.exit(f"--run_clm {file}: no such file")
    text = file.read_text()
    place = 0
    for words in _STEP_OF_RUN_CLM:
        place = text.find(words, place)
        if place < 0:
            sys.exit(f"--run_clm {file}: no `{words}` where it is expected: its step is another one than is run here")
    if "clip_grad_norm_" in text:
        sys.exit(f"--run_clm {file}: it clips, which the step that is run here does not")
