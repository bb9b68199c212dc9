"""Compare what two versions of this package compute on this machine, bit by bit.

    python tests/golden.py OLD_CHECKOUT [NEW_CHECKOUT]

NEW_CHECKOUT is this repository by default. Both versions train small models with one thread and must end with the
same weights: a plain run, Muon, K-FAC, a document mask, a stream, two ranks, and a run that is resumed from a
checkpoint of the old version. Both must also have the same options, shuffle a million blocks into the same order, and
prepare the same shards. The new version must open the token cache and the shards that the old one wrote without
tokenizing anything again. The program takes about three minutes and prints one line per comparison: its name, and a
hash of each version's result. The exit code is 1 if any results differ.

No hashes are committed: the last bits of a sum depend on the processor, its libraries and the version of torch, so
that a hash of weights is valid only on the machine that computed it. Every comparison computes both results.

The program itself needs only the standard library; the Python that runs it must be able to run the trainers. pytest
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
MAX_LINES = 12
# Options for which a checkpoint holds all kinds of state: moments of Muon and AdamW, K-FAC's factors and bases.
RESUMED = ("--optim", "muon", "--kfac", "--kfac_factor_update_steps", "2", "--kfac_inv_update_steps", "5")

# Programs that run in each checkout, whose modules may have other names. Their output is compared.
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
            indices = range(update * BATCH, (update + 1) * BATCH)
            print(seed, epoch, update, [block_at(index, NUM_BLOCKS, seed=seed, epoch=epoch) for index in indices])
epoch_order = [block_at(index, NUM_BLOCKS, seed=7, epoch=1) for index in range(NUM_BLOCKS)]
print("all", hashlib.sha256(repr(epoch_order).encode()).hexdigest())
"""


class FailedError(Exception):
    """A command of a checkout failed, or did not do what this program requires."""


