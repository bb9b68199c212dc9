"""Tests of K-FAC in the main program: its options, checkpoints and ranks."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import Outcome, keep_only
from tests.trainers.test_gpt import largest_difference, records, torchrun, weights

Train = Callable[..., Outcome]

# Frequent factor updates and rare inverse updates, so that most steps use inverses of older factors.
KFAC = ("--kfac", "--kfac_factor_update_steps", "2", "--kfac_inv_update_steps", "5")


def states(folder: Path, step: int) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint's optimizer.safetensors by name."""
    return load_file(folder / f"checkpoints/step_{step}/optimizer.safetensors")


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    """Assert that two sets of tensors have equal names and bits."""
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def test_run_when_kfac_then_the_loss_falls_and_the_log_lists_layers_and_memory(
    train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    outcome = train(*tiny_options, *KFAC, "--logging_steps", "1", "--output_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    losses = [record["loss"] for record in records(tmp_path / "run") if "loss" in record]
    assert losses[-1] < losses[0] - 0.3
    first_line = (
        r"^K-FAC: 8 layers, factors every 2 and bases every 5 updates; \S+B of factors and \S+B of bases.*computed"
    )
    assert re.search(first_line, outcome.out, re.M)
    assert re.search(r"^K-FAC leaves to the optimizer alone: .*lm_head \(its weight is shared", outcome.out, re.M)
    assert "--kfac_compat" not in outcome.out
    # After the first period of 10 steps, which is not measured, less than two periods are left.
    assert "K-FAC took" not in outcome.out
    assert train(*tiny_options, "--output_dir", tmp_path / "without").code == 0
    assert largest_difference(weights(tmp_path / "run"), weights(tmp_path / "without")) > 1e-3


@pytest.mark.parametrize("step", [1, 3, 10])
def test_resume_when_after_any_step_then_ends_bit_identical(
    train: Train, tiny_options: list[str], tmp_path: Path, step: int
) -> None:
    words = [*tiny_options, *KFAC, "--max_train_steps", "12"]
    assert train(*words, "--output_dir", tmp_path / "uninterrupted", "--checkpointing_steps", str(step)).code == 0
    shutil.copytree(tmp_path / "uninterrupted", tmp_path / "killed")
    keep_only(tmp_path / "killed", step)
    outcome = train(*words, "--output_dir", tmp_path / "killed", "--resume_from_checkpoint")
    assert outcome.code == 0, outcome.err
    assert f"resumed from step {step}" in outcome.out
    assert_same(weights(tmp_path / "uninterrupted"), weights(tmp_path / "killed"))
    state = states(tmp_path / "uninterrupted", 12)
    assert_same(state, states(tmp_path / "killed", 12))
    layer = "preconditioner/transformer.h.1.mlp.c_fc/"
    assert {name.removeprefix(layer) for name in state if name.startswith(layer)} == {
        "factor_a", "factor_g", "basis_a", "basis_g", "values_a", "values_g", "count",
    }  # fmt: skip


def test_resume_when_only_the_run_or_only_the_checkpoint_has_kfac_then_one_line_reports_it(
    train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    words = [*tiny_options, "--max_train_steps", "4", "--checkpointing_steps", "2", "--resume_from_checkpoint"]
    for first, second, line in (
        ((), KFAC, "the checkpoint holds no K-FAC state: the factors start from scratch"),
        (KFAC, (), "the checkpoint was made with --kfac, this run has no --kfac: its K-FAC state is not used"),
    ):
        folder = tmp_path / str(len(first))
        assert train(*words, *first, "--output_dir", folder).code == 0
        keep_only(folder, 2)
        outcome = train(*words, *second, "--output_dir", folder)
        assert outcome.code == 0, outcome.err
        assert (outcome.out + outcome.err).count(line) == 1


def test_kfac_options_when_kfac_is_off_then_are_reported_as_unused(train: Train, tiny_options: list[str]) -> None:
    words = ["--kfac_method", "inverse", "--kfac_damping", "0.3", "--muon_learning_rate", "0.1"]
    outcome = train(*tiny_options, *words)
    assert outcome.code == 0, outcome.err
    assert (outcome.out + outcome.err).count("--muon_learning_rate: of no use without --optim muon") == 1
    assert (outcome.out + outcome.err).count("--kfac_damping, --kfac_method: of no use without --kfac") == 1
    assert "of no use" not in train(*tiny_options, *KFAC).out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--kfac_method", "inverse"), "the state is of another model or other K-FAC arguments"),
        (("--kfac_compat",), "the state is of llm.kfac's formulas, and these are kfac-pytorch's"),
    ],
)
def test_resume_when_kfac_has_other_arguments_then_is_refused(
    changed: tuple[str, ...], message: str, train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    words = [*tiny_options, *KFAC, "--max_train_steps", "4", "--checkpointing_steps", "2", "--output_dir", tmp_path]
    assert train(*words).code == 0
    keep_only(tmp_path, 2)
    refused = train(*words, "--resume_from_checkpoint", *changed)
    assert refused.code == 1
    assert f"--kfac ({message}" in refused.err
    assert refused.err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"),
        ("--gradient_checkpointing",),
    ],
)
def test_run_when_gradients_are_computed_in_another_way_then_the_weights_agree(
    train: Train, tiny_options: list[str], tmp_path: Path, words: tuple[str, ...]
) -> None:
    # SGD, because AdamW nearly takes the sign of a gradient and so magnifies rounding errors. The tolerance is
    # relative to how far the weights move.
    options = [*tiny_options, *KFAC, "--optim", "sgd", "--learning_rate", "0.1"]
    for name, more in (("start", ("--learning_rate", "0")), ("one", ()), ("other", words)):
        outcome = train(*options, "--max_train_steps", "6", *more, "--output_dir", tmp_path / name)
        assert outcome.code == 0, outcome.err
    distance = largest_difference(weights(tmp_path / "start"), weights(tmp_path / "one"))
    assert distance > 1e-3
    # fp32 rounding errors, which directions of low curvature magnify.
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "other")) <= 2e-4 * distance


