"""Compares what two versions of this package compute on this machine, bit by bit.

    python tests/golden.py OLD_CHECKOUT [NEW_CHECKOUT]

NEW_CHECKOUT is this repository unless another is named. Both versions train small models with one thread, and must
end with the same weights: a plain run, Muon, K-FAC, a document mask, a stream, two ranks, and a run that is resumed
from a checkpoint of the old version. Both must also have the same options, shuffle a million blocks into the same
order, and prepare the same shards; and the new version must open the token cache and the shards that the old one
wrote without tokenizing anything again. It takes some three minutes, and prints one line a comparison: its name, and
a hash of what each version gave. The exit code is 1 if any of them differ.

No hashes are committed: the last bits of a sum depend on the processor, its libraries and the version of torch, so
that a hash of weights means something on the machine that made it alone. What is compared is made anew every time.

It needs nothing but the standard library itself; the python that runs it must be able to run the trainers. pytest
does not collect it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import unified_diff
from hashlib import sha256
from pathlib import Path

WORDS = "the a king queen sword runs speaks to of and love night day with from into crown blood".split()
TRAINER = ("-m", "llm.trainers.gpt")
TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *TRAINER)
FIRST_CHECKPOINT = 7
MOST_LINES = 12
# Everything that a checkpoint may hold: both kinds of moments, Muon's and AdamW's; K-FAC's factors and bases.
RESUMED = ("--optim", "muon", "--kfac", "--kfac_factor_update_steps", "2", "--kfac_inv_update_steps", "5")

# Run in each checkout, where modules may have other names; what they print is compared.
OPTIONS_PROGRAM = """
import importlib, pkgutil
import llm.config

def find(name):
    for module in pkgutil.walk_packages(llm.config.__path__, "llm.config."):
        if hasattr(imported := importlib.import_module(module.name), name):
            return getattr(imported, name)
    raise SystemExit(f"there is no {name} in llm.config")

for flag in find("flags_of")(find("Options")).values():
    kinds = [getattr(member, "__name__", repr(member)) for member in flag.members]
    container = flag.container and flag.container.__name__
    print(flag.key, flag.name, container, kinds, repr(flag.default), dict(flag.bounds))
"""
ORDER_PROGRAM = """
import hashlib
try:
    from llm.data.batches.shuffle import shuffled_index as block_at
except ImportError:
    from llm.data.order import shuffled as block_at

