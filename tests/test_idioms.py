"""Test that the code has no constructs that save lines and cost reading."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

import pytest

from tests.source_tree import Module, modules

# Functions that pass `**kwargs` on, because another library calls them, and why.
ALLOWED_PASSING_ON = {
    "llm/models/attention.py": "transformers calls attention and mask functions with arguments of its own",
    "llm/models/language_model.py": "has the signature of `torch.compile`",
    "benchmarks/nanogpt.py": "passes the settings of nanoGPT's own optimizer",
    "benchmarks/programs.py": "overrides methods of transformers' Trainer",
    "benchmarks/recorded.py": "wraps functions of the package to time them",
    "benchmarks/saving.py": "wraps functions of the package to time them",
    "benchmarks/time_to_loss.py": "wraps functions of the package to time them",
}
CONDITIONS = ("all", "any", "bool", "callable", "hasattr", "isinstance", "issubclass")


def assignments_in_a_row(module: Module) -> Iterator[ast.AST]:
    """Yield statements such as `a, b = x, y`, where no value reads a target: two assignments in one line."""
    for node in module.nodes:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Tuple)
            and isinstance(node.targets[0], ast.Tuple)
        ):
            targets = {ast.unparse(target) for target in node.targets[0].elts}
            parts = (
                part for part in ast.walk(node.value) if isinstance(part, ast.Name | ast.Attribute | ast.Subscript)
            )
            if not targets & {ast.unparse(part) for part in parts}:
                yield node


def attributes_in_a_row(module: Module) -> Iterator[ast.AST]:
    """Yield statements such as `self.a, self.b = a, b`."""
    for node in assignments_in_a_row(module):
        if isinstance(node, ast.Assign) and any(isinstance(part, ast.Attribute) for part in ast.walk(node.targets[0])):
            yield node


def splats_of_literals(module: Module) -> Iterator[ast.AST]:
    """Yield calls such as `f(*(a, b), c)`, which say no more than `f(a, b, c)`."""
    for node in module.nodes:
        if isinstance(node, ast.Call):
            for argument in node.args:
                if isinstance(argument, ast.Starred) and isinstance(argument.value, ast.Tuple | ast.List):
                    yield node
            for keyword in node.keywords:
                if keyword.arg is None and isinstance(keyword.value, ast.Dict):
                    yield node


def is_condition(node: ast.expr) -> bool:
    """Whether an expression is certainly a bool."""
    if isinstance(node, ast.Compare) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)):
        return True
    if isinstance(node, ast.BoolOp):
        return all(is_condition(value) for value in node.values)
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CONDITIONS


def is_text_or_list(node: ast.expr) -> bool:
    """Whether an expression is a literal text, list or tuple."""
    return isinstance(node, ast.JoinedStr | ast.List | ast.Tuple) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
    )


def arithmetic_with_conditions(module: Module) -> Iterator[ast.AST]:
    """Yield products such as `"text" * (a > b)` or `["x"] * options.flag`, which are conditionals."""
    for node in module.nodes:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            for factor, other in ((node.left, node.right), (node.right, node.left)):
                is_flag = is_condition(other) or (
                    isinstance(other, ast.Attribute) and isinstance(factor, ast.JoinedStr)
                )
                if is_text_or_list(factor) and is_flag:
                    yield node
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.value, ast.Tuple | ast.List)
            and is_condition(node.slice)
        ):
            yield node


def calls_of_locals(module: Module) -> Iterator[ast.AST]:
    """Yield calls of `locals()`, which hide what is used."""
    for node in module.nodes:
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "locals":
            yield node


def keywords_passed_on(module: Module) -> Iterator[ast.AST]:
    """Yield functions that pass their `**kwargs` to another function, which hides the names of the arguments."""
    if module.path in ALLOWED_PASSING_ON:
        return
    for node in module.nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.args.kwarg:
            name = node.args.kwarg.arg
            calls = (part for part in ast.walk(node) if isinstance(part, ast.Call))
            if any(
                keyword.arg is None and ast.unparse(keyword.value) == name
                for call in calls
                for keyword in call.keywords
            ):
                yield node


Check = Callable[[Module], Iterator[ast.AST]]
EVERYWHERE: tuple[Check, ...] = (attributes_in_a_row, arithmetic_with_conditions, calls_of_locals)
# Tests make twins in one line (`model, copy = new_model(), new_model()`), group the words of a command
# (`run(*("--seed", "1"), *more)`), and wrap functions of any signature.
OUTSIDE_TESTS: tuple[Check, ...] = (assignments_in_a_row, splats_of_literals, keywords_passed_on)
CASES = [
    *((place, check) for place in ("llm", "benchmarks", "tests") for check in EVERYWHERE),
    *((place, check) for place in ("llm", "benchmarks") for check in OUTSIDE_TESTS),
]


@pytest.mark.parametrize(("place", "check"), CASES)
def test_code_has_no_such_construct(place: str, check: Check) -> None:
    findings = [
        module.at(node, ast.unparse(node).splitlines()[0]) for module in modules(place) for node in check(module)
    ]

    assert not findings, "\n" + "\n".join(findings)


@pytest.mark.parametrize(
    ("check", "line"),
    [
        (attributes_in_a_row, "self.a, self.b = a, b"),
        (assignments_in_a_row, "low, high = 0, len(ids)"),
        (splats_of_literals, "f(*(a, b), c)"),
        (splats_of_literals, "f(a, *[b], c)"),
        (splats_of_literals, "f(**{'a': 1})"),
        (arithmetic_with_conditions, "'more' * (a > b)"),
        (arithmetic_with_conditions, "(not a) * ['best']"),
        (arithmetic_with_conditions, "f'{a} more' * options.kfac"),
        (arithmetic_with_conditions, "('a', 'b')[x > y]"),
        (calls_of_locals, "check(locals())"),
        (keywords_passed_on, "def f(a, **kwargs): return g(a, **kwargs)"),
    ],
)
def test_check_when_the_construct_is_there_then_it_is_found(check: Check, line: str) -> None:
    assert len(list(check(Module("a.py", line)))) == 1


@pytest.mark.parametrize(
    ("check", "line"),
    [
        (attributes_in_a_row, "a, b = 1, 2"),
        (attributes_in_a_row, "self.a, self.b = self.b, self.a"),
        (assignments_in_a_row, "a, b = b, a"),
        (assignments_in_a_row, "first, last = second, last.next"),
        (assignments_in_a_row, "a, b = pair"),
        (splats_of_literals, "f(*words, a)"),
        (splats_of_literals, "f(**facts)"),
        (arithmetic_with_conditions, "[0] * len(layers)"),
        (arithmetic_with_conditions, "losses * (targets != -100)"),
        (arithmetic_with_conditions, "' ' * width"),
        (keywords_passed_on, "def f(a, **kwargs): return list(kwargs)"),
    ],
)
def test_check_when_the_code_is_plain_then_nothing_is_found(check: Check, line: str) -> None:
    assert not list(check(Module("a.py", line)))
