"""Load the tokenizer of a run by name, or make one from the text: one token a character, or a trained BPE."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llm.config.errors import UserError, first_line
from llm.config.options import ModelOptions, TokenizerOptions
from llm.files.atomic import atomic_folder
from llm.hub.names import name_error

log = logging.getLogger(__name__)

CHARACTERS = "char"
TRAINED = "train:bpe"
END_OF_TEXT = "<|endoftext|>"
DEFAULT_VOCAB_SIZE = 8192

# Part of the key of cached tokenizers: increase it when the same text gives another tokenizer.
_RECIPE = 1

# Characters. The trainer needs about a hundred bytes of memory for each byte of a text that it splits into words.
_TRAINING_TEXT_CHARS = 1_000_000


def load_tokenizer(
    options: TokenizerOptions,
    model: ModelOptions,
    *,
    texts: Callable[[], Iterator[str]],
    corpus_fingerprint: str,
    cache_dir: Path,
) -> PreTrainedTokenizerBase:
    """Return the tokenizer that the options name.

    Without ``--tokenizer_name`` it is the tokenizer of ``--model_name_or_path``, else the tokenizer that comes with
    ``--config_name`` if there is one, else ``train:bpe`` with 8,192 tokens.

    Args:
        options: the tokenizer's options.
        model: the model's options, whose names are the default.
        texts: returns the training text; called only to make a tokenizer from it.
        corpus_fingerprint: identifies the text; a tokenizer made from the same text is read from the cache.
        cache_dir: folder where tokenizers made from text are kept.

    Raises:
        UserError: an unknown name, a folder without a tokenizer, an empty text, or a cache that cannot be written.
    """
    name = options.tokenizer_name
    if name in (CHARACTERS, TRAINED):
        return _from_text(name, options.vocab_size, texts, corpus_fingerprint, cache_dir)
    if options.use_slow_tokenizer:
        log.warning("--use_slow_tokenizer: transformers 5 has one tokenizer a model; it is used")
    if name is not None:
        return _from_name("--tokenizer_name", name, model.trust_remote_code)
    if model.model_name_or_path is not None:
        return _from_name("--model_name_or_path", model.model_name_or_path, model.trust_remote_code)
    if model.config_name is not None:
        try:
            return _from_name("--config_name", model.config_name, model.trust_remote_code)
        except UserError:
            # Report a wrong name before a tokenizer is trained.
            _require_config(model.config_name, model.trust_remote_code)
            log.info("tokenizer: --config_name %s has none: training one", model.config_name)
    return _from_text(TRAINED, options.vocab_size, texts, corpus_fingerprint, cache_dir)


def character_tokenizer(characters: set[str]) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token a character, in sorted order from id 1.

    Id 0 is ``<|endoftext|>``, which also stands for unknown characters. The model is a BPE without merges, which keeps
    every character (also spaces, newlines and emoji) and encodes a megabyte four times faster than a word-level model
    on text split at each character.
    """
    vocab = {END_OF_TEXT: 0} | {char: i for i, char in enumerate(sorted(characters), start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=END_OF_TEXT))
    # Splitting into lines gives the model short words that it can cache, instead of one word as long as the text.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "merged_with_previous")
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer)


def byte_level_bpe(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: id 0 is ``<|endoftext|>``, followed by the 256 bytes and the merges.

    Args:
        texts: the training text.
        vocab_size: number of tokens; the result has fewer if the text has no more pairs to merge.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_bounded(texts), trainer)
    return _wrap(tokenizer)


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    wrap: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = wrap(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    return wrapped


def _bounded(texts: Iterator[str]) -> Iterator[str]:
    """Divide texts into parts of bounded length, after a line break if there is one."""
    for text in texts:
        start = 0
        while start < len(text):
            end = start + _TRAINING_TEXT_CHARS
            if end < len(text):
                end = text.rfind("\n", start, end) + 1 or end
            yield text[start:end]
            start = end


def _from_text(
    kind: str,
    vocab_size: int | None,
    texts: Callable[[], Iterator[str]],
    corpus_fingerprint: str,
    cache_dir: Path,
) -> PreTrainedTokenizerBase:
    size = (vocab_size or DEFAULT_VOCAB_SIZE) if kind == TRAINED else None
    key = hashlib.sha256(json.dumps([_RECIPE, kind, size, corpus_fingerprint]).encode()).hexdigest()
    folder = cache_dir / f"tokenizer-{kind.replace(':', '-')}-{key[:16]}"
    is_cached = folder.is_dir()
    if not is_cached:
        tokenizer = _character_tokenizer_of(texts()) if kind == CHARACTERS else byte_level_bpe(texts(), size or 0)
        if len(tokenizer) == 1 or next((text for text in texts() if text), None) is None:
            raise UserError(f"--tokenizer_name {kind}: no tokenizer can be made, because the training text is empty")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with atomic_folder(folder) as temporary:
                tokenizer.save_pretrained(temporary)
        except OSError as error:
            raise UserError(
                f"the tokenizer cache {cache_dir} cannot be written ({error.strerror}); "
                "make room, or set HF_HOME to another folder"
            ) from error
    loaded: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(folder)
    log.info(
        "tokenizer: %s, %d tokens (%s)",
        kind,
        len(loaded),
        "cached" if is_cached else "made from the text",
    )
    if size is not None and len(loaded) < size:
        log.warning(
            "tokenizer: %d tokens instead of the requested %d: the text has no more pairs to merge",
            len(loaded),
            size,
        )
    return loaded


def _character_tokenizer_of(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    return character_tokenizer(characters)


def _from_name(flag: str, name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        loaded: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    # The library raises plain Exceptions for broken files, so a narrower type is not enough.
    except Exception as error:
        raise _name_error(flag, name, error) from error
    # Without tokenizer files, transformers returns a tokenizer whose vocabulary has only special tokens.
    if set(loaded.get_vocab()) <= set(loaded.get_added_vocab()):
        raise UserError(
            f"{flag} {name}: no tokenizer there (no tokenizer.json, vocab.json or tokenizer.model); {_fix(flag)}"
        )
    tokenizer: PreTrainedTokenizerBase = loaded
    require_dense_ids(f"{flag} {name}", tokenizer)
    log.info("tokenizer: %s, %d tokens", name, len(tokenizer))
    return tokenizer


def require_dense_ids(origin: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that every id is below the length of the tokenizer.

    Args:
        origin: the tokenizer's name in the message.
        tokenizer: the tokenizer.

    Raises:
        UserError: the ids have gaps.
    """
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= len(tokenizer):
        raise UserError(
            f"{origin}: its ids have gaps (the highest is {highest}, but there are {len(tokenizer)} tokens), "
            "so tables of the tokenizer's length cannot hold them; name another"
        )


def _name_error(flag: str, name: str, error: Exception) -> UserError:
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any(
            (folder / file).exists() for file in ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt")
        ):
            return UserError(
                f"{flag} {name}: no tokenizer in this folder (no tokenizer.json, vocab.json or "
                f"tokenizer.model); {_fix(flag)}"
            )
        return UserError(f"{flag} {name}: the tokenizer in this folder cannot be read: {first_line(error)}")
    return name_error(flag, name, "a tokenizer", error)


def _fix(flag: str) -> str:
    if flag == "--tokenizer_name":
        return "name another, or use char or train:bpe"
    return "name one with --tokenizer_name"


def _require_config(name: str, trust_remote_code: bool) -> None:
    try:
        AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise name_error("--config_name", name, "config.json", error) from error
