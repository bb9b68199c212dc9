"""The format of tokenized text: a folder of shards, each of which is complete or does not exist.

    train_00000.bin      ids and nothing else, little-endian uint16 or uint32 as the vocabulary needs
    train_00000.starts   indices of the tokens that begin a document: little-endian uint64, ascending
    train_00000.json     the sidecar, written last: without it the shard does not exist
    validation_00000.*
    manifest.json        facts about the whole text, written when all shards exist

Opening reads sidecars and file sizes, never ids, so that it takes the same time for any text. `verify` reads all ids.
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
    """A shard, or a folder of shards, is damaged or unsuitable."""


class TruncatedShardError(ShardError):
    """A file is missing, or its size differs from what its sidecar or header states."""


class UnknownFormatError(ShardError):
    """A file or folder is in no format that this package reads."""


class VersionMismatchError(ShardError):
    """A shard or manifest was written in another version of the format."""


class TokenizerMismatchError(ShardError):
    """The ids are those of another tokenizer, or of another vocabulary size."""


class UnfinishedShardsError(ShardError):
    """The manifest of a folder is missing: not all shards of its text are written."""


@dataclass(frozen=True)
class ResumePoint:
    """The position in a split's text where a shard begins or ends, from which the next shard continues exactly.

    Attributes:
        document: number of the document, from 0.
        piece: number of the piece that is encoded at once (a document, or a part of a long one).
        token: index of the token inside the piece, counting the end-of-text tokens around it.
    """

    document: int
    piece: int
    token: int


@dataclass(frozen=True)
class Shard:
    """The facts in the sidecar of one shard.

    Attributes:
        path: the file of ids.
        dtype: `uint16` or `uint32`.
        num_tokens: number of ids in the file.
        num_documents: number of documents that start in the shard.
        tokenizer_hash: hash of the tokenizer's behaviour.
        vocabulary_size: every id is below it.
        min_id: smallest id.
        max_id: largest id.
        token_hash: BLAKE2b hash of the file of ids, 16 bytes in hexadecimal.
        starts_hash: BLAKE2b hash of the file of document starts, 16 bytes in hexadecimal.
        begins: where in the text the shard begins.
        ends: where in the text the next shard continues.
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
        """The file of ids, uint16 or uint32 [num_tokens], not yet mapped."""
        return TokenFile(self.path, DTYPES[self.dtype], self.num_tokens)

    @property
    def starts(self) -> TokenFile:
        """The file of document starts, uint64 [num_documents], counted from the shard's first token, not yet mapped."""
        return TokenFile(starts_path(self.path), STARTS_DTYPE, self.num_documents)

    def write_sidecar(self) -> None:
        """Write the sidecar, with which the shard begins to exist."""
        facts = {"magic": MAGIC, "version": VERSION} | asdict(self)
        del facts["path"]
        write_text(self.path.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")


@dataclass(frozen=True)
class SplitTokens:
    """The tokens of one split.

    Attributes:
        tokens: integers [number of tokens], of which slices are read.
        num_documents: number of documents; each side of a document that was split in two counts as one. None if
            unknown.
        num_bytes: bytes of the text in UTF-8; None if unknown.
        starts: the document starts; None if unknown.
    """

    tokens: NDArray[Any] | Tokens
    num_documents: int | None
    num_bytes: int | None
    starts: Starts | None = None


@dataclass(frozen=True)
class MixtureSource:
    """One of the texts of a mixture.

    Attributes:
        name: name of the text in messages.
        weight: weight of the text, relative to the other weights; None: the number of its blocks.
        text: the training tokens of the text.
    """

    name: str
    weight: Fraction | None
    text: SplitTokens


@dataclass(frozen=True)
class TokenizedText:
    """The tokens of a text, in two splits.

    Attributes:
        train: the tokens to train on; of a mixture, those of all sources concatenated.
        validation: the held-out tokens, None if there are none.
        skipped: number of rows that were no text, by reason.
        data_hash: hash of the text of both splits.
        vocabulary_size: every id is below it.
        dir: the folder of the files.
        name: name of the text in messages.
        sources: the texts of a mixture; empty if there is one text.
    """

    train: SplitTokens
    validation: SplitTokens | None
    skipped: Mapping[str, int]
    data_hash: str
    vocabulary_size: int
    dir: Path
    name: str = ""
    sources: tuple[MixtureSource, ...] = ()


def shard_path(folder: Path, split: Split, number: int) -> Path:
    """Return the path of a shard's file of ids, such as FOLDER/train_00000.bin."""
    return folder / f"{split}_{number:05d}.bin"


def starts_path(path: Path) -> Path:
    """Return the path of the file of document starts beside a file of ids."""
    return path.with_suffix(".starts")


def open_shard(path: Path, *, tokenizer_hash: str | None = None, vocabulary_size: int | None = None) -> Shard:
    """Read a shard's sidecar and compare it with the sizes of the shard's files.

    Args:
        path: the file of ids.
        tokenizer_hash: hash of the tokenizer that the shard must be made with; None: any.
        vocabulary_size: vocabulary size that the shard must have; None: any.

    Raises:
        TruncatedShardError: a file is missing, or its size is not the one that the sidecar states.
        UnknownFormatError: the sidecar is not one of this package.
        VersionMismatchError: the sidecar is of another version of the format.
        TokenizerMismatchError: the shard was made with another tokenizer or vocabulary size.
        UnfinishedShardsError: there is no sidecar.
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
        raise UnknownFormatError(
            f"{path}: its sidecar lacks a key or has an unknown one ({error}); prepare it again"
        ) from None
    for file, expected in sizes.items():
        size = file.stat().st_size if file.is_file() else None
        if size != expected:
            state = "is missing" if size is None else f"has {size} bytes"
            raise TruncatedShardError(
                f"{file}: {state}, {expected} bytes are expected; copy it again, or prepare it again"
            )
    if tokenizer_hash is not None and shard.tokenizer_hash != tokenizer_hash:
        raise TokenizerMismatchError(
            f"{path}: made with another tokenizer ({shard.tokenizer_hash[:12]}, not {tokenizer_hash[:12]});"
            " leave --tokenizer_name out to use the one beside the shards, or prepare them again"
        )
    if vocabulary_size is not None and shard.vocabulary_size != vocabulary_size:
        raise TokenizerMismatchError(
            f"{path}: made for {shard.vocabulary_size} tokens, not {vocabulary_size}; prepare it again"
        )
    return shard


def finished_shards(folder: Path, split: Split, *, tokenizer_hash: str | None = None) -> list[Shard]:
    """Return the shards of a split from number 0 on, up to the first without a sidecar.

    Raises:
        ShardError: the files of a shard do not agree with its sidecar.
    """
    shards: list[Shard] = []
    while (path := shard_path(folder, split, len(shards))).with_suffix(".json").is_file():
        shards.append(open_shard(path, tokenizer_hash=tokenizer_hash))
    return shards


def is_folder_of_shards(folder: Path) -> bool:
    """Return whether a folder holds shards of this package, finished or not."""
    return (folder / MANIFEST).is_file() or any(shard_path(folder, split, 0).is_file() for split in SPLITS)


def open_folder(folder: Path, *, tokenizer_hash: str | None = None) -> TokenizedText:
    """Open a folder of shards, in a time that does not depend on the length of the text.

    Args:
        folder: a folder that `llm.prepare` or the token cache wrote.
        tokenizer_hash: hash of the tokenizer that the shards must be made with; None: any.

    Raises:
        UnfinishedShardsError: there is no manifest: not all shards are written.
        ShardError: a shard or the manifest is damaged or unsuitable; see `open_shard`.
    """
    manifest = read_json(folder / MANIFEST, FOLDER_MAGIC)
    try:
        splits: dict[str, SplitTokens] = {}
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
                raise TruncatedShardError(
                    f"{folder}: {len(tokens)} tokens of {split}, {facts['num_tokens']} are expected;"
                    " prepare the text again"
                )
            splits[split] = SplitTokens(tokens, facts["num_documents"], facts["num_bytes"], StartsInFiles(shards))
        validation = splits["validation"]
        return TokenizedText(
            splits["train"],
            validation if len(validation.tokens) else None,
            manifest["skipped"],
            manifest["data_hash"],
            manifest["vocabulary_size"],
            folder,
            manifest["name"],
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise UnknownFormatError(
            f"{folder / MANIFEST}: lacks a key or has a wrong value ({error}); prepare the text again"
        ) from None


def read_json(path: Path, magic: str) -> dict[str, Any]:
    """Read a sidecar or a manifest; return its facts without magic and version.

    Args:
        path: the JSON file.
        magic: the value that its key `magic` must have.

    Raises:
        UnfinishedShardsError: the file does not exist.
        UnknownFormatError: the file is something else.
        VersionMismatchError: the file is of another version of the format.
    """
    try:
        facts = json.loads(path.read_text())
    except FileNotFoundError:
        raise UnfinishedShardsError(
            f"{path}: is missing, so the shards are unfinished or were not made by llm.prepare;"
            " run the same `python -m llm.prepare` again, which continues"
        ) from None
    except (OSError, ValueError) as error:
        raise UnknownFormatError(f"{path}: cannot be read ({error}); prepare the text again") from None
    if not isinstance(facts, dict) or facts.pop("magic", None) != magic:
        raise UnknownFormatError(
            f"{path}: is no file of token shards (wrong magic); name a folder that llm.prepare wrote"
        )
    version = facts.pop("version", None)
    if version != VERSION:
        raise VersionMismatchError(
            f"{path}: has format version {version}, this program reads {VERSION}; prepare the text again"
        )
    return facts


def verify(folder: Path) -> Iterator[tuple[Shard, str | None]]:
    """Read every shard of a finished folder; yield each with a description of its damage, None if it is intact.

    Raises:
        ShardError: `open_folder` refuses the folder.
    """
    open_folder(folder)
    for split in SPLITS:
        for shard in finished_shards(folder, split):
            yield shard, _damage(shard)


def _damage(shard: Shard) -> str | None:
    digest = blake2b(digest_size=HASH_BYTES)
    low = shard.vocabulary_size
    high = -1
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
