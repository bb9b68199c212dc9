"""A run from start to end: text and options in, a folder that `from_pretrained` loads out."""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from llm.config.errors import Stopped
from llm.config.options import Options
from llm.data.batches.loader import MicroBatches, training_batches
from llm.data.dataset import StopSignal, TokenizedDataset, detect_hub
from llm.data.streaming.dataset import open_dataset as open_named_dataset
from llm.distributed.world import World
from llm.hub.connection import come_online
from llm.hub.push import check_hub_access
from llm.models.config import context_limit
from llm.training.accelerator import Compute, restore_process, start_compute
from llm.training.build import build_updater, prepare_language_model
from llm.training.callbacks.run_callbacks import RunCallbacks, repeat_interrupted, scheduled_callbacks
from llm.training.checkpoints.async_saver import AsyncSaver
from llm.training.checkpoints.resume import Start, as_restarted, choose_start
from llm.training.checkpoints.store import abandon_newer
from llm.training.context import RunContext
from llm.training.estimates import dry_run_lines, require_disk_space
from llm.training.finalize import finish
from llm.training.initial_model import InitialModel, NamedModel
from llm.training.loop import run_updates
from llm.training.plan import Plan, check_training, choose_block_size, plan_run, plan_schedule, resolve_options
from llm.training.run_dir.console import ProgressBar, setup_logging, teardown_logging
from llm.training.run_dir.folder import RunDirectory, claim_run_dir
from llm.training.run_dir.result import TrainResult
from llm.training.run_dir.trackers import Tracking, choose_trackers
from llm.training.seeding import seed_weights
from llm.training.state import TrainState
from llm.training.supervision.deadline import find_deadline
from llm.training.supervision.stop_signals import StopRequest, catch_stop_signals
from llm.training.supervision.watchdog import Watchdog, start_watchdog
from llm.training.updaters.base import StepVotes, Updater
from llm.training.updaters.preconditioning import kfac_bytes

log = logging.getLogger(__name__)

EXIT_DONE = 0
EXIT_STOPPED = Stopped.exit_code


class OpenDataset(Protocol):
    """Opens the text of a run, on all ranks; `llm.data.streaming.dataset.open_dataset` is the default."""

    def __call__(
        self, options: Options, world: World, revision: str | None, stop: StopSignal, /
    ) -> AbstractContextManager[TokenizedDataset]:
        """Return a context in which the dataset is open.

        Args:
            options: of the run.
            world: the processes of the run.
            revision: commit of the Hub dataset that a resumed run was started on; None takes the newest.
            stop: interrupts the work.
        """


def train(
    options: Options,
    *,
    command: str,
    started: float | None = None,
    open_dataset: OpenDataset = open_named_dataset,
    initial_model: InitialModel | None = None,
) -> TrainResult:
    """Train a model as the options say.

    Args:
        options: checked options.
        command: the command line that made them, without secrets; goes into the model card.
        started: when the process began, in seconds since the epoch: `--max_time` counts from there; now when None.
        open_dataset: opens the text of the run; by default that which the options name.
        initial_model: the model that the run starts with; None: the options name it.

    Raises:
        UserError: something outside the program is wrong; its message is one line.
    """
    started = time.time() if started is None else started
    compute = start_compute(options.training)
    world = compute.world
    setup_logging(is_main=world.is_main, rank=world.rank)
    run_dir = RunDirectory(Path(options.output.output_dir)) if options.output.output_dir else None
    try:
        with ExitStack() as stack:
            deadline = find_deadline(options.training, world, started=started)
            on_forced_exit = run_dir.write_forced_exit if run_dir is not None and world.is_main else None
            stop = stack.enter_context(catch_stop_signals(deadline, on_forced_exit))
            watchdog = stack.enter_context(start_watchdog(world, run_dir))
            if run_dir is not None and not options.output.dry_run:
                options = as_restarted(options, run_dir.checkpoints)
                stack.enter_context(claim_run_dir(run_dir, options, world, stop.interruptible))
            model = NamedModel() if initial_model is None else initial_model
            result = _Run(options, command, compute, run_dir, stop, watchdog, open_dataset, model).execute(stack)
        compute.release()
        return result
    except Stopped as stopped:
        # Before the first update, on all ranks; later stops are handled by the run itself.
        log.info("stopped by %s before an update was made", stopped)
        compute.release()
        return TrainResult(EXIT_STOPPED, run_dir.path if run_dir is not None else None)
    finally:
        # Leave the process as it was: a notebook, or the next run in it, may need the Hub and a failed run's memory.
        restore_process()
        come_online()
        teardown_logging()


