"""Files and folders on every system: atomic writes, locks, and reading documents that may be damaged.

`fcntl`, `os.O_DIRECTORY` and `os.statvfs` exist on POSIX systems only. They are used nowhere else in the package, and
each function here says what it does without them. No torch here.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from fastcifar.errors import DiskError, UsageError

try:
    import fcntl
except ImportError:  # not a POSIX system: see `_acquire_lock_file`
    fcntl = None


def write_atomically(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Writes `content` to `path` through a temporary file in the same folder, flushed to the disk.

    If `previous` is given, it is what `path` was before. Raises `OSError`; both files are then as they were.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_current_umask())
        if previous and path.exists():
            _link_or_copy(path, previous)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _fsync_folder(path.parent)


def _fsync_folder(folder: Path) -> None:
    """Flushes the names in `folder` to the disk. Does nothing on a system that cannot open folders (Windows)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _link_or_copy(path: Path, previous: Path) -> None:
    """Gives `path` the name `previous` as well, while `path` itself never ceases to exist."""
    link = previous.with_name(f".{previous.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        link.unlink()
    try:
        os.link(path, link)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, link)
    os.replace(link, previous)


def _current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class FolderLock:
    """An exclusive lock on a folder, held until `release`, the end of its `with` block, or the end of the process."""

    def __init__(self, unlock: Callable[[], object]) -> None:
        self._unlock: Callable[[], object] | None = unlock

    def release(self) -> None:
        """Releases the lock; a second call does nothing."""
        if self._unlock:
            self._unlock()
            self._unlock = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.release()


def lock_folder(folder: Path, wait: bool = False) -> FolderLock:
    """Locks `folder` for this process. With `wait`, other processes that hold the lock are waited for.

    On POSIX systems `flock` locks the folder itself; elsewhere the `filelock` library locks the file `.NAME.lock`
    beside it, and removes that file afterwards. On a file system without locks nothing is locked.
    Raises `UsageError` if another process holds the lock, and `DiskError` if the folder cannot be read.
    """
    try:
        return FolderLock(_acquire_flock(folder, wait) if fcntl else _acquire_lock_file(folder, wait))
    except BlockingIOError:
        raise UsageError(
            f"{folder} is being trained by another process", "wait for it, or give another --out"
        ) from None
    except OSError as error:
        raise DiskError(f"cannot read the folder {folder}: {error.strerror}") from None


def is_locked(folder: Path) -> bool:
    """Whether a process holds the lock on `folder`. The lock is free again afterwards if it was before."""
    try:
        unlock = _acquire_flock(folder, shared=True) if fcntl else _acquire_lock_file(folder)
    except BlockingIOError:
        return True
    except OSError:
        return False
    unlock()
    return False


def _acquire_flock(folder: Path, wait: bool = False, shared: bool = False) -> Callable[[], object]:
    """Returns the function that releases the lock. Raises `BlockingIOError` if another process holds it."""
    assert fcntl
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:  # a file system without locks
        pass
    return partial(os.close, handle)


def _acquire_lock_file(folder: Path, wait: bool = False) -> Callable[[], object]:
    """Like `_acquire_flock`. The lock file is not in the folder, which can then be removed while it is locked."""
    import filelock

    os.scandir(folder).close()  # raises what opening the folder raises elsewhere
    folder = folder.resolve()
    lock = filelock.FileLock(folder.parent / f".{folder.name}.lock", thread_local=False)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout:
        raise BlockingIOError from None
    except OSError:  # no lock file can be written beside the folder
        pass
    return lock.release


def free_disk_bytes(folder: Path) -> int | None:
    """Free bytes on the disk of `folder`; None where the system cannot say."""
    try:
        return shutil.disk_usage(folder).free
    except AttributeError:  # neither `os.statvfs` nor Windows
        return None


def load_toml(path: Path | str) -> dict[str, Any]:
    """The content of a TOML file. Raises `UsageError` if it cannot be read."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"{path} is not a readable TOML file: {error}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file is missing, damaged, or holds something else."""
    try:
        return parse_json_object(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError):
        return {}


def parse_json_object(text: str) -> dict[str, Any] | None:
    """The JSON object in `text`; None if it is damaged or something else."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None
