"""The optimizers that a run can use: one row for each value of `--optim`.

To add an optimizer, add its row to `OPTIMIZERS` and its name to the `Literal` of `OptimizerOptions.optim` in
llm/config/options.py. Options that it alone reads share a prefix, as `muon_` of `muon_momentum`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from llm.config.errors import UserError
from llm.config.options import OptimizerOptions
from llm.optim.groups import Groups, hidden_matrices, muon_groups, parameter_groups
from llm.optim.muon import Muon, MuonWithAdamW

# Devices with one kernel for a whole step; the optimizer's state is the same without it.
_FUSED_DEVICES = ("cuda", "cpu", "mps", "xpu")


@dataclass(frozen=True)
class OptimizerSpec:
    """How an optimizer is built, and the facts about it that other parts of the program need.

    Attributes:
        name: the value of `--optim`.
        optimizer_class: the class that `build` returns; checkpoints store its name.
        build: `(model, options) -> optimizer`. Its groups hold `param_names`, and `defaults["lr"]` is the peak rate of
            the main group.
        count_states: the number of fp32 values that the optimizer keeps for all parameters of a model, which may be on
            the meta device; `--dry_run` and the check of the free disk space use it.
        main_group: index in `param_groups` of the group whose learning rate is the run's.
        option_prefix: prefix of the options that only this optimizer reads; empty if there are none.
        other_rates: peak rates beside `--learning_rate`: what each is the rate of -> the name of its option.
        external_state: names of the tensors that the optimizer keeps for a parameter, in the checkpoints of other
            programs; empty if those cannot be loaded.
        kfac_warning: why `--kfac` is of limited use with this optimizer; None if it is not.
    """

    name: str
    optimizer_class: type[Optimizer]
    build: Callable[[nn.Module, OptimizerOptions], Optimizer]
    count_states: Callable[[nn.Module], int]
    main_group: int = 0
    option_prefix: str = ""
    other_rates: Mapping[str, str] = field(default_factory=dict)
    external_state: frozenset[str] = frozenset()
    kfac_warning: str | None = None


def build_optimizer(model: nn.Module, options: OptimizerOptions) -> Optimizer:
    """Build the optimizer that `--optim` names over the model's parameters, on the devices where they are now.

    Each group holds `initial_lr`, the peak that a schedule's factor multiplies, and `param_names`; the peak rate of the
    main group is `optimizer.defaults["lr"]`.

    Raises:
        ValueError: the model has no parameter to train.
        UserError: the model has no parameter that this optimizer is for.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the model has no parameter to train")
    optimizer = OPTIMIZERS[options.optim].build(model, options)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def unused_prefixes(optim: str) -> dict[str, str]:
    """The prefixes of options that `--optim OPTIM` does not read, by the name of the optimizer that reads them."""
    return {spec.name: spec.option_prefix for spec in OPTIMIZERS.values() if spec.option_prefix and spec.name != optim}


def _build_adamw(model: nn.Module, options: OptimizerOptions) -> AdamW:
    return _adamw_over(parameter_groups(model, options.weight_decay), options)


def _build_sgd(model: nn.Module, options: OptimizerOptions) -> SGD:
    groups = parameter_groups(model, options.weight_decay)
    return SGD(groups, lr=options.learning_rate, momentum=options.adam_beta1, fused=_is_fused(groups))


def _build_muon(model: nn.Module, options: OptimizerOptions) -> MuonWithAdamW:
    matrices, others = muon_groups(model, options.weight_decay)
    if not matrices:
        raise UserError(
            "--optim muon is for the weights of Linear and Conv1D inside a model's blocks, and this model trains none; "
            "use --optim adamw"
        )
    muon = Muon(matrices, lr=options.muon_learning_rate, momentum=options.muon_momentum)
    return MuonWithAdamW(muon, _adamw_over(others, options) if others else None)


def _adamw_over(groups: Groups, options: OptimizerOptions) -> AdamW:
    return AdamW(
        groups,
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        fused=_is_fused(groups),
    )


def _is_fused(groups: Groups) -> bool | None:
    """True where one kernel can make the whole step; None leaves the choice to torch."""
    parameters = [parameter for group in groups for _, parameter in group["params"]]
    return all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in parameters) or None


def _num_parameters(model: nn.Module) -> int:
    """Parameters of the model; a tied one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _num_hidden(model: nn.Module) -> int:
    """Parameters in the hidden matrices, for which Muon keeps one value each instead of AdamW's two."""
    hidden = hidden_matrices(model)
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name in hidden)


OPTIMIZERS: dict[str, OptimizerSpec] = {
    spec.name: spec
    for spec in (
        OptimizerSpec(
            name="adamw",
            optimizer_class=AdamW,
            build=_build_adamw,
            count_states=lambda model: 2 * _num_parameters(model),
            external_state=frozenset({"step", "exp_avg", "exp_avg_sq"}),
        ),
        OptimizerSpec(
            name="sgd",
            optimizer_class=SGD,
            build=_build_sgd,  # its momentum is `--adam_beta1`
            count_states=_num_parameters,
            external_state=frozenset({"momentum_buffer"}),
        ),
        OptimizerSpec(
            name="muon",
            optimizer_class=MuonWithAdamW,
            build=_build_muon,
            count_states=lambda model: 2 * _num_parameters(model) - _num_hidden(model),
            main_group=-1,  # AdamW's groups come after Muon's
            option_prefix="muon_",
            other_rates={"Muon": "muon_learning_rate"},
            kfac_warning=(
                "Muon orthogonalizes the update, which discards the scaling that K-FAC gives it; K-FAC was measured "
                "with --optim adamw only"
            ),
        ),
    )
}
"""The optimizers by their names."""
