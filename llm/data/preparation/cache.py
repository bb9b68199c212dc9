"""The token cache: a second run on the same text, also with another block size, does not tokenize again.

The shards of a text are in one folder, whose name is a hash of the text's fingerprint and the tokenizer's hash. The
folder gets this name when it is complete.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from llm.config.errors import UserError
from llm.config.options import DataOptions
from llm.data.preparation.tokenize import SHARD_SIZE, ProgressCallback, write_shards
from llm.data.shards.format import VERSION, ShardError, TokenizedText, open_folder
from llm.data.sources.corpus import Corpus
from llm.files.atomic import sync_folder, sync_tree
from llm.tokenization.encoder import encoding_threads

log = logging.getLogger(__name__)

_SECONDS_UNTIL_ABANDONED = 24 * 3600.0


def load_or_tokenize(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokenizer_hash: str,
    options: DataOptions,
    cache_dir: Path,
    eos_in_single_text: bool = True,
    on_progress: ProgressCallback | None = None,
) -> TokenizedText:
    """Return the tokens of a text from the cache, or tokenize the text into the cache first.

    The tokenizer's end-of-text token follows each document, if the tokenizer has one. A document that is divided
    between the splits gets the token at its end only.

    Args:
        corpus: the text.
        tokenizer: encodes the text, without special tokens around it.
        tokenizer_hash: changes when the tokenizer does.
        options: whether to tokenize again, and with how many processes.
        cache_dir: folder of the caches; tokens are in its subfolder `tokens`.
        eos_in_single_text: whether a split that is one document also ends with the end-of-text token.
        on_progress: called after about every megabyte of text; None: a line is logged every few seconds.

    Returns:
        The tokens of the splits, as memory-mapped shards.

    Raises:
        UserError: the text cannot be read or holds nothing, or the cache cannot be written.
    """
    folder = _cache_folder(corpus, tokenizer_hash, eos_in_single_text, cache_dir)
    cached = None if options.overwrite_cache else _open_if_complete(folder)
    if cached is not None:
        log.info("tokens of %s: from the cache %s", corpus.name, folder)
        return cached
    num_workers = options.preprocessing_num_workers
    with _new_folder(folder, replace=options.overwrite_cache) as temporary, encoding_threads(num_workers):
        write_shards(
            corpus,
            tokenizer,
            temporary,
            tokenizer_hash=tokenizer_hash,
            shard_size=SHARD_SIZE,
            eos_in_single_text=eos_in_single_text,
            num_workers=num_workers,
            on_progress=on_progress,
        )
    streams = _open_if_complete(folder)
    if streams is None:
        raise UserError(f"the token cache {folder} was removed or damaged after it was written; start again")
    return streams


@contextmanager
def _new_folder(folder: Path, *, replace: bool) -> Iterator[Path]:
    """Create a temporary folder, which gets its final name after the block, or is removed if the block fails."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        _remove_abandoned(folder)
        yield temporary
        _put_in_place(temporary, folder, replace=replace)
    except OSError as error:
        raise UserError(
            f"the token cache {folder.parent} cannot be written ({error.strerror});"
            " make room, or set HF_HOME to another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _cache_folder(corpus: Corpus, tokenizer_hash: str, eos_in_single_text: bool, cache_dir: Path) -> Path:
    key = json.dumps([VERSION, "shards", corpus.fingerprint, tokenizer_hash, eos_in_single_text])
    return cache_dir / "tokens" / blake2b(key.encode(), digest_size=16).hexdigest()


def _open_if_complete(folder: Path) -> TokenizedText | None:
    """Open the tokens in a folder; None if the folder does not exist or is damaged (with a warning)."""
    if not folder.exists():
        return None
    try:
        return open_folder(folder)
    except (ShardError, OSError) as error:
        log.warning("the token cache %s is damaged (%s): tokenizing again", folder, error)
    return None


def _put_in_place(temporary: Path, folder: Path, *, replace: bool) -> None:
    """Rename a complete folder to its final name, unless another process has put a valid folder there."""
    sync_tree(temporary)
    while True:
        try:
            temporary.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            sync_folder(folder.parent)
            return
        if not replace and _open_if_complete(folder) is not None:
            return
        replace = False
        # A process that has mapped the old files keeps them until it ends.
        old = temporary.with_suffix(".old")
        try:
            folder.rename(old)
        except FileNotFoundError:
            continue
        shutil.rmtree(old, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary folders that killed processes left beside this folder."""
    for path in folder.parent.glob(f".{folder.name}.*"):
        try:
            newest = max(file.stat().st_mtime for file in [path, *path.iterdir()])
        except OSError:
            continue
        if time.time() - newest > _SECONDS_UNTIL_ABANDONED:
            shutil.rmtree(path, ignore_errors=True)
