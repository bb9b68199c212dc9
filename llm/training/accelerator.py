"""Device, processes and precision of a run: one `Accelerator`, checked against the request to the launcher."""

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

# Shorter than half an hour, which the other ranks would lose when a rank has exited. Long work of rank 0 alone (text,
# samples, the last checkpoint, the export) does not count: the others wait for it at the store. In a collective they
# wait for an update, for the slowest rank to load the model, and for rank 0 if a save has to wait for the save before
# it. Longer than the watchdog's five minutes, because its stacks tell more than the error of a collective.
_COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)

PrecisionSource = Literal["option", "launcher", "device", "checkpoint"]


@dataclass
class Compute:
    """Device, processes and precision of a run.

    Attributes:
        accelerator: provides autocast, the loss scaler and DDP; a change of the precision replaces it by a new one.
        world: the processes of the run, and the device of this process.
        precision_source: what chose the precision: option, launcher, device or checkpoint.
    """

    accelerator: Accelerator
    world: World
    precision_source: PrecisionSource = "option"

    @property
    def precision(self) -> str:
        """Precision of the forward and backward pass: no (fp32), bf16 or fp16."""
        return str(self.accelerator.mixed_precision)

    def use_checkpoint_precision(self, precision: str | None) -> None:
        """Use the precision of a checkpoint, unless the option or the launcher set one; call before a model is built.

        Args:
            precision: no, bf16 or fp16; None if there is no checkpoint.

        Raises:
            UserError: the device does not support the precision.
        """
        if precision is None or precision == self.precision:
            return
        if self.precision_source in ("option", "launcher"):
            log.warning(
                "the checkpoint was made in %s, this run uses %s", _name_of(precision), self._describe_precision()
            )
            return
        _refuse_unsupported(precision, on_cpu=self.world.device.type == "cpu")
        log.info(
            "precision: %s, as the checkpoint's; auto would choose %s on this device; --mixed_precision sets another",
            _name_of(precision),
            _name_of(self.precision),
        )
        self._change_precision(precision)
        self.precision_source = "checkpoint"

    def agree_on_precision(self) -> None:
        """Use the precision that rank 0 chose, on all ranks: nodes may have devices of several kinds."""
        if self.precision_source == "device":
            precision = self.world.broadcast(self.precision)
            if precision != self.precision:
                self._change_precision(precision)

    def _change_precision(self, precision: str) -> None:
        AcceleratorState._reset_state()  # keeps the process group
        self.accelerator = _build_accelerator(precision, on_cpu=self.world.device.type == "cpu")

    def release(self) -> None:
        """Free the model and destroy the process group; this process cannot train after that.

        The order matters. If DDP's reducer were freed after the process group was destroyed, it would hold the last
        reference to it, and would join gloo's threads without releasing the GIL that they wait for.
        """
        self.accelerator.free_memory()
        unfreeze_heap()
        gc.collect()  # DDP is part of a reference cycle, which only the garbage collector frees
        if dist.is_initialized():
            dist.destroy_process_group()

    def __str__(self) -> str:
        """Return one log line: device, processes, precision."""
        device = self.world.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        processes = "1 process" if self.world.size == 1 else f"{self.world.size} processes"
        threads = f" of {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        return f"device: {name}, {processes}{threads}, {self._describe_precision()}"

    def _describe_precision(self) -> str:
        """Return the precision, and what chose it unless that is the option."""
        native = "native" if self.precision == "bf16" else "no native bf16"
        sources = {
            "launcher": " (the launcher's)",
            "device": f" (auto: {native} here)",
            "checkpoint": " (the checkpoint's)",
        }
        return _name_of(self.precision) + sources.get(self.precision_source, "")


