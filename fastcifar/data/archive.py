"""Reads the bytes of the official files from a folder or directly from a .tar.gz, without extracting it."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastcifar.data.cifar_files import IMAGE_BYTES, DatasetSpec, FileLayout, MemberFile, file_error
from fastcifar.data.safe_pickle import is_html_page


def _max_member_bytes(spec: DatasetSpec, layout: FileLayout, name: str) -> int:
    num_images = next((batch.num_images for batch in layout.batches if batch.name == name), 0)
    # Pickle protocol 0 writes a byte as up to four characters; the rest is for file name and labels of an image.
    bytes_per_image = IMAGE_BYTES + spec.label_bytes if layout is spec.binary else 4 * IMAGE_BYTES + 512
    return num_images * bytes_per_image + 2**20


def iter_folder_files(folder: Path, spec: DatasetSpec, layout: FileLayout) -> Iterator[MemberFile]:
    """Yield the files of `layout` that are in `folder`. Raises `DataError` if one is too large."""
    for name in layout.file_names:
        path, limit = folder / name, _max_member_bytes(spec, layout, name)
        if path.is_file():
            size = path.stat().st_size
            if size > limit:
                raise file_error(f"{path} has {size:,} bytes, expected at most {limit:,}")
            yield layout, name, path.read_bytes()


class _SizeLimitedStream:
    """A stream that raises `DataError` after `limit` bytes, since gzip can expand a file a thousandfold."""

    def __init__(self, stream: Any, limit: int, path: Path) -> None:
        self.stream, self.remaining, self.limit, self.path = stream, limit, limit, path

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.remaining -= len(data)
        if self.remaining < 0:
            raise file_error(f"{self.path} unpacks to more than {self.limit:,} bytes, expected a CIFAR archive")
        return data


def iter_tar_files(path: Path, spec: DatasetSpec) -> Iterator[MemberFile]:
    """Yield the files of the first layout found in a .tar.gz. Raises `DataError` if it is damaged or has neither."""
    with path.open("rb") as file:
        head = file.read(512)
    if head[:2] != b"\x1f\x8b":
        kind = "an HTML page" if is_html_page(head) else "another kind of file" if head else "an empty file"
        raise file_error(f"{path} is {kind} (it starts with {head[:16]!r}), expected a .tar.gz")
    layouts = (spec.python, spec.binary)
    expected = {f"{layout.folder}/{name}": (layout, name) for layout in layouts for name in layout.file_names}
    archive_layout: FileLayout | None = None
    limit = 2 * sum(batch.num_images * (IMAGE_BYTES + 100) for batch in spec.python.batches) + 2**22
    other_members: list[str] = []
    try:
        with gzip.open(path) as decompressed:
            stream = _SizeLimitedStream(decompressed, limit, path)
            with tarfile.open(fileobj=stream, mode="r|") as archive:  # pyright: ignore[reportArgumentType, reportCallIssue]
                for member in archive:
                    layout, name = expected.get(member.name.removeprefix("./"), (None, ""))
                    if layout is None or archive_layout not in (None, layout):
                        other_members += [member.name[:80]] if len(other_members) < 3 else []
                        continue
                    archive_layout = layout
                    reader = archive.extractfile(member) if member.isreg() and not member.issparse() else None
                    if reader is None or member.size > _max_member_bytes(spec, layout, name):
                        problem = f"is not a regular file of the expected size ({member.size:,} bytes)"
                        raise file_error(f"{path}: {member.name} {problem}")
                    yield layout, name, reader.read()
            while stream.read(2**20):  # read to the end, where gzip verifies its checksum
                pass
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise file_error(f"{path} is truncated or damaged ({error}), expected a complete .tar.gz") from None
    if archive_layout is None:
        content = ", ".join(other_members) or "no files"
        raise file_error(f"{path} contains {content}, expected {spec.python.folder}/ or {spec.binary.folder}/")
