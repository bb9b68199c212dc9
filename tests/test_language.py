"""Test the language of the repository: plain words and sentences, docstrings that say enough, shapes and dtypes."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pytest

from tests.source_tree import Module, files, modules, text_of

PLACES = ("llm", "README.md", "CHANGELOG.md", "docs", "examples", "jobs")
BINARY = (".png",)
FORBIDDEN = re.compile(
    r"\bmend|\banew\b|nobody|everybody|looks? at the curvature|sees? to it|in the place of|both's|polite|\bowes\b"
    r"|\bheard\b|last words",
    re.IGNORECASE,
)
# Lines that may hold a forbidden word: path, part of the line, and why. None so far.
ALLOWED_WORDS: dict[tuple[str, str], str] = {}
OPENING = re.compile(r"(?:^|[.!?:]['\")`]*\s)\s*(Of|What|So long|As many)\s(?P<rest>[^.!?]*[.!?]?)")
# In other files than Python a sentence may also start a line, a list item or a table's cell.
OPENING_OF_LINE = re.compile(r"(?:^[\s#>*|-]*|[.!?:|]\s+)(Of|What|So long|As many)\s(?P<rest>[^.!?]*[.!?]?)")
MIN_DOCSTRING = 25
MIN_SHARE_WITH_SHAPES = 0.9
ARRAY = re.compile(r"\b(Tensor|NDArray|ndarray)\b")
SHAPE = re.compile(r"(?<!\w)\[[A-Za-z0-9_ ,.*+|/()^-]+\]|\bscalars?\b|\bshapes?\b", re.IGNORECASE)
DTYPE = re.compile(r"\b(u?int(8|16|32|64)?|float(16|32|64)?|bf16|fp16|fp32|fp64|bool|dtypes?|complex)\b")


class Public(NamedTuple):
    """A public module, class, function or method."""

    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    name: str

    @property
    def docstring(self) -> str:
        return ast.get_docstring(self.node) or ""


def forbidden_words(path: str, text: str) -> list[str]:
    """All lines with a forbidden word that the allow-list does not name."""
    findings = []
    for number, line in enumerate(text.splitlines(), start=1):
        is_allowed = any(path == file and part in line for file, part in ALLOWED_WORDS)
        if FORBIDDEN.search(line) and not is_allowed:
            findings.append(f"{path}:{number}: {line.strip()}")
    return findings


def opened_oddly(text: str, pattern: re.Pattern[str] = OPENING) -> list[str]:
    """Sentences that open with "Of", "What", "So long" or "As many", questions apart."""
    matches = pattern.finditer(" ".join(text.split()))
    return [match.group(0).strip() for match in matches if not match["rest"].endswith("?")]


def comments(text: str) -> Iterator[tuple[int, str]]:
    """Each comment of a Python file with its first line; comments on consecutive lines are one."""
    first, last, parts = 0, 0, list[str]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        number = token.start[0]
        if number != last + 1 and parts:
            yield first, " ".join(parts)
            parts = []
        if not parts:
            first = number
        last = number
        parts.append(token.string.lstrip("#").strip())
    if parts:
        yield first, " ".join(parts)


def odd_openings(module: Module) -> list[str]:
    """Odd openings of sentences in the strings (docstrings and messages) and comments of a Python file."""
    findings = []
    for node in module.nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            findings += [module.at(node, sentence) for sentence in opened_oddly(node.value)]
    for number, comment in comments(module.text):
        findings += [f"{module.path}:{number}: {sentence}" for sentence in opened_oddly(comment)]
    return findings


def public(module: Module) -> Iterator[Public]:
    """The module, its public functions and classes, and the public methods of those."""
    yield Public(module.tree, module.path)
    for node in module.tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        yield Public(node, node.name)
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef) and not method.name.startswith("_"):
                    yield Public(method, f"{node.name}.{method.name}")


def short_docstrings(module: Module) -> list[str]:
    """Public names whose docstring is missing or says too little."""
    return [
        module.at(item.node, f"{item.name}: {item.docstring!r}")
        for item in public(module)
        if len(item.docstring) < MIN_DOCSTRING
    ]


def array_aliases(sources: Iterable[Module]) -> set[str]:
    """Names given to types of tensors or arrays, such as `State = dict[str, Tensor]`."""
    return {
        target.id
        for module in sources
        for node in module.tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript | ast.BinOp)
        for target in node.targets
        if isinstance(target, ast.Name) and ARRAY.search(ast.unparse(node.value))
    }


def array_functions(module: Module, aliases: set[str]) -> Iterator[Public]:
    """Public functions and methods with a tensor or an array in their signature."""
    for item in public(module):
        if isinstance(item.node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = ast.unparse(item.node.args)
            returns = ast.unparse(item.node.returns) if item.node.returns else ""
            names = set(re.findall(r"\w+", re.sub(r"\w+(?=\s*[:=])", "", arguments) + " " + returns))
            if names & (aliases | {"Tensor", "NDArray", "ndarray"}):
                yield item


def names_shape_and_dtype(docstring: str) -> bool:
    """Whether a docstring has a shape, such as `[batch, block]`, and a dtype."""
    return bool(SHAPE.search(docstring) and DTYPE.search(docstring))


def expect_none(findings: list[str]) -> None:
    """Fail with one finding a line, unless there are none."""
    assert not findings, "\n" + "\n".join(findings)


@pytest.mark.parametrize("place", PLACES)
def test_texts_have_no_forbidden_words(place: str) -> None:
    findings = [
        finding
        for path in files(place)
        if not path.endswith(BINARY)
        for finding in forbidden_words(path, text_of(path))
    ]

    expect_none(findings)


@pytest.mark.parametrize("place", PLACES)
def test_sentences_open_with_their_subject(place: str) -> None:
    findings = [finding for module in modules(place) for finding in odd_openings(module)]
    for path in files(place):
        if not path.endswith((".py", *BINARY)):
            for number, line in enumerate(text_of(path).splitlines(), start=1):
                findings += [f"{path}:{number}: {sentence}" for sentence in opened_oddly(line, OPENING_OF_LINE)]

    expect_none(findings)


def test_public_docstrings_are_not_too_short() -> None:
    findings = [finding for module in modules("llm") for finding in short_docstrings(module)]

    expect_none(findings)


def test_public_functions_with_arrays_name_shape_and_dtype() -> None:
    aliases = array_aliases(modules("llm"))
    functions = [(module, item) for module in modules("llm") for item in array_functions(module, aliases)]
    findings = [
        module.at(item.node, item.name) for module, item in functions if not names_shape_and_dtype(item.docstring)
    ]

    assert len(functions) > 80
    assert len(findings) <= (1 - MIN_SHARE_WITH_SHAPES) * len(functions), "\n".join(findings)


def test_allowed_words_are_still_there() -> None:
    unused = [
        entry
        for entry in ALLOWED_WORDS
        if not any(entry[1] in line and FORBIDDEN.search(line) for line in text_of(entry[0]).splitlines())
    ]

    assert not unused


@pytest.mark.parametrize(
    "line",
    [
        "Mends it.",
        "begin anew",
        "nobody knows",
        "a look at the curvature",
        "sees to it",
        "In the place of",
        "a polite stop",
    ],
)
def test_forbidden_words_when_a_line_has_one_then_it_is_found(line: str) -> None:
    assert forbidden_words("a.py", f"first\n{line}\n") == [f"a.py:2: {line}"]


@pytest.mark.parametrize(
    "line", ["We recommend this.", "a renewed lease", "one of both", "it overheard", "lastly, words"]
)
def test_forbidden_words_when_a_word_only_looks_like_one_then_it_is_not_found(line: str) -> None:
    assert not forbidden_words("a.py", line)


@pytest.mark.parametrize(
    "text",
    [
        "Of an update.",
        "It stops. What is left, stays.",
        "Stops.\n\n    So long as it runs.",
        "(It ends.) As many as fit.",
    ],
)
def test_opened_oddly_when_a_sentence_opens_so_then_it_is_found(text: str) -> None:
    assert len(opened_oddly(text)) == 1


@pytest.mark.parametrize(
    "text", ["What is a block? A row.", "Number of blocks.", "Offers what is left.", "Whatever fits."]
)
def test_opened_oddly_when_it_is_a_question_or_another_word_then_it_is_not_found(text: str) -> None:
    assert not opened_oddly(text)


@pytest.mark.parametrize(
    "line", ["# What is left.", "- Of both one.", "| What is measured | 3 |", "Ends. So long as it runs"]
)
def test_opened_oddly_when_a_line_of_a_page_opens_so_then_it_is_found(line: str) -> None:
    assert len(opened_oddly(line, OPENING_OF_LINE)) == 1


def test_odd_openings_of_a_module_are_found_in_comments_and_messages() -> None:
    module = Module(
        "a.py", '"""Do it."""\n# A first\n# line. Of these one.\nx = 1  # What it is.\nraise E(f"{x}: gone. Of all.")\n'
    )

    assert [finding.split(":")[1] for finding in odd_openings(module)] == ["5", "2"]


def test_comments_when_they_stand_on_consecutive_lines_then_they_are_one() -> None:
    assert list(comments("# a\n# b\nx = 1\n# c\n")) == [(1, "a b"), (4, "c")]


def test_short_docstrings_when_public_then_they_are_found() -> None:
    text = """'A module with enough words.'
