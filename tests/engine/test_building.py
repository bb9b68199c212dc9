"""What a run's model is built with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm.config.options import Options
from llm.config.reader import read_options
from llm.engine import building
from llm.engine.building import build_language_model
from llm.models.configs import read_config

_SIZE = "vocab_size=50,n_embd=32,n_layer=2,n_head=4,n_positions=16"


@pytest.mark.parametrize(
    ("words", "asks"),
    [
        (("--dropout", "0"), True),
        (("--dropout", "0.1"), False),
        ((), False),  # GPT-2's own dropout
        (("--dropout", "0", "--attn_implementation", "sdpa"), False),
        (("--dropout", "0", "--attn_implementation", "eager"), False),
    ],
)
def test_build_language_model_when_attention_is_ours_without_dropout_then_flash_attention_3_is_asked_for(
    words: tuple[str, ...], asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[torch.device] = []
    monkeypatch.setattr(building, "use_flash_attention_3", devices.append)
    given = [*("--model_type", "gpt2", "--config_overrides", _SIZE, "--torch_compile", "false"), *words]
    options = read_options(Options, given, prog="test", description="")
    machine: Any = SimpleNamespace(world=SimpleNamespace(device=torch.device("cpu")))
    plan: Any = SimpleNamespace(num_steps=1, accumulation=1)
    build_language_model(options, options.model, read_config(options.model), None, machine, plan)
    assert devices == ([torch.device("cpu")] if asks else [])
