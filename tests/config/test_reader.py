"""Reading of command lines and TOML files, right and wrong ones."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import model_validator

import llm
from llm.config.errors import UsageError
from llm.config.flags import flags_of
from llm.config.option import OptionGroup, option
from llm.config.options import Options
from llm.config.reader import read_options

Toml = Callable[[str], str]


def read(*argv: str) -> Options:
    return read_options(Options, argv, prog="llm", description="Trains.")


def value(name: str, *argv: str) -> Any:
    return getattr(getattr(read(*argv), flags_of(Options)[name].group), name)


def mistakes(*argv: str) -> list[str]:
    with pytest.raises(UsageError) as raised:
        read(*argv)
    assert raised.value.exit_code == 2
    return str(raised.value).split("\n")


class Sampling(OptionGroup):
    """A command without groups."""

    model: str = option(..., "folder of the model", positional=True)
    prompt: tuple[str, ...] | None = option(None, "texts to continue", positional=True)
    top_k: int | None = option(None, "candidates", ge=1)
    greedy: bool = option(False, "take the likeliest token")

    @model_validator(mode="after")
    def _refuse(self) -> Sampling:
        if self.greedy and self.top_k is not None:
            raise ValueError("--greedy and --top_k contradict each other")
        return self


def sample(*argv: str) -> Sampling:
    return read_options(Sampling, argv, prog="llm.generate", description="Samples.")


@pytest.fixture
def toml(tmp_path: Path) -> Toml:
    """A function that writes a TOML file and returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_read_when_there_are_no_words_then_returns_the_defaults() -> None:
    assert read() == Options()


@pytest.mark.parametrize(
    ("argv", "name", "expected"),
    [
        (["--kfac-damping", "0.1"], "kfac_damping", 0.1),
        (["--kfac_damping=0.1"], "kfac_damping", 0.1),
        (["--learning_rate", "5"], "learning_rate", 5.0),
        (["--learning_rate=1e-4"], "learning_rate", 1e-4),
        (["--num_train_epochs", "8"], "num_train_epochs", 8),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        (["--torch_compile"], "torch_compile", True),
        (["--torch_compile", "True"], "torch_compile", True),
        (["--torch_compile", "false"], "torch_compile", False),
        (["--torch-compile=0"], "torch_compile", False),
        (["--torch_compile", "blocks"], "torch_compile", "blocks"),
        (["--resume_from_checkpoint"], "resume_from_checkpoint", True),
        (["--resume_from_checkpoint", "--use_cpu"], "resume_from_checkpoint", True),
        (["--resume_from_checkpoint", "latest"], "resume_from_checkpoint", "latest"),
        (["--resume_from_checkpoint=False"], "resume_from_checkpoint", False),
        (["--train_file", "a.txt"], "train_file", ("a.txt",)),
        (["--train_file", "a", "b*", "--use_cpu"], "train_file", ("a", "b*")),
        (["--train_file=-"], "train_file", ("-",)),
        (["--checkpointing_steps", "500"], "checkpointing_steps", 500),
        (["--checkpointing_steps", "epoch"], "checkpointing_steps", "epoch"),
        (["--lr_scheduler_kwargs", '{"power": 2, "lr_end": null}'], "lr_scheduler_kwargs",
         {"power": 2, "lr_end": None}),
        (["--run_name=-x=y"], "run_name", "-x=y"),
        (["--sample_prompt", "- a list"], "sample_prompt", "- a list"),
        (["--sample_prompt="], "sample_prompt", ""),
        (["--sample_prompt", "-1"], "sample_prompt", "-1"),
        (["--sample_prompt", "8"], "sample_prompt", "8"),
    ],
)  # fmt: skip
def test_read_when_a_flag_is_given_then_its_value_has_the_type_of_the_option(
    argv: list[str], name: str, expected: Any
) -> None:
    result = value(name, *argv)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("--train", "train_file"),  # unique in both programs
        ("--tr", "train_file"),  # llm-pytorch has no --trust_remote_code
        ("--trust", "trust_remote_code"),
        ("--use", "use_slow_tokenizer"),  # --use_cpu came later
        ("--conf", "config_name"),  # --config_overrides and --config came later
        ("--kfac-d", "kfac_damping"),
        ("--over", "overwrite_cache"),
        ("--re", "resume_from_checkpoint"),  # llm-pytorch has no --report_to
        ("--weight", "weight_decay"),
        ("--max-t", "max_train_steps"),
        ("--config_o", "config_overrides"),  # new, and unique here
        ("--adam_e", "adam_epsilon"),
    ],
)
def test_read_when_a_flag_is_abbreviated_then_older_command_lines_keep_their_meaning(word: str, name: str) -> None:
    flag = flags_of(Options)[name]
    text = "true" if flag.is_switch else "1"
    assert value(name, f"{word}={text}") not in (flag.default, None)


