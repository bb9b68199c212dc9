"""The folder of a stream's shards, and the files in it.

STREAM/.lock          held by the one process that writes, whatever the number of runs that read
STREAM/wanted         number of training shards that some run has requested; the writer pauses there
STREAM/held_out.json  the split point, written when the folder of held-out shards is complete
STREAM/validation/    shards of the held-out text
STREAM/train/         shards of the rest, in the order of arrival
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from llm.data.shards.format import MANIFEST, SplitTokens, open_folder, shard_path
from llm.data.sources.validation_split import SplitPoint
from llm.files.atomic import write_text


@dataclass(frozen=True)
class StreamFolder:
    """The shards of one stream made with one tokenizer.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def lock(self) -> Path:
        """The lock file, held by the process that writes."""
        return self.path / ".lock"

    @property
    def train(self) -> Path:
        """The folder of the training shards."""
        return self.path / "train"

    @property
    def validation(self) -> Path:
        """The folder of the held-out shards."""
        return self.path / "validation"

    @property
    def has_split(self) -> bool:
        """Whether the split point is known and all held-out tokens are written."""
        return self._split_file.is_file()

    def held_out(self) -> SplitTokens | None:
        """Open the held-out tokens once the folder `has_split`; None if nothing is held out.

        Raises:
            ShardError: the shards are damaged.
        """
        facts = json.loads(self._split_file.read_text())
        return open_folder(self.validation).train if facts["has_text"] else None

    def commit_split(self, split_point: SplitPoint | None, *, has_text: bool) -> None:
        """Record the split, after which the folder `has_split`.

        Args:
            split_point: where the training text begins; None: at the beginning of the stream.
            has_text: whether any text is held out.
        """
        facts = {"has_text": has_text, "cut": None if split_point is None else split_point._asdict()}
        write_text(self._split_file, json.dumps(facts, indent=1) + "\n")

    def split_point(self) -> SplitPoint | None:
        """Return where the training text begins, once the folder `has_split`; None: at the beginning."""
        facts = json.loads(self._split_file.read_text())["cut"]
        return None if facts is None else SplitPoint(**facts)

    def num_requested(self) -> int:
        """Return the number of training shards that some run has requested."""
        try:
            return int(self._request_file.read_text())
        except (OSError, ValueError):
            return 0

    def request(self, num_shards: int) -> None:
        """Request the first `num_shards` training shards; a larger request of another run stays."""
        if self.num_requested() < num_shards:
            write_text(self._request_file, f"{num_shards}\n")

    def has_requested(self) -> bool:
        """Return whether all requested training shards exist, or all shards of the stream."""
        last = shard_path(self.train, "train", self.num_requested() - 1)
        return last.with_suffix(".json").is_file() or (self.train / MANIFEST).is_file()

    def clear(self) -> None:
        """Remove all shards; the caller must hold the lock."""
        self._split_file.unlink(missing_ok=True)
        self._request_file.unlink(missing_ok=True)
        for folder in (self.validation, self.train):
            if folder.exists():
                shutil.rmtree(folder)

    @property
    def _split_file(self) -> Path:
        return self.path / "held_out.json"

    @property
    def _request_file(self) -> Path:
        return self.path / "wanted"
