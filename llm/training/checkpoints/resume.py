"""Where a run starts: from scratch, or from a checkpoint, and whether that checkpoint belongs to this run."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from llm.config.errors import UserError
from llm.config.options import ModelOptions, Options
from llm.data.dataset import TokenizedDataset
from llm.training.checkpoints.external import ExternalCheckpoint
from llm.training.checkpoints.layout import saved_steps
from llm.training.checkpoints.store import Checkpoint, find_checkpoint
from llm.training.plan import Plan, choose_seed
from llm.training.state import TrainState
from llm.training.updaters.base import Updater

log = logging.getLogger(__name__)

# Two starts of one run must agree in these; the option decides each. A run may continue with another number of
# ranks, or another split of the global batch.
_MUST_AGREE = {
    "seed": "--seed",
    "block_size": "--block_size",
    "global_batch": "--global_batch_size",
    "document_mask": "--document_mask",
}


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        checkpoint: a verified checkpoint, or None for a fresh run; that of another program holds less.
        seed: seeds the order of the blocks and everything random.
        model: the model's options; in a resumed run they name the checkpoint, which is a model's folder.
    """

    checkpoint: Checkpoint | ExternalCheckpoint | None
    seed: int
    model: ModelOptions

    @property
    def precision(self) -> str | None:
        """The precision that the checkpoint was trained in; None if it does not say."""
        if not isinstance(self.checkpoint, Checkpoint):
            return None
        # Checkpoints older than --mixed_precision auto were made with the default of that time.
        return str(self.checkpoint.state.get("mixed_precision", "no"))

    def with_global_batch(self, options: Options) -> Options:
        """Return the options with the checkpoint's global batch unless they name one, so that updates stay the same."""
        training = options.training
        if not isinstance(self.checkpoint, Checkpoint) or training.global_batch_size is not None:
            return options
        global_batch = int(self.checkpoint.state["plan"]["global_batch"])
        training = training.model_copy(update={"global_batch_size": global_batch})
        return options.model_copy(update={"training": training})

    def dataset_revision(self, dataset_name: str | None) -> str | None:
        """Return the commit of the Hub dataset `dataset_name` that the checkpoint was made on; None if it has none."""
        if not isinstance(self.checkpoint, Checkpoint):
            return None
        name, _, revision = str(self.checkpoint.state["identity"].get("revision", "")).rpartition("@")
        return revision if name == dataset_name else None

    def check(self, plan: Plan, dataset: TokenizedDataset) -> None:
        """Refuse to continue another run under this one's name, before any weight is loaded.

        Raises:
            UserError: the checkpoint was made with another text, tokenizer or order than this run's.
        """
        if self.checkpoint is None:
            return
        if isinstance(self.checkpoint, Checkpoint):
            _check_identity(self.checkpoint, plan, dataset)
        if self.checkpoint.step > plan.num_steps:
            raise UserError(
                f"checkpoint {self.checkpoint.path} is at step {self.checkpoint.step}, beyond the {plan.num_steps} of "
                "this run"
            )

    def load_weights(self, model: PreTrainedModel) -> None:
        """Load weights that `from_pretrained` could not: those of another program's checkpoint without a configuration.

        Raises:
            UserError: the weights belong to another model, or the file is damaged or refused.
        """
        if isinstance(self.checkpoint, ExternalCheckpoint):
            self.checkpoint.load_weights(model)

    def resume(self, updater: Updater) -> TrainState:
        """Restore the updater's state, on all ranks together, and return the run's counters.

        Raises:
            UserError: the checkpoint belongs to another optimizer.
        """
        if self.checkpoint is None:
            return TrainState()
        try:
            if isinstance(self.checkpoint, ExternalCheckpoint):
                self.checkpoint.load(updater)
                return TrainState(step=self.checkpoint.step)
            updater.load(self.checkpoint.updater_state())
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(
                f"checkpoint {self.checkpoint.path} holds the state of another model, --optim or --kfac ({error})"
            ) from error
        log.info("resumed from step %d (%s)", self.checkpoint.step, self.checkpoint.path)
        return TrainState.from_json(self.checkpoint.state["progress"])


def as_restarted(options: Options, checkpoints: Path) -> Options:
    """Return the options for a start that torchrun makes again because a process died: it continues the run.

    Then `--overwrite_output_dir` removes nothing, and a checkpoint named by its path counts only until the run has
    a checkpoint of its own.

    Args:
        options: as the user gave them.
        checkpoints: the folder that holds the run's checkpoints.
    """
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if count == "0":
        return options
    log.info("started again by torchrun (%s): as with --resume_from_checkpoint", count)
    requested = not saved_steps(checkpoints) and options.output.resume_from_checkpoint
    output = options.output.model_copy(
        update={"resume_from_checkpoint": requested or True, "overwrite_output_dir": False}
    )
    return options.model_copy(update={"output": output})


def choose_start(options: Options, checkpoints: Path | None) -> Start:
    """Return where the run starts: from the verified checkpoint of `--resume_from_checkpoint`, or from scratch.

    A run starts from scratch if the option names no checkpoint, or none was saved yet.

    Args:
        options: of the run.
        checkpoints: the folder that holds the run's checkpoints; None where nothing is kept.

    Raises:
        UserError: a checkpoint that the option requires is missing or damaged.
    """
    requested = options.output.resume_from_checkpoint
    checkpoint = find_checkpoint(requested, checkpoints)
    if checkpoint is None:
        if requested:
            log.info("resume: no checkpoint yet, a fresh run")
        return Start(None, choose_seed(options.training.seed), options.model)
    if isinstance(checkpoint, ExternalCheckpoint):
        return Start(checkpoint, choose_seed(options.training.seed), checkpoint.model_options(options.model))
    seed = options.training.seed
    if seed is None:
        seed = int(checkpoint.state["plan"]["seed"])
    # The checkpoint's own configuration too: its embeddings may have been resized to the tokenizer.
    folder_options = {"model_name_or_path": str(checkpoint.path), "config_name": None, "config_overrides": None}
    return Start(checkpoint, seed, options.model.model_copy(update=folder_options))


def _check_identity(checkpoint: Checkpoint, plan: Plan, dataset: TokenizedDataset) -> None:
    """Refuse a checkpoint that does not share what two starts of one run must share."""
    # Checkpoints older than --document_mask were made without one.
    saved_plan = {"document_mask": False} | checkpoint.state["plan"]
    for name, option in _MUST_AGREE.items():
        if saved_plan[name] != getattr(plan, name):
            raise UserError(
                f"checkpoint {checkpoint.path} was made with {option} {saved_plan[name]}, this run has "
                f"{getattr(plan, name)}: use the same, or start another run"
            )
    if checkpoint.state["identity"] != dataset.identity():
        raise UserError(
            f"checkpoint {checkpoint.path} was made on other text or with another tokenizer than this run's"
        )
    if saved_plan["num_steps"] != plan.num_steps:
        log.warning(
            "the run had %d updates and has %d now: its learning rates follow the new number",
            saved_plan["num_steps"],
            plan.num_steps,
        )
