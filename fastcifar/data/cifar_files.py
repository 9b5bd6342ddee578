"""The official CIFAR files: their names, their contents, and the verification that they are intact."""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastcifar.data.safe_pickle import load_pickle
from fastcifar.errors import DataError

IMAGE_BYTES = 3 * 32 * 32
MAX_LISTED_CLASSES = 10  # in a line about the training images


@dataclass(frozen=True)
class Split:
    """`images` uint8 [n, 3, 32, 32], planar RGB, C-contiguous, possibly a read-only memory map; `labels` int64 [n]."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """The splits of a data set, whether every file is official, and the kind of its source in words.

    `test` is empty if there is no test set. `val` is the data set's own validation split; None if it has none, so that
    one is taken from `train`.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    source: str
    is_official: bool
    source_type: str = ""
    val: Split | None = None
    own_images: bool = False  # neither in the format of the official files nor synthetic

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the images and labels for training and validation, in their order; it identifies a run's data."""
        digest = hashlib.sha256()
        for split in (self.train, *([self.val] if self.val else [])):
            digest.update(b"%d images" % len(split.labels))
            digest.update(np.ascontiguousarray(split.images).data)
            digest.update(split.labels.astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def title(self) -> str:
        """The name of the data set, or the kind of the source of own images."""
        return self.source_type if self.own_images else self.name

    @property
    def all_splits(self) -> dict[str, Split]:
        """Those of the splits "train", "val" and "test" that the data set has."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        return {name: split for name, split in splits.items() if split is not None and len(split.labels)}

    def format_lines(self, train: Split, val: Split) -> list[str]:
        """Return lines for the user about the images and classes of a run with these training and validation images."""
        source = self.source if self.is_official or self.own_images else f"{self.source}, not the official files"
        sizes = f"{len(train.labels):,} training, {len(val.labels):,} validation"
        num_test_images = len(self.test.labels)
        test = f"{num_test_images:,} test images" if num_test_images else "no test images, so test_acc will be null"
        classes = [f"{label} {name} ({n:,})" for label, (name, n) in enumerate(self.count_by_class(train).items())]
        classes[0] = f"{classes[0][:-1]} images)"
        if len(classes) > MAX_LISTED_CLASSES:
            classes[MAX_LISTED_CLASSES // 2 : -1] = ["..."]
        return [f"data: {self.title} from {source}: {sizes}, {test}", f"classes: {', '.join(classes)}"]

    def count_by_class(self, split: Split) -> dict[str, int]:
        """Return the number of images of each class in `split`, by the name of the class, in the order of labels."""
        counts = np.bincount(split.labels, minlength=len(self.classes)).tolist()
        return dict(zip(self.classes, counts, strict=True))

    def require_training_images(self, remedy: str = "evaluate a run on it with eval RUN --data") -> Split:
        """Return the training images. Raises `DataError` if the data set has only a test set."""
        if not len(self.train.labels):
            raise DataError(f"{self.source} has no training images", remedy)
        return self.train

    def require_test_set(self) -> Split:
        """Return the test set. Raises `DataError` if the data set has none."""
        if not len(self.test.labels):
            raise DataError(f"{self.source} has no test set", "add a folder test/, or give another --data")
        return self.test


@dataclass(frozen=True)
class BatchFile:
    """One file of images: its official MD5, and the `batch_label` stored in it (Python version only)."""

    name: str
    split: str
    num_images: int
    md5: str = ""
    batch_label: str = ""


@dataclass(frozen=True)
class FileLayout:
    """One of the two published versions: a folder of batches and a file of class names, in a .tar.gz."""

    folder: str
    archive_name: str
    batches: tuple[BatchFile, ...]
    meta_file: str
    meta_md5: str = ""

    @property
    def file_names(self) -> list[str]:
        return [*(batch.name for batch in self.batches), self.meta_file]


@dataclass(frozen=True)
class DatasetSpec:
    """One entry of `DATASETS`."""

    num_classes: int
    url: str
    archive_md5: str
    label_key: str  # key of the labels in a pickled batch
    class_names_key: str  # key of the class names in the pickled meta file
    label_bytes: int  # number of label bytes in a binary record
    python: FileLayout
    binary: FileLayout
    class_names: tuple[str, ...] = ()  # class order for class folders; empty for alphabetical order
    split_digests: dict[str, str] = field(default_factory=dict)  # `split_digest` of each official split
    label_index: int = -1  # of the label among the label bytes

    @property
    def default_class_names(self) -> list[str]:
        """The names of the classes where no file contains them."""
        return list(self.class_names) or [f"class_{label:02d}" for label in range(self.num_classes)]


_CIFAR10_PYTHON = (
    BatchFile("data_batch_1", "train", 10_000, "c99cafc152244af753f735de768cd75f", "training batch 1 of 5"),
    BatchFile("data_batch_2", "train", 10_000, "d4bba439e000b95fd0a9bffe97cbabec", "training batch 2 of 5"),
    BatchFile("data_batch_3", "train", 10_000, "54ebc095f3ab1f0389bbae665268c751", "training batch 3 of 5"),
    BatchFile("data_batch_4", "train", 10_000, "634d18415352ddfa80567beed471001a", "training batch 4 of 5"),
    BatchFile("data_batch_5", "train", 10_000, "482c414d41f54cd18b22e5b47cb7c3cb", "training batch 5 of 5"),
    BatchFile("test_batch", "test", 10_000, "40351d587109b95175f43aff81a1287e", "testing batch 1 of 1"),
)
# These MD5s agree with other public tools; the one of test_batch.bin was also computed from test_batch.
_CIFAR10_BINARY = (
    BatchFile("data_batch_1.bin", "train", 10_000, "5dd7e06a14cb22eb9f671a540d1b7c25"),
    BatchFile("data_batch_2.bin", "train", 10_000, "5ea93a67294ea407fff1d09f752e9692"),
    BatchFile("data_batch_3.bin", "train", 10_000, "942cd6a4bcdd0dd3c604fbe906cb4421"),
    BatchFile("data_batch_4.bin", "train", 10_000, "ae636b3ba5c66a11e91e8cb52e771fcb"),
    BatchFile("data_batch_5.bin", "train", 10_000, "53f37980c15c3d472c316c40844f3f0d"),
    BatchFile("test_batch.bin", "test", 10_000, "803d5f7f4d78ea53de84dbe85f74fb6d"),
)
_CIFAR100_PYTHON = (
    BatchFile("train", "train", 50_000, "16019d7e3df5f24257cddd939b257f8d", "training batch 1 of 1"),
    BatchFile("test", "test", 10_000, "f0ef6b0ae62326f3e7ffdfab6717acfc", "testing batch 1 of 1"),
)
_CIFAR100_BINARY = (BatchFile("train.bin", "train", 50_000), BatchFile("test.bin", "test", 10_000))

DATASETS: dict[str, DatasetSpec] = {
    "cifar10": DatasetSpec(
        num_classes=10,
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        archive_md5="c58f30108f718f92721af3b95e74349a",
        label_key="labels",
        class_names_key="label_names",
        label_bytes=1,
        python=FileLayout("cifar-10-batches-py", "cifar-10-python.tar.gz", _CIFAR10_PYTHON, "batches.meta",
                          "5ff9c542aee3614f3951f8cda6e48888"),
        binary=FileLayout("cifar-10-batches-bin", "cifar-10-binary.tar.gz", _CIFAR10_BINARY, "batches.meta.txt"),
        class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        split_digests={"train": "1dcbc641ae818c058156633b92538974", "test": "762b4e904b441cc19ea5cb6fb8b54f8f"},
    ),
    "cifar100": DatasetSpec(
        num_classes=100,
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        archive_md5="eb9058c3a382ffc7106e4002c42a8d85",
        label_key="fine_labels",
        class_names_key="fine_label_names",
        label_bytes=2,
        python=FileLayout("cifar-100-python", "cifar-100-python.tar.gz", _CIFAR100_PYTHON, "meta",
                          "7973b15100ade9c7d40fb424638fde48"),
        binary=FileLayout("cifar-100-binary", "cifar-100-binary.tar.gz", _CIFAR100_BINARY, "fine_label_names.txt"),
    ),
}  # fmt: skip
DATASETS["cifar100-coarse"] = replace(
    DATASETS["cifar100"],
    num_classes=20,
    label_key="coarse_labels",
    class_names_key="coarse_label_names",
    label_index=0,
    binary=replace(DATASETS["cifar100"].binary, meta_file="coarse_label_names.txt"),
)

# A file read from a folder or an archive: its layout, its name, its bytes.
MemberFile = tuple[FileLayout, str, bytes]


class SourceContents(NamedTuple):
    """What is read from a source: the splits by name, class names in label order, and one line for the user or ""."""

    splits: dict[str, Split]
    classes: tuple[str, ...]
    is_official: bool = False
    note: str = ""

    def to_dataset(self, name: str, source: str, source_type: str, own_images: bool) -> Dataset:
        """Return the data set of these splits; an empty one replaces a missing training or test set."""
        empty = Split(np.empty((0, 3, 32, 32), np.uint8), np.empty(0, np.int64))
        train, test, val = self.splits.get("train", empty), self.splits.get("test", empty), self.splits.get("val")
        return Dataset(name, train, test, self.classes, source, self.is_official, source_type, val, own_images)


def file_error(problem: str) -> DataError:
    """Return the error for a file that is not the expected one."""
    return DataError(problem, "download the official file again, or give another path with --data or FASTCIFAR_DATA")


def read_official_files(spec: DatasetSpec, members: Iterator[MemberFile], source: Path) -> SourceContents:
    """Parse and verify the files of one layout: first their structure, then their checksums."""
    sizes = {split: sum(b.num_images for b in spec.python.batches if b.split == split) for split in ("train", "test")}
    splits = {split: Split(np.empty((n, 3, 32, 32), np.uint8), np.empty(n, np.int64)) for split, n in sizes.items()}
    md5s: dict[str, str] = {}
    classes: tuple[str, ...] = ()
    layout = spec.python
    for layout, name, content in members:
        file = str(source / name)
        if name in md5s:
            raise file_error(f"{file} appears twice, expected once")
        md5s[name] = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if name == layout.meta_file:
            classes = _parse_class_names(spec, layout, content, file)
            continue
        index = [batch.name for batch in layout.batches].index(name)
        batch = layout.batches[index]
        swapped = next((other.name for other in layout.batches if other.md5 == md5s[name] and other is not batch), "")
        if swapped:
            raise file_error(f"{file} holds the official file {swapped}, expected {name}: files were swapped")
        start = sum(other.num_images for other in layout.batches[:index] if other.split == batch.split)
        selected = slice(start, start + batch.num_images)
        pixels, labels = parse_batch(spec, layout, batch, content, file, is_official=md5s[name] == batch.md5)
        splits[batch.split].images.reshape(-1, IMAGE_BYTES)[selected] = pixels
        splits[batch.split].labels[selected] = labels
    missing = [name for name in layout.file_names if name not in md5s]
    if missing:
        raise file_error(f"missing in {source}: {', '.join(missing)}; expected {', '.join(layout.file_names)}")
    for split_name, split in splits.items():  # a training batch in place of the test batch is not balanced
        counts = np.bincount(split.labels, minlength=spec.num_classes)
        expected = len(split.labels) // spec.num_classes
        if (counts != expected).any():
            worst = int(np.abs(counts - expected).argmax())
            files = ", ".join(batch.name for batch in layout.batches if batch.split == split_name)
            actual = f"{counts[worst]:,} images of class {worst} in {files}"
            raise file_error(f"{source} has {actual}, expected {expected:,} of each class")
    is_official, note = _verify_official(spec, layout, md5s, SourceContents(splits, classes), source)
    return SourceContents(splits, classes, is_official, note)


def parse_batch(
    spec: DatasetSpec, layout: FileLayout, batch: BatchFile, content: bytes, file: str, *, is_official: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Check the structure of one batch; return its planar pixels uint8 [n, 3072] and its labels [n]."""
    if layout is spec.binary:
        record_bytes = spec.label_bytes + IMAGE_BYTES  # the labels, coarse before fine, and planar pixels
        if len(content) != batch.num_images * record_bytes:
            expected = f"{batch.num_images * record_bytes:,} ({batch.num_images:,} records of {record_bytes:,})"
            raise file_error(f"{file} has {len(content):,} bytes, expected {expected}")
        records = np.frombuffer(content, np.uint8).reshape(batch.num_images, record_bytes)
        pixels, labels = records[:, spec.label_bytes :], records[:, : spec.label_bytes][:, spec.label_index]
    else:
        entries = _load_text_keys(content, file)
        if not {"data", spec.label_key} <= entries.keys():
            raise file_error(f"{file} has the keys {sorted(entries)[:8]}, expected 'data' and {spec.label_key!r}")
        batch_label = _to_str(entries.get("batch_label", batch.batch_label))
        if batch_label != batch.batch_label and not is_official:
            mismatch = f"{batch_label[:60]!r}, expected {batch.batch_label!r}"
            raise file_error(f"{file} has the batch_label {mismatch}: files were swapped")
        pixels, labels = entries["data"], entries[spec.label_key]
        shape = f"{pixels.shape} {pixels.dtype}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        expected_shape = f"({batch.num_images}, {IMAGE_BYTES}) uint8"
        if shape != expected_shape:
            raise file_error(f"{file} has images {shape}, expected {expected_shape}")
        labels = labels.tolist() if isinstance(labels, np.ndarray) else labels
        is_list = isinstance(labels, list)
        if not is_list or len(labels) != batch.num_images or {type(label) for label in labels} != {int}:
            count = f"{len(labels):,}" if is_list else "no list of"
            raise file_error(f"{file} has {count} labels, expected {batch.num_images:,} integers")
        labels = np.array(labels)
    invalid = labels[(labels < 0) | (labels >= spec.num_classes)]
    if len(invalid):
        raise file_error(f"{file} has the label {invalid[0]}, expected 0 to {spec.num_classes - 1}")
    return pixels, labels


def _load_text_keys(content: bytes, file: str) -> dict[str, Any]:
    return {_to_str(key): value for key, value in load_pickle(content, file).items()}


def _to_str(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _parse_class_names(spec: DatasetSpec, layout: FileLayout, content: bytes, file: str) -> tuple[str, ...]:
    """Return the class names in label order: a list in the Python version, one per line in the binary version."""
    if layout is spec.binary:
        names = [line.strip() for line in content.decode("utf-8", "replace").splitlines() if line.strip()]
    else:
        entries = _load_text_keys(content, file)
        value = entries.get(spec.class_names_key)
        if not isinstance(value, list) or not all(isinstance(name, bytes | str) for name in value):
            raise file_error(f"{file} has the keys {sorted(entries)[:8]}, expected a list {spec.class_names_key!r}")
        names = [_to_str(name) for name in value]
    if len(names) != spec.num_classes or len(set(names)) != spec.num_classes:
        raise file_error(f"{file} has {len(set(names))} class names, expected {spec.num_classes}")
    return tuple(names)


def split_digest(split: Split) -> str:
    """Return a 128-bit sum of hashes, independent of the order of images; it detects damage but not manipulation."""
    total = 0
    for label, image in zip(split.labels.tolist(), split.images, strict=True):
        total += int.from_bytes(hashlib.blake2b(image.data, digest_size=16, key=b"%d" % label).digest(), "little")
    return f"{total % 2**128:032x}"


def _verify_official(
    spec: DatasetSpec, layout: FileLayout, md5s: dict[str, str], contents: SourceContents, source: Path
) -> tuple[bool, str]:
    """Return whether every file is official, and a note for the user. Raises `DataError` if a file is damaged.

    The data is official if every MD5 is official, reordered if it has the official images and labels in another order,
    as some public copies have (each split is verified by the MD5s of its files or by `split_digest`), and custom if no
    file and no split is official (only the structure is checked). Next to official files or splits, all others count as
    damaged.
    """
    splits, classes = contents[:2]
    official_md5s = {batch.name: batch.md5 for batch in layout.batches}
    intact = {name for name, md5 in official_md5s.items() if md5 and md5 == md5s[name]}
    files = {split: [batch.name for batch in layout.batches if batch.split == split] for split in splits}
    verified = {split: intact.issuperset(names) for split, names in files.items()}
    # Next to intact files of the same version, a file with another MD5 is damaged even if its pixels are intact.
    if not verified["train"]:
        for split, names in files.items():
            if intact.isdisjoint(names) and split in spec.split_digests:
                verified[split] = split_digest(splits[split]) == spec.split_digests[split]
    if not intact and not any(verified.values()):
        return False, f"{source} is not the official data set (no MD5 matches): only its structure was checked"
    for split, names in files.items():
        if not verified[split]:
            bad = [name for name in names if name not in intact] or names
            which = f"{source / bad[0]}" if len(bad) == 1 or len(bad) < len(names) else f"{source}: {', '.join(names)}"
            mismatch = f"expected MD5 {official_md5s[bad[0]] or 'unknown'}, found {md5s[bad[0]]}"
            raise file_error(f"{which} damaged: {mismatch}, while other files are the official ones")
    meta = layout.meta_file
    meta_intact = md5s[meta] == layout.meta_md5 if layout.meta_md5 and intact else spec.class_names in ((), classes)
    if not meta_intact:
        mismatch = f"expected MD5 {layout.meta_md5 or 'unknown'}, found {md5s[meta]}"
        raise file_error(f"{source / meta} damaged: {mismatch}, while the images are the official ones")
    changed = [name for name, md5 in official_md5s.items() if md5 != md5s[name]]
    if not changed:
        return True, ""
    return False, f"{source} has the official images and labels in unofficial files (other MD5: {', '.join(changed)})"
