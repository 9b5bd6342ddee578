"""Download of the official archives from their own site: resumable, verified, and put in place only when complete."""

from __future__ import annotations

import hashlib
import http.client
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from fastcifar.data.safe_pickle import is_html_page
from fastcifar.errors import DataError, DiskError
from fastcifar.files import lock_folder

DATA_REMEDY = "give --data PATH, set FASTCIFAR_DATA, or try --data synthetic"
TIMEOUT_S = 30.0
_CHUNK_BYTES = 2**18
_MAX_BYTES = 2**30  # a larger download is aborted; the largest official archive has 170 MB


def download_file(url: str, md5: str, target: Path) -> Path:
    """Download `url` to `target` through `<target>.part`, which a later call resumes, and return `target`."""
    part = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock_folder(target.parent, wait=True):
            if not target.exists():  # otherwise another process has already downloaded it
                _download_verified(url, md5, part)
                os.replace(part, target)
    except OSError as error:
        raise DiskError(f"cannot write {part}: {error.strerror or error}", f"free space, or {DATA_REMEDY}") from None
    return target


def _download_verified(url: str, md5: str, part: Path) -> None:
    """Complete `part` and check its MD5; if a resumed download has the wrong MD5, download once more from the start."""
    start = part.stat().st_size if part.exists() else 0
    for offset in (start, 0) if start else (0,):
        if not offset:
            part.unlink(missing_ok=True)
        _download_from(url, part, offset)
        with part.open("rb") as file:
            head = file.read(512)
            file.seek(0)
            actual_md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if actual_md5 == md5:
            return
        if not offset:
            kind = "an HTML page" if is_html_page(head) else f"{part.stat().st_size:,} bytes"
            part.unlink()
            raise DataError(f"{url} sent {kind} with MD5 {actual_md5}, expected MD5 {md5}; deleted", DATA_REMEDY)


def _download_from(url: str, part: Path, start: int) -> None:
    """Append the bytes from `start` on, or write the whole file if the server does not support resuming."""
    headers = {"User-Agent": "fastcifar", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # range not satisfiable: the file is already complete
            return
        raise DataError(f"cannot download {url}: HTTP error {error.code} {error.reason}", DATA_REMEDY) from None
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"cannot download {url}: {getattr(error, 'reason', None) or error}", DATA_REMEDY) from None
    with response:
        resumes = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        done = start if resumes else 0
        length = response.headers.get("Content-Length", "")
        total = done + int(length) if length.isdecimal() else None
        columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        progress = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
        with part.open("ab" if resumes else "wb") as file, progress:
            task = progress.add_task(part.stem, completed=done, total=total)
            for chunk in _iter_chunks(response, url):
                file.write(chunk)
                done += len(chunk)
                progress.advance(task, len(chunk))
                if done > _MAX_BYTES:
                    raise DataError(f"{url} sent more than {_MAX_BYTES:,} bytes", DATA_REMEDY)
    if total is not None and done < total:
        problem = f"{url}: connection closed after {done:,} of {total:,} bytes"
        raise DataError(problem, f"run again to resume, or {DATA_REMEDY}")


def _iter_chunks(response: Any, url: str) -> Iterator[bytes]:
    # Separate from writing, whose OSError concerns the disk and has another exit code.
    try:
        yield from iter(lambda: response.read(_CHUNK_BYTES), b"")
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{url}: connection failed: {error}", f"run again to resume, or {DATA_REMEDY}") from None
