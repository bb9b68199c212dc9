"""``python -m llm.prepare``: tokenize text of any size once, into token shards."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from pydantic import model_validator
from tqdm import tqdm

from llm.config.errors import UserError
from llm.config.exit_codes import run_command
from llm.config.option import OptionGroup, option
from llm.config.options import DataOptions, ModelOptions, TokenizerOptions
from llm.config.reader import read_options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llm.data.shards.format import TokenizedText
    from llm.data.sources.corpus import Corpus
    from llm.files.lock import Lock

# Text for training a tokenizer. The training counts words in memory; more text changes no important merge.
_TOKENIZER_CHARS = 1 << 30


def _data_option(name: str) -> Any:
    """Return a copy of the trainer's own option of that name."""
    return copy(DataOptions.model_fields[name])


class PrepareOptions(OptionGroup):
    """The options of ``python -m llm.prepare``."""

    output_dir: str = option(..., "folder of the shards, which the trainer reads as --train_dir", metavar="DIR")
    dataset_name: str | None = option(None, "Hub dataset (streamed), local folder, or builtin:python", metavar="NAME")
    dataset_config_name: str | None = _data_option("dataset_config_name")
    train_file: tuple[str, ...] | None = option(
        None,
        "text: txt, md, csv, tsv, json, jsonl or parquet files, also compressed; several files and globs",
        metavar="FILE",
        replaces=("dataset_name", "dataset_config_name"),
    )
    validation_file: tuple[str, ...] | None = _data_option("validation_file")
    validation_split_percentage: float = _data_option("validation_split_percentage")
    text_column: str | None = _data_option("text_column")
    no_keep_linebreaks: bool = _data_option("no_keep_linebreaks")
    tokenizer_name: str | None = option(None, "Hub name or folder of the tokenizer, or char", metavar="NAME")
    train_tokenizer: Literal["bpe"] | None = option(None, "train the tokenizer on the text: bpe is byte-level BPE")
    vocab_size: int | None = option(None, "vocabulary size of --train_tokenizer (default 8192)", ge=258, metavar="N")
    shard_size: int = option(100_000_000, "tokens per shard; the last one has fewer", ge=1, metavar="N")
    preprocessing_num_workers: int | None = _data_option("preprocessing_num_workers")
    verify: bool = option(
        False,
        "read the finished shards of --output_dir and compare every byte with what was written; prepare nothing",
    )

    @model_validator(mode="after")
    def _check_combinations(self) -> PrepareOptions:
        if self.vocab_size is not None and self.train_tokenizer is None:
            raise ValueError("--vocab_size applies to --train_tokenizer bpe only; other tokenizers have a fixed size")
        if self.train_tokenizer is not None and self.tokenizer_name is not None:
            raise ValueError("--train_tokenizer and --tokenizer_name each name the tokenizer; give one of them")
        if not self.verify and self.train_tokenizer is None and self.tokenizer_name is None:
            raise ValueError("no tokenizer: give --tokenizer_name NAME (such as gpt2), or --train_tokenizer bpe")
        return self

    @property
    def data(self) -> DataOptions:
        """The text, as the options of the trainer."""
        return DataOptions(
            dataset_name=self.dataset_name,
            dataset_config_name=self.dataset_config_name,
            train_file=self.train_file,
            validation_file=self.validation_file,
            validation_split_percentage=self.validation_split_percentage,
            text_column=self.text_column,
            no_keep_linebreaks=self.no_keep_linebreaks,
            preprocessing_num_workers=self.preprocessing_num_workers,
        )

    @property
    def tokenizer(self) -> TokenizerOptions:
        """The tokenizer, as the options of the trainer."""
        name = "train:bpe" if self.train_tokenizer == "bpe" else self.tokenizer_name
        return TokenizerOptions(tokenizer_name=name, vocab_size=self.vocab_size)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the shards, or verify them, and return the exit code.

    Args:
        argv: the command line without the program's name; `sys.argv[1:]` when None.
    """
    return run_command(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    options = read_options(
        PrepareOptions,
        argv,
        prog="python -m llm.prepare",
        description="Tokenize a text once, into shards that the trainer reads as --train_dir.",
    )
    folder = Path(options.output_dir).expanduser()
    if options.verify:
        _verify(folder)
    else:
        _prepare(folder, options)
    return 0


def _prepare(folder: Path, options: PrepareOptions) -> None:
    """Write the shards, or those that an interrupted start has not written, and print a summary."""
    from llm.data.preparation.job_record import claim_folder
    from llm.data.shards.format import MANIFEST, open_folder
    from llm.files.lock import locked

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _log_to_stdout(), locked(folder / ".lock") as lock:
            corpus = _open_text(options)
            settings = {
                "text": corpus.name,
                "fingerprint": corpus.fingerprint,
                "tokenizer": options.tokenizer.tokenizer_name,
                "vocab_size": options.vocab_size,
                "shard_size": options.shard_size,
            }
            claim_folder(folder, settings)
            if (folder / MANIFEST).is_file():
                print(f"{folder} is finished already")
            else:
                _write_shards(folder, options, corpus, lock)
        _print_summary(folder, open_folder(folder))
    except KeyboardInterrupt:
        sys.stderr.write(f"interrupted; start the same command again: it continues in {folder}\n")
        raise
    except OSError as error:
        raise UserError(
            f"--output_dir {folder}: cannot be written ({error.strerror or error}); make room or give another folder,"
            " and start the same command again: it continues"
        ) from error


def _verify(folder: Path) -> None:
    """Print a line for each shard and one for the tokenizer.

    Raises:
        UserError: a shard is damaged, or the tokenizer is another one.
    """
    from llm.data.shards.format import verify
    from llm.tokenization.vocabulary import tokenizer_hash

    num_damaged = 0
    expected_hashes = set()
    for shard, damage in verify(folder):
        if damage is not None:
            num_damaged += 1
        expected_hashes.add(shard.tokenizer_hash)
        print(f"{shard.path}: {damage or f'good, {shard.num_tokens:,} tokens'}")
    if num_damaged:
        raise UserError(f"{folder}: {num_damaged} shards are damaged; remove the folder and prepare the text again")
    saved = folder / "tokenizer"
    if saved.is_dir():  # the shards of the token cache have no tokenizer beside them
        if {tokenizer_hash(_load_saved_tokenizer(saved))} != expected_hashes:
            raise UserError(f"{saved} is not the tokenizer of the shards; remove the folder and prepare the text again")
        print(f"{saved}: good")


class _LineHandler(logging.StreamHandler[TextIO]):
    """A handler that prints above a progress bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=self.stream)
        self.flush()


