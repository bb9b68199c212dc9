"""Which tokenizers the faster engine takes, and that it gives their ids."""

from __future__ import annotations

import json
import random

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from llm.tokenization.split_patterns import EDGE_CASES, UnsuitableError, differing_characters, read_pattern
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


def _changed(tokenizer: Tokenizer, **changes) -> Tokenizer:
    facts = json.loads(tokenizer.to_str())
    facts["model"].update(changes)
    return Tokenizer.from_str(json.dumps(facts))


def _same(tokenizer: Tokenizer, texts: list[str]) -> int:
    """Checks the ids; says how many texts the engine encoded."""
    found = TiktokenEncoder(tokenizer, split_special_tokens=False).encode(texts)
    for text, ids in zip(texts, found, strict=True):
        if ids is not None:
            assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids, repr(text)
    return sum(ids is not None for ids in found)


@pytest.mark.parametrize("make", [_gpt2_like, lambda: _trained(_split(LLAMA3))], ids=["gpt2", "llama3"])
def test_engine_when_tokenizer_is_byte_level_then_same_ids(make) -> None:
    tokenizer = make()
    texts = [*EDGE_CASES, "the tea is hot, sir", "on tin\u00e9 rods 12345 1 22\n\n\n x"]
    # Ids of a trained tokenizer begin with the special token: they are not the ranks.
    assert tokenizer.token_to_id("<s>") == 0
    assert _same(tokenizer, texts) >= len(texts) - 1


def test_engine_when_words_come_before_merges_then_same_ids() -> None:
    tokenizer = _changed(_trained(_split(LLAMA3)), ignore_merges=True)
    assert _same(tokenizer, EDGE_CASES) >= len(EDGE_CASES) - 1


def test_engine_when_added_tokens_overlap_or_strip_then_texts_with_them_are_left() -> None:
    texts = ["a <tool> b", "a<tool>", "<toolbox>", "plain", "<s>"]
    plain, prefix, strips = _gpt2_like(), _gpt2_like(), _gpt2_like()
    plain.add_special_tokens(["<tool>"])
    assert _same(plain, texts) == 5
    prefix.add_special_tokens(["<tool>", "<tool>b"])
    assert _same(prefix, texts) == 2
    strips.add_special_tokens([AddedToken("<tool>", lstrip=True)])
    assert _same(strips, texts) == 2


def test_engine_when_pattern_leaves_characters_out_then_text_is_left() -> None:
    tokenizer = _trained(_split(r"\p{L}+"))
    found = TiktokenEncoder(tokenizer, split_special_tokens=False).encode(["words", "two words"])
    assert found[0] is None  # Encoded together with what is left out.
    assert found[1] is None


def test_engine_when_tokenizer_works_otherwise_then_unsuitable() -> None:
    normalizing = _gpt2_like()
    normalizing.normalizer = normalizers.NFC()
    others = {
        "changes the text": normalizing,
        "adds a space": _trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "not byte-level": _trained(pre_tokenizers.Whitespace()),
        "does not split into the matches": _trained(_split(r"\s+", "removed")),
        "other steps": _trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(False)])),
        "another meaning": _trained(_split(r"^\w+$|.")),
        "not plain BPE": _changed(_gpt2_like(), dropout=0.1),
    }
    for reason, tokenizer in others.items():
        with pytest.raises(UnsuitableError, match=reason):
            TiktokenEncoder(tokenizer, split_special_tokens=False)


def _model(merges: list[tuple[str, str]], **changes) -> dict:
    tokens = [*byte_alphabet(), *dict.fromkeys(left + right for left, right in merges)]
    return {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges, **changes}


def test_vocabulary_when_merges_are_in_order_then_ranks_are() -> None:
    found = read_vocabulary(_model([("t", "h"), ("th", "e")]), set())
    assert found.ranks[b"th"] == 256
    assert found.ranks[b"the"] == 257
    assert len(found.ids) == 258


@pytest.mark.parametrize(
    ("merges", "reason"),
    [
        # "ab" is joined first, so that "abc" is never made of "a" and "bc".
        ([("a", "b"), ("b", "c"), ("a", "bc")], "merging the bytes of a token"),
        ([("ab", "c"), ("a", "b")], "no earlier merge"),
        ([("a", "b"), ("b", "c"), ("ab", "c"), ("x", "y"), ("a", "bc")], "not consecutive"),
    ],
)
def test_vocabulary_when_tiktoken_would_join_otherwise_then_unsuitable(merges, reason: str) -> None:
    with pytest.raises(UnsuitableError, match=reason):
        read_vocabulary(_model(merges), set())


def test_vocabulary_when_whole_words_come_first_then_tokens_out_of_reach_are_refused() -> None:
    model = _model([("a", "b")], ignore_merges=True)
    model["vocab"]["xyz"] = len(model["vocab"])
    assert len(read_vocabulary(model, {"xyz"}).ids) == 257
    with pytest.raises(UnsuitableError, match="cannot be reached"):
        read_vocabulary(model, set())


def test_pattern_when_of_known_tokenizers_then_read() -> None:
    section = json.loads(_trained(_split(LLAMA3)).to_str())["pre_tokenizer"]
    assert read_pattern(section) == LLAMA3
    # Both engines here are of one version of Unicode, or differ in a few characters.
    assert len(differing_characters(LLAMA3)) < 20_000


def test_engine_when_random_characters_then_same_ids() -> None:
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
    assert _same(_gpt2_like(), texts) > 2900
    assert _same(_trained(_split(LLAMA3)), texts) > 2900
