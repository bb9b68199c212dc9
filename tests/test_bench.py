"""`python -m llm.bench`: the results are consistent, and those of the options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm.bench import main
from llm.training.profiling.measure import StepBenchmark

TINY = [
    *("--config_overrides", "n_layer=2,n_head=2,n_embd=32,vocab_size=97,n_positions=64", "--block_size", "32"),
    *("--per_device_train_batch_size", "4", "--learning_rate", "1e-3", "--seed", "1", "--use_cpu"),
    *("--mixed_precision", "no", "--num_updates", "5", "--torch_compile", "false"),
]


def test_bench_when_run_then_writes_results_that_are_consistent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures" / "bench.json"
    assert main([*TINY, "--gradient_accumulation_steps", "2", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    (update,) = figures["updates"]
    assert (update["micro_batch"], update["tokens"], len(update["seconds"])) == (4, 4 * 2 * 32, 5)
    assert update["tokens_per_second"] == pytest.approx(update["tokens"] / update["median_seconds"])
    assert update["flops"] == pytest.approx(figures["flops_per_token"] * update["tokens_per_second"])
    assert update["share_of_measured_flops"] == pytest.approx(update["flops"] / figures["measured_flops"])
    shares = update["shares"]
    assert list(shares) == ["forward", "backward", "optimizer", "data wait", "rest"]
    assert sum(shares.values()) == pytest.approx(1)
    assert all(share > 0 for name, share in shares.items() if name != "rest")
    assert update["peak_bytes"] > 1e8
    out = capfd.readouterr().out
    assert "update: " in out and "of 256 tokens" in out and "speed: " in out and "memory: " in out


@pytest.mark.exhaustive  # shares of time are wrong on a busy machine: not for every change
def test_bench_when_kfac_then_its_share_is_reported_and_complete_periods_are_timed(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    words = ["--kfac", "--kfac_factor_update_steps", "2", "--kfac_inv_update_steps", "4", "--json", str(file)]
    assert main([*TINY, *words]) == 0
    (update,) = json.loads(file.read_text())["updates"]
    assert (update["period"], len(update["seconds"])) == (4, 2)  # the 5 updates requested, in complete periods
    shares = update["shares"]
    assert list(shares) == ["forward", "backward", "optimizer", "kfac", "data wait", "rest"]
    assert all(share >= 0 for share in shares.values()) and shares["kfac"] > 0
    assert sum(shares.values()) == pytest.approx(1)


def test_bench_when_given_a_text_then_its_blocks_and_vocabulary_are_used(
    tiny_options: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*tiny_options, "--num_updates", "3", "--torch_compile", "false"]) == 0
    out = capfd.readouterr().out
    # 8 blocks of 32 tokens; the tables of 257 ids and 64 places, two blocks of width 32, the last norm.
    num_parameters = (257 + 64) * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32
    assert "of 256 tokens" in out and f"({num_parameters:,} parameters)" in out


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ([], 97),
        (["--tokenizer_name", "train:bpe", "--vocab_size", "300"], 300),
        (["--tokenizer_name", "train:bpe"], 8192),
        (["--tokenizer_name", "FOLDER"], 257),
    ],
)
def test_bench_when_no_text_is_named_then_the_vocabulary_is_that_of_the_run(
    words: list[str], size: int, tiny_gpt2_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    named = [str(tiny_gpt2_dir) if word == "FOLDER" else word for word in words]
    assert main([*TINY, "--num_updates", "2", *named]) == 0
    num_parameters = (size + 64) * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32
    out = capfd.readouterr().out
    assert f"of a vocabulary of {size:,}\n" in out and f"({num_parameters:,} parameters)" in out


def test_bench_when_sweeping_then_reports_the_fastest_size(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        StepBenchmark, "_fits", lambda _, micro_batch, previous: micro_batch <= 8
    )  # as if memory were small
    file = tmp_path / "sweep.json"
    assert main([*TINY, "--sweep", "micro_batch", "--num_updates", "2", "--json_file", str(file)]) == 0
    updates = json.loads(file.read_text())["updates"]
    assert [update["micro_batch"] for update in updates] in ([1, 2, 4], [1, 2, 4, 8])  # or ended by two slower ones
    fastest = max(updates, key=lambda update: update["tokens_per_second"])["micro_batch"]
    assert f"fastest: --per_device_train_batch_size {fastest}\n" in capfd.readouterr().out


def test_bench_when_profiling_then_writes_a_trace_and_prints_the_top_rows(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.json"
    assert main([*TINY, "--profile", str(trace)]) == 0
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::addmm" in names
    assert "Self CPU" in (out := capfd.readouterr().out) and "aten::" in out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--num_updates", "1"], 2, "--num_updates 1: must be"),
        (["--sweep", "macro_batch"], 2, "did you mean micro_batch?"),
        (["--block_size", "100000"], 1, "beyond the 64 tokens"),
        (["--tokenizer_name", "char"], 1, "the vocabulary is that of the text"),
        (["--json_file", "/proc/none/bench.json"], 1, "--json_file /proc/none/bench.json cannot be written"),
        (["--profile", "/proc/none/trace.json"], 1, "--profile /proc/none/trace.json cannot be written"),
        (["--json_file", "/"], 1, "--json_file / cannot be written: Is a directory"),
        (["--document_mask"], 1, "random ids have no documents"),
    ],
)
def test_bench_when_options_are_wrong_then_names_the_option_and_the_cause(
    words: list[str], code: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, *words]) == code
    assert message in capfd.readouterr().err


def test_bench_when_the_global_batch_is_given_then_sweeps_only_its_divisors(tmp_path: Path) -> None:
    file = tmp_path / "sweep.json"
    words = ["--sweep", "micro_batch", "--num_updates", "2", "--global_batch_size", "12", "--json_file", str(file)]
    assert main([*TINY, *words]) == 0
    updates = json.loads(file.read_text())["updates"]
    sizes = [update["micro_batch"] for update in updates]
    assert sizes == [1, 2, 3, 4, 6, 12][: len(sizes)] and len(sizes) > 2
    assert {update["tokens"] for update in updates} == {12 * 32}


def test_bench_when_the_options_give_the_length_of_the_run_then_the_plan_has_that_length(
    tiny_options: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    at = tiny_options.index("--max_train_steps")
    words = [*tiny_options[:at], *tiny_options[at + 2 :], "--num_updates", "2"]
    assert main([*words, "--num_train_epochs", "3"]) == 0
    out = capfd.readouterr().out
    assert "3.00 epochs" in out and "torch_compile" not in out  # compilation is worth its time in long runs only
