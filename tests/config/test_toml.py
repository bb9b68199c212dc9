"""Options written as TOML and as a command line."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

from llm.config.flags import Flag, flags_of
from llm.config.option import OptionGroup, option
from llm.config.options import Options
from llm.config.reader import read_options
from llm.config.toml import redacted_command_line, to_toml

TEXTS = [
    "plain",
    "",
    'quotes " and \' and """',
    "back\\slash \\n",
    "line\nbreak\r\n\ttab",
    "\x00 \x1b \x7f \x85 \u2028",
    "ünïcode 🤗 你好",
    "# [not.a.table] = 1",
]
VALUES: dict[Any, list[Any]] = {
    str: TEXTS,
    int: [1, 300, 2**40],
    float: [0.5, 1e-08, 5e-05, 0.1 + 0.2],
    bool: [True, False],
}


class Flat(OptionGroup):
    """A command without groups."""

    checkpoint: str | None = option(None, "folder")
    num_samples: int = option(3, "how many")


def candidates(flag: Flag) -> list[Any]:
    """Values that the type of the option allows."""
    if flag.container is dict:
        return [{}, {"power": 2, "a b": 1.0, "ok": True, "t": 'x"'}, {"gone": None, "n": 1}]
    values = [item for member in flag.members for item in VALUES.get(member, [member])]
    return [(), ("a",), tuple(TEXTS)] if flag.takes_many else values


@pytest.mark.parametrize("name", [f.name for f in flags_of(Options).values() if not f.secret])
def test_to_toml_when_read_back_then_every_value_is_the_same(name: str, tmp_path: Path) -> None:
    flag = flags_of(Options)[name]
    base: dict[str, dict[str, Any]] = {
        "tokenizer": {"tokenizer_name": "train:bpe"},
        "schedule": {"lr_scheduler_type": "cosine"},
        "output": {"output_dir": "runs/x"},
        "data": {"train_dir": ("shards",)} if name == "validation_dir" else {},
    }
    path = tmp_path / "config.toml"
    num_tried = 0
    for value in candidates(flag):
        try:
            group = base.get(flag.group, {}) | {name: value}
            expected = Options.model_validate(base | {flag.group: group})
        except ValueError:  # out of bounds, or refused in this combination
            continue
        path.write_text(to_toml(expected), encoding="utf-8", newline="")
        result = read_options(Options, ["--config", str(path)], prog="llm", description="")
        assert result == expected
        assert repr(result) == repr(expected)
        num_tried += 1
    assert num_tried


def test_to_toml_when_options_have_a_secret_then_it_is_left_out() -> None:
    options = Options.model_validate({"hub": {"hub_token": "hf_abc", "hub_model_id": "me/x"}})
    assert "me/x" in to_toml(options)
    assert "hf_abc" not in to_toml(options)
    assert "hub_token" not in to_toml(options)


def test_to_toml_when_the_table_is_a_single_group_then_its_keys_are_top_level() -> None:
    assert to_toml(Flat(checkpoint="x")) == 'checkpoint = "x"\nnum_samples = 3\n'


def test_to_toml_when_written_then_every_group_is_a_table() -> None:
    content = tomllib.loads(to_toml(Options()))
    assert set(content) == set(Options.model_fields)
    assert "seed" not in content["training"]
    assert content["optimizer"]["learning_rate"] == 5e-5


@pytest.mark.parametrize(
    "secret",
    [
        ["--hub_token", "hf_abc"],
        ["--hub-token=hf_abc"],
        ["--hub_t", "hf_abc"],
        ["--hub", "hf_abc"],
        ["--hub_tokne", "hf_abc"],
    ],
)
def test_redacted_command_line_when_it_has_a_secret_then_shows_stars(secret: list[str]) -> None:
    line = redacted_command_line(["llm", *secret, "--seed", "1"])
    assert "hf_abc" not in line
    assert "***" in line
    assert line.endswith(" --seed 1")


def test_redacted_command_line_when_a_shell_reads_it_then_the_words_are_the_same() -> None:
    words = ["-m", "llm", "--train_file", "a b", "c*", "--sample_prompt=it's", "--kfac", "--", "-x"]
    assert shlex.split(redacted_command_line(words[1:])) == words[1:]