@pytest.mark.parametrize(
    ("factor_update_steps", "pattern"),
    [
        ("2", r"K-FAC took \S+ ms an update, \d+% of an update without it \(measured over 24 updates\)"),
        ("1", r"K-FAC took \S+ ms an update, and its factor update in every backward pass"),
    ],
)
def test_run_when_longer_than_two_periods_then_reports_the_cost_of_kfac(
    train: Train, tiny_options: list[str], factor_update_steps: str, pattern: str
) -> None:
    words = ["--kfac", "--kfac_factor_update_steps", factor_update_steps, "--kfac_inv_update_steps", "4"]
    outcome = train(*tiny_options, *words, "--max_train_steps", "30")
    assert outcome.code == 0, outcome.err
    assert len(re.findall(pattern, outcome.out)) == 1


def test_command_line_of_llm_pytorch_when_run_then_trains_and_names_the_options_it_defines_otherwise(
    train: Train, tiny_options: list[str]
) -> None:
    words = ["--kfac", "--kfac-factor-update-steps", "1", "--kfac-inv-update-steps", "10", "--kfac-damping", "0.003",
             "--kfac-factor-decay", "0.9", "--kfac-kl-clip", "0.001"]  # fmt: skip
    outcome = train(*tiny_options, *words)
    assert outcome.code == 0, outcome.err
    lines = [line for line in outcome.out.splitlines() if "kfac-pytorch" in line and "--kfac_compat" in line]
    assert len(lines) == 1
    assert "--kfac_damping 0.003" in lines[0]
    assert "--kfac_kl_clip 0.001" in lines[0]


