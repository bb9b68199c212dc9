"""The story of a run: text and options in, a folder that `from_pretrained` loads out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

from transformers import PretrainedConfig

from llm.config.options import ModelOptions, Options
from llm.data.loaders import Batch, Samples, training_batches
from llm.engine.actions import Actions
from llm.engine.central import CentralUpdater
from llm.engine.checkpoints import set_aside
from llm.engine.dry_run import dry_run_lines
from llm.engine.due import all_of, any_of, at_end, before, every, every_epoch
from llm.engine.finish import finish
from llm.engine.folder import RunFolder, claimed
from llm.engine.hub import check_hub_access
from llm.engine.journal import Bar, start_journal, stop_journal
from llm.engine.lines import mixture_lines
from llm.engine.loop import Event, run_updates
from llm.engine.machine import Machine, start_machine
from llm.engine.plan import Plan, check_training, choose_block_size, learning_rates, plan_run, resolved
from llm.engine.randomness import seed_weights
from llm.engine.resume import choose_start
from llm.engine.signals import listening
from llm.engine.stream import opened_text
from llm.engine.text import Text, meet_the_hub
from llm.engine.tracking import Tracking, choose_trackers
from llm.models.build import build_model, context_limit, load_config, read_config
from llm.models.document_mask import require_document_mask
from llm.models.language_model import LanguageModel
from llm.optim.build import build_optimizer
from llm.world.network import come_online
from llm.world.ranks import World

log = logging.getLogger(__name__)

EXIT_DONE, EXIT_STOPPED = 0, 75


def train(options: Options, *, command: str) -> int:
    """Trains a model as the options say.

    Args:
        options: checked options.
        command: the command line that made them, without secrets; goes into the model card.

    Returns:
        0 when all updates were made, 75 when a signal stopped the run after saving it.

    Raises:
        UserError: something outside the program is wrong; one line says what.
    """
    machine = start_machine(options.training)
    start_journal(is_main=machine.world.is_main, rank=machine.world.rank)
    folder = RunFolder(Path(options.output.output_dir)) if options.output.output_dir else None
    try:
        with ExitStack() as stack:
            if folder is not None and not options.output.dry_run:
                stack.enter_context(claimed(folder, options, machine.world))
            code = _run(options, command, machine, folder, stack)
        machine.release()
        return code
    finally:
        # The process as it was found: a notebook, or the next run in it, may need the Hub.
        come_online()
        stop_journal()


def _run(options: Options, command: str, machine: Machine, folder: RunFolder | None, stack: ExitStack) -> int:
    """The story itself, in its order."""
    world = machine.world
    log.info("%s", folder or "output: none, nothing is kept (give --output_dir to keep it)")
    log.info("%s", machine)
    trackers = choose_trackers(options.tracking)
    meet_the_hub(options, world)
    _check_push(options, folder, world)
    start = world.on_main(lambda: choose_start(options, folder))
    # Before the text is read: names, overrides and a block beyond the model are known from one small file.
    limit = context_limit(read_config(start.model))
    choose_block_size(options.data.block_size, limit, limit)
    check_training(options, num_ranks=world.size)
    text = stack.enter_context(opened_text(options, world, start.checkpoint))
    config = load_config(start.model, text.tokenizer)
    block_size = choose_block_size(options.data.block_size, limit, context_limit(config, text.tokenizer))
    masked = options.data.document_mask
    blocks, validation = text.cut(block_size, document_mask=masked)
    text.require_same_on_all(world)
    plan = plan_run(options.training, blocks, num_ranks=world.size, seed=start.seed, document_mask=masked)
    start.check(plan, text)
    learning_rate = learning_rates(options, plan)
    _say(text.ledger_line(block_size, document_mask=masked))
    _say(*mixture_lines(text.streams, blocks, plan.num_steps * plan.global_batch), str(plan))
    if options.output.dry_run:
        _say(*dry_run_lines(config, plan, learning_rate, options.output))
        return EXIT_DONE

    seed_weights(start.seed)
    language_model = _build_language_model(options, start.model, config, text, world)
    wrapped = machine.accelerator.prepare_model(language_model)  # on the device before the optimizer sees it
    updater = CentralUpdater(
        machine=machine,
        model=wrapped,
        optimizer=build_optimizer(language_model.model, options.optimizer),
        learning_rate=learning_rate,
        max_grad_norm=options.optimizer.max_grad_norm,
        seed=start.seed,
    )
    progress = start.resume(updater)
    if folder is not None and world.is_main:
        set_aside(folder.checkpoints, progress.step)
        folder.begin(resolved(options, plan), fresh=start.checkpoint is None)
    tracking = Tracking(machine.accelerator, folder)
    actions = Actions(
        options, machine, folder, text, blocks, validation, plan, progress, updater, language_model, tracking
    )
    tracking.start(trackers, options, first_step=progress.step)
    # Before this nothing can be lost, so that a signal simply ends the process.
    with closing(tracking), listening() as stop, Bar(progress.step, plan.num_steps, is_main=world.is_main) as bar:
        done = run_updates(
            updater,
            text.as_they_arrive(
                _batches(options, plan, world, blocks, progress.step),
                blocks,
                plan,
                first_step=progress.step,
                should_stop=stop,
            ),
            progress,
            [*_events(options, plan, actions), Event(every(1), bar.advance)],
            num_steps=plan.num_steps,
            tokens_per_step=plan.tokens_per_step,
            should_stop=stop,
        )
        if not done:
            # Still listening: a rank that heard of the stop from another one may get its own signal now.
            actions.save()
            text.check()
            actions.say_stopped(stop.reason)
            return EXIT_STOPPED
        finish(actions, command=command)
    return EXIT_DONE


def _build_language_model(
    options: Options, named: ModelOptions, config: PretrainedConfig, text: Text, world: World
) -> LanguageModel:
    model, origin = build_model(named, config, text.tokenizer)
    _say(f"weights: {origin} ({model.num_parameters():,} parameters)")
    if options.data.document_mask:
        require_document_mask(model, world.device)
    language_model = LanguageModel(model)
    if options.training.torch_compile:
        language_model.compile()
    return language_model


def _say(*lines: str) -> None:
    for line in lines:
        log.info("%s", line)


def _batches(options: Options, plan: Plan, world: World, blocks: Samples, first_step: int) -> Iterator[list[Batch]]:
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
        pin_memory=world.device.type == "cuda",
    )


def _check_push(options: Options, folder: RunFolder | None, world: World) -> None:
    if options.hub.push_to_hub and folder is not None and not options.output.dry_run:
        world.on_main(lambda: check_hub_access(options.hub.hub_model_id, folder.path, options.hub.hub_token))


def _events(options: Options, plan: Plan, actions: Actions) -> list[Event]:
    """What happens after an update, in this order."""
    last = at_end(plan.num_steps)
    epoch = every_epoch(plan.num_blocks, plan.global_batch)
    evaluation, output = options.evaluation, options.output
    evaluating = every(evaluation.eval_steps) if evaluation.eval_steps else epoch
    saving = epoch if output.checkpointing_steps == "epoch" else every(output.checkpointing_steps)
    return [
        Event(any_of(every(output.logging_steps), last), actions.record),
        Event(any_of(evaluating, last), actions.evaluate),
        Event(all_of(every(evaluation.sample_steps), before(plan.num_steps)), actions.sample),
        Event(saving, actions.save),
    ]
