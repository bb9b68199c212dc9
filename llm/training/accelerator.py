"""The device and the processes of a run: one Accelerator, checked against what the launcher was asked for."""

from __future__ import annotations

import datetime
import gc
import logging
import os
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs

from llm.config.errors import UserError
from llm.config.options import TrainingOptions
from llm.distributed.world import World, launched_size
from llm.system.allocator import keep_freed_memory, return_freed_memory
from llm.system.cpu_threads import use_free_cores
from llm.system.garbage_collection import unfreeze_heap
from llm.system.precision import multiplies_bf16

log = logging.getLogger(__name__)

# Minutes, so that a rank that is gone does not cost the others half an hour. What rank 0 does alone for long
# (text, samples, the last checkpoint, the export) the others wait for at the store; in a collective they wait
# for an update, for the slowest rank to load the model, and for rank 0 where a save has to wait for the one
# before it. Longer than the watchdog's five minutes, whose stacks say more than a collective's error.
_COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)


PrecisionSource = Literal["option", "launcher", "device", "checkpoint"]


@dataclass
class Compute:
    """What a run computes on.

    Attributes:
        accelerator: gives autocast, the loss scaler and DDP.
        world: the processes.
        precision_source: who chose the arithmetic.
    """

    accelerator: Accelerator
    world: World
    precision_source: PrecisionSource = "option"

    @property
    def precision(self) -> str:
        """Arithmetic of the forward and backward pass: no (fp32), bf16 or fp16."""
        return str(self.accelerator.mixed_precision)

    def use_checkpoint_precision(self, precision: str | None) -> None:
        """Goes on in the arithmetic of a checkpoint, unless one was asked for here; before a model is prepared.

        Raises:
            UserError: the device cannot do it.
        """
        if precision is None or precision == self.precision:
            return
        if self.precision_source in ("option", "launcher"):
            log.warning("the checkpoint was made in %s, this run goes on in %s", _named(precision), self._arithmetic())
            return
        _refuse_what_is_not_there(precision, on_cpu=self.world.device.type == "cpu")
        log.info(
            "arithmetic: %s, as the checkpoint's, not %s as auto is here; --mixed_precision changes it",
            _named(precision),
            _named(self.precision),
        )
        self._change_precision(precision)
        self.precision_source = "checkpoint"

    def agree_on_precision(self) -> None:
        """Nodes of several kinds compute as the first one chose."""
        if self.precision_source == "device" and (first := self.world.broadcast(self.precision)) != self.precision:
            self._change_precision(first)

    def _change_precision(self, precision: str) -> None:
        AcceleratorState._reset_state()  # the processes stay joined
        self.accelerator = _accelerator(precision, on_cpu=self.world.device.type == "cpu")

    def release(self) -> None:
        """Frees the model and leaves the other processes; nothing may be trained here any more.

        In this order: DDP's reducer, freed after the process group was given up, would be the last to hold
        it, and join gloo's threads without letting go of the interpreter that they wait for.
        """
        self.accelerator.free_memory()
        unfreeze_heap()
        gc.collect()  # DDP stands in a circle of references, which only this breaks
        if dist.is_initialized():
            dist.destroy_process_group()

    def __str__(self) -> str:
        """One line: device, processes, arithmetic."""
        device = self.world.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        processes = "1 process" if self.world.size == 1 else f"{self.world.size} processes"
        threads = f" of {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        return f"device: {name}, {processes}{threads}, {self._arithmetic()}"

    def _arithmetic(self) -> str:
        """The arithmetic, and who chose it where it was not an option."""
        native = "native" if self.precision == "bf16" else "no native bf16"
        reasons = {
            "launcher": " (the launcher's)",
            "device": f" (auto: {native} here)",
            "checkpoint": " (the checkpoint's)",
        }
        return _named(self.precision) + reasons.get(self.precision_source, "")


