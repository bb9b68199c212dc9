"""Seconds of training to a validation loss: `python -m benchmarks.time_to_loss --nanogpt DIR --text FILE --json OUT`.

nanoGPT runs the command of its README for a CPU (4 layers of 128, blocks of 64, batches of 12, 2,000 steps), and llm
runs examples/shakespeare_char_cpu.toml, on the same characters: the first nine tenths of the text for training, the
rest for validation. Both run in turn, some steps each, so that other work of the machine affects both. Both are
evaluated on the whole validation text.

wall_seconds, cpu_seconds   time of the training alone, from before the first step: includes data, log lines and
                            compiling, but no evaluations, samples or checkpoints
curve                       step, seconds and validation loss at every evaluation
seconds_to_loss             seconds until the first evaluation at or below --loss; null if there is none
ratio                       nanoGPT's seconds to its end, divided by our seconds to --loss
ratio_to_loss               nanoGPT's seconds to --loss, divided by our seconds to --loss
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
# The command of the README, except for the folders of data and output. Its own evaluations are turned off, because they
# would only cost time.
_COMMAND = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64"
    " --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --lr_decay_iters={0} --max_iters={0} --dropout=0.0"
    " --eval_interval=1000000"
)


def main() -> None:
    """Measure, print and write the result; with `--variant`, run one of the measured processes."""
    options = _parser().parse_args()
    if options.variant is not None:
        _run(options, Gate())
        return
    options.nanogpt = options.nanogpt.resolve()
    options.text = options.text.resolve()
    require_nanogpt(options.nanogpt)
    if not options.text.is_file():
        sys.exit(f"--text {options.text}: no such file")
    num_updates = options.num_updates or NUM_UPDATES
    if num_updates % options.every:
        sys.exit(f"--every {options.every}: must divide the {num_updates} steps of nanoGPT")
    if options.rounds < 1:
        sys.exit(f"--rounds {options.rounds}: must be at least 1")
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
    """Run each variant once, in turn from evaluation to evaluation; return their curves."""
    curves: dict[str, list[dict[str, Any]]] = {"nanogpt": [], "llm": []}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        args = ["--folder", name, *_process_args(options)]
        environment = thread_environment(options.threads, "cpu")
        running = {}
        for variant in curves:
            running[variant] = Program(["benchmarks.time_to_loss", "--variant", variant, *args], environment)
            stack.callback(running[variant].close)
        while running:
            for variant, program in list(running.items()):
                point = program.run_updates(options.every)
                curve = curves[variant]
                for key in ("wall_seconds", "cpu_seconds"):
                    point[key] += curve[-1][key] if curve else 0.0
                curve.append(point)
                print(f"{variant}: step {point['step']} | eval_loss {point['eval_loss']:.4f}", end="", flush=True)
                print(f" | {point['wall_seconds']:.1f} s, CPU {point['cpu_seconds']:.1f} s", flush=True)
                if point["is_last"]:
                    running.pop(variant).close()
    return curves


def summary(rounds: list[dict[str, list[dict[str, Any]]]], loss: float) -> dict[str, Any]:
    """Return medians over the rounds, and their ratios.

    Args:
        rounds: curve of each variant, for each round.
        loss: the validation loss to reach, in nats per character.
    """
    result: dict[str, Any] = {}
    for variant in rounds[0]:
        curves = [round_curves[variant] for round_curves in rounds]
        reached = [next((point for point in curve if point["eval_loss"] <= loss), None) for curve in curves]
        result[variant] = {
            "final_loss": statistics.median(curve[-1]["eval_loss"] for curve in curves),
            "num_updates": curves[0][-1]["step"],
            "seconds_to_end": _clocks([curve[-1] for curve in curves]),
            "seconds_to_loss": None if None in reached else _clocks([point for point in reached if point]),
            "step_at_loss": None if None in reached else statistics.median(point["step"] for point in reached if point),
        }
    ours = result["llm"]["seconds_to_loss"]
    nanogpt = result["nanogpt"]
    for name, seconds in (("ratio", nanogpt["seconds_to_end"]), ("ratio_to_loss", nanogpt["seconds_to_loss"])):
        result[name] = None if ours is None or seconds is None else {key: seconds[key] / ours[key] for key in ours}
    return result


def _clocks(points: list[dict[str, Any]]) -> dict[str, float]:
    """Medians of wall and CPU seconds."""
    return {key: statistics.median(point[f"{key}_seconds"] for point in points) for key in ("wall", "cpu")}


def _run(options: argparse.Namespace, gate: Gate) -> None:
    if options.variant == "nanogpt":
        run_nanogpt(options, gate)
    else:
        run_ours(options, gate)


def run_nanogpt(options: argparse.Namespace, gate: Gate) -> None:
    """Run nanoGPT's train.py, with the clock stopped while its model is evaluated."""
    import torch

    data_dir = options.folder / "characters"
    data_dir.mkdir()
    prepare_characters(options.nanogpt, options.text, data_dir)
    num_updates = options.num_updates or NUM_UPDATES
    step = 0

    def validate(variables: dict[str, Any]) -> float:
        model = variables["model"]
        block = variables["block_size"]
        ids = torch.from_numpy(np.fromfile(data_dir / "val.bin", np.uint16).astype(np.int64))
        end = (len(ids) - 1) // block * block
        inputs = ids[:end].view(-1, block)
        targets = ids[1 : end + 1].view(-1, block)
        model.eval()
        with torch.no_grad(), variables["ctx"]:
            pairs = zip(inputs.split(_BATCH), targets.split(_BATCH), strict=True)
            total = sum(float(model(ids, labels)[1]) * labels.numel() for ids, labels in pairs)
        model.train()
        return float(total / end)

    def after_update(variables: dict[str, Any]) -> None:
        nonlocal step
        step += 1
        values = {"step": step, "is_last": step == num_updates}
        gate.after_update(variables["loss"], lambda: {**values, "eval_loss": validate(variables)})

    def start() -> None:
        """Start the clock after the evaluation that nanoGPT always runs before its first step."""
        gate.report({})

    args = [*_COMMAND.format(num_updates).split(), f"--dataset={data_dir}", f"--out_dir={options.folder}"]
    run_train_py(options.nanogpt, args, after_update=after_update, after_evaluation=start)


