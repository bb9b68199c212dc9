"""Checkpoints of accelerate (run_clm, llm-pytorch) and of the Trainer can be resumed; no code in them is run."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2LMHeadModel, get_scheduler

from llm.config.errors import UserError
from llm.config.options import ModelOptions, OptimizerOptions, TrainingOptions
from llm.data.batches.loader import Batch
from llm.models.language_model import LanguageModel
from llm.optim.registry import build_optimizer
from llm.training.accelerator import start_compute
from llm.training.checkpoints.external import ExternalCheckpoint
from llm.training.checkpoints.resume import Start
from llm.training.checkpoints.store import find_checkpoint, open_checkpoint
from llm.training.updaters.synchronous import SynchronousUpdater

RATE = 1e-3
MARKS = {"run_clm": ["bias", "LayerNorm.weight"], "llm-pytorch": ["bias", "layer_norm.weight"]}


def two_groups(model: torch.nn.Module, marks: list[str]) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if not any(mark in n for mark in marks)], "weight_decay": 0.01},
        {"params": [p for n, p in named if any(mark in n for mark in marks)], "weight_decay": 0.0},
    ]


def batch_of(number: int) -> Batch:
    draw = torch.Generator().manual_seed(number)
    ids = torch.randint(257, (4, 33), generator=draw)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


class Plain:
    """A loop as in those programs: accelerate, torch's AdamW over two groups, a schedule."""

    def __init__(self, model: GPT2LMHeadModel, groups: Any) -> None:
        self.accelerator = Accelerator(cpu=True)
        optimizer = torch.optim.AdamW(groups, lr=RATE)
        schedule = get_scheduler("constant", optimizer)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, optimizer, schedule)

    def update(self, batch: Batch) -> float:
        logits = self.model(input_ids=batch.ids).logits
        loss: Tensor = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


@pytest.fixture
def plain(tiny_gpt2: GPT2LMHeadModel) -> Plain:
    """Three updates of `tiny_gpt2`."""
    loop = Plain(tiny_gpt2, two_groups(tiny_gpt2, MARKS["llm-pytorch"]))
    for number in range(3):
        loop.update(batch_of(number))
    return loop


@pytest.fixture
def folder(plain: Plain, tmp_path: Path) -> Path:
    """The checkpoint of `plain`."""
    path = tmp_path / "checkpoints" / "step_3"
    plain.accelerator.save_state(str(path))
    return path


@pytest.fixture
def fresh(tiny_gpt2: GPT2LMHeadModel) -> Callable[..., SynchronousUpdater]:
    """`fresh()` makes a `SynchronousUpdater` of a model with other random weights."""

    def make(**changes: Any) -> SynchronousUpdater:
        compute = start_compute(TrainingOptions(use_cpu=True, mixed_precision="no"))
        torch.manual_seed(99)
        model = GPT2LMHeadModel(tiny_gpt2.config)
        # The programs' groups decay other weights than this package's.
        values = {"learning_rate": RATE, "weight_decay": 0.01, **changes}
        language_model = LanguageModel(model)
        return SynchronousUpdater(
            compute=compute,
            model=language_model,
            wrapped=compute.accelerator.prepare_model(language_model),
            optimizer=build_optimizer(model, OptimizerOptions.model_validate(values)),
            schedule=lambda step: 1.0,
            max_grad_norm=0.0,
            seed=5,
        )

    return make


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """`logged()` returns what the package has logged so far."""
    monkeypatch.setattr(logging.getLogger("llm"), "propagate", True)
    caplog.set_level(logging.INFO)
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


def resume(path: Path, updater: SynchronousUpdater) -> int:
    """Resume as a run does; return the finished updates."""
    start = Start(open_checkpoint(path), 7, ModelOptions())
    start.load_weights(updater.model.model)
    return start.resume(updater).step


def weights_of(updater: SynchronousUpdater) -> dict[str, Tensor]:
    return updater.model.model.state_dict()


def assert_continues_equally(plain: Plain, updater: SynchronousUpdater) -> None:
    """Check that one more update of both gives the same loss and weights."""
    expected = plain.update(batch_of(3))
    assert updater.update([batch_of(3)], 3).loss == pytest.approx(expected, rel=1e-6)
    expected_weights = plain.accelerator.unwrap_model(plain.model).state_dict()
    for name, tensor in weights_of(updater).items():
        torch.testing.assert_close(tensor, expected_weights[name], rtol=0, atol=2e-6, msg=name)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("program", MARKS)
def test_resume_when_accelerate_saved_it_then_the_next_update_equals_that_of_the_uninterrupted_loop(
    program: str, safe: bool, tiny_gpt2: GPT2LMHeadModel, fresh: Callable[..., SynchronousUpdater], tmp_path: Path
) -> None:
    # Without decay: those programs also decay the weights of GPT-2's norms.
    groups = [{**group, "weight_decay": 0.0} for group in two_groups(tiny_gpt2, MARKS[program])]
    loop = Plain(tiny_gpt2, groups)
    for number in range(3):
        loop.update(batch_of(number))
    loop.accelerator.save_state(str(tmp_path / "step_3"), safe_serialization=safe)
    updater = fresh(weight_decay=0.0)
    assert resume(tmp_path / "step_3", updater) == 3
    assert_continues_equally(loop, updater)