def start_compute(options: TrainingOptions) -> Compute:
    """Choose the device, create the process group, and choose the precision.

    Without an accelerator, several processes form a process group over gloo.

    Raises:
        UserError: the processes do not form the world that the launcher was asked for, or the device does not support
            the requested precision.
    """
    _refuse_single_process()
    _refuse_other_engines(options)
    # The process may contain the state of an earlier run (a notebook, a test).
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    on_cpu = options.use_cpu or not _has_accelerator()
    precision, precision_source = _choose_precision(options.mixed_precision, on_cpu=on_cpu)
    if options.full_determinism:
        # cuBLAS reads this variable when its handle is created, before the first matrix product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    accelerator = _build_accelerator(precision, on_cpu=on_cpu)
    world = World(
        rank=accelerator.process_index,
        size=accelerator.num_processes,
        local_rank=max(accelerator.local_process_index, 0),
        device=accelerator.device,
    )
    if launched_size() != world.size:
        raise UserError(
            f"the launcher started {launched_size()} processes but they form a world of {world.size}: "
            "each would train and write its own copy of the model; start them with torchrun or accelerate launch"
        )
    if on_cpu:
        use_free_cores(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        keep_freed_memory()
    if world.device.type == "cuda":
        # Products of fp32 matrices in TF32 are eight times as fast, and have three digits less.
        torch.set_float32_matmul_precision("highest" if options.full_determinism else "high")
    # Each node has one process with local rank 0; no environment variable has the number of nodes under every launcher.
    num_nodes = int(world.all_reduce_sum(torch.tensor(int(world.local_rank == 0), device=world.device)))
    compute = Compute(accelerator, replace(world, num_nodes=num_nodes), precision_source)
    compute.agree_on_precision()
    return compute


def restore_process() -> None:
    """Undo the settings that a run, even a failed one, made in its process, which continues in a notebook."""
    unfreeze_heap()
    return_freed_memory()


def _build_accelerator(precision: str, *, on_cpu: bool) -> Accelerator:
    return Accelerator(
        cpu=on_cpu,
        mixed_precision=precision,
        # The updater accumulates; with a number from the launcher's environment, Accelerate would divide the gradients.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        # The buffers of these models never change: DDP need not broadcast them in every forward pass.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=_COLLECTIVE_TIMEOUT),
        ],
    )


def _has_accelerator() -> bool:
    return bool(torch.accelerator.is_available())


def _choose_precision(requested: str, *, on_cpu: bool) -> tuple[str, PrecisionSource]:
    """Return the precision and its source: the option, else `accelerate launch`, else the device."""
    # accelerate launch sets `no` if the user did not choose.
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if requested != "auto":
        _refuse_unsupported(requested, on_cpu=on_cpu)
        return requested, "option"
    if launcher in ("bf16", "fp16"):
        _refuse_unsupported(launcher, on_cpu=on_cpu)
        return launcher, "launcher"
    device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()
    return "bf16" if device is not None and multiplies_bf16(device) else "no", "device"


def _refuse_unsupported(precision: str, *, on_cpu: bool) -> None:
    if precision == "fp16" and on_cpu:
        raise UserError("--mixed_precision fp16 needs an accelerator: no CPU multiplies fp16 natively; use bf16 or no")
    if precision == "bf16" and not on_cpu and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise UserError(f"--mixed_precision bf16 is not supported by {torch.cuda.get_device_name()}; use fp16 or no")


def _name_of(precision: str) -> str:
    return "fp32" if precision == "no" else precision


def _refuse_other_engines(options: TrainingOptions) -> None:
    """Refuse what `accelerate launch` was asked for and this package does not support, instead of ignoring it."""
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise UserError(
                f"accelerate launch asks for {name}, which is not supported yet; launch with --multi_gpu or torchrun"
            )
    if options.mixed_precision == "auto" and os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp8":
        raise UserError("accelerate launch asks for fp8, which changes nothing in GPT-2's Conv1D blocks; use bf16")


def _refuse_single_process() -> None:
    """Refuse `accelerate launch --cpu --num_processes 2`, which starts one process without a warning."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "accelerate launch was asked for several processes and started one, as it does on a CPU; "
            "use torchrun --nproc_per_node 2 -m llm.trainers.gpt ..., which needs no accelerator"
        )
