"""The story of a run: text and options in, a folder that `from_pretrained` loads out."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

from transformers import PretrainedConfig

from llm.config.errors import Stopped
from llm.config.options import Options
from llm.data.batches.loader import Batch, BlockSource, training_batches
from llm.data.dataset import detect_hub
from llm.data.streaming.dataset import open_dataset
from llm.distributed.world import World
from llm.hub.connection import come_online
from llm.hub.push import check_hub_access
from llm.models.config import context_limit, load_config, read_config
from llm.training.accelerator import Compute, restore_process, start_compute
from llm.training.build import build_language_model, build_updater
from llm.training.callbacks.actions import Actions
from llm.training.checkpoints.async_saver import AsyncSaver
from llm.training.checkpoints.resume import Start, as_restarted, choose_start
from llm.training.checkpoints.store import set_aside
from llm.training.disk import require_room
from llm.training.estimates import dry_run_lines
from llm.training.finalize import finish
from llm.training.loop import Event, run_updates
from llm.training.plan import Plan, check_training, choose_block_size, plan_run, plan_schedule, resolved
from llm.training.run_dir.console import ProgressBar, setup_logging, teardown_logging
from llm.training.run_dir.folder import RunDirectory, claimed
from llm.training.run_dir.trackers import Tracking, choose_trackers
from llm.training.seeding import seed_weights
from llm.training.supervision.deadline import find_deadline
from llm.training.supervision.stop_signals import StopRequest, listening
from llm.training.supervision.watchdog import Watchdog, watching
from llm.training.triggers import Trigger, all_of, any_of, at_end, before, every, every_epoch
from llm.training.updaters.preconditioning import kfac_bytes

log = logging.getLogger(__name__)

EXIT_DONE, EXIT_STOPPED = 0, Stopped.exit_code


def train(options: Options, *, command: str, started: float | None = None) -> int:
    """Trains a model as the options say.

    Args:
        options: checked options.
        command: the command line that made them, without secrets; goes into the model card.
        started: when the process began, in seconds since the epoch: `--max_time` counts from there; now when None.

    Returns:
        0 when all updates were made, 75 when a signal or a deadline stopped the run after saving it.

    Raises:
        UserError: something outside the program is wrong; one line says what.
    """
    started = time.time() if started is None else started
    machine = start_compute(options.training)
    world = machine.world
    setup_logging(is_main=world.is_main, rank=world.rank)
    folder = RunDirectory(Path(options.output.output_dir)) if options.output.output_dir else None
    try:
        with ExitStack() as stack:
            deadline = find_deadline(options.training, world, started=started)
            last_words = folder.write_sudden_end if folder is not None and world.is_main else None
            stop = stack.enter_context(listening(deadline, last_words))
            watchdog = stack.enter_context(watching(world, folder))
            if folder is not None and not options.output.dry_run:
                options = as_restarted(options, folder)
                stack.enter_context(claimed(folder, options, world, stop.at_once))
            code = _run(options, command, machine, folder, stack, stop, watchdog)
        machine.release()
        return code
    except Stopped as stopped:
        # Before the first update, on all ranks; afterwards the run itself sees to it.
        log.info("stopped by %s before an update was made", stopped)
        machine.release()
        return EXIT_STOPPED
    finally:
        # The process as it was found: a notebook, or the next run in it, may need the Hub, and a failed run's memory.
        restore_process()
        come_online()
        teardown_logging()


def _run(
    options: Options,
    command: str,
    machine: Compute,
    folder: RunDirectory | None,
    stack: ExitStack,
    stop: StopRequest,
    watchdog: Watchdog,
) -> int:
    """The story itself, in its order."""
    world = machine.world
    log.info("%s", folder or "output: none, nothing is kept (give --output_dir to keep it)")
    log.info("%s", machine)
    for line in stop.deadline.lines():
        log.info("%s", line)
    trackers = choose_trackers(options.tracking)
    detect_hub(options, world)
    _check_push(options, folder, world)
    start = world.run_on_main(stop.interrupting(lambda: choose_start(options, folder)))
    options = start.with_its_batch(options)
    machine.use_checkpoint_precision(start.precision)
    # Before the text is read: names, overrides and a block beyond the model are known from one small file.
    limit = context_limit(read_config(start.model))
    choose_block_size(options.data.block_size, limit, limit)
    check_training(options, num_ranks=world.size)
    kfac_bytes(read_config(start.model), options.kfac)  # refuses a model with nothing for it
    with watchdog.phase("the text"):
        text = stack.enter_context(
            open_dataset(options, world, start.dataset_revision(options.data.dataset_name), stop)
        )
    config = load_config(start.model, text.tokenizer)
    block_size = choose_block_size(options.data.block_size, limit, context_limit(config, text.tokenizer))
    masked = options.data.document_mask
    blocks, validation = text.blocks(block_size, document_mask=masked)
    text.require_same_on_all(world)
    plan = plan_run(options.training, blocks, num_ranks=world.size, seed=start.seed, document_mask=masked)
    start.check(plan, text)
    schedule = plan_schedule(options, plan)
    _say(*text.opening_lines(blocks, num_samples=plan.num_samples, document_mask=masked), str(plan))
    if options.output.dry_run:
        _say(*dry_run_lines(config, plan, options.optimizer, schedule, options.output, options.kfac))
        return EXIT_DONE

    if folder is not None:
        world.run_on_main(lambda: _require_room(folder, config, options, start))
    seed_weights(start.seed)
    with watchdog.phase("the model"), stop.at_once():
        language_model = build_language_model(options, start.model, config, text.tokenizer, machine, plan)
    updater = build_updater(options, machine, language_model, schedule, plan)
    progress = start.resume(updater)
    if folder is not None and world.is_main:
        folder.require_ours()
        if start.checkpoint is not None:
            set_aside(folder.checkpoints, progress.step)
        folder.begin(resolved(options, plan, precision=machine.precision), fresh=start.checkpoint is None)
    tracking = Tracking(machine.accelerator, folder)
    saver = _saver(options, plan, folder) if world.is_main else None
    actions = Actions(
        *(options, machine, folder, text, blocks, validation, plan, progress, updater, language_model),
        *(tracking, saver, stop, watchdog),
    )
    tracking.start(trackers, options, first_step=progress.step)
    with closing(actions), ProgressBar(progress.step, plan.num_steps, is_main=world.is_main) as bar:
        try:
            if _make_updates(options, actions, bar):
                finish(actions, command=command)
                return EXIT_DONE
        except Stopped:
            pass  # an evaluation heard of it, on all ranks
        actions.stop_here()
    return EXIT_STOPPED


def _make_updates(options: Options, actions: Actions, bar: ProgressBar) -> bool:
    """The updates that are left; whether all were made."""
    plan, progress = actions.plan, actions.progress
    _make_up_for_what_was_cut(options, actions)
    batches = actions.text.wait_for_batches(
        _batches(options, plan, actions.world, actions.blocks, progress.step),
        actions.blocks,
        first_step=progress.step,
        num_steps=plan.num_steps,
        global_batch=plan.global_batch,
        should_stop=actions.stop,
    )
    with actions.watchdog.phase("what follows an update"):
        return run_updates(
            actions.updater,
            batches,
            progress,
            [*_events(options, plan, actions), Event(every(1), bar.advance)],
            num_steps=plan.num_steps,
            tokens_per_step=plan.tokens_per_step,
            should_stop=actions.stop,
            should_save=actions.wants_checkpoint,
            watched=actions.watchdog.update,
        )


def _require_room(folder: RunDirectory, config: PretrainedConfig, options: Options, start: Start) -> None:
    kept = options.optimizer.optim, options.kfac
    require_room(folder.checkpoints, config, *kept, is_fresh=start.checkpoint is None)


def _say(*lines: str) -> None:
    for line in lines:
        log.info("%s", line)


def _batches(options: Options, plan: Plan, world: World, blocks: BlockSource, first_step: int) -> Iterator[list[Batch]]:
    """This rank's micro-batches, one list an update."""
    return training_batches(
        blocks,
        seed=plan.seed,
        first_step=first_step,
        num_steps=plan.num_steps - first_step,
        micro_batch=plan.micro_batch,
        accumulation=plan.accumulation,
        rank=world.rank,
        num_ranks=world.size,
        num_workers=options.data.dataloader_num_workers,
        device=world.device,
    )


