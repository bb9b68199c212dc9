"""Tokenizers: loaded by name, one token a character, trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GPT2Config

from llm.config.errors import UserError
from llm.config.options import ModelOptions, TokenizerOptions
from llm.tokenization.load import END_OF_TEXT, byte_level_bpe, load_tokenizer
from llm.tokenization.vocabulary import tokenizer_hash

ODD = "a  b\n\n\tc\r\nd é ß 😀 日本 ' , . 'tis  \n"


def _load(
    cache_dir: Path,
    text: str = "some words, and some more words\n",
    *,
    model: ModelOptions | None = None,
    texts: Callable[[], Iterator[str]] | None = None,
    **options: object,
):
    return load_tokenizer(
        TokenizerOptions.model_validate(options),
        model or ModelOptions(),
        texts=texts or (lambda: iter([text])),
        corpus_fingerprint="fingerprint",
        cache_dir=cache_dir,
    )


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["char", "train:bpe"])
def test_load_tokenizer_when_text_is_unusual_then_round_trips(name: str, tmp_path: Path) -> None:
    tokenizer = _load(tmp_path, ODD * 3, tokenizer_name=name)
    assert tokenizer.decode(_ids(tokenizer, ODD)) == ODD


@pytest.mark.parametrize("name", ["char", "train:bpe"])
def test_load_tokenizer_when_saved_with_a_config_then_loads_the_same(name: str, tmp_path: Path) -> None:
    tokenizer = _load(tmp_path / "cache", ODD, tokenizer_name=name)
    tokenizer.save_pretrained(tmp_path / "saved")
    GPT2Config().save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded(ODD) == tokenizer(ODD)
    assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
    assert loaded.eos_token_id == 0


def test_character_tokenizer_when_made_then_ids_follow_the_sorted_characters(tmp_path: Path) -> None:
    tokenizer = _load(tmp_path, "cab\n", tokenizer_name="char")
    assert tokenizer.get_vocab() == {END_OF_TEXT: 0, "\n": 1, "a": 2, "b": 3, "c": 4}
    assert _ids(tokenizer, "abz") == [2, 3, 0]


def test_train_bpe_when_text_is_short_then_warning_with_number_of_tokens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = _load(tmp_path, "abab", tokenizer_name="train:bpe", vocab_size=300)
    assert len(tokenizer) < 300
    assert "259 tokens instead of the requested 300" in caplog.text


def test_train_bpe_when_vocab_size_given_then_has_it(tiny_text: Path, tmp_path: Path) -> None:
    tokenizer = _load(tmp_path, tiny_text.read_text(), tokenizer_name="train:bpe", vocab_size=280)
    assert len(tokenizer) == 280


def test_train_bpe_when_trained_twice_then_the_same(tiny_text: Path) -> None:
    text = tiny_text.read_text()
    first, second = (byte_level_bpe(iter([text]), 300) for _ in range(2))
    assert tokenizer_hash(first) == tokenizer_hash(second)


@pytest.mark.parametrize("name", ["char", "train:bpe"])
def test_trained_tokenizer_when_cached_then_text_is_not_read(name: str, tmp_path: Path) -> None:
    first = _load(tmp_path, ODD, tokenizer_name=name)

    def unread() -> Iterator[str]:
        raise AssertionError("the text was read again")

    second = _load(tmp_path, tokenizer_name=name, texts=unread)
    assert tokenizer_hash(first) == tokenizer_hash(second)


def test_cache_when_vocab_size_differs_then_trains_again(tiny_text: Path, tmp_path: Path) -> None:
    text = tiny_text.read_text()
    sizes = [len(_load(tmp_path, text, tokenizer_name="train:bpe", vocab_size=n)) for n in (270, 290)]
    assert sizes == [270, 290]


def test_default_when_nothing_named_then_trains_bpe(tmp_path: Path) -> None:
    assert len(_load(tmp_path, "hello")) >= 257


def test_default_when_model_named_then_uses_its_tokenizer(tiny_gpt2_dir: Path, tmp_path: Path) -> None:
    tokenizer = _load(tmp_path, model=ModelOptions(model_name_or_path=str(tiny_gpt2_dir)))
    assert len(tokenizer) == 257
    assert not any(tmp_path.iterdir())


def test_default_when_config_folder_has_no_tokenizer_then_trains_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    GPT2Config(n_layer=1).save_pretrained(tmp_path / "config")
    caplog.set_level("INFO")
    model = ModelOptions(config_name=str(tmp_path / "config"))
    assert len(_load(tmp_path / "cache", "hello", model=model)) >= 257
    assert "training one" in caplog.text


def test_default_when_config_name_is_wrong_then_refuses_before_training(tmp_path: Path) -> None:
    model = ModelOptions(config_name=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"--config_name .*nowhere: no such folder"):
        _load(tmp_path, model=model)


def test_empty_text_when_training_then_refuses(tmp_path: Path) -> None:
    for name in ("char", "train:bpe"):
        with pytest.raises(UserError, match="training text is empty"):
            _load(tmp_path, texts=lambda: iter([""]), tokenizer_name=name)


@pytest.mark.parametrize("with_config", [False, True])
def test_folder_when_it_has_no_tokenizer_then_refuses_in_one_line(with_config: bool, tmp_path: Path) -> None:
    if with_config:
        GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no tokenizer .*char or train:bpe") as caught:
        _load(tmp_path / "cache", tokenizer_name=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_folder_when_tokenizer_is_broken_then_refuses_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(UserError, match="cannot be read") as caught:
        _load(tmp_path / "cache", tokenizer_name=str(tmp_path))
    assert "\n" not in str(caught.value)
