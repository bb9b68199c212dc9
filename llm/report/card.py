"""The model card: what a stranger on the Hub needs to load, judge and repeat the model.

It says what it is told and nothing else: a fact that is None leaves its line out.
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
This run taught the model to continue text, and nothing else: it did not tune it to follow
instructions, to be right, or to be safe. The model can write falsehoods, repeat passages of its
training text, and reproduce whatever bias or offence stands in it. Beyond the numbers on this page
nothing about it was measured; look at its output before you rely on it."""


@dataclass(frozen=True)
class RunFacts:
    """What a run knows about itself at its end.

    Attributes:
        name: of the run, the card's heading.
        command: the command line that made the model, its secrets already removed.
        architecture: class of the model, such as ``GPT2LMHeadModel``.
        model_type: transformers' name of it, such as ``gpt2``.
        num_parameters: counted once where weights are shared.
        base_model: Hub name or folder whose weights were trained further; None from scratch.
        data_name: as the options name it.
        data_hash: of the training text.
        hub_dataset: the Hub's name of the data, where it came from there.
        tokenizer: its origin, such as ``gpt2`` or ``train:bpe``.
        vocab_size: tokens of the tokenizer.
        block_size: tokens a block.
        num_steps: updates of the weights.
        num_tokens: training tokens seen, repetitions counted.
        train_loss: nats per token, near the end of training.
        eval_loss: nats per token on the held-out text.
        perplexity: ``exp(eval_loss)``.
        bits_per_byte: on the held-out text.
        num_eval_tokens: tokens that these three are means over.
        train_seconds: duration of the training.
        hardware: such as ``1 x NVIDIA H200``.
        hyperparameters: name to value, in the order in which they are shown.
        versions: library to version.
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
    """README.md of a finished run: YAML that the Hub reads, then sections that people read.

    Args:
        facts: what is to be said.
        repo_id: where the model can be loaded from; this folder's path stands there when None.
    """
    base = facts.base_model
    if base is None:
        origin = "trained from scratch"
    else:
        origin = f"fine-tuned from {_link(base) if is_hub_id(base) else f'`{base}`'}"
    sections = [
        f"---\n{_metadata(facts)}\n---",
        f"# {facts.name}",
        f"A causal language model ({facts.architecture}, {facts.num_parameters:,} parameters), "
        f"{origin} on `{facts.data_name}` with `llm-trainers`.",
        "## How to load it",
        _fenced("python", _loading(repo_id or "path/to/this/folder")),
        "## Results",
        _results(facts),
        "## Training",
        _table(("fact", "value"), _training(facts)),
        "The command:",
        _fenced("bash", facts.command),
        *_optional("### Hyperparameters", ("option", "value"), facts.hyperparameters),
        *_optional("### Versions", ("library", "version"), facts.versions),
        "## Limits",
        _LIMITS,
    ]
    return "\n\n".join(sections) + "\n"


def is_hub_id(name: str) -> bool:
    """Whether a name can be a Hub repository: spelled like one, and no folder of this machine."""
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
            metric_name=name,
            metric_value=value,
        )
        for metric, name, value in _scores(facts)
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
    """Metric, its name and its value; without those that are not finite, which no YAML holds."""
    scores = [
        ("loss", "Loss (nats per token)", facts.eval_loss),
        ("perplexity", "Perplexity", facts.perplexity),
        ("bits_per_byte", "Bits per byte", facts.bits_per_byte),
    ]
    return [(m, n, round(v, 6)) for m, n, v in scores if v is not None and math.isfinite(v)]


def _loading(place: str) -> str:
    return (
        "from transformers import pipeline\n\n"
        f'generate = pipeline("text-generation", model={json.dumps(place)})\n'
        'print(generate("Once upon a time", max_new_tokens=100)[0]["generated_text"])'
    )


def _results(facts: RunFacts) -> str:
    scores = _scores(facts)
    if not scores:
        return "The model was not evaluated on held-out text."
    over = "" if facts.num_eval_tokens is None else f" ({facts.num_eval_tokens:,} tokens)"
    rows = [(name, f"{value:.4f}") for _, name, value in scores]
    return f"On the held-out text{over}:\n\n" + _table(("measure", "value"), rows)


def _training(facts: RunFacts) -> list[tuple[str, str]]:
    """Rows of the table about the training; those without a value are left out."""
    num, seconds = facts.num_tokens, facts.train_seconds
    rows: list[tuple[str, str | None]] = [
        ("data", f"`{facts.data_name}`"),
        ("hash of the data", f"`{facts.data_hash}`"),
        ("tokenizer", f"`{facts.tokenizer}`" if facts.tokenizer else None),
        ("tokens of the tokenizer", f"{facts.vocab_size:,}" if facts.vocab_size else None),
        ("tokens a block", f"{facts.block_size:,}" if facts.block_size else None),
        ("updates", f"{facts.num_steps:,}"),
        ("tokens seen", f"{num:,}"),
        ("tokens seen per parameter", f"{num / max(1, facts.num_parameters):.3g}"),
        ("last training loss", None if facts.train_loss is None else f"{facts.train_loss:.4f}"),
        ("duration", None if seconds is None else format_duration(round(seconds))),
        ("hardware", facts.hardware),
    ]
    return [(name, value) for name, value in rows if value is not None]


def _optional(heading: str, head: tuple[str, str], facts: Mapping[str, object]) -> list[str]:
    if not facts:
        return []
    return [heading, _table(head, [(f"`{name}`", f"`{value}`") for name, value in facts.items()])]


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    lines = [head, ("---", "---"), *rows]
    return "\n".join(f"| {_cell(left)} | {_cell(right)} |" for left, right in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _fenced(language: str, code: str) -> str:
    """A code block whose fence no line of the code can close."""
    longest = max((len(run) for run in re.findall(r"`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def _link(hub_id: str) -> str:
    return f"[{hub_id}](https://huggingface.co/{hub_id})"
