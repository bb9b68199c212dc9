"""A `RunContext` in memory, for tests of the callbacks and of the end of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm.config.options import Options
from llm.config.reader import read_keywords
from llm.data.batches.loader import Batch
from llm.data.dataset import PreparedDataset
from llm.data.shards.format import SplitTokens, TokenizedText
from llm.distributed.world import World
from llm.models.language_model import LanguageModel
from llm.models.tied_weights import first_names
from llm.training.accelerator import Compute
from llm.training.context import RunContext
from llm.training.plan import plan_run
from llm.training.run_dir.folder import RunDirectory
from llm.training.state import TrainState
from llm.training.supervision.stop_signals import StopRequest
from llm.training.supervision.watchdog import Watchdog
from llm.training.updaters.base import (
    DataParallelRank,
    ProfilingTargets,
    StateReader,
    StepReport,
    StepVotes,
    UpdaterState,
    whole,
)
from llm.training.updaters.preconditioning import NoPreconditioner

BLOCK_SIZE = 8
SEED = 7


class RecordingUpdater:
    """Makes no updates; `calls` lists the collective methods that were called."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.data_parallel = DataParallelRank(0, 1)
        self.calls: list[str] = []

    def update(self, micro_batches: Sequence[Batch], step: int, *, votes: StepVotes) -> StepReport:
        raise NotImplementedError

    @contextmanager
    def evaluation_model(self) -> Iterator[LanguageModel]:
        self.calls.append("evaluation_model")
        yield self.model

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        names = first_names(self.model.model)
        for name, tensor in self.model.model.state_dict().items():
            if names[name] == name:
                yield name, tensor
        self.calls.append("full_weights")

    def state(self) -> UpdaterState:
        self.calls.append("state")
        return UpdaterState({"transformer.wte.weight/momentum": whole(torch.arange(4.0))}, {"optimizer": "recording"})

    def load(self, reader: StateReader) -> None:
        raise NotImplementedError

    def summary(self, *, finished: bool = False) -> list[str]:
        return ["recording updater: finished"] if finished else []

    def profiling_targets(self) -> ProfilingTargets:
        optimizer = torch.optim.SGD(self.model.parameters())
        return ProfilingTargets(self.model, optimizer, NoPreconditioner(), nullcontext, lambda: None)


class RecordingTracking:
    """Keeps records in memory; `sampled` are the updates whose samples an earlier start recorded."""

    def __init__(self) -> None:
        self.records: list[tuple[int, dict[str, Any]]] = []
        self.sampled: set[int] = set()

    def has_samples(self, step: int) -> bool:
        return step in self.sampled

    def record(self, step: int, values: dict[str, Any]) -> None:
        self.records.append((step, values))


class RecordingSaver:
    """Keeps what it is asked to save; `request` are the reasons for which a checkpoint is requested now."""

    def __init__(self) -> None:
        self.step: int | None = None
        self.skipped_because: Exception | None = None
        self.request: list[str] = []
        self.saves: list[dict[str, Any]] = []
        self.num_waits = 0

    def requests(self) -> list[str]:
        return self.request

    def check(self) -> None:
        pass

    def save(self, step: int, weights: Any, tensors: Any, write: Any, reasons: list[str], **seconds: float) -> None:
        self.step = step
        self.skipped_because = None
        self.saves.append(
            {"step": step, "weights": dict(weights), "tensors": dict(tensors), "write": write, "reasons": reasons}
        )

    def wait(self) -> None:
        self.num_waits += 1


def make_context(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    run_dir: Path | None = None,
    saver: Any = None,
    has_validation: bool = True,
    **options: Any,
) -> Any:
    """Return a context of 10 updates of 4 blocks of 8 tokens each, from 40 blocks; 8 validation blocks."""
    values = {"max_train_steps": 10, "per_device_train_batch_size": 4, "block_size": BLOCK_SIZE, "seed": SEED} | options
    if run_dir is not None:
        values["output_dir"] = str(run_dir)
        run_dir.mkdir(exist_ok=True)
    parsed = read_keywords(Options, values)
    ids = np.random.default_rng(0).integers(97, 123, size=40 * BLOCK_SIZE + 1, dtype=np.uint16)
    validation = SplitTokens(ids[: 8 * BLOCK_SIZE + 1], num_documents=1, num_bytes=8 * BLOCK_SIZE + 1)
    text = TokenizedText(
        train=SplitTokens(ids, num_documents=1, num_bytes=len(ids)),
        validation=validation if has_validation else None,
        skipped={},
        data_hash="hash of the text",
        vocabulary_size=257,
        dir=Path(),
    )
    dataset = PreparedDataset("letters", tokenizer, "hash of the tokenizer", text)
    blocks, validation_blocks = dataset.blocks(BLOCK_SIZE, document_mask=False)
    accelerator: Any = SimpleNamespace(mixed_precision="no", trackers=[], is_main_process=True)
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    tracking: Any = RecordingTracking()
    return RunContext(
        options=parsed,
        compute=Compute(accelerator, world),
        world=world,
        run_dir=RunDirectory(run_dir) if run_dir is not None else None,
        dataset=dataset,
        blocks=blocks,
        validation=validation_blocks,
        plan=plan_run(parsed.training, blocks, num_ranks=1, seed=SEED),
        state=TrainState(),
        updater=RecordingUpdater(LanguageModel(model)),
        tracking=tracking,
        saver=saver,
        stop=StopRequest(),
        watchdog=Watchdog(report=lambda _: None, end=lambda _: None),
        base_model=None,
    )