@dataclass(frozen=True)
class _Run:
    """The parts of a run that exist before its text is opened."""

    options: Options
    command: str
    compute: Compute
    run_dir: RunDirectory | None
    stop: StopRequest
    watchdog: Watchdog
    open_dataset: OpenDataset
    initial_model: InitialModel

    def execute(self, stack: ExitStack) -> TrainResult:
        """Find the checkpoint, open the text, plan; then build, train and finish."""
        world = self.compute.world
        _log_lines(str(self.run_dir or "output: none, nothing is kept (give --output_dir to keep it)"))
        _log_lines(str(self.compute), *self.stop.deadline.lines())
        trackers = choose_trackers(self.options.tracking)
        detect_hub(self.options, world)
        _check_push(self.options, self.run_dir, world)
        checkpoints = self.run_dir.checkpoints if self.run_dir is not None else None
        start = world.run_on_main(self.stop.interrupting(lambda: choose_start(self.options, checkpoints)))
        options = start.with_global_batch(self.options)
        self.compute.use_checkpoint_precision(start.precision)
        limit = self._refuse_early(options, start)
        with self.watchdog.phase("the text"):
            revision = start.dataset_revision(options.data.dataset_name)
            dataset = stack.enter_context(self.open_dataset(options, world, revision, self.stop))
        config = self.initial_model.load_config(start, dataset.tokenizer)
        block_size = choose_block_size(options.data.block_size, limit, context_limit(config, dataset.tokenizer))
        document_mask = options.data.document_mask
        blocks, validation = dataset.blocks(block_size, document_mask=document_mask)
        dataset.require_same_on_all(world)
        plan = plan_run(options.training, blocks, num_ranks=world.size, seed=start.seed, document_mask=document_mask)
        start.check(plan, dataset)
        _log_lines(*dataset.opening_lines(blocks, num_samples=plan.num_samples, document_mask=document_mask), str(plan))
        if options.output.dry_run:
            schedule = plan_schedule(options, plan)
            _log_lines(*dry_run_lines(config, plan, options.optimizer, schedule, options.output, options.kfac))
            return TrainResult(EXIT_DONE)
        updater = self._build_updater(options, start, config, dataset.tokenizer, plan)
        state = self._resume(options, start, updater, plan)
        context = RunContext(
            options=options,
            compute=self.compute,
            world=world,
            run_dir=self.run_dir,
            dataset=dataset,
            blocks=blocks,
            validation=validation,
            plan=plan,
            state=state,
            updater=updater,
            tracking=Tracking(self.compute.accelerator, self.run_dir),
            saver=_saver(options, self.run_dir) if world.is_main else None,
            stop=self.stop,
            watchdog=self.watchdog,
            base_model=self.initial_model.base_model(options.model),
        )
        context.tracking.start(trackers, options, first_step=state.step)
        result = _train_and_finish(context, self.command)
        self.initial_model.receive(updater, world)
        return result

    def _refuse_early(self, options: Options, start: Start) -> int:
        """Find mistakes before the text is read, from one small file; return the context limit of the model.

        Raises:
            UserError: names, overrides, a block beyond the model, a batch that does not divide, or a model without a
                layer for K-FAC.
        """
        config = self.initial_model.read_config(start)
        limit = context_limit(config)
        choose_block_size(options.data.block_size, limit, limit)
        check_training(options, num_ranks=self.compute.world.size)
        kfac_bytes(config, options.kfac)
        return limit

    def _build_updater(
        self,
        options: Options,
        start: Start,
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        plan: Plan,
    ) -> Updater:
        """Build the model with the weights that the run starts with, and what updates it."""
        world = self.compute.world
        run_dir = self.run_dir
        if run_dir is not None:
            world.run_on_main(lambda: _require_disk_space(run_dir, config, options, start))
        seed_weights(start.seed)
        with self.watchdog.phase("the model"), self.stop.interruptible():
            model = self.initial_model.build(start, config, tokenizer)
            attention = start.model.attn_implementation
            language_model = prepare_language_model(model, options, self.compute, plan, keep_attention=attention)
            start.load_weights(model)
        updater = build_updater(options, self.compute, language_model, plan_schedule(options, plan), plan)
        if updater.data_parallel.size != world.size:
            raise ValueError(f"the plan is for {world.size} data-parallel ranks, not {updater.data_parallel.size}")
        _log_lines(*updater.summary())
        return updater

    def _resume(self, options: Options, start: Start, updater: Updater, plan: Plan) -> TrainState:
        """Restore the updater and the counters of a checkpoint, and say in the run's folder that the run begins."""
        state = start.resume(updater)
        run_dir = self.run_dir
        if run_dir is not None:
            resolved = resolve_options(options, plan, precision=self.compute.precision)
            self.compute.world.run_on_main(lambda: _begin(run_dir, resolved, start, state))
        return state


