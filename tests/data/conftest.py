"""Small replacements for the official files. The real data is used only where FASTCIFAR_DATA is set."""

import dataclasses
import hashlib
import pickle
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fastcifar.data import cifar_files
from fastcifar.data.cifar_files import DATASETS, BatchFile, DatasetSpec, FileLayout, Split


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def with_md5s(layout: FileLayout, folder: Path) -> FileLayout:
    def with_md5(batch: BatchFile) -> BatchFile:
        return dataclasses.replace(batch, md5=md5((folder / batch.name).read_bytes()))

    return dataclasses.replace(layout, batches=tuple(with_md5(batch) for batch in layout.batches))


@dataclasses.dataclass
class TinyCifar:
    """A CIFAR-10 of 120 images below `root` in both versions, registered in `DATASETS` as official, and its arrays."""

    root: Path
    images: np.ndarray
    labels: np.ndarray
    batch_images: int = 20  # images per file; five training files hold 10 images of each class

    @property
    def spec(self) -> DatasetSpec:
        return DATASETS["cifar10"]

    @property
    def python(self) -> Path:
        return self.root / self.spec.python.folder

    @property
    def binary(self) -> Path:
        return self.root / self.spec.binary.folder

    @staticmethod
    def arrays(seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return 120 images and labels, the first 100 for training; only complete splits are balanced."""
        rng = np.random.default_rng(seed)
        train = np.sort(np.arange(100) % 10)  # two classes per file
        labels = np.concatenate([train, rng.permutation(np.arange(20) % 10)]).astype(np.int64)
        return rng.integers(0, 256, (120, 3072), dtype=np.uint8), labels

    def write(self, root: Path, images: np.ndarray, labels: np.ndarray, protocol: int = 2) -> Path:
        """Write both versions of these 120 images below `root`."""
        spec = self.spec
        python, binary = root / spec.python.folder, root / spec.binary.folder
        for folder in (python, binary):
            folder.mkdir(parents=True)
        for index, (batch, binary_batch) in enumerate(zip(spec.python.batches, spec.binary.batches, strict=True)):
            positions = slice(index * self.batch_images, (index + 1) * self.batch_images)
            content = {
                b"batch_label": batch.batch_label.encode(),
                b"labels": labels[positions].tolist(),
                b"data": images[positions],
            }
            (python / batch.name).write_bytes(pickle.dumps(content, protocol))
            records = np.concatenate([labels[positions, None].astype(np.uint8), images[positions]], axis=1)
            (binary / binary_batch.name).write_bytes(records.tobytes())
        names = {b"label_names": [name.encode() for name in spec.class_names]}
        (python / spec.python.meta_file).write_bytes(pickle.dumps(names, protocol))
        (binary / spec.binary.meta_file).write_text("\n".join(spec.class_names) + "\n\n")
        return root


@pytest.fixture
def tiny_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyCifar:
    images, labels = TinyCifar.arrays(0)
    tiny = TinyCifar(tmp_path / "official", images, labels)

    def shrink(layout: FileLayout) -> FileLayout:
        batches = tuple(dataclasses.replace(batch, num_images=tiny.batch_images, md5="") for batch in layout.batches)
        return dataclasses.replace(layout, batches=batches)

    real = DATASETS["cifar10"]
    spec = dataclasses.replace(real, python=shrink(real.python), binary=shrink(real.binary))
    monkeypatch.setitem(DATASETS, "cifar10", spec)
    monkeypatch.delenv("FASTCIFAR_DATA", raising=False)
    tiny.write(tiny.root, images, labels)
    python = with_md5s(spec.python, tiny.python)
    python = dataclasses.replace(python, meta_md5=md5((tiny.python / python.meta_file).read_bytes()))
    planar = images.reshape(-1, 3, 32, 32)
    digests = {
        "train": cifar_files.split_digest(Split(planar[:100], labels[:100])),
        "test": cifar_files.split_digest(Split(planar[100:], labels[100:])),
    }
    spec = dataclasses.replace(spec, python=python, binary=with_md5s(spec.binary, tiny.binary), split_digests=digests)
    monkeypatch.setitem(DATASETS, "cifar10", spec)
    return tiny


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Use two threads, for which torch.compile generates other kernels than for one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pack() -> Callable[[Path, Path], Path]:
    """Return a function that packs a folder into a .tar.gz like the official archives."""

    def make(folder: Path, target: Path) -> Path:
        with tarfile.open(target, "w:gz", compresslevel=1) as archive:
            archive.add(folder, folder.name)
        return target

    return make