def test_resume_when_the_moments_are_lost_then_the_next_update_differs(
    plain: Plain, folder: Path, fresh: Callable[..., SynchronousUpdater]
) -> None:
    # Otherwise the comparison above could not fail.
    (folder / "optimizer.bin").unlink()
    updater = fresh(weight_decay=0.0)
    resume(folder, updater)
    with pytest.raises(AssertionError):
        assert_continues_equally(plain, updater)


def test_resume_when_the_trainer_saved_it_then_the_next_update_equals_that_of_the_uninterrupted_loop(
    tiny_gpt2: GPT2LMHeadModel, fresh: Callable[..., SynchronousUpdater], tmp_path: Path, logged: Callable[[], str]
) -> None:
    from transformers.trainer_pt_utils import get_parameter_names

    decayed = set(get_parameter_names(tiny_gpt2, [torch.nn.LayerNorm], ["bias", "layernorm", "rmsnorm"]))
    named = list(tiny_gpt2.named_parameters())
    groups = [
        {"params": [p for n, p in named if n in decayed], "weight_decay": 0.01},
        {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
    ]
    loop = Plain(tiny_gpt2, groups)
    for number in range(3):
        loop.update(batch_of(number))
    path = tmp_path / "checkpoint-3"
    tiny_gpt2.save_pretrained(path)
    torch.save(loop.optimizer.optimizer.state_dict(), path / "optimizer.pt")
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, ExternalCheckpoint)
    options = checkpoint.model_options(ModelOptions(config_name="gpt2", config_overrides="n_layer=1"))
    assert (options.model_name_or_path, options.config_name, options.config_overrides) == (str(path), None, None)
    updater = fresh()
    updater.model.model.load_state_dict(GPT2LMHeadModel.from_pretrained(path).state_dict())
    assert resume(path, updater) == 3
    # The groups are the same here, and so is the decay.
    assert "weight decay differs" not in logged()
    assert_continues_equally(loop, updater)


def test_resume_when_this_run_uses_muon_then_the_state_of_adamw_is_refused(
    folder: Path, fresh: Callable[..., SynchronousUpdater]
) -> None:
    with pytest.raises(UserError, match=r"another model, --optim or --kfac \(it was AdamW\)"):
        resume(folder, fresh(optim="muon"))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_weights_when_their_names_have_prefixes_of_wrappers_then_are_loaded(
    prefix: str, plain: Plain, folder: Path, fresh: Callable[..., SynchronousUpdater]
) -> None:
    from safetensors.torch import load_file, save_file

    saved = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in saved  # it is tied
    save_file({prefix + name: tensor for name, tensor in saved.items()}, folder / "model.safetensors")
    updater = fresh()
    resume(folder, updater)
    expected_weights = plain.accelerator.unwrap_model(plain.model).state_dict()
    assert all(torch.equal(tensor, expected_weights[name]) for name, tensor in weights_of(updater).items())


def test_resume_when_done_then_logs_what_is_not_restored(
    folder: Path, fresh: Callable[..., SynchronousUpdater], logged: Callable[[], str]
) -> None:
    updater = fresh(adam_beta2=0.95, weight_decay=0.01)
    (folder / "kfac.pt").touch()
    resume(folder, updater)
    lines = logged()
    assert f"resumed from step 3 ({folder}), which another program wrote: weights (model.safetensors) and" in lines
    assert "the state of AdamW (optimizer.bin)" in lines
    assert "not restored: data position (continuing at step 3 of this run's own order" in lines
    assert "the seed" in lines
    assert "not read: kfac.pt, random_states_0.pkl, scheduler.bin;" in lines
    assert "optimizer had betas (0.9, 0.999), this run has (0.9, 0.95)" in lines
    assert "weight_decay" not in lines
    # Those programs recognise norms by their names, and GPT-2's have other names.
    assert "transformer.h.0.ln_1.weight and 4 other weights are no longer decayed" in lines


def test_resume_when_there_is_only_a_model_then_logs_that_the_optimizer_starts_from_scratch(
    folder: Path, fresh: Callable[..., SynchronousUpdater], logged: Callable[[], str]
) -> None:
    for path in folder.iterdir():
        if path.name != "model.safetensors":
            path.unlink()
    updater = fresh()
    assert resume(folder, updater) == 3
    assert "step_3 holds no optimizer state" in logged()
    assert updater.state().tensors == {}


def test_find_when_the_run_has_external_checkpoints_then_a_bare_flag_takes_the_newest(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / "step_10")
    for requested in (True, "latest"):
        checkpoint = find_checkpoint(requested, folder.parent)
        assert isinstance(checkpoint, ExternalCheckpoint)
        assert checkpoint.step == 10
    with pytest.raises(UserError, match="best: there is no such checkpoint"):
        find_checkpoint("best", folder.parent)


