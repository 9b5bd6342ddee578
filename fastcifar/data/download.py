"""The official archives from their own site: resumed, verified, and in place only when whole.

It must not unpack, and not leave a file under the archive's name whose MD5 is another.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastcifar.errors import DataError, DiskError
from fastcifar.files import lock_folder

DATA_REMEDY = "give --data PATH, set FASTCIFAR_DATA, or try --data synthetic"
TIMEOUT_S = 30.0
_CHUNK_BYTES = 2**18
# The largest official archive has 170 MB; what runs on beyond this is not one.
_MAX_BYTES = 2**30


def download_file(url: str, md5: str, target: Path) -> Path:
    """`target`, downloaded from `url` through `<target>.part`, which a later call resumes; `md5` is hexadecimal.

    Raises `DataError` for a network or server that fails and for content of another MD5 (nothing is kept of that), and
    `DiskError` for a folder that cannot be written. Processes that ask for the same folder take turns.
    """
    part = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock_folder(target.parent, wait=True):
            if not target.exists():  # otherwise another process was first
                _download_verified(url, md5, part)
                os.replace(part, target)
    except OSError as error:
        raise DiskError(f"cannot write {part}: {error.strerror or error}", f"free space, or {DATA_REMEDY}") from None
    return target


def _download_verified(url: str, md5: str, part: Path) -> None:
    """`part` complete and of the right MD5; a resumed file that turns out wrong is fetched once more from its start."""
    start = part.stat().st_size if part.exists() else 0
    for resumed in (True, False) if start else (False,):
        if not resumed:
            part.unlink(missing_ok=True)
        _download_from(url, part, start if resumed else 0)
        with part.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
            file.seek(0)
            head = file.read(512).lower()
        if found == md5:
            return
        if not resumed:
            kind = "an HTML page" if b"<html" in head or b"<!doctype" in head else f"{part.stat().st_size:,} bytes"
            part.unlink()
            raise DataError(f"{url} sent {kind} of MD5 {found}, expected MD5 {md5}; deleted", DATA_REMEDY)


def _download_from(url: str, part: Path, start: int) -> None:
    """Appends what is missing from byte `start`, or writes all of it where the server does not resume."""
    try:
        response = _open_url(url, start)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # nothing is missing: the MD5 decides
            return
        raise DataError(f"cannot download {url}: the server says {error.code} {error.reason}", DATA_REMEDY) from None
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"cannot download {url}: {getattr(error, 'reason', None) or error}", DATA_REMEDY) from None
    with response:
        resumes = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        done = start if resumes else 0
        length = response.headers.get("Content-Length", "")
        total = done + int(length) if length.isdecimal() else None
        with part.open("ab" if resumes else "wb") as file, _progress_bar(part.stem, done, total) as advance:
            for chunk in _iter_chunks(response, url):
                file.write(chunk)
                done += len(chunk)
                advance(len(chunk))
                if done > _MAX_BYTES:
                    raise DataError(f"{url} sends more than {_MAX_BYTES:,} bytes", DATA_REMEDY)
    if total is not None and done < total:
        raise DataError(f"{url} broke off after {done:,} of {total:,} bytes", f"run again to resume, or {DATA_REMEDY}")


def _open_url(url: str, start: int) -> Any:
    headers = {"User-Agent": "fastcifar", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)


def _iter_chunks(response: Any, url: str) -> Iterator[bytes]:
    # Apart from the writing, whose OSError is the disk's and has another exit code.
    while True:
        try:
            chunk = response.read(_CHUNK_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise DataError(f"{url} broke off: {error}", f"run again to resume, or {DATA_REMEDY}") from None
        if not chunk:
            return
        yield chunk


@contextlib.contextmanager
def _progress_bar(name: str, done: int, total: int | None) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal, nothing elsewhere; gives the function that moves it by some bytes."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, completed=done, total=total)
        yield lambda count: bar.advance(task, count)
