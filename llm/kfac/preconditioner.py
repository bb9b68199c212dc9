"""The preconditioner, the part of K-FAC that a training loop calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm.kfac.assignment import Ranks, assign, refresh_offsets
from llm.kfac.capture import Capture, CaptureSwitch
from llm.kfac.decompositions import Decomposition, Eigen, Inverse
from llm.kfac.formulas import Formulas, KfacPytorchFormulas, Scalar
from llm.kfac.layer_groups import LayerGroup
from llm.kfac.layers import Layer, device_of, find_layers
from llm.kfac.packed_symmetric import share_of_product
from llm.kfac.schedule import ValueOrSchedule, is_due, is_refresh_due, steady_value, value_at
from llm.kfac.summary import Report
from llm.kfac.validation import FACTOR_UPDATE_STEPS, Default, check_arguments, kfac_pytorch_defaults


class KFACPreconditioner:
    """K-FAC: divide the gradients of linear layers by their curvature, between `backward` and the optimizer's step.

    For y = W x + b, with a = [x; 1] and g the gradient of the mean loss over n tokens: A = mean a a^T over the tokens,
    G = n * sum g g^T, each averaged over the factor updates, and the gradient D of the matrix [W, b] becomes
    Qg [(Qg^T D Qa) / (dg da^T + lambda)^power] Qa^T with lambda = damping * mean(da) * mean(dg), where
    Qa da Qa^T = A and Qg dg Qg^T = G. The result does not depend on the size of the batch, the number of ranks,
    gradient accumulation or a loss scale, provided that `step` is told `num_tokens` and `loss_scale`.

    The constructor registers forward hooks: call it after the model is on its device, and before torch.compile sees the
    first batch. With DistributedDataParallel, pass the model inside or outside the wrapper.

    Sources: Martens & Grosse 2015 (arXiv:1503.05671); Eschenhagen et al. 2023 (arXiv:2311.00636), setting "expand".

    Args:
        model: its nn.Linear and HuggingFace Conv1D layers are preconditioned, except those in `report().skipped`.
        factor_update_steps: steps between factor updates; other steps cost nothing in the model's passes. Any numeric
            argument that is a `ValueOrSchedule` may also be a callable `step -> value`. The default, `dense_early(10)`,
            has factor updates at 1, 2, 4 and 8 too, so that the early refreshes of the inverses use new factors; a
            plain 10 does not, and neither does the default with `compat`.
        inv_update_steps: steps between refreshes of the inverses; below it also at 1, 2, 4, 8, …
        stagger: from the first multiple of `inv_update_steps` on, refresh each layer in a step of its own, so that all
            steps take about as long; False: all layers at the multiples.
        damping: lambda divided by the product of the factors' mean eigenvalues.
        factor_decay: in factor update k, the old average has the weight min(factor_decay, 1 - 1/k).
        kl_clip: shorten the directions d, of all layers together, where lr^2 * (d, w) for the gradients w exceeds it;
            needs rescale=None.
        lr: learning rate, for kl_clip.
        accumulation_steps: backward passes in a step, over which `factor_tokens` are divided.
        skip_layers: regular expressions of names, or class names, of layers to skip.
        rescale: "norm": each layer's direction gets the norm of its gradient; None: no rescaling.
        power: exponent of the division; 0.5 is halfway to a whitened gradient. Only with method "eigen".
        method: "eigen", or "inverse", which damps each factor separately and costs about half.
        max_factor_dim: layers with a larger factor are skipped.
        factor_tokens: tokens of a step, on all ranks together, that a factor update uses; None: all.
        factor_dtype: dtype of the factors.
        inv_dtype: dtype of the inverses, and of the products with gradients.
        strategy: "owner": each layer is computed and stored by one rank; "replicate": by every rank.
        process_group: the ranks that train together; None: all ranks.
        compat: "kfac-pytorch": the formulas of that package: factors that start as the identity, G of the mean loss, an
            absolute damping (1e-3 if none is given), refreshes at multiples only, kl_clip (1e-3 if none is given, at an
            lr of 0.1 if none is given) and no other rescaling.

    Raises:
        ValueError: an argument is out of bounds, or the model has no layer to precondition; the message names why.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        factor_update_steps: ValueOrSchedule = FACTOR_UPDATE_STEPS,
        inv_update_steps: ValueOrSchedule = 10,
        stagger: bool = False,
        damping: ValueOrSchedule = Default(0.1),  # noqa: B008 - a constant
        factor_decay: ValueOrSchedule = 0.95,
        kl_clip: ValueOrSchedule | None = None,
        lr: ValueOrSchedule | None = None,
        accumulation_steps: int = 1,
        skip_layers: Sequence[str] | None = None,
        rescale: Literal["norm"] | None = "norm",
        power: float = 1.0,
        method: Literal["eigen", "inverse"] = "eigen",
        max_factor_dim: int = 8192,
        factor_tokens: int | None = None,
        factor_dtype: torch.dtype = torch.float32,
        inv_dtype: torch.dtype = torch.float32,
        strategy: Literal["owner", "replicate"] = "owner",
        process_group: dist.ProcessGroup | None = None,
        compat: Literal["kfac-pytorch"] | None = None,
    ) -> None:
        formulas = Formulas()
        if compat is not None:
            formulas = KfacPytorchFormulas()
            rescale = None
            factor_update_steps, damping, kl_clip, lr = kfac_pytorch_defaults(factor_update_steps, damping, kl_clip, lr)
        check_arguments(
            factor_update_steps=factor_update_steps,
            inv_update_steps=inv_update_steps,
            stagger=stagger,
            damping=damping,
            factor_decay=factor_decay,
            kl_clip=kl_clip,
            lr=lr,
            accumulation_steps=accumulation_steps,
            rescale=rescale,
            power=power,
            method=method,
            max_factor_dim=max_factor_dim,
            factor_tokens=factor_tokens,
            factor_dtype=factor_dtype,
            strategy=strategy,
            compat=compat,
        )
        self._factor_update_steps = factor_update_steps
        self._inv_update_steps = inv_update_steps
        self._stagger = stagger
        self._damping = damping
        self._factor_decay = factor_decay
        self._kl_clip = kl_clip
        self._lr = lr
        self._rescale = rescale
        self._factor_tokens = factor_tokens
        self._factor_dtype = factor_dtype
        self._replicate = strategy == "replicate"
        self._formulas = formulas
        self._decomposition: Decomposition
        if method == "eigen":
            self._decomposition = Eigen(formulas, inv_dtype, power)
        else:
            self._decomposition = Inverse(formulas, inv_dtype)
        self._layers, self._skipped = find_layers(model, skip_layers, max_factor_dim)
        self._device = device_of(self._layers)
        self._num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self._ranks = Ranks(process_group)
        self._switch = CaptureSwitch()
        num_passes = accumulation_steps * self._ranks.size
        max_rows = None if factor_tokens is None else math.ceil(factor_tokens / num_passes)
        self._groups = self._make_groups(
            lambda layer, sums: Capture(layer, self._switch, sums, row_weight=formulas.row_weight, max_rows=max_rows)
        )
        self._begin_step(0)

    @torch.no_grad()
    def step(self, *, num_tokens: Scalar | None = None, loss_scale: Scalar = 1.0) -> None:
        """Replace the gradients of a finished step by directions, in place; call it on all ranks together.

        Call it when the gradients are complete: averaged over the ranks, unscaled, and not clipped yet.

        Args:
            num_tokens: tokens in the loss of the whole step, on all ranks, a number or scalar tensor; None: as many as
                the layers saw.
            loss_scale: ratio of the loss passed to `backward` to the mean loss per token of the whole step, a number or
                scalar tensor of dtype fp32. For `(loss_sum * world_size / num_tokens).backward()` under
                DistributedDataParallel, which divides by world_size, it is world_size. A gradient scaler's scale is a
                factor of it, and so is the number of backward passes if each has the mean loss of its own micro-batch.
                While it is the same in all steps it affects lengths only, and nothing with rescale="norm".

        Raises:
            RuntimeError: a factor update is due, and no layer saw a backward pass, on any rank.
        """
        step = self._switch.step
        damping = value_at(self._damping, step)
        with torch.autocast(self._device.type, enabled=False):
            if self._switch.is_on:
                self._update_factors(value_at(self._factor_decay, step), num_tokens, loss_scale)
            for group in self._local_groups():
                group.refresh(damping, lambda offset: self._is_refresh_due(step, offset))
            self._precondition(step, damping)
        self._begin_step(step + 1)

    def discard(self) -> None:
        """Drop what the backward passes of a bad step left: no factor changes, and the step does not count."""
        for group in self._groups:
            group.discard()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that later steps depend on; call it between steps, on all ranks together.

        Returns:
            `step` (int), `formulas` (str), and copies of tensors on the CPU, named `<layer>/<name>`; the same on all
            ranks, and for any number of them.
        """
        state: dict[str, Any] = {"step": self._switch.step, "formulas": self._formulas.name}
        for group in self._groups:
            for key, stack in (group.state or group.empty_state()).items():
                if not self._replicate:
                    self._ranks.broadcast(stack, group.owner)
                for layer, tensor in zip(group.layers, stack, strict=True):
                    state[f"{layer.name}/{key}"] = tensor.to("cpu", copy=True)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned, on any number of ranks.

        Raises:
            ValueError: the state is of another model, or of other arguments; nothing was changed.
        """
        expected = {
            f"{layer.name}/{key}": shape
            for group in self._groups
            for key, (shape, _) in group.state_spec().items()
            for layer in group.layers
        }
        if "step" not in state:
            raise ValueError("the state has no key `step`: it was not made by `state_dict`")
        if state.get("formulas", self._formulas.name) != self._formulas.name:
            raise ValueError(f"the state is of {state['formulas']}'s formulas, and these are {self._formulas.name}'s")
        shapes = {name: tensor.shape for name, tensor in state.items() if name not in ("step", "formulas")}
        if wrong := sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name)):
            raise ValueError(f"the state is of another model or other K-FAC arguments: {wrong[0]} does not fit")
        for group in self._local_groups():
            for key, stack in group.state.items():
                for layer, tensor in zip(group.layers, stack, strict=True):
                    tensor.copy_(state[f"{layer.name}/{key}"])
        self.discard()
        self._begin_step(int(state["step"]))

    def report(self) -> Report:
        """Return the preconditioned and the skipped layers, the memory, and the computed cost."""
        step = self._switch.step
        local_groups = self._local_groups()
        local_layers = [layer for group in local_groups for layer in group.layers]
        owners = {
            layer.name: -1 if self._replicate else group.owner for group in self._groups for layer in group.layers
        }
        dims = [n for layer in self._layers for n in (layer.dim_a, layer.dim_g)]
        cubes = sum(layer.dim_a**3 + layer.dim_g**3 for layer in local_layers)
        products = sum(layer.dim_a * layer.dim_g * (layer.dim_a + layer.dim_g) for layer in local_layers)
        return Report(
            layers={layer.name: (layer.dim_g, layer.dim_a) for layer in self._layers},
            skipped=dict(self._skipped),
            owners={layer.name: owners[layer.name] for layer in self._layers},
            factor_bytes=sum(group.num_bytes(factors=True) for group in local_groups),
            inverse_bytes=sum(group.num_bytes(factors=False) for group in local_groups),
            capture_bytes=sum(n * (n + 1) // 2 for n in dims) * self._factor_dtype.itemsize,
            capture_flops=2 * share_of_product(self._device) * sum(n * n for n in dims),
            refresh_flops=self._decomposition.refresh_cost * cubes,
            step_flops=2 * self._decomposition.num_products * products,
            model_flops=6 * self._num_parameters,
            factor_update_steps=int(steady_value(self._factor_update_steps, step)),
            inv_update_steps=int(steady_value(self._inv_update_steps, step)),
            factor_tokens=self._factor_tokens,
            world_size=self._ranks.size,
        )

    def close(self) -> None:
        """Remove the hooks from the model; the preconditioner cannot be used afterwards."""
        self._switch.is_on = False
        for group in self._groups:
            group.discard()
            for capture in group.captures:
                capture.close()

    def _make_groups(
        self, new_capture: Callable[[Layer, Callable[[], tuple[Tensor, Tensor]]], Capture]
    ) -> list[LayerGroup]:
        """Return the layers in groups of one owner and shape, ordered by owner."""
        num_layers = len(self._layers)
        owners = [0] * num_layers if self._replicate else assign(self._layers, self._ranks.size)
        offsets = refresh_offsets(self._layers) if self._stagger else [0.0] * num_layers
        members: dict[tuple[int, int, int], list[tuple[Layer, float]]] = {}
        for owner, layer, offset in zip(owners, self._layers, offsets, strict=True):
            members.setdefault((owner, layer.dim_g, layer.dim_a), []).append((layer, offset))
        return [
            LayerGroup(
                [layer for layer, _ in pairs],
                [offset for _, offset in pairs],
                owner=owner,
                is_local=self._replicate or owner == self._ranks.rank,
                formulas=self._formulas,
                decomposition=self._decomposition,
                factor_dtype=self._factor_dtype,
                new_capture=new_capture,
            )
            for (owner, _, _), pairs in sorted(members.items(), key=lambda item: item[0])
        ]

    def _local_groups(self) -> list[LayerGroup]:
        """Return the groups that this rank computes."""
        return [group for group in self._groups if group.is_local]

    def _begin_step(self, step: int) -> None:
        """Set the step; the hooks must know before the model's passes whether a factor update is due."""
        self._switch.step = step
        self._switch.is_on = is_due(self._factor_update_steps, step)

    def _is_refresh_due(self, step: int, offset: float) -> bool:
        if self._formulas.refreshes_early:
            return is_refresh_due(self._inv_update_steps, step, offset)
        return is_due(self._inv_update_steps, step)

    def _update_factors(self, decay: float, num_tokens: Scalar | None, loss_scale: Scalar) -> None:
        """Sum what all ranks captured on the owners, which update their factors."""
        # One rank may have had no batch. All ranks learn whether any had one, so that all or none raise; otherwise some
        # ranks would wait for ever.
        has_rows = any(capture.num_rows for group in self._groups for capture in group.captures)
        num_ranks_with_rows = torch.full((), float(has_rows), device=self._device)
        self._ranks.reduce_sum(num_ranks_with_rows, None)
        if not has_rows and not num_ranks_with_rows.item():
            raise RuntimeError(
                "K-FAC saw no backward pass of this step: is the model in training mode, and was the preconditioner "
                "made before torch.compile saw the first batch?"
            )
        for group in self._groups:
            sums = group.take_sums()
            self._ranks.reduce_sum(sums, None if self._replicate else group.owner)
            if group.is_local:
                group.accumulate(sums, decay, num_tokens=num_tokens, loss_scale=loss_scale, world=self._ranks.size)

    def _precondition(self, step: int, damping: float) -> None:
        """Replace the gradients by directions: each owner computes those of its layers, then all ranks get all."""
        local_groups = self._local_groups()
        directions = []
        inner_product = torch.zeros((), device=self._device)
        for group in local_groups:
            gradients = group.read_gradients()
            norms = _norms(gradients)
            direction = self._decomposition.precondition(group.state, gradients, damping)
            if self._rescale is not None:
                direction *= norms / _norms(direction).clamp(min=torch.finfo(torch.float32).tiny)
            if self._kl_clip is not None:
                inner_product += (direction * group.read_gradients()).sum(dtype=torch.float32)
            directions.append(direction)
        if self._kl_clip is not None and self._lr is not None:
            self._clip(directions, inner_product, value_at(self._kl_clip, step), value_at(self._lr, step))
        if self._replicate or self._ranks.size == 1:
            for group, direction in zip(local_groups, directions, strict=True):
                group.write_gradients(direction)
        else:
            self._exchange(directions)

    def _clip(self, directions: list[Tensor], inner_product: Tensor, kl_clip: float, lr: float) -> None:
        """Multiply all directions by min(1, sqrt(kl_clip / |lr^2 * (d, w)|)), in place.

        Source: Ba et al. 2017, Distributed second-order optimization using Kronecker-factored approximations; in this
        form in kfac-pytorch.

        Args:
            directions: d of this rank's groups; [layers, dim_a, dim_g] of dtype `inv_dtype` each.
            inner_product: (d, w) of this rank's groups; fp32 scalar tensor, overwritten.
            kl_clip: bound.
            lr: learning rate; at 0 nothing is shortened.
        """
        if not self._replicate:
            self._ranks.reduce_sum(inner_product, None)
        allowed = kl_clip / lr**2 if lr else math.inf
        for direction in directions:
            direction *= (allowed / inner_product.abs()).sqrt().clamp(max=1)

    def _exchange(self, directions: list[Tensor]) -> None:
        """Send this rank's directions to all ranks, and write the directions of all ranks into the gradients."""
        sizes = [0] * self._ranks.size
        for group in self._groups:
            sizes[group.owner] += group.num_weights()
        empty = torch.empty(0, dtype=self._decomposition.inv_dtype, device=self._device)
        flat = torch.cat([empty, *(direction.flatten() for direction in directions)])
        gathered = self._ranks.all_gather(flat, sizes)
        for owner, owned_groups in groupby(self._groups, key=lambda group: group.owner):
            groups = list(owned_groups)
            parts = gathered[owner].split([group.num_weights() for group in groups])
            for group, part in zip(groups, parts, strict=True):
                group.write_gradients(part)


def _norms(stack: Tensor) -> Tensor:
    """Return the norm of each layer's matrix: [layers, dim_a, dim_g] -> [layers, 1, 1], float32 or better."""
    dtype = torch.promote_types(stack.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(stack, dim=(-2, -1), keepdim=True, dtype=dtype)
    return norms
