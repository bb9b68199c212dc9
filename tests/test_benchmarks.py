"""The benchmarks' own machinery: what they hold side by side is the same, and they say so when it is not."""

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
from benchmarks.arithmetic import too_far
from benchmarks.gate import Program, thread_environment
from benchmarks.nanogpt import require_nanogpt
from benchmarks.settings import Setting
from benchmarks.starting import require_run_clm, write_start
from benchmarks.throughput import SIZES, times, unequal
from benchmarks.time_to_loss import summary

# Several processes import everything, one after the other, beside other tests.
_PATIENCE_SECONDS = 450
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
def test_throughput_when_run_then_programs_are_equal_and_figures_fit_together(tmp_path: Path) -> None:
    file = tmp_path / "throughput.json"
    words = ["--size", "2x32", "--rounds", "2", "--updates", "3", "--threads", "1", "--device", "cpu", "--batch", "6"]
    words += ["--programs", "trainer,ours_whole,nanogpt,litgpt", "--json", str(file)]
    subprocess.run([sys.executable, "-m", "benchmarks.throughput", *words], check=True, timeout=_PATIENCE_SECONDS)
    found = json.loads(file.read_text())
    assert list(found["programs"]) == ["ours", "ours_again", "trainer", "ours_whole"]
    assert list(found["skipped"]) == ["nanogpt", "litgpt"]
    assert found["unequal"] == []
    ours, again, trainer, whole = found["programs"].values()
    # Where bf16 is native ours takes it, and the Trainer does not.
    rounding = 1e-5 if ours["arithmetic"] == "fp32" else 2e-3
    assert ours["first_loss"] == again["first_loss"] == pytest.approx(trainer["first_loss"], abs=rounding)
    assert ours["last_loss"] == pytest.approx(trainer["last_loss"], abs=max(1e-3, rounding))
    assert ours["last_loss"] < ours["first_loss"]
    assert whole["first_loss"] != ours["first_loss"] == pytest.approx(whole["first_loss"], abs=0.1)
    for each in (ours, again, trainer, whole):
        assert each["tokens_per_second"] == pytest.approx(6 * 32 / each["wall_seconds"])
        assert each["times_ours"] == times(each["rounds"], ours["rounds"], again["rounds"], "wall_seconds")
        assert 0 < each["share_of_gemm"] < 1 and each["peak_bytes"] > 1e8 and each["cpu_seconds"] > 0
        assert len(each["rounds"]) == 2
    assert found["same_by_same"] == pytest.approx(ours["wall_seconds"] / again["wall_seconds"])


@pytest.mark.slow
def test_unequal_when_a_program_starts_from_other_weights_then_names_it(tmp_path: Path) -> None:
    found = {}
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        setting = write_start(folder, SIZES["2x32"], 3, "cpu", None, seed=seed)
        setting.write(folder / "setting.json")
        words = ["benchmarks.programs", "run_clm", str(folder / "setting.json")]
        program = Program(words, thread_environment(1, "cpu"))
        last = program.ask(2)
        program.close()
        found[f"seed {seed}"] = {
            "arithmetic": program.first["arithmetic"],
            "first_loss": program.first["loss"],
            "last_loss": last["loss"],
            "says": {"threads": program.first["threads"]},
        }
    assert [words.split(" is ")[0] for words in unequal(found)] == ["first_loss of seed 1"]


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
    ("words", "said"),
    [
        (["throughput", "--rounds", "0"], "--rounds 0: at least 1"),
        (["throughput", "--batch", "0"], "--batch 0: at least 1"),
        (["arithmetic"], "no such file; give tinyshakespeare"),
    ],
)
def test_benchmarks_when_mistaken_then_say_what_to_mend(words: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{words[0]}", *words[1:]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr


def test_times_when_the_machine_drifts_then_rounds_are_compared_with_themselves() -> None:
    ours, again, other = ([{"s": pace * drift} for drift in (1, 2, 9)] for pace in (1.1, 0.9, 1.5))
    assert times(other, ours, again, "s") == pytest.approx(1.5)
    assert times(ours, ours, again, "s") == pytest.approx(1.1)


def test_unequal_when_losses_or_threads_differ_then_says_which() -> None:
    same = {"arithmetic": "fp32", "first_loss": 4.0, "last_loss": 3.0, "says": {"threads": 2}}
    assert unequal({"ours": same, "other": {**same, "first_loss": 4.00005, "last_loss": 3.01}}) == []
    assert unequal({"ours": same, "other": {**same, "first_loss": 4.001, "arithmetic": "bf16"}}) == []
    assert len(unequal({"ours": same, "other": {**same, "first_loss": 4.001}})) == 1
    assert unequal({"ours": same, "ours_whole": {**same, "first_loss": 4.03}}) == []
    assert len(unequal({"ours": same, "ours_whole": {**same, "last_loss": float("nan")}})) == 1
    assert len(unequal({"ours": same, "other": {**same, "last_loss": float("nan")}})) == 1
    assert unequal({"ours": same, "other": {**same, "says": {"threads": 1}}}) == [
        "threads differ: {'ours': 2, 'other': 1}"
    ]


def test_program_when_it_fails_then_its_last_words_are_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"(?s)benchmarks\.programs nothing ended with code 1.*KeyError: 'nothing'"):
        Program(["benchmarks.programs", "nothing", str(tmp_path / "none.json")], {})


