"""The options of the trainer: the table, the command lines of older programs, and wrong combinations."""

from __future__ import annotations

from typing import Any

import pytest

from llm.config.abbreviations import BUILT_IN, LLM_PYTORCH, RUN_CLM
from llm.config.errors import UsageError
from llm.config.flags import flags_of
from llm.config.options import Options
from llm.config.reader import read_options

# Name, default, words that run_clm or llm-pytorch take, and the value they stand for.
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
def test_option_when_given_as_in_an_older_program_then_means_the_same(
    name: str, default: Any, words: list[str], expected: Any
) -> None:
    flag = flags_of(Options)[name]
    assert flag.default == default
    options = read_options(Options, [f"--{name}", *words], prog="llm", description="")
    assert getattr(getattr(options, flag.group), name) == expected


def test_options_when_compared_with_the_older_programs_then_none_is_missing() -> None:
    known = {*flags_of(Options), *BUILT_IN}
    assert known >= RUN_CLM | LLM_PYTORCH
    assert {name for name, *_ in LEGACY} == (RUN_CLM | LLM_PYTORCH) - {"help"}


def test_options_when_listed_then_each_has_a_help_text_without_a_full_stop() -> None:
    flags = flags_of(Options)
    assert len(flags) <= 85
    for flag in flags.values():
        assert len(flag.help) > 5, flag.name
        assert not flag.help.removesuffix("...").endswith("."), flag.name
    for group in Options.model_fields.values():
        assert group.annotation is not None
        assert group.annotation.__doc__


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--mixed_precision fp8", "--mixed_precision fp8 is refused"),
        ("--lr_scheduler_type greedy", "--lr_scheduler_type greedy is refused"),
        ("--min_lr_ratio 0.1", "--min_lr_ratio applies to --lr_scheduler_type cosine"),
        ("--train_dir a --train_file b", "--train_dir, --dataset_name and --train_file"),
        ("--train_dir a --validation_file b", "--validation_file is text"),
        ("--validation_dir a", "--validation_dir holds tokens"),
        ("--streaming", "--streaming: the length of the text is unknown; give --max_train_steps"),
        ("--streaming --max_train_steps 1 --train_dir a", "--streaming reads text"),
        ("--streaming --max_train_steps 1 --tokenizer_name char", "--tokenizer_name char needs all characters"),
        ("--streaming --max_train_steps 1 --checkpointing_steps epoch", "--checkpointing_steps epoch"),
        ("--global_batch_size 8 --gradient_accumulation_steps 2", "--global_batch_size and --gradient_accumulation"),
        ("--vocab_size 300", "--vocab_size applies to --tokenizer_name train:bpe"),
        ("--config_overrides n_layer=1 --model_name_or_path gpt2", "--config_overrides applies to a model built from"),
        ("--push_to_hub", "--push_to_hub uploads the folder of the run; give --output_dir"),
        ("--checkpointing_steps 0", "--checkpointing_steps must be a number of steps >= 1, or epoch"),
        ("--max_time soon", "--max_time soon: not a duration"),
        ("--train_dir a=0.5 b", "--train_dir b: has no weight"),
        ("--kfac_backend kfac-pytorch --kfac_factor_tokens 8", "--kfac_factor_tokens needs --kfac_backend llm"),
        ("--kfac_backend kfac-pytorch --kfac_spread", "--kfac_spread cannot be combined with kfac-pytorch"),
        ("--kfac_compat --kfac_spread", "--kfac_spread cannot be combined with kfac-pytorch"),
        ("--kfac_skip_layers (", "--kfac_skip_layers (: not a regular expression"),
    ],
)
def test_options_when_a_combination_cannot_work_then_it_is_the_only_mistake(words: str, expected: str) -> None:
    with pytest.raises(UsageError) as mistake:
        read_options(Options, words.split(), prog="llm", description="")
    assert str(mistake.value).startswith(expected)
    assert len(str(mistake.value).splitlines()) == 1
