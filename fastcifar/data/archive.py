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

from fastcifar.data.cifar_files import IMAGE_BYTES, REDOWNLOAD_REMEDY, DatasetSpec, FileLayout, MemberFile
from fastcifar.errors import DataError

# Protocol 0 spells a byte in up to four characters; file names and labels take the rest.
_PICKLE_BYTES_PER_ROW = 4 * IMAGE_BYTES + 512


def _max_member_bytes(spec: DatasetSpec, layout: FileLayout, name: str) -> int:
    """The most bytes a member may have before it is read into memory."""
    rows = next((batch.num_images for batch in layout.batches if batch.name == name), None)
    if rows is None:
        return 2**20
    return rows * (IMAGE_BYTES + spec.label_bytes if layout is spec.binary else _PICKLE_BYTES_PER_ROW) + 2**20


def iter_folder_files(folder: Path, spec: DatasetSpec, layout: FileLayout) -> Iterator[MemberFile]:
    """The files of `packing` in `folder`; `DataError` for a missing, oversized or unreadable one."""
    names = [batch.name for batch in layout.batches] + [layout.meta_file]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)}; expected {', '.join(names)}", REDOWNLOAD_REMEDY)
    for name in names:
        path, limit = folder / name, _max_member_bytes(spec, layout, name)
        try:
            size = path.stat().st_size
            if size > limit:
                raise DataError(f"{path} has {size:,} bytes, expected at most {limit:,}", REDOWNLOAD_REMEDY)
            yield layout, name, path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}", "check its permissions") from None


class _SizeLimitedStream:
    """A stream that refuses to unfold beyond a limit: a gzip of zeros grows a thousandfold."""

    def __init__(self, stream: Any, limit: int, path: Path) -> None:
        self.stream, self.remaining, self.limit, self.path = stream, limit, limit, path

    def read(self, size: int) -> bytes:
        part = self.stream.read(size)
        self.remaining -= len(part)
        if self.remaining < 0:
            raise DataError(
                f"{self.path} unpacks to more than {self.limit:,} bytes, expected a CIFAR archive", REDOWNLOAD_REMEDY
            )
        return part


def iter_tar_files(path: Path, spec: DatasetSpec) -> Iterator[MemberFile]:
    """The files of the first packing found in a .tar.gz, read from the stream: no path in it is ever opened.

    `DataError` for a file that is not gzip, is cut short or damaged, or holds no packing of this set.
    """
    with path.open("rb") as file:
        head = file.read(512)
    if head[:2] != b"\x1f\x8b":
        kind = "an HTML page" if b"<html" in head.lower() or b"<!doctype" in head.lower() else "another kind of file"
        kind = kind if head else "an empty file"
        raise DataError(f"{path} is {kind} (it starts with {head[:16]!r}), expected a .tar.gz", REDOWNLOAD_REMEDY)
    wanted = {
        f"{packing.folder}/{name}": (packing, name)
        for packing in (spec.python, spec.binary)
        for name in (*(batch.name for batch in packing.batches), packing.meta_file)
    }
    packing: FileLayout | None = None
    limit = 2 * sum(batch.num_images * (IMAGE_BYTES + 100) for batch in spec.python.batches) + 2**22
    others: list[str] = []
    try:
        with gzip.open(path) as unpacked:
            stream = _SizeLimitedStream(unpacked, limit, path)
            with tarfile.open(fileobj=stream, mode="r|") as archive:  # pyright: ignore[reportArgumentType, reportCallIssue]
                for member in archive:
                    found, name = wanted.get(member.name.removeprefix("./"), (None, ""))
                    if found is None or packing not in (None, found):
                        others += [member.name[:80]] if len(others) < 3 else []
                        continue
                    packing = found
                    if not member.isreg() or member.issparse() or member.size > _max_member_bytes(spec, found, name):
                        raise DataError(
                            f"{path}: {member.name} is not a plain file of a sensible size ({member.size:,} bytes)",
                            REDOWNLOAD_REMEDY,
                        )
                    body = archive.extractfile(member)
                    assert body is not None, "extractfile returns a reader for every regular file"
                    yield found, name, body.read()
            while stream.read(2**20):  # to the end, where gzip's checksum is compared
                pass
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(
            f"{path} is cut short or damaged ({error}), expected a complete .tar.gz", REDOWNLOAD_REMEDY
        ) from None
    if packing is None:
        folders = f"{spec.python.folder}/ or {spec.binary.folder}/"
        raise DataError(f"{path} holds {', '.join(others) or 'nothing'}, expected {folders}", REDOWNLOAD_REMEDY)