def _train_and_finish(context: RunContext, command: str) -> TrainResult:
    """Make the remaining updates, then what follows the last one, or what follows a stop."""
    state = context.state
    callbacks = RunCallbacks.of(context)
    exit_code = EXIT_STOPPED
    with closing(context.tracking), ExitStack() as stack:
        if context.saver is not None:
            stack.enter_context(closing(context.saver))
        bar = stack.enter_context(ProgressBar(state.step, context.plan.num_steps, is_main=context.world.is_main))
        try:
            repeat_interrupted(context, callbacks)
            if _make_updates(context, callbacks, bar):
                finish(context, callbacks, command=command)
                exit_code = EXIT_DONE
        except Stopped:
            pass  # an evaluation or the samples, on all ranks
        if exit_code == EXIT_STOPPED:
            callbacks.checkpointing.stop()
    newest = callbacks.evaluation.newest
    return TrainResult(
        exit_code=exit_code,
        output_dir=context.run_dir.path if context.run_dir is not None else None,
        step=state.step,
        tokens=state.tokens,
        train_loss=state.train_loss,
        eval_loss=state.eval_loss,
        best_eval_loss=state.best_eval_loss,
        perplexity=newest.perplexity if newest is not None else None,
        bits_per_byte=newest.bits_per_byte if newest is not None else None,
    )


def _make_updates(context: RunContext, callbacks: RunCallbacks, bar: ProgressBar) -> bool:
    """Make the remaining updates; return whether all were made."""
    plan = context.plan
    batches = context.dataset.wait_for_batches(
        _batches(context),
        context.blocks,
        first_step=context.state.step,
        num_steps=plan.num_steps,
        global_batch=plan.global_batch,
        should_stop=context.stop,
    )
    # A streaming dataset stops its writer when its batches are closed.
    with closing(batches), context.watchdog.phase("records, evaluation and checkpoints"):
        return run_updates(
            context.updater,
            batches,
            context.state,
            scheduled_callbacks(context, callbacks, bar),
            num_steps=plan.num_steps,
            tokens_per_step=plan.tokens_per_step,
            votes=StepVotes(stop=context.stop, save=callbacks.checkpointing.should_save),
            watched=context.watchdog.during_update,
        )


def _batches(context: RunContext) -> MicroBatches:
    """This rank's micro-batches of the remaining updates, one list an update."""
    plan = context.plan
    return training_batches(
        context.blocks,
        seed=plan.seed,
        first_step=context.state.step,
        num_steps=plan.num_steps - context.state.step,
        micro_batch=plan.micro_batch,
        accumulation=plan.accumulation,
        rank=context.updater.data_parallel.rank,
        num_ranks=context.updater.data_parallel.size,
        num_workers=context.options.data.dataloader_num_workers,
        device=context.world.device,
    )


def _check_push(options: Options, run_dir: RunDirectory | None, world: World) -> None:
    if options.hub.push_to_hub and run_dir is not None and not options.output.dry_run:
        world.run_on_main(lambda: check_hub_access(options.hub.hub_model_id, run_dir.path, options.hub.hub_token))


def _require_disk_space(run_dir: RunDirectory, config: PretrainedConfig, options: Options, start: Start) -> None:
    require_disk_space(
        run_dir.checkpoints, config, options.optimizer.optim, options.kfac, is_fresh=start.checkpoint is None
    )


def _begin(run_dir: RunDirectory, options: Options, start: Start, state: TrainState) -> None:
    """Write the resolved options and the status, and move checkpoints beyond this start's out of the way."""
    run_dir.require_lock()
    if start.checkpoint is not None:
        abandon_newer(run_dir.checkpoints, state.step)
    run_dir.begin(options, fresh=start.checkpoint is None)


def _saver(options: Options, run_dir: RunDirectory | None) -> AsyncSaver | None:
    if run_dir is None:
        return None
    return AsyncSaver(options.output, request_file=run_dir.save_request, checkpoints=run_dir.checkpoints)


def _log_lines(*lines: str) -> None:
    for line in lines:
        log.info("%s", line)
