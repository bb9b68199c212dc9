"""Test README.md and the pages beside it: their commands run (shortened, with local stand-ins); what they name exists.

`tests/test_docs.py` has the pages about clusters.
"""

from __future__ import annotations

import configparser
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from llm.bench import BenchOptions
from llm.bench import main as bench
from llm.config.abbreviations import BUILT_IN
from llm.config.flags import flags_of
from llm.config.options import Options
from llm.config.reader import read_options
from llm.data.batches.ledger import Ledger, ledger_line
from llm.generate import GenerateOptions
from llm.generate import main as generate
from llm.hub.connection import come_online
from llm.launch import DoctorOptions, JobOptions, NodeOptions, ScriptOptions
from llm.launch import main as launch_cluster
from llm.plot import PlotOptions
from llm.plot import main as plot
from llm.prepare import PrepareOptions
from llm.prepare import main as prepare
from llm.runs import RunsOptions
from llm.runs import main as list_runs
from llm.trainers.gpt import main as train
from tests.hub_cache import plant_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# Pages whose commands are run.
PAGES = (README, *((ROOT / "docs" / f"{name}.md").read_text() for name in ("data", "runs", "performance")))
TEXT = "\n".join(PAGES)
# Pages whose flags, paths and benchmarks are checked.
ALL_PAGES = {
    str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
}
FLAG = re.compile(r"(?<![\w-])--([a-z][\w-]*)")
# A command that measures, and its arguments, which are not options of the package.
BENCHMARK = re.compile(r"python -m (benchmarks\.\w+)((?:[^`\n\\]|\\\n)*)")

# The flags that the pages show with each benchmark.
BENCHMARKS = {
    module: {
        flag
        for text in ALL_PAGES.values()
        for name, words in BENCHMARK.findall(text)
        for flag in FLAG.findall(words)
        if name == module
    }
    for module in {name for text in ALL_PAGES.values() for name, _ in BENCHMARK.findall(text)}
}

# Added to a command so that it takes a second.
SHORTER = {
    "llm.trainers.gpt": ["--max_train_steps", "2", "--max_eval_batches", "1", "--block_size", "32", "--use_cpu"],
    "llm.generate": ["--max_new_tokens", "4", "--use_cpu"],
    "llm.plot": [],
    "llm.bench": ["--num_updates", "2", "--block_size", "32", "--use_cpu"],
    "llm.runs": [],
    "llm.prepare": ["--preprocessing_num_workers", "1"],
    "llm.launch": [],  # what follows -- is the trainer's
}
# Files that the reader has.
TEXTS = ("my.txt", "shakespeare.txt")
CONFIG = "my.toml"
LAUNCH_TABLES = {
    "node": NodeOptions,
    "job": JobOptions,
    "pbs": ScriptOptions,
    "slurm": ScriptOptions,
    "doctor": DoctorOptions,
}
LAUNCHERS = {
    "python": [],
    "torchrun": ["-m", "torch.distributed.run", "--standalone"],
    "accelerate": ["-m", "accelerate.commands.accelerate_cli"],
}
LAUNCHER_FLAGS = {"nproc_per_node", "num_processes"}


