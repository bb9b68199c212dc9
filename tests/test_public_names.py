"""Test the names that `from llm import ...` gives."""

from __future__ import annotations

import subprocess
import sys

import pytest

import llm
from llm.config.errors import UserError
from llm.config.train_options import TrainOptions


def test_import_when_nothing_is_used_then_no_library_is_imported() -> None:
    script = "import sys, llm; print(sorted(sys.modules.keys() & {'torch', 'transformers', 'pydantic', 'numpy'}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_import_when_options_are_used_then_torch_is_not_imported() -> None:
    script = "import sys; from llm import TrainOptions; TrainOptions(seed=1); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n"


def test_names_when_listed_then_each_is_an_attribute() -> None:
    assert llm.TrainOptions is TrainOptions
    assert llm.UserError is UserError
    assert set(llm.__all__) <= set(dir(llm))
    for name in llm.__all__:
        assert getattr(llm, name).__name__ == name


def test_name_when_unknown_then_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'llm' has no attribute 'trian'"):
        _ = llm.trian  # type: ignore[attr-defined]
