"""The real update, measured: its time, where that goes, memory, and the share of what the device can do."""

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

# Updates that pay for what happens once: memory is taken, kernels are chosen, the optimizer's state is made.
_NUM_WARM_UPS = 3
# Updates whose phases are marked, which costs a little: not among those that are timed.
_NUM_MARKED = 5


@dataclass
class SyntheticBlocks:
    """Random ids, as many blocks as are asked for.

    Attributes:
        block_size: tokens predicted in a block.
        vocabulary_size: every id is below it.
    """

    block_size: int
    vocabulary_size: int

    @property
    def num_blocks(self) -> int | None:
        """There is no end."""
        return None

    def num_unread(self, num_samples: int) -> int:
        """Nothing is left over of what has no end."""
        return 0

    def block(self, sample: int, seed: int) -> Row:
        """Return a row of ids, int64 [block_size + 1], the same for the same seed and sample."""
        return Row(np.random.default_rng((seed, sample)).integers(self.vocabulary_size, size=self.block_size + 1))


@dataclass(frozen=True)
class Measurement:
    """What was measured at one size of the micro-batch, on this rank.

    Attributes:
        micro_batch: blocks of one forward pass on one device.
        tokens: predicted in one update, over all devices.
        seconds: of each update, the wait for its data included; the mean of each period where that is longer.
        period: updates after which the work of an update repeats itself: 1, or more with K-FAC.
        cpu_seconds: of all threads of this process, an update.
        data_seconds: mean wait for the data of an update.
        phase_seconds: mean of each phase of an update, measured apart from `seconds`.
        communication_seconds: what the ranks' exchange of gradients adds to an update; None of one process.
        peak_bytes: memory of the device, or of the process where that is the CPU.
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
        """Of an update."""
        return statistics.median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Over all devices."""
        return self.tokens / self.median_seconds

    def shares(self) -> dict[str, float]:
        """Each phase's share of an update, the wait for data and the rest included."""
        # The marked updates' own length, which may differ a little from the timed ones'.
        whole = max(self.median_seconds, sum(self.phase_seconds.values()) + self.data_seconds)
        found = {name: seconds / whole for name, seconds in self.phase_seconds.items()}
        found["data wait"] = self.data_seconds / whole
        return found | {"rest": max(0.0, 1 - sum(found.values()))}