def test_read_when_a_prefix_is_ambiguous_then_the_candidates_are_named() -> None:
    assert mistakes("--num", "3") == ["--num: may mean --num_train_epochs, --num_warmup_steps; write it out"]


def test_read_when_file_and_flag_differ_then_the_flag_wins(toml: Toml) -> None:
    config = toml("[training]\nseed = 1\nnum_train_epochs = 7\n[data]\ntrain_file = 'a.txt'\n")
    options = read("--seed", "2", "--config", config)
    assert (options.training.seed, options.training.num_train_epochs) == (2, 7)
    assert options.training.per_device_train_batch_size == 8
    assert options.data.train_file == ("a.txt",)
    assert options.training.model_fields_set == {"seed", "num_train_epochs"}


def test_read_when_there_are_many_mistakes_then_each_is_one_line(toml: Toml) -> None:
    config = toml(
        "seed = 3\n"
        "[trainnig]\nseed = 1\n"
        "[training]\nseed = '1'\nnum_train_epochs = 0\nmax_train_steps = 8.0\nbatch_size = 4\n"
        "learning_rate = 0.1\nuse_cpu = 1\n"
        "[model]\ndropout = nan\n"
        "[output]\ncheckpointing_steps = 'epochs'\n"
    )
    lines = mistakes(
        *("--config", config, "--mixed_precision", "bf61", "--learnig-rate", "4"),
        *("--num_warmup_steps", "8.0", "--block_size", "1", "--run_name", "--weight_decay=x"),
        *("--lr_scheduler_kwargs", "{a", "--torch_compile=maybe"),
    )
    seed = "a whole number >= 0 and < 9223372036854775808"
    assert sorted(lines) == sorted(
        [
            f"{config}: seed: belongs in the table [training]",
            f"{config}: [trainnig]: unknown table; did you mean [training]?",
            f'{config}: training.seed = "1": must be {seed}',
            f"{config}: training.num_train_epochs = 0: must be a whole number >= 1",
            f"{config}: training.max_train_steps = 8.0: must be a whole number >= 1",
            f"{config}: training.batch_size: unknown key; did you mean training.global_batch_size?",
            f"{config}: training.learning_rate: belongs in the table [optimizer]",
            f"{config}: training.use_cpu = 1: must be true or false",
            f"{config}: model.dropout = nan: must be a number >= 0 and < 1",
            f'{config}: output.checkpointing_steps = "epochs": must be a whole number, or epoch; did you mean epoch?',
            "--mixed_precision bf61: must be one of auto, no, bf16, fp16, fp8; did you mean bf16?",
            "--learnig-rate: unknown option; did you mean --learning_rate?",
            "--num_warmup_steps 8.0: must be a whole number >= 0",
            "--block_size 1: must be a whole number >= 2",
            "--run_name: needs a value: text",
            "--weight_decay x: must be a number >= 0",
            "--lr_scheduler_kwargs {a: must be a table (on the command line a JSON object) "
            "(Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
            "--torch_compile maybe: must be true or false, or one of auto, blocks, cudagraphs, max-autotune",
        ]
    )