def run_ours(options: argparse.Namespace, gate: Gate) -> None:
    """Run the trainer, with the clock stopped during evaluations, which are at the same steps as nanoGPT's."""
    import llm.training.run
    from llm.trainers.gpt import main as trainer
    from llm.training.callbacks.evaluation import EvaluationCallback
    from llm.training.callbacks.sampling import SamplingCallback

    run: Any = llm.training.run
    evaluate = EvaluationCallback.run
    sample = SamplingCallback.run
    run_updates = run.run_updates

    def start_clock_and_run(*args: Any, **kwargs: Any) -> bool:
        gate.report({})  # starts the clock
        return bool(run_updates(*args, **kwargs))

    def evaluate_off_the_clock(self: EvaluationCallback, *args: Any, **kwargs: Any) -> None:
        gate.stop_clock()
        evaluate(self, *args, **kwargs)
        state = self._context.state
        is_last = state.step == self._context.plan.num_steps
        gate.report({"step": state.step, "is_last": is_last, "eval_loss": state.eval_loss})

    def sample_off_the_clock(self: SamplingCallback, *args: Any, **kwargs: Any) -> None:
        gate.pause(lambda: sample(self, *args, **kwargs))

    run.run_updates = start_clock_and_run
    EvaluationCallback.run = evaluate_off_the_clock  # type: ignore[method-assign]
    SamplingCallback.run = sample_off_the_clock  # type: ignore[method-assign]
    args = ["--config", str(options.config), "--train_file", str(options.text), "--use_cpu", "--save_minutes", "0"]
    args += ["--eval_steps", str(options.every), "--output_dir", str(options.folder / "run")]
    if options.num_updates:
        args += ["--max_train_steps", str(options.num_updates)]
    sys.exit(trainer(args))


def _process_args(options: argparse.Namespace) -> list[str]:
    """Arguments of a measured process."""
    args = ["--nanogpt", str(options.nanogpt), "--text", str(options.text), "--every", str(options.every)]
    if options.num_updates:
        args += ["--num_updates", str(options.num_updates)]
    return [*args, "--config", str(options.config)]


def _lines(result: dict[str, Any]) -> list[str]:
    lines = []
    for variant in ("nanogpt", "llm"):
        medians = result[variant]
        end = medians["seconds_to_end"]
        reached = medians["seconds_to_loss"]
        when = f"reached after {reached['wall']:.1f} s (CPU {reached['cpu']:.1f})" if reached else "not reached"
        lines.append(
            f"{variant:8} {medians['num_updates']} steps, {end['wall']:.1f} s (CPU {end['cpu']:.1f}), "
            f"loss {medians['final_loss']:.4f}; loss {result['loss']} {when}"
        )
    for name in ("ratio", "ratio_to_loss"):
        ratio = result[name]
        text = "none: the loss was not reached" if ratio is None else f"{ratio['wall']:.2f}, CPU {ratio['cpu']:.2f}"
        lines.append(f"{name} {text}")
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.time_to_loss",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--text", type=Path, required=True, help="text to train on: tinyshakespeare")
    parser.add_argument("--config", type=Path, default=EXAMPLE, help=f"options of llm (default: {EXAMPLE})")
    parser.add_argument(
        "--loss", type=float, default=1.88, help="loss to reach, in nats per character of the validation text"
    )
    parser.add_argument("--every", type=int, default=100, help="steps between evaluations")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=num_cores(), help="threads of each process (default: all cores)")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/time_to_loss.json"), help="file of the result"
    )
    parser.add_argument(
        "--num_updates", type=int, help=f"steps of both, for a trial (default: {NUM_UPDATES}, and that of --config)"
    )
    parser.add_argument("--variant", choices=("nanogpt", "llm"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
