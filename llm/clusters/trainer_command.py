"""What is to be started: a trainer and its options, looked at before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from llm.config.errors import UsageError
from llm.config.options import Options
from llm.config.reader import read_options

DEFAULT = "llm.trainers.gpt"


@dataclass(frozen=True)
class Trainer:
    """What is to be started.

    Attributes:
        module: it is run as `python -m module`.
        words: its options, as they were given.
        options: the same, read; None for a module that is not this package's.
    """

    module: str
    words: tuple[str, ...]
    options: Options | None

    @property
    def run_dir(self) -> Path | None:
        """The run's folder; None where nothing is kept."""
        named = self.options.output.output_dir if self.options else None
        return Path(named).expanduser() if named else None

    @property
    def is_kept(self) -> bool:
        """Whether the run writes its status.json."""
        return self.run_dir is not None and self.options is not None and not self.options.output.dry_run


def read_trainer(words: Sequence[str]) -> Trainer:
    """The module and its options, which are read here once: not by every process of every host, minutes later.

    Args:
        words: the module, unless it is the default one, and its options.

    Raises:
        UsageError: there is no such module, or its options are wrong.
    """
    module, given = DEFAULT, list(words)
    if given and not given[0].startswith("-"):
        module = given.pop(0)
    if not _can_be_run(module):
        raise UsageError(f"{module}: there is no module of that name; name a trainer, such as {DEFAULT}, behind --")
    options = None
    if module == DEFAULT:
        options = read_options(
            Options, given, prog=f"python -m {module}", description="Pre-train or fine-tune a GPT-like model on text."
        )
    return Trainer(module, tuple(given), options)


def _can_be_run(module: str) -> bool:
    """Whether `python -m module` finds something to run: a folder of modules may hold no program."""
    try:
        found = find_spec(module)
        if found is not None and found.submodule_search_locations is not None:
            found = find_spec(f"{module}.__main__")
    except (ImportError, ValueError):
        return False
    return found is not None


def check_chain(trainer: Trainer, *, resumes: bool = False) -> None:
    """Refuses a chain whose second job could not go on where the first one ended.

    Args:
        trainer: what each job starts.
        resumes: whether `--resume_from_checkpoint` is added to its options.

    Raises:
        UsageError: and what is missing.
    """
    if trainer.options is None:
        raise UsageError(f"--chain needs the status.json of a trainer of this package, which {trainer.module} is not")
    output = trainer.options.output
    if output.output_dir is None:
        raise UsageError("--chain needs the trainer's --output_dir, where a job finds what the one before it saved")
    if output.overwrite_output_dir:
        raise UsageError("--chain and --overwrite_output_dir: the second job would remove what the first one saved")
    if not output.resume_from_checkpoint and not resumes:
        raise UsageError("--chain needs the trainer's --resume_from_checkpoint, or every job begins anew")
