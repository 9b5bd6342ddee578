"""`fastcifar data`: what a data set holds, and what an augmentation list does to its images.

It measures and arranges; `report` words it and `plots` draws it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcifar.data import cifar
from fastcifar.data.augment import Draws, Op, apply, draw_epoch, parse, spell
from fastcifar.data.cifar import Split
from fastcifar.errors import UsageError
from fastcifar.recipe import Recipe
from fastcifar.results import plots
from fastcifar.training.parts import mean_colour

DRAWS = 4  # columns after the original: four epochs
MOST = 100  # images of one picture


def verify(recipe: Recipe) -> dict[str, Any]:
    """What the recipe's data set is and holds; its files are read and checked anew, whatever is cached.

    Errors: those of `cifar.load`.
    """
    data = cifar.load(recipe.data, recipe.dataset, fresh=True)
    mean, std = cifar.statistics(data.train.images)
    images = data.train.images
    return {
        "dataset": data.name,
        "kind": data.kind,
        "source": data.source,
        "official": data.official,
        "classes": list(data.classes),
        "splits": {"train": _described(data.train, data.classes), "test": _described(data.test, data.classes)},
        "mean": mean,
        "std": std,
        # Only what comes from the cache is mapped.
        "cache": str(Path(str(images.filename)).parent) if isinstance(images, np.memmap) else None,
    }


def _described(split: Split, classes: tuple[str, ...]) -> dict[str, Any]:
    counts = np.bincount(split.labels, minlength=len(classes)).tolist()
    return {
        "shape": list(split.images.shape),
        "dtype": str(split.images.dtype),
        "per_class": dict(zip(classes, counts, strict=True)),
    }


def show(recipe: Recipe, out: Path, count: int) -> dict[str, Any]:
    """Writes the picture of `count` training images under the recipe's augmentation to `out`, a PNG.

    A block for each op and one for the whole list, all by the same draws, so that a block shows its op's part in the
    whole. Which images, and the draws, follow from the seed. Errors: `UsageError`, `DiskError`, those of `cifar.load`.
    """
    ops = parse(recipe.augment)
    plots.require_png(out)
    if not 1 <= count <= MOST:
        raise UsageError(f"--count {count} images do not make a picture", f"choose 1 to {MOST}")
    data = cifar.load(recipe.data, recipe.dataset)
    chosen = np.random.Generator(np.random.Philox(key=recipe.seed)).permutation(len(data.train.labels))[:count]
    chosen = chosen[np.argsort(data.train.labels[chosen], kind="stable")]
    images = torch.from_numpy(np.stack([data.train.images[index] for index in chosen]))
    drawn = [draw_epoch(ops, len(chosen), epoch, recipe.seed) for epoch in range(DRAWS)]
    blocks = [[place] for place in range(len(ops))] if len(ops) > 1 else []
    blocks.append(list(range(len(ops))))
    titles = [spell(tuple(ops[place] for place in places)) for places in blocks]
    grids = [_grid(ops, places, images, drawn, mean_colour(recipe)) for places in blocks]
    names = [data.classes[label] for label in data.train.labels[chosen]]
    columns = ["original", *(f"epoch {epoch}" for epoch in range(DRAWS))]
    plots.image_grids(out, list(zip(titles, grids, strict=True)), names, columns)
    return {"out": str(out), "images": chosen.tolist(), "classes": names, "blocks": titles, "seed": recipe.seed}


def _grid(
    ops: tuple[Op, ...], places: list[int], images: Tensor, drawn: list[Draws], fill: tuple[int, int, int]
) -> np.ndarray:
    """uint8 [n, 1 + draws, 32, 32, 3]: each image as it is, then after the ops at `places` by each of the draws."""
    columns = [images]
    for draws in drawn:
        params = tuple({name: torch.from_numpy(array) for name, array in draws.params[at].items()} for at in places)
        order = torch.from_numpy(draws.order)
        augmented = torch.empty_like(images)
        augmented[order] = apply(tuple(ops[at] for at in places), images[order], params, fill)
        columns.append(augmented)
    return torch.stack(columns, 1).permute(0, 1, 3, 4, 2).numpy()
