"""llm-trainers: train a GPT-like model on text, and load it anywhere with `from_pretrained`.

    from llm import TrainOptions, train

`docs/python.md` shows how to use the package from Python. Nothing is imported here before it is used, so that `--help`
and mistakes in a command line take little time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llm.config import VERSION

if TYPE_CHECKING:
    from llm.api.train import train as train
    from llm.config.errors import UserError as UserError
    from llm.config.train_options import TrainOptions as TrainOptions
    from llm.training.run_dir.result import TrainResult as TrainResult

__all__ = ["TrainOptions", "TrainResult", "UserError", "train"]
__version__ = VERSION

_MODULES = {
    "TrainOptions": "llm.config.train_options",
    "TrainResult": "llm.training.run_dir.result",
    "UserError": "llm.config.errors",
    "train": "llm.api.train",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
