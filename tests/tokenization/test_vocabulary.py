"""Hash of a tokenizer's behaviour, and the bytes that its ids stand for."""

from __future__ import annotations

from pathlib import Path

from llm.tokenization.load import byte_level_bpe, character_tokenizer
from llm.tokenization.vocabulary import is_character_level, token_byte_counts, tokenizer_hash

ODD = "a  b\n\n\tc\r\nd é ß 😀 日本 ' , . 'tis  \n"


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_token_byte_counts_when_byte_level_or_characters_then_sum_is_the_length_of_the_text(
    byte_tokenizer, tiny_text: Path
) -> None:
    bpe = byte_level_bpe(iter([tiny_text.read_text(), ODD]), 400)
    for tokenizer in (byte_tokenizer, bpe, character_tokenizer(set(ODD))):
        counts = token_byte_counts(tokenizer)
        assert counts.shape == (len(tokenizer),)
        assert counts[_ids(tokenizer, ODD)].sum() == len(ODD.encode())
        assert counts[tokenizer.eos_token_id] == 0


def test_token_byte_counts_when_sentencepiece_then_counts_spaces_and_bytes() -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<s>": 0, "▁the": 1, "é": 2, "<0xF0>": 3, "▁": 4}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    tokenizer.add_tokens(["  "])
    assert token_byte_counts(tokenizer).tolist() == [0, 4, 2, 1, 1, 2]


def test_tokenizer_hash_when_truncation_is_on_then_unchanged(tiny_text: Path) -> None:
    tokenizer = byte_level_bpe(iter([tiny_text.read_text()]), 300)
    before = tokenizer_hash(tokenizer)
    tokenizer("some text", truncation=True, max_length=2)
    assert tokenizer_hash(tokenizer) == before


def test_tokenizer_hash_when_vocabulary_differs_then_differs() -> None:
    assert tokenizer_hash(character_tokenizer({"a"})) != tokenizer_hash(character_tokenizer({"b"}))


def test_is_character_level_when_tokens_are_longer_or_without_newline_then_false(byte_tokenizer, tiny_text) -> None:
    assert is_character_level(character_tokenizer(set("ab\n")))
    assert not is_character_level(character_tokenizer(set("ab")))
    assert not is_character_level(byte_level_bpe(iter([tiny_text.read_text()]), 300))