def test_find_when_only_a_model_is_left_then_a_bare_flag_takes_an_older_one(
    folder: Path, logged: Callable[[], str]
) -> None:
    incomplete = folder.parent / "step_10"
    incomplete.mkdir()
    shutil.copy(folder / "model.safetensors", incomplete)
    checkpoint = find_checkpoint(True, folder.parent)
    assert checkpoint is not None
    assert checkpoint.step == 3
    assert "step_10 is incomplete; taking an older one" in logged()


def test_open_when_the_folder_is_named_by_its_epoch_then_the_optimizer_has_the_step(folder: Path) -> None:
    path = folder.rename(folder.parent / "epoch_0")
    assert open_checkpoint(path).step == 3
    (path / "optimizer.bin").unlink()
    with pytest.raises(UserError, match="epoch_0 does not hold its number of updates"):
        open_checkpoint(path)


class Code:
    """Makes a folder when it is unpickled by a reader that runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["optimizer.bin", "pytorch_model.bin"])
def test_file_when_unpickling_it_would_run_code_then_is_refused_in_one_line(
    name: str, folder: Path, fresh: Callable[..., SynchronousUpdater], tmp_path: Path
) -> None:
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    torch.save({"state": Code(tmp_path / "was run")}, folder / name)
    with pytest.raises(UserError, match=f"{name} is refused") as error:
        resume(folder, fresh())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "was run").exists()
    torch.load(folder / name, weights_only=False)
    assert (tmp_path / "was run").exists()  # otherwise the test could not fail


@pytest.mark.parametrize("name", ["optimizer.bin", "model.safetensors"])
def test_file_when_truncated_then_is_refused_before_a_model_is_built(name: str, folder: Path) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{name} is (refused|damaged)") as error:
        open_checkpoint(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "not a dictionary"),
        ({"weights": torch.zeros(2)}, "holds no optimizer state"),
        ({"state": {0: {"exp_avg": "x"}}, "param_groups": [{"params": [0]}]}, "holds no optimizer state"),
        (
            {"state": {0: {"square_avg": torch.zeros(2)}}, "param_groups": [{"params": [0]}]},
            "not the state of AdamW or SGD",
        ),
        (
            {
                "state": {0: dict.fromkeys(["step", "exp_avg", "exp_avg_sq"], torch.zeros(()))},
                "param_groups": [{"params": [0]}],
            },
            "does not fit the parameters",
        ),
    ],
    ids=["list", "other", "text", "rmsprop", "one parameter"],
)
def test_optimizer_when_its_state_does_not_fit_the_model_then_is_refused(
    content: Any, message: str, folder: Path, fresh: Callable[..., SynchronousUpdater]
) -> None:
    torch.save(content, folder / "optimizer.bin")
    with pytest.raises(UserError, match=message):
        resume(folder, fresh())


def test_optimizer_when_the_run_uses_another_then_its_state_is_refused(
    folder: Path, fresh: Callable[..., SynchronousUpdater]
) -> None:
    with pytest.raises(UserError, match=r"another model, --optim or --kfac \(it was AdamW\)"):
        resume(folder, fresh(optim="sgd"))


def test_weights_when_of_another_model_then_the_difference_is_named(
    folder: Path, fresh: Callable[..., SynchronousUpdater], tiny_gpt2: GPT2LMHeadModel
) -> None:
    from safetensors.torch import load_file, save_file

    saved = load_file(folder / "model.safetensors")
    changes = [
        ({**saved, "transformer.wte.weight": torch.zeros(9, 32)}, r"transformer.wte.weight is \[9, 32\]"),
        ({**saved, "transformer.h.2.ln_1.bias": torch.zeros(32)}, r"transformer.h.2.ln_1.bias is unexpected"),
        ({n: t for n, t in saved.items() if n != "transformer.ln_f.bias"}, "transformer.ln_f.bias is missing"),
    ]
    for weights, message in changes:
        save_file(weights, folder / "model.safetensors")
        with pytest.raises(UserError, match=message + r".*--config_overrides"):
            resume(folder, fresh())
    # A mask that older versions saved is accepted.
    save_file({**saved, "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64).bool()}, folder / "model.safetensors")
    assert resume(folder, fresh()) == 3


def test_weights_when_sharded_or_missing_then_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "step_4"
    path.mkdir()
    with pytest.raises(UserError, match=r"the weights are missing \(no model.safetensors\)"):
        open_checkpoint(path)
    (path / "pytorch_model_fsdp_0").mkdir()
    with pytest.raises(UserError, match="the weights are in shards"):
        open_checkpoint(path)


def test_run_when_resumed_from_an_external_checkpoint_then_continues_from_its_step(
    plain: Plain, folder: Path, tiny_options: list[str], train: Callable[..., Any], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    outcome = train(*tiny_options, "--output_dir", output, "--logging_steps", "1", "--resume_from_checkpoint", folder)
    assert outcome.code == 0, outcome.err
    assert "resumed from step 3" in outcome.out
    assert "step 4/20 " in outcome.out
    assert "step 3/20 " not in outcome.out
    refused = train(*tiny_options, "--max_train_steps", "2", "--resume_from_checkpoint", folder)
    assert refused.code == 1
    assert "is at step 3, beyond the 2 of this run" in refused.err
