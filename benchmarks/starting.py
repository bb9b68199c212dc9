"""What all programs of `benchmarks.throughput` start from: weights, a tokenizer, and ids."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.programs import BETAS, LEARNING_RATE, WEIGHT_DECAY, Setting

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
        whole: updates of the whole trainer in a round; 0 where it is not measured.
    """

    layers: int
    heads: int
    width: int
    block: int
    batch: int
    vocabulary: int
    updates: int
    whole: int


def write_start(
    folder: Path,
    size: Size,
    num_updates: int,
    device: str,
    nanogpt_dir: Path | None,
    *,
    nanogpt_bias: bool = False,
    seed: int = 0,
) -> Setting:
    """Writes what the programs start from.

    The vocabulary is the same for all, and at 124M the padded one that nanoGPT has by itself.

    Args:
        folder: where; it is there, and empty.
        size: of the model and its updates.
        num_updates: that there are ids for.
        device: `cpu` or `cuda`.
        nanogpt_dir: nanoGPT's folder; None where it is not measured.
        nanogpt_bias: whether it trains biases; as shipped it does not.
        seed: of the weights.
    """
    from benchmarks.nanogpt import write_checkpoint

    start_dir, data_dir = folder / "start", folder / "data"
    data_dir.mkdir()
    _write_model(start_dir, size, seed)
    draw = np.random.default_rng(0)
    num_ids = num_updates * size.batch * size.block + 1
    (draw.random(num_ids) ** _SKEW * size.vocabulary).astype(np.uint16).tofile(data_dir / "train.bin")
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
        data_dir=str(data_dir),
        block_size=size.block,
        micro_batch=size.batch,
        num_updates=num_updates,
        device=device,
        nanogpt_dir=None if nanogpt_dir is None else str(nanogpt_dir),
    )


def _write_model(folder: Path, size: Size, seed: int) -> None:
    """A random GPT-2 and a tokenizer with its vocabulary, as `from_pretrained` loads them."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=size.vocabulary,
        n_positions=size.block,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
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
