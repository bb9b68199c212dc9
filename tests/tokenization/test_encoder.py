"""The encoder gives exactly the tokenizer's ids, with every backend."""

from __future__ import annotations

import os
import random
import unicodedata
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import AutoTokenizer

from llm.config.errors import UserError
from llm.tokenization import encoder as encoding
from llm.tokenization.encoder import Encoder, encoding_threads, vocabulary_size
from llm.tokenization.tiktoken_encoder import TiktokenEncoder

SHARED = Path(os.environ.get("LLM_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


class _Piece(NamedTuple):
    text: str


@pytest.fixture(scope="module")
def gpt2():
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data")
    return AutoTokenizer.from_pretrained(SHARED / "gpt2-tokenizer")


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_encode_when_texts_are_unusual_then_ids_of_the_tokenizer(gpt2) -> None:
    draw = random.Random(0)
    alphabet = "ab 1\n\r\t'.\u0301é€😀\u200d\u3000<|endoftext|>"
    texts = ["".join(draw.choices(alphabet, k=draw.randint(1, 60))) for _ in range(300)]
    texts += ["<|endoftext|>", "a" * 3000, " " * 3000, "\n" * 3000]
    expected = gpt2(texts, add_special_tokens=False, verbose=False)["input_ids"]
    assert [ids.tolist() for ids in Encoder(gpt2).encode(texts)] == expected


def _random_texts(number: int, seed: int) -> list[str]:
    """Return strings of any characters but surrogates, of runs, marks and special tokens, and mixtures of them."""
    draw = random.Random(seed)
    anything = [chr(point) for point in range(0x110000) if not 0xD800 <= point <= 0xDFFF]
    assigned = [character for character in anything if unicodedata.category(character) not in ("Cn", "Co")]
    marks = [character for character in assigned if unicodedata.category(character).startswith("M")]
    spaces = [character for character in assigned if character.isspace()]
    words = [
        "the",
        " of",
        "'s",
        "'LL",
        "<|endoftext|>",
        "<|endof",
        "\ufdd0",
        "12345",
        " Ünïcode",
        "\n\n",
        "  ",
        "don't",
    ]
    alphabets = (anything, assigned, marks, spaces, words, [chr(point) for point in range(256)])
    texts = []
    for _ in range(number):
        pieces: list[str] = []
        for _ in range(draw.randint(1, 5)):
            alphabet = draw.choice(alphabets)
            if draw.random() < 0.2:
                pieces += [draw.choice(alphabet) * draw.randint(2, 60)]
            else:
                pieces += draw.choices(alphabet, k=draw.randint(1, 12))
        texts.append("".join(pieces))
    return texts


@pytest.fixture
def tiktoken_at_once(monkeypatch) -> None:
    """Tiktoken encodes texts of any length."""
    monkeypatch.setattr(encoding, "_MIN_CHARS_FOR_TIKTOKEN", 0)


def test_encode_when_10000_strings_are_random_then_ids_of_the_tokenizer(gpt2, tiktoken_at_once) -> None:
    texts = _random_texts(10_000, seed=1)
    encoder = Encoder(gpt2)
    encoded = encoder.encode(texts)
    assert encoder._tiktoken is not None
    expected = gpt2(texts, add_special_tokens=False, verbose=False)["input_ids"]
    assert [ids.tolist() for ids in encoded] == expected
    assert sum(ids is None for ids in encoder._tiktoken.encode(texts)) < 3000


@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "wikitext2-valid.txt"])
def test_encode_when_text_is_real_then_ids_of_the_tokenizer(gpt2, name: str, tiktoken_at_once) -> None:
    text = (SHARED / name).read_text()
    lines = text.splitlines(keepends=True)
    encoder = Encoder(gpt2)
    encoded = encoder.encode([text, *lines])
    assert encoder._tiktoken is not None
    expected = gpt2([text, *lines], add_special_tokens=False, verbose=False)["input_ids"]
    assert all(ids.tolist() == expected_ids for ids, expected_ids in zip(encoded, expected, strict=True))


def test_encode_when_a_run_of_one_character_is_long_then_ids_of_the_tokenizer(gpt2, tiktoken_at_once) -> None:
    texts = ["x" + " " * 150_000 + "y", "\n" * 140_000, "a" * 150_000, "é" * 70_000, "." * 150_000]
    expected = gpt2(texts, add_special_tokens=False, verbose=False)["input_ids"]
    assert [ids.tolist() for ids in Encoder(gpt2).encode(texts)] == expected


def test_encode_when_special_tokens_are_split_then_ids_of_the_tokenizer(gpt2, tiktoken_at_once, monkeypatch) -> None:
    monkeypatch.setattr(gpt2, "split_special_tokens", True)
    texts = ["a<|endoftext|>b", "a b c"]
    encoder = Encoder(gpt2)
    expected = gpt2(texts, add_special_tokens=False)["input_ids"]
    assert 50256 not in expected[0]
    assert [ids.tolist() for ids in encoder.encode(texts)] == expected
    assert encoder._tiktoken is not None


