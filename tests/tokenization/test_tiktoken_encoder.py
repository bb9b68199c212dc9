"""Tokenizers that tiktoken can replace, and the ids that it gives for them."""

from __future__ import annotations

import json
import random

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from llm.tokenization.split_patterns import EDGE_CASES, UnsuitableError
from llm.tokenization.tiktoken_encoder import TiktokenEncoder, byte_alphabet, read_vocabulary

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _trained(pre_tokenizer, vocab_size: int = 600) -> Tokenizer:
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlué", k=draw.randint(1, 6))) for _ in range(300)]
    lines = [" ".join(draw.choices(words, k=9)) + draw.choice([".", "!\n", " 1234", "\n\n  x"]) for _ in range(400)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def _gpt2_like() -> Tokenizer:
    return _trained(pre_tokenizers.ByteLevel(add_prefix_space=False))


def _split(pattern: str, behavior: str = "isolated", invert: bool = False):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior=behavior, invert=invert),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _with_model(tokenizer: Tokenizer, **changes) -> Tokenizer:
    description = json.loads(tokenizer.to_str())
    description["model"].update(changes)
    return Tokenizer.from_str(json.dumps(description))


def _count_equal(tokenizer: Tokenizer, texts: list[str]) -> int:
    """Check the ids, and return how many texts tiktoken encoded."""
    encoded = TiktokenEncoder(tokenizer, split_special_tokens=False).encode(texts)
    for text, ids in zip(texts, encoded, strict=True):
        if ids is not None:
            assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids, repr(text)
    return sum(ids is not None for ids in encoded)


@pytest.mark.parametrize("make", [_gpt2_like, lambda: _trained(_split(LLAMA3))], ids=["gpt2", "llama3"])
def test_encode_when_tokenizer_is_byte_level_then_same_ids(make) -> None:
    tokenizer = make()
    texts = [*EDGE_CASES, "the tea is hot, sir", "on tin\u00e9 rods 12345 1 22\n\n\n x"]
    # The ids of a trained tokenizer begin with the special token, so ids and ranks differ.
    assert tokenizer.token_to_id("<s>") == 0
    assert _count_equal(tokenizer, texts) >= len(texts) - 1


def test_encode_when_tokenizer_ignores_merges_of_whole_words_then_same_ids() -> None:
    tokenizer = _with_model(_trained(_split(LLAMA3)), ignore_merges=True)
    assert _count_equal(tokenizer, EDGE_CASES) >= len(EDGE_CASES) - 1


def test_encode_when_added_tokens_overlap_or_strip_then_none_for_texts_with_them() -> None:
    texts = ["a <tool> b", "a<tool>", "<toolbox>", "plain", "<s>"]
    plain, prefix, strips = _gpt2_like(), _gpt2_like(), _gpt2_like()
    plain.add_special_tokens(["<tool>"])
    assert _count_equal(plain, texts) == 5
    prefix.add_special_tokens(["<tool>", "<tool>b"])
    assert _count_equal(prefix, texts) == 2
    strips.add_special_tokens([AddedToken("<tool>", lstrip=True)])
    assert _count_equal(strips, texts) == 2


def test_encode_when_pattern_does_not_match_a_character_then_none() -> None:
    tokenizer = _trained(_split(r"\p{L}+"))
    encoded = TiktokenEncoder(tokenizer, split_special_tokens=False).encode(["words", "two words"])
    assert encoded[0] is None  # encoded by one call with the text that has unmatched characters
    assert encoded[1] is None


def test_tiktoken_encoder_when_tokenizer_is_not_byte_level_bpe_then_unsuitable() -> None:
    normalizing = _gpt2_like()
    normalizing.normalizer = normalizers.NFC()
    others = {
        "changes the text": normalizing,
        "adds a space": _trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "not byte-level": _trained(pre_tokenizers.Whitespace()),
        "does not split into the matches": _trained(_split(r"\s+", "removed")),
        "other steps": _trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(False)])),
        "another meaning": _trained(_split(r"^\w+$|.")),
        "not plain BPE": _with_model(_gpt2_like(), dropout=0.1),
    }
    for reason, tokenizer in others.items():
        with pytest.raises(UnsuitableError, match=reason):
            TiktokenEncoder(tokenizer, split_special_tokens=False)


def _model(merges: list[tuple[str, str]], **changes) -> dict:
    tokens = [*byte_alphabet(), *dict.fromkeys(left + right for left, right in merges)]
    return {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges, **changes}


def test_read_vocabulary_when_merges_are_in_order_then_ranks_follow_them() -> None:
    vocabulary = read_vocabulary(_model([("t", "h"), ("th", "e")]), set())
    assert vocabulary.ranks[b"th"] == 256
    assert vocabulary.ranks[b"the"] == 257
    assert len(vocabulary.ids) == 258


@pytest.mark.parametrize(
    ("merges", "reason"),
    [
        # "ab" is merged first, so "abc" is never made of "a" and "bc".
        ([("a", "b"), ("b", "c"), ("a", "bc")], "merging the bytes of a token"),
        ([("ab", "c"), ("a", "b")], "no earlier merge"),
        ([("a", "b"), ("b", "c"), ("ab", "c"), ("x", "y"), ("a", "bc")], "not consecutive"),
    ],
)
def test_read_vocabulary_when_tiktoken_would_merge_in_another_order_then_unsuitable(merges, reason: str) -> None:
    with pytest.raises(UnsuitableError, match=reason):
        read_vocabulary(_model(merges), set())


def test_read_vocabulary_when_merges_are_ignored_and_a_token_needs_none_then_unsuitable() -> None:
    model = _model([("a", "b")], ignore_merges=True)
    model["vocab"]["xyz"] = len(model["vocab"])
    assert len(read_vocabulary(model, {"xyz"}).ids) == 257
    with pytest.raises(UnsuitableError, match="cannot be reached"):
        read_vocabulary(model, set())


def test_encode_when_characters_are_random_then_same_ids() -> None:
    draw = random.Random(2)
    points = [point for point in range(0x110000) if not 0xD800 <= point <= 0xDFFF]
    kinds = [
        points,
        points[:0x3000],
        points[:256],
        [32, 10, 9, 0xA0, 0x3000, 97, 39, 115],
        [0x301, 0x65, 0x1F600, 0x200D],
    ]
    texts = ["".join(map(chr, draw.choices(draw.choice(kinds), k=draw.randint(1, 40)))) for _ in range(3000)]
    assert _count_equal(_gpt2_like(), texts) > 2900
    assert _count_equal(_trained(_split(LLAMA3)), texts) > 2900
