"""A run's images, as its recipe has them: split, normalised, and fed by a loader of its own.

What an augmentation does, and how a batch is made, is the business of `data`; nothing here knows a network.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from fastcifar.data import cifar
from fastcifar.data.augment import Fill, Op
from fastcifar.data.cifar import Split
from fastcifar.data.loaders import LOADERS, Loader
from fastcifar.device import Choice
from fastcifar.recipe import Recipe
from fastcifar.training.distributed import World
from fastcifar.training.step import scale_and_shift


def split_off(train: Split, val_size: int, val_seed: int) -> tuple[Split, Split]:
    """The training images without the validation split, and the split."""
    if val_size == 0:
        return train, Split(train.images[:0], train.labels[:0])
    train_index, val_index = cifar.split(train.labels, val_size, val_seed)
    return (
        Split(train.images[train_index], train.labels[train_index]),
        Split(train.images[val_index], train.labels[val_index]),
    )


def loader_of(split: Split, ops: tuple[Op, ...], recipe: Recipe, choice: Choice, here: World) -> Loader:
    """The chosen loader of this rank's shares of `split`. Errors: `UsageError`, `DeviceError`."""
    kind = LOADERS[choice.loader]
    takes = inspect.signature(kind).parameters
    own = {"compile": choice.compile, "workers": recipe.workers}
    return kind(
        split.images,
        split.labels,
        batch_size=recipe.batch_size,
        augment=ops,
        seed=recipe.seed,
        device=torch.device(choice.device),
        fill=mean_colour(recipe),
        drop_last=recipe.drop_last,
        rank=here.rank,
        ranks=here.ranks,
        **{name: value for name, value in own.items() if name in takes},
    )


def normalised(split: Split, recipe: Recipe, device: torch.device) -> Tensor:
    """Images of `split` as the network sees them, but in float32: [n,3,h,w] on the device."""
    scale, shift = (part.to(device) for part in scale_and_shift(*normalisation(recipe)))
    return torch.tensor(split.images).to(device) * scale + shift


def normalisation(recipe: Recipe) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of pixels in [0, 1]."""
    return cifar.normalisation(normalisation_name(recipe))


def normalisation_name(recipe: Recipe) -> str:
    """What `auto` means: the data set's own, but on CIFAR-10 what the coconut networks were published with."""
    if recipe.normalise != "auto":
        return recipe.normalise
    return "kuangliu" if recipe.dataset == "cifar10" and recipe.arch.startswith("coconut") else recipe.dataset


def mean_colour(recipe: Recipe) -> Fill:
    """What augmentations fill with, 0..255 for each channel: it is 0 after normalisation."""
    red, green, blue = (round(255 * value) for value in normalisation(recipe)[0])
    return red, green, blue
