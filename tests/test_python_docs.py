"""Test docs/python.md: its blocks run, in order, as one script."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from llm import TrainResult
from llm.prepare import main as prepare

PAGE = (Path(__file__).parents[1] / "docs" / "python.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def run(language: str, block: str, names: dict[str, Any]) -> None:
    """Run a block of Python, or the command of a block without a language."""
    if language == "python":
        exec(block, names)  # noqa: S102 - text of this repository
        return
    words = shlex.split(block)
    assert words[:3] == ["python", "-m", "llm.prepare"]
    assert prepare([*words[3:], "--preprocessing_num_workers", "1"]) == 0


def test_page_when_its_blocks_run_in_order_then_they_train_read_and_evaluate(
    tmp_path: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text(tiny_text.read_text())
    torch.manual_seed(0)
    assert [language for language, _ in BLOCKS] == ["python", "python", "", "python", "python", "python"]
    assert len(BLOCKS[0][1].splitlines()) <= 12
    names: dict[str, Any] = {"__name__": "page"}
    results: list[TrainResult] = []
    for language, block in BLOCKS[:2]:
        run(language, block, names)
        results.append(names["result"])
    strings, dataset = results
    assert strings.model_dir == Path("runs/strings")
    assert (Path("runs/strings") / "model.safetensors").is_file()
    assert dataset.output_dir is None
    for result in results:
        assert result.eval_loss is not None
        assert result.eval_loss < 0.9 * math.log(len(names["tokenizer"]))
    for language, block in BLOCKS[2:4]:
        run(language, block, names)
    batch = names["batch_of_step"](0)
    assert batch.ids.shape == batch.targets.shape == (8, 32)
    assert torch.equal(batch.ids[:, 1:], batch.targets[:, :-1])
    losses = []
    for number in (5, 4, 5):  # evaluate before and after the loop with K-FAC
        run(*BLOCKS[number], names)
        losses.append(names["evaluation"].loss)
    assert losses[2] < losses[0] - 0.1
    assert not any(module._forward_hooks for module in names["model"].modules())
    assert names["evaluation"].perplexity == pytest.approx(math.exp(names["evaluation"].loss))
    assert 0 < names["evaluation"].bits_per_byte < names["evaluation"].loss / math.log(2)


def test_commands_when_shown_in_the_page_then_are_in_fenced_blocks() -> None:
    assert PAGE.count("```") == 2 * len(BLOCKS)
