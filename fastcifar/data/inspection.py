"""Results of `fastcifar data`: a description of a data set, and image grids that show an augmentation list."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from fastcifar import plotting
from fastcifar.data import augment, cifar, normalization
from fastcifar.data.cifar import Split
from fastcifar.data.image_ops import apply_operation
from fastcifar.data.mixers import MIXERS
from fastcifar.errors import UsageError
from fastcifar.plotting import ImageGrid
from fastcifar.recipe import Recipe

BATCH_IMAGES, BATCH_IMAGES_PER_GRID = 24, 8  # images of a batch that are plotted
SAMPLES_PER_ROW = 4  # augmented versions next to the original, one per epoch
MAX_GRID_IMAGES = 100


class DatasetDescription(TypedDict):
    """The document of `data verify`. `cache` is the folder of the cache entry, None if the images are in memory.

    A label is the index of a class in `classes`.
    """

    dataset: str
    title: str  # the name, or the kind for own images
    kind: str
    source: str
    official: bool
    classes: list[str]
    splits: dict[str, dict[str, Any]]  # `shape`, `dtype` and `per_class` (images by name of the class) of each split
    digest: str  # SHA-256 of the images and labels for training and validation
    mean: normalization.ChannelValues  # of the training images, or of those of a test set alone
    std: normalization.ChannelValues
    cache: str | None


class GridsDescription(TypedDict):
    """The document of `data show`: the image file, indices and class names of the images, and titles of the grids."""

    out: str
    images: list[int]
    classes: list[str]
    blocks: list[str]
    seed: int


def verify_dataset(recipe: Recipe) -> DatasetDescription:
    """Read and check the files of the recipe's data set, even if they are cached, and return their description."""
    data = cifar.load_recipe_dataset(recipe, refresh_cache=True)
    images = data.all_splits.get("train", data.test).images
    mean, std = normalization.channel_mean_std(images)
    splits = {}
    for name, split in data.all_splits.items():
        shape, dtype, per_class = list(split.images.shape), str(split.images.dtype), data.count_by_class(split)
        splits[name] = {"shape": shape, "dtype": dtype, "per_class": per_class}
    return {
        "dataset": data.name,
        "title": data.title,
        "kind": data.source_type,
        "source": data.source,
        "official": data.is_official,
        "classes": list(data.classes),
        "splits": splits,
        "digest": data.digest,
        "mean": mean,
        "std": std,
        # Only arrays from the cache are memory-mapped.
        "cache": str(Path(str(images.filename)).parent) if isinstance(images, np.memmap) else None,
    }


def plot_augmentations(recipe: Recipe, out: Path, count: int) -> GridsDescription:
    """Plot images before and after each augmentation, after all of them, and one image after each policy operation."""
    ops = augment.parse_augment(recipe.augment)
    plotting.require_png(out)
    if not 1 <= count <= MAX_GRID_IMAGES:
        raise UsageError(f"--count {count} is out of range", f"choose 1 to {MAX_GRID_IMAGES}")
    data = cifar.load_recipe_dataset(recipe)
    data.require_training_images()
    recipe = normalization.with_own_normalization(recipe, data)
    indices = np.random.Generator(np.random.Philox(key=recipe.seed)).permutation(len(data.train.labels))[:count]
    indices = indices[np.argsort(data.train.labels[indices], kind="stable")]
    images = data.train.images[indices]
    names = [data.classes[label] for label in data.train.labels[indices]]
    columns = ["original", *(f"epoch {epoch}" for epoch in range(SAMPLES_PER_ROW))]
    grids = []
    for selected in [*([index] for index in range(len(ops)) if len(ops) > 1), list(range(len(ops)))]:
        versions = [torch.from_numpy(images)]
        for epoch in range(SAMPLES_PER_ROW):
            order, batch_stages = _augment_batch(ops, selected, images, count, epoch, recipe)
            *_, batch = batch_stages.values()
            versions.append(batch[np.argsort(order)])
        title = augment.format_augment(tuple(ops[index] for index in selected))
        grids.append(ImageGrid(title, _stack_columns(versions), names, columns))
    colorfulness = np.ptp(images, axis=1).sum((1, 2), dtype=int)
    most_colorful = torch.from_numpy(images[colorfulness.argmax()])
    grids += [_policy_grid(op, most_colorful[None]) for op in ops if op.policy]
    plotting.plot_image_grids(out, grids)
    titles = [grid.title for grid in grids]
    return {"out": str(out), "images": indices.tolist(), "classes": names, "blocks": titles, "seed": recipe.seed}


