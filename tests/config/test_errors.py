"""Errors that a person can fix."""

from __future__ import annotations

import pytest

from llm.config.errors import Stopped, UsageError, UserError, first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no such key"), "no such key"),
        (ValueError("\n  \n  no such key.  \nTraceback ..."), "no such key."),
        (MemoryError(), "MemoryError"),
        (OSError(" \n\n"), "OSError"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_first_line_when_the_message_has_several_or_none_then_is_the_first_that_is_not_blank(
    error: BaseException, line: str
) -> None:
    assert first_line(error) == line


def test_exit_codes_when_read_then_are_those_of_the_readme() -> None:
    assert (UserError.exit_code, UsageError.exit_code, Stopped.exit_code) == (1, 2, 75)


def test_stopped_when_a_library_catches_exceptions_then_passes_through() -> None:
    def read_file() -> None:
        try:
            raise Stopped("SIGTERM")
        except Exception:
            pytest.fail("an `except Exception` caught the stop")

    with pytest.raises(Stopped, match="SIGTERM"):
        read_file()
