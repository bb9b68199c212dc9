"""Atomic writes of files and folders: write under a temporary name, fsync, rename, fsync the parent folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OLDER = ".old"


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees either the old or the new content, also after a crash, and never a part.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old content is then intact. The error's
            `filename` is the path.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
            error.filename2 = None
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; rename it to `path` when the block ends without an error.

    All files in the folder are synced first. An older folder at `path` is replaced. If the block fails, the older
    folder stays as it was and the temporary one is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync_tree(temporary)
        _replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _replace(temporary: Path, path: Path) -> None:
    """Rename a folder to `path`; keep an older folder at `path` until the new name is durable."""
    older = path.with_name(f".{path.name}{_OLDER}")
    if path.exists():
        shutil.rmtree(older, ignore_errors=True)
        os.replace(path, older)
    try:
        os.replace(temporary, path)
    except BaseException:
        _restore(older, path)
        raise
    sync_folder(path.parent)
    shutil.rmtree(older, ignore_errors=True)


def restore_replaced(parent: Path, names: str) -> None:
    """Restore folders that `atomic_folder` had renamed when the process was killed before the new one had their name.

    Args:
        parent: folder that contains them.
        names: glob pattern of their names.
    """
    for older in parent.glob(f".{names}{_OLDER}"):
        _restore(older, older.with_name(older.name.removeprefix(".").removesuffix(_OLDER)))


def _restore(older: Path, path: Path) -> None:
    if older.exists() and not path.exists():
        os.replace(older, path)


def sync_tree(folder: Path) -> None:
    """Sync every file and folder below `folder` to disk, and set the mode of files to 0666 without the umask's bits.

    Libraries that write through temporary files leave mode 0600, which locks out the group.
    """
    umask = os.umask(0)
    os.umask(umask)
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            os.chmod(path, 0o666 & ~umask)
            sync_file(Path(path))
        sync_folder(Path(parent))


def sync_file(path: Path) -> None:
    """Sync the content of a file to disk.

    Raises:
        OSError: the file cannot be opened, or its content cannot be synced.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to disk, which makes renames durable, if the system can sync a folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