class Inputs:
    """Inputs of all runs, as in tests/conftest.py: a text, documents, and a tokenizer whose tokens are bytes."""

    def __init__(self, folder: Path) -> None:
        self.text = folder / "tiny.txt"
        self.documents = folder / "rows.jsonl"
        self.tokenizer = folder / "tokenizer"
        draw = random.Random(0)
        lines = [" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) + "." for _ in range(2000)]
        self.text.write_text("\n".join(lines) + "\n")
        self.documents.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        # Byte-level BPE without merges. GPT-2 represents bytes that are not printable by the characters from 256 on.
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
        alphabet = sorted([*map(chr, visible), *(chr(256 + number) for number in range(256 - len(visible)))])
        eos = {"id": 256, "content": "<|endoftext|>", "special": True, "normalized": False}
        eos |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        model = {"type": "BPE", "vocab": {char: number for number, char in enumerate(alphabet)}, "merges": []}
        tokenizer = {"version": "1.0", "added_tokens": [eos], "pre_tokenizer": level, "decoder": level, "model": model}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
        self.tokenizer.mkdir()
        (self.tokenizer / "tokenizer.json").write_text(json.dumps(tokenizer))
        (self.tokenizer / "tokenizer_config.json").write_text(json.dumps(config))

    def words(self, text: Path, flag: str = "--train_file", *, batch: int = 8, steps: int = 20) -> list[str]:
        """Return a command line that trains a GPT-2 of two layers, like `tiny_options` of tests/conftest.py."""
        return [
            *(flag, str(text), "--tokenizer_name", str(self.tokenizer), "--model_type", "gpt2", "--block_size", "32"),
            *("--config_overrides", "n_positions=64,n_embd=32,n_layer=2,n_head=2", "--dropout", "0"),
            *("--per_device_train_batch_size", str(batch), "--max_train_steps", str(steps)),
            *("--learning_rate", "1e-3", "--seed", "7", "--use_cpu", "--mixed_precision", "no"),
        ]

    def prepare_words(self, folder: Path) -> list[str]:
        """Return a command line of llm.prepare that writes several shards of the documents."""
        return [
            *("-m", "llm.prepare", "--train_file", str(self.documents), "--tokenizer_name", str(self.tokenizer)),
            *("--output_dir", str(folder), "--shard_size", "20000", "--preprocessing_num_workers", "1"),
        ]


@dataclass(frozen=True)
class Checkout:
    """A version of the package: its folder, and a folder for what it writes."""

    path: Path
    work: Path

    @property
    def caches(self) -> Path:
        """Folder of the version's token caches."""
        return self.work / "caches"

    def python(self, *words: str, caches: Path | None = None) -> str:
        """Run Python with this version's package and return what it printed.

        Raises:
            FailedError: the exit code is not 0.
        """
        prefixes = ("LLM_", "SLURM_", "PBS_", "PMI_", "OMPI_", "HF_", "TORCHELASTIC_", "OMP_", "MKL_", "PYTHON")
        launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "WANDB_API_KEY")
        environment = {name: value for name, value in os.environ.items() if not name.startswith((*prefixes, *launcher))}
        environment |= {"PYTHONPATH": str(self.path), "HF_HOME": str(caches or self.caches), "HF_HUB_OFFLINE": "1"}
        # Nothing is written into the checkout, not even compiled modules.
        environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, *words]
        result = subprocess.run(command, cwd=self.path, env=environment, capture_output=True, text=True, check=False)
        if result.returncode:
            raise FailedError(f"exit code {result.returncode}: {(result.stderr.strip() or '?').splitlines()[-1]}")
        return result.stdout

    def weights(self, name: str, *words: str, program: tuple[str, ...] = TRAINER) -> str:
        """Train in the folder `name`, and return the hash of the weights at the end."""
        self.python(*program, *words, "--output_dir", str(self.work / name))
        return sha256((self.work / name / "model.safetensors").read_bytes()).hexdigest()

    def require_own_package(self) -> None:
        """Check that Python imports this version's package and not an installed one.

        Raises:
            FailedError: it imports another package.
        """
        imported = Path(self.python("-c", "import llm; print(llm.__file__)").strip()).resolve()
        if not imported.is_relative_to(self.path):
            raise FailedError(f"{self.path} does not hold the package: Python imports {imported}")


def killed_run(old: Checkout, inputs: Inputs) -> Path:
    """Return the folder of a run of the old version, as a kill after its first checkpoint leaves it."""
    checkpointing = ("--checkpointing_steps", str(FIRST_CHECKPOINT))
    old.weights("uninterrupted", *inputs.words(inputs.text), *RESUMED, *checkpointing)
    folder = old.work.parent / "killed"
    shutil.copytree(old.work / "uninterrupted", folder)
    for path in (folder / "checkpoints").iterdir():
        if path.name != f"step_{FIRST_CHECKPOINT}":
            shutil.rmtree(path)
    for name in ("model.safetensors", "all_results.json"):
        (folder / name).unlink()
    return folder


def resumed_weights(checkout: Checkout, inputs: Inputs, killed: Path) -> str:
    """Return the hash of the weights at the end of a run that resumes the old version's checkpoint.

    Raises:
        FailedError: the run did not resume.
    """
    shutil.copytree(killed, checkout.work / "resumed")
    words = [*inputs.words(inputs.text), *RESUMED, "--resume_from_checkpoint", "latest"]
    weights = checkout.weights("resumed", *words)
    if f"resumed from step {FIRST_CHECKPOINT}" not in (checkout.work / "resumed" / "log.txt").read_text():
        raise FailedError("the run started from scratch instead of resuming")
    return weights


def prepared(checkout: Checkout, inputs: Inputs) -> str:
    """Return one line per file that llm.prepare writes: its name and its hash."""
    folder = checkout.work / "shards"
    checkout.python(*inputs.prepare_words(folder))
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return "\n".join(f"{path.relative_to(folder)} {sha256(path.read_bytes()).hexdigest()}" for path in files)


