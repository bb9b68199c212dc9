"""Token files of other programs, read as they are: nothing is copied or tokenized again.

What they hold, and by which sign they are known:
    nanoGPT `.bin`                  uint16 ids and nothing else
    llm.c, modded-nanogpt `.bin`    256 int32 in front: magic, version, number of tokens; then uint16 (GPT-2)
                                    or uint32 (Llama 3) ids
    build-nanogpt `.npy`            a NumPy array of uint16 (or other integers)
    a folder of `save_to_disk`      a column `input_ids`
Our own shards are known by the sidecar. None of the others says which tokenizer it is of.

Source: the headers of karpathy/llm.c, dev/data/data_common.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm.config.errors import UserError
from llm.data.shards.document_starts import ConcatenatedStarts, SlicedStarts, StartsInFiles
from llm.data.shards.format import ForeignShardError, Stream, Streams, TruncatedShardError, open_shard
from llm.data.shards.memmap import MappedTokens, TokenFile, Tokens, TokenSegment
from llm.data.sources.files import resolve_paths, split_in_path
from llm.data.sources.hub_datasets import is_saved, load_saved

log = logging.getLogger(__name__)

ENDINGS = (".bin", ".npy")
_HEADER_INTS = 256
_HEADER_BYTES = 4 * _HEADER_INTS
# Magic -> version and type of the ids.
_LLM_C = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
_NUM_SAMPLES = 16
_SAMPLE_TOKENS = 4096
_COLUMN = "input_ids"


def is_token_file(name: str) -> bool:
    """Whether a file name or a glob says that it holds ids and no text."""
    return name.lower().endswith(ENDINGS)


def open_files(
    train: Sequence[str],
    validation: Sequence[str] | None,
    percentage: float,
    vocabulary_size: int,
    tokenizer_hash: str | None = None,
) -> Streams:
    """The ids of files that `--train_file` and `--validation_file` name.

    Raises:
        OtherTokenizerError: a shard of ours is of another tokenizer than that of the hash.
        UserError: a file is missing, truncated, or of an unknown layout.
    """
    paths = [resolve_paths(train, "--train_file")]
    if validation is not None:
        paths.append(resolve_paths(validation, "--validation_file"))
    for path in (path for part in paths for path in part if _is_shard(path)):
        open_shard(path, tokenizer_hash=tokenizer_hash)
    streams = [_of_paths(part) for part in paths]
    return _streams(train[0], streams, percentage, vocabulary_size, Path(train[0]).parent)


def open_external_folder(folder: Path, percentage: float, vocabulary_size: int) -> Streams:
    """The ids of a folder: of `save_to_disk`, or of `.bin` and `.npy` files whose names say their split.

    Raises:
        UserError: there are none, or a file is truncated or of an unknown layout.
    """
    if is_saved(folder):
        found = load_saved(folder)
        names = [name for name in ("train", "validation") if name in found]
        streams = [Stream(Tokens(_column_stretches(folder, name, found[name])), None, None) for name in names]
    else:
        paths = sorted(path for path in folder.iterdir() if path.suffix in ENDINGS and not path.name.startswith("."))
        validation = [path for path in paths if split_in_path(Path(path.name)) == "validation"]
        train = [path for path in paths if split_in_path(Path(path.name)) in ("train", "")]
        streams = [_of_paths(part) for part in (train, validation) if part]
        if not train:
            streams = []
    if not streams:
        raise UserError(
            f"{folder}: holds no token shards (.bin or .npy files with train in their names, a folder of"
            " llm.prepare, or one of save_to_disk with a column input_ids); text is given as --train_file"
        )
    return _streams(str(folder), streams, percentage, vocabulary_size, folder)


def open_file(path: Path) -> TokenFile:
    """Where the ids of one file lie; recognised by its first bytes and its size.

    Raises:
        ForeignShardError: it has a layout that nothing here knows.
        TruncatedShardError: it is shorter than it says.
    """
    size = path.stat().st_size
    if path.suffix.lower() == ".npy":
        return _numpy_file(path, size)
    if _is_shard(path):
        return open_shard(path).tokens
    header = np.fromfile(path, "<i4", count=3)
    if size >= _HEADER_BYTES and int(header[0]) in _LLM_C:
        version, dtype = _LLM_C[int(header[0])]
        if int(header[1]) != version:
            raise ForeignShardError(f"{path}: version {header[1]} of llm.c's layout is not known, {version} is")
        return _checked(TokenFile(path, dtype, int(header[2]), _HEADER_BYTES), size)
    if size % 2 or not size:
        raise TruncatedShardError(f"{path}: has {size} bytes, which are no uint16 ids; copy or make it again")
    return TokenFile(path, "<u2", size // 2)


def _numpy_file(path: Path, size: int) -> TokenFile:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ForeignShardError(f"{path}: is no NumPy array on its own, or truncated ({error})") from None
    if not isinstance(array, np.memmap) or array.ndim != 1 or array.dtype.kind not in "ui":
        raise ForeignShardError(f"{path}: is no array of ids; one dimension of integers is read")
    return _checked(TokenFile(path, array.dtype.str, len(array), array.offset), size)


def _checked(file: TokenFile, size: int) -> TokenFile:
    due = file.header_bytes + file.num_tokens * np.dtype(file.dtype).itemsize
    if size != due:
        raise TruncatedShardError(f"{file.path}: has {size} bytes, {due} bytes are due; copy it again")
    return file


def _is_shard(path: Path) -> bool:
    return path.suffix.lower() != ".npy" and path.with_suffix(".json").is_file()


def _of_paths(paths: Sequence[Path]) -> Stream:
    starts = StartsInFiles([open_shard(path) for path in paths]) if all(map(_is_shard, paths)) else None
    return Stream(Tokens([open_file(path) for path in paths]), None, None, starts)


@dataclass(frozen=True)
class ColumnSegment:
    """A chunk of the column `input_ids`, its rows one behind the other.

    Attributes:
        folder: what `save_to_disk` wrote.
        split: name of the split.
        chunk: number of the chunk.
        num_tokens: ids in it.
    """

    folder: Path
    split: str
    chunk: int
    num_tokens: int

    def map(self) -> MappedTokens:
        """The ids where the library has mapped them."""
        values = _chunks(load_saved(self.folder)[self.split])[self.chunk].flatten()
        return MappedTokens(values.to_numpy(zero_copy_only=True))


def _column_stretches(folder: Path, split: str, table: Any) -> list[TokenSegment]:
    if _COLUMN not in table.column_names:
        raise ForeignShardError(
            f"{folder}: no column {_COLUMN}; its columns are {', '.join(table.column_names)};"
            " text is given as --dataset_name"
        )
    return [ColumnSegment(folder, split, number, len(chunk.flatten())) for number, chunk in enumerate(_chunks(table))]


def _chunks(table: Any) -> list[Any]:
    chunks: list[Any] = table.data.column(_COLUMN).chunks
    return chunks


def _streams(name: str, found: list[Stream], percentage: float, vocabulary_size: int, folder: Path) -> Streams:
    """Two splits; of a single one, the end is held out.

    The hash is of a few stretches, not of all ids: these files may be of any size, and none says its own.
    """
    train = found[0]
    validation = found[1] if len(found) > 1 else None
    if validation is None and percentage > 0:
        place = int(len(train.tokens) * (1 - percentage / 100))
        train, validation = _part(train, 0, place), _part(train, place, len(train.tokens))
        log.info("held out for validation: the last %s tokens", f"{len(validation.tokens):,}")
    digest = blake2b(digest_size=16)
    for part in (train, validation):
        if part is not None:
            digest.update(_sample(part.tokens))
    held_out = None if validation is None or not len(validation.tokens) else validation
    return Streams(train, held_out, {}, digest.hexdigest(), vocabulary_size, folder, name)


def _part(stream: Stream, start: int, stop: int) -> Stream:
    assert isinstance(stream.tokens, Tokens)
    starts = stream.starts and ConcatenatedStarts([SlicedStarts(stream.starts, start, stop - start)])
    return Stream(stream.tokens.part(start, stop), None, None, starts)


def _sample(tokens: NDArray[Any] | Tokens) -> bytes:
    """What tells one stream from another without reading all of it: its length, and a few stretches."""
    step = max(len(tokens) // _NUM_SAMPLES, 1)
    parts = [tokens[start : start + _SAMPLE_TOKENS].astype("<u4").tobytes() for start in range(0, len(tokens), step)]
    return b"".join([str(len(tokens)).encode(), *parts[: _NUM_SAMPLES + 1]])