def test_read_when_a_word_belongs_to_no_flag_then_it_is_a_mistake() -> None:
    assert mistakes("--use_cpu", "learning_rat") == ["learning_rat: unexpected word; did you mean --learning_rate?"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[training]\nseed 1\n", "not valid TOML: Expected '=' after a key"),
        (b"[training]\n# \xff\n", "not UTF-8 text (at byte 13)"),
        (b"training = 1\n", "training = 1: must be a table, [training]"),
        (b"[training.deep]\n", "training.deep: unknown key; "),
        (b"[hub]\nhub_token = 77\n", "hub.hub_token = ***: must be text"),
    ],
)
def test_read_when_the_file_is_broken_then_the_line_names_file_and_cause(
    content: bytes, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    (line,) = mistakes("--config", str(path))
    assert line.startswith(f"{path}: {expected}")
    if "valid" in expected:
        assert "line 2" in line


def test_read_when_the_file_is_missing_then_flags_are_checked_too() -> None:
    assert mistakes("--config", "gpt2", "--seed", "-1") == [
        "--config gpt2: no such file; --config names a TOML file (--config_name a model)",
        "--seed -1: must be a whole number >= 0 and < 9223372036854775808",
    ]
    assert mistakes("--config") == ["--config: needs a value: the name of a TOML file"]


def test_read_when_the_file_starts_with_a_byte_order_mark_then_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bom.toml"
    path.write_bytes(b"\xef\xbb\xbf[training]\nseed = 4\n")
    assert value("seed", "--config", str(path)) == 4


def test_read_when_options_contradict_each_other_then_each_contradiction_is_a_line() -> None:
    lines = mistakes("--kfac_skip_layers", "(", "--vocab_size", "300", "--push_to_hub", "--seed", "x")
    assert [line.split()[0] for line in lines] == [
        "--seed",
        "--kfac_skip_layers",
        "--vocab_size",
        "--push_to_hub",
    ]
    assert not any("Value error" in line for line in lines)


def test_read_when_an_option_is_misspelt_then_its_absence_is_no_further_mistake() -> None:
    assert mistakes("--push_to_hub", "--output_dri", "x") == [
        "--output_dri: unknown option; did you mean --output_dir?"
    ]


def test_read_when_a_secret_is_wrong_then_it_is_not_shown(toml: Toml) -> None:
    config = toml("[hub]\nhub_token = ['hf_abc']\n")
    for argv in (["--config", config], ["--hub_tokken", "hf_abc"], ["--hub_token=\udcff_abc"]):
        assert "_abc" not in "\n".join(mistakes(*argv))


def test_read_when_the_table_is_a_single_group_then_its_keys_are_top_level(toml: Toml) -> None:
    config = toml("top_k = 5\n")
    assert sample("runs/demo", "--config", config).top_k == 5
    with pytest.raises(UsageError, match=r"run.toml: topk: unknown key; did you mean top_k\?"):
        sample("x", "--config", toml("topk = 5\n"))


def test_read_when_options_are_positional_then_plain_words_go_to_them_in_order() -> None:
    options = sample("runs/demo", "--greedy", "Once", "upon", "--", "--a-time")
    assert options.model == "runs/demo"
    assert options.prompt == ("Once", "upon", "--a-time")
    assert sample("hello", "--model", "gpt2").prompt == ("hello",)


def test_read_when_options_of_a_single_group_contradict_or_are_missing_then_refused() -> None:
    with pytest.raises(UsageError, match=r"^--greedy and --top_k contradict each other$"):
        sample("m", "--greedy", "--top_k", "3")
    with pytest.raises(UsageError, match=r"^--model: required: folder of the model$"):
        sample("--top_k", "3")


def test_version_when_requested_then_name_and_number_are_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        read("--version")
    assert capsys.readouterr().out == f"llm-trainers {llm.__version__}\n"


@pytest.mark.parametrize("word", ["--help", "--version", "--sede=1"])
def test_read_when_it_ends_early_then_torch_is_not_imported_and_it_takes_under_half_a_second(word: str) -> None:
    code = (
        "import sys, time\n"
        "from llm.config.errors import UsageError\n"
        "from llm.config.options import Options\n"
        "from llm.config.reader import read_options\n"
        "try:\n"
        f"    read_options(Options, [{word!r}], prog='llm', description='Trains.')\n"
        "except (SystemExit, UsageError):\n"
        "    print(time.process_time(), 'torch' in sys.modules)\n"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    answers = [run.stdout.splitlines()[-1].split() for run in runs]
    assert all(torch == "False" for _, torch in answers)
    assert min(float(seconds) for seconds, _ in answers) < 0.5


def test_read_when_a_flag_names_the_text_then_the_text_of_the_file_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[data]\ndataset_name = "builtin:python"\nblock_size = 64\n')
    options = read_options(Options, ["--config", str(path), "--train_file", "my.txt"], prog="x", description="")
    assert options.data.dataset_name is None
    assert options.data.train_file == ("my.txt",)
    assert options.data.block_size == 64
    both = read_options(Options, ["--dataset_name", "a", "--train_file", "my.txt"], prog="x", description="")
    assert (both.data.dataset_name, both.data.train_file) == ("a", ("my.txt",))
