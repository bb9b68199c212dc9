"""Measurements of a real update: its time, the time of each phase, memory, and the speed of matrix products."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llm.config.errors import UserError, first_line
from llm.data.batches.loader import Batch, BlockSource, training_batches
from llm.data.batches.row import Row
from llm.kfac.capture import CAPTURE_OPERATOR
from llm.system.device_timer import DeviceTimer
from llm.system.memory import available_bytes, peak_bytes, reset_peak_bytes, resident_bytes
from llm.system.precision import multiplies_bf16
from llm.training.accelerator import Compute
from llm.training.plan import Plan
from llm.training.profiling.kfac_timing import newest_seconds
from llm.training.profiling.phases import StepTimer
from llm.training.updaters.base import NO_VOTES, Updater

# Updates before the measured ones: they allocate memory, choose kernels and create the optimizer's state.
_NUM_WARM_UPS = 3
# Updates whose phases are measured. The marks take a little time, so that these updates are not among the timed ones.
_NUM_MARKED = 5


@dataclass
class SyntheticBlocks:
    """An endless source of blocks of random ids.

    Attributes:
        block_size: tokens predicted in a block.
        vocabulary_size: every id is below it.
    """

    block_size: int
    vocabulary_size: int

    @property
    def num_blocks(self) -> int | None:
        """None, because the number of blocks has no limit."""
        return None

    def num_unread(self, num_samples: int) -> int:
        """Return 0, because the number of blocks has no limit."""
        return 0

    def block(self, sample: int, seed: int) -> Row:
        """Return a row of ids, int64 [block_size + 1], the same for the same seed and sample."""
        return Row(np.random.default_rng((seed, sample)).integers(self.vocabulary_size, size=self.block_size + 1))


@dataclass(frozen=True)
class Measurement:
    """The measurements at one size of the micro-batch, on this rank.

    Attributes:
        micro_batch: blocks of one forward pass on one device.
        tokens: tokens predicted in one update, over all devices.
        seconds: time of each update, including the wait for its data; if `period` is above 1, the mean of each period.
        period: number of updates after which the work of an update repeats: 1, or more with K-FAC.
        cpu_seconds: mean CPU time of an update, over all threads of this process.
        data_seconds: mean wait for the data of an update.
        phase_seconds: mean time of each phase of an update, measured in other updates than `seconds`.
        communication_seconds: time that the exchange of gradients adds to an update; None for one process.
        peak_bytes: peak memory of the device, or of the process on a CPU.
    """

    micro_batch: int
    tokens: int
    seconds: tuple[float, ...]
    cpu_seconds: float
    data_seconds: float
    phase_seconds: dict[str, float]
    communication_seconds: float | None
    peak_bytes: int
    period: int

    @property
    def median_seconds(self) -> float:
        """Median time of an update."""
        return statistics.median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Tokens predicted a second, over all devices."""
        return self.tokens / self.median_seconds

    def shares(self) -> dict[str, float]:
        """Return the share of each phase in the time of an update, with `data wait` and `rest`; the sum is 1."""
        # The phases were measured in other updates, which may have taken a little longer than the timed ones.
        total = max(self.median_seconds, sum(self.phase_seconds.values()) + self.data_seconds)
        shares = {name: seconds / total for name, seconds in self.phase_seconds.items()}
        shares["data wait"] = self.data_seconds / total
        shares["rest"] = max(0.0, 1 - sum(shares.values()))
        return shares


