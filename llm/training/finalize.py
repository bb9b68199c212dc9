"""The end of a run: a verified folder that `from_pretrained` loads, its results and its model card."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import shlex
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from llm.config.errors import Stopped, UserError
from llm.config.options import Options
from llm.data.batches.loader import batch_of
from llm.evaluation.perplexity import Evaluation
from llm.files.atomic import write_text
from llm.hub.push import push_folder
from llm.optim.registry import unused_prefixes
from llm.report.card import RunFacts, model_card
from llm.report.curves import draw_curves
from llm.system.device_timer import DeviceTimer
from llm.training.callbacks.run_callbacks import RunCallbacks
from llm.training.context import RunContext
from llm.training.export import export_model, probe_loss
from llm.training.profiling.kfac_timing import cost_lines
from llm.training.run_dir.folder import RunDirectory
from llm.training.run_dir.layout import FINISHED_FILES, PRIVATE_FILES

log = logging.getLogger(__name__)


_LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "tokenizers")
_NUM_FINAL_SAMPLES = 3


def finish(context: RunContext, callbacks: RunCallbacks, *, command: str) -> None:
    """Evaluate, sample, save, export, verify, and write results and model card; then push, if that was requested.

    All ranks take part in what needs the weights; rank 0 writes. A stop cuts the evaluation and the samples short, not
    what follows them: that takes about as long as a checkpoint, and if it is killed nothing is lost. If it were left
    for the next start, that would have to do it anyway.

    Args:
        context: the parts of the run.
        callbacks: evaluate, sample and save.
        command: the command line of the run, without secrets.

    Raises:
        UserError: on every rank, when the export does not give back the model or the push failed (the finished folder
            is then complete).
        Stopped: on every rank, in the evaluation.
    """
    if callbacks.evaluation.newest is None:
        callbacks.evaluation.run()  # resumed at the very end
    if context.options.evaluation.sample_steps is not None:
        with suppress(Stopped):
            callbacks.sampling.run(num_samples=_NUM_FINAL_SAMPLES)
    preconditioner = context.updater.profiling_targets().preconditioner
    for line in [
        *context.updater.summary(finished=True),
        *cost_lines(preconditioner, DeviceTimer(context.world.device)),
        *context.dataset.closing_lines(context.blocks, context.plan.num_samples),
    ]:
        log.info("%s", line)
    run_dir = context.run_dir
    if run_dir is None:
        return
    with context.watchdog.phase("the last checkpoint"):
        callbacks.checkpointing.save_last("end")  # durable before the run is `done`
    with context.watchdog.phase("the finished model and its model card"):
        probe = batch_of([context.blocks.block(0, context.plan.seed)])
        with context.updater.evaluation_model() as model:
            loss = probe_loss(model, probe)
        weights = _weights_on_main(context)

        def export() -> None:
            run_dir.require_lock()
            export_model(
                run_dir.path,
                context.updater.model.model,
                context.dataset.tokenizer,
                weights=weights,
                unverified=run_dir.unverified,
                probe=probe,
                loss=loss,
                is_exact=context.world.device.type == "cpu" and context.compute.precision == "no",
                trust_remote_code=context.options.model.trust_remote_code,
            )
            _write_results(context, run_dir, callbacks.evaluation.newest, command)

        context.world.run_on_main(export)


def _weights_on_main(context: RunContext) -> dict[str, Tensor]:
    """Whole weights on the CPU of rank 0; on other ranks nothing, though they take part in the gathering."""
    weights = {}
    for name, tensor in context.updater.full_weights():
        if context.world.is_main:
            weights[name] = tensor.detach().to("cpu", copy=True)  # valid until the next one is asked for
    return weights


def _write_results(context: RunContext, run_dir: RunDirectory, newest: Evaluation | None, command: str) -> None:
    options = context.options
    results = _results(context, newest)
    write_text(run_dir.results, json.dumps(results, indent=1) + "\n")
    write_text(run_dir.model_card, model_card(_facts(context, results, command)))
    try:
        draw_curves({_name(options): run_dir.metrics}, run_dir.curves)
    except UserError as error:
        # A picture that cannot be drawn does not make a finished run a failed one.
        log.warning("no %s: %s", run_dir.curves.name, error)
    if options.hub.push_to_hub:
        push_folder(
            run_dir.path,
            options.hub.hub_model_id,
            options.hub.hub_token,
            uploaded=FINISHED_FILES,
            excluded=PRIVATE_FILES,
        )
    run_dir.write_status("done", step=context.state.step, exit_code=0)
    for line in _next_commands(run_dir):
        log.info("%s", line)


def _results(context: RunContext, newest: Evaluation | None) -> dict[str, Any]:
    """Return the content of all_results.json, under HuggingFace's names where it has them."""
    state = context.state
    dataset = context.dataset
    plan = context.plan
    results: dict[str, Any] = {
        "step": state.step,
        "train_loss": state.train_loss,
        "tokens": state.tokens,
        "tokens_per_second": state.tokens / max(state.train_seconds, 1e-9),
        "train_seconds": state.train_seconds,
        "num_skipped": state.num_skipped,
        "num_parameters": context.updater.model.model.num_parameters(),
        "seed": plan.seed,
        **dataset.identity(),
        "ledger": asdict(dataset.ledger(plan.block_size)),
        "num_unreached_tokens": dataset.num_unreached_tokens(context.blocks, plan.num_samples),
    }
    if newest is not None:
        results |= {
            "eval_loss": newest.loss,
            "perplexity": newest.perplexity,
            "bits_per_byte": newest.bits_per_byte,
            "num_eval_tokens": newest.num_tokens,
        }
    return results


