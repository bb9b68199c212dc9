"""Files and folders that are whole or absent: temporary name, fsync, rename, fsync of the parent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OLDER = ".old"


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file so that a reader, or a crash, sees the old content or the new one, never a part.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old content is then intact.
            Its `filename` is the path.
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
            error.filename, error.filename2 = str(path), None
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of the UTF-8 text."""
    write_bytes(path, text.encode())


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty temporary folder beside `path` that takes its name when the block ends well.

    All files in it are synced first. An older folder of that name is replaced; a failed block leaves it
    as it was and removes the temporary one.
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
    """Gives a folder its name; the older one of that name is there until the new one is, durably."""
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
    """Gives folders their names back whose successor was killed before it had taken them.

    Args:
        parent: where they are.
        names: a pattern of the names.
    """
    for older in parent.glob(f".{names}{_OLDER}"):
        _restore(older, older.with_name(older.name.removeprefix(".").removesuffix(_OLDER)))


def _restore(older: Path, path: Path) -> None:
    if older.exists() and not path.exists():
        os.replace(older, path)


def sync_tree(folder: Path) -> None:
    """Syncs every file and folder below `folder`, and gives files the modes that the umask allows.

    Libraries that write through temporary files leave mode 0600 behind, which locks out the group.
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
    """Makes what was written into a file durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Makes renames inside the folder durable, where the system lets a folder be synced."""
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
