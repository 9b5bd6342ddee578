"""Division of an epoch into steps, and of a step into the shares of the ranks, the same for every loader.

The arrays that are sliced (the permutation and the augmentation parameters) depend on neither batch size nor ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastcifar.errors import UsageError


@dataclass(frozen=True)
class BatchSlicing:
    """The slices of an epoch: step s is the positions [s * batch_size, (s + 1) * batch_size), and rank r takes
    `r::world_size` of them.

    The shares of all ranks interleave to exactly the batches of a single process, and all ranks have the same number of
    steps. A short last batch is divided in the same way: shares may differ by one image, and none is empty (see
    `slice_epoch`).

    num_samples  number of images in the data set, and of positions in an epoch
    batch_size   global batch size
    """

    num_samples: int
    batch_size: int
    drop_last: bool = False
    rank: int = 0
    world_size: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in an epoch; the last one may be shorter, and is dropped if `drop_last`."""
        return self.num_samples // self.batch_size if self.drop_last else -(-self.num_samples // self.batch_size)

    @property
    def local_batch_size(self) -> int:
        """Number of images of this rank in a full step."""
        return self.batch_size // self.world_size

    def local_count(self, step: int) -> int:
        """Return the number of images of this rank in `step`, which is smaller in a short last step."""
        num_images = min(self.batch_size, self.num_samples - step * self.batch_size)
        return len(range(self.rank, num_images, self.world_size))

    def step_table(self, array: np.ndarray, alignment: int = 1) -> np.ndarray:
        """Rearrange an array [n, ...] over positions to [steps, width, ...], this rank's share of each step.
        `width` is `local_batch_size` rounded up to a multiple of `alignment` elements. Elements of a row beyond
        `local_count` repeat the first element of the epoch, which is always a valid value.
        """
        steps, item_shape = self.steps_per_epoch, array.shape[1:]
        padded = np.full((steps * self.batch_size, *item_shape), array[0], dtype=array.dtype)
        kept = array[: len(padded)]
        padded[: len(kept)] = kept
        width = -(-self.local_batch_size // alignment) * alignment
        table = np.full((steps, width, *item_shape), array[0], dtype=array.dtype)
        by_step = padded.reshape(steps, self.batch_size, *item_shape)
        table[:, : self.local_batch_size] = by_step[:, self.rank :: self.world_size]
        return table


def slice_epoch(num_samples: int, batch_size: int, drop_last: bool, rank: int = 0, world_size: int = 1) -> BatchSlicing:
    """Return the slicing of an epoch of `num_samples` images for process `rank` of `world_size`.

    Raises `UsageError` if `batch_size` exceeds `num_samples` or is not divisible by `world_size`, and if the last batch
    would leave a rank without an image, because BatchNorm cannot compute the statistics of an empty batch.
    """
    assert batch_size > 0, batch_size
    assert 0 <= rank < world_size, (rank, world_size)
    if batch_size > num_samples:
        raise UsageError(
            f"--batch-size {batch_size} is larger than the {num_samples:,} training images",
            f"choose at most {num_samples}",
        )
    if batch_size % world_size:
        nearest = max(batch_size // world_size, 1) * world_size
        raise UsageError(
            f"--batch-size {batch_size} is not divisible by the {world_size} processes",
            f"it is the global batch size: choose a multiple of {world_size}, such as {nearest}",
        )
    if not drop_last and 0 < num_samples % batch_size < world_size:
        raise UsageError(
            f"the last batch of an epoch has {num_samples % batch_size} images "
            f"({num_samples:,} in batches of {batch_size}), fewer than the {world_size} processes",
            "use --drop-last or another --batch-size",
        )
    return BatchSlicing(num_samples, batch_size, drop_last, rank, world_size)
