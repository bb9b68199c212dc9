"""From the options to a tokenizer and tokenized text: this module joins sources, tokenization and shards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub import constants
from transformers import PreTrainedTokenizerBase

from llm.config.errors import UserError
from llm.config.options import Options
from llm.config.weighted_dirs import parse_weighted_dirs
from llm.data.batches.blocks import Blocks, cut_blocks
from llm.data.batches.ledger import Ledger, ledger, ledger_line, mixture_lines
from llm.data.batches.loader import BlockSource, MicroBatches
from llm.data.batches.mixture import mix
from llm.data.preparation.cache import load_or_tokenize
from llm.data.preparation.progress_bar import text_progress_bar
from llm.data.shards.document_starts import StartsAfterEos
from llm.data.shards.external_formats import is_token_file, open_external_folder, open_files
from llm.data.shards.format import SplitTokens, TokenizedText, TokenizerMismatchError, is_folder_of_shards, open_folder
from llm.data.sources.corpus import Corpus, open_corpus
from llm.data.sources.files import resolve_folder
from llm.distributed.world import World
from llm.hub.connection import detect, names_on_hub, unreachable_line
from llm.tokenization.encoder import vocabulary_size
from llm.tokenization.load import CHARACTERS, TRAINED, load_tokenizer
from llm.tokenization.vocabulary import is_character_level, token_byte_counts, tokenizer_hash

log = logging.getLogger(__name__)
T = TypeVar("T")

_CHUNK_TOKENS = 1 << 22


class StopSignal(Protocol):
    """A request to stop the run, as far as opening a text needs it.

    Attributes:
        reason: the cause of the request, such as SIGTERM or walltime; None before there is one.
    """

    reason: str | None

    def __call__(self) -> bool:
        """Return whether this process was asked to stop."""

    def interrupting(self, work: Callable[[], T]) -> Callable[[], T]:
        """Return `work` such that a request raises `Stopped` inside of it, in the main thread."""


class TokenizedDataset(Protocol):
    """The tokenizer and the tokenized text of a run: everything that a run needs from its text.

    `PreparedDataset` and `StreamingDataset` implement it. The methods with a body here suit a text that is complete
    before training starts.

    Attributes:
        name: name of the text in logs and in the model card.
        tokenizer: the tokenizer of the ids.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase

    def identity(self) -> dict[str, str]:
        """Return the hashes, at least `data_hash`, that a checkpoint and the run that resumes it must share."""

    def blocks(self, block_size: int, *, document_mask: bool) -> tuple[BlockSource, Blocks | None]:
        """Return the training blocks, and the validation blocks or None if there are none.

        Args:
            block_size: tokens predicted in a block.
            document_mask: whether rows carry the positions inside their documents.

        Raises:
            UserError: the training text does not fill one block.
        """

    def bytes_of_ids(self) -> tuple[torch.Tensor | None, float]:
        """Return the bytes of text that each id stands for, and their mean over the validation text.

        Returns:
            int32 [vocabulary] on the CPU, or None if only the mean is known; the mean is 0 without validation text.
        """

    def ledger(self, block_size: int) -> Ledger:
        """Return the token counts that are known now."""

    def opening_lines(self, blocks: BlockSource, *, num_samples: int, document_mask: bool) -> list[str]:
        """Return the log lines about the tokens before training.

        Args:
            blocks: the training blocks.
            num_samples: blocks that the whole run reads.
            document_mask: whether attention, positions and loss stay inside a document.
        """

    def num_unreached_tokens(self, blocks: BlockSource, num_samples: int) -> int:
        """Return the number of tokens in training blocks that a run of `num_samples` blocks does not read."""

    def closing_lines(self, blocks: BlockSource, num_samples: int) -> list[str]:
        """Return the log lines about the tokens that are known only after training."""
        return []

    def wait_for_batches(
        self,
        batches: MicroBatches,
        blocks: BlockSource,
        *,
        first_step: int,
        num_steps: int,
        global_batch: int,
        should_stop: Callable[[], bool],
    ) -> MicroBatches:
        """Return the batches, each as soon as its tokens are available.

        Args:
            batches: this rank's micro-batches, one list a step, from step `first_step` on.
            blocks: the training blocks that `batches` reads.
            first_step: number of the first step, from 0.
            num_steps: steps of the whole run.
            global_batch: blocks of one step over all ranks.
            should_stop: whether this rank was asked to stop.
        """
        return batches

    def check(self) -> None:
        """Raise the error that ended the batches early, if there is one; call after the batches have ended."""
        return

    def require_same_on_all(self, world: World) -> None:
        """Check that every rank has the text and the tokenizer of rank 0; all ranks call it together.

        Raises:
            UserError: on a rank that has another text or tokenizer.
        """
        if world.broadcast(self.identity()) != self.identity():
            raise UserError(
                f"rank {world.rank} has another text or tokenizer than rank 0: give every node the same files, or one "
                "HF_HOME that all nodes share"
            )


