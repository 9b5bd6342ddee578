"""Stand-ins for the official files, small enough to be written in milliseconds; real data only by FASTCIFAR_DATA."""

import dataclasses
import hashlib
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastcifar.data import cifar_files
from fastcifar.data.cifar_files import DATASETS, BatchFile, DatasetSpec, FileLayout, Split


def md5(blob: bytes) -> str:
    return hashlib.md5(blob).hexdigest()


def with_md5s(packing: FileLayout, folder: Path) -> FileLayout:
    def known(batch: BatchFile) -> BatchFile:
        return dataclasses.replace(batch, md5=md5((folder / batch.name).read_bytes()))

    return dataclasses.replace(packing, batches=tuple(known(batch) for batch in packing.batches))


@dataclasses.dataclass
class TinyCifar:
    """Below `root` a CIFAR-10 of 120 images in both packings, which `DATASETS` calls official; its arrays."""

    root: Path
    images: np.ndarray
    labels: np.ndarray
    rows: int = 20  # of a batch; five make 10 training images of each class

    @property
    def row(self) -> DatasetSpec:
        return DATASETS["cifar10"]

    @property
    def python(self) -> Path:
        return self.root / self.row.python.folder

    @property
    def binary(self) -> Path:
        return self.root / self.row.binary.folder

    @staticmethod
    def arrays(seed: int) -> tuple[np.ndarray, np.ndarray]:
        """120 images and labels, of which the first 100 train; every class as often, but in no training batch."""
        random = np.random.default_rng(seed)
        train = np.sort(np.arange(100) % 10)  # two classes a batch
        labels = np.concatenate([train, random.permutation(np.arange(20) % 10)]).astype(np.int64)
        return random.integers(0, 256, (120, 3072), dtype=np.uint8), labels

    def write(self, root: Path, images: np.ndarray, labels: np.ndarray, protocol: int = 2) -> Path:
        """Both packings of these 120 images, below `root`."""
        row = self.row
        python, binary = root / row.python.folder, root / row.binary.folder
        for folder in (python, binary):
            folder.mkdir(parents=True)
        for place, (batch, plain) in enumerate(zip(row.python.batches, row.binary.batches, strict=True)):
            part = slice(place * self.rows, (place + 1) * self.rows)
            content = {
                b"batch_label": batch.batch_label.encode(),
                b"labels": labels[part].tolist(),
                b"data": images[part],
            }
            (python / batch.name).write_bytes(pickle.dumps(content, protocol))
            table = np.concatenate([labels[part, None].astype(np.uint8), images[part]], axis=1)
            (binary / plain.name).write_bytes(table.tobytes())
        names = {b"label_names": [name.encode() for name in row.class_names]}
        (python / row.python.meta_file).write_bytes(pickle.dumps(names, protocol))
        (binary / row.binary.meta_file).write_text("\n".join(row.class_names) + "\n\n")
        return root


@pytest.fixture
def tiny_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyCifar:
    images, labels = TinyCifar.arrays(0)
    made = TinyCifar(tmp_path / "official", images, labels)

    def small(packing: FileLayout) -> FileLayout:
        batches = tuple(dataclasses.replace(batch, num_images=made.rows, md5="") for batch in packing.batches)
        return dataclasses.replace(packing, batches=batches)

    real = DATASETS["cifar10"]
    row = dataclasses.replace(real, python=small(real.python), binary=small(real.binary), reordered_md5s={})
    monkeypatch.setitem(DATASETS, "cifar10", row)
    monkeypatch.delenv("FASTCIFAR_DATA", raising=False)
    made.write(made.root, images, labels)
    python = with_md5s(row.python, made.python)
    python = dataclasses.replace(python, meta_md5=md5((made.python / python.meta_file).read_bytes()))
    planar = images.reshape(-1, 3, 32, 32)
    content = {
        "train": cifar_files.split_digest(Split(planar[:100], labels[:100])),
        "test": cifar_files.split_digest(Split(planar[100:], labels[100:])),
    }
    row = dataclasses.replace(row, python=python, binary=with_md5s(row.binary, made.binary), split_digests=content)
    monkeypatch.setitem(DATASETS, "cifar10", row)
    return made


@pytest.fixture
def pack() -> Callable[[Path, Path], Path]:
    """Packs a folder into a .tar.gz, as the official archives are."""

    def make(folder: Path, target: Path) -> Path:
        with tarfile.open(target, "w:gz", compresslevel=1) as archive:
            archive.add(folder, folder.name)
        return target

    return make
