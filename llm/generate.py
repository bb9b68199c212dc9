"""``python -m llm.generate``: continue a text with a model of a run, a checkpoint or the Hub."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm.config.errors import UserError
from llm.config.exit_codes import run_command
from llm.config.option import OptionGroup, option
from llm.config.options import ModelOptions, TokenizerOptions
from llm.config.reader import read_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_RULE_WIDTH = 79


class GenerateOptions(OptionGroup):
    """The options of ``python -m llm.generate``."""

    model: str = option(..., "folder of a run or of a checkpoint, or Hub name", positional=True, metavar="MODEL")
    prompt: str | None = option(
        None, "text to continue, or - for the standard input (default: the tokenizer's first token)", metavar="TEXT"
    )
    num_samples: int = option(1, "number of continuations", ge=1, metavar="N")
    max_new_tokens: int = option(200, "maximum length of a continuation, in tokens", ge=1, metavar="N")
    temperature: float = option(
        0.8,
        "sampling temperature: 0 always takes the most likely token, 1 samples from the model's distribution",
        ge=0,
        metavar="X",
    )
    top_k: int | None = option(200, "sample from this many most likely tokens only", ge=1, metavar="N")
    seed: int | None = option(None, "seed of the sampling (default: drawn, and printed)", ge=0, lt=2**63, metavar="N")
    trust_remote_code: bool = option(False, "run code from a Hub repository")
    use_cpu: bool = option(False, "run on the CPU, not on an accelerator")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the samples to the standard output and return the exit code.

    Args:
        argv: the command line without the program's name; `sys.argv[1:]` when None.
    """
    return run_command(lambda: _generate(sys.argv[1:] if argv is None else argv))


def _generate(argv: Sequence[str]) -> int:
    options = read_options(
        GenerateOptions,
        argv,
        prog="python -m llm.generate",
        description="Continue a text with a trained model.",
    )
    name_or_path = find_model(options.model)
    prompt = sys.stdin.read().removesuffix("\n") if options.prompt == "-" else options.prompt
    seed = random.randrange(2**31) if options.seed is None else options.seed
    if options.seed is None:
        print(f"--seed {seed}", file=sys.stderr)

    from llm.models.sampling import sample

    model, tokenizer = _load(options, name_or_path)
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


def find_model(name: str) -> str:
    """Return the folder or Hub name to load; the newest checkpoint for a run that has no finished model.

    Raises:
        UserError: the folder holds no model.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name
    if (folder / "config.json").is_file():
        return str(folder)

    from llm.training.checkpoints.layout import saved_steps
    from llm.training.run_dir.layout import CHECKPOINTS

    steps = saved_steps(folder / CHECKPOINTS) or saved_steps(folder)
    if not steps:
        raise UserError(
            f"{name}: no model in this folder (no config.json, no checkpoints); "
            "give a run's --output_dir, one of its checkpoints/step_N, or a Hub name"
        )
    _, checkpoint = steps[-1]
    print(f"{name} has no finished model; using {checkpoint}", file=sys.stderr)
    return str(checkpoint)


def _load(options: GenerateOptions, name_or_path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model in fp32, on the accelerator if there is one, and its tokenizer."""
    if not Path(name_or_path).is_dir():
        _detect_hub(name_or_path)

    import torch
    from transformers.utils import logging as library_logging

    from llm.models.build import build_model
    from llm.models.config import load_config
    from llm.tokenization.load import load_tokenizer

    library_logging.set_verbosity_error()  # the warnings of transformers address programmers
    model_options = ModelOptions(model_name_or_path=name_or_path, trust_remote_code=options.trust_remote_code)
    try:
        tokenizer = load_tokenizer(
            TokenizerOptions(),
            model_options,
            # An existing tokenizer is loaded: no text is needed to train one.
            texts=lambda: iter(()),
            corpus_fingerprint="",
            cache_dir=Path(),
        )
        model, _ = build_model(model_options, load_config(model_options, tokenizer), tokenizer)
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
    """Print a single text alone, so that it can be piped; print several with a heading each."""
    for number, text in enumerate(texts, start=1):
        if len(texts) > 1:
            print(f"--- sample {number} of {len(texts)} ".ljust(_RULE_WIDTH, "-"))
        # A terminal without UTF-8 shows question marks; otherwise print would raise.
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, errors="replace").decode(encoding))


if __name__ == "__main__":
    sys.exit(main())
