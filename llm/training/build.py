"""What is trained and what trains it, as the options say; the same for a run and for its measurement."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm.config.option import OptionGroup
from llm.config.options import ModelOptions, Options
from llm.models.activations import fuse_gelu
from llm.models.attention import use_causal_attention
from llm.models.build import build_model
from llm.models.compile import compile_training
from llm.models.document_mask import require_document_mask
from llm.models.language_model import LanguageModel
from llm.optim.registry import OPTIMIZERS, build_optimizer, unused_prefixes
from llm.training.accelerator import Compute
from llm.training.plan import Plan
from llm.training.updaters.kfac_pytorch import KfacPytorchPreconditioner
from llm.training.updaters.preconditioning import KfacPreconditioner, NoPreconditioner, Preconditioner
from llm.training.updaters.synchronous import SynchronousUpdater

log = logging.getLogger(__name__)


def build_language_model(
    options: Options,
    named: ModelOptions,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    machine: Compute,
    plan: Plan,
) -> LanguageModel:
    """The module that is trained, on the CPU; random weights are drawn from torch's global generator.

    Args:
        options: of the run.
        named: the model that it starts from: that of the options, or a checkpoint's.
        config: of the model.
        tokenizer: the tables of embeddings get its length; None leaves them as they are.
        machine: where it will be trained.
        plan: of the run: compiling pays in a long one.

    Raises:
        UserError: as `build_model`, or a model that cannot keep documents apart though it is to.
    """
    model, origin = build_model(named, config, tokenizer)
    log.info("weights: %s (%s parameters)", origin, f"{model.num_parameters():,}")
    device = machine.world.device
    fuse_gelu(model)
    if named.attn_implementation is None:
        use_causal_attention(model)
    if options.data.document_mask:
        require_document_mask(model, device)
    language_model = LanguageModel(model)
    compile_training(
        language_model,
        options.training.torch_compile,
        device=device,
        num_steps=plan.num_steps,
        accumulates=plan.accumulation > 1,
    )
    return language_model


def build_updater(
    options: Options,
    machine: Compute,
    language_model: LanguageModel,
    schedule: Callable[[int], float],
    plan: Plan,
) -> SynchronousUpdater:
    """What makes the updates of a plan; the model goes to its device."""
    # On the device before the optimizer and the preconditioner see it.
    wrapped = machine.accelerator.prepare_model(language_model)
    for name, prefix in unused_prefixes(options.optimizer.optim).items():
        _name_useless(options.optimizer, prefix, f"--optim {name}")
    optimizer = build_optimizer(language_model.model, options.optimizer)
    return SynchronousUpdater(
        machine=machine,
        model=wrapped,
        optimizer=optimizer,
        schedule=schedule,
        max_grad_norm=options.optimizer.max_grad_norm,
        seed=plan.seed,
        preconditioning=_preconditioning(options, language_model.model, optimizer, machine, plan),
    )


def _preconditioning(
    options: Options, model: PreTrainedModel, optimizer: torch.optim.Optimizer, machine: Compute, plan: Plan
) -> Preconditioner:
    kfac = options.kfac
    if not kfac.kfac:
        _name_useless(kfac, "kfac_", "--kfac")
        return NoPreconditioner()
    spec = OPTIMIZERS[options.optimizer.optim]

    def rate() -> float:
        # By index, each time: loading an optimizer's state replaces its groups.
        return float(optimizer.param_groups[spec.main_group]["lr"])

    made: Preconditioner
    if kfac.kfac_backend == "kfac-pytorch":
        made = KfacPytorchPreconditioner(
            model, kfac, rate=rate, accumulation=plan.accumulation, scaler=machine.accelerator.scaler
        )
    else:
        made = KfacPreconditioner(model, kfac, rate=rate, accumulation=plan.accumulation)
    for line in made.lines(plan.tokens_per_step):
        log.info("%s", line)
    if spec.kfac_warning is not None:
        log.warning("--optim %s with --kfac: %s", spec.name, spec.kfac_warning)
    return made


def _name_useless(options: OptionGroup, prefix: str, needed: str) -> None:
    """Says which options of that prefix were given although nobody reads them without another one."""
    unused = [
        f"--{name}"
        for name, value in options
        if name.startswith(prefix) and value != type(options).model_fields[name].get_default()
    ]
    if unused:
        log.warning("%s: of no use without %s", ", ".join(unused), needed)
