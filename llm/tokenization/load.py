"""The tokenizer of a run: loaded by name, one token a character, or trained on the text itself."""

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

# Part of the key of cached tokenizers: raise it when the same text would give another tokenizer.
_RECIPE = 1

# The trainer holds about a hundred bytes for each byte of the piece of text that it splits into
# words.
_PIECE_CHARS = 1_000_000


def load_tokenizer(
    options: TokenizerOptions,
    model: ModelOptions,
    *,
    texts: Callable[[], Iterator[str]],
    corpus_fingerprint: str,
    cache_dir: Path,
) -> PreTrainedTokenizerBase:
    """The tokenizer that the options name.

    Without ``--tokenizer_name`` it is the one of ``--model_name_or_path``, else the one beside
    ``--config_name`` if there is one, else ``train:bpe`` with 8,192 tokens.

    Args:
        options: the tokenizer's options.
        model: the model's options, whose names are the default.
        texts: the training text, read only when a tokenizer is made from it.
        corpus_fingerprint: names the text; a tokenizer made from the same text is read from the
            cache.
        cache_dir: where tokenizers made from text are kept.

    Raises:
        UserError: unknown name, folder without a tokenizer, or a text without a character.
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
            # A wrong name must not cost the training of a tokenizer before it is reported.
            _require_config(model.config_name, model.trust_remote_code)
            log.info("tokenizer: there is none beside --config_name %s: training one", model.config_name)
    return _from_text(TRAINED, options.vocab_size, texts, corpus_fingerprint, cache_dir)


def character_tokenizer(characters: set[str]) -> PreTrainedTokenizerFast:
    """One token a character, sorted, after id 0, ``<|endoftext|>``, which unknown ones become too.

    It is a BPE without merges, which keeps every character (also spaces, newlines and emoji) and
    encodes a megabyte four times faster than a word-level model on text split at each character.
    """
    vocab = {END_OF_TEXT: 0} | {char: i for i, char in enumerate(sorted(characters), start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=END_OF_TEXT))
    # Lines, so that the model sees short words that it can cache, and not one of the text's length.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "merged_with_previous")
    tokenizer.decoder = decoders.Fuse()
    return _wrapped(tokenizer)


def byte_level_bpe(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the texts: id 0 is ``<|endoftext|>``, then the 256 bytes, then merges.

    Fewer than `vocab_size` tokens come out when the text has no more pairs to merge.
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
    tokenizer.train_from_iterator(_pieces(texts), trainer)
    return _wrapped(tokenizer)


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    wrap: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = wrap(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    return wrapped


def _pieces(texts: Iterator[str]) -> Iterator[str]:
    """The texts in pieces of bounded length, cut after a line break where there is one."""
    for text in texts:
        start = 0
        while start < len(text):
            end = start + _PIECE_CHARS
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
    made = not folder.is_dir()
    if made:
        tokenizer = _characters_of(texts()) if kind == CHARACTERS else byte_level_bpe(texts(), size or 0)
        if len(tokenizer) == 1 or next((text for text in texts() if text), None) is None:
            raise UserError(
                f"--tokenizer_name {kind}: the training text is empty, so that no tokenizer can be made from it"
            )
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
        "made from the text" if made else "cached",
    )
    if size is not None and len(loaded) < size:
        log.warning(
            "tokenizer: %d tokens where %d were asked for: the text has no more pairs",
            len(loaded),
            size,
        )
    return loaded


def _characters_of(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    return character_tokenizer(characters)


def _from_name(flag: str, name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        loaded: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    # The library raises plain Exceptions for broken files, so that nothing narrower would do.
    except Exception as error:
        raise _name_error(flag, name, error) from error
    # A folder or repository without tokenizer files gives a vocabulary of special tokens alone.
    if set(loaded.get_vocab()) <= set(loaded.get_added_vocab()):
        raise UserError(
            f"{flag} {name}: no tokenizer there (no tokenizer.json, vocab.json or tokenizer.model); {_mend(flag)}"
        )
    tokenizer: PreTrainedTokenizerBase = loaded
    highest = max(tokenizer.get_vocab().values())
    if highest >= len(tokenizer):
        raise UserError(
            f"{flag} {name}: its ids have holes (the highest is {highest}, but there are {len(tokenizer)} tokens), "
            "which tables of the tokenizer's length cannot hold; name another"
        )
    log.info("tokenizer: %s, %d tokens", name, len(tokenizer))
    return tokenizer


def _name_error(flag: str, name: str, error: Exception) -> UserError:
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any(
            (folder / file).exists() for file in ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt")
        ):
            return UserError(
                f"{flag} {name}: no tokenizer in this folder (no tokenizer.json, vocab.json or "
                f"tokenizer.model); {_mend(flag)}"
            )
        return UserError(f"{flag} {name}: the tokenizer in this folder cannot be read: {first_line(error)}")
    return name_error(flag, name, "a tokenizer", error)


def _mend(flag: str) -> str:
    if flag == "--tokenizer_name":
        return "name another, or use char or train:bpe"
    return "name one with --tokenizer_name"


def _require_config(name: str, trust_remote_code: bool) -> None:
    try:
        AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise name_error("--config_name", name, "config.json", error) from error
