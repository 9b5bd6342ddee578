"""File operations that work on every operating system: atomic writes, folder locks, reading possibly damaged files."""

import contextlib
import errno
import json
import math
import os
import stat
import tomllib
from pathlib import Path
from typing import Any, BinaryIO

from fastcifar.errors import DiskError, UsageError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

MAX_DOCUMENT_BYTES = 256 * 2**20  # of a TOML, JSON, CSV or JSON Lines file


def open_regular_file(path: Path | str) -> BinaryIO:
    """Open a regular file for reading. Raises `OSError` at once for a FIFO, socket, device or a link to one.

    Opening a FIFO would wait for a process that writes to it, and reading a device such as /dev/zero may never end.
    """

    def open_without_waiting(name: Any, flags: int) -> int:
        if not stat.S_ISREG(os.stat(name).st_mode):  # opening a device can have an effect
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    file = open(path, "rb", opener=open_without_waiting)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # replaced since the first check
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_regular_file(path: Path | str, max_bytes: float = MAX_DOCUMENT_BYTES) -> bytes:
    """Return the content of a regular file. Raises `OSError` if it is anything else or has more than `max_bytes`."""
    with open_regular_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= max_bytes:
            return file.read()
    raise OSError(errno.EFBIG, f"{size:,} bytes are more than {max_bytes:,.0f}", str(path))


def write_atomically(path: Path, content: bytes | memoryview | Path, previous: Path | None = None) -> None:
    """Write `content` to `path` through a temporary file in the same folder that is flushed to the disk.

    If `content` is a path, `path` becomes a hard link to that file, or a copy if the file system has no hard links.
    The old content is kept as `previous`, if given. Raises `OSError` if writing fails; neither file is ever incomplete.
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        if isinstance(content, Path):
            _link_or_copy(content, temporary)
        else:
            _write_durably(temporary, content)
        if previous and path.exists():
            link = temporary.with_suffix(".previous.tmp")
            _link_or_copy(path, link)
            os.replace(link, previous)
            link.unlink(missing_ok=True)  # it remains if both were links to the same file
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if hasattr(os, "O_DIRECTORY"):  # Windows cannot open folders
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _write_durably(path: Path, content: bytes | memoryview) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        _write_durably(target, read_regular_file(source, math.inf))


class FolderLock(contextlib.ExitStack):
    """An exclusive lock on a folder, held until `release`, the end of its `with` block or the end of the process."""

    release = contextlib.ExitStack.close


def lock_folder(folder: Path, wait: bool = False) -> FolderLock:
    """Lock `folder` for this process, if the file system has locks. With `wait`, block until the lock is free.

    Raises `UsageError` if another process holds the lock, and `DiskError` if the folder cannot be read.
    """
    try:
        return _acquire_flock(folder, wait) if fcntl else _acquire_lock_file(folder, wait)
    except BlockingIOError:
        problem = f"{folder} is being trained by another process"
        raise UsageError(problem, "wait for it, or give another --out") from None
    except OSError as error:
        raise DiskError(f"cannot read the folder {folder}: {error.strerror}") from None


def is_locked(folder: Path) -> bool:
    """Return whether a process holds the lock on `folder`, without keeping the lock if it is free."""
    try:
        (_acquire_flock(folder, shared=True) if fcntl else _acquire_lock_file(folder)).release()
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


def _acquire_flock(folder: Path, wait: bool = False, shared: bool = False) -> FolderLock:
    """Lock the folder itself, on POSIX systems. Raises `BlockingIOError` if it is already locked."""
    assert fcntl
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:  # a file system without locks
        pass
    lock = FolderLock()
    lock.callback(os.close, handle)
    return lock


def _acquire_lock_file(folder: Path, wait: bool = False) -> FolderLock:
    """Lock `.NAME.lock` beside `folder` on Windows, so `folder` can be removed. Raises `BlockingIOError` if locked."""
    import filelock

    os.scandir(folder).close()  # raises the same errors as opening the folder does on POSIX systems
    folder = folder.resolve()
    file_lock = filelock.FileLock(folder.parent / f".{folder.name}.lock", thread_local=False)
    try:
        file_lock.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout:
        raise BlockingIOError from None
    except OSError:  # the lock file cannot be written
        pass
    lock = FolderLock()
    lock.callback(file_lock.release)
    return lock


def load_toml(path: Path | str) -> dict[str, Any]:
    """Return the content of a TOML file. Raises `UsageError` if it cannot be read."""
    try:
        return tomllib.loads(read_regular_file(path).decode())
    except (ValueError, RecursionError, OSError) as error:  # a TOMLDecodeError is a ValueError
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path} is not a readable TOML file: {reason}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if the file is missing, damaged or holds anything else."""
    try:
        return parse_json_object(read_regular_file(path).decode()) or {}
    except (OSError, UnicodeDecodeError):
        return {}


def parse_json_object(text: str) -> dict[str, Any] | None:
    """Return the JSON object in `text`, or None if the text is damaged or holds anything else.

    NaN, Infinity and unpaired surrogates, which Python accepts in JSON, are refused: they cannot be written again.
    """
    try:
        document = json.loads(text)
        json.dumps(document, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None
