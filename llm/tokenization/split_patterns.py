"""How byte-level tokenizers split a text into words, as a pattern with one meaning in both regex engines."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np

# The words of `ByteLevel(use_regex=True)`. Where at most one of some alternatives can match, the more
# frequent ones are first, which is faster.
# Source: the pattern in section "encoder" of GPT-2's published code; checked against the pattern of tokenizers.
GPT2_PATTERN = r" ?\p{L}+| ?\p{N}+|'(?:[sdmt]|ll|ve|re)| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s"

# Syntax with the same meaning in Oniguruma (tokenizers) and fancy-regex (tiktoken). Excluded: `^`, `$`, `.`, `\d`,
# `\w`, `\b`, back references, sets of sets, `{1,3}+`.
_CLASS = r"\\[pP]\{[A-Za-z]+\}|\\[rntsS/]"
_LITERAL = r"[A-Za-z0-9'\" /,:;<>=!#%@_~`-]"
_COMMON = re.compile(
    rf"(?:{_CLASS}|{_LITERAL}|\[\^?(?:{_CLASS}|{_LITERAL})+\]"
    r"|\((?!\?)|\(\?(?:i:|:|!|=)|\)|[|?*+]|\{\d+(?:,\d*)?\}(?!\+))+"
)
_CLASSES = re.compile(r"\\[pP]\{[A-Za-z]+\}|\\[sS]")

# First and last code point of ranges that have one class in every version of Unicode since 10: inside the blocks of
# ideographs, Hangul and private use, and unassigned code points.
_STABLE_RANGES = (
    (0x3400, 0x4DB5),
    (0x4E00, 0x9FD5),
    (0xAC00, 0xD7A3),
    (0xE000, 0xF8FF),
    (0x20000, 0x2A6D6),
    (0x2A700, 0x2B734),
    (0x2B740, 0x2B81D),
    (0x2B820, 0x2CEA1),
    (0x40000, 0xDFFFF),
    (0xE0200, 0x10FFFF),
)

# Texts for which encoders are known to differ. A backend is used only if it gives the tokenizer's ids for all of them.
EDGE_CASES = [
    "",
    " ",
    "  ",
    "\n",
    "\r\n",
    " \n",
    "\n ",
    "\t\t\tx",
    "a\n\n\nb",
    "a   b    ",
    "\r\r\n\na \r b",
    "\x0b\x0c\x1c\x1d\x1e\x1f\x85",
    "\xa0\u1680\u2000\u2003\u200a\u2028x\u2029 \u202f\u205f\u3000\u3000b",
    "\u180e\u200b\u200c\u2060\ufeff x",
    "\x00\x01\x7f\x80\x9f",
    "I'm you're he'll we've I'd it's",
    "I'M YOU'RE HE'LL",
    "'s't're've'm'll'd",
    "'\u017f '\u017fs \u212a'\u212a",
    "'\x27\x27 \u2019s \xdf'\ufb06",
    "0 12 345 6789 1234567890",
    "1,234.56 7e-8 0x1F",
    "\u0661\u0662\u0663 \xb2\xb3\xbd \u2160\u2167 \u4e00\u4e8c",
    "x1y22z333",
    "e\u0301e\u0308\u0323o\u0302",
    "\u0301 \u0301a",
    "a" + "\u0301" * 40,
    "\u0e01\u0e33\u0e49 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u270d\U0001f3fd \ufe0f",
    "\U0001d400\U00020000\U000e0041\U0010ffff",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b\u3061\u306f \uc548\ub155",
    "\u0434\u0430 \u03ba\u03b1\u03af \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\ufb01\u01c5\u0130\u0131\xc5\u212b \u2126",
    "\ufdd0 \ufffe \uffff \ufffd",
    "<|endoftext|>",
    "a <|endoftext|> b",
    "<|endoftext|<|endoftext|>|>",
    "<s></s>[CLS] [MASK] <unk><pad>",
    "<|im_start|>user\n<|im_end|>",
    "a" * 2000,
    "ab" * 1000,
    " " * 2000,
    "\n" * 2000,
    " \n\t" * 500,
    "\u4e00" * 1000,
    "!" * 1000,
    "=-" * 500,
    "1" * 1000,
    "\U0001f600" * 300,
    "\u3000" * 500,
    "def f(x):\n    return x  # \u00e9\n",
]


class UnsuitableError(Exception):
    """Raised if tiktoken cannot give the ids of a tokenizer; the message is the reason."""


def read_pattern(pre_tokenizer: dict[str, Any] | None) -> str:
    """Return the pattern whose matches are the words.

    Args:
        pre_tokenizer: the section `pre_tokenizer` of a tokenizer.json.

    Raises:
        UnsuitableError: one pattern that both regex engines understand cannot describe the words.
    """
    steps = [pre_tokenizer or {}]
    if steps[0].get("type") == "Sequence":
        steps = steps[0]["pretokenizers"]
    *before, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise UnsuitableError("the pre-tokenizer is not byte-level, or adds a space")
    if not before and last.get("use_regex", True):
        return GPT2_PATTERN
    if len(before) != 1 or last.get("use_regex", True) or before[0].get("type") != "Split":
        raise UnsuitableError("the pre-tokenizer has other steps")
    split = before[0]
    pattern = split["pattern"].get("Regex")
    if pattern is None or split["behavior"] != "Isolated" or split["invert"]:
        raise UnsuitableError("the pre-tokenizer does not split into the matches of a pattern")
    if _COMMON.fullmatch(pattern) is None:
        raise UnsuitableError("the pre-tokenizer's pattern may have another meaning in tiktoken's regex engine")
    return str(pattern)


@functools.lru_cache(maxsize=4)
def differing_characters(pattern: str) -> str:
    """Return the characters that the two regex engines, with different versions of Unicode, classify differently.

    Args:
        pattern: the pattern of the words, from `read_pattern`.
    """
    # A class and its complement differ in the same characters.
    classes = {name[0] + name[1:2].lower() + name[2:] for name in _CLASSES.findall(pattern)}
    if "(?i:" in pattern:
        classes.add("(?i:[a-z])")
    points = np.arange(0x110000)
    to_compare = (points < 0xD800) | (points > 0xDFFF)  # surrogates are not characters
    for first, last in _STABLE_RANGES:
        to_compare[first + 1 : last] = False
    characters = points[to_compare].astype("<u4").tobytes().decode("utf-32-le")
    differing: set[str] = set()
    for character_class in classes:
        differing |= _matches_in_tiktoken(character_class, characters) ^ _matches_in_tokenizers(
            character_class, characters
        )
    return "".join(sorted(differing))


def _matches_in_tiktoken(character_class: str, characters: str) -> set[str]:
    import tiktoken

    # tiktoken drops the characters that the pattern does not match.
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding(character_class, pat_str=character_class, mergeable_ranks=ranks, special_tokens={})
    return set(encoding.encode_to_numpy(characters, disallowed_special=()).astype(np.uint8).tobytes().decode())


def _matches_in_tokenizers(character_class: str, characters: str) -> set[str]:
    from tokenizers import Regex
    from tokenizers.normalizers import Replace

    return set(characters) - set(Replace(Regex(character_class), "").normalize_str(characters))
