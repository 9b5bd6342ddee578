"""Tests of the limits on archives (fault 33); the official contents of archives are tested in test_cifar.py."""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fastcifar.data import cifar
from tests.data.conftest import TinyCifar

MEASURE_MEMORY = """
import resource, sys, time
from fastcifar.data import cifar
from fastcifar.errors import DataError
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
try:
    cifar.load_dataset(sys.argv[1])
except DataError as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    print(error.exit_code, error)
"""


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.USTAR_FORMAT)


def many_members() -> Iterator[bytes]:
    yield from [b"".join(header(f"cifar-10-batches-py/{number}") for number in range(2000))] * 300


def zeros(megabytes: int) -> Iterator[bytes]:
    yield from (bytes(2**20) for _ in range(megabytes))


def extended_header(kind: bytes) -> Iterator[bytes]:
    yield header("././@LongLink", 320 * 2**20, kind)
    yield from zeros(320)


def sparse_map() -> Iterator[bytes]:
    block = bytearray(header("cifar-10-batches-py/other", 2**30, tarfile.GNUTYPE_SPARSE))
    block[482] = 1  # the map continues in the next block
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:]))
    yield bytes(block)
    for _ in range(200_000):
        yield (b"%011o\0" % 7) * 42 + b"\1" + bytes(7)


def large_member() -> Iterator[bytes]:
    yield header("cifar-10-batches-py/other", 300 * 2**20)
    yield from zeros(300)
    yield header("cifar-10-batches-py/data_batch_1", 350 * 2**20)
    yield from zeros(350)


# name -> the blocks of an archive, and the message
BOMBS: dict[str, tuple[Callable[[], Iterator[bytes]], str]] = {
    "600,000 members": (many_members, "has more than 1,000 members"),
    "long name": (lambda: extended_header(tarfile.GNUTYPE_LONGNAME), "contains no files"),
    "pax header": (lambda: extended_header(tarfile.XHDTYPE), "contains no files"),
    "sparse map": (sparse_map, "truncated or damaged"),
    "large member": (large_member, "unpacks to more than|not a regular file of the expected size"),
    "negative size": (
        lambda: iter([_negative_size("cifar-10-batches-py/data_batch_1"), *zeros(100)]), "negative size"),
}  # fmt: skip


def _negative_size(name: str) -> bytes:
    block = bytearray(header(name))
    block[124:136] = b"\xff" * 12  # base 256: -1
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:]))
    return bytes(block)


@pytest.mark.medium
@pytest.mark.parametrize("kind", BOMBS)
def test_fault33_an_archive_is_read_in_little_memory(tmp_path: Path, kind: str) -> None:
    blocks, message = BOMBS[kind]
    path = tmp_path / "cifar-10-python.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for block in blocks():
            file.write(block)
        file.write(bytes(1024))
    command = [sys.executable, "-c", MEASURE_MEMORY, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    kilobytes, error = result.stdout.splitlines()
    assert error.startswith(f"3 {path}")
    assert any(part in error for part in message.split("|")), error
    assert int(kilobytes) < 100_000


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_of_every_format_are_read(tiny_cifar: TinyCifar, tmp_path: Path, format: int) -> None:
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz", format=format) as archive:
        if format != tarfile.USTAR_FORMAT:  # a long name, in an extended header of its own
            info = tarfile.TarInfo("cifar-10-batches-py/" + "x" * 300)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
        archive.add(tiny_cifar.python, f"./{tiny_cifar.python.name}")
    loaded = cifar.load_dataset(str(path), cache_dir=tmp_path / "cache")
    assert loaded.is_official
    assert np.array_equal(loaded.train.images.reshape(-1, 3072), tiny_cifar.images[:100])
