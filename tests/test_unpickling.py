"""Test that the package writes no pickle, and reads pickles only of external checkpoints and with `weights_only`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import llm

ROOT = Path(llm.__file__).parent
READER = "training/checkpoints/external.py"
PICKLE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PICKLE_FUNCTIONS = {"torch.load", "torch.serialization.load", "torch.save", "torch.serialization.save"}


def find_pickling(source: str, name: str) -> list[str]:
    """Return descriptions of all forbidden pickling in a file; `name` is its path below `llm/`."""
    forbidden = []
    tree = ast.parse(source)
    allowed = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            forbidden += [
                f"imports {alias.name}" for alias in node.names if alias.name.partition(".")[0] in PICKLE_MODULES
            ]
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            forbidden += [
                f"imports {module}"
                for module in names
                if module.partition(".")[0] in PICKLE_MODULES or module in PICKLE_FUNCTIONS
            ]
        elif isinstance(node, ast.Call):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if keywords.get("allow_pickle", "False") != "False":
                forbidden.append("allows pickles")
            if name == READER and keywords.get("weights_only") == "True" and ast.unparse(node.func) == "torch.load":
                allowed.add(node.func)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("read_pickle", "to_pickle"):
            forbidden.append(f"line {node.lineno} has {node.attr}")
        # A function that is not called here could be called elsewhere under another name.
        if isinstance(node, ast.Attribute) and ast.unparse(node) in PICKLE_FUNCTIONS and node not in allowed:
            forbidden.append(f"line {node.lineno} has {ast.unparse(node)}")
    return forbidden


def test_package_when_read_then_unpickles_only_external_checkpoints() -> None:
    paths = sorted(ROOT.rglob("*.py"))
    names = {path: path.relative_to(ROOT).as_posix() for path in paths}
    assert READER in names.values()
    assert "torch.load(" in (ROOT / READER).read_text()
    forbidden = {names[path]: find_pickling(path.read_text(), names[path]) for path in paths}
    assert {name: lines for name, lines in forbidden.items() if lines} == {}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import pickle", "training/a.py"),
        ("import os, pickle as p", READER),
        ("from pickle import loads", "training/a.py"),
        ("from torch import load", READER),
        ("import torch\ntorch.load(path, weights_only=True)", "training/a.py"),
        ("import torch\ntorch.load(path)", READER),
        ("import torch\ntorch.load(path, weights_only=False)", READER),
        ("import torch\nread = torch.load", READER),
        ("import torch\ntorch.save(weights, path)", "training/a.py"),
        ("import torch\ntorch.save(weights, path, weights_only=True)", READER),
        ("frame.to_pickle(path)", "data/a.py"),
        ("import torch\ndef read(path, **words):\n    return torch.load(path, **words)", READER),
        ("import numpy as np\nnp.load(path, allow_pickle=True)", "data/a.py"),
    ],
)
def test_find_pickling_when_a_source_pickles_then_finds_it(source: str, name: str) -> None:
    assert len(find_pickling(source, name)) == 1
