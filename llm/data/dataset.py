"""From the options to a tokenizer and tokenized text: the leaves that do the work are introduced here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub import constants
from transformers import PreTrainedTokenizerBase

from llm.config.errors import UserError
from llm.config.options import Options
from llm.config.weighted_dirs import parse_weighted_dirs
from llm.data.batches.blocks import Blocks, Ledger, cut_blocks, ledger
from llm.data.batches.loader import Batch, BlockSource
from llm.data.batches.mixture import mixed
from llm.data.preparation.cache import tokenize
from llm.data.preparation.progress_bar import text_progress_bar
from llm.data.shards.document_starts import StartsAfterEos
from llm.data.shards.external_formats import is_token_file, open_external_folder, open_files
from llm.data.shards.format import OtherTokenizerError, Stream, Streams, is_folder_of_shards, open_folder
from llm.data.sources.corpus import open_corpus
from llm.data.sources.files import named_folder
from llm.distributed.world import World
from llm.hub.connection import go_offline, hub_is_reachable
from llm.tokenization.encoder import vocabulary_size
from llm.tokenization.load import (
    CHARACTERS,
    TRAINED,
    bytes_of_tokens,
    is_character_level,
    load_tokenizer,
    tokenizer_hash,
)
from llm.training.plan import Plan
from llm.training.run_dir.formatting import ledger_line

log = logging.getLogger(__name__)

_CHUNK_TOKENS = 1 << 22


@dataclass(frozen=True)
class TokenizedDataset:
    """The tokenizer and the tokenized text of a run.

    Attributes:
        name: what people call the text.
        tokenizer: makes and reads its ids.
        tokenizer_hash: of the tokenizer's behaviour.
        streams: the ids, in two splits.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    tokenizer_hash: str
    streams: Streams

    def bytes_of_ids(self) -> tuple[torch.Tensor | None, float]:
        """How many bytes of text an id stands for, checked on the validation text.

        Returns:
            int32 [vocabulary], and the mean over the validation text; the table is None where its sum over
            that text is not the text's length (a tokenizer that changes text), so that the mean must do.
            Where nothing says how long the text is (files of other programs), the table is believed.
        """
        stream = self.streams.validation
        if stream is None or not len(stream.tokens):
            return None, 0.0
        table = bytes_of_tokens(self.tokenizer)
        num_tokens = len(stream.tokens)
        chunks = (stream.tokens[start : start + _CHUNK_TOKENS] for start in range(0, num_tokens, _CHUNK_TOKENS))
        num_bytes = sum(int(_lookup(table, chunk).sum()) for chunk in chunks)
        if stream.num_bytes is None or num_bytes == stream.num_bytes:
            return torch.from_numpy(table), num_bytes / num_tokens
        log.info("bits per byte: from the mean bytes of a token, since the tokenizer does not keep every byte")
        return None, stream.num_bytes / num_tokens

    def identity(self) -> dict[str, str]:
        """What a checkpoint must share with the run that continues it."""
        return {"data_hash": self.streams.data_hash, "tokenizer_hash": self.tokenizer_hash}

    def cut(self, block_size: int, *, document_mask: bool) -> tuple[BlockSource, Blocks | None]:
        """The blocks for training, and those for validation, None if there are none.

        Raises:
            UserError: the training text makes not even one block.
        """
        return cut_blocks(self.streams, block_size, document_mask=document_mask)

    def ledger(self, block_size: int) -> Ledger:
        """Where every token of the text is."""
        return ledger(self.streams, block_size)

    def ledger_line(self, block_size: int, *, document_mask: bool) -> str:
        """The same in words, before the training."""
        return ledger_line(self.ledger(block_size), document_mask=document_mask)

    def num_unreached_tokens(self, plan: Plan) -> int:
        """Tokens of the training blocks that the run does not read."""
        return plan.num_unreached_tokens

    def closing_lines(self, plan: Plan) -> list[str]:
        """What is known of the tokens only after the training."""
        return []

    def wait_for_batches(
        self,
        batches: Iterator[list[Batch]],
        blocks: BlockSource,
        plan: Plan,
        *,
        first_step: int,
        should_stop: Callable[[], bool],
    ) -> Iterator[list[Batch]]:
        """The batches, each when its tokens are there: at once."""
        return batches

    def check(self) -> None:
        """Raises what ended the batches before their time."""

    def require_same_on_all(self, world: World) -> None:
        """Every rank trains on rank 0's text, or none does.

        Raises:
            UserError: on a rank whose node found other files.
        """
        if world.broadcast(self.identity()) != self.identity():
            raise UserError(
                f"rank {world.rank} has another text or tokenizer than rank 0: give every node the same files, or one "
                "HF_HOME that all can see"
            )