class StepBenchmark:
    """Measures updates of one model at any size of the micro-batch.

    Args:
        compute: device and ranks.
        updater: makes the updates.
        blocks: the training blocks.
        plan: of the run that is measured.
        num_workers: number of processes that read the blocks.
    """

    def __init__(self, compute: Compute, updater: Updater, blocks: BlockSource, plan: Plan, num_workers: int) -> None:
        self._compute = compute
        self._updater = updater
        self._targets = updater.profiling_targets()
        self._blocks = blocks
        self._plan = plan
        self._num_workers = num_workers
        self._timer = DeviceTimer(compute.world.device)
        self._step = 0

    def measure(self, num_updates: int, micro_batch: int | None = None, accumulation: int | None = None) -> Measurement:
        """Time updates after a warm-up, then measure the phases of a few more updates.

        Args:
            num_updates: number of timed updates; rounded up to complete periods of K-FAC.
            micro_batch: blocks of one forward pass; the plan's when None.
            accumulation: forward passes of an update; the plan's when None.

        Raises:
            torch.OutOfMemoryError: the micro-batch does not fit the device.
        """
        micro_batch = micro_batch or self._plan.micro_batch
        accumulation = accumulation or self._plan.accumulation
        world = self._compute.world
        period = self._targets.preconditioner.intervals.period
        # Complete periods, without the first period, in which K-FAC has more to do.
        num_warm_ups = _round_up(self._step + _NUM_WARM_UPS, period) - self._step
        num_updates = _round_up(num_updates, period)
        num_marked = _round_up(_NUM_MARKED, period)
        total = num_warm_ups + num_updates + num_marked + 1 + 2 * _NUM_MARKED
        batches = self._batches(micro_batch, accumulation, total)
        reset_peak_bytes(world.device)
        for _ in range(num_warm_ups):
            self._update(next(batches))
        # The marks are recorded on the device: as in a run, an update is queued while the device finishes the last one.
        marks = [self._timer.record()]
        data_seconds = 0.0
        cpu_seconds = time.process_time()
        for _ in range(num_updates):
            begin = time.perf_counter()
            micro_batches = next(batches)
            data_seconds += time.perf_counter() - begin
            self._update(micro_batches)
            marks.append(self._timer.record())
        self._timer.wait()
        cpu_seconds = time.process_time() - cpu_seconds
        seconds = [self._timer.seconds(*pair) for pair in itertools.pairwise(marks)]
        return Measurement(
            micro_batch=micro_batch,
            tokens=micro_batch * accumulation * world.size * self._plan.block_size,
            seconds=tuple(statistics.fmean(seconds[i : i + period]) for i in range(0, num_updates, period)),
            cpu_seconds=cpu_seconds / num_updates,
            data_seconds=data_seconds / num_updates,
            phase_seconds=self._phase_seconds(batches, num_marked),
            communication_seconds=self._communication(batches) if world.size > 1 else None,
            peak_bytes=peak_bytes(world.device),
            period=period,
        )

    def sweep(self, num_updates: int, global_batch: int | None) -> Iterator[Measurement]:
        """Measure micro-batches of 1, 2, 4, … blocks while they fit in memory and larger ones are faster.

        The sweep ends after two sizes in a row that are slower than the fastest, or when memory runs out: on an
        accelerator after the allocation failed; on a CPU before, because the system would kill the process.

        Args:
            num_updates: number of timed updates of each size.
            global_batch: blocks of every update, whose divisors are the sizes; None uses the accumulation of the plan.

        Raises:
            UserError: even the smallest size does not fit.
        """
        best_speed = 0.0
        num_slower = 0
        previous = None
        for micro_batch in _sizes(global_batch):
            if num_slower == 2 or (previous is not None and not self._fits(micro_batch, previous)):
                return
            # Without a reset, torch silently stops compiling after eight shapes.
            torch.compiler.reset()
            accumulation = None if global_batch is None else global_batch // micro_batch
            try:
                measurement = self.measure(num_updates, micro_batch, accumulation)
            except torch.OutOfMemoryError as error:
                self._targets.discard()
                if previous is None:
                    raise UserError(f"a micro-batch of one block does not fit: {first_line(error)}") from error
                return
            yield measurement
            num_slower = 0 if measurement.tokens_per_second > best_speed else num_slower + 1
            best_speed = max(best_speed, measurement.tokens_per_second)
            previous = measurement

    def profile(self, path: Path) -> str:
        """Write a trace of three updates, and return a table of the operators that took longest.

        Args:
            path: of the trace, a JSON file.

        Raises:
            UserError: the file cannot be written.
        """
        batches = self._batches(self._plan.micro_batch, self._plan.accumulation, 2 * _NUM_WARM_UPS)
        for _ in range(_NUM_WARM_UPS):
            self._update(next(batches))
        with torch.profiler.profile() as profile:
            for _ in range(_NUM_WARM_UPS):
                self._update(next(batches))
            self._timer.wait()
        on_cpu = self._compute.world.device.type == "cpu"
        if self._compute.world.is_main:
            profile.export_chrome_trace(str(path))
            if not path.exists():  # torch only logs the failure
                raise UserError(f"--profile {path} could not be written")
        sort_key = "self_cpu_time_total" if on_cpu else "self_device_time_total"
        return str(profile.key_averages().table(sort_by=sort_key, row_limit=15, max_name_column_width=40))

    def _phase_seconds(self, batches: Iterator[list[Batch]], num_marked: int) -> dict[str, float]:
        """Return the mean seconds of each phase; the phase `kfac` has all work of K-FAC, and the others have none."""
        step_timer = StepTimer(self._timer)
        with step_timer.attached(self._targets.module, self._targets.optimizer):
            for _ in range(num_marked):
                self._update(next(batches))
        phase_seconds = {name: seconds / num_marked for name, seconds in step_timer.seconds().items()}
        preconditioner = self._targets.preconditioner
        step_seconds = newest_seconds(preconditioner, self._timer, num_marked)
        if step_seconds is not None:
            # Measured in one update only, which may have been slower than the others.
            capture_seconds = self._capture_seconds(next(batches)) / preconditioner.intervals.factors
            capture_seconds = min(capture_seconds, phase_seconds["backward"])
            phase_seconds["backward"] -= capture_seconds
            phase_seconds["kfac"] = step_seconds / num_marked + capture_seconds
        return phase_seconds

    def _capture_seconds(self, micro_batches: list[Batch]) -> float:
        """Return the seconds that K-FAC takes in the backward passes of an update with a factor update."""
        with torch.profiler.profile() as profile:
            self._update(micro_batches)
            self._timer.wait()
        on_cpu = self._compute.world.device.type == "cpu"
        captures = [event for event in profile.key_averages() if event.key == CAPTURE_OPERATOR]
        return sum(float(event.cpu_time_total if on_cpu else event.device_time_total) for event in captures) / 1e6

    def _update(self, micro_batches: list[Batch]) -> None:
        """Make one update; repeat it while fp16 overflows, until the loss scale is low enough."""
        while True:
            report = self._updater.update(micro_batches, self._step, votes=NO_VOTES)
            self._step += 1
            if not report.skipped:
                return
            if not report.loss_scale_is_falling:
                raise UserError(
                    f"update {self._step} has a gradient that is not finite: such an update has no meaningful time"
                )

    def _communication(self, batches: Iterator[list[Batch]]) -> float:
        """Return the seconds of an update with gradient exchange less those of one without; the two kinds alternate."""
        pairs = [(next(batches), next(batches)) for _ in range(_NUM_MARKED)]
        marks = [self._timer.record()]
        for batch_with_exchange, batch_without in pairs:
            self._update(batch_with_exchange)
            marks.append(self._timer.record())
            with self._targets.without_gradient_sync():
                self._update(batch_without)
            marks.append(self._timer.record())
        self._timer.wait()
        seconds = [self._timer.seconds(*pair) for pair in itertools.pairwise(marks)]
        return statistics.median(seconds[::2]) - statistics.median(seconds[1::2])

    def _batches(self, micro_batch: int, accumulation: int, num_steps: int) -> Iterator[list[Batch]]:
        world = self._compute.world
        return training_batches(
            self._blocks,
            seed=self._plan.seed,
            first_step=0,
            num_steps=num_steps,
            micro_batch=micro_batch,
            accumulation=accumulation,
            rank=self._updater.data_parallel.rank,
            num_ranks=self._updater.data_parallel.size,
            num_workers=self._num_workers,
            device=world.device,
        )

    def _fits(self, micro_batch: int, previous: Measurement) -> bool:
        """Return whether a micro-batch certainly fits in memory: memory grows at most in proportion to its size."""
        if self._compute.world.device.type != "cpu":
            return True
        available = available_bytes()
        needed = micro_batch / previous.micro_batch * previous.peak_bytes - resident_bytes()
        return available is None or needed < available


