"""Test the layout of the package: rooms, commands, tests that mirror modules, and knowledge that has one home.

The layers of imports are checked by import-linter (`make check`).
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import PurePosixPath

import pytest

from tests.source_tree import Module, files, modules

MAX_MODULES = 14
# Module names that may stand in several folders, because each means the same thing of its room.
REPEATED_NAMES = {"__init__", "__main__", "layout", "dataset", "build", "export", "sampling", "reader"}
VAGUE_NAMES = {"utils", "common", "helpers", "misc"}
# Modules without a test file of their own, and where they are tested.
MODULES_WITHOUT_TEST_FILE = {
    "llm/data/batches/row.py": "a definition without code; tests/data/batches/test_loader.py",
    "llm/training/context.py": "a record without code; tests/training/run_context.py",
}
# Test files without a module of their name, and their subject.
TESTS_WITHOUT_MODULE = {
    "tests/clusters/sites/test_sites.py": "the package `sites` and its TOML files",
    "tests/clusters/test_real_jobs.py": "a real Slurm",
    "tests/clusters/test_real_mpi.py": "real MPI launchers",
    "tests/clusters/test_real_signals.py": "signals that a real scheduler sends",
    "tests/clusters/test_recorded.py": "recorded output of schedulers and launchers",
    "tests/faults/test_full_disk.py": "a disk that fills up during a run",
    "tests/faults/test_kills.py": "runs that are killed",
    "tests/kfac/test_resume.py": "the state of all parts of K-FAC, saved and loaded",
    "tests/test_benchmarks.py": "benchmarks/",
    "tests/test_docs.py": "docs/",
    "tests/test_python_docs.py": "the snippets of docs/python.md",
    "tests/test_examples.py": "examples/",
    "tests/test_idioms.py": "constructs in llm/, benchmarks/ and tests/",
    "tests/test_language.py": "texts of the repository",
    "tests/test_launch_elastic.py": "llm/launch.py with workers that fail",
    "tests/test_layout.py": "this file",
    "tests/test_public_names.py": "names that `import llm` exports",
    "tests/test_readme.py": "README.md",
    "tests/test_unpickling.py": "files that would run code when loaded",
    "tests/trainers/test_document_mask.py": "the main program with --document_mask",
    "tests/trainers/test_elastic.py": "the main program resumed with other numbers of ranks",
    "tests/trainers/test_hub.py": "the main program with models of the Hub",
    "tests/trainers/test_kfac.py": "the main program with --kfac",
    "tests/trainers/test_mistakes.py": "the main program with wrong options",
    "tests/trainers/test_mixtures.py": "the main program with several sources of shards",
    "tests/trainers/test_old_checkpoint.py": "the main program resumed from a checkpoint of an earlier version",
    "tests/trainers/test_shards.py": "the main program with prepared shards",
    "tests/trainers/test_stop.py": "the main program stopped by signals and deadlines",
    "tests/trainers/test_streaming.py": "the main program with --streaming",
    "tests/training/test_updater_protocol.py": "the trainer with an updater written in the test",
}
UPDATER_PARTS = {"optimizer", "accelerator", "preconditioner", "preconditioning"}


def is_command(path: str) -> bool:
    """Whether the module is directly in `llm/` or `llm/trainers/`."""
    place = PurePosixPath(path)
    return place.name != "__init__.py" and str(place.parent) in ("llm", "llm/trainers")


def crowded_folders(paths: list[str]) -> dict[str, int]:
    """Folders with more modules than one can overlook."""
    counts = Counter(str(PurePosixPath(path).parent) for path in paths)
    return {folder: count for folder, count in counts.items() if count > MAX_MODULES}


def repeated_names(paths: list[str]) -> set[str]:
    """Names of several modules, apart from those that may repeat."""
    counts = Counter(PurePosixPath(path).stem for path in paths)
    return {name for name, count in counts.items() if count > 1} - REPEATED_NAMES


def mirror_of(path: str) -> str:
    """Path of the test file of a module: `llm/kfac/layers.py` has `tests/kfac/test_layers.py`."""
    folder = PurePosixPath("tests", *PurePosixPath(path).parts[1:-1])
    return str(folder / f"test_{PurePosixPath(path).name}")


def mirror_faults(module_paths: list[str], test_paths: list[str]) -> tuple[set[str], set[str]]:
    """Modules without a test file, and test files without a module."""
    expected = {mirror_of(path): path for path in module_paths if PurePosixPath(path).name != "__init__.py"}
    without_test = {path for test, path in expected.items() if test not in test_paths}
    return without_test, set(test_paths) - set(expected)


def console_uses(module: Module) -> list[str]:
    """Reads of `sys.argv`, and prints."""
    findings = []
    for node in module.nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and ast.unparse(node) == "sys.argv":
            findings.append(module.at(node, "reads sys.argv"))
        if (
            isinstance(node, ast.ImportFrom)
            and node.module == "sys"
            and any(name.name == "argv" for name in node.names)
        ):
            findings.append(module.at(node, "imports sys.argv"))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "pprint", "pprint.pprint"):
            findings.append(module.at(node, "prints"))
    return findings


def updater_parts(module: Module) -> list[str]:
    """Attributes of an updater that its protocol does not have: `updater.optimizer`, `self._updater.accelerator`."""
    return [
        module.at(node, ast.unparse(node))
        for node in module.nodes
        if isinstance(node, ast.Attribute)
        and node.attr.lstrip("_") in UPDATER_PARTS
        and ast.unparse(node.value).rpartition(".")[2].lstrip("_") == "updater"
    ]


def assignments_of(module: Module, number: int) -> list[str]:
    """Assignments and defaults of parameters whose whole value is the number."""
    findings = []
    for node in module.nodes:
        values: list[ast.expr | None] = []
        if isinstance(node, ast.Assign | ast.AnnAssign):
            values = [node.value]
        elif isinstance(node, ast.arguments):
            values = [*node.defaults, *node.kw_defaults]
        findings += [module.at(value, str(number)) for value in values if value and ast.unparse(value) == str(number)]
    return findings


def definitions(module: Module, *names: str) -> list[str]:
    """Functions of these names."""
    return [
        module.at(node, node.name) for node in module.nodes if isinstance(node, ast.FunctionDef) and node.name in names
    ]


def paths_of(folder: str) -> list[str]:
    return [module.path for module in modules(folder)]


def test_folders_have_at_most_14_modules() -> None:
    assert not crowded_folders(paths_of("llm"))


def test_module_names_are_unique() -> None:
    assert not repeated_names(paths_of("llm"))


def test_module_names_say_what_is_inside() -> None:
    assert not {path for path in paths_of("llm") if PurePosixPath(path).stem in VAGUE_NAMES}


def test_folders_with_modules_are_packages() -> None:
    folders = {str(PurePosixPath(path).parent) for path in paths_of("llm")}

    assert not {folder for folder in folders if f"{folder}/__init__.py" not in files("llm")}


def test_modules_have_test_files() -> None:
    without_test, _ = mirror_faults(paths_of("llm"), paths_of("tests"))

    assert without_test == set(MODULES_WITHOUT_TEST_FILE)


def test_test_files_have_modules() -> None:
    tests = [path for path in paths_of("tests") if PurePosixPath(path).name.startswith("test_")]
    _, without_module = mirror_faults(paths_of("llm"), tests)

    assert without_module == set(TESTS_WITHOUT_MODULE)


@pytest.mark.parametrize("path", [path for path in paths_of("llm") if is_command(path)])
def test_modules_of_the_top_folders_are_commands(path: str) -> None:
    (module,) = modules(path)

    assert definitions(module, "main")
    assert '__name__ == "__main__"' in module.text


def test_modules_below_the_commands_do_not_use_the_console() -> None:
    findings = [finding for module in modules("llm") if not is_command(module.path) for finding in console_uses(module)]

    assert not findings


def test_synchronous_updater_is_named_only_where_it_is_built() -> None:
    users = {module.path for module in modules("llm") if "SynchronousUpdater" in module.text}

    assert users == {"llm/training/updaters/synchronous.py", "llm/training/build.py"}


def test_parts_of_an_updater_are_used_only_by_updaters() -> None:
    outside = [module for module in modules("llm") if not module.path.startswith("llm/training/updaters/")]

    assert not [finding for module in outside for finding in updater_parts(module)]


def test_knowledge_has_one_home() -> None:
    sources = modules("llm")

    assert len([finding for module in sources for finding in assignments_of(module, -100)]) == 1
    assert len([module for module in sources if "0xbf58476d1ce4e5b9" in module.text.lower()]) == 1
    assert len([finding for module in sources for finding in definitions(module, "is_local_host", "is_here")]) == 1


def test_crowded_folders_when_a_folder_has_15_modules_then_it_is_found() -> None:
    paths = [f"llm/a/m{number}.py" for number in range(15)] + [f"llm/b/m{number}.py" for number in range(14)]

    assert crowded_folders(paths) == {"llm/a": 15}


def test_repeated_names_when_two_folders_share_one_then_it_is_found() -> None:
    assert repeated_names(["llm/a/x.py", "llm/b/x.py", "llm/a/build.py", "llm/b/build.py", "llm/b/y.py"]) == {"x"}


def test_mirror_faults_when_a_side_is_missing_then_it_is_found() -> None:
    module_paths = ["llm/run.py", "llm/a/__init__.py", "llm/a/x.py", "llm/a/y.py"]

    faults = mirror_faults(module_paths, ["tests/test_run.py", "tests/a/test_x.py", "tests/test_y.py"])

    assert faults == ({"llm/a/y.py"}, {"tests/test_y.py"})


@pytest.mark.parametrize("line", ["import sys; a = sys.argv", "from sys import argv", "print(1)", "pprint.pprint(1)"])
def test_console_uses_when_there_is_one_then_it_is_found(line: str) -> None:
    assert len(console_uses(Module("a.py", line))) == 1


@pytest.mark.parametrize("line", ["sys.argv = []", "self.print(1)", "'print(1)'", "read(argv)"])
def test_console_uses_when_it_only_looks_like_one_then_it_is_not_found(line: str) -> None:
    assert not console_uses(Module("a.py", line))


@pytest.mark.parametrize(
    "line", ["updater.optimizer", "context.updater.accelerator", "self._updater._preconditioner.x"]
)
def test_updater_parts_when_one_is_used_then_it_is_found(line: str) -> None:
    assert len(updater_parts(Module("a.py", line))) == 1


@pytest.mark.parametrize("line", ["options.optimizer", "updater.model", "self.optimizer", "build_updater(optimizer)"])
def test_updater_parts_when_another_attribute_is_used_then_it_is_not_found(line: str) -> None:
    assert not updater_parts(Module("a.py", line))


def test_assignments_of_a_number_are_found() -> None:
    module = Module("a.py", "A = -100\nb: int = -100\ndef f(c=-100, *, d=-100): ...\ne = -1000\ng = 2 - 100\n")

    assert len(assignments_of(module, -100)) == 4
