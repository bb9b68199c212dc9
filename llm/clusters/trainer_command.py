"""The trainer that `llm.launch` starts, and its options, which are checked before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from llm.config.errors import UsageError
from llm.config.options import Options
from llm.config.reader import read_options

DEFAULT_MODULE = "llm.trainers.gpt"


@dataclass(frozen=True)
class TrainerCommand:
    """A trainer and its options.

    Attributes:
        module: run as `python -m module`.
        arguments: the trainer's options, as they were given.
        options: the same options, parsed; None for a module of another package.
    """

    module: str
    arguments: tuple[str, ...]
    options: Options | None

    @property
    def run_dir(self) -> Path | None:
        """The run's folder; None if the run keeps nothing."""
        output_dir = self.options.output.output_dir if self.options else None
        return Path(output_dir).expanduser() if output_dir else None

    @property
    def keeps_status(self) -> bool:
        """Whether the run writes its status.json."""
        return self.run_dir is not None and self.options is not None and not self.options.output.dry_run


def read_trainer_command(words: Sequence[str]) -> TrainerCommand:
    """Read the module and its options once, here, instead of minutes later in every process of every host.

    Args:
        words: the module, which may be left out if it is the default one, and its options.

    Raises:
        UsageError: the module does not exist, or its options are wrong.
    """
    module = DEFAULT_MODULE
    arguments = list(words)
    if arguments and not arguments[0].startswith("-"):
        module = arguments.pop(0)
    if not _is_runnable(module):
        raise UsageError(
            f"{module}: there is no module of that name; name a trainer behind --, such as {DEFAULT_MODULE}"
        )
    options = None
    if module == DEFAULT_MODULE:
        options = read_options(
            Options,
            arguments,
            prog=f"python -m {module}",
            description="Pre-train or fine-tune a GPT-like model on text.",
        )
    return TrainerCommand(module, tuple(arguments), options)


def _is_runnable(module: str) -> bool:
    """Whether `python -m module` finds a program; a package may have no `__main__`."""
    try:
        spec = find_spec(module)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = find_spec(f"{module}.__main__")
    except (ImportError, ValueError):
        return False
    return spec is not None


def check_chain(trainer: TrainerCommand, *, resumes: bool = False) -> None:
    """Refuse a chain whose second job could not resume where the first one ended.

    Args:
        trainer: what each job starts.
        resumes: whether `--resume_from_checkpoint` will be added to its options.

    Raises:
        UsageError: an option is missing or contradicts a chain.
    """
    if trainer.options is None:
        raise UsageError(f"--chain needs the status.json of a trainer of this package, which {trainer.module} is not")
    output = trainer.options.output
    if output.output_dir is None:
        raise UsageError("--chain needs the trainer's --output_dir, where a job finds what the previous one saved")
    if output.overwrite_output_dir:
        raise UsageError("--chain and --overwrite_output_dir: the second job would remove what the first one saved")
    if not output.resume_from_checkpoint and not resumes:
        raise UsageError("--chain needs the trainer's --resume_from_checkpoint: else every job starts from scratch")