def _facts(context: RunContext, results: dict[str, Any], command: str) -> RunFacts:
    """Return what the model card says."""
    options = context.options
    data = options.data
    model = context.updater.model.model
    tokenizer = context.dataset.tokenizer
    from_hub = data.dataset_name and not data.dataset_name.startswith("builtin:")
    return RunFacts(
        name=_name(options),
        command=command,
        architecture=type(model).__name__,
        model_type=model.config.model_type,
        num_parameters=results["num_parameters"],
        data_name=context.dataset.name,
        data_hash=results["data_hash"],
        num_steps=results["step"],
        num_tokens=results["tokens"],
        base_model=context.base_model,
        hub_dataset=data.dataset_name if from_hub and not Path(str(data.dataset_name)).exists() else None,
        tokenizer=options.tokenizer.tokenizer_name or tokenizer.name_or_path or None,
        vocab_size=len(tokenizer),
        block_size=context.plan.block_size,
        train_loss=results["train_loss"],
        eval_loss=results.get("eval_loss"),
        perplexity=results.get("perplexity"),
        bits_per_byte=results.get("bits_per_byte"),
        num_eval_tokens=results.get("num_eval_tokens"),
        train_seconds=results["train_seconds"],
        hardware=str(context.compute).removeprefix("device: "),
        hyperparameters=_hyperparameters(context),
        versions={
            "python": platform.python_version(),
            "llm-trainers": importlib.metadata.version("llm-trainers"),
            **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        },
    )


def _hyperparameters(context: RunContext) -> dict[str, object]:
    """Return what decides the result besides the data and the model."""
    plan = context.plan
    options = context.options
    optimizer = options.optimizer
    unused = tuple(unused_prefixes(optimizer.optim).values())
    kfac = options.kfac.model_dump() if options.kfac.kfac else {}
    return {
        "global_batch_size": plan.global_batch,
        "max_train_steps": plan.num_steps,
        "seed": plan.seed,
        "document_mask": plan.document_mask,
        "mixed_precision": context.compute.precision,
        **{name: value for name, value in optimizer.model_dump().items() if not name.startswith(unused)},
        **{name: value for name, value in kfac.items() if value is not None},
        **{name: value for name, value in options.schedule.model_dump().items() if value not in (None, {})},
    }


def _name(options: Options) -> str:
    return options.output.run_name or Path(str(options.output.output_dir)).resolve().name


def _next_commands(run_dir: RunDirectory) -> list[str]:
    """Return the lines that tell a user what can be done with the finished model."""
    path = shlex.quote(str(run_dir.path))
    return [
        f"done: {run_dir.path} loads with AutoModelForCausalLM.from_pretrained({str(run_dir.path)!r}); next:",
        f'  python -m llm.generate {path} --prompt "..."',
        f"  python -m llm.plot {path}",
        f"  python -m llm.trainers.gpt --model_name_or_path {path} --train_file YOUR.txt --output_dir runs/fine-tuned",
    ]
