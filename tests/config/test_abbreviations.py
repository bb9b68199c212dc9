"""Abbreviated and misspelt options."""

from __future__ import annotations

from llm.config.abbreviations import BUILT_IN, LLM_PYTORCH, RUN_CLM, closest_match, resolve
from llm.config.flags import flags_of
from llm.config.options import Options


def test_resolve_when_a_prefix_is_unique_in_an_older_program_then_keeps_that_meaning() -> None:
    names = {*flags_of(Options), *BUILT_IN}
    for program in (RUN_CLM, LLM_PYTORCH):
        for name in program:
            for end in range(1, len(name)):
                word = name[:end]
                matches = [other for other in program if other.startswith(word)]
                if len(matches) == 1 and word not in names:
                    # Holds for both programs: they never disagree about a unique prefix.
                    assert resolve(word, names) == [name]


def test_resolve_when_a_word_is_dashed_unknown_empty_or_ambiguous_then_returns_one_none_or_several() -> None:
    names = {*flags_of(Options), *BUILT_IN}
    assert resolve("kfac-kl-clip", names) == ["kfac_kl_clip"]
    assert resolve("nothing", names) == []
    assert resolve("", names) == []
    assert resolve("hub", names) == ["hub_model_id", "hub_token"]


def test_closest_match_when_a_name_is_similar_then_returns_it_and_else_none() -> None:
    assert closest_match("learnig-rate", flags_of(Options)) == "learning_rate"
    assert closest_match("xyzzy", flags_of(Options)) is None