class C:
    'A class with enough words.'
    def f(self): 'Short.'
    def _g(self): ...
def h(): ...
"""

    assert short_docstrings(Module("a.py", text)) == ["a.py:4: C.f: 'Short.'", "a.py:6: h: ''"]


def test_array_functions_when_a_signature_has_arrays_or_an_alias_then_they_are_found() -> None:
    text = """State = dict[str, Tensor]
Scalars = float | int
def a(x: torch.Tensor): ...
def b() -> State: ...
def c(Tensor: Scalars): ...
def _d(x: Tensor): ...
class E:
    def f(self, *xs: NDArray[int64]): ...
"""
    module = Module("a.py", text)

    assert array_aliases([module]) == {"State"}
    assert [item.name for item in array_functions(module, {"State"})] == ["a", "b", "E.f"]


@pytest.mark.parametrize(
    ("docstring", "is_enough"),
    [
        ("ids: int64 [batch, block].", True),
        ("Return the norm, an fp32 scalar.", True),
        ("Return `ids[0]`, int64.", False),
        ("A matrix [n, n].", False),
        ("Return ids.", False),
    ],
)
def test_names_shape_and_dtype_needs_both(docstring: str, is_enough: bool) -> None:
    assert names_shape_and_dtype(docstring) == is_enough