@pytest.mark.slow
def test_arithmetic_when_runs_are_short_then_ways_differ_by_rounding_and_a_far_one_is_found(
    tiny_text: Path, tmp_path: Path
) -> None:
    file = tmp_path / "arithmetic.json"
    words = ["--text", str(tiny_text), "--num_updates", "6", "--threads", "1", "--json", str(file)]
    command = [sys.executable, "-m", "benchmarks.arithmetic", *words]
    subprocess.run([*command, "--ways", "chunked", "--seeds", "1"], check=True, timeout=_PATIENCE_SECONDS)
    chunked = json.loads(file.read_text())["eval_loss"]["chunked"]
    subprocess.run([*command, "--ways", "eager", "--seeds", "2"], check=True, timeout=_PATIENCE_SECONDS)
    found = json.loads(file.read_text())
    eager = found["eval_loss"]["eager"]
    assert found["eval_loss"]["chunked"] == chunked, "a run that was kept"
    assert found["spread"] == abs(eager["1"] - eager["2"]) > 1e-3, "the same seed twice"
    assert eager["1"] != chunked["1"], "the same way twice"
    assert found["difference"] == {"chunked": pytest.approx(chunked["1"] - eager["1"])}
    assert too_far(found, 0.0) == ["chunked"]
    assert too_far(found, 1e-5) == []


@pytest.mark.slow
def test_first_update_when_measured_then_the_run_does_more_than_its_imports(tiny_text: Path, tmp_path: Path) -> None:
    file = tmp_path / "first_update.json"
    words = ["--text", str(tiny_text), "--rounds", "1", "--threads", "1", "--json", str(file)]
    subprocess.run([sys.executable, "-m", "benchmarks.first_update", *words], check=True, timeout=_PATIENCE_SECONDS)
    found = json.loads(file.read_text())
    assert found["run_seconds"]["cpu"] > 1 and found["import_seconds"]["cpu"] > 1
    assert found["ratio"]["cpu"] == pytest.approx(found["run_seconds"]["cpu"] / found["import_seconds"]["cpu"])


def test_summary_when_curves_cross_the_loss_then_gives_seconds_and_quotients() -> None:
    def point(step: int, seconds: float, loss: float) -> dict[str, float]:
        return {"step": step, "wall_seconds": seconds, "cpu_seconds": 2 * seconds, "eval_loss": loss}

    nanogpt = [point(100, 10, 2.5), point(200, 20, 1.9)]
    ours = [point(100, 4, 1.88), point(200, 8, 1.7)]
    found = summary([{"nanogpt": nanogpt, "llm": ours}], 1.88)
    assert found["ratio"] == {"wall": 5.0, "cpu": 5.0} and found["ratio_to_loss"] is None
    assert found["nanogpt"]["seconds_to_loss"] is None and found["llm"]["step_at_loss"] == 100
    found = summary([{"nanogpt": nanogpt, "llm": ours}], 1.9)
    assert found["ratio_to_loss"] == {"wall": 5.0, "cpu": 5.0}
    assert summary([{"nanogpt": nanogpt, "llm": ours}], 1.0)["ratio"] is None


def test_require_when_another_folder_or_script_is_given_then_one_line_says_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no train\.py there"):
        require_nanogpt(tmp_path)
    for name in ("train.py", "model.py", "configurator.py"):
        (tmp_path / name).write_text("print('nothing')\n")
    with pytest.raises(SystemExit, match=r"another train\.py"):
        require_nanogpt(tmp_path)
    file = tmp_path / "run_clm_no_trainer.py"
    file.write_text(RUN_CLM)
    require_run_clm(file)
    file.write_text(RUN_CLM.replace("lr_scheduler.step()", ""))
    with pytest.raises(SystemExit, match=r"no `lr_scheduler\.step\(\)`"):
        require_run_clm(file)
    file.write_text(RUN_CLM + "accelerator.clip_grad_norm_(model.parameters(), 1.0)")
    with pytest.raises(SystemExit, match="it clips"):
        require_run_clm(file)


