"""Patterns of the words of byte-level tokenizers."""

from __future__ import annotations

import json

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from llm.tokenization.split_patterns import (
    EDGE_CASES,
    GPT2_PATTERN,
    UnsuitableError,
    differing_characters,
    read_pattern,
)

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def _split(pattern: str) -> dict:
    """Return the section `pre_tokenizer` of a tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return json.loads(tokenizer.to_str())["pre_tokenizer"]


def test_read_pattern_when_tokenizer_is_llama3_then_its_pattern() -> None:
    assert read_pattern(_split(LLAMA3)) == LLAMA3
    # The regex engines here have the same version of Unicode, or differ in a few characters.
    assert len(differing_characters(LLAMA3)) < 20_000


def test_read_pattern_when_tokenizer_is_gpt2_then_the_faster_pattern() -> None:
    assert read_pattern({**BYTE_LEVEL, "use_regex": True}) == GPT2_PATTERN


@pytest.mark.parametrize("pattern", [r"\w+", r"^a", r"a$", r".", r"\d+", r"\bword", r"(a)\1", r"[[a]b]", r"a{1,3}+"])
def test_read_pattern_when_regex_engines_disagree_on_the_syntax_then_unsuitable(pattern: str) -> None:
    with pytest.raises(UnsuitableError, match="another meaning"):
        read_pattern(_split(pattern))


@pytest.mark.parametrize("section", [None, {"type": "Whitespace"}, {**BYTE_LEVEL, "add_prefix_space": True}])
def test_read_pattern_when_pre_tokenizer_is_not_byte_level_then_unsuitable(section: dict | None) -> None:
    with pytest.raises(UnsuitableError, match="not byte-level, or adds a space"):
        read_pattern(section)


def test_gpt2_pattern_when_texts_are_edge_cases_then_words_of_the_byte_level_pre_tokenizer() -> None:
    own = pre_tokenizers.ByteLevel(add_prefix_space=False)
    faster = pre_tokenizers.Split(Regex(GPT2_PATTERN), behavior="isolated")
    for text in EDGE_CASES:
        spans = [span for _, span in own.pre_tokenize_str(text)]
        assert [span for _, span in faster.pre_tokenize_str(text)] == spans, repr(text)