NUM_BLOCKS, BATCH = 1_000_000, 8
for seed in (0, 7, 2**63 - 1):
    for epoch in (0, 1, 5):
        for update in (0, 1, 1234, NUM_BLOCKS // BATCH - 1):
            places = range(update * BATCH, (update + 1) * BATCH)
            print(seed, epoch, update, [block_at(place, NUM_BLOCKS, seed=seed, epoch=epoch) for place in places])
whole = [block_at(place, NUM_BLOCKS, seed=7, epoch=1) for place in range(NUM_BLOCKS)]
print("all", hashlib.sha256(repr(whole).encode()).hexdigest())
"""


class FailedError(Exception):
    """A command of a checkout failed, or did not do what it was to do."""


class Inputs:
    """What all runs share, as tests/conftest.py makes it: a text, and a tokenizer whose tokens are bytes."""

    def __init__(self, folder: Path) -> None:
        self.text, self.documents, self.tokenizer = (folder / name for name in ("tiny.txt", "rows.jsonl", "tokenizer"))
        draw = random.Random(0)
        lines = [" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) + "." for _ in range(2000)]
        self.text.write_text("\n".join(lines) + "\n")
        self.documents.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        # Byte-level BPE without merges. GPT-2 writes bytes that cannot be seen as the characters from 256 on.
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
        alphabet = sorted([*map(chr, visible), *(chr(256 + number) for number in range(256 - len(visible)))])
        end = {"id": 256, "content": "<|endoftext|>", "special": True, "normalized": False}
        end |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        model = {"type": "BPE", "vocab": {char: number for number, char in enumerate(alphabet)}, "merges": []}
        facts = {"version": "1.0", "added_tokens": [end], "pre_tokenizer": level, "decoder": level, "model": model}
        named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
        self.tokenizer.mkdir()
        (self.tokenizer / "tokenizer.json").write_text(json.dumps(facts))
        (self.tokenizer / "tokenizer_config.json").write_text(json.dumps(named))

    def words(self, text: Path, flag: str = "--train_file", *, batch: int = 8, steps: int = 20) -> list[str]:
        """A command line that trains a GPT-2 of two layers: `tiny_options` of tests/conftest.py."""
        return [
            *(flag, str(text), "--tokenizer_name", str(self.tokenizer), "--model_type", "gpt2", "--block_size", "32"),
            *("--config_overrides", "n_positions=64,n_embd=32,n_layer=2,n_head=2", "--dropout", "0"),
            *("--per_device_train_batch_size", str(batch), "--max_train_steps", str(steps)),
            *("--learning_rate", "1e-3", "--seed", "7", "--use_cpu", "--mixed_precision", "no"),
        ]

    def prepare_words(self, folder: Path) -> list[str]:
        """A command line of llm.prepare that makes several shards of the documents."""
        return [
            *("-m", "llm.prepare", "--train_file", str(self.documents), "--tokenizer_name", str(self.tokenizer)),
            *("--output_dir", str(folder), "--shard_size", "20000", "--preprocessing_num_workers", "1"),
        ]


@dataclass(frozen=True)
class Checkout:
    """A version of the package: where it lies, and a folder for what it writes."""

    path: Path
    work: Path

    @property
    def caches(self) -> Path:
        """Where it keeps the tokens of a text."""
        return self.work / "caches"

    def python(self, *words: str, caches: Path | None = None) -> str:
        """Runs python on this version, and returns what it printed.

        Raises:
            FailedError: it did not end well.
        """
        ours = ("LLM_", "SLURM_", "PBS_", "PMI_", "OMPI_", "HF_", "TORCHELASTIC_", "OMP_", "MKL_", "PYTHON")
        launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "WANDB_API_KEY")
        kept = {name: value for name, value in os.environ.items() if not name.startswith((*ours, *launched))}
        places = {"PYTHONPATH": str(self.path), "HF_HOME": str(caches or self.caches), "HF_HUB_OFFLINE": "1"}
        # Nothing is written into the checkout, not even compiled modules.
        rest = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}
        command, environment = [sys.executable, *words], kept | places | rest
        ended = subprocess.run(command, cwd=self.path, env=environment, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise FailedError(f"exit code {ended.returncode}: {(ended.stderr.strip() or '?').splitlines()[-1]}")
        return ended.stdout

    def weights(self, name: str, *words: str, program: tuple[str, ...] = TRAINER) -> str:
        """Trains in the folder `name`, and returns the hash of the weights at the end."""
        self.python(*program, *words, "--output_dir", str(self.work / name))
        return sha256((self.work / name / "model.safetensors").read_bytes()).hexdigest()

    def require_own_package(self) -> None:
        """Makes sure that it is this version's package which runs, and not one that is installed."""
        found = Path(self.python("-c", "import llm; print(llm.__file__)").strip()).resolve()
        if not found.is_relative_to(self.path):
            raise FailedError(f"{self.path} has no package of its own: python imports {found}")


def cut_run(old: Checkout, inputs: Inputs) -> Path:
    """A run's folder as a kill after its first checkpoint leaves it."""
    every = ("--checkpointing_steps", str(FIRST_CHECKPOINT))
    old.weights("whole", *inputs.words(inputs.text), *RESUMED, *every)
    folder = old.work.parent / "cut"
    shutil.copytree(old.work / "whole", folder)
    for path in (folder / "checkpoints").iterdir():
        if path.name != f"step_{FIRST_CHECKPOINT}":
            shutil.rmtree(path)
    for name in ("model.safetensors", "all_results.json"):
        (folder / name).unlink()
    return folder


def resumed_weights(checkout: Checkout, inputs: Inputs, cut: Path) -> str:
    """The weights at the end of a run that goes on where the old version was stopped."""
    shutil.copytree(cut, checkout.work / "resumed")
    words = [*inputs.words(inputs.text), *RESUMED, "--resume_from_checkpoint", "latest"]
    found = checkout.weights("resumed", *words)
    if f"resumed from step {FIRST_CHECKPOINT}" not in (checkout.work / "resumed" / "log.txt").read_text():
        raise FailedError("it began anew instead of going on")
    return found


def prepared(checkout: Checkout, inputs: Inputs) -> str:
    """The hash of each file that llm.prepare writes."""
    folder = checkout.work / "shards"
    checkout.python(*inputs.prepare_words(folder))
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return "\n".join(f"{path.relative_to(folder)} {sha256(path.read_bytes()).hexdigest()}" for path in files)


def opened(checkout: Checkout, folder: Path, line: str, *words: str, caches: Path | None = None) -> str:
    """The line in which a command says that the tokens it needs are in a folder already.

    Raises:
        FailedError: it does not say so, tokenizes something, or any file of the folder is not as it was before.
    """

    def files() -> dict[Path, tuple[int, int]]:
        found = [(path, path.stat()) for path in folder.rglob("*") if path.is_file()]
        return {path: (status.st_size, status.st_mtime_ns) for path, status in found}

    before = files()
    said = checkout.python(*words, caches=caches).splitlines()
    if changed := before.items() ^ files().items():
        raise FailedError(f"it wrote or removed {min(path for path, _ in changed)}")
    found = [each for each in said if each.startswith(line)]
    if not before or not found or any(each.startswith(("tokenized ", "tokenizing ")) for each in said):
        raise FailedError(f"it does not say {line!r}, or it tokenized the text again")
    return found[0]


def comparisons(old: Checkout, inputs: Inputs) -> Iterator[tuple[str, Callable[[Checkout], str]]]:
    """What is compared: a name, and what gives the same text for both versions. The order matters."""
    plain = inputs.words(inputs.text)
    yield "options", lambda one: one.python("-c", OPTIONS_PROGRAM)
    yield "order of a million blocks", lambda one: one.python("-c", ORDER_PROGRAM)
    yield "plain run", lambda one: one.weights("plain", *plain)
    yield "--optim muon", lambda one: one.weights("muon", *plain, "--optim", "muon")
    yield "--kfac", lambda one: one.weights("kfac", *plain, "--kfac")
    documents = inputs.words(inputs.documents)
    yield "--document_mask", lambda one: one.weights("mask", *documents, "--document_mask")
    # Long enough to read the whole stream, and to begin it again as a text whose end is known.
    stream = inputs.words(inputs.text, steps=250)
    yield "--streaming", lambda one: one.weights("stream", *stream, "--streaming", "--eval_steps", "125")
    halves = inputs.words(inputs.text, batch=4)
    yield "two ranks", lambda one: one.weights("ranks", *halves, program=TWO_RANKS)
    cut = cut_run(old, inputs)
    yield "resumed from the old version's checkpoint", lambda one: resumed_weights(one, inputs, cut)

    # The plain run of the old version has filled its caches.
    start, line = [*TRAINER, *inputs.words(inputs.text, steps=1)], "tokens of tiny.txt: from the cache"
    yield (
        "the old version's token cache, opened",
        lambda one: opened(one, old.caches, line, *start, caches=old.caches),
    )
    yield "prepared shards", lambda one: prepared(one, inputs)
    shards = old.work / "shards"
    train = [*TRAINER, *inputs.words(shards, "--train_dir", steps=1)]
    yield "the old version's shards, trained on", lambda one: opened(one, shards, "tokens: ", *train)
    again, line_again = inputs.prepare_words(shards), f"{shards} is finished already"
    yield "the old version's shards, prepared again", lambda one: opened(one, shards, line_again, *again)


def main(argv: list[str]) -> int:
    """Compares the two checkouts that the command line names; 1 if they differ anywhere."""
    if len(argv) not in (1, 2):
        sys.exit("usage: python tests/golden.py OLD_CHECKOUT [NEW_CHECKOUT]")
    here = Path(__file__).resolve().parents[1]
    paths = [Path(argv[0]).resolve(), Path(argv[1]).resolve() if len(argv) == 2 else here]
    num_different = 0
    with tempfile.TemporaryDirectory(prefix="llm-golden-") as name:
        work = Path(name).resolve()
        inputs = Inputs(work)
        old, new = Checkout(paths[0], work / "old"), Checkout(paths[1], work / "new")
        for checkout in (old, new):
            checkout.work.mkdir()
            checkout.require_own_package()
        for title, found in comparisons(old, inputs):
            expected = found(old)
            try:
                actual = found(new)
            except (FailedError, OSError) as error:
                actual = f"failed: {error}"
            num_different += _compare(title, expected, actual)
    print(f"{num_different} of the comparisons differ" if num_different else "all are equal")
    return int(num_different > 0)


def _compare(title: str, expected: str, actual: str) -> bool:
    """Prints the line of a comparison, and what differs where that is a text; returns whether anything does."""
    differs = expected != actual
    shown = f"{_shown(expected):16}  {_shown(actual)}"
    print(f"{'DIFFERENT' if differs else 'equal':9}  {title:41}  {shown}", flush=True)
    lines = [*unified_diff(expected.splitlines(), actual.splitlines(), "old", "new", lineterm="", n=0)]
    print("".join(f"    {line}\n" for line in lines[:MOST_LINES]), end="", flush=True)
    return differs


def _shown(text: str) -> str:
    """The beginning of a hash, of a text's hash, or what there is instead."""
    if text.startswith("failed"):
        return "failed"
    is_hash = len(text) == 64 and text.isalnum()
    return (text if is_hash else sha256(text.encode()).hexdigest())[:16]


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except FailedError as error:
        sys.exit(f"error: the old version or a checkout itself fails: {error}")
