"""Fixtures of all tests: a text, a byte tokenizer and a two-layer GPT-2, all created here without a network."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest

# Set before any library reads them: one thread per test process, no network access, no progress output.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("MKL_NUM_THREADS", None)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# No test reads or fills the user's caches or uses the user's accounts.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="llm-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
_SCHEDULERS = ("LLM_END_TIME", "SLURM_JOB_ID", "SLURM_JOB_END_TIME", "PBS_JOBID", "TORCHELASTIC_RESTART_COUNT")
_SCHEDULERS += ("LLM_CHAIN_JOB", "PBS_NODEFILE", "PBS_O_WORKDIR", "PBS_ENVIRONMENT", "PMI_RANK", "PMI_SIZE")
for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "WANDB_API_KEY", "WORLD_SIZE", "RANK", *_SCHEDULERS):
    os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Reset torch to one thread: a run in an earlier test may have set another number, which changes the last bits."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


# Options of a run that does not end by itself. A run of this length would be compiled by default.
FOREVER = ("--max_train_steps", "1000000", "--torch_compile", "false")
WORDS = "the a king queen sword runs speaks to of and love night day with from into crown blood".split()


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text file of about 60 kB: lines of random words from a small list, so that the loss of a model can fall."""
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) + "." for _ in range(2000)]
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def byte_tokenizer():  # type: ignore[no-untyped-def]
    """Fast tokenizer with 257 ids: the 256 bytes (byte-level BPE without merges) and <|endoftext|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@pytest.fixture
def tiny_gpt2(byte_tokenizer):  # type: ignore[no-untyped-def]
    """Random GPT2LMHeadModel: 2 layers, width 32, 64 positions, no dropout, the vocabulary of `byte_tokenizer`."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(byte_tokenizer),
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=256,
            eos_token_id=256,
        )
    )


@pytest.fixture(scope="session")
def tiny_gpt2_dir(byte_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    """Folder that `from_pretrained` loads: the model of `tiny_gpt2` and the byte tokenizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(
        vocab_size=len(byte_tokenizer),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=256,
        eos_token_id=256,
    )
    GPT2LMHeadModel(config).save_pretrained(path)
    byte_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_command(tiny_text: Path, tiny_gpt2_dir: Path) -> tuple[str, ...]:
    """Options that train `tiny_gpt2` from scratch on `tiny_text` for 20 steps, in about a second."""
    return (
        *("--train_file", str(tiny_text), "--tokenizer_name", str(tiny_gpt2_dir)),
        *("--config_name", str(tiny_gpt2_dir), "--dropout", "0", "--block_size", "32"),
        *("--per_device_train_batch_size", "8", "--max_train_steps", "20"),
        *("--learning_rate", "1e-3", "--seed", "7", "--use_cpu"),
        # Tests compare bits and losses: the precision must not depend on the machine.
        *("--mixed_precision", "no"),
    )


@pytest.fixture
def tiny_options(tiny_command: tuple[str, ...]) -> list[str]:
    """The options of `tiny_command` as a list that a test may change."""
    return list(tiny_command)


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


def _exit_code(words: tuple[str | Path, ...]) -> int:
    """Run the trainer in this process and return its exit code."""
    from llm.trainers.gpt import main

    try:
        return main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture
def train(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Function that runs the trainer in this process, without curves.png: `train(*words) -> Outcome`."""
    # The picture takes a third of a tiny run's time. `train_for_module` draws it, and so do the tests of llm.report.
    monkeypatch.setattr("llm.training.finalize.draw_curves", lambda *_: None)

    def run(*words: str | Path) -> Outcome:
        capfd.readouterr()
        code = _exit_code(words)
        out, err = capfd.readouterr()
        return Outcome(code, out, err)

    return run


def train_for_module(*words: str | Path) -> Outcome:
    """Run the trainer in this process, for fixtures of a module, which cannot use the fixture `train` of one test."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = _exit_code(words)
    return Outcome(code, out.getvalue(), err.getvalue())


def keep_only(run: Path, step: int) -> None:
    """Remove all checkpoints of a run except that of `step`, as if the run had been killed after saving it."""
    for path in (run / "checkpoints").glob("step_*"):
        if path.name != f"step_{step}":
            shutil.rmtree(path)
