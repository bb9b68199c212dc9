"""The folder of a stream's shards, and what lies in it.

STREAM/.lock          of the one process that writes, whatever the number of runs that read
STREAM/wanted         how many training shards some run has asked for; the writer stays there
STREAM/held_out.json  what of the text is held out, written when the folder beside it is whole
STREAM/validation/    shards of what is held out
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
    """The shards of one stream, as one tokenizer makes them."""

    path: Path

    @property
    def lock(self) -> Path:
        """Held by the process that writes."""
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
    def is_settled(self) -> bool:
        """Whether it is known what is held out, and its tokens are there."""
        return self._settled.is_file()

    def held_out(self) -> SplitTokens | None:
        """The tokens of what is held out, once that is settled; None where nothing is.

        Raises:
            ShardError: they are not what they should be.
        """
        facts = json.loads(self._settled.read_text())
        return open_folder(self.validation).train if facts["has_text"] else None

    def settle(self, cut: SplitPoint | None, has_text: bool) -> None:
        """Writes down what is held out."""
        place = None if cut is None else cut._asdict()
        write_text(self._settled, json.dumps({"has_text": has_text, "cut": place}, indent=1) + "\n")

    def cut(self) -> SplitPoint | None:
        """Where training begins, once that is settled."""
        place = json.loads(self._settled.read_text())["cut"]
        return None if place is None else SplitPoint(**place)

    def wanted(self) -> int:
        """Training shards that some run has asked for."""
        try:
            return int((self.path / "wanted").read_text())
        except (OSError, ValueError):
            return 0

    def want(self, num_shards: int) -> None:
        """Asks for so many training shards; whoever asked for more is not forgotten."""
        if self.wanted() < num_shards:
            write_text(self.path / "wanted", f"{num_shards}\n")

    def has_requested(self) -> bool:
        """Whether all training shards are there that were asked for, or all there are."""
        last = shard_path(self.train, "train", self.wanted() - 1)
        return last.with_suffix(".json").is_file() or (self.train / MANIFEST).is_file()

    def clear(self) -> None:
        """Removes all shards; the lock must be held."""
        self._settled.unlink(missing_ok=True)
        (self.path / "wanted").unlink(missing_ok=True)
        for folder in (self.validation, self.train):
            if folder.exists():
                shutil.rmtree(folder)

    @property
    def _settled(self) -> Path:
        return self.path / "held_out.json"