def first_batch_stages(recipe: Recipe, train: Split) -> tuple[np.ndarray, dict[str, Tensor]]:
    """Return the labels int64 [b] of the first batch of a run, and its images uint8 [b,3,32,32] at each stage.

    `train`: the training images without the validation split. --loader torchvision draws other random numbers.
    """
    ops = augment.parse_augment(recipe.augment)
    indices, stages = _augment_batch(ops, range(len(ops)), train.images, recipe.batch_size, 0, recipe)
    return train.labels[indices], stages


def _augment_batch(
    ops: augment.AugmentOps, selected: Sequence[int], images: np.ndarray, count: int, epoch: int, recipe: Recipe
) -> tuple[np.ndarray, dict[str, Tensor]]:
    """Return the indices of the first `count` images of an epoch, and these images uint8 [b,3,32,32] at each stage.

    The stages are "original", "augmented" if a loader applies augmentations, and the name of the mixer if there is one.
    Of `ops`, those at the indices `selected` are applied, with the parameters drawn for the whole list.
    """
    loader_ops, mixer = augment.split_mixer(ops)
    epoch_params = augment.draw_epoch(loader_ops, len(images), epoch, recipe.seed)
    indices = epoch_params.permutation[:count]
    stages = {"original": torch.from_numpy(images[indices])}
    batch = stages["original"]
    if applied := [index for index in selected if index < len(loader_ops)]:
        params = tuple(
            {name: torch.from_numpy(array[:count]) for name, array in epoch_params.op_params[index].items()}
            for index in applied
        )
        mean, _ = normalization.normalization_mean_std(recipe)
        batch = augment.apply_augment(
            tuple(ops[index] for index in applied), batch, params, normalization.mean_color(mean)
        )
        stages["augmented"] = batch
    if mixer and len(loader_ops) in selected:
        mixer_params = augment.draw_mixer_params(ops, len(images), epoch, recipe.seed)[:count]
        mixed, _ = MIXERS[mixer.name].apply(batch, torch.from_numpy(mixer_params))
        stages[mixer.name] = mixed.float().round().to(torch.uint8)
    return indices, stages


def plot_first_batch(path: Path, recipe: Recipe, train: Split, classes: Sequence[str]) -> None:
    """Plot the first images of `first_batch_stages` with their classes."""
    labels, stages = first_batch_stages(recipe, train)
    images, names = _stack_columns(list(stages.values())), [classes[int(label)] for label in labels]
    grids = []
    for start in range(0, min(len(labels), BATCH_IMAGES), BATCH_IMAGES_PER_GRID):
        stop = start + BATCH_IMAGES_PER_GRID
        grids.append(ImageGrid("", images[start:stop], names[start:stop], list(stages)))
    plotting.plot_image_grids(path, grids, f"first batch of the run: {recipe.augment}")


def _policy_grid(op: augment.AugmentOp, image: Tensor) -> ImageGrid:
    """Return a grid with a row for each operation of a policy: `image` [1,3,32,32], then results by magnitude."""
    assert op.policy is not None, op
    rows, names = [], []
    for name in op.policy.operations():
        all_magnitudes = op.policy.magnitudes(name)
        num_samples = min(SAMPLES_PER_ROW, len(all_magnitudes))
        indices = np.linspace(0, len(all_magnitudes) - 1, num_samples).round().astype(int)
        magnitudes = [all_magnitudes[index] for index in indices]
        blank = torch.full_like(image, 255)
        results = [apply_operation(image, name, magnitude) for magnitude in magnitudes]
        rows.append(torch.cat([image, *results, *[blank] * (SAMPLES_PER_ROW - num_samples)]))
        names.append("\n".join([name, "  ".join(f"{magnitude:.3g}" for magnitude in magnitudes if any(magnitudes))]))
    title = f"{op} by operation and magnitude"
    return ImageGrid(title, _stack_columns([*torch.stack(rows, 1)]), names, ["original", *[""] * SAMPLES_PER_ROW])


def _stack_columns(columns: list[Tensor]) -> np.ndarray:
    """Stack columns of images [rows,3,32,32] into uint8 [rows, columns, 32, 32, 3]."""
    return torch.stack(columns, 1).permute(0, 1, 3, 4, 2).numpy()
