"""The page that `--help` prints."""

from __future__ import annotations

import pytest

from llm.config.flags import flags_of
from llm.config.help import help_text
from llm.config.option import OptionGroup, option
from llm.config.options import Options
from llm.config.reader import read_options


class Sampling(OptionGroup):
    """A command without groups."""

    model: str = option(..., "folder of the model", positional=True)
    prompt: tuple[str, ...] | None = option(None, "texts to continue", positional=True)
    top_k: int | None = option(None, "candidates (default: all)", ge=1)
    names: tuple[str, ...] = option(("a", "b"), "names")


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--he"], ["--seed", "x", "--help"]])
def test_help_when_requested_then_every_option_is_on_the_page(
    argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stopped:
        read_options(Options, argv, prog="llm", description="Trains.")
    page = capsys.readouterr().out
    assert stopped.value.code == 0
    assert max(map(len, page.splitlines())) <= 100
    for flag in flags_of(Options).values():
        assert f"  --{flag.name}" in page
        assert f"\n[{flag.group}] " in page
    for expected in ("--config FILE.toml", "--version", "(default: 5e-05)", "N|epoch", "[PATH]"):
        assert expected in page
    assert "  --num_warmup_steps N    steps over which the learning rate rises to its peak (default: 0)" in page


def test_help_text_when_options_are_positional_then_the_usage_line_names_them() -> None:
    page = help_text(Sampling, prog="llm.generate", description="Samples.")
    assert page.startswith("usage: llm.generate TEXT [TEXT [TEXT ...]] [--config FILE.toml]")
    assert "folder of the model (required)\n" in page


def test_help_text_when_an_option_has_a_default_then_it_is_named_once() -> None:
    page = help_text(Sampling, prog="llm.generate", description="Samples.")
    assert "candidates (default: all)\n" in page
    assert "names (default: a b)\n" in page
    assert "options from a file, flat; flags win over it\n" in page
