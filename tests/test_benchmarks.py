"""Tests of the benchmarks: the programs they compare compute the same, and differences are reported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import memory, optimizers
from benchmarks.arithmetic import beyond_tolerance
from benchmarks.gate import Program, thread_environment
from benchmarks.nanogpt import require_nanogpt
from benchmarks.settings import Setting
from benchmarks.starting import require_run_clm, write_start
from benchmarks.throughput import SIZES, times, unequal
from benchmarks.time_to_loss import summary

# Several processes import all libraries one after the other, while other tests run.
_TIMEOUT_SECONDS = 450
pytestmark = pytest.mark.timeout(500)

RUN_CLM = """
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
            outputs = model(**batch)
            accelerator.backward(loss)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
"""


@pytest.mark.slow
def test_throughput_when_run_then_losses_agree_and_figures_are_consistent(tmp_path: Path) -> None:
    file = tmp_path / "throughput.json"
    words = ["--size", "2x32", "--rounds", "2", "--updates", "3", "--threads", "1", "--device", "cpu", "--batch", "6"]
    words += ["--programs", "trainer,ours_full_trainer,nanogpt,litgpt", "--json", str(file)]
    subprocess.run([sys.executable, "-m", "benchmarks.throughput", *words], check=True, timeout=_TIMEOUT_SECONDS)
    result = json.loads(file.read_text())
    assert list(result["programs"]) == ["ours", "ours_again", "trainer", "ours_full_trainer"]
    assert list(result["skipped"]) == ["nanogpt", "litgpt"]
    assert result["unequal"] == []
    ours, again, trainer, full_trainer = result["programs"].values()
    # Where bf16 is native, `ours` uses it and the Trainer does not.
    rounding = 1e-5 if ours["arithmetic"] == "fp32" else 2e-3
    assert ours["first_loss"] == again["first_loss"] == pytest.approx(trainer["first_loss"], abs=rounding)
    assert ours["last_loss"] == pytest.approx(trainer["last_loss"], abs=max(1e-3, rounding))
    assert ours["last_loss"] < ours["first_loss"]
    assert full_trainer["first_loss"] != ours["first_loss"] == pytest.approx(full_trainer["first_loss"], abs=0.1)
    for program in (ours, again, trainer, full_trainer):
        assert program["tokens_per_second"] == pytest.approx(6 * 32 / program["wall_seconds"])
        assert program["times_ours"] == times(program["rounds"], ours["rounds"], again["rounds"], "wall_seconds")
        assert 0 < program["share_of_gemm"] < 1 and program["peak_bytes"] > 1e8 and program["cpu_seconds"] > 0
        assert len(program["rounds"]) == 2
    assert result["same_by_same"] == pytest.approx(ours["wall_seconds"] / again["wall_seconds"])


@pytest.mark.slow
def test_unequal_when_a_program_starts_from_other_weights_then_names_it(tmp_path: Path) -> None:
    result = {}
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        setting = write_start(folder, SIZES["2x32"], 3, "cpu", None, seed=seed)
        setting.write(folder / "setting.json")
        command = ["benchmarks.programs", "run_clm", str(folder / "setting.json")]
        program = Program(command, thread_environment(1, "cpu"))
        last = program.run_updates(2)
        program.close()
        result[f"seed {seed}"] = {
            "arithmetic": program.first_report["arithmetic"],
            "first_loss": program.first_report["loss"],
            "last_loss": last["loss"],
            "says": {"threads": program.first_report["threads"]},
        }
    assert [difference.split(" is ")[0] for difference in unequal(result)] == ["first_loss of seed 1"]


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox"])
def test_start_when_written_then_is_a_model_of_that_type_without_dropout(model_type: str, tmp_path: Path) -> None:
    setting = write_start(tmp_path, SIZES["2x32"], 3, "cpu", None, model_type=model_type)
    setting.write(tmp_path / "setting.json")
    assert Setting.read(tmp_path / "setting.json") == setting
    model = AutoModelForCausalLM.from_pretrained(setting.start_dir).train()
    assert model.config.model_type == setting.model_type == model_type
    blocks = torch.from_numpy(np.stack(list(setting.blocks())))
    assert blocks.shape == (3 * 8, 33) and int(blocks.max()) < model.get_input_embeddings().weight.shape[0] == 97
    first, second = (model(blocks[:, :-1]).logits for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["throughput", "--rounds", "0"], "--rounds 0: must be at least 1"),
        (["throughput", "--batch", "0"], "--batch 0: must be at least 1"),
        (["arithmetic"], "no such file; give a text"),
    ],
)
def test_benchmarks_when_an_option_is_wrong_then_exit_with_one_line(args: list[str], message: str) -> None:
    process = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{args[0]}", *args[1:]], capture_output=True, text=True, check=False
    )
    assert process.returncode == 1 and message in process.stderr and "Traceback" not in process.stderr


def test_times_when_the_machine_drifts_then_compares_within_rounds() -> None:
    ours, again, other = ([{"s": pace * drift} for drift in (1, 2, 9)] for pace in (1.1, 0.9, 1.5))
    assert times(other, ours, again, "s") == pytest.approx(1.5)
    assert times(ours, ours, again, "s") == pytest.approx(1.1)


def test_unequal_when_losses_or_threads_differ_then_names_them() -> None:
    same = {"arithmetic": "fp32", "first_loss": 4.0, "last_loss": 3.0, "says": {"threads": 2}}
    assert unequal({"ours": same, "other": {**same, "first_loss": 4.00005, "last_loss": 3.01}}) == []
    assert unequal({"ours": same, "other": {**same, "first_loss": 4.001, "arithmetic": "bf16"}}) == []
    assert len(unequal({"ours": same, "other": {**same, "first_loss": 4.001}})) == 1
    for name in ("ours_full_trainer", "ours_whole"):  # the second is its name in earlier results
        assert unequal({"ours": same, name: {**same, "first_loss": 4.03}}) == []
        assert len(unequal({"ours": same, name: {**same, "last_loss": float("nan")}})) == 1
    assert len(unequal({"ours": same, "other": {**same, "last_loss": float("nan")}})) == 1
    assert unequal({"ours": same, "other": {**same, "says": {"threads": 1}}}) == [
        "threads differ: {'ours': 2, 'other': 1}"
    ]


def test_program_when_it_fails_then_error_has_the_end_of_its_output(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"(?s)benchmarks\.programs nothing ended with code 1.*KeyError: 'nothing'"):
        Program(["benchmarks.programs", "nothing", str(tmp_path / "none.json")], {})


@pytest.mark.slow
def test_arithmetic_when_runs_are_short_then_variants_differ_by_rounding_and_outliers_are_named(
    tiny_text: Path, tmp_path: Path
) -> None:
    file = tmp_path / "arithmetic.json"
    words = ["--text", str(tiny_text), "--num_updates", "6", "--threads", "1", "--json", str(file)]
    command = [sys.executable, "-m", "benchmarks.arithmetic", *words]
    subprocess.run([*command, "--variants", "chunked", "--seeds", "1"], check=True, timeout=_TIMEOUT_SECONDS)
    chunked = json.loads(file.read_text())["eval_loss"]["chunked"]
    subprocess.run([*command, "--variants", "eager", "--seeds", "2"], check=True, timeout=_TIMEOUT_SECONDS)
    result = json.loads(file.read_text())
    eager = result["eval_loss"]["eager"]
    assert result["eval_loss"]["chunked"] == chunked, "the first run was not kept"
    assert result["spread"] == abs(eager["1"] - eager["2"]) > 1e-3, "both runs had the same seed"
    assert eager["1"] != chunked["1"], "both runs were the same variant"
    assert result["difference"] == {"chunked": pytest.approx(chunked["1"] - eager["1"])}
    assert beyond_tolerance(result, 0.0) == ["chunked"]
    assert beyond_tolerance(result, 1e-5) == []


@pytest.mark.slow
def test_first_update_when_measured_then_ratio_is_that_of_run_and_imports(tiny_text: Path, tmp_path: Path) -> None:
    file = tmp_path / "first_update.json"
    words = ["--text", str(tiny_text), "--rounds", "1", "--threads", "1", "--json", str(file)]
    subprocess.run([sys.executable, "-m", "benchmarks.first_update", *words], check=True, timeout=_TIMEOUT_SECONDS)
    result = json.loads(file.read_text())
    assert result["run_seconds"]["cpu"] > 1 and result["import_seconds"]["cpu"] > 1
    assert result["ratio"]["cpu"] == pytest.approx(result["run_seconds"]["cpu"] / result["import_seconds"]["cpu"])


def test_summary_when_curves_reach_the_loss_then_gives_seconds_and_ratios() -> None:
    def point(step: int, seconds: float, loss: float) -> dict[str, float]:
        return {"step": step, "wall_seconds": seconds, "cpu_seconds": 2 * seconds, "eval_loss": loss}

    nanogpt = [point(100, 10, 2.5), point(200, 20, 1.9)]
    ours = [point(100, 4, 1.88), point(200, 8, 1.7)]
    result = summary([{"nanogpt": nanogpt, "llm": ours}], 1.88)
    assert result["ratio"] == {"wall": 5.0, "cpu": 5.0} and result["ratio_to_loss"] is None
    assert result["nanogpt"]["seconds_to_loss"] is None and result["llm"]["step_at_loss"] == 100
    result = summary([{"nanogpt": nanogpt, "llm": ours}], 1.9)
    assert result["ratio_to_loss"] == {"wall": 5.0, "cpu": 5.0}
    assert summary([{"nanogpt": nanogpt, "llm": ours}], 1.0)["ratio"] is None


def test_require_when_folder_or_script_is_wrong_then_exits_with_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no train\.py in this folder"):
        require_nanogpt(tmp_path)
    for name in ("train.py", "model.py", "configurator.py"):
        (tmp_path / name).write_text("print('nothing')\n")
    with pytest.raises(SystemExit, match=r"unknown train\.py"):
        require_nanogpt(tmp_path)
    file = tmp_path / "run_clm_no_trainer.py"
    file.write_text(RUN_CLM)
    require_run_clm(file)
    file.write_text(RUN_CLM.replace("lr_scheduler.step()", ""))
    with pytest.raises(SystemExit, match=r"no `lr_scheduler\.step\(\)`"):
        require_run_clm(file)
    file.write_text(RUN_CLM + "accelerator.clip_grad_norm_(model.parameters(), 1.0)")
    with pytest.raises(SystemExit, match="clips gradients"):
        require_run_clm(file)


def test_arrival_when_between_two_evaluations_then_is_interpolated_linearly() -> None:
    curve = [{"step": step, "cpu_seconds": step / 10, "eval_loss": loss} for step, loss in ((10, 3.0), (20, 2.0))]
    assert optimizers.arrival(curve, 2.25) == pytest.approx({"step": 17.5, "cpu_seconds": 1.75})
    assert optimizers.arrival(curve, 3.5) == {"step": 10, "cpu_seconds": 1.0}
    assert optimizers.arrival(curve, 1.9) is None


@pytest.mark.slow
def test_optimizers_when_run_then_tunes_and_compares_and_repeats_no_run(
    tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"block_size": "16", "tokenizer_name": "char", "model_type": "gpt2", "validation_split_percentage": "10",
               "config_overrides": "n_layer=1,n_head=2,n_embd=16,n_positions=16"}  # fmt: skip
    monkeypatch.setitem(optimizers.SETTINGS, "2x64", optimizers.Setting(options, 8, 2, rates=(1e-2, 3e-2, 5e-2)))
    file = tmp_path / "optimizers.json"
    picture = tmp_path / "optimizers.png"
    words = ["--text", str(tiny_text), "--seeds", "2", "--variants", "adamw;kfac 1/10;kfac 1/10, short"]
    words += ["--json", str(file), "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", ["optimizers", *words])
    optimizers.main()
    result = json.loads(file.read_text())
    # Two variants run all three rates with seed 0 and the best two with the other seeds; the short variant runs only
    # the best rate, with the other seeds.
    assert len(result["runs"]) == 2 * (3 + 2 * 2) + 2
    final_losses: dict[str, dict[str, float]] = {"0": {}, "1": {}, "2": {}}  # of adamw, by seed and learning rate
    for run in result["runs"]:
        if "kfac" not in run["options"]:
            final_losses[run["options"]["seed"]][run["options"]["learning_rate"]] = run["curve"][-1]["eval_loss"]
    means = {rate: (loss + final_losses["2"][rate]) / 2 for rate, loss in final_losses["1"].items()}
    assert sorted(means) == sorted(sorted(final_losses["0"], key=final_losses["0"].__getitem__)[:2])
    adamw, kfac, short = result["ways"].values()
    assert adamw["options"] == {"learning_rate": min(means, key=means.__getitem__)}
    assert kfac["options"] == short["options"]
    assert (adamw["num_updates"], kfac["num_updates"], short["num_updates"]) == (8, 8, 6)
    assert adamw["cpu_by_adamw"] == pytest.approx(1)
    assert adamw["final_loss"] == pytest.approx(sum(adamw["final_losses"]) / 2)
    assert "| kfac 1/10, short |" in capsys.readouterr().out
    assert picture.stat().st_size > 10_000
    monkeypatch.setattr(optimizers, "record", lambda _: pytest.fail("a run was repeated"))
    monkeypatch.setattr(sys, "argv", ["optimizers", *words])  # the trainer has replaced sys.argv
    optimizers.main()
    assert json.loads(file.read_text())["ways"] == result["ways"]


@pytest.mark.slow
def test_memory_when_computed_then_parameters_and_optimizer_state_have_known_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "memory.json"
    monkeypatch.setattr(sys, "argv", ["memory", "--size", "2x32", "--json", str(file)])
    memory.main()
    result = json.loads(file.read_text())["peak_bytes"]
    num_parameters = 97 * 32 + 32 * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32
    for row in result.values():
        for variant in ("plain", "ours"):
            assert row[variant]["parameter"] == pytest.approx(4 * num_parameters, rel=0.01)
            assert row[variant]["optstate"] == pytest.approx(8 * num_parameters, rel=0.01)
        assert row["ratio"] < 0.9
    assert result["bf16"]["plain"]["activation"] < result["fp32"]["plain"]["activation"]


@pytest.mark.slow
def test_kfac_cost_when_measured_then_reports_the_share_of_each_method(tmp_path: Path) -> None:
    file = tmp_path / "cost.json"
    words = ["--size", "2x32", "--rounds", "2", "--intervals", "1", "--threads", "1", "--json", str(file)]
    subprocess.run([sys.executable, "-m", "benchmarks.kfac_cost", *words], check=True, timeout=_TIMEOUT_SECONDS)
    result = json.loads(file.read_text())
    variants = result["ways"]
    assert list(variants) == ["without", "without, again", "eigen", "inverse", "eigen, spread"]
    assert variants["without"]["share"] == 0
    assert variants["without, again"]["share"] == pytest.approx(result["same_by_same"] - 1)
    assert variants["eigen"]["share"] > 0
    assert variants["without"]["computed"] is None
    assert variants["eigen"]["computed"].endswith("%")