def blocks() -> list[str]:
    """Return the fenced blocks of all pages."""
    return re.findall(r"^```\w*\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def is_folder(block: str) -> bool:
    return block.startswith("OUTPUT_DIR/")


def is_output(block: str) -> bool:
    return block.startswith("tokens: ")


def commands() -> list[str]:
    """Return each different line of the blocks that are neither a folder nor the output of a run."""
    lines = [
        line
        for block in blocks()
        if not is_folder(block) and not is_output(block)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return list(dict.fromkeys(line.strip() for line in lines if line.strip() and not line.strip().startswith("#")))


def of_this_package(line: str) -> bool:
    """Return whether a command runs a module of the package."""
    return bool(re.search(r"-m llm\.", line))


def inline_commands() -> list[str]:
    """Return the commands inside sentences and tables."""
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", TEXT)
    return list(dict.fromkeys(" ".join(span.split()) for span in spans if of_this_package(span)))


def module_and_words(line: str) -> tuple[str, list[str]]:
    """Return the module and the arguments of a command, such as `("llm.plot", ["runs/demo"])`."""
    words = shlex.split(line)
    at = next(i for i, word in enumerate(words) if word.startswith("llm."))
    return words[at], words[at + 1 :]


def shortened(module: str, words: list[str]) -> list[str]:
    """Return the arguments for a quick run: few steps, and a narrow model where one is built by default."""
    if module == "llm.launch":
        at = words.index("--") + 1
        return [*words[:at], *shortened("llm.trainers.gpt", words[at:])]
    words = [*words, *SHORTER[module]]
    if module == "llm.trainers.gpt" and not {"--config", "--config_name", "--model_name_or_path"} & set(words):
        words += ["--config_overrides", "n_layer=1,n_embd=32,n_head=2"]
    return words


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_text: Path, tiny_gpt2_dir: Path) -> Iterator[Path]:
    """Yield a folder with a reader's texts, the examples, and a small run in runs/demo; gpt2 is in the Hub's cache."""
    folder = tmp_path_factory.mktemp("readme")
    for name in TEXTS:
        (folder / name).write_text(tiny_text.read_text()[:30_000])
    (folder / CONFIG).write_text('[data]\ntrain_file = "my.txt"\n[output]\noutput_dir = "runs/mine"\n')
    (folder / "examples").symlink_to(ROOT / "examples")
    plant_model(Path(constants.HF_HUB_CACHE), "gpt2", tiny_gpt2_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        words = "--train_file my.txt --config_name gpt2 --tokenizer_name gpt2 --output_dir runs/demo --logging_steps 1"
        code = train([*words.split(), "--eval_steps", "2", "--checkpointing_steps", "2", *SHORTER["llm.trainers.gpt"]])
        assert code == 0
        yield folder
    come_online()


def launch(launcher: str, words: list[str]) -> None:
    """Run a launcher's command in processes of its own."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
        "HF_HUB_CACHE": constants.HF_HUB_CACHE,
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, *LAUNCHERS[launcher], *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    num_processes = re.search(r"--(?:nproc_per_node|num_processes|nproc) (\d+)", " ".join(words))
    if num_processes:
        assert f"{num_processes[1]} processes" in done.stdout
    assert "done: " in done.stdout


def check_without_running(line: str) -> None:
    """Check that the files and targets of a command that is not run exist."""
    words = shlex.split(line)
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1:]
        assert set(words[1:]) <= set(targets)
    elif words[:4] == ["python", "-m", "pip", "install"]:
        assert (ROOT / words[words.index("-c") + 1]).is_file()
        assert set(re.findall(r"\w+", words[words.index("-e") + 1])) <= extras()
    elif words[0] in ("qsub", "sbatch"):
        assert words[1:] and all((ROOT / word).is_file() for word in words[1:])
    elif BENCHMARK.match(line):
        pass  # test_benchmark_when_its_commands_are_shown_then_knows_their_flags
    else:
        assert line in ("python3 -m venv .venv", ". .venv/bin/activate"), f"no stand-in for: {line}"


def extras() -> set[str]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return set(setup["options.extras_require"])


def prepare_for(words: list[str]) -> None:
    """Make the prepared folders that the arguments name, if no other test made them here."""
    named = {word.partition("=")[0] for word in words}
    for line in commands():
        if " -m llm.prepare " in line:
            module, prepare_words = module_and_words(line)
            folder = prepare_words[prepare_words.index("--output_dir") + 1]
            if prepare_words != words and folder in named and not Path(folder).exists():
                assert prepare(shortened(module, prepare_words)) == 0


@pytest.mark.parametrize("line", commands(), ids=lambda line: line[:40])
def test_command_when_run_unchanged_then_works(
    line: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if not of_this_package(line):
        check_without_running(line)
        return
    monkeypatch.chdir(workplace)
    module, words = module_and_words(line)
    assert module in SHORTER, f"no stand-in for: {line}"
    prepare_for(words)
    launcher = shlex.split(line)[0]
    if module == "llm.trainers.gpt" and "--output_dir" not in words:
        words += ["--output_dir", f"runs/of {launcher}"]
    if launcher in ("torchrun", "accelerate"):
        before = shlex.split(line)[1:]
        before = before[: before.index(module) + 1]
        launch(launcher, [*before, *shortened(module, words)])
        return
    assert launcher == "python", f"no stand-in for: {line}"
    if module == "llm.launch":
        check_launch(words, capfd)
        return
    program = {
        "llm.trainers.gpt": train,
        "llm.generate": generate,
        "llm.plot": plot,
        "llm.bench": bench,
        "llm.prepare": prepare,
        "llm.runs": list_runs,
    }[module]
    assert program(shortened(module, words)) == 0, capfd.readouterr().err
    check_result(module, words, capfd.readouterr().out)


def check_launch(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """Check that a script is printed, or that processes are started, for a shorter run."""
    if words[0] in ("pbs", "slurm"):
        assert launch_cluster(words) == 0
        flags = {word: words[number + 1] for number, word in enumerate(words) if word.startswith("--") and word != "--"}
        out = capfd.readouterr().out
        assert f"select={flags['--nodes']}:" in out
        assert all(value in out for value in (flags["--account"], flags["--walltime"], flags["--config"]))
        return
    assert words[0] == "node"
    launch("python", ["-m", "llm.launch", *shortened("llm.launch", words)])


def check_result(module: str, words: list[str], out: str) -> None:
    """Check the output and the files of a command."""
    if module == "llm.generate":
        num_samples = words[words.index("--num_samples") + 1] if "--num_samples" in words else "1"
        assert num_samples == "1" or f"--- sample {num_samples} of {num_samples} -" in out
    elif module == "llm.plot":
        assert Path(words[words.index("--output") + 1]).read_bytes().startswith(b"\x89PNG")
    elif module == "llm.runs":
        assert f"{words[0]}: done after step 2" in out
        assert "newest, best" in out
    elif module == "llm.bench":
        assert "\nspeed: " in out
    elif module == "llm.prepare":
        assert (Path(words[words.index("--output_dir") + 1]) / "train_00000.bin").is_file()
    else:
        folder = Path(words[words.index("--output_dir") + 1])
        assert (folder / "model.safetensors").is_file()
        name = words[words.index("--model_name_or_path") + 1] if "--model_name_or_path" in words else None
        assert f"weights: {f'loaded from {name}' if name else 'random'}" in out


@pytest.mark.parametrize("line", inline_commands(), ids=lambda line: line[:40])
def test_command_when_inside_a_sentence_then_its_options_are_read(line: str) -> None:
    module, words = module_and_words(line)
    if module == "llm.launch":
        assert isinstance(
            read_options(LAUNCH_TABLES[words[0]], words[1:], prog="", description=""), LAUNCH_TABLES[words[0]]
        )
        return
    table = {
        "llm.trainers.gpt": Options,
        "llm.generate": GenerateOptions,
        "llm.plot": PlotOptions,
        "llm.bench": BenchOptions,
        "llm.prepare": PrepareOptions,
        "llm.runs": RunsOptions,
    }[module]
    if "--help" in words:
        with pytest.raises(SystemExit) as end:
            read_options(table, words, prog=module, description="")
        assert end.value.code == 0
    else:
        assert isinstance(read_options(table, words, prog=module, description=""), table)


def test_commands_when_listed_then_are_those_that_a_reader_sees() -> None:
    # If the pattern of blocks failed, everything above would pass.
    assert TEXT.count("```") == 2 * len(blocks())
    assert "make demo" in commands()
    assert any(line.startswith("torchrun ") for line in commands())
    assert sum(of_this_package(line) for line in commands()) >= 5
    assert any(line.startswith("accelerate launch ") for line in commands() + inline_commands())


def test_folder_when_described_then_a_run_writes_every_name(workplace: Path) -> None:
    (block,) = [block for block in blocks() if is_folder(block)]
    block = block.replace("OUTPUT_DIR/", "").replace("step_N", "step_2")
    described = re.sub(r"\(.*?\)", "", block).replace("state, step, reason, exit code", "")
    described = re.sub(r"resolved options|one record a line|a complete .*", "", described)
    names = described.split()
    assert len(names) > 10
    for name in [*names, "checkpoints/step_2/manifest.json"]:
        assert list((workplace / "runs" / "demo").glob(name.rstrip("/"))), name
    files = {path.name for path in (workplace / "runs" / "demo").iterdir()}
    assert not [name for name in files if not any(Path(name).match(shown.split("/")[0]) for shown in names)]


def test_ledger_when_shown_then_is_a_line_that_a_run_logs_and_adds_up() -> None:
    (block,) = [block for block in blocks() if is_output(block)]
    train_tokens, held_out, dropped, total = (int(n.replace(",", "")) for n in re.findall(r"[\d,]+", block))
    counts = Ledger(train_tokens, held_out, dropped, 0)
    assert block.strip() == ledger_line(counts)
    assert counts.total == total


def test_flags_when_mentioned_then_are_options() -> None:
    tables = (Options, BenchOptions, GenerateOptions, PlotOptions, PrepareOptions, RunsOptions, *LAUNCH_TABLES.values())
    known = {name for table in tables for name in flags_of(table)}
    text = TEXT + ALL_PAGES["docs/optimizers.md"]
    mentioned = {flag.replace("-", "_") for flag in FLAG.findall(BENCHMARK.sub("", text))}
    assert len(mentioned) > 50
    assert mentioned - known - set(BUILT_IN) - LAUNCHER_FLAGS == set()


@pytest.mark.parametrize("module", sorted(BENCHMARKS))
def test_benchmark_when_its_commands_are_shown_then_knows_their_flags(module: str) -> None:
    help_text = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert help_text.returncode == 0, help_text.stderr
    assert BENCHMARKS[module] <= set(FLAG.findall(help_text.stdout))


def test_paths_when_named_in_any_page_then_exist() -> None:
    pages = ALL_PAGES | {
        str(path.relative_to(ROOT)): path.read_text()
        for path in (ROOT / "CONTRIBUTING.md", *(ROOT / "docs" / "decisions").glob("*.md"))
    }
    paths = {
        (page, path)
        for page, text in pages.items()
        for path in re.findall(
            r"`((?:llm|tests|benchmarks|docs|examples|jobs)/[^\s`]*|[A-Z]+\.md|Makefile|setup\.cfg)`", text
        )
    }
    assert ("README.md", "CONTRIBUTING.md") in paths
    assert len(paths) > 60
    # NAME stands for the name of a new file.
    missing = {(page, path) for page, path in paths if "NAME" not in path and not list(ROOT.glob(path.rstrip("/")))}
    assert missing == set()


def test_links_when_followed_then_lead_to_a_file_or_a_heading() -> None:
    for page, text in ALL_PAGES.items():
        headings = {
            re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-")
            for line in text.splitlines()
            if line.startswith("#")
        }
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("#"):
                assert target[1:] in headings, f"{page}: {target}"
            elif "://" not in target:
                assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_examples_when_listed_then_are_all_of_them() -> None:
    listed = re.findall(r"^\| `(examples/\w+\.toml)` \|", README, re.MULTILINE)
    assert sorted(listed) == sorted(f"examples/{path.name}" for path in (ROOT / "examples").glob("*.toml"))


def test_extras_when_listed_then_are_all_of_them() -> None:
    (sentence,) = re.findall(r"Extras: (.*?)\.\n", README, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", sentence)) == extras()