def opened(checkout: Checkout, folder: Path, line: str, *words: str, caches: Path | None = None) -> str:
    """Run a command that must use the tokens of a folder, and return its line that reports so.

    Args:
        checkout: the version that runs.
        folder: the folder of tokens, none of whose files may change.
        line: beginning of the line that is returned.
        words: Python's command line.
        caches: see `Checkout.python`.

    Raises:
        FailedError: the line is missing, the command tokenized something, or a file of the folder changed.
    """

    def files() -> dict[Path, tuple[int, int]]:
        statuses = [(path, path.stat()) for path in folder.rglob("*") if path.is_file()]
        return {path: (status.st_size, status.st_mtime_ns) for path, status in statuses}

    before = files()
    output = checkout.python(*words, caches=caches).splitlines()
    if changed := before.items() ^ files().items():
        raise FailedError(f"the command wrote or removed {min(path for path, _ in changed)}")
    matches = [text for text in output if text.startswith(line)]
    if not before or not matches or any(text.startswith(("tokenized ", "tokenizing ")) for text in output):
        raise FailedError(f"the command does not print {line!r}, or it tokenized the text again")
    return matches[0]


def comparisons(old: Checkout, inputs: Inputs) -> Iterator[tuple[str, Callable[[Checkout], str]]]:
    """Yield the comparisons in order: a title, and a function whose result must be the same for both versions.

    The order matters: later comparisons use the caches and shards of earlier ones.
    """
    plain = inputs.words(inputs.text)
    yield "options", lambda one: one.python("-c", OPTIONS_PROGRAM)
    yield "order of a million blocks", lambda one: one.python("-c", ORDER_PROGRAM)
    yield "plain run", lambda one: one.weights("plain", *plain)
    yield "--optim muon", lambda one: one.weights("muon", *plain, "--optim", "muon")
    yield "--kfac", lambda one: one.weights("kfac", *plain, "--kfac")
    documents = inputs.words(inputs.documents)
    yield "--document_mask", lambda one: one.weights("mask", *documents, "--document_mask")
    # Long enough to read the whole stream, and to start its second epoch as a text whose length is known.
    stream = inputs.words(inputs.text, steps=250)
    yield "--streaming", lambda one: one.weights("stream", *stream, "--streaming", "--eval_steps", "125")
    halves = inputs.words(inputs.text, batch=4)
    yield "two ranks", lambda one: one.weights("ranks", *halves, program=TWO_RANKS)
    killed = killed_run(old, inputs)
    yield "resumed from the old version's checkpoint", lambda one: resumed_weights(one, inputs, killed)

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
    """Compare the two checkouts that the command line names, and return 1 if they differ anywhere."""
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
        for title, compute in comparisons(old, inputs):
            expected = compute(old)
            try:
                actual = compute(new)
            except (FailedError, OSError) as error:
                actual = f"failed: {error}"
            if _differ(title, expected, actual):
                num_different += 1
    print(f"{num_different} of the comparisons differ" if num_different else "all are equal")
    return int(num_different > 0)


def _differ(title: str, expected: str, actual: str) -> bool:
    """Print the line of a comparison and the differing lines of a text, and return whether the results differ."""
    differs = expected != actual
    hashes = f"{_short_hash(expected):16}  {_short_hash(actual)}"
    print(f"{'DIFFERENT' if differs else 'equal':9}  {title:41}  {hashes}", flush=True)
    lines = [*unified_diff(expected.splitlines(), actual.splitlines(), "old", "new", lineterm="", n=0)]
    print("".join(f"    {line}\n" for line in lines[:MAX_LINES]), end="", flush=True)
    return differs


def _short_hash(text: str) -> str:
    """Return the first 16 digits of a hash, or of the hash of another text, or "failed"."""
    if text.startswith("failed"):
        return "failed"
    is_hash = len(text) == 64 and text.isalnum()
    return (text if is_hash else sha256(text.encode()).hexdigest())[:16]


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except FailedError as error:
        sys.exit(f"error: the old version or a checkout itself fails: {error}")
