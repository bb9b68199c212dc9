"""The parts of a run in one frozen record, which callbacks and the end of the run share."""

from __future__ import annotations

from dataclasses import dataclass

from llm.config.options import Options
from llm.data.batches.blocks import Blocks
from llm.data.batches.loader import BlockSource
from llm.data.dataset import TokenizedDataset
from llm.distributed.world import World
from llm.training.accelerator import Compute
from llm.training.checkpoints.async_saver import AsyncSaver
from llm.training.plan import Plan
from llm.training.run_dir.folder import RunDirectory
from llm.training.run_dir.trackers import Tracking
from llm.training.state import TrainState
from llm.training.supervision.stop_signals import StopRequest
from llm.training.supervision.watchdog import Watchdog
from llm.training.updaters.base import Updater


@dataclass(frozen=True)
class RunContext:
    """The parts of a run. It has no behaviour of its own.

    Attributes:
        options: as the user gave them, with a resumed checkpoint's global batch unless they set one.
        compute: device, precision and Accelerate's parts.
        world: the processes.
        run_dir: the run's folder; None where nothing is kept.
        dataset: tokenizer and tokens.
        blocks: the training blocks.
        validation: the validation blocks; None if nothing is held out.
        plan: batch sizes, number of updates and seed.
        state: the counters of the run, which the loop advances.
        updater: makes the updates and holds the model.
        tracking: where records go.
        saver: writes checkpoints; on rank 0 of a run with a folder, None elsewhere.
        stop: whether this process was asked to stop.
        watchdog: ends a run whose update hangs.
        base_model: Hub name, folder or description of the weights that are trained further; None: random ones.
    """

    options: Options
    compute: Compute
    world: World
    run_dir: RunDirectory | None
    dataset: TokenizedDataset
    blocks: BlockSource
    validation: Blocks | None
    plan: Plan
    state: TrainState
    updater: Updater
    tracking: Tracking
    saver: AsyncSaver | None
    stop: StopRequest
    watchdog: Watchdog
    base_model: str | None
