"""Class folders of images for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def write_flat(path: Path, value: int) -> None:
    """Write a 32x32 image of one gray value, and create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (value,) * 3).save(path)


def write_class_folders(
    root: Path, values: Mapping[str, int], counts: Mapping[str, int], suffix: str = "png", prefix: str = ""
) -> Path:
    """Write `counts[split]` images of the gray value `values[name]` to `root`/split/name; return `root`."""
    for split, count in counts.items():
        for name, value in values.items():
            for index in range(count):
                write_flat(root / split / name / f"{prefix}{index}.{suffix}", value)
    return root


def write_noise(root: Path, names: tuple[str, ...], counts: Mapping[str, int], suffix: str = "png") -> Path:
    """Write `counts[split]` different images to each folder `root`/split/name; return `root`."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for name in names:
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
                image.save(root / split / name / f"{index:03d}.{suffix}")
    return root
