"""How an epoch is cut into steps, and a step into the shares of the ranks: one rule for every loader.

It only slices: what is sliced (the permutation, the draws) does not depend on batch size or ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastcifar.errors import UsageError


@dataclass(frozen=True)
class BatchSlicing:
    """Step s is the positions [s * batch_size, (s + 1) * batch_size) of the epoch; rank r takes `r::ranks` of them.

    So N ranks interleave to exactly the batches of one, and all have the same steps. A short last batch is shared out
    the same way: shares may differ by one image, and none is empty (see `cut`).

    samples     images of the set, positions of an epoch
    batch_size  images of a step, over all ranks
    """

    num_samples: int
    batch_size: int
    drop_last: bool = False
    rank: int = 0
    world_size: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch; the last one may be shorter, or is left out if `drop_last`."""
        return self.num_samples // self.batch_size if self.drop_last else -(-self.num_samples // self.batch_size)

    @property
    def local_batch_size(self) -> int:
        """Images of this rank in a full step."""
        return self.batch_size // self.world_size

    def local_count(self, step: int) -> int:
        """Images of this rank in `step`: its share, but for a short last step."""
        images = min(self.batch_size, self.num_samples - step * self.batch_size)
        return len(range(self.rank, images, self.world_size))

    def step_table(self, array: np.ndarray, alignment: int = 1) -> np.ndarray:
        """[n, ...] over positions -> [steps, width, ...]: row s begins with this rank's share of step s.

        `width` is the share rounded up to a multiple of `aligned` elements. What is beyond the `count` of a row is
        filled up with the epoch's first element, a valid draw.
        """
        steps, rest = self.steps_per_epoch, array.shape[1:]
        whole = np.full((steps * self.batch_size, *rest), array[0], dtype=array.dtype)
        kept = array[: len(whole)]
        whole[: len(kept)] = kept
        rows = np.full((steps, -(-self.local_batch_size // alignment) * alignment, *rest), array[0], dtype=array.dtype)
        rows[:, : self.local_batch_size] = whole.reshape(steps, self.batch_size, *rest)[:, self.rank :: self.world_size]
        return rows


def slice_epoch(num_samples: int, batch_size: int, drop_last: bool, rank: int = 0, world_size: int = 1) -> BatchSlicing:
    """The steps of an epoch of `samples` images as rank `rank` of `ranks` takes them.

    Raises `UsageError` if `batch_size` exceeds `samples` or cannot be shared out equally, and if the last batch would
    leave a rank without an image: BatchNorm has no statistics of nothing.
    """
    assert batch_size > 0, batch_size
    assert 0 <= rank < world_size, (rank, world_size)
    if batch_size > num_samples:
        raise UsageError(
            f"--batch-size {batch_size} is larger than the {num_samples:,} training images",
            f"choose at most {num_samples}",
        )
    if batch_size % world_size:
        near = max(batch_size // world_size, 1) * world_size
        raise UsageError(
            f"--batch-size {batch_size} cannot be shared out equally to {world_size} processes",
            f"it is the images of a step over all of them: choose a multiple of {world_size}, such as {near}",
        )
    if not drop_last and 0 < num_samples % batch_size < world_size:
        raise UsageError(
            f"the last batch of an epoch has {num_samples % batch_size} images ({num_samples:,} in batches of {batch_size}), "
            f"fewer than the {world_size} processes",
            "use --drop-last or another --batch-size",
        )
    return BatchSlicing(num_samples, batch_size, drop_last, rank, world_size)
