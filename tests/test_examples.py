"""Test that every file of examples/ is a run: it is read unchanged, and run for two steps with stand-ins."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm.config.options import Options
from llm.config.reader import read_options
from llm.data.batches.blocks import Blocks
from llm.hub.connection import come_online
from llm.training.plan import plan_run
from tests.conftest import Outcome
from tests.hub_cache import plant_model

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.toml"))

SHORT = "--max_train_steps 2 --max_eval_batches 1 --use_cpu"
NARROW = "--config_overrides n_layer=1,n_embd=32,n_head=2,n_positions=64 --block_size 32"
SMALL = "--block_size 32 --per_device_train_batch_size 2"
# Options that replace a text, a Hub dataset, an accelerator, or hours.
STAND_INS = {
    "demo": "",
    "shakespeare_char_cpu": f"--train_file tiny.txt {NARROW}",
    "shakespeare_char": f"--train_file tiny.txt --mixed_precision no {NARROW}",
    # A share of 0.05 % needs a larger text than the stand-in.
    "gpt2_124m_openwebtext": "--dataset_name documents --validation_split_percentage 5 --mixed_precision no "
    f"--torch_compile false --per_device_train_batch_size 2 --global_batch_size 4 {NARROW}",
    "gpt2_finetune": f"--train_file tiny.txt --mixed_precision no {SMALL}",
    "polaris_gpt_neo_125m": f"--dataset_name lines --mixed_precision no {SMALL}",
}
# Names of the Hub that examples load from.
PLANTED = ("gpt2", "EleutherAI/gpt-neo-125m")

every_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)


def read(example: Path, words: str = "") -> Options:
    return read_options(Options, ["--config", str(example), *words.split()], prog="gpt", description="")


@pytest.fixture
def workplace(tmp_path: Path, tiny_text: Path, tiny_gpt2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield a current folder with the stand-ins, models in the Hub's cache, and no connection to the Hub."""
    lines = tiny_text.read_text().splitlines()[:600]
    (tmp_path / "tiny.txt").write_text("\n".join(lines))
    for name, ending in (("documents", ""), ("lines", "\n")):  # rows of wikitext are lines of a text
        (tmp_path / name).mkdir()
        rows = "".join(json.dumps({"text": line + ending}) + "\n" for line in lines)
        (tmp_path / name / "train.jsonl").write_text(rows)
    for name in PLANTED:
        plant_model(Path(constants.HF_HUB_CACHE), name, tiny_gpt2_dir)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    come_online()


@every_example
def test_example_when_opened_then_its_first_line_says_what_how_long_and_which_loss(example: Path) -> None:
    first = example.read_text().splitlines()[0]
    assert re.match(r"# .{20,}: ", first)  # what
    assert re.search(r"\b(seconds|minutes?|hours?|days?|time)\b", first)
    assert re.search(r"\b(eval_)?loss\b", first)


@every_example
def test_example_when_read_then_every_key_is_an_option_of_that_value(example: Path) -> None:
    options = read(example)
    for table, rows in tomllib.loads(example.read_text()).items():
        for key, value in rows.items():
            assert getattr(getattr(options, table), key) == value
    assert str(options.output.output_dir).startswith("runs/")


@every_example
def test_example_when_its_comment_says_how_many_processes_then_the_batch_divides_among_them(example: Path) -> None:
    match = re.search(r"--nproc_per_node (\d+)", example.read_text())
    num_ranks = int(match[1]) if match else 1
    options = read(example)
    block_size = options.data.block_size or 1024
    blocks = Blocks(np.zeros(1000 * block_size + 1, np.uint16), block_size)
    plan = plan_run(options.training, blocks, num_ranks=num_ranks, seed=0)
    assert plan.accumulation * plan.micro_batch * num_ranks == plan.global_batch


@every_example
def test_example_when_run_for_two_steps_then_writes_a_model_that_loads(
    train: Callable[..., Outcome], workplace: Path, example: Path
) -> None:
    assert example.stem in STAND_INS, f"{example.name} needs an entry in STAND_INS, which may be empty"
    words = f"{STAND_INS[example.stem]} {SHORT}"
    folder = workplace / "run"
    outcome = train("--config", example, *words.split(), "--output_dir", folder)
    assert outcome.code == 0, outcome.err
    results = json.loads((folder / "all_results.json").read_text())
    assert results["step"] == 2
    assert math.isfinite(results["eval_loss"])
    assert math.isfinite(results["bits_per_byte"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(folder))
    loaded = read(example).model.model_name_or_path
    assert f"weights: {f'loaded from {loaded}' if loaded else 'random'}" in outcome.out
    # Options without a stand-in have the file's values.
    replaced = {word[2:] for word in words.split() if word.startswith("--")} | {"output_dir"}
    written = tomllib.loads((folder / "config.toml").read_text())
    for table, rows in tomllib.loads(example.read_text()).items():
        for key in rows.keys() - replaced:
            assert written[table][key] == rows[key]
