"""The adapter of kfac-pytorch, around a stand-in for the installed package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llm.config.errors import UserError
from llm.config.options import KfacOptions
from llm.training.updaters.kfac_pytorch import KfacPytorchPreconditioner
from llm.training.updaters.preconditioning import KfacPreconditioner

Adapter = tuple[KfacPytorchPreconditioner, "FakeKfac"]


def _llama(vocab_size: int = 97) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, tie_word_embeddings=False, **sizes))


class FakeKfac:
    """The surface of kfac.preconditioner.KFACPreconditioner 0.4: it doubles the gradients, and counts."""

    def __init__(self, model: nn.Module, **arguments: Any) -> None:
        self.model = model
        self.arguments = arguments
        self.steps = 0
        self.num_resets = 0
        self.layers: dict[str, dict[str, Tensor | None]] = {"a.b": {"A": torch.eye(2), "G": None}}

    def step(self) -> None:
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad *= 2
        self.steps += 1

    def reset_batch(self) -> None:
        self.num_resets += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "damping": 1.0, "layers": self.layers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.layers = state["layers"]


@pytest.fixture
def build_adapter(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Adapter]:
    """`build_adapter(model, **options)` returns the adapter and the stand-in inside it."""
    package = ModuleType("kfac")
    module = ModuleType("kfac.preconditioner")
    module.KFACPreconditioner = FakeKfac  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kfac", package)
    monkeypatch.setitem(sys.modules, "kfac.preconditioner", module)

    def build(model: PreTrainedModel, **options: Any) -> Adapter:
        kfac = KfacOptions(**{"kfac": True, "kfac_backend": "kfac-pytorch", **options})
        adapter = KfacPytorchPreconditioner(
            model, kfac, learning_rate=lambda: 0.0, accumulation=3, scaler=options.get("scaler")
        )
        inner: Any = adapter._kfac
        return adapter, inner

    return build


def test_arguments_when_built_then_are_the_options_and_else_the_defaults_of_kfac_pytorch(
    build_adapter: Callable[..., Adapter],
) -> None:
    adapter, inner = build_adapter(_llama(), kfac_damping=0.01, kfac_inv_update_steps=7)
    assert {key: inner.arguments[key] for key in ("factor_update_steps", "inv_update_steps", "damping")} == {
        "factor_update_steps": 10, "inv_update_steps": 7, "damping": 0.01,
    }  # fmt: skip
    assert "kl_clip" not in inner.arguments  # kfac-pytorch has its own default
    assert (inner.arguments["accumulation_steps"], inner.arguments["compute_method"]) == (3, "eigen")
    assert not inner.arguments["update_factors_in_hook"]
    assert inner.arguments["lr"](0) > 0  # kfac-pytorch divides by it
    assert adapter.intervals == (10, 70)
    assert adapter.timings is None


def test_precondition_when_gradients_are_complete_then_returns_their_new_norm(
    build_adapter: Callable[..., Adapter],
) -> None:
    model = _llama()
    adapter, inner = build_adapter(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    norm = torch.tensor(float(sum(p.numel() for p in model.parameters()))).sqrt()
    new_norm = adapter.precondition(norm, num_tokens=torch.tensor(8), loss_scale=torch.tensor(1.0))
    assert float(new_norm) == pytest.approx(2 * float(norm))
    adapter.discard()
    assert (inner.steps, inner.num_resets) == (1, 1)


def test_state_when_loaded_into_another_then_has_its_factors_and_steps(
    build_adapter: Callable[..., Adapter],
) -> None:
    adapter, inner = build_adapter(_llama())
    inner.steps = 5
    tensors, numbers = adapter.state()
    assert (list(tensors), numbers) == (["a.b/A"], {"steps": 5})
    other, other_inner = build_adapter(_llama())
    other.load(tensors, numbers)
    assert other_inner.steps == 5
    assert torch.equal(other_inner.layers["a.b"]["A"], torch.eye(2))  # type: ignore[arg-type]
    assert other_inner.layers["a.b"]["G"] is None


def test_state_when_of_the_other_backend_then_is_refused_by_both(build_adapter: Callable[..., Adapter]) -> None:
    adapter, _ = build_adapter(_llama())
    model = _llama()
    kfac = KfacPreconditioner(
        model, KfacOptions(kfac=True), learning_rate=lambda: 0.0, accumulation=1, tokens_per_step=1000
    )
    with pytest.raises(ValueError, match="--kfac_backend"):
        kfac.load(*adapter.state())
    with pytest.raises(ValueError, match="--kfac_backend"):
        adapter.load(*kfac.state())


def test_state_when_the_checkpoint_holds_none_then_warns_and_starts_from_scratch(
    build_adapter: Callable[..., Adapter], log_lines: Callable[[], list[str]]
) -> None:
    adapter, inner = build_adapter(_llama())
    adapter.load({}, {})
    assert inner.steps == 0
    assert "K-FAC" in log_lines()[0]


def test_adapter_when_the_model_has_no_layer_for_it_then_is_refused(
    build_adapter: Callable[..., Adapter], tiny_gpt2: GPT2LMHeadModel
) -> None:
    with pytest.raises(UserError, match="Conv1D"):
        build_adapter(tiny_gpt2)
    with pytest.raises(UserError, match="no Linear layer"):
        build_adapter(_llama(), kfac_skip_layers=("Linear",))


def test_adapter_when_kfac_pytorch_is_not_installed_then_the_error_names_its_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "kfac", None)
    options = KfacOptions(kfac=True, kfac_backend="kfac-pytorch")
    with pytest.raises(UserError, match=r"not installed here.*git\+https://github\.com/gpauloski/kfac-pytorch"):
        KfacPytorchPreconditioner(_llama(), options, learning_rate=lambda: 0.0, accumulation=1, scaler=None)
