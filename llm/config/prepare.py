"""The options of ``python -m llm.prepare``."""

from __future__ import annotations

from copy import copy
from typing import Any, Literal

from pydantic import model_validator

from llm.config.option import OptionGroup, option
from llm.config.options import DataOptions, TokenizerOptions

# One row a line, however long: the table is read down its columns.
# fmt: off


def _same(table: type[OptionGroup], name: str) -> Any:
    """The trainer's own row of that name."""
    return copy(table.model_fields[name])


class PrepareOptions(OptionGroup):
    """Text to token shards."""

    output_dir: str = option(..., "folder of the shards, which the trainer takes as --train_dir", metavar="DIR")
    dataset_name: str | None = option(None, "Hub dataset (streamed), local folder, or builtin:python", metavar="NAME")
    dataset_config_name: str | None = _same(DataOptions, "dataset_config_name")
    train_file: tuple[str, ...] | None = option(None, "text: txt, md, csv, tsv, json, jsonl or parquet, compressed ones too; several files and globs", metavar="FILE", replaces=("dataset_name", "dataset_config_name"))
    validation_file: tuple[str, ...] | None = _same(DataOptions, "validation_file")
    validation_split_percentage: float = _same(DataOptions, "validation_split_percentage")
    text_column: str | None = _same(DataOptions, "text_column")
    no_keep_linebreaks: bool = _same(DataOptions, "no_keep_linebreaks")
    tokenizer_name: str | None = option(None, "Hub name or folder of the tokenizer, or char", metavar="NAME")
    train_tokenizer: Literal["bpe"] | None = option(None, "train the tokenizer on the text instead: bpe is byte-level")
    vocab_size: int | None = option(None, "tokens of --train_tokenizer (default 8192)", ge=258, metavar="N")
    shard_size: int = option(100_000_000, "tokens of a shard; the last one has fewer", ge=1, metavar="N")
    preprocessing_num_workers: int | None = _same(DataOptions, "preprocessing_num_workers")
    verify: bool = option(False, "read the finished shards of --output_dir and compare every byte with what was written; prepares nothing")

    @model_validator(mode="after")
    def _refuse_what_cannot_work(self) -> PrepareOptions:
        if self.vocab_size is not None and self.train_tokenizer is None:
            raise ValueError("--vocab_size belongs to --train_tokenizer bpe; other tokenizers have their own size")
        if self.train_tokenizer is not None and self.tokenizer_name is not None:
            raise ValueError("--train_tokenizer and --tokenizer_name say two things; give one of them")
        if not self.verify and self.train_tokenizer is None and self.tokenizer_name is None:
            raise ValueError("no tokenizer: give --tokenizer_name NAME (such as gpt2), or --train_tokenizer bpe")
        return self

    @property
    def data(self) -> DataOptions:
        """What the text is, as the trainer's table says it."""
        return DataOptions(**{name: getattr(self, name) for name in PrepareOptions.model_fields if name in DataOptions.model_fields})

    @property
    def tokenizer(self) -> TokenizerOptions:
        """What the tokenizer is, as the trainer's table says it."""
        name = "train:bpe" if self.train_tokenizer == "bpe" else self.tokenizer_name
        return TokenizerOptions(tokenizer_name=name, vocab_size=self.vocab_size)
