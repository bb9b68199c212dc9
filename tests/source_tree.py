"""The repository's own files, each read and parsed once, for the tests of layout, language and idioms."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Module:
    """A Python file.

    Attributes:
        path: relative to the repository, with slashes.
        text: its source.
    """

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree of the file."""
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        """All nodes of the syntax tree."""
        return tuple(ast.walk(self.tree))

    def at(self, node: ast.AST, finding: str) -> str:
        """Return `path:line: finding` for a node."""
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {finding}"


@cache
def files(name: str) -> tuple[str, ...]:
    """Paths of all files in a folder (or of the one file), relative to the repository, without byte code."""
    path = ROOT / name
    paths = [path] if path.is_file() else [p for p in sorted(path.rglob("*")) if p.is_file()]
    return tuple(p.relative_to(ROOT).as_posix() for p in paths if "__pycache__" not in p.parts)


@cache
def text_of(path: str) -> str:
    """Text of a file."""
    return (ROOT / path).read_text(encoding="utf-8")


@cache
def modules(folder: str) -> tuple[Module, ...]:
    """All Python files in a folder."""
    return tuple(Module(path, text_of(path)) for path in files(folder) if path.endswith(".py"))
