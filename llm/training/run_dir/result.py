"""How a run ended: its losses, and the paths of what it kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llm.training.checkpoints.layout import saved_steps
from llm.training.run_dir.folder import RunDirectory


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. Losses are means in nats a token; they are None where nothing was measured.

    Attributes:
        exit_code: 0 when all updates were made, 75 when a signal or a deadline stopped the run after saving it.
        output_dir: the run's folder; None if nothing was kept.
        step: finished updates.
        tokens: tokens trained on, repetitions included.
        train_loss: over the updates of the newest record.
        eval_loss: of the newest evaluation.
        best_eval_loss: the lowest of all evaluations.
        perplexity: exp(loss) of the newest evaluation of this start.
        bits_per_byte: of the newest evaluation of this start; nan where the bytes of the text are unknown.
    """

    exit_code: int
    output_dir: Path | None = None
    step: int = 0
    tokens: int = 0
    train_loss: float | None = None
    eval_loss: float | None = None
    best_eval_loss: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None

    @property
    def stopped(self) -> bool:
        """Whether a signal or a deadline stopped the run; `resume_from_checkpoint=True` continues it."""
        return self.exit_code != 0

    @property
    def model_dir(self) -> Path | None:
        """The newest model that `from_pretrained` loads: the run's folder or, of a stopped run, a checkpoint."""
        if self.stopped:
            return self.checkpoints[-1] if self.checkpoints else None
        return self.output_dir

    @property
    def checkpoints(self) -> list[Path]:
        """The folders of the run's checkpoints, oldest first; `from_pretrained` loads each of them."""
        if self.output_dir is None:
            return []
        return [path for _, path in saved_steps(RunDirectory(self.output_dir).checkpoints)]

    @property
    def metrics_file(self) -> Path | None:
        """The file of all records, one JSON object a line; None if nothing was kept."""
        return None if self.output_dir is None else RunDirectory(self.output_dir).metrics
