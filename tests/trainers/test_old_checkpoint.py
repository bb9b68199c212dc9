r"""Test that a checkpoint written by the first version can be resumed by this one.

`tests/fixtures/checkpoint_v1` holds a text, a run on it as a kill after step 6 leaves it (without the files that a
resume does not read), and the losses that this version (commit 21fba9d) reached afterwards. That commit wrote it with
these commands, in an empty folder, with one thread (OMP_NUM_THREADS=1):

    python - <<'END'
    import random
    draw = random.Random(0)
    words = "the a king queen sword runs speaks to of and love night day with from into crown blood".split()
    lines = [" ".join(draw.choices(words, k=draw.randint(3, 9))) + ".\n" for _ in range(250)]
    open("text.txt", "w").write("".join(lines))
    END
    python -m llm.trainers.gpt --train_file text.txt --tokenizer_name char --model_type gpt2 \
        --config_overrides n_positions=32,n_embd=16,n_layer=2,n_head=2 --dropout 0 --block_size 16 \
        --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --max_train_steps 12 \
        --learning_rate 3e-3 --adam_epsilon 1e-6 --weight_decay 0.1 --lr_scheduler_type cosine \
        --num_warmup_steps 3 --seed 7 --use_cpu --mixed_precision no --logging_steps 1 --eval_steps 6 \
        --checkpointing_steps 6 --save_minutes 0 --output_dir run
    # Keep config.toml, checkpoints/step_6 and the lines of metrics.jsonl up to step 6 of run/, and remove the rest.
    python -m llm.trainers.gpt --config run/config.toml --resume_from_checkpoint latest
    # figures.json holds what this wrote to metrics.jsonl: the losses after step 6, and the last evaluation.

All paths in it are relative, so that it can be resumed in any folder. It has no dropout, because the random numbers
differ where torch has no MKL. Its epsilon is large enough that AdamW does not magnify rounding errors: kernels for
AVX-512, AVX2 and SSE4, and two threads, agree to 2e-7, a fifth of the tolerance of this test.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Outcome

FIXTURE = Path(__file__).parents[1] / "fixtures" / "checkpoint_v1"
LAST_STEP = 6


def test_checkpoint_of_the_first_version_when_resumed_then_losses_are_those_recorded(
    train: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(FIXTURE, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    outcome = train("--config", "run/config.toml", "--resume_from_checkpoint", "latest")
    assert outcome.code == 0, outcome.err
    assert f"resumed from step {LAST_STEP}" in outcome.out
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    losses = {str(record["step"]): record["loss"] for record in records if "loss" in record}
    assert list(losses) == [str(step) for step in range(1, 13)]
    figures = json.loads(Path("figures.json").read_text())
    resumed = {step: loss for step, loss in losses.items() if int(step) > LAST_STEP}
    assert resumed == pytest.approx(figures["losses"], rel=1e-6, abs=0)
    evaluation = records[-1]
    assert evaluation["step"] == 12
    for name in ("eval_loss", "bits_per_byte"):
        assert evaluation[name] == pytest.approx(figures[name], rel=1e-6, abs=0)
