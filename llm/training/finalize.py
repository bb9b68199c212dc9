"""The end of a run: a folder that `from_pretrained` loads, proved by loading it, and its papers."""

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

from llm.config.errors import Stopped, UserError
from llm.config.options import Options
from llm.data.batches.loader import batch_of
from llm.files.atomic import write_text
from llm.hub.push import push_folder
from llm.optim.registry import unused_prefixes
from llm.report.card import RunFacts, model_card
from llm.report.curves import draw_curves
from llm.training.callbacks.actions import Actions, Gathered
from llm.training.export import export_model
from llm.training.run_dir.folder import RunDirectory

log = logging.getLogger(__name__)


_LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "tokenizers")
_NUM_FINAL_SAMPLES = 3


def finish(actions: Actions, *, command: str) -> None:
    """Samples, exports, verifies, and writes the papers; then pushes, if so asked.

    Rank 0 does it; the others wait for the end. A stop cuts the evaluation and the samples short, not what
    follows them: that takes about as long as a checkpoint, nothing is lost if it is killed, and left for the
    next start it would have to be done anyway.

    Raises:
        UserError: on every rank, when the export does not give back the model or the push failed (the
            finished folder is then whole).
        Stopped: on every rank, in the evaluation.
    """
    if actions.newest is None:
        actions.evaluate()  # resumed at the very end
    if actions.options.evaluation.sample_steps is not None:
        with suppress(Stopped):
            actions.sample(num_samples=_NUM_FINAL_SAMPLES)
    for line in [
        *actions.updater.preconditioning.closing_lines(),
        *actions.text.closing_lines(actions.blocks, actions.plan.num_samples),
    ]:
        log.info("%s", line)
    gathered = actions.gather_last()
    with actions.watchdog.phase("the finished model and its papers"):
        actions.world.run_on_main(lambda: _finish(actions, gathered, command) if actions.folder else None)


def _finish(actions: Actions, gathered: Gathered | None, command: str) -> None:
    folder, options = actions.folder, actions.options
    assert folder is not None
    actions.save_now(gathered, "end")  # the checkpoint of the last update must be durable before the run is `done`
    folder.require_ours()
    probe = batch_of([actions.blocks.block(0, actions.plan.seed)])
    export_model(
        folder.path,
        actions.model,
        actions.text.tokenizer,
        probe,
        trust_remote_code=options.model.trust_remote_code,
    )
    results = _results(actions)
    write_text(folder.results, json.dumps(results, indent=1) + "\n")
    write_text(folder.path / "README.md", model_card(_facts(actions, results, command)))
    try:
        draw_curves({_name(options): folder.metrics}, folder.curves)
    except UserError as error:
        # A picture that cannot be drawn does not make a finished run a failed one.
        log.warning("no %s: %s", folder.curves.name, error)
    if options.hub.push_to_hub:
        push_folder(folder.path, options.hub.hub_model_id, options.hub.hub_token)
    folder.write_status("done", step=actions.progress.step, exit_code=0)
    for line in _what_next(folder):
        log.info("%s", line)


def _results(actions: Actions) -> dict[str, Any]:
    """The run's numbers, under HuggingFace's names where it has them."""
    progress, newest = actions.progress, actions.newest
    results: dict[str, Any] = {
        "step": progress.step,
        "train_loss": progress.train_loss,
        "tokens": progress.tokens,
        "tokens_per_second": progress.tokens / max(progress.train_seconds, 1e-9),
        "train_seconds": progress.train_seconds,
        "num_skipped": progress.num_skipped,
        "num_parameters": actions.model.num_parameters(),
        "seed": actions.plan.seed,
        **actions.text.identity(),
        "ledger": asdict(actions.text.ledger(actions.plan.block_size)),
        "num_unreached_tokens": actions.text.num_unreached_tokens(actions.blocks, actions.plan.num_samples),
    }
    if newest is not None:
        results |= {
            "eval_loss": newest.loss,
            "perplexity": newest.perplexity,
            "bits_per_byte": newest.bits_per_byte,
            "num_eval_tokens": newest.num_tokens,
        }
    return results


def _facts(actions: Actions, results: dict[str, Any], command: str) -> RunFacts:
    options, data = actions.options, actions.options.data
    from_hub = data.dataset_name and not data.dataset_name.startswith("builtin:")
    model = options.model
    return RunFacts(
        name=_name(options),
        command=command,
        architecture=type(actions.model).__name__,
        model_type=actions.model.config.model_type,
        num_parameters=results["num_parameters"],
        data_name=actions.text.name,
        data_hash=results["data_hash"],
        num_steps=results["step"],
        num_tokens=results["tokens"],
        base_model=model.model_name_or_path,
        hub_dataset=data.dataset_name if from_hub and not Path(str(data.dataset_name)).exists() else None,
        tokenizer=options.tokenizer.tokenizer_name or actions.text.tokenizer.name_or_path or None,
        vocab_size=len(actions.text.tokenizer),
        block_size=actions.plan.block_size,
        train_loss=results["train_loss"],
        eval_loss=results.get("eval_loss"),
        perplexity=results.get("perplexity"),
        bits_per_byte=results.get("bits_per_byte"),
        num_eval_tokens=results.get("num_eval_tokens"),
        train_seconds=results["train_seconds"],
        hardware=str(actions.machine).removeprefix("device: "),
        hyperparameters=_hyperparameters(actions),
        versions={
            "python": platform.python_version(),
            "llm-trainers": importlib.metadata.version("llm-trainers"),
            **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        },
    )


def _hyperparameters(actions: Actions) -> dict[str, object]:
    """What decides the result beside the data and the model."""
    plan, options = actions.plan, actions.options
    optimizer, schedule = options.optimizer, options.schedule
    unused = tuple(unused_prefixes(optimizer.optim).values())
    return {
        "global_batch_size": plan.global_batch,
        "max_train_steps": plan.num_steps,
        "seed": plan.seed,
        "document_mask": plan.document_mask,
        "mixed_precision": actions.machine.precision,
        **{name: value for name, value in optimizer.model_dump().items() if not name.startswith(unused)},
        **{name: value for name, value in options.kfac.model_dump().items() if options.kfac.kfac and value is not None},
        **{name: value for name, value in schedule.model_dump().items() if value not in (None, {})},
    }


def _name(options: Options) -> str:
    return options.output.run_name or Path(str(options.output.output_dir)).resolve().name


def _what_next(folder: RunDirectory) -> list[str]:
    place = shlex.quote(str(folder.path))
    return [
        f"done: {folder.path} loads with AutoModelForCausalLM.from_pretrained({str(folder.path)!r}); next:",
        f'  python -m llm.generate {place} --prompt "..."',
        f"  python -m llm.plot {place}",
        f"  python -m llm.trainers.gpt --model_name_or_path {place} --train_file YOUR.txt --output_dir runs/fine-tuned",
    ]