def _sizes(global_batch: int | None) -> Iterator[int]:
    """Yield sizes of the micro-batch: the divisors of a global batch, or the powers of two."""
    if global_batch is None:
        yield from (2**number for number in itertools.count())
    else:
        yield from (size for size in range(1, global_batch + 1) if global_batch % size == 0)


def _round_up(number: int, period: int) -> int:
    """Return the smallest multiple of the period that is not below the number."""
    return -(-number // period) * period


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of matrix products on this device: the best of two sizes, each the median of five products.

    Args:
        device: that multiplies.
        dtype: of the square matrices [size, size].
    """
    timer = DeviceTimer(device)
    best = 0.0
    sizes = (1024, 2048) if device.type == "cpu" else (4096, 8192)
    if device.type == "cpu" and dtype == torch.bfloat16 and not multiplies_bf16(device):
        sizes = (256, 512)  # emulated bf16 has a hundredth of the speed
    for size in sizes:
        left = torch.randn(size, size, device=device).to(dtype)
        right = torch.randn(size, size, device=device).to(dtype)
        torch.mm(left, right)
        seconds = []
        for _ in range(5):
            timer.wait()
            begin = time.perf_counter()
            torch.mm(left, right)
            timer.wait()
            seconds.append(time.perf_counter() - begin)
        best = max(best, 2 * size**3 / statistics.median(seconds))
    return best