@dataclass(frozen=True)
class PreparedDataset(TokenizedDataset):
    """A text whose tokens are all on disk before training starts.

    Attributes:
        name: name of the text in logs and in the model card.
        tokenizer: the tokenizer of the ids.
        tokenizer_hash: hash of the tokenizer's behaviour.
        text: the ids of both splits.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    tokenizer_hash: str
    text: TokenizedText

    def identity(self) -> dict[str, str]:
        """Return the hashes of the text and of the tokenizer."""
        return {"data_hash": self.text.data_hash, "tokenizer_hash": self.tokenizer_hash}

    def blocks(self, block_size: int, *, document_mask: bool) -> tuple[BlockSource, Blocks | None]:
        """Cut both splits into blocks; see `TokenizedDataset.blocks`."""
        return cut_blocks(self.text, block_size, document_mask=document_mask)

    def bytes_of_ids(self) -> tuple[torch.Tensor | None, float]:
        """Count the bytes of the ids on the validation text; int32 [vocabulary] or None, see `bytes_of_ids`."""
        return bytes_of_ids(self.tokenizer, self.text.validation)

    def ledger(self, block_size: int) -> Ledger:
        """Count the tokens of both splits."""
        return ledger(self.text, block_size)

    def opening_lines(self, blocks: BlockSource, *, num_samples: int, document_mask: bool) -> list[str]:
        """Return the ledger, and for a mixture one line a source."""
        return [
            ledger_line(self.ledger(blocks.block_size), document_mask=document_mask),
            *mixture_lines(self.text, blocks, num_samples),
        ]

    def num_unreached_tokens(self, blocks: BlockSource, num_samples: int) -> int:
        """Return the number of tokens in training blocks that a run of `num_samples` blocks does not read."""
        return blocks.num_unread(num_samples) * blocks.block_size


def bytes_of_ids(
    tokenizer: PreTrainedTokenizerBase, validation: SplitTokens | None
) -> tuple[torch.Tensor | None, float]:
    """Return the bytes of text that each id stands for, checked on the validation text.

    Args:
        tokenizer: the tokenizer of the ids.
        validation: the tokens of the validation text, None if there is none.

    Returns:
        int32 [vocabulary] on the CPU, and the mean over the validation text. The table is None where its sum over
        that text differs from the text's length (the tokenizer changes text); then only the mean is right. Where
        the length of the text is unknown (files of other programs), the table is trusted. Without validation text:
        (None, 0.0).

    Raises:
        UserError: the validation text holds an id that the tokenizer does not have.
    """
    if validation is None or not len(validation.tokens):
        return None, 0.0
    table = token_byte_counts(tokenizer)
    num_tokens = len(validation.tokens)
    chunks = (validation.tokens[start : start + _CHUNK_TOKENS] for start in range(0, num_tokens, _CHUNK_TOKENS))
    num_bytes = sum(int(_lookup(table, chunk).sum()) for chunk in chunks)
    if validation.num_bytes is None or num_bytes == validation.num_bytes:
        return torch.from_numpy(table), num_bytes / num_tokens
    log.info("bits per byte: from the mean bytes of a token, since the tokenizer does not keep every byte")
    return None, validation.num_bytes / num_tokens


def _lookup(table: npt.NDArray[np.int32], ids: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """Return the bytes of each id; files of other programs may hold ids that the tokenizer does not have."""
    if ids.size and int(ids.max()) >= len(table):
        raise UserError(
            f"the validation tokens hold id {ids.max()}, but the tokenizer has {len(table)} tokens:"
            " name the one they were made with as --tokenizer_name"
        )
    num_bytes: npt.NDArray[np.int32] = table[ids]
    return num_bytes


def prepare_dataset(
    options: Options,
    world: World,
    *,
    corpus: Corpus | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreparedDataset:
    """Open the corpus, load or train the tokenizer, and tokenize what is not cached; or open token shards.

    Run it inside `World.main_first`: rank 0 fills the caches and the other ranks read them. Therefore
    `--overwrite_cache` applies to rank 0 only.

    Args:
        options: of the run.
        world: the processes of the run.
        corpus: the text; None: the options name it.
        tokenizer: encodes the text; None: the options name it.

    Raises:
        UserError: the text or the tokenizer is missing or is not of the kind that the options state.
    """
    if options.data.train_dir or any(map(is_token_file, options.data.train_file or ())):
        return _open_tokens(options, tokenizer)
    cache_dir = Path(constants.HF_HOME) / "llm"
    corpus = open_corpus(options.data) if corpus is None else corpus
    tokenizer = _tokenizer_of_text(options, corpus, cache_dir) if tokenizer is None else tokenizer
    identity = tokenizer_hash(tokenizer)
    with text_progress_bar() as on_progress:
        text = load_or_tokenize(
            corpus,
            tokenizer,
            tokenizer_hash=identity,
            options=options.data if world.is_main else options.data.model_copy(update={"overwrite_cache": False}),
            cache_dir=cache_dir,
            eos_in_single_text=not is_character_level(tokenizer),
            on_progress=on_progress,
        )
    return PreparedDataset(corpus.name, tokenizer, identity, text)


def _tokenizer_of_text(options: Options, corpus: Corpus, cache_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(
        options.tokenizer,
        options.model,
        # Held-out characters are included: a character without an id could be neither predicted nor measured.
        texts=lambda: corpus.texts(include_validation=options.tokenizer.tokenizer_name == CHARACTERS),
        corpus_fingerprint=corpus.fingerprint,
        cache_dir=cache_dir,
    )


def _open_tokens(options: Options, tokenizer: PreTrainedTokenizerBase | None) -> PreparedDataset:
    """Open text that is tokenized already: folders of shards or token files, also those of other programs."""
    data = options.data
    weighted = parse_weighted_dirs(data.train_dir or ())
    folders = [resolve_folder(entry.name, "--train_dir") for entry in weighted]
    tokenizer = _tokenizer_of_tokens(options, folders) if tokenizer is None else tokenizer
    # With --validation_dir nothing of --train_dir is held out.
    percentage = 0 if data.validation_dir is not None else data.validation_split_percentage
    reader = _TokenReader(tokenizer, tokenizer_hash(tokenizer), vocabulary_size(tokenizer), data.document_mask)
    if not folders:
        files = data.train_file or ()
        if not all(map(is_token_file, (*files, *(data.validation_file or ())))):
            raise UserError("--train_file, --validation_file: token files and text are mixed; give one kind")
        text = reader.checked(open_files(files, data.validation_file, percentage, reader.size, reader.identity))
    else:
        texts = reader.folders(folders, percentage)
        # The weight of a single folder has no effect.
        weights = [entry.weight for entry in weighted]
        text = texts[0] if len(texts) == 1 else mix([entry.name for entry in weighted], weights, texts)
    if data.validation_dir is not None:
        other = reader.folder(resolve_folder(data.validation_dir, "--validation_dir"), 0)
        text = replace(text, validation=other.validation or other.train, data_hash=_joint_hash(text, other))
    validation = text.validation
    log.info(
        "tokens of %s: %s for training, %s for validation",
        text.name,
        f"{len(text.train.tokens):,}",
        f"{len(validation.tokens) if validation else 0:,}",
    )
    return PreparedDataset(text.name, tokenizer, reader.identity, text)


@dataclass(frozen=True)
class _TokenReader:
    """Opens tokens of one tokenizer.

    Attributes:
        tokenizer: the tokenizer of the ids.
        identity: hash of the tokenizer's behaviour.
        size: number of ids of the tokenizer.
        document_mask: whether document starts are needed.
    """

    tokenizer: PreTrainedTokenizerBase
    identity: str
    size: int
    document_mask: bool

    def folder(self, folder: Path, percentage: float) -> TokenizedText:
        """Open a folder of token shards, or of another program's tokens, of which `percentage` is held out."""
        if is_folder_of_shards(folder):
            return self.checked(open_folder(folder, tokenizer_hash=self.identity))
        return self.checked(open_external_folder(folder, percentage, self.size))

    def folders(self, folders: Sequence[Path], percentage: float) -> list[TokenizedText]:
        """Open folders that are to be mixed.

        Raises:
            TokenizerMismatchError: they are not of one tokenizer.
        """
        texts: list[TokenizedText] = []
        for folder in folders:
            try:
                texts.append(self.folder(folder, percentage))
            except TokenizerMismatchError as error:
                if not texts:
                    raise
                raise TokenizerMismatchError(
                    f"--train_dir {folder}: not of the tokenizer of {folders[0]};"
                    " folders that are mixed must be made with the same --tokenizer_name"
                ) from error
        return texts

    def checked(self, text: TokenizedText) -> TokenizedText:
        """Return the text, with document starts if they are needed.

        Raises:
            TokenizerMismatchError: it was made for another vocabulary.
        """
        if text.vocabulary_size != self.size:
            raise TokenizerMismatchError(
                f"{text.dir}: made for {text.vocabulary_size} tokens, the tokenizer has {self.size};"
                " leave --tokenizer_name out to use the one beside the shards"
            )
        _check_ids(text.train, self.size)
        return self._with_starts(text) if self.document_mask else text

    def _with_starts(self, text: TokenizedText) -> TokenizedText:
        splits = [text.train] if text.validation is None else [text.train, text.validation]
        if all(split.starts is not None for split in splits):
            return text
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise UserError(
                f"--document_mask: {text.name} does not say where documents start, and the tokenizer has no"
                " end-of-text token to find them by; leave the option out, or make shards with llm.prepare"
            )
        log.info("document mask: in %s a document ends with %s", text.name, self.tokenizer.eos_token)
        train, *held_out = [
            replace(split, starts=split.starts or StartsAfterEos(split.tokens, eos)) for split in splits
        ]
        return replace(text, train=train, validation=held_out[0] if held_out else None)


