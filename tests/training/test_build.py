"""The model and the updater that the options describe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GPT2LMHeadModel

from llm.config.errors import UserError
from llm.config.options import Options, TrainingOptions
from llm.config.reader import read_keywords
from llm.models.language_model import LanguageModel
from llm.training.accelerator import Compute, start_compute
from llm.training.build import build_language_model, build_updater, prepare_language_model
from llm.training.plan import Plan
from llm.training.updaters.base import LoadedState, Updater
from llm.training.updaters.preconditioning import KfacPreconditioner, NoPreconditioner
from llm.training.updaters.synchronous import SynchronousUpdater

PLAN = Plan(
    block_size=8, num_blocks=40, micro_batch=2, accumulation=2, global_batch=4, num_steps=10, seed=7, num_unread=0
)


@pytest.fixture(scope="module")
def compute() -> Compute:
    return start_compute(TrainingOptions(use_cpu=True, mixed_precision="no"))


@pytest.fixture
def build(compute: Compute, tiny_gpt2: GPT2LMHeadModel) -> Callable[..., Updater]:
    """`build(**options)` builds the updater of the tiny model, with half of each learning rate in every update."""

    def run(**options: Any) -> Updater:
        parsed = read_keywords(Options, options)
        return build_updater(parsed, compute, LanguageModel(tiny_gpt2), lambda step: 0.5, PLAN)

    return run


@pytest.mark.parametrize(
    ("optim", "peaks"), [("adamw", {1e-3}), ("sgd", {1e-3}), ("muon", {1e-3, 0.02})], ids=["adamw", "sgd", "muon"]
)
def test_updater_when_built_then_has_the_optimizer_and_the_rates_of_the_options(
    optim: str, peaks: set[float], build: Callable[..., Updater]
) -> None:
    updater = build(optim=optim, learning_rate=1e-3)
    assert isinstance(updater, SynchronousUpdater)
    targets = updater.profiling_targets()
    assert {group["initial_lr"] for group in targets.optimizer.param_groups} == peaks
    assert targets.optimizer.defaults["lr"] == 1e-3
    assert isinstance(targets.preconditioner, NoPreconditioner)
    assert (updater.data_parallel.rank, updater.data_parallel.size) == (0, 1)


def test_updater_when_options_have_no_effect_then_warns_with_their_names(
    build: Callable[..., Updater], log_lines: Callable[[], list[str]]
) -> None:
    build(muon_momentum=0.9, kfac_damping=0.01, kfac_spread=True)
    assert log_lines() == [
        "--muon_momentum: of no use without --optim muon",
        "--kfac_spread, --kfac_damping: of no use without --kfac",
    ]


def test_updater_when_kfac_is_requested_then_reads_the_rate_of_the_main_group_also_after_a_resume(
    build: Callable[..., Updater], monkeypatch: pytest.MonkeyPatch, log_lines: Callable[[], list[str]]
) -> None:
    rates: list[Callable[[], float]] = []

    def keep_rate(*arguments: Any, learning_rate: Callable[[], float], **named: Any) -> KfacPreconditioner:
        rates.append(learning_rate)
        assert (named["accumulation"], named["tokens_per_step"]) == (2, 32)
        return KfacPreconditioner(*arguments, learning_rate=learning_rate, **named)

    monkeypatch.setattr("llm.training.build.KfacPreconditioner", keep_rate)
    updater = build(kfac=True, optim="muon", learning_rate=1e-3)
    assert isinstance(updater.profiling_targets().preconditioner, KfacPreconditioner)
    assert "--optim muon with --kfac" in log_lines()[0]
    state = updater.state()
    updater.load(LoadedState({name: part.tensor for name, part in state.tensors.items()}, state.numbers))
    groups = updater.profiling_targets().optimizer.param_groups
    for index, group in enumerate(groups):
        group["lr"] = float(index)
    main = [index for index, group in enumerate(groups) if group["initial_lr"] == 1e-3]
    assert rates[0]() in main


def test_updater_when_kfac_pytorch_is_requested_then_its_adapter_is_built(
    build: Callable[..., Updater], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: dict[str, Any] = {}
    monkeypatch.setattr(
        "llm.training.build.KfacPytorchPreconditioner",
        lambda model, options, **named: built.update(named) or SimpleNamespace(),
    )
    build(kfac=True, kfac_backend="kfac-pytorch")
    assert (built["accumulation"], built["scaler"]) == (2, None)


@pytest.mark.parametrize(("keep", "attention"), [(None, "causal"), ("eager", "eager")])
def test_language_model_when_an_attention_is_named_then_it_is_kept(
    keep: str | None, attention: str, compute: Compute, tiny_gpt2: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_gpt2.set_attn_implementation("eager")
    monkeypatch.setattr(
        "llm.training.build.use_causal_attention", lambda model: setattr(model, "chosen_attention", "causal")
    )
    model = prepare_language_model(tiny_gpt2, Options(), compute, PLAN, keep_attention=keep)
    assert model.model is tiny_gpt2
    assert getattr(tiny_gpt2, "chosen_attention", tiny_gpt2.config._attn_implementation) == attention
    assert not model.is_compiled  # a short run on a CPU


def test_language_model_when_built_from_a_configuration_then_weights_follow_torchs_seed(
    compute: Compute, tiny_gpt2_dir: Path, byte_tokenizer: Any, log_lines: Callable[[], list[str]]
) -> None:
    options = read_keywords(Options, {"config_name": str(tiny_gpt2_dir)})
    config = AutoConfig.from_pretrained(tiny_gpt2_dir)
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(build_language_model(options, options.model, config, byte_tokenizer, compute, PLAN))
    weights = [model.model.state_dict() for model in models]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert f"({models[0].model.num_parameters():,} parameters)" in log_lines()[0]


def test_language_model_when_documents_cannot_be_kept_apart_then_is_refused(
    compute: Compute, tiny_gpt2: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: Any, device: Any) -> None:
        raise UserError("--document_mask")

    monkeypatch.setattr("llm.training.build.require_document_mask", refuse)
    prepare_language_model(tiny_gpt2, Options(), compute, PLAN)
    with pytest.raises(UserError, match="--document_mask"):
        prepare_language_model(tiny_gpt2, read_keywords(Options, {"document_mask": True}), compute, PLAN)