def start_compute(options: TrainingOptions) -> Compute:
    """Chooses the device, joins the other processes, and fixes the arithmetic.

    Without an accelerator several processes form a world over gloo by themselves.

    Raises:
        UserError: the processes do not form the world that was asked for, or the device cannot do the
            arithmetic that was asked for.
    """
    _refuse_a_lone_process()
    _refuse_other_engines(options)
    # A process may hold the state of an earlier run (a notebook, a test); this run starts its own.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    on_cpu = options.use_cpu or not _has_accelerator()
    precision, precision_source = _choose_precision(options.mixed_precision, on_cpu=on_cpu)
    if options.full_determinism:
        # cuBLAS reads this when its handle is made, so it has to stand before the first product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    accelerator = _accelerator(precision, on_cpu=on_cpu)
    world = World(
        rank=accelerator.process_index,
        size=accelerator.num_processes,
        local_rank=max(accelerator.local_process_index, 0),
        device=accelerator.device,
    )
    if launched_size() != world.size:
        raise UserError(
            f"the launcher started {launched_size()} processes but they form a world of {world.size}: "
            "each would train and write its own copy; start them with torchrun or accelerate launch"
        )
    if on_cpu:
        use_free_cores(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        keep_freed_memory()
    if world.device.type == "cuda":
        # Products of fp32 matrices in TF32, eight times as fast and three digits shorter.
        torch.set_float32_matmul_precision("highest" if options.full_determinism else "high")
    # Each node has one process of that number; no variable says it under every launcher.
    num_nodes = int(world.all_reduce_sum(torch.tensor(int(world.local_rank == 0), device=world.device)))
    machine = Compute(accelerator, replace(world, num_nodes=num_nodes), precision_source)
    machine.agree_on_precision()
    return machine


def restore_process() -> None:
    """Undoes what a run, also a failed one, has set in its process, which in a notebook goes on."""
    unfreeze_heap()
    return_freed_memory()


def _accelerator(precision: str, *, on_cpu: bool) -> Accelerator:
    return Accelerator(
        cpu=on_cpu,
        mixed_precision=precision,
        # Accumulation is the updater's; a number in the launcher's environment would divide gradients by it.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        # Buffers of these models never change, so they are not sent again at every forward pass.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=_COLLECTIVE_TIMEOUT),
        ],
    )


def _has_accelerator() -> bool:
    return bool(torch.accelerator.is_available())


def _choose_precision(asked: str, *, on_cpu: bool) -> tuple[str, PrecisionSource]:
    """The arithmetic, and who chose it: the option, else `accelerate launch`, else the device."""
    # accelerate launch writes `no` whenever it was told nothing.
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked != "auto" or launcher in ("bf16", "fp16"):
        precision = launcher if asked == "auto" else asked
        _refuse_what_is_not_there(precision, on_cpu=on_cpu)
        return precision, "launcher" if asked == "auto" else "option"
    device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()
    return "bf16" if device is not None and multiplies_bf16(device) else "no", "device"


def _refuse_what_is_not_there(precision: str, *, on_cpu: bool) -> None:
    if precision == "fp16" and on_cpu:
        raise UserError(
            "--mixed_precision fp16 needs an accelerator: its products run on no CPU natively; use bf16 or no"
        )
    if precision == "bf16" and not on_cpu and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise UserError(f"--mixed_precision bf16 is not there on {torch.cuda.get_device_name()}; use fp16 or no")


def _named(precision: str) -> str:
    return "fp32" if precision == "no" else precision


def _refuse_other_engines(options: TrainingOptions) -> None:
    """What `accelerate launch` was asked for and the updater here does not do: say it instead of ignoring it."""
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise UserError(
                f"accelerate launch asks for {name}, which is not here yet; launch with --multi_gpu or torchrun"
            )
    if options.mixed_precision == "auto" and os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp8":
        raise UserError("accelerate launch asks for fp8, which changes nothing in GPT-2's Conv1D blocks; use bf16")


def _refuse_a_lone_process() -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process and says nothing: say it."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "accelerate launch was asked for several processes and started one, as it does on a CPU; "
            "use torchrun --nproc_per_node 2 -m llm.trainers.gpt ..., which needs no accelerator"
        )
