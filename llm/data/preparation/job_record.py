"""Record of what the shards of a folder are made from, so that `llm.prepare` continues only its own work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from llm.config.errors import UserError
from llm.files.atomic import write_text

JOB_FILE = "prepare.json"
# Increase it when the same text is divided into other pieces: a shard stores the number of the piece where it ends.
_VERSION = 3
_DESCRIPTIONS = {"fingerprint": "content of the text", "version": "version of this program"}
# Names of temporary files and folders that only llm.prepare gives.
_LEFTOVERS = (f".{JOB_FILE}.*.tmp", ".tokenizer.*.tmp", ".tokenizer.old")


def claim_folder(folder: Path, settings: Mapping[str, object]) -> None:
    """Record the settings of the shards in a folder, or check that an earlier start recorded the same ones.

    Then remove what a killed start has left. The caller holds the lock of the folder.

    Args:
        folder: the folder of the shards, which exists.
        settings: everything that the content of the shards depends on, as JSON values.

    Raises:
        UserError: the folder holds shards with other settings, or files of something else.
    """
    job = {"version": _VERSION, **settings}
    content = json.dumps(job, indent=2) + "\n"
    path = folder / JOB_FILE
    if not path.is_file():
        others = [entry.name for entry in folder.iterdir() if entry.suffix in (".bin", ".json", ".npy")]
        if others:
            raise UserError(f"--output_dir {folder}: holds {others[0]}, but no {JOB_FILE}; give another folder")
        write_text(path, content)
        return
    recorded = _read_record(path)
    changed = [_DESCRIPTIONS.get(name, name) for name, value in job.items() if recorded.get(name) != value]
    has_shards = any(folder.glob("*.bin"))
    if not recorded and has_shards:
        raise UserError(f"--output_dir {folder}: its {JOB_FILE} is broken; give another folder")
    if changed and has_shards:
        raise UserError(
            f"--output_dir {folder}: was begun with another {' and another '.join(changed)};"
            " give the same as before, or another folder"
        )
    _remove_leftovers(folder)
    if changed:
        # No shard was written yet: the settings of the first start may have been a mistake.
        shutil.rmtree(folder / "tokenizer", ignore_errors=True)
        write_text(path, content)


def _read_record(path: Path) -> dict[str, object]:
    """Return the recorded settings; {} if the file is broken."""
    try:
        recorded = json.loads(path.read_text())
    except ValueError:
        return {}
    return recorded if isinstance(recorded, dict) else {}


def _remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders of a killed start."""
    for pattern in _LEFTOVERS:
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
