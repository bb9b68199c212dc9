"""Compiling of training with torch.compile: whether it saves time, whether it works here, and what is compiled."""

from __future__ import annotations

import logging
import math
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from llm.config.errors import first_line
from llm.models.language_model import LanguageModel

log = logging.getLogger(__name__)

CompileMode = bool | Literal["auto", "blocks", "cudagraphs", "max-autotune"]

# Values of `mode` in torch.compile.
_TORCH_MODES = {"cudagraphs": "reduce-overhead", "max-autotune": "max-autotune"}
_TORCH_MODES_WITHOUT_CUDA_GRAPHS = {"max-autotune": "max-autotune-no-cudagraphs"}

# "auto" compiles on a device type from this number of steps, and up to this number of parameters.
# Measured on a CPU: compiling takes 15 to 25 s on one core. Steps are then 1.10 to 1.18 times as fast for a 4 x 128
# model and 1.04 to 1.08 times for a 6 x 384 model (11 M parameters), in native bf16 1.31 and 1.12 times. This repays
# the compiling after about 1,500 and 150 steps, or later if other work slows down the compiler. GPT-2 124M is 0.93
# times as fast, in native bf16 1.02 times: its matrix products leave nothing to gain.
# The numbers for CUDA are an estimate; they were not measured.
_MIN_STEPS = {"cpu": 10_000, "cuda": 2_000}
_MAX_PARAMETERS = {"cpu": 50_000_000}


def compile_training(
    language_model: LanguageModel,
    mode: CompileMode,
    *,
    device: torch.device,
    num_steps: int,
    accumulates: bool = False,
) -> bool:
    """Prepare the forward and backward pass of training for compilation, in place.

    The compiler runs in the first step. All micro-batches of a run have the same shape, so there is one graph.
    Evaluations and samples, whose shapes change, are not compiled.

    Args:
        language_model: the model to train.
        mode: True: compile the whole model. False: compile nothing. "blocks": compile each layer on its own, which
            starts sooner. "cudagraphs": the whole model as CUDA graphs, which saves the CPU the kernel launches.
            "max-autotune": the same, with kernels chosen by trying. "auto": True or False, whichever is expected
            to be faster.
        device: device of the training.
        num_steps: number of steps of the run.
        accumulates: whether a step has several micro-batches. "max-autotune" then uses no CUDA graphs, because each
            micro-batch would overwrite the gradients of the one before.

    Returns:
        Whether the model will be compiled.
    """
    if mode is False:
        return False
    if mode == "auto" and not _is_worthwhile(device, num_steps, language_model.model.num_parameters()):
        return False
    if reason := _compiler_error(device):
        log.info("torch_compile: not compiled, because no compiler works on this machine (%s)", reason)
        return False
    if mode == "blocks":
        for layer in layers_of(language_model.model):
            layer.compile(dynamic=False)
        compiled = "each layer"
    else:
        torch_modes = _TORCH_MODES | _TORCH_MODES_WITHOUT_CUDA_GRAPHS if accumulates else _TORCH_MODES
        language_model.compile(dynamic=False, mode=torch_modes.get(str(mode)))
        compiled = f"the whole model ({mode})" if mode in _TORCH_MODES else "the whole model"
    log.info("torch_compile: %s will be compiled in the first step", compiled)
    return True


def is_compiled(language_model: LanguageModel) -> bool:
    """Return whether `compile_training` compiles the model or its layers."""
    return language_model.is_compiled or any(
        module._compiled_call_impl is not None for module in language_model.modules()
    )


def _is_worthwhile(device: torch.device, num_steps: int, num_parameters: int) -> bool:
    """Whether compiling is expected to save more time over the run than it takes."""
    min_steps = _MIN_STEPS.get(device.type, math.inf)
    max_parameters = _MAX_PARAMETERS.get(device.type, math.inf)
    return num_steps >= min_steps and num_parameters <= max_parameters


def _compiler_error(device: torch.device) -> str | None:
    """First line of the error when a tiny function is compiled; None if compiling works.

    Common causes are a missing C++ compiler, missing Python headers or a missing Triton.
    """

    def square_plus_one(x: torch.Tensor) -> torch.Tensor:
        return x * x + 1

    try:
        with torch._inductor.config.patch(force_disable_caches=True):
            torch.compile(square_plus_one, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # its type depends on what is missing
        return first_line(error)
    return None


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the list of the model's transformer layers.

    Raises:
        ValueError: the model has no list with `num_hidden_layers` modules.
    """
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise ValueError(f"{model.config.model_type}: found no ModuleList with num_hidden_layers = {num_layers} modules")