def test_arrival_when_between_two_evaluations_then_is_on_the_line_between_them() -> None:
    curve = [{"step": step, "cpu_seconds": step / 10, "eval_loss": loss} for step, loss in ((10, 3.0), (20, 2.0))]
    assert optimizers.arrival(curve, 2.25) == pytest.approx({"step": 17.5, "cpu_seconds": 1.75})
    assert optimizers.arrival(curve, 3.5) == {"step": 10, "cpu_seconds": 1.0}
    assert optimizers.arrival(curve, 1.9) is None


@pytest.mark.slow
def test_optimizers_when_run_then_tunes_compares_and_makes_no_run_twice(
    tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"block_size": "16", "tokenizer_name": "char", "model_type": "gpt2", "validation_split_percentage": "10",
               "config_overrides": "n_layer=1,n_head=2,n_embd=16,n_positions=16"}  # fmt: skip
    monkeypatch.setitem(optimizers.SETTINGS, "2x64", optimizers.Setting(options, 8, 2, rates=(1e-2, 3e-2, 5e-2)))
    file, picture = tmp_path / "found.json", tmp_path / "found.png"
    words = ["--text", str(tiny_text), "--seeds", "2", "--variants", "adamw;kfac 1/10;kfac 1/10, short"]
    words += ["--json", str(file), "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", ["optimizers", *words])
    optimizers.main()
    found = json.loads(file.read_text())
    # Of both all rates with the seed 0 and two with the others; of the short one the best with the others.
    assert len(found["runs"]) == 2 * (3 + 2 * 2) + 2
    ends: dict[str, dict[str, float]] = {"0": {}, "1": {}, "2": {}}
    for run in found["runs"]:
        if "kfac" not in run["options"]:
            ends[run["options"]["seed"]][run["options"]["learning_rate"]] = run["curve"][-1]["eval_loss"]
    means = {rate: (loss + ends["2"][rate]) / 2 for rate, loss in ends["1"].items()}
    assert sorted(means) == sorted(sorted(ends["0"], key=ends["0"].__getitem__)[:2])
    adamw, kfac, short = found["ways"].values()
    assert adamw["options"] == {"learning_rate": min(means, key=means.__getitem__)}
    assert kfac["options"] == short["options"]
    assert (adamw["num_updates"], kfac["num_updates"], short["num_updates"]) == (8, 8, 6)
    assert adamw["cpu_by_adamw"] == pytest.approx(1)
    assert adamw["final_loss"] == pytest.approx(sum(adamw["final_losses"]) / 2)
    assert "| kfac 1/10, short |" in capsys.readouterr().out
    assert picture.stat().st_size > 10_000
    monkeypatch.setattr(optimizers, "record", lambda _: pytest.fail("a run was made again"))
    monkeypatch.setattr(sys, "argv", ["optimizers", *words])  # the trainer left its own there
    optimizers.main()
    assert json.loads(file.read_text())["ways"] == found["ways"]


@pytest.mark.slow
def test_memory_when_computed_then_fits_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "memory.json"
    monkeypatch.setattr(sys, "argv", ["memory", "--size", "2x32", "--json", str(file)])
    memory.main()
    found = json.loads(file.read_text())["peak_bytes"]
    num_parameters = 97 * 32 + 32 * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32
    for row in found.values():
        for way in ("plain", "ours"):
            assert row[way]["parameter"] == pytest.approx(4 * num_parameters, rel=0.01)
            assert row[way]["optstate"] == pytest.approx(8 * num_parameters, rel=0.01)
        assert row["ratio"] < 0.9
    assert found["bf16"]["plain"]["activation"] < found["fp32"]["plain"]["activation"]


@pytest.mark.slow
def test_kfac_cost_when_measured_then_says_what_each_method_adds(tmp_path: Path) -> None:
    file = tmp_path / "cost.json"
    words = ["--size", "2x32", "--rounds", "2", "--intervals", "1", "--threads", "1", "--json", str(file)]
    subprocess.run([sys.executable, "-m", "benchmarks.kfac_cost", *words], check=True, timeout=_PATIENCE_SECONDS)
    found = json.loads(file.read_text())
    ways = found["ways"]
    assert list(ways) == ["without", "without, again", "eigen", "inverse", "eigen, spread"]
    assert ways["without"]["share"] == 0
    assert ways["without, again"]["share"] == pytest.approx(found["same_by_same"] - 1)
    assert ways["eigen"]["share"] > 0
    assert ways["without"]["computed"] is None
    assert ways["eigen"]["computed"].endswith("%")
