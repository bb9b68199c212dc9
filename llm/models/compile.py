"""Compiling the training with torch.compile: whether it pays, whether it can be done, and what of the model."""

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

Wish = bool | Literal["auto", "blocks", "cudagraphs", "max-autotune"]

# As torch.compile names them.
_MODES = {"cudagraphs": "reduce-overhead", "max-autotune": "max-autotune"}
_WITHOUT_GRAPHS = {"max-autotune": "max-autotune-no-cudagraphs"}


def compile_training(
    language_model: LanguageModel, wish: Wish, *, device: torch.device, num_steps: int, accumulates: bool = False
) -> bool:
    """Compiles the forward and backward pass of training, in place, at the first update.

    Shapes are fixed: every micro-batch of a run has the same, so that there is one graph. Evaluations and samples,
    whose shapes change, are computed as if nothing were compiled.

    Args:
        language_model: what is trained.
        wish: all of it, nothing, each layer alone (which starts sooner), or what pays; all of it as CUDA graphs,
            which take their launches off the processor, or also with kernels chosen by trying.
        device: where it trains.
        num_steps: updates of the run.
        accumulates: whether an update has several passes: without CUDA graphs then, whose gradients the next pass
            would overwrite.

    Returns:
        Whether it will be compiled.
    """
    if wish is False or (wish == "auto" and not _pays(device, num_steps, language_model.model.num_parameters())):
        return False
    if obstacle := _obstacle(device):
        log.info("torch_compile: left out, there is no working compiler (%s)", obstacle)
        return False
    if wish == "blocks":
        for layer in layers_of(language_model.model):
            layer.compile(dynamic=False)
    else:
        modes = _MODES | _WITHOUT_GRAPHS if accumulates else _MODES
        language_model.compile(dynamic=False, mode=modes.get(str(wish)))
    what = {"blocks": "each layer"}.get(str(wish), "the whole model") + (f" ({wish})" if wish in _MODES else "")
    log.info("torch_compile: %s, compiled in the first update", what)
    return True


def is_compiled(language_model: LanguageModel) -> bool:
    """Whether `compile_training` compiles it, or its layers."""
    return language_model.is_compiled or any(part._compiled_call_impl is not None for part in language_model.modules())


def _pays(device: torch.device, num_steps: int, num_parameters: int) -> bool:
    """Whether a run of so many updates of so large a model wins more than the compiling costs."""
    return num_steps >= _LONG.get(device.type, math.inf) and num_parameters <= _LARGE.get(device.type, math.inf)


# On a CPU compiling took 15 to 25 s of one core, and updates of 4 x 128 were 1.10 to 1.18 times as fast behind it,
# those of 6 x 384 (11 M parameters) 1.04 to 1.08 times: a win from about 1,500 and 150 updates on, or later where other
# work holds up the compiler; in native bf16 1.31 and 1.12 times. GPT-2 124M was 0.93 times as fast, in native bf16 1.02
# times: its products leave nothing to win. What is said of CUDA is an estimate, not measured.
_LONG = {"cpu": 10_000, "cuda": 2_000}
_LARGE = {"cpu": 50_000_000}


def _obstacle(device: torch.device) -> str | None:
    """What keeps a tiny function from being compiled: no C++ compiler, no Python headers, no Triton; None without."""

    def tiny(x: torch.Tensor) -> torch.Tensor:
        return x * x + 1

    try:
        with torch._inductor.config.patch(force_disable_caches=True):
            torch.compile(tiny, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # of many types, by what is missing
        return first_line(error)
    return None


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The layers that a model stacks.

    Raises:
        ValueError: there is no list of them.
    """
    number = model.config.get_text_config(decoder=True).num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return module
    raise ValueError(f"{model.config.model_type} has no list of its layers")
