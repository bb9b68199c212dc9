"""Ids are exactly the tokenizer's."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from llm.config.errors import UserError
from llm.data import encoding
from llm.data.encoding import Encoder, batches, encoding_threads, vocabulary_size
from llm.data.parts import Part

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def gpt2():
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data")
    return AutoTokenizer.from_pretrained(SHARED / "gpt2-tokenizer")


def _encoded(parts: list, tokenizer) -> list[int]:
    encoder = Encoder(tokenizer)
    ids: list[int] = []
    for batch in batches(parts, encoder):
        for found in encoder.encode([piece.text for piece in batch]):
            assert found.dtype == np.uint32
            ids += found.tolist()
    return ids


def _in_parts(text: str, size: int) -> list:
    starts = range(0, len(text), size)
    return [("train", Part(text[start : start + size], ends=False)) for start in starts]


@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "wikitext2-valid.txt"])
def test_encoding_when_long_text_is_cut_then_ids_of_the_whole(gpt2, name: str, monkeypatch) -> None:
    monkeypatch.setattr(encoding, "LONG_DOCUMENT", 1 << 18)
    monkeypatch.setattr(encoding, "PIECE_LENGTH", 1 << 14)
    monkeypatch.setattr(encoding, "_TRIAL_LENGTH", 1 << 17)
    text = (SHARED / name).read_text()[: 1 << 19]
    whole = gpt2(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert _encoded(_in_parts(text, 1 << 16), gpt2) == whole
    assert len(list(encoding.pieces(_in_parts(text, 1 << 16), Encoder(gpt2)))) > 20


def test_encoding_when_texts_are_odd_then_ids_of_the_tokenizer(gpt2) -> None:
    draw = random.Random(0)
    alphabet = "ab 1\n\r\t'.\u0301é€😀\u200d\u3000<|endoftext|>"
    texts = ["".join(draw.choices(alphabet, k=draw.randint(1, 60))) for _ in range(300)]
    texts += ["<|endoftext|>", "a" * 3000, " " * 3000, "\n" * 3000]
    expected = gpt2(texts, add_special_tokens=False, verbose=False)["input_ids"]
    assert [ids.tolist() for ids in Encoder(gpt2).encode(texts)] == expected


def test_encoding_when_tokenizer_was_told_to_truncate_then_it_does_not(byte_tokenizer) -> None:
    assert len(byte_tokenizer("a" * 50, truncation=True, max_length=5)["input_ids"]) == 5
    encoder = Encoder(byte_tokenizer)
    assert [len(ids) for ids in encoder.encode(["a" * 50, "b"])] == [50, 1]
    assert encoder._backend is not None


def test_encoding_when_engine_and_tokenizer_differ_then_the_tokenizer_counts(
    byte_tokenizer,
) -> None:
    class Reversing:
        is_fast = True
        split_special_tokens = False
        backend_tokenizer = byte_tokenizer.backend_tokenizer

        def __len__(self) -> int:
            return len(byte_tokenizer)

        def get_vocab(self) -> dict[str, int]:
            return byte_tokenizer.get_vocab()

        def __call__(self, texts, **options):
            found = byte_tokenizer(texts, **options)["input_ids"]
            return {"input_ids": [ids[::-1] for ids in found]}

    plain, reverse = Encoder(byte_tokenizer), Encoder(Reversing())
    assert reverse.encode(["abc"])[0].tolist() == plain.encode(["abc"])[0].tolist()[::-1]


def test_encoding_when_tokenizer_is_slow_then_its_call_is_used(byte_tokenizer) -> None:
    class Slow:
        is_fast = False

        def __len__(self) -> int:
            return 256

        def get_vocab(self) -> dict[str, int]:
            return {chr(i): i for i in range(256)}

        def __call__(self, texts, **options):
            assert options["add_special_tokens"] is False
            return {"input_ids": [list(text.encode()) for text in texts]}

    assert [ids.tolist() for ids in Encoder(Slow()).encode(["ab", "ä"])] == [[97, 98], [195, 164]]


def test_encoding_when_id_is_beyond_the_vocabulary_then_refused(byte_tokenizer, monkeypatch) -> None:
    encoder = Encoder(byte_tokenizer)
    encoder.vocabulary_size = 10
    with pytest.raises(UserError, match="has 10 tokens"):
        encoder.encode(["hello"])


def test_encoding_when_pieces_would_differ_then_whole(byte_tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(encoding, "LONG_DOCUMENT", 400)
    monkeypatch.setattr(encoding, "PIECE_LENGTH", 50)
    monkeypatch.setattr(encoding, "_TRIAL_PIECE_LENGTH", 20)
    text = "some words in a line\n" * 100
    parts = [*_in_parts(text, 64), ("train", Part("", ends=True))]
    pieces = [piece for batch in batches(parts, Encoder(byte_tokenizer)) for piece in batch]
    assert len(pieces) > 5
    assert [piece.begins for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert "".join(piece.text for piece in pieces) == text

    backend = byte_tokenizer.backend_tokenizer
    before = backend.pre_tokenizer
    try:
        # A space in front of every text that is encoded, as some tokenizers put.
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        pieces = [piece for batch in batches(parts, Encoder(byte_tokenizer)) for piece in batch]
    finally:
        backend.pre_tokenizer = before
    assert [piece.text for piece in pieces] == [text]


def test_cut_when_space_surrounds_newlines_then_not_there() -> None:
    text = "one two\nthree \nfour\n\nfive\n six<|x|>\nseven.\neight\n <|x|>"
    behind_words, before_spaces = encoding._PLACES
    assert encoding.cut(text, 1, behind_words) == [
        "one two\n",
        "three \nfour\n\nfive\n six<|x|>\nseven.\n",
        "eight\n <|x|>",
    ]
    assert encoding.cut(text, 1, before_spaces)[1].startswith(" six<|x|>\nseven")
    assert "".join(encoding.cut(text, 1, before_spaces)) == text


def test_vocabulary_size_when_it_has_holes_then_beyond_the_largest_id(byte_tokenizer) -> None:
    assert vocabulary_size(byte_tokenizer) == 257


def test_encoding_threads_when_numbered_then_environment_says_so_meanwhile(monkeypatch) -> None:
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    with encoding_threads(3):
        assert os.environ["RAYON_NUM_THREADS"] == "3"
        assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    with encoding_threads(None):
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert "RAYON_NUM_THREADS" not in os.environ
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
