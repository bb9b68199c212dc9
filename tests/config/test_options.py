"""The table itself: what stands in it, and that old command lines find what they know."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import create_model

from llm.config.abbreviations import BUILT_IN, LLM_PYTORCH, RUN_CLM, closest_match, resolve
from llm.config.flags import flags_of
from llm.config.option import OptionGroup, option
from llm.config.options import Options
from llm.config.reader import read_options

# Name, default, a word as the two programs take it, and the value it stands for.
LEGACY: list[tuple[str, Any, list[str], Any]] = [
    ("dataset_name", None, ["wikitext"], "wikitext"),
    ("dataset_config_name", None, ["wikitext-2-raw-v1"], "wikitext-2-raw-v1"),
    ("train_file", None, ["a.txt"], ("a.txt",)),
    ("validation_file", None, ["a.txt"], ("a.txt",)),
    ("validation_split_percentage", 5, ["10"], 10),
    ("model_name_or_path", None, ["gpt2"], "gpt2"),
    ("config_name", None, ["gpt2"], "gpt2"),
    ("tokenizer_name", None, ["gpt2"], "gpt2"),
    ("use_slow_tokenizer", False, [], True),
    ("per_device_train_batch_size", 8, ["4"], 4),
    ("per_device_eval_batch_size", 8, ["4"], 4),
    ("learning_rate", 5e-5, ["1e-3"], 1e-3),
    ("weight_decay", 0.0, ["0.1"], 0.1),
    ("num_train_epochs", 3, ["1"], 1),
    ("max_train_steps", None, ["100"], 100),
    ("gradient_accumulation_steps", 1, ["2"], 2),
    ("lr_scheduler_type", "linear", ["constant_with_warmup"], "constant_with_warmup"),
    ("num_warmup_steps", 0, ["10"], 10),
    ("output_dir", None, ["out"], "out"),
    ("seed", None, ["42"], 42),
    ("model_type", None, ["gpt2"], "gpt2"),
    ("block_size", None, ["128"], 128),
    ("preprocessing_num_workers", None, ["4"], 4),
    ("overwrite_cache", False, [], True),
    ("no_keep_linebreaks", False, [], True),
    ("push_to_hub", False, ["--output_dir", "x"], True),
    ("hub_model_id", None, ["me/x"], "me/x"),
    ("hub_token", None, ["hf_x"], "hf_x"),
    ("trust_remote_code", False, [], True),
    ("checkpointing_steps", None, ["epoch"], "epoch"),
    ("resume_from_checkpoint", False, ["dir"], "dir"),
    ("with_tracking", False, [], True),
    ("report_to", "all", ["wandb"], "wandb"),
    ("low_cpu_mem_usage", False, [], True),
    ("mixed_precision", "auto", ["bf16"], "bf16"),
    ("kfac", False, [], True),
    ("kfac_factor_update_steps", 10, ["1"], 1),
    ("kfac_inv_update_steps", 10, ["1"], 1),
    ("kfac_damping", None, ["0.01"], 0.01),
    ("kfac_factor_decay", 0.95, ["0.9"], 0.9),
    ("kfac_kl_clip", None, ["0.01"], 0.01),
]


@pytest.mark.parametrize(("name", "default", "words", "expected"), LEGACY)
def test_options_when_an_old_command_line_gives_one_then_it_means_the_same(
    name: str, default: Any, words: list[str], expected: Any
) -> None:
    flag = flags_of(Options)[name]
    assert flag.default == default
    options = read_options(Options, [f"--{name}", *words], prog="llm", description="")
    got = getattr(getattr(options, flag.group), name)
    assert got == expected


def test_options_when_compared_with_the_old_programs_then_none_is_missing() -> None:
    known = {*flags_of(Options), *BUILT_IN}
    assert known >= RUN_CLM | LLM_PYTORCH
    assert {name for name, *_ in LEGACY} == (RUN_CLM | LLM_PYTORCH) - {"help"}


def test_options_when_listed_then_each_row_has_help_and_the_table_stays_readable() -> None:
    flags = flags_of(Options)
    assert len(flags) <= 85
    for flag in flags.values():
        assert len(flag.help) > 5, flag.name
        assert not flag.help.removesuffix("...").endswith("."), flag.name
    for group in Options.model_fields.values():
        assert group.annotation is not None
        assert group.annotation.__doc__


def test_flags_of_when_two_groups_share_a_name_then_it_refuses() -> None:
    one = create_model("One", __base__=OptionGroup, seed=(int, option(1, "a seed")))
    two = create_model("Two", __base__=OptionGroup, seed=(int, option(1, "a seed")))
    both = create_model("Both", __base__=OptionGroup, one=(one, one()), two=(two, two()))
    with pytest.raises(TypeError, match="seed"):
        flags_of(both)
    with pytest.raises(TypeError, match="config"):
        flags_of(create_model("Reserved", __base__=OptionGroup, config=(int, option(1, "x"))))


def test_resolve_when_a_prefix_was_unique_in_an_old_program_then_it_keeps_that_meaning() -> None:
    names = {*flags_of(Options), *BUILT_IN}
    for program in (RUN_CLM, LLM_PYTORCH):
        for name in program:
            for end in range(1, len(name)):
                word = name[:end]
                meant = [other for other in program if other.startswith(word)]
                if len(meant) == 1 and word not in names:
                    # True of both programs at once: they never disagree about a unique prefix.
                    assert resolve(word, names) == [name]


def test_resolve_when_words_are_unknown_empty_or_dashed_then_it_says_so() -> None:
    names = {*flags_of(Options), *BUILT_IN}
    assert resolve("kfac-kl-clip", names) == ["kfac_kl_clip"]
    assert resolve("nothing", names) == []
    assert resolve("", names) == []
    assert resolve("hub", names) == ["hub_model_id", "hub_token"]


def test_nearest_when_a_name_is_close_then_it_is_found_and_else_none() -> None:
    assert closest_match("learnig-rate", flags_of(Options)) == "learning_rate"
    assert closest_match("xyzzy", flags_of(Options)) is None
