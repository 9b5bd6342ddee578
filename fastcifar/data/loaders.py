"""Loaders: `LOADERS`, the ways from a data set in memory to augmented batches on the device.

Every loader yields uint8 channels_last images and int64 labels, in the same order for the same (seed, epoch), and the
same ones but for the torchvision baseline, whose augmentations draw for themselves. A loader holds no state that would
need saving; it must not normalise or cast (the training step does), nor wait for the device inside an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastcifar.data.augment import (
    CIFAR_IMAGE_SIZE,
    AugmentOp,
    FillColor,
    draw_epoch,
    draw_mixer_params,
    parse_augment,
    split_mixer,
)
from fastcifar.data.batch_slicing import slice_epoch
from fastcifar.data.cifar_files import Split
from fastcifar.data.compiled_augment import (
    compile_gather,
    eager_gather,
    split_by_step,
    split_params_by_step,
    upload_array,
)
from fastcifar.data.dali import DaliLoader
from fastcifar.data.torchvision_loader import TorchvisionLoader
from fastcifar.errors import UsageError

UPLOAD_IMAGES = 8192  # images of one upload: 25 MB of pinned memory, not a second copy of the set


class TensorLoader:
    """The data set resident on the device; gather and augmentation of a batch in one compiled kernel.

    images      uint8 numpy [n,3,32,32], planar; may be a read-only memory map (it is copied)
    labels      int64 numpy [n]
    batch_size  images of a step over all ranks; the last one of an epoch is shorter unless `drop_last`
    augment     the ops, in order, from `augment.parse`
    seed        of the permutations and draws, >= 0
    fill        the mean colour, 0..255 for each channel, that ops fill with
    compile     False runs the eager twin, whose batches are the same bit for bit
    rank, ranks  this process and how many there are: of each step it takes every `ranks`-th image from `rank` on

    Raises `UsageError` for a `batch_size` that does not fit n or `ranks` (see `steps.cut`).
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        batch_size: int,
        augment: tuple[AugmentOp, ...],
        seed: int,
        device: torch.device | str,
        fill_color: FillColor = (0, 0, 0),
        compile: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert images.dtype == np.uint8, images.dtype
        assert images.ndim == 4, images.shape
        assert len(images) == len(labels), (len(images), len(labels))
        assert all(0 <= value <= 255 for value in fill_color), fill_color
        self.num_samples = len(images)
        self.slicing = slice_epoch(self.num_samples, batch_size, drop_last, rank, world_size)
        self.steps_per_epoch = self.slicing.steps_per_epoch
        self.batch_size = batch_size
        self._ops, self._fill_color, self._seed = augment, fill_color, seed
        self._device = torch.device(device)
        self._labels = np.array(labels, dtype=np.int64)
        # NHWC, seen as rows of 96 bytes: the output is channels_last without a copy.
        self._rows = torch.empty(
            self.num_samples, CIFAR_IMAGE_SIZE, 3 * CIFAR_IMAGE_SIZE, dtype=torch.uint8, device=self._device
        )
        for start in range(0, self.num_samples, UPLOAD_IMAGES):
            part = upload_array(images[start : start + UPLOAD_IMAGES], self._device)
            self._rows[start : start + UPLOAD_IMAGES] = part.permute(0, 2, 3, 1).flatten(2)
        self._gather = (
            compile_gather(augment, fill_color, self.num_samples, self.slicing.local_batch_size, self._device)
            if compile
            else eager_gather(augment, fill_color)
        )

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's batches from `start_step` on: (images uint8 channels_last [b,3,32,32], labels int64 [b]).

        Over all ranks every sample comes once an epoch (but for what `drop_last` drops). Starting late gives exactly
        the batches that the whole epoch would have given from there, and nothing else is needed to resume.
        """
        assert 0 <= start_step <= self.steps_per_epoch, (start_step, self.steps_per_epoch)
        draws = draw_epoch(self._ops, self.num_samples, epoch, self._seed)
        order = split_by_step(self.slicing, draws.permutation.astype(np.int32), self._device)
        labels = split_by_step(self.slicing, self._labels[draws.permutation], self._device)
        params = split_params_by_step(self.slicing, draws.op_params, self._device)
        for step in range(start_step, self.steps_per_epoch):
            with torch.no_grad():  # a caller that changes the grad mode would have the kernel compiled anew
                images = self._gather(self._rows, order[step], params[step])
            # The last batch is computed at full size, so that one static shape serves the whole epoch, and cut here.
            count = self.slicing.local_count(step)
            yield images[:count], labels[step][:count]


Loader = TensorLoader | DaliLoader | TorchvisionLoader

LOADERS: dict[str, type[TensorLoader] | type[DaliLoader] | type[TorchvisionLoader]] = {
    "tensor": TensorLoader,
    "dali": DaliLoader,
    "torchvision": TorchvisionLoader,  # the baseline of comparison
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
    """Augmented batches of `split` for a loop of one's own, `epochs` times over, as `TensorLoader` gives them.

    Yields images uint8 channels_last [b,3,32,32] and labels int64 [b] on `device`. `compile` pays after a few hundred
    batches. Raises `UsageError` for a wrong `augment`, one with a mixer, or a `batch_size` larger than the split.
    """
    ops, mixer = split_mixer(parse_augment(augment))
    if mixer:
        raise UsageError(f"batches(): {mixer.name} is applied in the training step", "leave it out, or use train()")
    loader = TensorLoader(
        split.images, split.labels, batch_size=batch_size, augment=ops, seed=seed, device=device, compile=compile
    )
    for epoch in range(epochs):
        yield from loader.batches(epoch)


def mixed_batches(
    loader: Loader, ops: tuple[AugmentOp, ...], epoch: int, seed: int, device: torch.device, start_step: int = 0
) -> Iterator[tuple[Tensor, ...]]:
    """What a training step takes: the loader's batches, and if `ops` end in a mixer what it draws for them too.

    So (images, labels) or (images, labels, drawn [b] or [b,k]). `ops` is the whole list, of which a loader knows only
    what it applies: this is the same for all of them.
    """
    batches = loader.batches(epoch, start_step)
    if split_mixer(ops)[1] is None:
        yield from batches
        return
    drawn = split_by_step(loader.slicing, draw_mixer_params(ops, loader.num_samples, epoch, seed), device)
    for step, (images, labels) in enumerate(batches, start_step):
        yield images, labels, drawn[step][: len(labels)]


def eval_batches(
    images: np.ndarray, labels: np.ndarray, batch_size: int, device: torch.device | str
) -> Iterator[tuple[Tensor, Tensor]]:
    """The set in order, as it is: (images uint8 channels_last [b,3,32,32], labels int64 [b]) on the device.

    `images` is uint8 numpy [n,3,32,32], planar, perhaps a memory map, of which one batch at a time is read and
    uploaded; the last batch may be shorter.
    """
    assert len(images) == len(labels), (len(images), len(labels))
    assert batch_size > 0, batch_size
    device = torch.device(device)
    for start in range(0, len(images), batch_size):
        part = upload_array(images[start : start + batch_size], device)
        wanted = upload_array(np.asarray(labels[start : start + batch_size], dtype=np.int64), device)
        yield part.contiguous(memory_format=torch.channels_last), wanted