def test_encode_when_tiktoken_gives_other_ids_then_tokenizer_backend_is_used(
    gpt2, tiktoken_at_once, monkeypatch, caplog
) -> None:
    true_encode = TiktokenEncoder.encode
    monkeypatch.setattr(TiktokenEncoder, "encode", lambda self, texts: [ids + 1 for ids in true_encode(self, texts)])
    monkeypatch.setattr(encoding, "EDGE_CASES", ["plain"])
    encoder = Encoder(gpt2)
    assert encoder.encode(["some words"])[0].tolist() == gpt2("some words")["input_ids"]
    assert encoder._tiktoken is None
    assert "gives other ids" in caplog.text


def test_encode_when_text_is_short_then_without_tiktoken(gpt2) -> None:
    encoder = Encoder(gpt2)
    encoder.encode(["short"])
    assert encoder._tiktoken is None
    encoder.encode(["long enough " * 100_000])
    assert encoder._tiktoken is not None


@pytest.mark.parametrize("num_workers", [1, 3])
def test_encode_batches_when_several_workers_then_order_is_kept(
    byte_tokenizer, tiktoken_at_once, num_workers: int
) -> None:
    batches = [[_Piece(f"{number} é \ufdd0" * (1 + number % 7))] * 3 for number in range(40)]
    batches[7] = []
    with Encoder(byte_tokenizer, num_workers) as encoder:
        results = list(encoder.encode_batches(iter(batches)))
        assert (encoder._workers is not None) == (num_workers > 1)
    assert [batch for batch, _ in results] == batches
    for batch, ids in results:
        assert [piece_ids.tolist() for piece_ids in ids] == [_ids(byte_tokenizer, piece.text) for piece in batch]
        assert {piece_ids.dtype.name for piece_ids in ids} <= {"uint16", "uint32"}


def test_encode_batches_when_results_are_not_taken_then_reads_only_a_few_batches_ahead(
    byte_tokenizer, tiktoken_at_once
) -> None:
    read = []

    def batches():
        for number in range(100):
            read.append(number)
            yield [_Piece(str(number))]

    with Encoder(byte_tokenizer, 2) as encoder:
        results = encoder.encode_batches(batches())
        assert [next(results)[0][0].text for _ in range(5)] == list("01234")
        assert len(read) <= 5 + 2 * 2 + 1


def test_encode_batches_when_no_process_can_start_then_encodes_in_this_one_with_warning(
    byte_tokenizer, tiktoken_at_once, monkeypatch, caplog
) -> None:
    monkeypatch.setattr("sys.executable", "")
    with Encoder(byte_tokenizer, 2) as encoder:
        [(_, ids)] = encoder.encode_batches([[_Piece("some words")]])
    assert ids[0].tolist() == _ids(byte_tokenizer, "some words")
    assert "tokenizing in one process" in caplog.text


def test_encode_when_tokenizer_has_truncated_before_then_no_truncation(byte_tokenizer) -> None:
    assert len(byte_tokenizer("a" * 50, truncation=True, max_length=5)["input_ids"]) == 5
    encoder = Encoder(byte_tokenizer)
    assert [len(ids) for ids in encoder.encode(["a" * 50, "b"])] == [50, 1]
    assert encoder._backend is not None


def test_encode_when_backend_and_tokenizer_differ_then_ids_of_the_tokenizer(
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
            encoded = byte_tokenizer(texts, **options)["input_ids"]
            return {"input_ids": [ids[::-1] for ids in encoded]}

    plain, reverse = Encoder(byte_tokenizer), Encoder(Reversing())
    assert reverse.encode(["abc"])[0].tolist() == plain.encode(["abc"])[0].tolist()[::-1]


def test_encode_when_tokenizer_is_slow_then_its_call_is_used(byte_tokenizer) -> None:
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


def test_encode_when_an_id_is_not_below_the_vocabulary_size_then_error(byte_tokenizer, monkeypatch) -> None:
    encoder = Encoder(byte_tokenizer)
    encoder.vocabulary_size = 10
    with pytest.raises(UserError, match="has 10 tokens"):
        encoder.encode(["hello"])


def test_vocabulary_size_when_ids_have_gaps_then_larger_than_every_id(byte_tokenizer) -> None:
    assert vocabulary_size(byte_tokenizer) == 257


def test_encoding_threads_when_given_a_number_then_environment_has_it_during_the_block(monkeypatch) -> None:
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    with encoding_threads(3):
        assert os.environ["RAYON_NUM_THREADS"] == "3"
        assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    with encoding_threads(None):
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert "RAYON_NUM_THREADS" not in os.environ
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
