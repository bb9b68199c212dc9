"""Names of a run's files stand once in the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import llm
from llm.training.run_dir import layout

PACKAGE = Path(llm.__file__).parent
NAMES = {
    layout.CONFIG,
    layout.STATUS,
    layout.METRICS,
    layout.LOG,
    layout.TRACKERS,
    layout.SAVE,
    layout.LOCK,
    layout.TENSORBOARD,
    layout.CHECKPOINTS,
    layout.UNVERIFIED,
    layout.RESULTS,
    layout.CURVES,
    layout.MODEL_CARD,
}
# The same words with other meanings: the README.md of a Hub dataset, and Accelerate's name of a tracker.
OTHER_MEANINGS = {("data/sources/files.py", layout.MODEL_CARD), ("training/run_dir/trackers.py", layout.TENSORBOARD)}


def literals(path: Path) -> set[str]:
    """The string constants of a module; a docstring or a message is longer than a name."""
    return {
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_names_when_searched_in_the_package_then_stand_in_the_layout_alone() -> None:
    assert len(NAMES) == 13
    repeated = {
        (path.relative_to(PACKAGE).as_posix(), name)
        for path in PACKAGE.rglob("*.py")
        if path != Path(layout.__file__)
        for name in literals(path) & NAMES
    }
    assert repeated == OTHER_MEANINGS


def test_names_when_a_run_writes_them_then_are_either_finished_or_private() -> None:
    for name in layout.WRITTEN:
        is_private = name in layout.PRIVATE_FILES or f"{name}/*" in layout.PRIVATE_FILES
        assert is_private != (name in layout.FINISHED_FILES), name
    assert {layout.LOCK, layout.TRACKERS} <= set(layout.PRIVATE_FILES)
    assert not any(
        fnmatchcase(name, pattern) for name in (layout.CONFIG, layout.STATUS) for pattern in layout.FINISHED_FILES
    )


def test_layout_when_imported_then_torch_is_not() -> None:
    program = "import sys, llm.training.run_dir.layout; print('torch' in sys.modules, 'transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "False False\n"
