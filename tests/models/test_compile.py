"""Compiling: one graph for a run, equal gradients, and no compiling without a compiler."""

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
    """Graphs that torch.compile makes, with a backend that runs them eagerly instead of inductor."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile

    def compile_by_backend(function: Any, mode: str | None = None, **options: Any) -> Any:
        assert mode in (None, "reduce-overhead", "max-autotune")  # modes of torch.compile
        return compiled(function, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", compile_by_backend)
    monkeypatch.setattr(compilation, "_compiler_error", lambda _: None)
    torch.compiler.reset()
    return graphs


def gradients(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    model(ids, ids)[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("mode", [True, "blocks", "cudagraphs", "max-autotune"])
def test_compiled_training_when_evaluating_and_sampling_between_then_is_one_graph_with_equal_gradients(
    mode: Any, tiny_gpt2: PreTrainedModel, byte_tokenizer: Any, compiled_graphs: list[Any]
) -> None:
    use_causal_attention(tiny_gpt2)
    model = LanguageModel(tiny_gpt2).train()
    names = list(model.state_dict())
    ids = torch.randint(257, (4, 16), generator=torch.Generator().manual_seed(0))
    expected = gradients(model, ids)
    expected_loss, _ = model.eval()(ids[:3], ids[:3])
    assert not is_compiled(model)
    assert compile_training(model, mode, device=CPU, num_steps=1)
    assert is_compiled(model)
    for rows in (3, 1):  # the last batch of an evaluation is smaller
        for _ in range(2):
            assert torch.allclose(gradients(model.train(), ids), expected, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            loss, _ = model.eval()(ids[:rows], ids[:rows])
        assert rows != 3 or torch.equal(loss, expected_loss.detach())
        sample(tiny_gpt2, byte_tokenizer, "a", max_new_tokens=3)
    assert len(compiled_graphs) == 1
    assert list(model.state_dict()) == names


def test_compile_training_when_there_is_no_compiler_then_logs_it_and_stays_eager(
    tiny_gpt2: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing_compile(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no C++ compiler\nmany more lines")

    monkeypatch.setattr(torch, "compile", failing_compile)
    model = LanguageModel(tiny_gpt2)
    with caplog.at_level(logging.INFO):
        assert not compile_training(model, True, device=CPU, num_steps=1)
        assert not is_compiled(model)
    (message,) = [record.message for record in caplog.records]
    assert message.startswith("torch_compile: not compiled")
    assert message.endswith("(no C++ compiler)")
    ids = torch.zeros(1, 4, dtype=torch.int64)
    model(ids, ids)


@pytest.mark.parametrize(
    ("mode", "device", "num_steps", "expected"),
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
def test_compile_training_when_auto_then_device_and_number_of_steps_decide(
    mode: Any, device: str, num_steps: int, expected: bool, tiny_gpt2: PreTrainedModel, compiled_graphs: list[Any]
) -> None:
    model = LanguageModel(tiny_gpt2)
    assert compile_training(model, mode, device=torch.device(device), num_steps=num_steps) is expected
    assert not compiled_graphs


def test_compile_training_when_auto_and_model_is_large_then_does_not_compile_on_a_cpu(
    tiny_gpt2: PreTrainedModel, compiled_graphs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LanguageModel(tiny_gpt2)
    monkeypatch.setattr(tiny_gpt2, "num_parameters", lambda: 124_000_000)
    assert not compile_training(model, "auto", device=CPU, num_steps=10**6)
    assert compile_training(model, "auto", device=torch.device("cuda"), num_steps=10**6)
    assert not compiled_graphs


def test_layers_of_when_gpt2_then_returns_its_blocks(tiny_gpt2: PreTrainedModel) -> None:
    assert layers_of(tiny_gpt2) is tiny_gpt2.transformer.h


@pytest.mark.slow
def test_compiler_error_when_compiler_is_missing_then_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    # monkeypatch would delete this attribute of the config class in the end, so use the patch method of the config.
    with torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)}):
        assert compilation._compiler_error(CPU)
