"""A run on a disk of its own that another program fills; the disk is gone with the process.

Started by `run_on_small_disk` in a namespace where it may mount one.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

_SIZE_BYTES = 16 << 20


@dataclass(frozen=True)
class Ended:
    """How the run on the full disk ended.

    Attributes:
        code: its exit code.
        err: what it wrote to its standard error.
        files: what it left in its folder.
        status: its status.json.
        problems: what is wrong with its checkpoints.
        code_while_full: exit code of a resume on the disk as full as it was.
        err_while_full: what that one wrote to its standard error.
        code_after: exit code of a resume when there was room again.
    """

    code: int
    err: str
    files: list[str]
    status: dict[str, object]
    problems: list[str]
    code_while_full: int
    err_while_full: str
    code_after: int


class _Filler(logging.Handler):
    """Fills the disk after the first save, in the thread that has written it."""

    def __init__(self, disk: Path, room_bytes: int) -> None:
        super().__init__()
        self.path = disk / "filler"
        self._room_bytes = room_bytes

    def emit(self, record: logging.LogRecord) -> None:
        """Hears `saved step N`."""
        if not self.path.exists() and record.getMessage().startswith("saved step"):
            # The run writes its records meanwhile: what does not fit any more need not.
            with suppress(OSError), open(self.path, "wb") as file:
                file.write(bytes(shutil.disk_usage(self.path.parent).free - self._room_bytes))


def _main(disk: Path, room_bytes: int, target: Path, words: Sequence[str]) -> None:
    from llm.files.manifest import find_damage
    from llm.training.checkpoints.store import saved_steps

    folder, filler = disk / "run", _Filler(disk, room_bytes)
    # Not the package's own logger, whose handlers a run replaces.
    logging.getLogger("llm.training.checkpoints.async_saver").addHandler(filler)
    code, err = _train([*words, "--output_dir", str(folder)], target)
    resume = [*words, "--output_dir", str(folder), "--resume_from_checkpoint"]
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    status = json.loads((folder / "status.json").read_text())
    problems = [f"{path}: {found}" for _, path in saved_steps(folder / "checkpoints") if (found := find_damage(path))]
    full = _train(resume, target)
    filler.path.unlink()
    logging.getLogger("llm.training.checkpoints.async_saver").removeHandler(filler)
    after, _ = _train(resume, target)
    shutil.copytree(folder, target / "run")
    found = Ended(code, err, files, status, problems, *full, after)
    (target / "ended.json").write_text(json.dumps(found.__dict__))


def _train(words: list[str], target: Path) -> tuple[int, str]:
    """The exit code of a run, and what came to the standard error of the whole process."""
    from llm.trainers.gpt import main

    err, before = target / "err.txt", os.dup(2)
    with open(err, "wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        code = main(words)
    finally:
        os.dup2(before, 2)
    return code, err.read_text()


def run_on_small_disk(words: Sequence[str], target: Path, *, room_bytes: int) -> Ended:
    """Runs the trainer on a disk of 16 MiB that is filled after the first save, then frees it and resumes.

    Args:
        words: options without `--output_dir`.
        target: an empty folder, where the run's is copied to at the end, as `run`.
        room_bytes: what is left free when the disk is filled.
    """
    disk = target / "disk"
    disk.mkdir()
    enter = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f'mount -t tmpfs -o size={_SIZE_BYTES} none "$0"'
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here")
    tried = subprocess.run([*enter, mount, str(disk)], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"the kernel lets nobody mount a small disk here ({tried.stderr.strip()})")
    here = [sys.executable, "-m", "tests.faults.full_disk", str(disk), str(room_bytes), str(target), *words]
    done = subprocess.run(
        [*enter, f'{mount} && exec "$@"', str(disk), *here],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Ended(**json.loads((target / "ended.json").read_text()))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
