"""``python -m llm.generate``: text from a model that was trained here, or from one of the Hub."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm.config.errors import UserError
from llm.config.exit_codes import run_command
from llm.config.generate import GenerateOptions
from llm.config.options import ModelOptions, TokenizerOptions
from llm.config.reader import read_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_RULE_WIDTH = 79


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the samples to the standard output and returns the exit code."""
    return run_command(lambda: _generate(sys.argv[1:] if argv is None else argv))


def _generate(argv: Sequence[str]) -> int:
    options = read_options(
        GenerateOptions,
        argv,
        prog="python -m llm.generate",
        description="Continues a text with a trained model.",
    )
    place = model_place(options.model)
    prompt = sys.stdin.read().removesuffix("\n") if options.prompt == "-" else options.prompt
    seed = random.randrange(2**31) if options.seed is None else options.seed
    if options.seed is None:
        print(f"--seed {seed}", file=sys.stderr)

    from llm.models.sampling import sample

    model, tokenizer = _load(options, place)
    texts = sample(
        model,
        tokenizer,
        prompt,
        num_samples=options.num_samples,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=seed,
    )
    _print_texts(texts)
    return 0


def model_place(name: str) -> str:
    """The folder or Hub name to load: of a run that is not at its end, its newest checkpoint.

    Raises:
        UserError: a folder without a model.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name
    if (folder / "config.json").is_file():
        return str(folder)

    from llm.training.checkpoints.layout import saved_steps

    steps = saved_steps(folder / "checkpoints") or saved_steps(folder)
    if not steps:
        raise UserError(
            f"{name}: no model in this folder (no config.json, no checkpoints); "
            "give a run's --output_dir, one of its checkpoints/step_N, or a Hub name"
        )
    print(f"{name} has no finished model; taking {steps[-1][1]}", file=sys.stderr)
    return str(steps[-1][1])


def _load(options: GenerateOptions, place: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in fp32 on the machine's accelerator, if it has one, and its tokenizer."""
    if not Path(place).is_dir():
        _detect_hub(place)

    import torch
    from transformers.utils import logging as library_logging

    from llm.models.build import build_model
    from llm.models.config import load_config
    from llm.tokenization.load import load_tokenizer

    library_logging.set_verbosity_error()  # its advice is for programmers
    named = ModelOptions(model_name_or_path=place, trust_remote_code=options.trust_remote_code)
    try:
        tokenizer = load_tokenizer(
            TokenizerOptions(),
            named,
            # A tokenizer is read, not made: there is no text.
            texts=lambda: iter(()),
            corpus_fingerprint="",
            cache_dir=Path(),
        )
        model, _ = build_model(named, load_config(named, tokenizer), tokenizer)
    except UserError as error:
        raise UserError(str(error).removeprefix("--model_name_or_path ")) from error
    accelerator = None if options.use_cpu else torch.accelerator.current_accelerator()
    if accelerator is not None and torch.accelerator.is_available():
        torch.nn.Module.to(model, accelerator)
    return model, tokenizer


def _detect_hub(name: str) -> None:
    """Probe the Hub once; without it, the libraries read the local cache and do not retry."""
    from huggingface_hub import is_offline_mode

    from llm.hub.connection import detect

    if not is_offline_mode() and not detect([name]):
        print("the Hub cannot be reached: looking into the local cache", file=sys.stderr)


def _print_texts(texts: Sequence[str]) -> None:
    """A single text alone, so that it can be piped on; several below a rule each."""
    for number, text in enumerate(texts, start=1):
        if len(texts) > 1:
            print(f"--- sample {number} of {len(texts)} ".ljust(_RULE_WIDTH, "-"))
        # A terminal that does not speak UTF-8 gets question marks, not a traceback.
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, errors="replace").decode(encoding))


if __name__ == "__main__":
    sys.exit(main())
