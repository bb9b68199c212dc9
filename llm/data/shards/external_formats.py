"""Token files of other programs, read as they are: nothing is copied or tokenized again.

Formats, and how each is recognised:
    nanoGPT `.bin`                  uint16 ids and nothing else
    llm.c, modded-nanogpt `.bin`    a header of 256 int32 (magic, version, number of tokens), then uint16 (GPT-2)
                                    or uint32 (Llama 3) ids
    build-nanogpt `.npy`            a NumPy array of uint16 (or other integers)
    a folder of `save_to_disk`      a column `input_ids`
Shards of this package are recognised by their sidecar. The other formats do not state their tokenizer.

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
from llm.data.shards.format import SplitTokens, TokenizedText, TruncatedShardError, UnknownFormatError, open_shard
from llm.data.shards.memmap import MappedTokens, TokenFile, Tokens, TokenSegment
from llm.data.sources.files import resolve_paths, split_in_path
from llm.data.sources.hub_datasets import is_saved, load_saved

log = logging.getLogger(__name__)

ENDINGS = (".bin", ".npy")
_HEADER_INTS = 256
_HEADER_BYTES = 4 * _HEADER_INTS
# Magic number -> version and type of the ids.
_LLM_C = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
_NUM_SAMPLES = 16
_SAMPLE_TOKENS = 4096
_COLUMN = "input_ids"


def is_token_file(name: str) -> bool:
    """Return whether a file name or glob pattern names token files, not text: it ends in .bin or .npy."""
    return name.lower().endswith(ENDINGS)


def open_files(
    train: Sequence[str],
    validation: Sequence[str] | None,
    percentage: float,
    vocabulary_size: int,
    tokenizer_hash: str | None = None,
) -> TokenizedText:
    """Open the token files that `--train_file` and `--validation_file` name.

    Args:
        train: file names or glob patterns of the training tokens.
        validation: those of the validation tokens; None: the end of the training tokens is held out.
        percentage: percentage of the training tokens that is held out if `validation` is None.
        vocabulary_size: number of ids of the tokenizer.
        tokenizer_hash: hash of the tokenizer's behaviour, which shards of this package must have; None: any.

    Raises:
        TokenizerMismatchError: a shard of this package was made with another tokenizer.
        UserError: a file is missing, truncated, or of an unknown format.
    """
    paths = [resolve_paths(train, "--train_file")]
    if validation is not None:
        paths.append(resolve_paths(validation, "--validation_file"))
    for path in (path for split in paths for path in split if _is_shard(path)):
        open_shard(path, tokenizer_hash=tokenizer_hash)
    splits = [_open_paths(split) for split in paths]
    return _tokenized_text(train[0], splits, percentage, vocabulary_size, Path(train[0]).parent)


def open_external_folder(folder: Path, percentage: float, vocabulary_size: int) -> TokenizedText:
    """Open a folder of `save_to_disk`, or of `.bin` and `.npy` files whose names state their split.

    Args:
        folder: the folder.
        percentage: percentage of the training tokens that is held out if there is no validation split.
        vocabulary_size: number of ids of the tokenizer.

    Raises:
        UserError: the folder holds no tokens, or a file is truncated or of an unknown format.
    """
    if is_saved(folder):
        table = load_saved(folder)
        names = [name for name in ("train", "validation") if name in table]
        splits = [SplitTokens(Tokens(_column_segments(folder, name, table[name])), None, None) for name in names]
    else:
        paths = sorted(path for path in folder.iterdir() if path.suffix in ENDINGS and not path.name.startswith("."))
        validation = [path for path in paths if split_in_path(Path(path.name)) == "validation"]
        train = [path for path in paths if split_in_path(Path(path.name)) in ("train", "")]
        splits = [_open_paths(split) for split in (train, validation) if split] if train else []
    if not splits:
        raise UserError(
            f"{folder}: holds no token shards (.bin or .npy files with train in their names, a folder of"
            " llm.prepare, or one of save_to_disk with a column input_ids); text is given as --train_file"
        )
    return _tokenized_text(str(folder), splits, percentage, vocabulary_size, folder)


def open_file(path: Path) -> TokenFile:
    """Return where the ids of one file lie; the format is recognised by the first bytes and the size.

    Raises:
        UnknownFormatError: the format is unknown.
        TruncatedShardError: the file is shorter than its header states.
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
            raise UnknownFormatError(f"{path}: version {header[1]} of llm.c's format is unknown, {version} is known")
        return _checked(TokenFile(path, dtype, int(header[2]), _HEADER_BYTES), size)
    if size % 2 or not size:
        raise TruncatedShardError(f"{path}: has {size} bytes, which are no uint16 ids; copy or make it again")
    return TokenFile(path, "<u2", size // 2)


def _numpy_file(path: Path, size: int) -> TokenFile:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UnknownFormatError(f"{path}: is not a single NumPy array, or is truncated ({error})") from None
    if not isinstance(array, np.memmap) or array.ndim != 1 or array.dtype.kind not in "ui":
        raise UnknownFormatError(f"{path}: is no array of ids; give an array with one dimension of integers")
    return _checked(TokenFile(path, array.dtype.str, len(array), array.offset), size)


def _checked(file: TokenFile, size: int) -> TokenFile:
    expected = file.header_bytes + file.num_tokens * np.dtype(file.dtype).itemsize
    if size != expected:
        raise TruncatedShardError(f"{file.path}: has {size} bytes, {expected} bytes are expected; copy it again")
    return file


def _is_shard(path: Path) -> bool:
    return path.suffix.lower() != ".npy" and path.with_suffix(".json").is_file()


def _open_paths(paths: Sequence[Path]) -> SplitTokens:
    starts = StartsInFiles([open_shard(path) for path in paths]) if all(map(_is_shard, paths)) else None
    return SplitTokens(Tokens([open_file(path) for path in paths]), None, None, starts)


@dataclass(frozen=True)
class ColumnSegment:
    """One chunk of the column `input_ids`, with its rows concatenated.

    Attributes:
        folder: the folder that `save_to_disk` wrote.
        split: name of the split.
        chunk: number of the chunk.
        num_tokens: number of ids in the chunk.
    """

    folder: Path
    split: str
    chunk: int
    num_tokens: int

    def map(self) -> MappedTokens:
        """Return the ids as a view of the memory that `datasets` has mapped."""
        values = _chunks(load_saved(self.folder)[self.split])[self.chunk].flatten()
        return MappedTokens(values.to_numpy(zero_copy_only=True))


def _column_segments(folder: Path, split: str, table: Any) -> list[TokenSegment]:
    if _COLUMN not in table.column_names:
        raise UnknownFormatError(
            f"{folder}: no column {_COLUMN}; its columns are {', '.join(table.column_names)};"
            " text is given as --dataset_name"
        )
    return [ColumnSegment(folder, split, number, len(chunk.flatten())) for number, chunk in enumerate(_chunks(table))]


def _chunks(table: Any) -> list[Any]:
    chunks: list[Any] = table.data.column(_COLUMN).chunks
    return chunks


def _tokenized_text(
    name: str, splits: list[SplitTokens], percentage: float, vocabulary_size: int, folder: Path
) -> TokenizedText:
    """Join the splits; with a single split the end of it is held out.

    The hash covers a few samples of the ids, not all: these files may be of any size, and none states a hash.
    """
    train = splits[0]
    validation = splits[1] if len(splits) > 1 else None
    if validation is None and percentage > 0:
        end = int(len(train.tokens) * (1 - percentage / 100))
        validation = _sliced(train, end, len(train.tokens))
        train = _sliced(train, 0, end)
        log.info("held out for validation: the last %s tokens", f"{len(validation.tokens):,}")
    digest = blake2b(digest_size=16)
    for split in (train, validation):
        if split is not None:
            digest.update(_sample(split.tokens))
    held_out = None if validation is None or not len(validation.tokens) else validation
    return TokenizedText(train, held_out, {}, digest.hexdigest(), vocabulary_size, folder, name)


def _sliced(split: SplitTokens, start: int, stop: int) -> SplitTokens:
    assert isinstance(split.tokens, Tokens)
    starts = split.starts and ConcatenatedStarts([SlicedStarts(split.starts, start, stop - start)])
    return SplitTokens(split.tokens.sliced(start, stop), None, None, starts)


def _sample(tokens: NDArray[Any] | Tokens) -> bytes:
    """The length of the tokens and up to 17 samples of 4,096 ids: they differ between texts, and are quick to read."""
    step = max(len(tokens) // _NUM_SAMPLES, 1)
    samples = [tokens[start : start + _SAMPLE_TOKENS].astype("<u4").tobytes() for start in range(0, len(tokens), step)]
    return b"".join([str(len(tokens)).encode(), *samples[: _NUM_SAMPLES + 1]])
