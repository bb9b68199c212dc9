"""Definition of an option."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from llm.config.flags import flags_of
from llm.config.option import OptionGroup, option


class Sampling(OptionGroup):
    """A group of three options."""

    model: str = option(..., "folder of the model", metavar="MODEL", positional=True)
    token: str | None = option(None, "access token", secret=True, replaces=("model",))
    top_p: float = option(0.9, "probability mass", gt=0, le=1)


def test_option_when_defined_then_the_flag_has_its_traits() -> None:
    model, token, top_p = flags_of(Sampling).values()
    assert (model.required, model.positional, model.metavar, model.secret) == (True, True, "MODEL", False)
    assert (token.required, token.default, token.secret, token.replaces) == (False, None, True, ("model",))
    assert (top_p.default, top_p.bounds, top_p.help) == (0.9, {"gt": 0, "le": 1}, "probability mass")


def test_group_when_a_key_is_unknown_or_a_value_is_out_of_bounds_or_changed_then_refused() -> None:
    group = Sampling(model="gpt2", top_p=1)
    for change in ({"top_k": 1}, {"top_p": 0}, {"top_p": 1.1}):
        with pytest.raises(ValidationError):
            Sampling.model_validate({"model": "gpt2"} | change)
    with pytest.raises(ValidationError):
        group.top_p = 0.5  # type: ignore[misc]
