"""The console's lines, letter for letter: people grep them."""

from __future__ import annotations

from llm.training.run_dir.formatting import evaluation_line, training_line

RECORD = {
    "loss": 3.51249,
    "lr": 5.8e-4,
    "grad_norm": 0.9149,
    "tokens_per_second": 48_211.0,
    "data_wait": 0.004,
    "num_skipped": 0,
}


def test_training_line_when_plain_then_is_the_documented_one() -> None:
    line = training_line(120, 2000, RECORD, eta_seconds=751.9)
    assert line == "step 120/2000 | loss 3.512 | lr 5.8e-04 | grad_norm 0.91 | 48.2k tok/s | eta 0:12:31"


def test_training_line_when_mfu_and_skips_are_known_then_shows_them() -> None:
    line = training_line(1, 2, RECORD | {"mfu": 0.413, "num_skipped": 3}, eta_seconds=0)
    assert "| 48.2k tok/s | mfu 41.3% | skipped 3 | eta 0:00:00" in line


def test_training_line_when_it_waits_for_data_then_says_so() -> None:
    line = training_line(1, 2, RECORD | {"data_wait": 0.0312}, eta_seconds=0)
    assert "| 48.2k tok/s | data_wait 3.1% | eta 0:00:00" in line


def test_training_line_when_no_loss_was_finite_then_says_so() -> None:
    assert "| loss not finite |" in training_line(1, 2, RECORD | {"loss": None}, eta_seconds=0)


def test_evaluation_line_when_written_then_is_the_documented_one() -> None:
    record = {"eval_loss": 3.2041, "perplexity": 24.634, "bits_per_byte": 1.4018}
    assert evaluation_line(500, record) == "eval step 500 | loss 3.204 | ppl 24.63 | bits/byte 1.402"
    astray = {"eval_loss": 460.5, "perplexity": 9.9953e199, "bits_per_byte": 201.43}
    assert evaluation_line(500, astray) == "eval step 500 | loss 460.500 | ppl 1e+200 | bits/byte 201.430"
