"""``python -m llm.prepare``: text of any size to token shards, tokenized once."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tqdm import tqdm

from llm.config.errors import UserError
from llm.config.exit_codes import run_command
from llm.config.prepare import PrepareOptions
from llm.config.reader import read_options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llm.data.shards.format import Streams
    from llm.data.sources.corpus import Corpus
    from llm.files.lock import Lock

# The trainer of a tokenizer counts the words of all that it is given; more text changes no merge of note.
_TOKENIZER_CHARS = 1 << 30
_JOB = "prepare.json"
# Raised when the same text begins to be cut into other pieces, by whose number a shard says where it ends.
_CALLED = {"fingerprint": "content of the text", "version": "version of this program"}
# Names that nothing but this program gives.
_LEFT = (f".{_JOB}.*.tmp", ".tokenizer.*.tmp", ".tokenizer.old")
_JOB_VERSION = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the shards, or verifies them, and returns the exit code."""
    return run_command(lambda: _prepare(sys.argv[1:] if argv is None else argv))


def _prepare(argv: Sequence[str]) -> int:
    options = read_options(
        PrepareOptions,
        argv,
        prog="python -m llm.prepare",
        description="Tokenizes a text once, into shards that the trainer reads as --train_dir.",
    )
    folder = Path(options.output_dir).expanduser()
    if options.verify:
        return _verify(folder)

    from llm.data.shards.format import MANIFEST, open_folder
    from llm.files.lock import locked

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _speaking(), locked(folder / ".lock") as lock:
            corpus = _open_text(options)
            _claim(folder, options, corpus)
            if (folder / MANIFEST).is_file():
                print(f"{folder} is finished already")
            else:
                _write(folder, options, corpus, lock)
        _sum_up(folder, open_folder(folder))
    except KeyboardInterrupt:
        sys.stderr.write(f"interrupted; start the same command again: it continues in {folder}\n")
        raise
    except OSError as error:
        raise UserError(
            f"--output_dir {folder}: cannot be written ({error.strerror or error}); make room or name another,"
            " and start the same command again: it continues"
        ) from error
    return 0


def _verify(folder: Path) -> int:
    """Prints a line for every shard, and one for the tokenizer; 1 if one is damaged."""
    from llm.data.shards.format import verify
    from llm.tokenization.vocabulary import tokenizer_hash

    num_damaged, expected = 0, set()
    for shard, damage in verify(folder):
        num_damaged += damage is not None
        expected.add(shard.tokenizer_hash)
        print(f"{shard.path}: {damage or f'good, {shard.num_tokens:,} tokens'}")
    if num_damaged:
        raise UserError(f"{folder}: {num_damaged} shards are damaged; remove the folder and prepare the text again")
    saved = folder / "tokenizer"
    if saved.is_dir():  # the shards of the cache have theirs elsewhere
        if {tokenizer_hash(_saved_tokenizer(saved))} != expected:
            raise UserError(f"{saved} is not the tokenizer of the shards; remove the folder and prepare the text again")
        print(f"{saved}: good")
    return 0


