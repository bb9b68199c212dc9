"""The model card: what a reader on the Hub needs to load, judge and reproduce the model.

A card states only the facts that were passed in. A fact that is None has no line.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from llm.system.units import format_duration

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")

_LIMITS = """\
This run trained the model to continue text, and nothing else: it was not tuned to follow
instructions, to be correct, or to be safe. The model can write falsehoods, repeat passages of its
training text, and reproduce bias or offensive content of that text. Nothing was measured beyond the
numbers on this page; check the output of the model before you rely on it."""


@dataclass(frozen=True)
class RunFacts:
    """Facts about a finished run, for its model card.

    Attributes:
        name: name of the run, the heading of the card.
        command: command line, or call of `llm.train`, that made the model, without secrets.
        architecture: class of the model, such as ``GPT2LMHeadModel``.
        model_type: type of the model in transformers, such as ``gpt2``.
        num_parameters: number of parameters; shared weights are counted once.
        base_model: Hub name or folder of the weights that were fine-tuned; None: trained from scratch.
        data_name: name of the data in the options.
        data_hash: hash of the training text.
        hub_dataset: Hub name of the data, if the data came from the Hub.
        tokenizer: origin of the tokenizer, such as ``gpt2`` or ``train:bpe``.
        vocab_size: number of tokens of the tokenizer.
        block_size: tokens per block.
        num_steps: number of training steps.
        num_tokens: number of tokens trained on, repetitions included.
        train_loss: mean loss near the end of training, in nats per token.
        eval_loss: mean loss on the held-out text, in nats per token.
        perplexity: ``exp(eval_loss)``.
        bits_per_byte: loss on the held-out text, in bits per byte of text.
        num_eval_tokens: number of held-out tokens that the last three are means over.
        train_seconds: duration of the training.
        hardware: devices of the run, such as ``1 x NVIDIA H200``.
        hyperparameters: option name to value, in the order of the card.
        versions: library name to version.
    """

    name: str
    command: str
    architecture: str
    model_type: str
    num_parameters: int
    data_name: str
    data_hash: str
    num_steps: int
    num_tokens: int
    base_model: str | None = None
    hub_dataset: str | None = None
    tokenizer: str | None = None
    vocab_size: int | None = None
    block_size: int | None = None
    train_loss: float | None = None
    eval_loss: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    num_eval_tokens: int | None = None
    train_seconds: float | None = None
    hardware: str | None = None
    hyperparameters: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def model_card(facts: RunFacts, *, repo_id: str | None = None) -> str:
    """Return the README.md of a finished run: YAML metadata for the Hub, then sections for readers.

    Args:
        facts: the facts that the card states.
        repo_id: Hub name or folder in the example that loads the model; None: a placeholder for this folder.
    """
    base_model = facts.base_model
    if base_model is None:
        origin = "trained from scratch"
    elif is_hub_id(base_model):
        origin = f"fine-tuned from {_link(base_model)}"
    else:
        origin = f"fine-tuned from `{base_model}`"
    sections = [
        f"---\n{_metadata(facts)}\n---",
        f"# {facts.name}",
        f"A causal language model ({facts.architecture}, {facts.num_parameters:,} parameters), "
        f"{origin} on `{facts.data_name}` with `llm-trainers`.",
        "## How to load it",
        _code_block("python", _example(repo_id or "path/to/this/folder")),
        "## Results",
        _results(facts),
        "## Training",
        _table(("fact", "value"), _training_rows(facts)),
        "The command:",
        _code_block("python" if facts.command.startswith("train(") else "bash", facts.command),
        *_optional_table("### Hyperparameters", ("option", "value"), facts.hyperparameters),
        *_optional_table("### Versions", ("library", "version"), facts.versions),
        "## Limits",
        _LIMITS,
    ]
    return "\n\n".join(sections) + "\n"


def is_hub_id(name: str) -> bool:
    """Return whether a name can be a Hub repository: it has the form of one and is not a path on this machine."""
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def _metadata(facts: RunFacts) -> str:
    results = [
        EvalResult(
            task_type="text-generation",
            task_name="Language modeling",
            dataset_type=facts.hub_dataset or "text",
            dataset_name=facts.data_name,
            dataset_split="validation",
            metric_type=metric,
            metric_name=title,
            metric_value=value,
        )
        for metric, title, value in _scores(facts)
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["llm-trainers", facts.model_type],
        base_model=facts.base_model if facts.base_model and is_hub_id(facts.base_model) else None,
        datasets=[facts.hub_dataset] if facts.hub_dataset else None,
        model_name=facts.name if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml()).strip()


def _scores(facts: RunFacts) -> list[tuple[str, str, float]]:
    """Metric, its title and its value; values that are None or not finite are left out, because YAML has none."""
    scores = [
        ("loss", "Loss (nats per token)", facts.eval_loss),
        ("perplexity", "Perplexity", facts.perplexity),
        ("bits_per_byte", "Bits per byte", facts.bits_per_byte),
    ]
    return [
        (metric, title, round(value, 6))
        for metric, title, value in scores
        if value is not None and math.isfinite(value)
    ]


def _example(source: str) -> str:
    """Python code that loads the model from a Hub name or folder and samples from it."""
    return (
        "from transformers import pipeline\n\n"
        f'generate = pipeline("text-generation", model={json.dumps(source)})\n'
        'print(generate("Once upon a time", max_new_tokens=100)[0]["generated_text"])'
    )


def _results(facts: RunFacts) -> str:
    scores = _scores(facts)
    if not scores:
        return "The model was not evaluated on held-out text."
    num_tokens = "" if facts.num_eval_tokens is None else f" ({facts.num_eval_tokens:,} tokens)"
    rows = [(title, f"{value:.4f}") for _, title, value in scores]
    return f"On the held-out text{num_tokens}:\n\n" + _table(("measure", "value"), rows)


def _training_rows(facts: RunFacts) -> list[tuple[str, str]]:
    """Rows of the table about the training; rows without a value are left out."""
    tokens_per_parameter = facts.num_tokens / max(1, facts.num_parameters)
    seconds = facts.train_seconds
    rows: list[tuple[str, str | None]] = [
        ("data", f"`{facts.data_name}`"),
        ("hash of the data", f"`{facts.data_hash}`"),
        ("tokenizer", f"`{facts.tokenizer}`" if facts.tokenizer else None),
        ("tokens of the tokenizer", f"{facts.vocab_size:,}" if facts.vocab_size else None),
        ("tokens per block", f"{facts.block_size:,}" if facts.block_size else None),
        ("steps", f"{facts.num_steps:,}"),
        ("tokens seen", f"{facts.num_tokens:,}"),
        ("tokens seen per parameter", f"{tokens_per_parameter:.3g}"),
        ("last training loss", None if facts.train_loss is None else f"{facts.train_loss:.4f}"),
        ("duration", None if seconds is None else format_duration(round(seconds))),
        ("hardware", facts.hardware),
    ]
    return [(name, value) for name, value in rows if value is not None]


def _optional_table(heading: str, header: tuple[str, str], entries: Mapping[str, object]) -> list[str]:
    """A heading and a table; nothing if there are no entries."""
    if not entries:
        return []
    return [heading, _table(header, [(f"`{name}`", f"`{value}`") for name, value in entries.items()])]


def _table(header: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    lines = [header, ("---", "---"), *rows]
    return "\n".join(f"| {_cell(left)} | {_cell(right)} |" for left, right in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _code_block(language: str, code: str) -> str:
    """A code block with a fence longer than any run of backticks in the code."""
    longest_run = max((len(run) for run in re.findall(r"`+", code)), default=0)
    fence = "`" * max(3, longest_run + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def _link(hub_id: str) -> str:
    return f"[{hub_id}](https://huggingface.co/{hub_id})"
