"""Where a run starts: from nothing, or from a checkpoint, and whether that checkpoint is this run's."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

from llm.config.errors import UserError
from llm.config.options import ModelOptions, Options
from llm.data.dataset import TokenizedDataset
from llm.training.checkpoints.external import ExternalCheckpoint
from llm.training.checkpoints.layout import saved_steps
from llm.training.checkpoints.store import Checkpoint, find_checkpoint
from llm.training.plan import Plan, choose_seed
from llm.training.run_dir.folder import RunDirectory
from llm.training.state import TrainState
from llm.training.updaters.synchronous import SynchronousUpdater

log = logging.getLogger(__name__)

# What two starts of one run must share, and the option that decides it. Another number of ranks, or
# another split of the global batch, is the same run.
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
        checkpoint: verified, or None for a fresh run; another program's holds less.
        seed: of the order and of everything random.
        model: the model's options; of a resumed run, pointed at the checkpoint, which is a model's folder.
    """

    checkpoint: Checkpoint | ExternalCheckpoint | None
    seed: int
    model: ModelOptions

    @property
    def precision(self) -> str | None:
        """Arithmetic that the checkpoint was made in; None if nothing says it."""
        if not isinstance(self.checkpoint, Checkpoint):
            return None
        # Before there was an auto, the default was no.
        return str(self.checkpoint.state.get("mixed_precision", "no"))

    def with_its_batch(self, options: Options) -> Options:
        """The options with the checkpoint's global batch, unless they name one: other ranks, the same updates."""
        training = options.training
        if not isinstance(self.checkpoint, Checkpoint) or training.global_batch_size is not None:
            return options
        kept = training.model_copy(update={"global_batch_size": int(self.checkpoint.state["plan"]["global_batch"])})
        return options.model_copy(update={"training": kept})

    def dataset_revision(self, dataset_name: str | None) -> str | None:
        """Return the commit of the Hub dataset `dataset_name` that the checkpoint was made on; None if it has none."""
        if not isinstance(self.checkpoint, Checkpoint):
            return None
        name, _, revision = str(self.checkpoint.state["identity"].get("revision", "")).rpartition("@")
        return revision if name == dataset_name else None

    def check(self, plan: Plan, text: TokenizedDataset) -> None:
        """Refuses to continue another run under this one's name; before any weight is loaded.

        Raises:
            UserError: the checkpoint was made with another text, tokenizer or order than this run's.
        """
        if self.checkpoint is None:
            return
        if isinstance(self.checkpoint, Checkpoint):
            _check_identity(self.checkpoint, plan, text)
        if self.checkpoint.step > plan.num_steps:
            raise UserError(
                f"checkpoint {self.checkpoint.path} is at step {self.checkpoint.step}, beyond the {plan.num_steps} of "
                "this run"
            )

    def resume(self, updater: SynchronousUpdater) -> TrainState:
        """Gives the updater its state back, and the run its counters.

        Raises:
            UserError: the checkpoint is another optimizer's.
        """
        if self.checkpoint is None:
            return TrainState()
        try:
            if isinstance(self.checkpoint, ExternalCheckpoint):
                self.checkpoint.load(updater)
                return TrainState(step=self.checkpoint.step)
            updater.load(self.checkpoint.tensors(), self.checkpoint.state["updater"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(
                f"checkpoint {self.checkpoint.path} holds the state of another model, --optim or --kfac ({error})"
            ) from error
        log.info("resumed from step %d (%s)", self.checkpoint.step, self.checkpoint.path)
        return TrainState.of(self.checkpoint.state["progress"])


def as_restarted(options: Options, folder: RunDirectory) -> Options:
    """The options of a start that torchrun makes again because a process died: it continues what was begun.

    Then `--overwrite_output_dir` removes nothing, and a checkpoint named by its path counts only until the run
    has one of its own.
    """
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if count == "0":
        return options
    log.info("started again by torchrun (%s): as with --resume_from_checkpoint", count)
    asked = not saved_steps(folder.checkpoints) and options.output.resume_from_checkpoint
    return options.model_copy(
        update={
            "output": options.output.model_copy(
                update={"resume_from_checkpoint": asked or True, "overwrite_output_dir": False}
            )
        }
    )


def choose_start(options: Options, folder: RunDirectory | None) -> Start:
    """Finds and verifies what `--resume_from_checkpoint` names.

    Raises:
        UserError: a checkpoint that was insisted on is missing or damaged.
    """
    asked = options.output.resume_from_checkpoint
    checkpoint = find_checkpoint(asked, folder.checkpoints if folder else None)
    if checkpoint is None:
        if asked:
            log.info("resume: no checkpoint yet, a fresh run")
        return Start(None, choose_seed(options.training.seed), options.model)
    if isinstance(checkpoint, ExternalCheckpoint):
        return Start(checkpoint, choose_seed(options.training.seed), checkpoint.model_options(options.model))
    seed = options.training.seed
    if seed is None:
        seed = int(checkpoint.state["plan"]["seed"])
    # Its own configuration too: the table of embeddings may have been fitted to the tokenizer since.
    named = {"model_name_or_path": str(checkpoint.path), "config_name": None, "config_overrides": None}
    return Start(checkpoint, seed, options.model.model_copy(update=named))


def _check_identity(checkpoint: Checkpoint, plan: Plan, text: TokenizedDataset) -> None:
    """What two starts of one run must share."""
    # Checkpoints from before there was a document mask were made without one.
    was = {"document_mask": False} | checkpoint.state["plan"]
    for name, option in _MUST_AGREE.items():
        if was[name] != getattr(plan, name):
            raise UserError(
                f"checkpoint {checkpoint.path} was made with {option} {was[name]}, this run has "
                f"{getattr(plan, name)}: use the same, or start another run"
            )
    if checkpoint.state["identity"] != text.identity():
        raise UserError(
            f"checkpoint {checkpoint.path} was made on other text or with another tokenizer than this run's"
        )
    if was["num_steps"] != plan.num_steps:
        log.warning(
            "the run had %d updates and has %d now: its learning rates follow the new number",
            was["num_steps"],
            plan.num_steps,
        )
