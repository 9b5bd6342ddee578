"""The table of loaders, `LOADERS`, the loader that keeps the data set on the device, and functions that use loaders."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastcifar.data.augment import (
    CIFAR_IMAGE_SIZE,
    AugmentOps,
    AugmentParams,
    draw_mixer_params,
    parse_augment,
    split_mixer,
)
from fastcifar.data.batch_loader import Loader, split_by_step, split_params_by_step, upload_array
from fastcifar.data.cifar_files import Split
from fastcifar.data.dali import DaliLoader
from fastcifar.data.torchvision_loader import TorchvisionLoader
from fastcifar.errors import UsageError

UPLOAD_IMAGES = 8192  # images per upload: 25 MB of pinned memory instead of a second copy of the data set


class TensorLoader(Loader):
    """Loader that keeps the data set on the device; one compiled kernel gathers and augments a batch."""

    def _prepare(self, images: np.ndarray) -> None:
        # NHWC, viewed as rows of 96 bytes, so that the output is channels_last without a copy.
        shape = (self.num_samples, CIFAR_IMAGE_SIZE, 3 * CIFAR_IMAGE_SIZE)
        self._rows = torch.empty(shape, dtype=torch.uint8, device=self._device)
        for start in range(0, self.num_samples, UPLOAD_IMAGES):
            uploaded = upload_array(images[start : start + UPLOAD_IMAGES], self._device)
            self._rows[start : start + UPLOAD_IMAGES] = uploaded.permute(0, 2, 3, 1).flatten(2)
        self._gather = self._make_gather(self._ops, self.num_samples)

    def _image_batches(self, epoch: int, params: AugmentParams, start_step: int) -> Iterator[Tensor]:
        indices = split_by_step(self.slicing, params.permutation.astype(np.int32), self._device)
        op_params = split_params_by_step(self.slicing, params.op_params, self._device)
        for step in range(start_step, self.steps_per_epoch):
            with torch.no_grad():  # a change of the grad mode by the caller would trigger a recompilation
                images = self._gather(self._rows, indices[step], op_params[step])
            yield images


LOADERS: dict[str, type[Loader]] = {
    "tensor": TensorLoader,
    "dali": DaliLoader,
    "torchvision": TorchvisionLoader,  # the baseline for comparisons
}


def batches(
    split: Split,
    *,
    batch_size: int = 128,
    augment: str = "crop:4:zero,flip",
    seed: int = 0,
    epochs: int = 1,
    device: torch.device | str = "cpu",
    compile: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the augmented batches of `TensorLoader` for `epochs` epochs over `split`, for a custom training loop.

    Batches are images uint8 channels_last [b,3,32,32] and labels int64 [b]. `compile` pays off after a few hundred
    batches. Raises `UsageError` if `augment` is invalid or contains a mixer, or if `batch_size` is too large.
    """
    ops, mixer = split_mixer(parse_augment(augment))
    if mixer:
        raise UsageError(f"batches(): {mixer.name} is applied in the training step", "remove it, or use train()")
    loader = TensorLoader(
        split.images, split.labels, batch_size=batch_size, augment=ops, seed=seed, device=device, compile=compile
    )
    for epoch in range(epochs):
        yield from loader.batches(epoch)


def mixed_batches(
    loader: Loader, ops: AugmentOps, epoch: int, seed: int, device: torch.device, start_step: int = 0
) -> Iterator[tuple[Tensor, ...]]:
    """Yield the batches of `loader` and, as a third element if `ops` ends with a mixer, its parameters [b] or [b,k]."""
    loader_batches = loader.batches(epoch, start_step)
    if split_mixer(ops)[1] is None:
        yield from loader_batches
        return
    mixer_params = split_by_step(loader.slicing, draw_mixer_params(ops, loader.num_samples, epoch, seed), device)
    for step, (images, labels) in enumerate(loader_batches, start_step):
        yield images, labels, mixer_params[step][: len(labels)]


def eval_batches(
    images: np.ndarray, labels: np.ndarray, batch_size: int, device: torch.device | str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the data in order without augmentation: (images uint8 channels_last [b,3,32,32], labels int64 [b])."""
    assert len(images) == len(labels), (len(images), len(labels))
    device = torch.device(device)
    for start in range(0, len(images), batch_size):
        image_batch = upload_array(images[start : start + batch_size], device)
        label_batch = upload_array(np.asarray(labels[start : start + batch_size], dtype=np.int64), device)
        yield image_batch.contiguous(memory_format=torch.channels_last), label_batch
