"""Training from a script or a notebook: text and a model that are Python objects, options as keyword arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm.config.errors import UsageError
from llm.config.options import Options
from llm.config.train_options import TrainOptions
from llm.data.dataset import StopSignal, TokenizedDataset, prepare_dataset
from llm.data.sources.corpus import Corpus
from llm.data.sources.in_memory import TextInMemory, corpus_in_memory
from llm.data.streaming.dataset import open_dataset
from llm.distributed.world import World
from llm.tokenization.load import require_dense_ids
from llm.training import run
from llm.training.initial_model import GivenModel
from llm.training.run_dir.result import TrainResult

# Options that an argument of `train` replaces.
_NAMES_OF_TEXT = (
    "dataset_name",
    "dataset_config_name",
    "train_file",
    "validation_file",
    "train_dir",
    "validation_dir",
    "streaming",
)
_NAMES_OF_MODEL = ("model_name_or_path", "config_name", "model_type", "config_overrides")


def train(
    text: TextInMemory | None = None,
    options: TrainOptions | None = None,
    *,
    validation: TextInMemory | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> TrainResult:
    """Train a causal language model, as `python -m llm.trainers.gpt` does with the same options.

        result = train(["a document", "another one"], TrainOptions(output_dir="runs/mine", max_train_steps=200))
        model = AutoModelForCausalLM.from_pretrained(result.model_dir)

    Log lines go to the standard output. The function may be called several times in one process, in any thread, and
    on all ranks of a script that torchrun started. Ctrl-C saves and stops the run (in the main thread only).

    Args:
        text: an iterable of strings, each one document, or a `datasets.Dataset` with a text column (`text_column`).
            It is tokenized once and cached, like a file. None: the options name the text.
        options: of the run; None: all defaults. Without an `output_dir` nothing is kept.
        validation: separate validation text, of the same kinds. None: the end of the text is held out
            (`validation_split_percentage`).
        model: a causal language model of transformers, in any dtype and on any device. After the call this object
            holds the trained weights, also when the run was stopped; if the call raises, it is unchanged. A float32
            copy of it is trained. Its embeddings are not resized. A resumed run starts with the weights of its
            checkpoint. None: the options name the model.
        tokenizer: needed with `model`, here or as `tokenizer_name`. None: the options name it; without a name it is
            the tokenizer of the named model, else one is trained on the text.

    Raises:
        UsageError: an argument has a wrong type, or contradicts an option.
        UserError: the run failed; the message is one line.
    """
    options = TrainOptions() if options is None else options
    _check_arguments(text, options, validation, model, tokenizer)
    groups = options.groups
    corpus = None if text is None else corpus_in_memory(text, validation, groups.data)
    return run.train(
        groups,
        command=_command(text, options, validation, model, tokenizer),
        open_dataset=_GivenDataset(corpus, tokenizer),
        initial_model=None if model is None else GivenModel(model, groups.model.trust_remote_code),
    )


@dataclass(frozen=True)
class _GivenDataset:
    """Opens text and tokenizer that are objects, and those that the options name; see `llm.training.run.OpenDataset`.

    Attributes:
        corpus: the text; None: the options name it.
        tokenizer: the tokenizer; None: the options name it.
    """

    corpus: Corpus | None
    tokenizer: PreTrainedTokenizerBase | None

    @contextmanager
    def __call__(
        self, options: Options, world: World, revision: str | None, stop: StopSignal, /
    ) -> Iterator[TokenizedDataset]:
        """Return a context in which the dataset is open."""
        if self.corpus is None and self.tokenizer is None:
            with open_dataset(options, world, revision, stop) as dataset:
                yield dataset
            return

        def prepare() -> TokenizedDataset:
            return prepare_dataset(options, world, corpus=self.corpus, tokenizer=self.tokenizer)

        yield world.main_first("the text", stop.interrupting(prepare))


def _check_arguments(text: object, options: object, validation: object, model: object, tokenizer: object) -> None:
    """Refuse arguments that contradict each other or the options; all mistakes at once."""
    if not isinstance(options, TrainOptions):
        raise UsageError(f"options: is a {type(options).__name__}; give TrainOptions(...)")
    mistakes = []
    if text is not None:
        mistakes += [f"text is given, and so is {name}; give one of them" for name in _given(options, _NAMES_OF_TEXT)]
    if text is None and validation is not None:
        mistakes.append("validation is given without text; name files with train_file and validation_file")
    if model is not None:
        if not isinstance(model, PreTrainedModel):
            mistakes.append(f"model: is a {type(model).__name__}; give a PreTrainedModel of transformers")
        mistakes += [f"model is given, and so is {name}; give one of them" for name in _given(options, _NAMES_OF_MODEL)]
        if tokenizer is None and not _given(options, ("tokenizer_name", "train_dir")):
            mistakes.append(
                "model: its tokenizer is not known; give tokenizer=..., or tokenizer_name among the options"
            )
    if tokenizer is not None:
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            mistakes.append(f"tokenizer: is a {type(tokenizer).__name__}; give a tokenizer of transformers")
        mistakes += [
            f"tokenizer is given, and so is {name}; give one of them" for name in _given(options, ("tokenizer_name",))
        ]
        if options.groups.data.streaming:
            mistakes.append("tokenizer: with streaming, give the name of the tokenizer as tokenizer_name")
    if mistakes:
        raise UsageError("\n".join(mistakes))
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        require_dense_ids("tokenizer", tokenizer)


def _given(options: TrainOptions, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if getattr(options, name)]


def _command(text: object, options: TrainOptions, validation: object, model: object, tokenizer: object) -> str:
    """Return the call as Python code, without secrets: objects stand under the names of the arguments."""
    words = ["text"] if text is not None else []
    words.append(repr(options) if words else f"options={options!r}")
    objects = {"validation": validation, "model": model, "tokenizer": tokenizer}
    words += [f"{name}={name}" for name, value in objects.items() if value is not None]
    return f"train({', '.join(words)})"
