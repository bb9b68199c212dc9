"""The tokenized text, kept on disk: a second start, or another block size, tokenizes nothing.

The shards of a text lie in one folder, named by a hash of the text's fingerprint and the tokenizer's.
The folder gets that name when it is whole.
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
from llm.data.shards.format import VERSION, ShardError, Streams, open_folder
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
) -> Streams:
    """The streams of a text: from the cache, or else made and put there.

    The tokenizer's end-of-text token follows each document, if it has one. A document that is cut
    in two has it at its end only.

    Args:
        corpus: the text.
        tokenizer: gives the ids, without special tokens around a text.
        tokenizer_hash: changes when the tokenizer does.
        options: whether to tokenize again, and with how many processes.
        cache_dir: where streams are kept, in a folder `tokens`.
        eos_in_single_text: whether a split that is one document ends with the token, too.
        on_progress: shown how far it is, None: lines are logged.

    Raises:
        UserError: the text cannot be read, holds nothing, or the cache cannot be written.
    """
    folder = _folder_of(corpus, tokenizer_hash, eos_in_single_text, cache_dir)
    found = None if options.overwrite_cache else _open(folder)
    if found is not None:
        log.info("tokens of %s: from the cache %s", corpus.name, folder)
        return found
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
    made = _open(folder)
    if made is None:
        raise UserError(f"the token cache {folder} vanished while it was written; start again")
    return made


@contextmanager
def _new_folder(folder: Path, *, replace: bool) -> Iterator[Path]:
    """A folder in which to write, that takes its name when the block ends well and else goes."""
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


def _folder_of(corpus: Corpus, tokenizer_hash: str, eos_in_single_text: bool, cache_dir: Path) -> Path:
    facts = json.dumps([VERSION, "shards", corpus.fingerprint, tokenizer_hash, eos_in_single_text])
    return cache_dir / "tokens" / blake2b(facts.encode(), digest_size=16).hexdigest()


def _open(folder: Path) -> Streams | None:
    """The streams in a folder, None if it is not there or damaged (which is said)."""
    if not folder.exists():
        return None
    try:
        return open_folder(folder)
    except (ShardError, OSError) as error:
        log.warning("the token cache %s is damaged (%s): tokenizing again", folder, error)
    return None


def _put_in_place(temporary: Path, folder: Path, *, replace: bool) -> None:
    """Gives a whole folder its name, unless another process was faster and left a good one."""
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
        if not replace and _open(folder) is not None:
            return
        replace = False
        # Whoever has the old files mapped keeps them until it ends.
        old = temporary.with_suffix(".old")
        try:
            folder.rename(old)
        except FileNotFoundError:
            continue
        shutil.rmtree(old, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Removes what killed processes left of the same streams."""
    for path in folder.parent.glob(f".{folder.name}.*"):
        try:
            newest = max(file.stat().st_mtime for file in [path, *path.iterdir()])
        except OSError:
            continue
        if time.time() - newest > _SECONDS_UNTIL_ABANDONED:
            shutil.rmtree(path, ignore_errors=True)