@contextmanager
def _log_to_stdout() -> Iterator[None]:
    """Print the log lines of this package on the standard output inside the `with` block."""
    logger = logging.getLogger("llm")
    handler = _LineHandler(sys.stdout)
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
    """Return the text of the options, not read yet; a dataset of the Hub is streamed."""
    from llm.data.sources.corpus import open_corpus
    from llm.data.sources.hub_streaming import is_hub_dataset, open_streaming_corpus
    from llm.hub.connection import detect, names_on_hub, unreachable_line

    tokenizer = None if options.tokenizer_name == "char" else options.tokenizer_name
    names = names_on_hub((options.dataset_name, tokenizer))
    if names and not detect(names):
        print(unreachable_line(names), file=sys.stderr)
        return open_corpus(options.data)
    return open_streaming_corpus(options.data) if is_hub_dataset(options.dataset_name) else open_corpus(options.data)


def _write_shards(folder: Path, options: PrepareOptions, corpus: Corpus, lock: Lock) -> None:
    from llm.data.preparation.progress_bar import text_progress_bar
    from llm.data.preparation.tokenize import write_shards
    from llm.tokenization.encoder import encoding_threads
    from llm.tokenization.vocabulary import is_character_level, tokenizer_hash

    with encoding_threads(options.preprocessing_num_workers):
        tokenizer = _load_tokenizer(folder, options, corpus)
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


def _load_tokenizer(folder: Path, options: PrepareOptions, corpus: Corpus) -> PreTrainedTokenizerBase:
    """Return the tokenizer that is saved in the folder; save the one of the options there first if there is none."""
    from huggingface_hub import constants

    from llm.files.atomic import atomic_folder
    from llm.tokenization.load import load_tokenizer

    saved = folder / "tokenizer"
    if not saved.is_dir():
        # A vocabulary of characters must know those of the validation text too.
        is_char = options.tokenizer_name == "char"
        tokenizer = load_tokenizer(
            options.tokenizer,
            ModelOptions(),
            texts=lambda: corpus.texts(include_validation=True) if is_char else _beginning(corpus.texts()),
            corpus_fingerprint=corpus.fingerprint,
            cache_dir=Path(constants.HF_HOME) / "llm",
        )
        try:
            with atomic_folder(saved) as temporary:
                tokenizer.save_pretrained(temporary)
        except OSError:
            raise
        except Exception as error:  # tokenizers raises a plain Exception where the disk is full
            raise OSError(str(error)) from error
    # The trainer loads the saved tokenizer, so its ids are the ones to write.
    return _load_saved_tokenizer(saved)


def _load_saved_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from llm.tokenization.load import load_tokenizer

    return load_tokenizer(
        TokenizerOptions(tokenizer_name=str(folder)),
        ModelOptions(),
        texts=lambda: iter(()),
        corpus_fingerprint="",
        cache_dir=Path(),
    )


def _beginning(texts: Iterator[str]) -> Iterator[str]:
    """Yield the first texts, as many as are needed to train a tokenizer."""
    num_chars = 0
    for text in texts:
        yield text
        num_chars += len(text)
        if num_chars >= _TOKENIZER_CHARS:
            print(f"the tokenizer is trained on the first {num_chars / 1e6:.0f} million characters")
            return


def _print_summary(folder: Path, streams: TokenizedText) -> None:
    from llm.data.sources.documents import format_skipped

    for name, stream in (("train", streams.train), ("validation", streams.validation)):
        if stream is None:
            print(f"{name}: nothing held out (--validation_split_percentage, --validation_file)")
            continue
        num_bytes = stream.num_bytes or 0
        num_tokens = len(stream.tokens)
        print(
            f"{name}: {stream.num_documents or 0:,} documents, {num_tokens:,} tokens,"
            f" {num_bytes / max(num_tokens, 1):.2f} bytes a token"
        )
    print(f"skipped: {format_skipped(Counter(dict(streams.skipped)))}")
    print(f"train on it: python -m llm.trainers.gpt --train_dir {folder}")


if __name__ == "__main__":
    sys.exit(main())
