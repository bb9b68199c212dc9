"""Run the trainer on a small disk that fills up; the disk disappears with the process.

`run_on_small_disk` starts this program in a namespace where it may mount a disk.
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
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

_SIZE_BYTES = 16 << 20


@dataclass(frozen=True)
class FullDiskResult:
    """How a run on a full disk ended, and two attempts to resume it.

    Attributes:
        code: exit code of the run.
        err: standard error of the run.
        files: files in the run's folder at its end.
        status: content of the run's status.json.
        problems: damage of the run's checkpoints.
        code_while_full: exit code of a resume while the disk was still full.
        err_while_full: standard error of that resume.
        code_after: exit code of a resume after the disk had been freed.
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
    """Fill the disk after the first save, in the thread that wrote the checkpoint."""

    def __init__(self, disk: Path, room_bytes: int) -> None:
        super().__init__()
        self.path = disk / "filler"
        self._room_bytes = room_bytes

    def emit(self, record: logging.LogRecord) -> None:
        """Fill the disk when `saved step N` is logged for the first time."""
        if not self.path.exists() and record.getMessage().startswith("saved step"):
            # The run writes records at the same time, so that the last bytes of the filler may not fit.
            with suppress(OSError), open(self.path, "wb") as file:
                file.write(bytes(shutil.disk_usage(self.path.parent).free - self._room_bytes))


def _main(disk: Path, room_bytes: int, target: Path, words: Sequence[str]) -> None:
    from llm.files.manifest import find_damage
    from llm.training.checkpoints.store import saved_steps

    folder, filler = disk / "run", _Filler(disk, room_bytes)
    # This module's logger, because a run replaces the handlers of the package's logger.
    logging.getLogger("llm.training.checkpoints.async_saver").addHandler(filler)
    code, err = _train([*words, "--output_dir", str(folder)], target)
    resume = [*words, "--output_dir", str(folder), "--resume_from_checkpoint"]
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    status = json.loads((folder / "status.json").read_text())
    problems = [f"{path}: {damage}" for _, path in saved_steps(folder / "checkpoints") if (damage := find_damage(path))]
    code_while_full, err_while_full = _train(resume, target)
    filler.path.unlink()
    logging.getLogger("llm.training.checkpoints.async_saver").removeHandler(filler)
    code_after, _ = _train(resume, target)
    shutil.copytree(folder, target / "run")
    result = FullDiskResult(code, err, files, status, problems, code_while_full, err_while_full, code_after)
    (target / "result.json").write_text(json.dumps(asdict(result)))


def _train(words: list[str], target: Path) -> tuple[int, str]:
    """Run the trainer, and return its exit code and what the process wrote to its standard error."""
    from llm.trainers.gpt import main

    err, before = target / "err.txt", os.dup(2)
    with open(err, "wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        code = main(words)
    finally:
        os.dup2(before, 2)
    return code, err.read_text()


def run_on_small_disk(words: Sequence[str], target: Path, *, room_bytes: int) -> FullDiskResult:
    """Run the trainer on a disk of 16 MiB that is filled after the first save, then free the disk and resume.

    Args:
        words: options without `--output_dir`.
        target: a folder to which the run's folder is copied at the end, as `run`.
        room_bytes: bytes that are left free when the disk is filled.
    """
    disk = target / "disk"
    disk.mkdir()
    enter = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f'mount -t tmpfs -o size={_SIZE_BYTES} none "$0"'
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here")
    attempt = subprocess.run([*enter, mount, str(disk)], capture_output=True, text=True, check=False)
    if attempt.returncode:
        pytest.skip(f"the kernel does not allow users to mount a disk here ({attempt.stderr.strip()})")
    program = [sys.executable, "-m", "tests.faults.full_disk", str(disk), str(room_bytes), str(target), *words]
    done = subprocess.run(
        [*enter, f'{mount} && exec "$@"', str(disk), *program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return FullDiskResult(**json.loads((target / "result.json").read_text()))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
