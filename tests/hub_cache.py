"""Models in a Hub cache, as a download leaves them."""

from __future__ import annotations

import shutil
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def plant_model(hub_cache: Path, name: str, model_dir: Path) -> Path:
    """Copy the files of `model_dir` into a Hub cache under a name such as ``gpt2`` or ``me/gpt``.

    With HF_HUB_CACHE set to `hub_cache` before huggingface_hub is imported, ``from_pretrained(name)`` finds them.

    Returns:
        The folder of the snapshot.
    """
    repository = hub_cache / ("models--" + name.replace("/", "--"))
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    return Path(shutil.copytree(model_dir, snapshot, dirs_exist_ok=True))
