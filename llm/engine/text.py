"""From the options to a tokenizer and tokenized text: the leaves that do the work are introduced here."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import constants
from transformers import PreTrainedTokenizerBase

from llm.config.options import Options
from llm.data.corpus import open_corpus
from llm.data.streams import Streams, tokenize
from llm.models.tokenizers import (
    CHARACTERS,
    TRAINED,
    bytes_of_tokens,
    is_character_level,
    load_tokenizer,
    tokenizer_hash,
)
from llm.world.network import go_offline, hub_is_reachable
from llm.world.ranks import World

log = logging.getLogger(__name__)

_CHUNK_TOKENS = 1 << 22


@dataclass(frozen=True)
class Text:
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
        """
        stream = self.streams.validation
        if stream is None or not len(stream.tokens):
            return None, 0.0
        table = bytes_of_tokens(self.tokenizer)
        chunks = np.array_split(stream.tokens, -(-len(stream.tokens) // _CHUNK_TOKENS))
        if sum(int(table[chunk].sum()) for chunk in chunks) == stream.num_bytes:
            return torch.from_numpy(table), stream.num_bytes / len(stream.tokens)
        log.info("bits per byte: from the mean bytes of a token, since the tokenizer does not keep every byte")
        return None, stream.num_bytes / len(stream.tokens)

    def identity(self) -> dict[str, str]:
        """What a checkpoint must share with the run that continues it."""
        return {"data_hash": self.streams.data_hash, "tokenizer_hash": self.tokenizer_hash}


def prepare_text(options: Options, world: World) -> Text:
    """Opens the corpus, loads or trains the tokenizer, and tokenizes what no cache holds yet.

    Meant for `World.in_turn`: rank 0 fills the caches, the others find them full. So `--overwrite_cache` is
    rank 0's alone.

    Raises:
        UserError: the text or the tokenizer is not what it was said to be.
    """
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
    streams = tokenize(
        corpus,
        tokenizer,
        tokenizer_hash=identity,
        options=options.data if world.is_main else options.data.model_copy(update={"overwrite_cache": False}),
        cache_dir=cache_dir,
        eos_in_single_text=not is_character_level(tokenizer),
    )
    return Text(corpus.name, tokenizer, identity, streams)


def meet_the_hub(options: Options, world: World) -> None:
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
    if not world.on_main(lambda: wanted and hub_is_reachable()):
        if on_the_hub:
            log.info("the Hub cannot be reached: %s must be on this machine", " and ".join(on_the_hub))
        go_offline()
