"""The one format of tokenized text: a folder of shards, each whole or not there.

    train_00000.bin      ids and nothing else, little-endian uint16 or uint32 as the vocabulary needs
    train_00000.starts   where documents start in it: little-endian uint64, ascending
    train_00000.json     its sidecar, written last: without it the shard does not exist
    validation_00000.*
    manifest.json        of the whole text, written when all shards are there

Opening reads sidecars and sizes, never ids, so that it takes as long for any text. `verify` reads all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm.config.errors import UserError
from llm.data.shards.document_starts import Starts, StartsInFiles
from llm.data.shards.memmap import TokenFile, Tokens
from llm.data.sources.documents import Split
from llm.files.atomic import write_text

MAGIC = "llm-token-shard"
FOLDER_MAGIC = "llm-token-shards"
VERSION = 1
MANIFEST = "manifest.json"
SPLITS: tuple[Split, ...] = ("train", "validation")
DTYPES = {"uint16": "<u2", "uint32": "<u4"}
STARTS_DTYPE = "<u8"
HASH_BYTES = 16

_CHUNK_BYTES = 1 << 24


class ShardError(UserError):
    """A shard, or a folder of them, is not what it should be."""


class TruncatedShardError(ShardError):
    """A file is missing, or has another size than its sidecar says."""


class ForeignShardError(ShardError):
    """Not a shard of this package."""


class OtherVersionError(ShardError):
    """Written by another version of the format."""


class OtherTokenizerError(ShardError):
    """Ids of another tokenizer, or of another vocabulary size."""


class UnfinishedError(ShardError):
    """The folder's text is not all there yet."""


@dataclass(frozen=True)
class ResumePoint:
    """Where in a split's text a shard begins or ends: what makes the next shard continue exactly.

    Attributes:
        document: number of the document, from 0.
        piece: number of the piece that is encoded at once (a document, or a part of a long one).
        token: token inside the piece, the end-of-text tokens around it included.
    """

    document: int
    piece: int
    token: int


