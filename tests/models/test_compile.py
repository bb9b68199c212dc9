"""Compiling: one graph for a run, the same numbers, and eager where there is no compiler."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from llm.models import compile as compilation
from llm.models.attention import use_causal_attention
from llm.models.compile import compile_training, is_compiled, layers_of
from llm.models.language_model import LanguageModel
from llm.models.sampling import sample

CPU = torch.device("cpu")


@pytest.fixture
def compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Graphs that are made, by a compiler that takes no time, instead of inductor's."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile

    def compile_by_backend(function: Any, mode: str | None = None, **more: Any) -> Any:
        assert mode in (None, "reduce-overhead", "max-autotune")  # inductor's own
        return compiled(function, backend=backend, **more)

    monkeypatch.setattr(torch, "compile", compile_by_backend)
    monkeypatch.setattr(compilation, "_obstacle", lambda _: None)
    torch.compiler.reset()
    return graphs


def gradients(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    model(ids, ids)[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("wish", [True, "blocks", "cudagraphs", "max-autotune"])
def test_compiled_training_when_evaluating_and_sampling_between_then_is_one_graph_with_equal_gradients(
    wish: Any, tiny_gpt2: PreTrainedModel, byte_tokenizer: Any, compiled_graphs: list[Any]
) -> None:
    use_causal_attention(tiny_gpt2)
    model = LanguageModel(tiny_gpt2).train()
    names = list(model.state_dict())
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(257, (4, 16), generator=draw)
    expected, evaluated = gradients(model, ids), model.eval()(ids[:3], ids[:3])[0]
    assert not is_compiled(model)
    assert compile_training(model, wish, device=CPU, num_steps=1)
    assert is_compiled(model)
    for rows in (3, 1):  # the last batch of an evaluation is smaller
        for _ in range(2):
            found = gradients(model.train(), ids)
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            loss, _ = model.eval()(ids[:rows], ids[:rows])
        assert rows != 3 or torch.equal(loss, evaluated.detach())
        sample(tiny_gpt2, byte_tokenizer, "a", max_new_tokens=3)
    assert len(compiled_graphs) == 1
    assert list(model.state_dict()) == names


def test_compile_training_when_there_is_no_compiler_then_says_so_and_stays_eager(
    tiny_gpt2: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", broken)
    model = LanguageModel(tiny_gpt2)
    with caplog.at_level(logging.INFO):
        assert not compile_training(model, True, device=CPU, num_steps=1)
        assert not is_compiled(model)
    messages = [record.message for record in caplog.records]
    assert messages == ["torch_compile: left out, there is no working compiler (no C++ compiler)"]
    ids = torch.zeros(1, 4, dtype=torch.int64)
    model(ids, ids)


@pytest.mark.parametrize(
    ("wish", "device", "num_steps", "expected"),
    [
        (False, "cuda", 10**6, False),
        ("auto", "cpu", 2_000, False),
        ("auto", "cpu", 10_000, True),
        ("auto", "cuda", 100, False),
        ("auto", "mps", 10**6, False),
        ("auto", "cuda", 10**6, True),
        (True, "cpu", 1, True),
    ],
)
def test_compile_training_when_auto_then_device_and_length_decide(
    wish: Any, device: str, num_steps: int, expected: bool, tiny_gpt2: PreTrainedModel, compiled_graphs: list[Any]
) -> None:
    model = LanguageModel(tiny_gpt2)
    assert compile_training(model, wish, device=torch.device(device), num_steps=num_steps) is expected
    assert not compiled_graphs


def test_compile_training_when_the_model_is_large_then_a_cpu_is_left_alone(
    tiny_gpt2: PreTrainedModel, compiled_graphs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LanguageModel(tiny_gpt2)
    monkeypatch.setattr(tiny_gpt2, "num_parameters", lambda: 124_000_000)
    assert not compile_training(model, "auto", device=CPU, num_steps=10**6)
    assert compile_training(model, "auto", device=torch.device("cuda"), num_steps=10**6)
    assert not compiled_graphs


def test_layers_of_when_asked_then_are_the_blocks(tiny_gpt2: PreTrainedModel) -> None:
    assert layers_of(tiny_gpt2) is tiny_gpt2.transformer.h


@pytest.mark.slow
def test_obstacle_when_this_machine_has_a_compiler_or_not_then_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    # Its own way: of this class of theirs monkeypatch would take the attribute away in the end.
    with torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)}):
        assert compilation._obstacle(CPU)
