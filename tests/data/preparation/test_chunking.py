"""Pieces of long documents give the ids of the whole document."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llm.config.errors import UserError
from llm.data.preparation import chunking
from llm.data.preparation.chunking import batch_pieces, split_documents
from llm.data.sources.documents import TextChunk
from llm.tokenization.encoder import Encoder

SHARED = Path(os.environ.get("LLM_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

LETTERS = str.maketrans("0123456789", "ghijklmnop")


@pytest.fixture
def small(monkeypatch) -> None:
    """Documents of a few thousand characters count as long."""
    monkeypatch.setattr(chunking, "LONG_DOCUMENT_CHARS", 4000)
    monkeypatch.setattr(chunking, "PIECE_CHARS", 500)
    monkeypatch.setattr(chunking, "_TRIAL_CHARS", 2000)
    monkeypatch.setattr(chunking, "_TRIAL_PIECE_CHARS", 150)


def _in_chunks(text: str, size: int) -> list:
    return [("train", TextChunk(text[start : start + size], ends=False)) for start in range(0, len(text), size)]


def _words(seed: int, number: int) -> str:
    """Words of many kinds in one line: numbers, quotes, marks, contractions, double spaces."""
    draw = random.Random(seed)
    kinds = [
        "the",
        "Zürich",
        "don't",
        "x2",
        "3,14",
        "'quoted'",
        "e\u0301t\u00e9",
        "end.",
        "",
        "\u4f60\u597d",
        "I'LL",
        "_a",
    ]
    return " ".join(draw.choices(kinds, k=number))


def _trained(text: str, pre_tokenizer: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def _llama3(text: str) -> PreTrainedTokenizerFast:
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    return _trained(text, pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)]))


def _gpt2(text: str) -> PreTrainedTokenizerFast:
    return _trained(text, pre_tokenizers.ByteLevel(add_prefix_space=False))


def _check(text: str, tokenizer: PreTrainedTokenizerFast, fewest: int) -> list[str]:
    encoder = Encoder(tokenizer)
    pieces = [piece for batch in batch_pieces(_in_chunks(text, 700), encoder) for piece in batch]
    ids = list(chain(*(ids.tolist() for ids in encoder.encode([piece.text for piece in pieces]))))
    assert ids == tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert "".join(piece.text for piece in pieces) == text
    assert len(pieces) >= fewest
    return [piece.text for piece in pieces]


@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "wikitext2-valid.txt"])
@pytest.mark.parametrize("in_one_line", [False, True])
def test_batch_pieces_when_text_is_real_then_ids_of_the_whole(name: str, in_one_line: bool, small) -> None:
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data")
    text = (SHARED / name).read_text()[: 1 << 18]
    gpt2 = AutoTokenizer.from_pretrained(SHARED / "gpt2-tokenizer")
    pieces = _check(text.replace("\n", " ") if in_one_line else text, gpt2, fewest=300)
    assert max(map(len, pieces)) < 4000


@pytest.mark.parametrize("make", [_gpt2, _llama3])
@pytest.mark.parametrize("seed", range(4))
def test_batch_pieces_when_text_has_no_line_breaks_then_pieces_begin_before_words(make, seed: int, small) -> None:
    text = _words(seed, 8000)
    pieces = _check(text, make(text), fewest=40)
    assert all(piece[0] == " " and piece[1].isalpha() for piece in pieces[1:])


@pytest.mark.parametrize("make", [_gpt2, _llama3])
def test_batch_pieces_when_words_have_no_spaces_then_pieces_begin_before_full_stops(make, small) -> None:
    draw = random.Random(0)
    sentences = [
        "".join(draw.choices("\u4f60\u597d\u4e16\u754c\u4eba\u6c11", k=draw.randint(3, 30))) for _ in range(1500)
    ]
    text = "\u3002".join(sentences)
    assert all(piece[0] == "\u3002" for piece in _check(text, make(text), fewest=30)[1:])


def test_batch_pieces_when_tokens_span_spaces_then_document_is_not_divided(small) -> None:
    text = "of the people by the people " * 1500
    _check(text, _trained(text, pre_tokenizers.ByteLevel(False, use_regex=False)), fewest=1)
    plain = _gpt2(text)
    assert len(_check(text, plain, fewest=40)) > 40
    plain.add_tokens([AddedToken("people by"), AddedToken("of", lstrip=True)])
    assert len(_check(text, plain, fewest=1)) == 1


def test_batch_pieces_when_tokens_are_characters_then_divided_anywhere(byte_tokenizer, small) -> None:
    assert len(_check("acgt\u00e9" * 4000, byte_tokenizer, fewest=30)) < 50


def test_batch_pieces_when_later_text_has_other_boundaries_then_divided_there(small) -> None:
    text = "some words in a line\n" * 800 + _words(0, 4000)
    pieces = _check(text, _gpt2(text), fewest=60)
    assert max(map(len, pieces)) < 4000


def test_split_documents_when_document_is_divided_then_first_piece_begins_and_last_piece_ends_it(
    byte_tokenizer, small
) -> None:
    chunks = [
        *_in_chunks("some words in a line\n" * 500, 640),
        ("train", TextChunk("", ends=True)),
        ("train", TextChunk("b", True)),
    ]
    pieces = list(split_documents(chunks, Encoder(byte_tokenizer)))
    assert [piece.begins for piece in pieces] == [True] + [False] * (len(pieces) - 2) + [True]
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 2) + [True, True]


def test_batch_pieces_when_tokenizer_adds_a_prefix_to_every_text_then_document_is_not_divided(small) -> None:
    text = "some words in a line\n" * 500
    tokenizer = _gpt2(text)
    # Some tokenizers do this with every text that they encode.
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("_")
    assert _check(text, tokenizer, fewest=1) == [text]


def test_split_documents_when_long_document_has_no_boundary_then_error_names_it(small, monkeypatch) -> None:
    monkeypatch.setattr(chunking, "LONGEST_PIECE_CHARS", 20_000)
    text = "a" * 50_000
    chunks = [("train", TextChunk("short", ends=True)), *_in_chunks(text, 700)]
    with pytest.raises(UserError, match=r"^my\.txt: document 2 has 0 million characters without a place.*break it"):
        list(split_documents(chunks, Encoder(_gpt2("aa ab " * 100)), "my.txt"))


# Prints by how many megabytes tokenizing raises the peak memory.
TOKENIZE = """
import resource, sys
from pathlib import Path
from transformers import AutoTokenizer
from llm.config.options import DataOptions
from llm.data.sources.corpus import open_corpus
from llm.data.preparation.cache import load_or_tokenize
text, folder = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
options = DataOptions(train_file=(text,), validation_split_percentage=0, preprocessing_num_workers=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load_or_tokenize(open_corpus(options), tokenizer, tokenizer_hash="", options=options, cache_dir=Path(folder))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) / (1 << 20 if sys.platform == "darwin" else 1 << 10))
"""


@pytest.mark.slow
def test_load_or_tokenize_when_one_line_has_8_megabytes_then_ids_of_its_words_in_little_memory(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    words = [f" {draw.bytes(int(draw.integers(1, 6))).hex().translate(LETTERS)}" for _ in range(500)]
    tokenizer = _gpt2("".join(words))
    tokenizer.save_pretrained(tmp_path)
    chosen = draw.integers(len(words), size=1_200_000)
    (tmp_path / "line.txt").write_text("".join(words[number] for number in chosen))
    assert (tmp_path / "line.txt").stat().st_size > 8_000_000
    command = [sys.executable, "-c", TOKENIZE, str(tmp_path / "line.txt"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert float(done.stdout) < 200
    [path] = (tmp_path / "tokens").glob("*/train_00000.bin")
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    expected = list(chain(*(ids[number] for number in chosen)))
    assert np.array_equal(np.fromfile(path, "<u2"), expected)


def test_split_text_when_spaces_surround_newlines_then_not_divided_there() -> None:
    text = "one two\nthree \nfour\n\nfive\n six<|x|>\nseven.\neight\n <|x|>"
    before_words, before_spaces = map(re.compile, chunking._BETWEEN_LINES)
    assert chunking.split_text(text, 1, before_words) == [
        "one two\n",
        "three \nfour\n\nfive\n six<|x|>\nseven.\n",
        "eight\n <|x|>",
    ]
    assert chunking.split_text(text, 1, before_spaces)[1].startswith(" six<|x|>\nseven")
    assert "".join(chunking.split_text(text, 1, before_spaces)) == text


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["token across lines", "characters and a token", "merges across lines"])
def test_split_documents_when_a_token_spans_boundaries_only_after_the_trial_then_ids_of_the_whole(
    kind: str,
) -> None:
    plain = "some words in a line, and\nmore of them\n" * 400
    if kind == "token across lines":
        tokenizer = _gpt2(plain)
        tokenizer.add_tokens(["\nHuman:"])
        rare = "a line.\nHuman: speaks\n"
    elif kind == "characters and a token":
        letters = sorted(set(plain))
        backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
        tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
        rare = "<|endoftext|>" * 8
    else:
        tokenizer = _trained("words.\nQueen " * 50, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        rare = "words.\nQueen\n"
    text = plain[:8000] + (plain[:300] + rare) * 60
    encoder = Encoder(tokenizer)
    pieces = [piece.text for piece in split_documents(_in_chunks(text, 1000), encoder)]
    assert "".join(pieces) == text
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert np.array_equal(np.concatenate(encoder.encode(pieces)), expected)