@dataclass(frozen=True)
class Shard:
    """What the sidecar says.

    Attributes:
        path: the file of ids.
        dtype: `uint16` or `uint32`.
        num_tokens: ids in the file.
        num_documents: documents that start in it.
        tokenizer_hash: of the tokenizer's behaviour.
        vocabulary_size: every id is below it.
        min_id: smallest id.
        max_id: largest id.
        token_hash: BLAKE2b of the file of ids.
        starts_hash: BLAKE2b of the file of starts.
        begins: where in the text it begins.
        ends: where the next one continues.
    """

    path: Path
    dtype: str
    num_tokens: int
    num_documents: int
    tokenizer_hash: str
    vocabulary_size: int
    min_id: int
    max_id: int
    token_hash: str
    starts_hash: str
    begins: ResumePoint
    ends: ResumePoint

    @property
    def tokens(self) -> TokenFile:
        """The ids, not yet mapped."""
        return TokenFile(self.path, DTYPES[self.dtype], self.num_tokens)

    @property
    def starts(self) -> TokenFile:
        """Where documents start, counted from the shard's first token, not yet mapped."""
        return TokenFile(starts_path(self.path), STARTS_DTYPE, self.num_documents)

    def write_sidecar(self) -> None:
        """Makes the shard exist."""
        facts = {"magic": MAGIC, "version": VERSION} | asdict(self)
        del facts["path"]
        write_text(self.path.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")


@dataclass(frozen=True)
class Stream:
    """The tokens of one split.

    Attributes:
        tokens: integers [number of tokens], of which slices are read.
        num_documents: documents, a piece of a document that was cut in two counting as one; None if
            the files do not say.
        num_bytes: bytes of the text in UTF-8; None if the files do not say.
        starts: where documents start; None if the files do not say.
    """

    tokens: NDArray[Any] | Tokens
    num_documents: int | None
    num_bytes: int | None
    starts: Starts | None = None


@dataclass(frozen=True)
class Source:
    """One of several texts that are mixed: `weight` is its share of the blocks, None for as many as it has."""

    name: str
    weight: Fraction | None
    text: Stream


@dataclass(frozen=True)
class Streams:
    """A tokenized text.

    Attributes:
        train: the tokens to train on; of a mixture, those of all sources one behind the other.
        validation: the tokens held out, None if there are none.
        skipped: rows that were no text, by reason.
        data_hash: hash of the text of both splits.
        vocabulary_size: every id is below it.
        dir: the folder of the files.
        name: what people call the text.
        sources: of a mixture; empty where there is one text.
    """

    train: Stream
    validation: Stream | None
    skipped: Mapping[str, int]
    data_hash: str
    vocabulary_size: int
    dir: Path
    name: str = ""
    sources: tuple[Source, ...] = ()


def shard_path(folder: Path, split: Split, number: int) -> Path:
    """The file of ids of a shard."""
    return folder / f"{split}_{number:05d}.bin"


def starts_path(path: Path) -> Path:
    """The file of document starts beside a file of ids."""
    return path.with_suffix(".starts")


def open_shard(path: Path, *, tokenizer_hash: str | None = None, vocabulary_size: int | None = None) -> Shard:
    """Reads a shard's sidecar and compares the sizes of its files.

    Args:
        path: the file of ids.
        tokenizer_hash: of the tokenizer that it must be of; any when None.
        vocabulary_size: what it must be; any when None.

    Raises:
        TruncatedShardError: a file is missing or has another size.
        ForeignShardError: there is no sidecar of this format.
        OtherVersionError: it is of another version.
        OtherTokenizerError: it is of another tokenizer or vocabulary size.
    """
    facts = read_json(path.with_suffix(".json"), MAGIC)
    try:
        facts |= {name: ResumePoint(**facts[name]) for name in ("begins", "ends")}
        shard = Shard(path=path, **facts)
        sizes = {
            path: shard.num_tokens * np.dtype(DTYPES[shard.dtype]).itemsize,
            starts_path(path): shard.num_documents * np.dtype(STARTS_DTYPE).itemsize,
        }
    except (TypeError, KeyError) as error:
        raise ForeignShardError(f"{path}: its sidecar lacks or adds something ({error}); prepare it again") from None
    for file, due in sizes.items():
        size = file.stat().st_size if file.is_file() else None
        if size != due:
            found = "is missing" if size is None else f"has {size} bytes"
            raise TruncatedShardError(f"{file}: {found}, {due} bytes are due; copy it again, or prepare it again")
    if tokenizer_hash is not None and shard.tokenizer_hash != tokenizer_hash:
        raise OtherTokenizerError(
            f"{path}: made with another tokenizer ({shard.tokenizer_hash[:12]}, not {tokenizer_hash[:12]});"
            " leave --tokenizer_name out to use the one beside the shards, or prepare them again"
        )
    if vocabulary_size is not None and shard.vocabulary_size != vocabulary_size:
        raise OtherTokenizerError(
            f"{path}: made for {shard.vocabulary_size} tokens, not {vocabulary_size}; prepare it again"
        )
    return shard


def finished_shards(folder: Path, split: Split, *, tokenizer_hash: str | None = None) -> list[Shard]:
    """The shards of a split from number 0 on, up to the first that was not finished.

    Raises:
        ShardError: one has a sidecar and is not what that says.
    """
    shards: list[Shard] = []
    while (path := shard_path(folder, split, len(shards))).with_suffix(".json").is_file():
        shards.append(open_shard(path, tokenizer_hash=tokenizer_hash))
    return shards


def is_folder_of_shards(folder: Path) -> bool:
    """Whether a folder holds shards of this package, finished or not."""
    return (folder / MANIFEST).is_file() or any(shard_path(folder, split, 0).is_file() for split in SPLITS)


def open_folder(folder: Path, *, tokenizer_hash: str | None = None) -> Streams:
    """The text of a folder of shards; takes the same time whatever its length.

    Args:
        folder: what `llm.prepare` or the cache wrote.
        tokenizer_hash: of the tokenizer that it must be of; any when None.

    Raises:
        UnfinishedError: the text is not all there.
        ShardError: something is not what it should be; the kinds are those of `open_shard`.
    """
    manifest = read_json(folder / MANIFEST, FOLDER_MAGIC)
    try:
        streams: dict[str, Stream] = {}
        for split in SPLITS:
            facts = manifest["splits"][split]
            shards = [
                open_shard(
                    shard_path(folder, split, number),
                    tokenizer_hash=tokenizer_hash or manifest["tokenizer_hash"],
                    vocabulary_size=manifest["vocabulary_size"],
                )
                for number in range(facts["num_shards"])
            ]
            tokens = Tokens([shard.tokens for shard in shards])
            if len(tokens) != facts["num_tokens"]:
                raise TruncatedShardError(f"{folder}: {len(tokens)} tokens of {split}, {facts['num_tokens']} are due")
            streams[split] = Stream(tokens, facts["num_documents"], facts["num_bytes"], StartsInFiles(shards))
        validation = streams["validation"]
        return Streams(
            streams["train"],
            validation if len(validation.tokens) else None,
            manifest["skipped"],
            manifest["data_hash"],
            manifest["vocabulary_size"],
            folder,
            manifest["name"],
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise ForeignShardError(f"{folder / MANIFEST}: lacks something ({error}); prepare the text again") from None


def read_json(path: Path, magic: str) -> dict[str, Any]:
    """The facts of a sidecar or a manifest, without magic and version.

    Raises:
        UnfinishedError: there is none.
        ForeignShardError: it is something else.
        OtherVersionError: it is of another version.
    """
    try:
        facts = json.loads(path.read_text())
    except FileNotFoundError:
        raise UnfinishedError(
            f"{path}: is missing, so that the shards are not finished or not ours;"
            " run the same `python -m llm.prepare` again, which continues"
        ) from None
    except (OSError, ValueError) as error:
        raise ForeignShardError(f"{path}: cannot be read ({error}); prepare the text again") from None
    if not isinstance(facts, dict) or facts.pop("magic", None) != magic:
        raise ForeignShardError(f"{path}: is no file of token shards; name a folder that llm.prepare wrote")
    version = facts.pop("version", None)
    if version != VERSION:
        raise OtherVersionError(f"{path}: has version {version}, this program reads {VERSION}; prepare the text again")
    return facts


def verify(folder: Path) -> Iterator[tuple[Shard, str | None]]:
    """Reads every shard of a finished folder: what is wrong with each, None if nothing is.

    Raises:
        ShardError: what `open_folder` finds already.
    """
    open_folder(folder)
    for split in SPLITS:
        for shard in finished_shards(folder, split):
            yield shard, _damage(shard)


def _damage(shard: Shard) -> str | None:
    digest = blake2b(digest_size=HASH_BYTES)
    low, high = shard.vocabulary_size, -1
    with shard.path.open("rb") as file:
        while data := file.read(_CHUNK_BYTES):
            digest.update(data)
            ids = np.frombuffer(data, DTYPES[shard.dtype])
            low, high = min(low, int(ids.min())), max(high, int(ids.max()))
    if high >= shard.vocabulary_size:
        return f"has id {high}, but the vocabulary has {shard.vocabulary_size} tokens"
    if digest.hexdigest() != shard.token_hash or (low, high) != (shard.min_id, shard.max_id):
        return "has other ids than when it was written"
    starts = starts_path(shard.path).read_bytes()
    if blake2b(starts, digest_size=HASH_BYTES).hexdigest() != shard.starts_hash:
        return "has other document starts than when it was written"
    return None