def _check_push(options: Options, folder: RunDirectory | None, world: World) -> None:
    if options.hub.push_to_hub and folder is not None and not options.output.dry_run:
        world.run_on_main(lambda: check_hub_access(options.hub.hub_model_id, folder.path, options.hub.hub_token))


def _evaluating(options: Options, plan: Plan) -> Trigger:
    each = options.evaluation.eval_steps
    return any_of(every(each) if each else every_epoch(plan.num_blocks, plan.global_batch), at_end(plan.num_steps))


def _sampling(options: Options, plan: Plan) -> Trigger:
    return all_of(every(options.evaluation.sample_steps), before(plan.num_steps))


def _make_up_for_what_was_cut(options: Options, actions: Actions) -> None:
    """A stop in an evaluation, or in samples, saved the update before it; the run that goes on from there owes them."""
    progress, plan = actions.progress, actions.plan
    if progress.step == 0:
        return
    is_owed = actions.validation is not None and progress.eval_step != progress.step
    if is_owed and _evaluating(options, plan)(progress.step):
        actions.evaluate()
        actions.save_what_is_due()
    if _sampling(options, plan)(progress.step):
        actions.sample()  # unless they are recorded


def _events(options: Options, plan: Plan, actions: Actions) -> list[Event]:
    """What happens after an update, in this order."""
    last = at_end(plan.num_steps)
    return [
        Event(every(1), actions.check_health),
        Event(any_of(every(options.output.logging_steps), last), actions.record),
        Event(_evaluating(options, plan), actions.evaluate),
        Event(every(1), actions.save_what_is_due),
        Event(_sampling(options, plan), actions.sample),
    ]


def _saver(options: Options, plan: Plan, folder: RunDirectory | None) -> AsyncSaver | None:
    if folder is None:
        return None
    each = options.output.checkpointing_steps
    regular = every_epoch(plan.num_blocks, plan.global_batch) if each == "epoch" else every(each)
    return AsyncSaver(options.output, folder.path, folder.checkpoints, regular=regular, last=at_end(plan.num_steps))
