"""`fastcifar data`: what a data set holds, and what an augmentation list does to its images.

It measures and arranges; `tables` words it and `plots` draws it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcifar import plotting
from fastcifar.data import cifar, normalization
from fastcifar.data.augment import (
    AugmentOp,
    apply_augment,
    draw_epoch,
    draw_mixer_params,
    format_augment,
    parse_augment,
    split_mixer,
)
from fastcifar.data.cifar import Split
from fastcifar.data.image_ops import apply_operation
from fastcifar.data.mixers import MIXERS
from fastcifar.data.normalization import mean_color
from fastcifar.errors import UsageError
from fastcifar.plotting import ImageGrid
from fastcifar.recipe import Recipe

SAMPLES_PER_ROW = 4  # columns after the original: four epochs
MAX_GRID_IMAGES = 100  # images of one picture


def verify_dataset(recipe: Recipe) -> dict[str, Any]:
    """What the recipe's data set is and holds; its files are read and checked anew, whatever is cached.

    Errors: those of `cifar.load`.
    """
    data = cifar.load_dataset(recipe.data, recipe.dataset, refresh_cache=True)
    mean, std = normalization.channel_mean_std(data.train.images)
    images = data.train.images
    return {
        "dataset": data.name,
        "kind": data.source_type,
        "source": data.source,
        "official": data.is_official,
        "classes": list(data.classes),
        "splits": {
            "train": _describe_split(data.train, data.classes),
            "test": _describe_split(data.test, data.classes),
        },
        "mean": mean,
        "std": std,
        # Only what comes from the cache is mapped.
        "cache": str(Path(str(images.filename)).parent) if isinstance(images, np.memmap) else None,
    }


def _describe_split(split: Split, classes: tuple[str, ...]) -> dict[str, Any]:
    counts = np.bincount(split.labels, minlength=len(classes)).tolist()
    return {
        "shape": list(split.images.shape),
        "dtype": str(split.images.dtype),
        "per_class": dict(zip(classes, counts, strict=True)),
    }


def plot_augmentations(recipe: Recipe, out: Path, count: int) -> dict[str, Any]:
    """Writes the picture of `count` training images under the recipe's augmentation to `out`, a PNG.

    A block for each op and one for the whole list, all by the same draws, so that a block shows its op's part in the
    whole; and one for each policy, with a row for each of its operations. A mixer mixes the images of the picture.
    Which images, and the draws, follow from the seed. Errors: `UsageError`, `DiskError`, those of `cifar.load`.
    """
    ops = parse_augment(recipe.augment)
    plotting.require_png(out)
    if not 1 <= count <= MAX_GRID_IMAGES:
        raise UsageError(f"--count {count} images do not make a picture", f"choose 1 to {MAX_GRID_IMAGES}")
    data = cifar.load_dataset(recipe.data, recipe.dataset)
    chosen = np.random.Generator(np.random.Philox(key=recipe.seed)).permutation(len(data.train.labels))[:count]
    chosen = chosen[np.argsort(data.train.labels[chosen], kind="stable")]
    images = torch.from_numpy(np.stack([data.train.images[index] for index in chosen]))
    names = [data.classes[label] for label in data.train.labels[chosen]]
    columns = ["original", *(f"epoch {epoch}" for epoch in range(SAMPLES_PER_ROW))]
    grids = []
    for places in [*([place] for place in range(len(ops)) if len(ops) > 1), list(range(len(ops)))]:
        shown = [_augment_images(ops, places, images, epoch, recipe) for epoch in range(SAMPLES_PER_ROW)]
        title = format_augment(tuple(ops[place] for place in places))
        grids.append(ImageGrid(title, _stack_columns([images, *shown]), names, columns))
    colours = (images.amax(1).int() - images.amin(1).int()).sum((1, 2))
    grids += [_policy_grid(op, images[colours.argmax()][None]) for op in ops if op.policy]
    plotting.plot_image_grids(out, grids)
    titles = [grid.title for grid in grids]
    return {"out": str(out), "images": chosen.tolist(), "classes": names, "blocks": titles, "seed": recipe.seed}


def _augment_images(
    ops: tuple[AugmentOp, ...], op_indices: list[int], images: Tensor, epoch: int, recipe: Recipe
) -> Tensor:
    """uint8 [n,3,32,32]: each image after the ops at `places`, by the draws that they have in the whole list."""
    before, mixer = split_mixer(ops)
    draws = draw_epoch(before, len(images), epoch, recipe.seed)
    order = torch.from_numpy(draws.permutation)
    at = [place for place in op_indices if place < len(before)]
    params = tuple({name: torch.from_numpy(array) for name, array in draws.op_params[place].items()} for place in at)
    batch = apply_augment(tuple(ops[place] for place in at), images[order], params, mean_color(recipe))
    if mixer and len(at) < len(op_indices):
        drawn = torch.from_numpy(draw_mixer_params(ops, len(images), epoch, recipe.seed))
        batch = MIXERS[mixer.name].apply(batch, drawn)[0].float().round().to(torch.uint8)
    augmented = torch.empty_like(batch)
    augmented[order] = batch
    return augmented


def _policy_grid(op: AugmentOp, image: Tensor) -> ImageGrid:
    """A row for each operation of a policy: the image [1,3,32,32], then by some of its magnitudes, in order."""
    assert op.policy is not None, op
    rows, names = [], []
    for name in op.policy.operations():
        all_of_them = op.policy.magnitudes(name)
        places = np.linspace(0, len(all_of_them) - 1, min(SAMPLES_PER_ROW, len(all_of_them))).round().astype(int)
        magnitudes = [all_of_them[place] for place in places]
        blank = torch.full_like(image, 255)
        shown = [apply_operation(image, name, magnitude) for magnitude in magnitudes]
        rows.append(torch.cat([image, *shown, *[blank] * (SAMPLES_PER_ROW - len(shown))]))
        names.append("\n".join([name, "  ".join(f"{magnitude:.3g}" for magnitude in magnitudes if any(magnitudes))]))
    columns = ["original", *[""] * SAMPLES_PER_ROW]
    return ImageGrid(
        f"{format_augment((op,))} by operation and magnitude", _stack_columns([*torch.stack(rows, 1)]), names, columns
    )


def _stack_columns(columns: list[Tensor]) -> np.ndarray:
    """Columns of images [rows,3,32,32] -> uint8 [rows, columns, 32, 32, 3]."""
    return torch.stack(columns, 1).permute(0, 1, 3, 4, 2).numpy()
