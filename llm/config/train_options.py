"""The options of a run as keyword arguments, for Python code."""

from __future__ import annotations

import os
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Any

from llm.config.flags import Flag, flags_of
from llm.config.options import Options
from llm.config.reader import read_keywords

_FLAGS = flags_of(Options)


@dataclass(frozen=True, init=False, repr=False)
class TrainOptions:
    """The options of `llm.train`, under the names of the command line.

        TrainOptions(output_dir="runs/mine", max_train_steps=200, learning_rate=1e-3)

    `python -m llm.trainers.gpt --help` lists the names, their defaults and their meaning. The values are checked at
    once, by the table of the command line. Each option is also an attribute, which cannot be changed.

    Args:
        config: a TOML file as for `--config`; keyword arguments take precedence.
        values: the options.

    Attributes:
        groups: the options in their groups, as `llm.training.run.train` takes them.

    Raises:
        UsageError: one line for each mistake, with the nearest known name.
    """

    groups: Options

    # A notebook completes and shows the names.
    __signature__ = Signature(
        [
            Parameter(name, Parameter.KEYWORD_ONLY, default=default)
            for name, default in [("config", None), *((name, flag.default) for name, flag in _FLAGS.items())]
        ]
    )

    def __init__(self, *, config: str | os.PathLike[str] | None = None, **values: object) -> None:
        groups = read_keywords(Options, values, config=None if config is None else os.fspath(config))
        object.__setattr__(self, "groups", groups)  # the class is frozen

    def __getattr__(self, name: str) -> Any:
        if name not in _FLAGS:
            raise AttributeError(f"TrainOptions has no option {name!r}")
        return self._value(_FLAGS[name])

    def __dir__(self) -> list[str]:
        return ["groups", *_FLAGS]

    def __repr__(self) -> str:
        """Return the options that were given, as Python code without secrets."""
        words = [
            f"{name}={'***' if flag.secret else self._value(flag)!r}"
            for name, flag in _FLAGS.items()
            if name in getattr(self.groups, flag.group).model_fields_set
        ]
        return f"TrainOptions({', '.join(words)})"

    def _value(self, flag: Flag) -> Any:
        return getattr(getattr(self.groups, flag.group), flag.name)
