"""The bytes of the official files, from a folder or straight from a .tar.gz.

Nothing is ever extracted to disk and no path inside an archive is opened, so none can lead astray; sizes are bounded
before anything is read. It must not look inside the files: `official` does.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastcifar.data.cifar_files import AGAIN, PIXELS, Member, Official, Packing
from fastcifar.errors import DataError

# Protocol 0 spells a byte in up to four characters; file names and labels take the rest.
_PICKLE_BYTES_PER_ROW = 4 * PIXELS + 512


def _limit(row: Official, packing: Packing, name: str) -> int:
    """The most bytes a member may have before it is read into memory."""
    rows = next((batch.rows for batch in packing.batches if batch.name == name), None)
    if rows is None:
        return 2**20
    return rows * (PIXELS + row.label_bytes if packing is row.binary else _PICKLE_BYTES_PER_ROW) + 2**20


def folder_members(folder: Path, row: Official, packing: Packing) -> Iterator[Member]:
    """The files of `packing` in `folder`; `DataError` for a missing, oversized or unreadable one."""
    names = [batch.name for batch in packing.batches] + [packing.meta]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)}; expected {', '.join(names)}", AGAIN)
    for name in names:
        path, limit = folder / name, _limit(row, packing, name)
        try:
            size = path.stat().st_size
            if size > limit:
                raise DataError(f"{path} has {size:,} bytes, expected at most {limit:,}", AGAIN)
            yield packing, name, path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}", "check its permissions") from None


class _Bounded:
    """A stream that refuses to unfold beyond a limit: a gzip of zeros grows a thousandfold."""

    def __init__(self, stream: Any, limit: int, what: Path) -> None:
        self.stream, self.left, self.limit, self.what = stream, limit, limit, what

    def read(self, size: int) -> bytes:
        part = self.stream.read(size)
        self.left -= len(part)
        if self.left < 0:
            raise DataError(f"{self.what} unpacks to more than {self.limit:,} bytes, expected a CIFAR archive", AGAIN)
        return part


def tar_members(path: Path, row: Official) -> Iterator[Member]:
    """The files of the first packing found in a .tar.gz, read from the stream: no path in it is ever opened.

    `DataError` for a file that is not gzip, is cut short or damaged, or holds no packing of this set.
    """
    with path.open("rb") as file:
        head = file.read(512)
    if head[:2] != b"\x1f\x8b":
        kind = "an HTML page" if b"<html" in head.lower() or b"<!doctype" in head.lower() else "another kind of file"
        kind = kind if head else "an empty file"
        raise DataError(f"{path} is {kind} (it starts with {head[:16]!r}), expected a .tar.gz", AGAIN)
    wanted = {
        f"{packing.folder}/{name}": (packing, name)
        for packing in (row.python, row.binary)
        for name in (*(batch.name for batch in packing.batches), packing.meta)
    }
    packing: Packing | None = None
    limit = 2 * sum(batch.rows * (PIXELS + 100) for batch in row.python.batches) + 2**22
    others: list[str] = []
    try:
        with gzip.open(path) as unpacked:
            stream = _Bounded(unpacked, limit, path)
            with tarfile.open(fileobj=stream, mode="r|") as archive:  # pyright: ignore[reportArgumentType, reportCallIssue]
                for member in archive:
                    found, name = wanted.get(member.name.removeprefix("./"), (None, ""))
                    if found is None or packing not in (None, found):
                        others += [member.name[:80]] if len(others) < 3 else []
                        continue
                    packing = found
                    if not member.isreg() or member.issparse() or member.size > _limit(row, found, name):
                        raise DataError(
                            f"{path}: {member.name} is not a plain file of a sensible size ({member.size:,} bytes)",
                            AGAIN,
                        )
                    body = archive.extractfile(member)
                    assert body is not None, "extractfile returns a reader for every regular file"
                    yield found, name, body.read()
            while stream.read(2**20):  # to the end, where gzip's checksum is compared
                pass
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"{path} is cut short or damaged ({error}), expected a complete .tar.gz", AGAIN) from None
    if packing is None:
        folders = f"{row.python.folder}/ or {row.binary.folder}/"
        raise DataError(f"{path} holds {', '.join(others) or 'nothing'}, expected {folders}", AGAIN)
