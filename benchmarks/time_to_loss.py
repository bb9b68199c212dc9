"""Seconds of training to a validation loss: `python -m benchmarks.time_to_loss --nanogpt DIR --text FILE --json OUT`.

nanoGPT with the command of its README for a CPU (4 layers of 128, blocks of 64, batches of 12, 2,000 updates), and ours
with examples/shakespeare_char_cpu.toml, on the same characters: the first nine tenths of the text to train on, the rest
to validate. Both go on in turn, some updates each, so that what else the machine does meets both; both are evaluated on
the whole validation text.

wall_seconds, cpu_seconds   of the training alone: from before the first update, its data, its log lines and compiling
                            included; evaluations, samples and checkpoints not
curve                       step, seconds and validation loss at every evaluation
seconds_to_loss             of the first evaluation at or below --loss; null where there is none
ratio                       nanoGPT's seconds to its own end by ours to --loss; ratio_to_loss by nanoGPT's own to --loss
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gate import Gate, Program, thread_environment
from benchmarks.machine import describe_machine, num_cores
from benchmarks.nanogpt import prepare_characters, require_nanogpt, run_train_py

EXAMPLE = Path("examples/shakespeare_char_cpu.toml")
NUM_UPDATES = 2000
_BATCH = 64
# The README's command, but for the places of data and output; evaluations of its own would only cost it time.
_COMMAND = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64"
    " --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --lr_decay_iters={0} --max_iters={0} --dropout=0.0"
    " --eval_interval=1000000"
)


def main() -> None:
    """Measures, prints and writes the result; with `--way`, is one of the measured processes."""
    options = _parser().parse_args()
    if options.way is not None:
        _run(options, Gate())
        return
    options.nanogpt, options.text = options.nanogpt.resolve(), options.text.resolve()
    require_nanogpt(options.nanogpt)
    if not options.text.is_file():
        sys.exit(f"--text {options.text}: no such file")
    if (options.num_updates or NUM_UPDATES) % options.every:
        sys.exit(f"--every {options.every}: nanoGPT's {options.num_updates or NUM_UPDATES} updates do not divide by it")
    if options.rounds < 1:
        sys.exit(f"--rounds {options.rounds}: at least 1")
    rounds = [measure(options) for _ in range(options.rounds)]
    result = {"loss": options.loss, **summary(rounds, options.loss), "rounds": rounds}
    result["example"] = options.config.read_text()
    result["threads"] = options.threads
    result["machine"] = describe_machine("torch", "transformers", "accelerate", "numpy")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(_lines(result)))
    print(f"written to {options.json}")


def measure(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """One run of each, in turn from evaluation to evaluation: their curves."""
    curves: dict[str, list[dict[str, Any]]] = {"nanogpt": [], "llm": []}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        words = ["--folder", name, *_words(options)]
        environment = thread_environment(options.threads, "cpu")
        going = {}
        for way in curves:
            going[way] = Program(["benchmarks.time_to_loss", "--way", way, *words], environment)
            stack.callback(going[way].close)
        while going:
            for way, program in list(going.items()):
                found = program.ask(options.every)
                curve = curves[way]
                for key in ("wall_seconds", "cpu_seconds"):
                    found[key] += curve[-1][key] if curve else 0.0
                curve.append(found)
                print(f"{way}: step {found['step']} | eval_loss {found['eval_loss']:.4f}", end="", flush=True)
                print(f" | {found['wall_seconds']:.1f} s, CPU {found['cpu_seconds']:.1f} s", flush=True)
                if found["is_last"]:
                    going.pop(way).close()
    return curves


def summary(rounds: list[dict[str, list[dict[str, Any]]]], loss: float) -> dict[str, Any]:
    """Medians over the rounds, and the quotients of them."""
    found: dict[str, Any] = {}
    for way in rounds[0]:
        curves = [each[way] for each in rounds]
        reached = [next((point for point in curve if point["eval_loss"] <= loss), None) for curve in curves]
        found[way] = {
            "final_loss": statistics.median(curve[-1]["eval_loss"] for curve in curves),
            "num_updates": curves[0][-1]["step"],
            "seconds_to_end": _clocks([curve[-1] for curve in curves]),
            "seconds_to_loss": None if None in reached else _clocks([point for point in reached if point]),
            "step_at_loss": None if None in reached else statistics.median(point["step"] for point in reached if point),
        }
    ours, other = found["llm"]["seconds_to_loss"], found["nanogpt"]
    for name, seconds in (("ratio", other["seconds_to_end"]), ("ratio_to_loss", other["seconds_to_loss"])):
        found[name] = None if ours is None or seconds is None else {key: seconds[key] / ours[key] for key in ours}
    return found


def _clocks(points: list[dict[str, Any]]) -> dict[str, float]:
    return {key: statistics.median(point[f"{key}_seconds"] for point in points) for key in ("wall", "cpu")}


def _run(options: argparse.Namespace, gate: Gate) -> None:
    if options.way == "nanogpt":
        run_nanogpt(options, gate)
    else:
        run_ours(options, gate)


def run_nanogpt(options: argparse.Namespace, gate: Gate) -> None:
    """Its train.py; it stands still while its model is evaluated."""
    import torch

    data_dir = options.folder / "characters"
    data_dir.mkdir()
    prepare_characters(options.nanogpt, options.text, data_dir)
    made, num_updates = 0, options.num_updates or NUM_UPDATES

    def validate(variables: dict[str, Any]) -> float:
        model, block = variables["model"], variables["block_size"]
        ids = torch.from_numpy(np.fromfile(data_dir / "val.bin", np.uint16).astype(np.int64))
        end = (len(ids) - 1) // block * block
        inputs, targets = ids[:end].view(-1, block), ids[1 : end + 1].view(-1, block)
        model.eval()
        with torch.no_grad(), variables["ctx"]:
            pairs = zip(inputs.split(_BATCH), targets.split(_BATCH), strict=True)
            total = sum(float(model(ids, following)[1]) * following.numel() for ids, following in pairs)
        model.train()
        return float(total / end)

    def passed(variables: dict[str, Any]) -> None:
        nonlocal made
        made += 1
        is_last = made == num_updates
        gate.passed(variables["loss"], lambda: {"step": made, "is_last": is_last, "eval_loss": validate(variables)})

    def begin() -> None:
        """Before its first update it evaluates once, whatever it is told; behind that the clock begins."""
        gate.answer()

    words = [*_COMMAND.format(num_updates).split(), f"--dataset={data_dir}", f"--out_dir={options.folder}"]
    run_train_py(options.nanogpt, words, after_update=passed, after_evaluation=begin)


def run_ours(options: argparse.Namespace, gate: Gate) -> None:
    """The trainer; it stands still while it is evaluated, which it does at the same steps."""
    import llm.training.run
    from llm.trainers.gpt import main as trainer
    from llm.training.callbacks.evaluation import EvaluationCallback
    from llm.training.callbacks.sampling import SamplingCallback

    run: Any = llm.training.run
    evaluate, sample, run_updates = EvaluationCallback.run, SamplingCallback.run, run.run_updates

    def begin(*given: Any, **named: Any) -> bool:
        gate.answer()  # the clock begins behind it
        return bool(run_updates(*given, **named))

    def stand_still(self: EvaluationCallback, *given: Any, **named: Any) -> None:
        gate.stop_clock()
        evaluate(self, *given, **named)
        state = self._context.state
        is_last = state.step == self._context.plan.num_steps
        gate.answer(step=state.step, is_last=is_last, eval_loss=state.eval_loss)

    def say(self: SamplingCallback, *given: Any, **named: Any) -> None:
        gate.pause(lambda: sample(self, *given, **named))

    run.run_updates, EvaluationCallback.run, SamplingCallback.run = begin, stand_still, say  # type: ignore[method-assign]
    words = ["--config", str(options.config), "--train_file", str(options.text), "--use_cpu", "--save_minutes", "0"]
    words += ["--eval_steps", str(options.every), "--output_dir", str(options.folder / "run")]
    words += ["--max_train_steps", str(options.num_updates)] if options.num_updates else []
    sys.exit(trainer(words))


def _words(options: argparse.Namespace) -> list[str]:
    """What a measured process is told."""
    words = ["--nanogpt", str(options.nanogpt), "--text", str(options.text), "--every", str(options.every)]
    words += ["--num_updates", str(options.num_updates)] if options.num_updates else []
    return [*words, "--config", str(options.config)]


def _lines(result: dict[str, Any]) -> list[str]:
    lines = []
    for way in ("nanogpt", "llm"):
        found = result[way]
        end, reached = found["seconds_to_end"], found["seconds_to_loss"]
        lines.append(
            f"{way:8} {found['num_updates']} updates, {end['wall']:.1f} s (CPU {end['cpu']:.1f}), loss"
            f" {found['final_loss']:.4f}; {result['loss']} "
            + (f"after {reached['wall']:.1f} s (CPU {reached['cpu']:.1f})" if reached else "is not reached")
        )
    for name in ("ratio", "ratio_to_loss"):
        found = result[name]
        lines.append(f"{name} " + ("of nothing" if found is None else f"{found['wall']:.2f}, CPU {found['cpu']:.2f}"))
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.time_to_loss",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare")
    parser.add_argument("--config", type=Path, default=EXAMPLE, help=f"ours (default: {EXAMPLE})")
    parser.add_argument("--loss", type=float, default=1.88, help="nats a character of the validation text")
    parser.add_argument("--every", type=int, default=100, help="updates between evaluations")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=num_cores(), help="of both (default: all cores)")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/time_to_loss.json"), help="the result")
    parser.add_argument(
        "--num_updates", type=int, help=f"of both, to try it out (default: {NUM_UPDATES}, and the file's)"
    )
    parser.add_argument("--way", choices=("nanogpt", "llm"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
