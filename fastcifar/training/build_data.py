"""A run's images, as its recipe has them: split, normalised, and fed by a loader of its own.

What an augmentation does, and how a batch is made, is the business of `data`; nothing here knows a network.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from fastcifar.data import cifar
from fastcifar.data.augment import AugmentOp
from fastcifar.data.cifar import Split
from fastcifar.data.loaders import LOADERS, Loader
from fastcifar.data.normalization import mean_color, normalization_mean_std
from fastcifar.device import ExecutionPlan
from fastcifar.recipe import Recipe
from fastcifar.training.distributed import World
from fastcifar.training.step import scale_and_shift


def split_validation(train: Split, val_size: int, val_seed: int) -> tuple[Split, Split]:
    """The training images without the validation split, and the split."""
    if val_size == 0:
        return train, Split(train.images[:0], train.labels[:0])
    train_index, val_index = cifar.stratified_split(train.labels, val_size, val_seed)
    return (
        Split(train.images[train_index], train.labels[train_index]),
        Split(train.images[val_index], train.labels[val_index]),
    )


def build_loader(
    split: Split, ops: tuple[AugmentOp, ...], recipe: Recipe, execution: ExecutionPlan, world: World
) -> Loader:
    """The chosen loader of this rank's shares of `split`. Errors: `UsageError`, `DeviceError`."""
    kind = LOADERS[execution.loader]
    takes = inspect.signature(kind).parameters
    own = {"compile": execution.compile, "workers": recipe.workers}
    return kind(
        split.images,
        split.labels,
        batch_size=recipe.batch_size,
        augment=ops,
        seed=recipe.seed,
        device=torch.device(execution.device),
        fill_color=mean_color(recipe),
        drop_last=recipe.drop_last,
        rank=world.rank,
        world_size=world.world_size,
        **{name: value for name, value in own.items() if name in takes},
    )


def normalize_images(split: Split, recipe: Recipe, device: torch.device) -> Tensor:
    """Images of `split` as the network sees them, but in float32: [n,3,h,w] on the device."""
    scale, shift = (part.to(device) for part in scale_and_shift(*normalization_mean_std(recipe)))
    return torch.tensor(split.images).to(device) * scale + shift
