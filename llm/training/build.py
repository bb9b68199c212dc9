"""The model and the updater that the options describe, for a run and for its benchmark."""

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
from llm.training.updaters.base import Updater
from llm.training.updaters.kfac_pytorch import KfacPytorchPreconditioner
from llm.training.updaters.preconditioning import KfacPreconditioner, NoPreconditioner, Preconditioner
from llm.training.updaters.synchronous import SynchronousUpdater

log = logging.getLogger(__name__)


def build_language_model(
    options: Options,
    model_options: ModelOptions,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    compute: Compute,
    plan: Plan,
) -> LanguageModel:
    """Build the model on the CPU; random weights are drawn from torch's global generator.

    Args:
        options: of the run.
        model_options: name the model that the run starts from: those of the options, or a checkpoint's.
        config: of the model.
        tokenizer: the embeddings are resized to its length; None leaves them as they are.
        compute: where the model will be trained.
        plan: of the run: compiling pays in a long one.

    Raises:
        UserError: as `build_model`, or the model cannot keep documents apart although `--document_mask` asks for it.
    """
    model, origin = build_model(model_options, config, tokenizer)
    log_weights(model, origin)
    return prepare_language_model(model, options, compute, plan, keep_attention=model_options.attn_implementation)


def log_weights(model: PreTrainedModel, origin: str) -> None:
    """Log where the weights of a model come from, and how many parameters it has."""
    log.info("weights: %s (%s parameters)", origin, f"{model.num_parameters():,}")


def prepare_language_model(
    model: PreTrainedModel, options: Options, compute: Compute, plan: Plan, *, keep_attention: str | None = None
) -> LanguageModel:
    """Put a model together with its loss, and choose its attention, activations and compilation.

    Args:
        model: on the CPU; it is changed in place.
        options: of the run.
        compute: where the model will be trained.
        plan: of the run.
        keep_attention: the attention implementation that the user named; None lets this function choose.

    Raises:
        UserError: the model cannot keep documents apart although `--document_mask` asks for it.
    """
    device = compute.world.device
    fuse_gelu(model)
    if keep_attention is None:
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
    compute: Compute,
    language_model: LanguageModel,
    schedule: Callable[[int], float],
    plan: Plan,
) -> Updater:
    """Build what makes the updates of a plan, and move the model to its device.

    Args:
        options: of the run.
        compute: device, ranks and precision.
        language_model: on the CPU.
        schedule: maps update k (0-based) to the share of its peak that every learning rate has.
        plan: of the run.
    """
    # On the device before the optimizer and the preconditioner see the model.
    wrapped = compute.accelerator.prepare_model(language_model)
    for name, prefix in unused_prefixes(options.optimizer.optim).items():
        _warn_about_unused(options.optimizer, prefix, f"--optim {name}")
    optimizer = build_optimizer(language_model.model, options.optimizer)
    return SynchronousUpdater(
        compute=compute,
        model=language_model,
        wrapped=wrapped,
        optimizer=optimizer,
        schedule=schedule,
        max_grad_norm=options.optimizer.max_grad_norm,
        seed=plan.seed,
        preconditioner=_build_preconditioner(options, language_model.model, optimizer, compute, plan),
    )


def _build_preconditioner(
    options: Options, model: PreTrainedModel, optimizer: torch.optim.Optimizer, compute: Compute, plan: Plan
) -> Preconditioner:
    kfac = options.kfac
    if not kfac.kfac:
        _warn_about_unused(kfac, "kfac_", "--kfac")
        return NoPreconditioner()
    spec = OPTIMIZERS[options.optimizer.optim]
    if spec.kfac_warning is not None:
        log.warning("--optim %s with --kfac: %s", spec.name, spec.kfac_warning)

    def learning_rate() -> float:
        # By index, each time: loading an optimizer's state replaces its groups.
        return float(optimizer.param_groups[spec.main_group]["lr"])

    if kfac.kfac_backend == "kfac-pytorch":
        return KfacPytorchPreconditioner(
            model,
            kfac,
            learning_rate=learning_rate,
            accumulation=plan.accumulation,
            scaler=compute.accelerator.scaler,
        )
    return KfacPreconditioner(
        model,
        kfac,
        learning_rate=learning_rate,
        accumulation=plan.accumulation,
        tokens_per_step=plan.tokens_per_step,
    )


def _warn_about_unused(options: OptionGroup, prefix: str, needed: str) -> None:
    """Name the options with this prefix that were given, although nothing reads them without `needed`."""
    unused = [
        f"--{name}"
        for name, value in options
        if name.startswith(prefix) and value != type(options).model_fields[name].get_default()
    ]
    if unused:
        log.warning("%s: of no use without %s", ", ".join(unused), needed)