class _Lines(logging.StreamHandler[TextIO]):
    """Prints above a progress bar, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=self.stream)
        self.flush()


@contextmanager
def _speaking() -> Iterator[None]:
    """Lets the package's own lines through to the standard output while the block runs."""
    logger = logging.getLogger("llm")
    handler = _Lines(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _open_text(options: PrepareOptions) -> Corpus:
    """The text that the options name, nothing read yet; a dataset of the Hub comes as a stream."""
    from llm.data.sources.corpus import open_corpus
    from llm.data.sources.hub_streaming import is_hub_dataset, open_streaming_corpus
    from llm.hub.connection import detect, names_on_hub, unreachable_line

    tokenizer = None if options.tokenizer_name == "char" else options.tokenizer_name
    names = names_on_hub((options.dataset_name, tokenizer))
    if names and not detect(names):
        print(unreachable_line(names), file=sys.stderr)
        return open_corpus(options.data)
    return open_streaming_corpus(options.data) if is_hub_dataset(options.dataset_name) else open_corpus(options.data)


def _claim(folder: Path, options: PrepareOptions, corpus: Corpus) -> None:
    """Records what the shards are made of, or refuses to continue those of something else."""
    from llm.files.atomic import write_text

    job = {
        "version": _JOB_VERSION,
        "text": corpus.name,
        "fingerprint": corpus.fingerprint,
        "tokenizer": options.tokenizer.tokenizer_name,
        "vocab_size": options.vocab_size,
        "shard_size": options.shard_size,
    }
    path = folder / _JOB
    if not path.is_file():
        others = [entry.name for entry in folder.iterdir() if entry.suffix in (".bin", ".json", ".npy")]
        if others:
            raise UserError(f"--output_dir {folder}: holds {others[0]}, which is of something else; name another")
        write_text(path, json.dumps(job, indent=2) + "\n")
        return
    try:
        found = json.loads(path.read_text())
        changed = [name for name, value in job.items() if found.get(name) != value]
    except (ValueError, AttributeError):
        changed = [f"broken {_JOB}"]
    if changed and not any(folder.glob("*.bin")):
        # Nothing was made yet: what was begun with, such as a file that is no text, may be mended.
        _remove_left(folder)
        shutil.rmtree(folder / "tokenizer", ignore_errors=True)
        write_text(path, json.dumps(job, indent=2) + "\n")
        return
    if changed:
        changed = [_CALLED.get(name, name) for name in changed]
        raise UserError(
            f"--output_dir {folder}: was begun with another {' and another '.join(changed)};"
            " give what it was begun with, or name another folder"
        )
    _remove_left(folder)


def _remove_left(folder: Path) -> None:
    """Removes what an earlier process was killed over; nobody else writes here now."""
    for left in (path for name in _LEFT for path in folder.glob(name)):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def _write(folder: Path, options: PrepareOptions, corpus: Corpus, lock: Lock) -> None:
    from llm.data.preparation.progress_bar import text_progress_bar
    from llm.data.preparation.tokenize import write_shards
    from llm.tokenization.encoder import encoding_threads
    from llm.tokenization.vocabulary import is_character_level, tokenizer_hash

    with encoding_threads(options.preprocessing_num_workers):
        tokenizer = _tokenizer(folder, options, corpus)
        with text_progress_bar() as on_progress:
            write_shards(
                corpus,
                tokenizer,
                folder,
                tokenizer_hash=tokenizer_hash(tokenizer),
                shard_size=options.shard_size,
                eos_in_single_text=not is_character_level(tokenizer),
                num_workers=options.preprocessing_num_workers,
                on_progress=on_progress,
                check=lock.check,
            )


def _tokenizer(folder: Path, options: PrepareOptions, corpus: Corpus) -> PreTrainedTokenizerBase:
    """The one in the folder, or else the one that the options name, which is put there."""
    from huggingface_hub import constants

    from llm.config.options import ModelOptions
    from llm.files.atomic import atomic_folder
    from llm.tokenization.load import load_tokenizer

    saved = folder / "tokenizer"
    if not saved.is_dir():
        held_out = options.tokenizer_name == "char"
        made = load_tokenizer(
            options.tokenizer,
            ModelOptions(),
            texts=lambda: corpus.texts(include_validation=True) if held_out else _first(corpus.texts()),
            corpus_fingerprint=corpus.fingerprint,
            cache_dir=Path(constants.HF_HOME) / "llm",
        )
        try:
            with atomic_folder(saved) as temporary:
                made.save_pretrained(temporary)
        except OSError:
            raise
        except Exception as error:  # what tokenizers raises where the disk is full is nothing else
            raise OSError(str(error)) from error
    # Always the saved one: what the trainer will load decides what the ids mean.
    return _saved_tokenizer(saved)


def _saved_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from llm.config.options import ModelOptions, TokenizerOptions
    from llm.tokenization.load import load_tokenizer

    return load_tokenizer(
        TokenizerOptions(tokenizer_name=str(folder)),
        ModelOptions(),
        texts=lambda: iter(()),
        corpus_fingerprint="",
        cache_dir=Path(),
    )


def _first(texts: Iterator[str]) -> Iterator[str]:
    """The beginning of a long text, enough for a tokenizer."""
    num_chars = 0
    for text in texts:
        yield text
        num_chars += len(text)
        if num_chars >= _TOKENIZER_CHARS:
            print(f"the tokenizer is trained on the first {num_chars / 1e6:.0f} million characters")
            return


def _sum_up(folder: Path, streams: Streams) -> None:
    from llm.data.sources.documents import format_skipped

    for name, stream in (("train", streams.train), ("validation", streams.validation)):
        if stream is None:
            print(f"{name}: nothing held out (--validation_split_percentage, --validation_file)")
            continue
        num_bytes, num_tokens = stream.num_bytes or 0, len(stream.tokens)
        print(
            f"{name}: {stream.num_documents or 0:,} documents, {num_tokens:,} tokens,"
            f" {num_bytes / max(num_tokens, 1):.2f} bytes a token"
        )
    print(f"skipped: {format_skipped(Counter(dict(streams.skipped)))}")
    print(f"train on it: python -m llm.trainers.gpt --train_dir {folder}")


if __name__ == "__main__":
    sys.exit(main())