def _joint_hash(text: TokenizedText, validation: TokenizedText) -> str:
    return blake2b(f"{text.data_hash} {validation.data_hash}".encode(), digest_size=16).hexdigest()


def _check_ids(stream: SplitTokens, size: int) -> None:
    """Check the first ids, where another vocabulary mostly shows; the rest is checked when its block is read."""
    head = stream.tokens[:_CHUNK_TOKENS]
    if len(head) and int(head.max()) >= size:
        raise TokenizerMismatchError(
            f"the tokens hold id {head.max()}, but the tokenizer has {size} tokens:"
            " name the one they were made with as --tokenizer_name"
        )


def _tokenizer_of_tokens(options: Options, folders: Sequence[Path]) -> PreTrainedTokenizerBase:
    """Load the named tokenizer, else the first one beside the shards, else the model's; none is trained."""
    chosen = options.tokenizer
    stored = [folder / "tokenizer" for folder in folders if (folder / "tokenizer").is_dir()]
    if chosen.tokenizer_name is None and stored:
        chosen = chosen.model_copy(update={"tokenizer_name": str(stored[0])})
    if chosen.tokenizer_name in (CHARACTERS, TRAINED) or not (
        chosen.tokenizer_name or options.model.model_name_or_path or options.model.config_name
    ):
        raise _tokenizer_is_missing()

    def no_text() -> Iterator[str]:
        raise _tokenizer_is_missing()

    return load_tokenizer(chosen, options.model, texts=no_text, corpus_fingerprint="tokens", cache_dir=Path())


def _tokenizer_is_missing() -> UserError:
    return UserError("tokens are given, not text: name the tokenizer they were made with as --tokenizer_name")


def hub_names(options: Options) -> list[str]:
    """Return the names of data, tokenizer and model that are not local paths: they may be on the Hub."""
    tokenizer = options.tokenizer.tokenizer_name
    return names_on_hub(
        (
            options.data.dataset_name,
            None if tokenizer in (CHARACTERS, TRAINED) else tokenizer,
            options.model.model_name_or_path,
            options.model.config_name,
        )
    )


def detect_hub(options: Options, world: World) -> None:
    """Probe the Hub once if the run reads from it or pushes to it; else, or without an answer, go offline.

    Libraries that are not offline retry for half a minute a name when the network is down.
    """
    names = hub_names(options)
    if not detect(names, push=options.hub.push_to_hub, run_on_main=world.run_on_main) and names:
        log.info("%s", unreachable_line(names))