def _lookup(table: npt.NDArray[np.int32], ids: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """The bytes of each id; files of other programs may hold ids that the tokenizer does not know."""
    if ids.size and int(ids.max()) >= len(table):
        raise UserError(
            f"the validation tokens hold id {ids.max()}, but the tokenizer has {len(table)} tokens:"
            " name the one they were made with as --tokenizer_name"
        )
    found: npt.NDArray[np.int32] = table[ids]
    return found


def prepare_dataset(options: Options, world: World) -> TokenizedDataset:
    """Opens the corpus, loads or trains the tokenizer, and tokenizes what no cache holds yet; or opens shards.

    Meant for `World.main_first`: rank 0 fills the caches, the others find them full. So `--overwrite_cache` is
    rank 0's alone.

    Raises:
        UserError: the text or the tokenizer is not what it was said to be.
    """
    if options.data.train_dir or any(map(is_token_file, options.data.train_file or ())):
        return _open_tokens(options)
    cache_dir = Path(constants.HF_HOME) / "llm"
    corpus = open_corpus(options.data)
    tokenizer = load_tokenizer(
        options.tokenizer,
        options.model,
        # Held-out characters too: a character that no id stands for could not be predicted, or measured.
        texts=lambda: corpus.texts(held_out=options.tokenizer.tokenizer_name == CHARACTERS),
        corpus_fingerprint=corpus.fingerprint,
        cache_dir=cache_dir,
    )
    identity = tokenizer_hash(tokenizer)
    with text_progress_bar() as watch:
        streams = tokenize(
            corpus,
            tokenizer,
            tokenizer_hash=identity,
            options=options.data if world.is_main else options.data.model_copy(update={"overwrite_cache": False}),
            cache_dir=cache_dir,
            eos_in_single_text=not is_character_level(tokenizer),
            watch=watch,
        )
    return TokenizedDataset(corpus.name, tokenizer, identity, streams)


def _open_tokens(options: Options) -> TokenizedDataset:
    """Opens what is tokenized already: folders of shards, or token files, of ours or of other programs."""
    data = options.data
    named = parse_weighted_dirs(data.train_dir or ())
    folders = [named_folder(each.name, "--train_dir") for each in named]
    tokenizer = _tokenizer_of_tokens(options, folders)
    # Nothing of --train_dir is held out where other validation tokens are named.
    share = 0 if data.validation_dir is not None else data.validation_split_percentage
    opener = _TokenReader(tokenizer, tokenizer_hash(tokenizer), vocabulary_size(tokenizer), data.document_mask)
    if not folders:
        files = data.train_file or ()
        if not all(map(is_token_file, (*files, *(data.validation_file or ())))):
            raise UserError("--train_file, --validation_file: token files and text are mixed; give one kind")
        streams = opener.checked(open_files(files, data.validation_file, share, opener.size, opener.identity))
    else:
        found = opener.folders(folders, share)
        # Of one folder a weight says nothing.
        weights = [each.weight for each in named]
        streams = found[0] if len(found) == 1 else mixed([each.name for each in named], weights, found)
    if data.validation_dir is not None:
        other = opener.folder(named_folder(data.validation_dir, "--validation_dir"), 0)
        streams = replace(streams, validation=other.validation or other.train, data_hash=_joined(streams, other))
    validation = streams.validation
    log.info(
        "tokens of %s: %s for training, %s for validation",
        *(streams.name, f"{len(streams.train.tokens):,}", f"{len(validation.tokens) if validation else 0:,}"),
    )
    return TokenizedDataset(streams.name, tokenizer, opener.identity, streams)


@dataclass(frozen=True)
class _TokenReader:
    """Opens tokens of one tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    identity: str
    size: int
    document_mask: bool

    def folder(self, folder: Path, percentage: float) -> Streams:
        """A folder's tokens, of ours or of another program's."""
        if is_folder_of_shards(folder):
            return self.checked(open_folder(folder, tokenizer_hash=self.identity))
        return self.checked(open_external_folder(folder, percentage, self.size))

    def folders(self, folders: Sequence[Path], percentage: float) -> list[Streams]:
        """The tokens of folders that are to be mixed.

        Raises:
            OtherTokenizerError: they are not of one tokenizer.
        """
        found: list[Streams] = []
        for folder in folders:
            try:
                found.append(self.folder(folder, percentage))
            except OtherTokenizerError as error:
                if not found:
                    raise
                raise OtherTokenizerError(
                    f"--train_dir {folder}: not of the tokenizer of {folders[0]};"
                    " what is mixed must be made with one and the same --tokenizer_name"
                ) from error
        return found

    def checked(self, streams: Streams) -> Streams:
        """The same, with document starts if they are wanted.

        Raises:
            OtherTokenizerError: it was made for another vocabulary.
        """
        if streams.vocabulary_size != self.size:
            raise OtherTokenizerError(
                f"{streams.dir}: made for {streams.vocabulary_size} tokens, the tokenizer has {self.size};"
                " leave --tokenizer_name out to use the one beside the shards"
            )
        _check_ids(streams.train, self.size)
        return self._with_starts(streams) if self.document_mask else streams

    def _with_starts(self, streams: Streams) -> Streams:
        parts = [streams.train] if streams.validation is None else [streams.train, streams.validation]
        if all(part.starts is not None for part in parts):
            return streams
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise UserError(
                f"--document_mask: {streams.name} does not say where documents start, and the tokenizer has no"
                " end-of-text token to find them by; leave it out, or make shards with llm.prepare"
            )
        log.info("document mask: in %s a document ends with %s", streams.name, self.tokenizer.eos_token)
        train, *held_out = [replace(part, starts=part.starts or StartsAfterEos(part.tokens, eos)) for part in parts]
        return replace(streams, train=train, validation=held_out[0] if held_out else None)


def _joined(one: Streams, other: Streams) -> str:
    return blake2b(f"{one.data_hash} {other.data_hash}".encode(), digest_size=16).hexdigest()


def _check_ids(stream: Stream, size: int) -> None:
    """Ids of another vocabulary are mostly seen at once; the others when their block is read."""
    head = stream.tokens[:_CHUNK_TOKENS]
    if len(head) and int(head.max()) >= size:
        raise OtherTokenizerError(
            f"the tokens hold id {head.max()}, but the tokenizer has {size} tokens:"
            " name the one they were made with as --tokenizer_name"
        )


def _tokenizer_of_tokens(options: Options, folders: Sequence[Path]) -> PreTrainedTokenizerBase:
    """The named tokenizer, else the first beside the shards, else the model's own; none is ever trained."""
    named = options.tokenizer
    beside = [folder / "tokenizer" for folder in folders if (folder / "tokenizer").is_dir()]
    if named.tokenizer_name is None and beside:
        named = named.model_copy(update={"tokenizer_name": str(beside[0])})
    if named.tokenizer_name in (CHARACTERS, TRAINED) or not (
        named.tokenizer_name or options.model.model_name_or_path or options.model.config_name
    ):
        raise UserError("tokens are given, not text: name the tokenizer they were made with as --tokenizer_name")

    def no_text() -> Iterator[str]:
        raise UserError("tokens are given, not text: name the tokenizer they were made with as --tokenizer_name")

    return load_tokenizer(named, options.model, texts=no_text, corpus_fingerprint="tokens", cache_dir=Path())


def detect_hub(options: Options, world: World) -> None:
    """Asks once whether the Hub is there, if something is to be had or left there; otherwise goes offline.

    Libraries that are not told so retry for half a minute a name. With nothing on the Hub there is nothing
    to ask, and no library has a reason to.
    """
    data, tokenizer = options.data.dataset_name, options.tokenizer.tokenizer_name
    names = (
        None if data is None or data.startswith("builtin:") else data,
        None if tokenizer in (CHARACTERS, TRAINED) else tokenizer,
        options.model.model_name_or_path,
        options.model.config_name,
    )
    on_the_hub = [name for name in names if name and not Path(name).exists()]
    wanted = bool(on_the_hub) or options.hub.push_to_hub
    if not world.run_on_main(lambda: wanted and hub_is_reachable()):
        if on_the_hub:
            log.info("the Hub cannot be reached: %s must be on this machine", " and ".join(on_the_hub))
        go_offline()
