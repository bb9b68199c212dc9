"""The K-FAC of an installed kfac-pytorch, for those who compare."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm.config.errors import UserError
from llm.config.options import KfacOptions
from llm.training.updaters.preconditioning import head_in_chunks, norm_of, update_intervals

log = logging.getLogger(__name__)

_MODULE = "kfac.preconditioner"


class KfacPytorchPreconditioner:
    """kfac-pytorch's preconditioner, after complete gradients as ours is.

    Source: https://github.com/gpauloski/kfac-pytorch, whose package is called `kfac`, version 0.4.

    Args:
        model: what is trained, on its device.
        options: of K-FAC; what is not given is kfac-pytorch's own default.
        rate: the learning rate of the update that is being made.
        accumulation: backward passes an update.
        scaler: of fp16.

    Raises:
        UserError: it is not installed, or has nothing to take in this model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        options: KfacOptions,
        *,
        rate: Callable[[], float],
        accumulation: int,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        if any(type(module).__name__ == "Conv1D" for module in model.modules()):
            raise UserError(
                "--kfac_backend kfac-pytorch knows Linear layers, and the blocks of this model are Conv1D, of which it "
                "would take none without a word; use --kfac_backend llm"
            )
        # By their whole names: it takes expressions, as ours does.
        skipped = [*(options.kfac_skip_layers or ()), *head_in_chunks(model), *(f"^{n}$" for n in _shared(model))]
        if not _is_left(model, skipped):
            raise UserError("--kfac_backend kfac-pytorch has no Linear layer to precondition in this model")
        given = {"damping": options.kfac_damping, "kl_clip": options.kfac_kl_clip}
        self._kfac = _imported()(
            model,
            factor_update_steps=options.kfac_factor_update_steps,
            inv_update_steps=options.kfac_inv_update_steps,
            factor_decay=options.kfac_factor_decay,
            # It divides by the rate, which a schedule may begin at zero.
            lr=lambda _: max(rate(), 1e-12),
            accumulation_steps=accumulation,
            compute_method=options.kfac_method,
            grad_scaler=None if scaler is None else scaler.get_scale,
            skip_layers=skipped,
            factor_dtype=torch.float32,
            # Else a bad update would be in the factors before anybody knows.
            update_factors_in_hook=False,
            **{name: value for name, value in given.items() if value is not None},
        )
        self._parameters = list(model.parameters())
        self.rhythm = update_intervals(options)

    def apply(self, grad_norm: Tensor, *, num_tokens: Tensor, loss_scale: Tensor) -> Tensor:
        """Preconditions; its KL-clip changes the norm."""
        self._kfac.step()
        return norm_of(self._parameters)

    def discard(self) -> None:
        """Forgets what its hooks saved."""
        self._kfac.reset_batch()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The factors, which all ranks have; it keeps no inverses, so that a resumed run is not the same to the bit."""
        found = self._kfac.state_dict()
        tensors = {
            f"{layer}/{name}": tensor.detach()
            for layer, factors in found["layers"].items()
            for name, tensor in factors.items()
            if tensor is not None
        }
        return tensors, {"steps": found["steps"]}

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Takes back the factors; their inverses are computed anew."""
        if not numbers:
            log.warning("the checkpoint holds no state of K-FAC: its factors start anew here")
            return
        if "steps" not in numbers:
            raise ValueError("it holds the K-FAC of another --kfac_backend")
        layers: dict[str, dict[str, Tensor | None]] = {}
        for path, tensor in tensors.items():
            layer, name = path.rsplit("/", 1)
            layers.setdefault(layer, {"A": None, "G": None})[name] = tensor
        self._kfac.load_state_dict({"steps": numbers["steps"], "layers": layers})

    def lines(self, tokens_per_step: int) -> list[str]:
        """Whose it is; it says nothing of its cost."""
        return ["K-FAC: that of kfac-pytorch, with its own formulas; a resumed run computes its inverses anew"]

    def closing_lines(self) -> list[str]:
        """None."""
        return []

    def newest_seconds(self, num_updates: int) -> float | None:
        """It is not measured."""
        return None


def _imported() -> Callable[..., Any]:
    try:
        made: Callable[..., Any] = importlib.import_module(_MODULE).KFACPreconditioner
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"--kfac_backend kfac-pytorch is not installed here ({error}); install it from "
            "git+https://github.com/gpauloski/kfac-pytorch, or use --kfac_backend llm"
        ) from error
    return made


def _is_left(model: nn.Module, skipped: list[str]) -> bool:
    """Whether there is a linear layer that no expression names."""
    words = [(name, type(module).__name__) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return any(not any(re.search(each, word) for each in skipped for word in pair) for pair in words)


def _shared(model: nn.Module) -> list[str]:
    """Names of the linear layers whose weight another module has too: a tied head."""
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and users[id(module.weight)] > 1
    ]
