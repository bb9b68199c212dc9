"""The options of ``python -m llm.generate``."""

from __future__ import annotations

from llm.config.option import OptionGroup, option


class GenerateOptions(OptionGroup):
    """Text from a model."""

    model: str = option(..., "folder of a run or of a checkpoint, or Hub name", positional=True, metavar="MODEL")
    prompt: str | None = option(
        None,
        "text to be continued, or - for the standard input (default: the tokenizer's first token)",
        metavar="TEXT",
    )
    num_samples: int = option(1, "continuations", ge=1, metavar="N")
    max_new_tokens: int = option(200, "longest continuation, in tokens", ge=1, metavar="N")
    temperature: float = option(
        0.8,
        "surprise: 0 always takes the likeliest token, 1 draws as the model says",
        ge=0,
        metavar="X",
    )
    top_k: int | None = option(200, "draw among this many likeliest tokens only", ge=1, metavar="N")
    seed: int | None = option(None, "seed of the draws (default: drawn, and said)", ge=0, lt=2**63, metavar="N")
    trust_remote_code: bool = option(False, "run code that a Hub repository brings along")
    use_cpu: bool = option(False, "use no accelerator")
