"""The preconditioner: what a training loop sees of K-FAC."""

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
from llm.kfac.decompositions import Eigen, Inverse
from llm.kfac.formulas import Count, Formulas, KfacPytorchFormulas
from llm.kfac.layer_groups import LayerGroup
from llm.kfac.layers import Layer, device_of, find_layers
from llm.kfac.packed_symmetric import share_of_product
from llm.kfac.schedule import Number, is_due, is_refresh_due, steady_value, value_at
from llm.kfac.summary import Report
from llm.kfac.validation import FACTOR_UPDATE_STEPS, Default, as_anchor, check


class KFACPreconditioner:
    """Divides the gradients of linear layers by their curvature, between `backward` and the optimizer's step.

    For y = W x + b, with a = [x; 1] and g the gradient of the mean loss over n tokens: A = mean a a^T over the tokens,
    G = n * sum g g^T, each averaged over updates, and the gradient of [W, b] becomes
    Qg [(Qg^T [W, b]' Qa) / (dg da^T + lambda)^power] Qa^T with lambda = damping * mean(da) * mean(dg). It does not
    depend on the batch's size, the number of ranks, accumulation or a loss scale, if `step` is told of them.

    It registers hooks: make it before torch.compile sees the first batch, and after the model is on its device. Where
    DistributedDataParallel is used, the model may be the one inside or outside it.

    Args:
        model: its nn.Linear and HuggingFace Conv1D layers are taken, but for those that `report().skipped` names.
        factor_update_steps: updates from one capture of the factors to the next; the updates between cost nothing in
            the model's passes. Numbers may be functions of the number of the update. The default, `dense_early(10)`,
            has captures at 1, 2, 4 and 8 too, so that the early refreshes of the inverses find something new; a plain
            10 has none, nor has compat by itself.
        inv_update_steps: updates from one refresh of the inverses to the next; below it also 1, 2, 4, 8, …
        spread: from its first multiple on, each layer is refreshed at another update, so that all take about as long;
            False: all layers at the multiples.
        damping: lambda over the product of the factors' mean eigenvalues.
        factor_decay: the k-th capture finds the average of those before it at a weight of min(factor_decay, 1 - 1/k).
        kl_clip: shortens the whole direction d, with gradient w, where lr^2 * (d, w) exceeds it; with rescale=None.
        lr: the learning rate, for kl_clip.
        accumulation_steps: backward passes an update, among which `factor_tokens` are shared out.
        skip_layers: regular expressions of names, or classes, to leave out.
        rescale: "norm": every layer's direction gets the norm of its gradient; None: nothing is rescaled.
        power: of the division; 0.5 lies halfway to a whitened gradient. Method "eigen" only.
        method: "eigen", or "inverse", which damps each factor on its own and costs about half.
        max_factor_dim: layers with a larger factor are left out.
        factor_tokens: tokens of an update, all ranks together, that the factors are made of; None: all.
        factor_dtype: of the factors.
        inv_dtype: of the inverses, and of the products with gradients.
        strategy: "owner": each layer's work and memory is one rank's; "replicate": all ranks do everything.
        process_group: the ranks that train together; None: all of them.
        compat: "kfac-pytorch": that package's formulas: factors that start as the identity, G of the mean loss, an
            absolute damping (1e-3 if none is given), inverses at multiples only, kl_clip (1e-3 if none is given, at a
            lr of 0.1) and no other rescaling.

    Raises:
        ValueError: an argument is out of bounds, or the model has no layer to take; the message names why.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        factor_update_steps: Number = FACTOR_UPDATE_STEPS,
        inv_update_steps: Number = 10,
        spread: bool = False,
        damping: Number = Default(0.1),  # noqa: B008 - a constant
        factor_decay: Number = 0.95,
        kl_clip: Number | None = None,
        lr: Number | None = None,
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
            formulas, rescale = KfacPytorchFormulas(), None
            factor_update_steps, damping, kl_clip, lr = as_anchor(factor_update_steps, damping, kl_clip, lr)
        check(locals())
        self._factor_steps, self._inv_steps, self._damping = factor_update_steps, inv_update_steps, damping
        self._decay, self._kl_clip, self._lr, self._rescale = factor_decay, kl_clip, lr, rescale
        self._formulas, self._factor_tokens, self._replicate = formulas, factor_tokens, strategy == "replicate"
        self._spread = spread
        self._layers, self._skipped = find_layers(model, skip_layers, max_factor_dim)
        self._device, self._factor_dtype = device_of(self._layers), factor_dtype
        self._num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self._ranks, self._gate = Ranks(process_group), CaptureSwitch()
        self._curvature = Eigen(formulas, inv_dtype, power) if method == "eigen" else Inverse(formulas, inv_dtype)
        shares = accumulation_steps * self._ranks.size
        max_rows = None if factor_tokens is None else math.ceil(factor_tokens / shares)
        self._groups = self._make_groups(
            lambda layer, room: Capture(layer, self._gate, room, row_weight=formulas.row_weight, max_rows=max_rows)
        )
        self._move_on(0)

    @torch.no_grad()
    def step(self, *, num_tokens: Count | None = None, loss_scale: Count = 1.0) -> None:
        """Turns the gradients of one finished update into directions, in place; on all ranks together.

        Call it when the gradients are complete: averaged over the ranks, not scaled, not clipped yet.

        Args:
            num_tokens: tokens in the loss of the whole update, on all ranks; None: as many as the layers saw.
            loss_scale: by what the loss whose `backward` was called exceeds the mean over those tokens. For
                `(loss_sum * world_size / num_tokens).backward()` under DistributedDataParallel, which divides by
                world_size, it is world_size; a gradient scaler's scale is a factor of it, and so is the number of
                backward passes where each has the mean of its own micro-batch. While it is the same in all updates
                it matters only where lengths do: not with rescale="norm".

        Raises:
            RuntimeError: the factors are due, and no layer saw a backward pass, on any rank.
        """
        step = self._gate.step
        damping = value_at(self._damping, step)
        with torch.autocast(self._device.type, enabled=False):
            if self._gate.is_open:
                self._update_factors(value_at(self._decay, step), num_tokens, loss_scale)
            for group in self._mine():
                group.refresh(damping, lambda delay: self._is_refresh_due(step, delay))
            self._precondition(step, damping)
        self._move_on(step + 1)

    def discard(self) -> None:
        """Drops what the backward passes of a bad update left; no factor changes, and the update does not count."""
        for group in self._groups:
            group.drop()

    def state_dict(self) -> dict[str, Any]:
        """All that later updates depend on; call it between updates, on all ranks together.

        Returns:
            `step` (int), `formulas` (str), and tensors on the CPU, copies, named `<layer>/<what>`; the same on all
            ranks, whatever their number.
        """
        found: dict[str, Any] = {"step": self._gate.step, "formulas": self._formulas.name}
        for group in self._groups:
            for key, stack in (group.state or group.empty_state()).items():
                if not self._replicate:
                    self._ranks.spread(stack, group.owner)
                for layer, tensor in zip(group.layers, stack, strict=True):
                    found[f"{layer.name}/{key}"] = tensor.to("cpu", copy=True)
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave, on any number of ranks.

        Raises:
            ValueError: it is of another model, or of other arguments; nothing was changed.
        """
        expected = {
            f"{layer.name}/{key}": shape
            for group in self._groups
            for key, (shape, _) in group.specification().items()
            for layer in group.layers
        }
        if "step" not in state:
            raise ValueError("the state does not say of which update it is")
        if state.get("formulas", self._formulas.name) != self._formulas.name:
            raise ValueError(f"the state is of {state['formulas']}'s formulas, and these are {self._formulas.name}'s")
        given = {name: tensor.shape for name, tensor in state.items() if name not in ("step", "formulas")}
        if wrong := sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name)):
            raise ValueError(f"the state is of another model or other K-FAC arguments: {wrong[0]} does not fit")
        for group in self._mine():
            for key, stack in group.state.items():
                for layer, tensor in zip(group.layers, stack, strict=True):
                    tensor.copy_(state[f"{layer.name}/{key}"])
        self.discard()
        self._move_on(int(state["step"]))

    def report(self) -> Report:
        """Which layers are taken and which are not, the memory, and the cost as it is computed."""
        step, mine = self._gate.step, list(self._mine())
        own = [layer for group in mine for layer in group.layers]
        owners = {
            layer.name: -1 if self._replicate else group.owner for group in self._groups for layer in group.layers
        }
        sides = [n for layer in self._layers for n in (layer.dim_a, layer.dim_g)]
        cubes = sum(layer.dim_a**3 + layer.dim_g**3 for layer in own)
        products = sum(layer.dim_a * layer.dim_g * (layer.dim_a + layer.dim_g) for layer in own)
        return Report(
            layers={layer.name: (layer.dim_g, layer.dim_a) for layer in self._layers},
            skipped=dict(self._skipped),
            owners={layer.name: owners[layer.name] for layer in self._layers},
            factor_bytes=sum(group.num_bytes(factors=True) for group in mine),
            inverse_bytes=sum(group.num_bytes(factors=False) for group in mine),
            capture_bytes=sum(n * (n + 1) // 2 for n in sides) * self._factor_dtype.itemsize,
            capture_flops=2 * share_of_product(self._device) * sum(n * n for n in sides),
            refresh_flops=self._curvature.flops_of_refresh * cubes,
            step_flops=2 * self._curvature.products * products,
            model_flops=6 * self._num_parameters,
            factor_update_steps=int(steady_value(self._factor_steps, step)),
            inv_update_steps=int(steady_value(self._inv_steps, step)),
            factor_tokens=self._factor_tokens,
            world_size=self._ranks.size,
        )

    def close(self) -> None:
        """Takes the hooks off the model; the preconditioner is of no use afterwards."""
        self._gate.is_open = False
        for group in self._groups:
            group.drop()
            for capture in group.captures:
                capture.close()

    def _make_groups(
        self, new_capture: Callable[[Layer, Callable[[], tuple[Tensor, Tensor]]], Capture]
    ) -> list[LayerGroup]:
        """The layers by owner and shape, in the order of the owners."""
        owners = [0] * len(self._layers) if self._replicate else assign(self._layers, self._ranks.size)
        waits = refresh_offsets(self._layers) if self._spread else [0.0] * len(self._layers)
        stacks: dict[tuple[int, int, int], list[tuple[Layer, float]]] = {}
        for owner, layer, delay in zip(owners, self._layers, waits, strict=True):
            stacks.setdefault((owner, layer.dim_g, layer.dim_a), []).append((layer, delay))
        return [
            LayerGroup(
                *zip(*members, strict=True),
                owner=owner,
                is_mine=self._replicate or owner == self._ranks.rank,
                formulas=self._formulas,
                curvature=self._curvature,
                factor_dtype=self._factor_dtype,
                new_capture=new_capture,
            )
            for (owner, _, _), members in sorted(stacks.items(), key=lambda item: item[0])
        ]

    def _mine(self) -> list[LayerGroup]:
        return [group for group in self._groups if group.is_mine]

    def _move_on(self, step: int) -> None:
        """To that update: the passes of the model must know beforehand whether they are captured."""
        self._gate.step, self._gate.is_open = step, is_due(self._factor_steps, step)

    def _is_refresh_due(self, step: int, delay: float) -> bool:
        if self._formulas.dense_start:
            return is_refresh_due(self._inv_steps, step, delay)
        return is_due(self._inv_steps, step)

    def _update_factors(self, decay: float, num_tokens: Count | None, loss_scale: Count) -> None:
        """Sums what all ranks captured at the owners, who blend it in."""
        # A rank alone may have had nothing to do; that none had is known to all, or some would wait for ever.
        has_rows = any(capture.rows for group in self._groups for capture in group.captures)
        seen = torch.full((), float(has_rows), device=self._device)
        self._ranks.sum_to(seen, None)
        if not has_rows and not seen.item():
            raise RuntimeError(
                "K-FAC saw no backward pass of this update: is the model in training mode, and was the preconditioner "
                "made before torch.compile saw the first batch?"
            )
        for group in self._groups:
            packed = group.pack()
            self._ranks.sum_to(packed, None if self._replicate else group.owner)
            if group.is_mine:
                group.take_in(packed, decay, num_tokens=num_tokens, loss_scale=loss_scale, world=self._ranks.size)

    def _precondition(self, step: int, damping: float) -> None:
        """Replaces the gradients: the owners compute, then everybody gets everything."""
        mine = self._mine()
        directions, products = [], torch.zeros((), device=self._device)
        for group in mine:
            gradients = group.gradients()
            norms = _norms(gradients)
            direction = self._curvature.directions(group.state, gradients, damping)
            if self._rescale is not None:
                direction *= norms / _norms(direction).clamp(min=torch.finfo(torch.float32).tiny)
            if self._kl_clip is not None:
                products += (direction * group.gradients()).sum(dtype=torch.float32)
            directions.append(direction)
        if self._kl_clip is not None and self._lr is not None:
            if not self._replicate:
                self._ranks.sum_to(products, None)
            rate = value_at(self._lr, step)
            allowed = value_at(self._kl_clip, step) / rate**2 if rate else math.inf  # no step is too long at rate 0
            for direction in directions:
                direction *= (allowed / products.abs()).sqrt().clamp(max=1)
        if self._replicate or self._ranks.size == 1:
            for group, direction in zip(mine, directions, strict=True):
                group.write(direction)
        else:
            self._exchange(directions)

    def _exchange(self, directions: list[Tensor]) -> None:
        """Sends this rank's directions to all, and takes everybody's."""
        sizes = [0] * self._ranks.size
        for group in self._groups:
            sizes[group.owner] += group.num_weights()
        empty = torch.empty(0, dtype=self._curvature.dtype, device=self._device)
        flat = torch.cat([empty, *(direction.flatten() for direction in directions)])
        gathered = self._ranks.gather(flat, sizes)
        for owner, groups in self._by_owner():
            parts = gathered[owner].split([group.num_weights() for group in groups])
            for group, part in zip(groups, parts, strict=True):
                group.write(part)

    def _by_owner(self) -> list[tuple[int, list[LayerGroup]]]:
        return [(owner, list(groups)) for owner, groups in groupby(self._groups, key=lambda group: group.owner)]


def _norms(stack: Tensor) -> Tensor:
    """Of each layer's matrix: [layers, 1, 1], float32 or better."""
    dtype = torch.promote_types(stack.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(stack, dim=(-2, -1), keepdim=True, dtype=dtype)
    return norms