class StepBenchmark:
    """Measures updates of one model at any size of the micro-batch.

    Args:
        compute: device and ranks.
        updater: makes the updates.
        samples: the blocks.
        plan: of the run that is measured.
        num_workers: processes that read the blocks.
    """

    def __init__(self, compute: Compute, updater: Updater, samples: BlockSource, plan: Plan, num_workers: int) -> None:
        self._compute = compute
        self._updater = updater
        self._targets = updater.profiling_targets()
        self._samples = samples
        self._plan = plan
        self._num_workers = num_workers
        self._clock = DeviceTimer(compute.world.device)
        self._step = 0

    def measure(self, num_updates: int, micro_batch: int | None = None, accumulation: int | None = None) -> Measurement:
        """Times updates after a few that are not, then marks the phases of a few more.

        Args:
            num_updates: that are timed.
            micro_batch: blocks of one forward pass; the plan's when None.
            accumulation: forward passes of an update; the plan's when None.

        Raises:
            torch.OutOfMemoryError: it does not fit the device.
        """
        micro_batch, accumulation = micro_batch or self._plan.micro_batch, accumulation or self._plan.accumulation
        world, period = self._compute.world, self._targets.preconditioner.intervals.period
        # Whole periods; never the first one, in which K-FAC has more to do.
        num_warm_ups = _whole(self._step + _NUM_WARM_UPS, period) - self._step
        num_updates, num_marked = _whole(num_updates, period), _whole(_NUM_MARKED, period)
        total = num_warm_ups + num_updates + num_marked + 1 + 2 * _NUM_MARKED
        batches = self._batches(micro_batch, accumulation, total)
        reset_peak_bytes(world.device)
        for _ in range(num_warm_ups):
            self._update(next(batches))
        # On the device's time line: an update is given to it while it ends the one before, as in a run.
        marks, data_seconds = [self._clock.record()], 0.0
        cpu = time.process_time()
        for _ in range(num_updates):
            begin = time.perf_counter()
            micro_batches = next(batches)
            data_seconds += time.perf_counter() - begin
            self._update(micro_batches)
            marks.append(self._clock.record())
        self._clock.wait()
        cpu = time.process_time() - cpu
        seconds = [self._clock.seconds(*pair) for pair in itertools.pairwise(marks)]
        return Measurement(
            micro_batch=micro_batch,
            tokens=micro_batch * accumulation * world.size * self._plan.block_size,
            seconds=tuple(statistics.fmean(seconds[at : at + period]) for at in range(0, num_updates, period)),
            cpu_seconds=cpu / num_updates,
            data_seconds=data_seconds / num_updates,
            phase_seconds=self._phase_seconds(batches, num_marked),
            communication_seconds=self._communication(batches) if world.size > 1 else None,
            peak_bytes=peak_bytes(world.device),
            period=period,
        )

    def sweep(self, num_updates: int, global_batch: int | None) -> Iterator[Measurement]:
        """Measures 1, 2, 4, … blocks a micro-batch while they fit and while more is faster.

        It ends after two sizes in a row that are slower than the best, or where memory would run out: on an
        accelerator when it does, on a CPU, whose system would kill the process, when it is known beforehand.

        Args:
            num_updates: that are timed of each.
            global_batch: blocks of every update, of which the sizes are the divisors then; None: the accumulation
                is the plan's.

        Raises:
            UserError: not one fits.
        """
        best, num_slower, before = 0.0, 0, None
        for micro_batch in _sizes(global_batch):
            if num_slower == 2 or (before is not None and not self._fits(micro_batch, before)):
                return
            # Else torch stops to compile after eight shapes, and goes on without a word of it.
            torch.compiler.reset()
            try:
                found = self.measure(num_updates, micro_batch, global_batch and global_batch // micro_batch)
            except torch.OutOfMemoryError as error:
                self._targets.discard()
                if before is None:
                    raise UserError(f"not one block a micro-batch fits: {first_line(error)}") from error
                return
            yield found
            num_slower = 0 if found.tokens_per_second > best else num_slower + 1
            best = max(best, found.tokens_per_second)
            before = found

    def profile(self, path: Path) -> str:
        """Writes a trace of three updates; the operators that took longest, as a table.

        Raises:
            UserError: the file cannot be written.
        """
        batches = self._batches(self._plan.micro_batch, self._plan.accumulation, 2 * _NUM_WARM_UPS)
        for _ in range(_NUM_WARM_UPS):
            self._update(next(batches))
        with torch.profiler.profile() as profile:
            for _ in range(_NUM_WARM_UPS):
                self._update(next(batches))
            self._clock.wait()
        on_cpu = self._compute.world.device.type == "cpu"
        if self._compute.world.is_main:
            profile.export_chrome_trace(str(path))
            if not path.exists():  # torch only says so, in words of its own
                raise UserError(f"--profile {path} could not be written")
        order = "self_cpu_time_total" if on_cpu else "self_device_time_total"
        return str(profile.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=40))

    def _phase_seconds(self, batches: Iterator[list[Batch]], num_marked: int) -> dict[str, float]:
        """Of an update, mean; where K-FAC is on, all that it does is a phase, which is no part of the others."""
        phases = StepTimer(self._clock)
        with phases.attached(self._targets.module, self._targets.optimizer):
            for _ in range(num_marked):
                self._update(next(batches))
        result = {name: seconds / num_marked for name, seconds in phases.seconds().items()}
        preconditioner = self._targets.preconditioner
        step_seconds = newest_seconds(preconditioner, self._clock, num_marked)
        if step_seconds is not None:
            # Measured in one update only, which may have been a slow one.
            capture_seconds = self._capture_seconds(next(batches)) / preconditioner.intervals.factors
            capture_seconds = min(capture_seconds, result["backward"])
            result["backward"] -= capture_seconds
            result["kfac"] = step_seconds / num_marked + capture_seconds
        return result

    def _capture_seconds(self, micro_batches: list[Batch]) -> float:
        """Seconds that K-FAC takes in the backward passes of one update that updates factors."""
        with torch.profiler.profile() as profile:
            self._update(micro_batches)
            self._clock.wait()
        on_cpu = self._compute.world.device.type == "cpu"
        captures = [event for event in profile.key_averages() if event.key == CAPTURE_OPERATOR]
        return sum(float(event.cpu_time_total if on_cpu else event.device_time_total) for event in captures) / 1e6

    def _update(self, micro_batches: list[Batch]) -> None:
        """Make one update; in fp16 the first ones overflow, until the loss scale is low enough."""
        while True:
            report = self._updater.update(micro_batches, self._step, votes=NO_VOTES)
            self._step += 1
            if not report.skipped:
                return
            if not report.loss_scale_is_falling:
                raise UserError(f"update {self._step} has a gradient that is not finite: its time means nothing")

    def _communication(self, batches: Iterator[list[Batch]]) -> float:
        """Seconds of an update with the exchange, less those of one without, interleaved."""
        read = [(next(batches), next(batches)) for _ in range(_NUM_MARKED)]
        marks = [self._clock.record()]
        for exchanged, kept in read:
            self._update(exchanged)
            marks.append(self._clock.record())
            with self._targets.without_gradient_sync():
                self._update(kept)
            marks.append(self._clock.record())
        self._clock.wait()
        seconds = [self._clock.seconds(*pair) for pair in itertools.pairwise(marks)]
        return statistics.median(seconds[::2]) - statistics.median(seconds[1::2])

    def _batches(self, micro_batch: int, accumulation: int, num_steps: int) -> Iterator[list[Batch]]:
        world = self._compute.world
        return training_batches(
            self._samples,
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

    def _fits(self, micro_batch: int, before: Measurement) -> bool:
        """Whether so many blocks will surely have room: at most as many times the memory of those before."""
        if self._compute.world.device.type != "cpu":
            return True
        available = available_bytes()
        return available is None or micro_batch / before.micro_batch * before.peak_bytes - resident_bytes() < available


def _sizes(global_batch: int | None) -> Iterator[int]:
    """Of micro-batches: the divisors of a global batch, or the powers of two."""
    if global_batch is None:
        yield from (2**number for number in itertools.count())
    else:
        yield from (size for size in range(1, global_batch + 1) if global_batch % size == 0)


def _whole(number: int, period: int) -> int:
    """The number, or the next one that is a multiple of the period."""
    return -(-number // period) * period


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of matrix products on this device, the best of a few sizes; each is the median of five."""
    clock, best = DeviceTimer(device), 0.0
    sizes = (1024, 2048) if device.type == "cpu" else (4096, 8192)
    if device.type == "cpu" and dtype == torch.bfloat16 and not multiplies_bf16(device):
        sizes = (256, 512)  # emulated, at a hundredth of the speed
    for size in sizes:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        torch.mm(left, right)
        seconds = []
        for _ in range(5):
            clock.wait()
            begin = time.perf_counter()
            torch.mm(left, right)
            clock.wait()
            seconds.append(time.perf_counter() - begin)
        best = max(best, 2 * size**3 / statistics.median(seconds))
    return best
