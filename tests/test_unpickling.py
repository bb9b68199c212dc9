"""Nothing in the package pickles; one reader, of foreign checkpoints, unpickles, and that one runs no programs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import llm

ROOT = Path(llm.__file__).parent
THE_READER = "training/checkpoints/external.py"
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LOADS = {"torch.load", "torch.serialization.load", "torch.save", "torch.serialization.save"}


def mistakes(source: str, name: str) -> list[str]:
    """What a file does that it may not."""
    found = []
    tree = ast.parse(source)
    good = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [f"imports {alias.name}" for alias in node.names if alias.name.partition(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found += [f"imports {module}" for module in names if module.partition(".")[0] in MODULES or module in LOADS]
        elif isinstance(node, ast.Call):
            words = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if words.get("allow_pickle", "False") != "False":
                found.append("allows pickles")
            if name == THE_READER and words.get("weights_only") == "True" and ast.unparse(node.func) == "torch.load":
                good.add(node.func)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("read_pickle", "to_pickle"):
            found.append(f"line {node.lineno} has {node.attr}")
        # A load that is not called here could be called elsewhere, by another name.
        if isinstance(node, ast.Attribute) and ast.unparse(node) in LOADS and node not in good:
            found.append(f"line {node.lineno} has {ast.unparse(node)}")
    return found


def test_package_when_read_then_unpickles_nowhere_else() -> None:
    paths = sorted(ROOT.rglob("*.py"))
    names = {path: path.relative_to(ROOT).as_posix() for path in paths}
    assert THE_READER in names.values()
    assert "torch.load(" in (ROOT / THE_READER).read_text()
    assert {names[path]: found for path in paths if (found := mistakes(path.read_text(), names[path]))} == {}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import pickle", "training/a.py"),
        ("import os, pickle as p", THE_READER),
        ("from pickle import loads", "training/a.py"),
        ("from torch import load", THE_READER),
        ("import torch\ntorch.load(path, weights_only=True)", "training/a.py"),
        ("import torch\ntorch.load(path)", THE_READER),
        ("import torch\ntorch.load(path, weights_only=False)", THE_READER),
        ("import torch\nread = torch.load", THE_READER),
        ("import torch\ntorch.save(weights, path)", "training/a.py"),
        ("import torch\ntorch.save(weights, path, weights_only=True)", THE_READER),
        ("frame.to_pickle(path)", "data/a.py"),
        ("import torch\ndef read(path, **words):\n    return torch.load(path, **words)", THE_READER),
        ("import numpy as np\nnp.load(path, allow_pickle=True)", "data/a.py"),
    ],
)
def test_source_when_it_unpickles_otherwise_then_is_found(source: str, name: str) -> None:
    assert len(mistakes(source, name)) == 1