def test_kfac_compat_when_given_then_defaults_are_those_of_kfac_pytorch(
    train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    # kfac-pytorch's defaults, explicit or not, give the same run. Its damping is absolute, which for a mean loss leaves
    # the gradient nearly unchanged: the comparison with plain SGD shows that it is changed at all.
    options = [*tiny_options, "--optim", "sgd", "--learning_rate", "0.1", "--max_train_steps", "6"]
    explicit = ("--kfac", "--kfac_compat", "--kfac_damping", "0.001", "--kfac_kl_clip", "0.001")
    for name, words in (("plain", ()), ("compat", explicit[:2]), ("explicit", explicit), ("kfac", ("--kfac",))):
        outcome = train(*options, *words, "--output_dir", tmp_path / name)
        assert outcome.code == 0, outcome.err
        assert "--kfac_compat" not in outcome.out
    assert_same(weights(tmp_path / "compat"), weights(tmp_path / "explicit"))
    assert largest_difference(weights(tmp_path / "plain"), weights(tmp_path / "compat")) > 0
    assert largest_difference(weights(tmp_path / "kfac"), weights(tmp_path / "compat")) > 1e-3


def test_resume_when_kl_clip_limits_the_step_then_ends_bit_identical(
    train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    words = [*tiny_options, *KFAC, "--kfac_kl_clip", "1e-6", "--optim", "sgd", "--learning_rate", "0.1"]
    words += ["--max_train_steps", "6", "--checkpointing_steps", "3"]
    assert train(*words, "--output_dir", tmp_path / "uninterrupted").code == 0
    shutil.copytree(tmp_path / "uninterrupted", tmp_path / "killed")
    keep_only(tmp_path / "killed", 3)
    assert train(*words, "--output_dir", tmp_path / "killed", "--resume_from_checkpoint").code == 0
    assert_same(weights(tmp_path / "uninterrupted"), weights(tmp_path / "killed"))


def test_muon_when_combined_with_kfac_then_warns(train: Train, tiny_options: list[str]) -> None:
    outcome = train(*tiny_options, *KFAC, "--optim", "muon", "--max_train_steps", "2")
    assert outcome.code == 0, outcome.err
    assert "--optim muon with --kfac" in outcome.out + outcome.err


def test_kfac_when_every_layer_is_skipped_then_is_refused_before_the_text_is_read(
    train: Train, tiny_options: list[str]
) -> None:
    outcome = train(*tiny_options, *KFAC, "--kfac_skip_layers", "^transformer.h")
    assert outcome.code == 1
    assert outcome.err.count("\n") == 1
    assert "error: --kfac: K-FAC has no layer to precondition" in outcome.err
    assert "updates:" not in outcome.out


def test_dry_run_when_kfac_then_counts_its_state(train: Train, tiny_options: list[str]) -> None:
    sizes = []
    for words in ((), ("--kfac",), ("--kfac", "--kfac_method", "inverse")):
        outcome = train(*tiny_options, *words, "--dry_run")
        assert outcome.code == 0, outcome.err
        assert ("for K-FAC" in outcome.out) == bool(words)
        (size,) = re.findall(r"about (\S+) for each checkpoint", outcome.out)
        sizes.append(float(size.removesuffix("kB").removesuffix("MB")) * (1 if "M" in size else 1e-3))
    # Each of the eight layers has folded factors, n (n + 1) / 2 numbers, and bases n^2 and values n, or inverses n^2.
    dims = [(32, 96), (32, 32), (32, 128), (128, 32)] * 2
    numbers = [n for num_in, num_out in dims for n in (num_in + 1, num_out)]
    folded, squares = sum(n * (n + 1) // 2 for n in numbers), sum(n * n for n in numbers)
    assert sizes[1] - sizes[0] == pytest.approx(4e-6 * (folded + squares + sum(numbers)), rel=0.02)
    assert sizes[2] - sizes[0] == pytest.approx(4e-6 * (folded + squares), rel=0.02)


@pytest.mark.slow
def test_two_ranks_when_each_owns_layers_then_end_like_one_and_resume_on_one_or_two(
    train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    words = [*tiny_options, *KFAC, "--optim", "sgd", "--learning_rate", "0.02", "--checkpointing_steps", "7"]
    assert train(*words, "--output_dir", tmp_path / "one").code == 0
    halves = [*words, "--per_device_train_batch_size", "4", "--global_batch_size", "8"]
    outcome = torchrun(*halves, "--output_dir", tmp_path / "two")
    assert outcome.returncode == 0, outcome.stderr
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "two")) <= 1e-5
    assert states(tmp_path / "one", 14).keys() == states(tmp_path / "two", 14).keys()
    shutil.copytree(tmp_path / "two", tmp_path / "again")
    keep_only(tmp_path / "again", 7)
    resumed = torchrun(*halves, "--output_dir", tmp_path / "again", "--resume_from_checkpoint")
    assert resumed.returncode == 0, resumed.stderr
    assert_same(weights(tmp_path / "two"), weights(tmp_path / "again"))
    assert_same(states(tmp_path / "two", 20), states(tmp_path / "again", 20))
    keep_only(tmp_path / "two", 7)
    alone = train(*words, "--output_dir", tmp_path / "two", "--resume_from_checkpoint")
    assert alone.code == 0, alone.err
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "two")) <= 1e-5


@pytest.mark.slow
def test_two_ranks_when_only_rank_0_requests_a_checkpoint_then_both_contribute_their_state(
    tiny_options: list[str], tmp_path: Path
) -> None:
    # Only the clock of rank 0 requests timed saves; all ranks know of the last one and the best one.
    words = [*tiny_options, *KFAC, "--max_train_steps", "60", "--save_minutes", "0.001", "--eval_steps", "20"]
    outcome = torchrun(*words, "--per_device_train_batch_size", "4", "--output_dir", tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    saved = {int(step) for step in re.findall(r"saved step (\d+)", outcome.stdout)}
    assert 60 in saved
    assert len(saved - {20, 40, 60}) >= 1
    assert any(name.startswith("preconditioner/") for name in states(tmp_path, 60))
