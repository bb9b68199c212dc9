"""Adapter of an installed kfac-pytorch, for comparisons."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm.config.errors import UserError
from llm.config.options import KfacOptions
from llm.training.updaters.preconditioning import StepTiming, chunked_lm_heads, norm_of, update_intervals

log = logging.getLogger(__name__)

_MODULE = "kfac.preconditioner"


class KfacPytorchPreconditioner:
    """kfac-pytorch's preconditioner, applied to complete gradients as that of `llm.kfac` is.

    Source: https://github.com/gpauloski/kfac-pytorch, whose package is called `kfac`, version 0.4.

    Args:
        model: the trained model, on its device.
        options: options of K-FAC; those that were not given have kfac-pytorch's own defaults.
        learning_rate: returns the learning rate of the update that is being made.
        accumulation: backward passes an update.
        scaler: the loss scaler of fp16, if there is one.

    Raises:
        UserError: kfac-pytorch is not installed, or has nothing to precondition in this model.
    """

    timings: Sequence[StepTiming] | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        options: KfacOptions,
        *,
        learning_rate: Callable[[], float],
        accumulation: int,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        if any(type(module).__name__ == "Conv1D" for module in model.modules()):
            raise UserError(
                "--kfac_backend kfac-pytorch supports Linear layers only, and the blocks of this model are Conv1D: it "
                "would silently skip all of them; use --kfac_backend llm"
            )
        # kfac-pytorch takes regular expressions, as llm.kfac does: shared layers are excluded by their whole names.
        skipped = [
            *(options.kfac_skip_layers or ()),
            *chunked_lm_heads(model),
            *(f"^{name}$" for name in _layers_with_shared_weights(model)),
        ]
        if not _has_layer_left(model, skipped):
            raise UserError("--kfac_backend kfac-pytorch has no Linear layer to precondition in this model")
        defaults = {"damping": options.kfac_damping, "kl_clip": options.kfac_kl_clip}
        self._kfac = _imported()(
            model,
            factor_update_steps=options.kfac_factor_update_steps,
            inv_update_steps=options.kfac_inv_update_steps,
            factor_decay=options.kfac_factor_decay,
            # kfac-pytorch divides by the learning rate, and a schedule may begin at zero.
            lr=lambda _: max(learning_rate(), 1e-12),
            accumulation_steps=accumulation,
            compute_method=options.kfac_method,
            grad_scaler=None if scaler is None else scaler.get_scale,
            skip_layers=skipped,
            factor_dtype=torch.float32,
            # Otherwise a skipped update would already have changed the factors.
            update_factors_in_hook=False,
            **{name: value for name, value in defaults.items() if value is not None},
        )
        self._parameters = list(model.parameters())
        self.intervals = update_intervals(options)

    def precondition(self, grad_norm: Tensor, *, num_tokens: Tensor, loss_scale: Tensor) -> Tensor:
        """Precondition, and return the new norm (fp32 scalar), which kfac-pytorch's KL-clip changes."""
        self._kfac.step()
        return norm_of(self._parameters)

    def discard(self) -> None:
        """Drop what the hooks captured in the backward passes."""
        self._kfac.reset_batch()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the factors (fp32 [n, n] each), which all ranks hold.

        kfac-pytorch saves no inverses, so that a resumed run is not equal to the bit.
        """
        state = self._kfac.state_dict()
        tensors = {
            f"{layer}/{name}": tensor.detach()
            for layer, factors in state["layers"].items()
            for name, tensor in factors.items()
            if tensor is not None
        }
        return tensors, {"steps": state["steps"]}

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Restore the factors (fp32 [n, n] each); their inverses are computed again.

        Raises:
            ValueError: the state belongs to another --kfac_backend.
        """
        if not numbers:
            log.warning("the checkpoint holds no K-FAC state: the factors start from scratch")
            return
        if "steps" not in numbers:
            raise ValueError("it holds the K-FAC of another --kfac_backend")
        layers: dict[str, dict[str, Tensor | None]] = {}
        for path, tensor in tensors.items():
            layer, name = path.rsplit("/", 1)
            layers.setdefault(layer, {"A": None, "G": None})[name] = tensor
        self._kfac.load_state_dict({"steps": numbers["steps"], "layers": layers})

    def summary(self) -> list[str]:
        """Return one line that names the backend; kfac-pytorch does not report its cost."""
        return [
            "K-FAC: kfac-pytorch, with its own formulas; after a resume it computes its inverses again from the factors"
        ]


def _imported() -> Callable[..., Any]:
    try:
        preconditioner: Callable[..., Any] = importlib.import_module(_MODULE).KFACPreconditioner
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"--kfac_backend kfac-pytorch is not installed here ({error}); install it from "
            "git+https://github.com/gpauloski/kfac-pytorch, or use --kfac_backend llm"
        ) from error
    return preconditioner


def _has_layer_left(model: nn.Module, skipped: list[str]) -> bool:
    """Whether there is a linear layer that no expression matches by its name or its class."""
    layers = [(name, type(module).__name__) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return any(not any(re.search(pattern, word) for pattern in skipped for word in pair) for pair in layers)


def _layers_with_shared_weights(model: nn.Module) -> list[str]:
    """Return the names of the linear layers whose weight another module shares, such as a tied output layer."""
    num_users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            num_users[id(parameter)] = num_users.get(id(parameter), 0) + 1
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and num_users[id(module.weight)] > 1
    ]
