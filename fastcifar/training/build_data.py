"""The data of a run: the validation split, the loader, and normalized images.

Augmentations and loaders are implemented in `fastcifar.data`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcifar.data import cifar
from fastcifar.data.cifar import Split
from fastcifar.data.loaders import LOADERS, Loader
from fastcifar.data.normalization import mean_color
from fastcifar.training.distributed import World
from fastcifar.training.resolve import Resolved
from fastcifar.training.step import scale_and_shift


def split_validation(train: Split, val_size: int, val_seed: int) -> tuple[Split, Split]:
    """Split `train` into training and validation images, stratified by class.

    `val_size` is the number of validation images; with 0 all images are training images. The same `val_seed` selects
    the same images. Raises `UsageError` if `val_size` does not fit the number of images.
    """
    if val_size == 0:
        return train, Split(train.images[:0], train.labels[:0])
    train_index, val_index = cifar.stratified_split(train.labels, val_size, val_seed)
    return (
        Split(train.images[train_index], train.labels[train_index]),
        Split(train.images[val_index], train.labels[val_index]),
    )


def build_loader(split: Split, resolved: Resolved, world: World) -> Loader:
    """Return the loader of this rank's share of each batch of `split`, with all augmentations but the mixer.

    Raises `UsageError` if the batch size does not fit the split or the number of ranks, and `DeviceError` if the
    loader cannot run on this machine.
    """
    recipe, execution = resolved.recipe, resolved.execution
    return LOADERS[execution.loader](
        split.images,
        split.labels,
        batch_size=recipe.batch_size,
        augment=resolved.pixel_ops,
        seed=recipe.seed,
        device=torch.device(execution.device),
        fill_color=mean_color(resolved.mean),
        compile=execution.compile,
        workers=recipe.workers,
        drop_last=recipe.drop_last,
        rank=world.rank,
        world_size=world.world_size,
    )


def normalize_images(split: Split, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    """Return the images of `split`, normalized as in training: float32 [n,3,h,w] on `device`."""
    scale, shift = (tensor.to(device) for tensor in scale_and_shift(mean, std))
    return torch.tensor(split.images).to(device) * scale + shift
