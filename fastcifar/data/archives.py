"""The files of the official folders and archives, read with limits on sizes and numbers and never written to disk."""

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from fastcifar.data.cifar_files import IMAGE_BYTES, DatasetSpec, FileLayout, MemberFile, file_error
from fastcifar.data.safe_pickle import is_html_page
from fastcifar.errors import DataError

UNPACK_REMEDY = "unpack class folders of images, and give --data FOLDER"
MAX_TAR_MEMBERS = 1000  # the official archives have 9
# Types of members that describe the next one, such as its long name
EXTENDED_TAR_TYPES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)


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


def iter_tar_files(path: Path, spec: DatasetSpec) -> Iterator[MemberFile]:
    """Yield the files of the first layout found in a .tar.gz. Raises `DataError` if it is damaged or has no layout."""
    with path.open("rb") as file:
        head = file.read(512)
    if head[:2] == b"PK":
        raise DataError(f"{path} is a .zip archive, expected a folder or a .tar.gz", UNPACK_REMEDY)
    if head[:2] != b"\x1f\x8b":
        kind = "an HTML page" if is_html_page(head) else "another kind of file" if head else "an empty file"
        raise file_error(f"{path} is {kind} (it starts with {head[:16]!r}), expected a .tar.gz")
    layouts = (spec.python, spec.binary)
    expected = {f"{layout.folder}/{name}": (layout, name) for layout in layouts for name in layout.file_names}
    archive_layout: FileLayout | None = None
    limit = 2 * sum(batch.num_images * (IMAGE_BYTES + 100) for batch in spec.python.batches) + 2**22
    other_members: list[str] = []
    try:
        with gzip.open(path) as stream:
            for member in _iter_tar_headers(stream, path, limit):
                layout, name = expected.get(member.name.removeprefix("./"), (None, ""))
                if layout is None or archive_layout not in (None, layout):
                    other_members += [member.name[:80]] if len(other_members) < 3 else []
                    continue
                archive_layout = layout
                if not member.isreg() or member.issparse() or member.size > _max_member_bytes(spec, layout, name):
                    problem = f"is not a regular file of the expected size ({member.size:,} bytes)"
                    raise file_error(f"{path}: {member.name} {problem}")
                content = stream.read(member.size)
                if len(content) < member.size:
                    raise EOFError(f"{member.name} is incomplete")
                yield layout, name, content
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise file_error(f"{path} is truncated or damaged ({error}), expected a complete .tar.gz") from None
    if archive_layout is None:
        content = ", ".join(other_members) or "no files"
        expected = f"expected {spec.python.folder}/ or {spec.binary.folder}/"
        raise DataError(f"{path} contains {content}, {expected}", UNPACK_REMEDY)


def _iter_tar_headers(stream: gzip.GzipFile, path: Path, limit: int) -> Iterator[tarfile.TarInfo]:
    """Yield the header of each member of a tar archive, whose content the caller may read from `stream`.

    `tarfile` itself keeps all members and reads extended headers, such as those of long names, of any size into memory.
    Here these are members that the caller skips, because the names in the official archives are short. Raises
    `DataError` for more than `limit` bytes, since gzip can expand a file a thousandfold.
    """
    for _ in range(MAX_TAR_MEMBERS):
        header = stream.read(tarfile.BLOCKSIZE)
        if header.count(0) == tarfile.BLOCKSIZE:  # the end of the archive
            if stream.seek(limit + 1) > limit:  # reading to the end verifies the checksum of gzip
                break
            return
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        has_content = member.isreg() or member.type not in tarfile.SUPPORTED_TYPES or member.type in EXTENDED_TAR_TYPES
        end = stream.tell() + (-(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE if has_content else 0)
        if member.size < 0:
            raise tarfile.ReadError(f"{member.name} has a negative size")
        if member.type not in EXTENDED_TAR_TYPES:
            yield member
        if (position := stream.seek(min(end, limit + 1))) > limit:
            break
        if position < end:
            raise EOFError("the last member is incomplete")
    else:
        raise file_error(f"{path} has more than {MAX_TAR_MEMBERS:,} members, expected a CIFAR archive")
    raise file_error(f"{path} unpacks to more than {limit:,} bytes, expected a CIFAR archive")
