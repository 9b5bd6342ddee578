"""How an epoch is cut into steps, and a step into the shares of the ranks: one rule for every loader.

It only slices: what is sliced (the permutation, the draws) does not depend on batch size or ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastcifar.errors import UsageError


@dataclass(frozen=True)
class Steps:
    """Step s is the positions [s * batch_size, (s + 1) * batch_size) of the epoch; rank r takes `r::ranks` of them.

    So N ranks interleave to exactly the batches of one, and all have the same steps. A short last batch is shared out
    the same way: shares may differ by one image, and none is empty (see `cut`).

    samples     images of the set, positions of an epoch
    batch_size  images of a step, over all ranks
    """

    samples: int
    batch_size: int
    drop_last: bool = False
    rank: int = 0
    ranks: int = 1

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch; the last one may be shorter, or is left out if `drop_last`."""
        return self.samples // self.batch_size if self.drop_last else -(-self.samples // self.batch_size)

    @property
    def share(self) -> int:
        """Images of this rank in a full step."""
        return self.batch_size // self.ranks

    def count(self, step: int) -> int:
        """Images of this rank in `step`: its share, but for a short last step."""
        images = min(self.batch_size, self.samples - step * self.batch_size)
        return len(range(self.rank, images, self.ranks))

    def table(self, array: np.ndarray, aligned: int = 1) -> np.ndarray:
        """[n, ...] over positions -> [steps, width, ...]: row s begins with this rank's share of step s.

        `width` is the share rounded up to a multiple of `aligned` elements. What is beyond the `count` of a row is
        filled up with the epoch's first element, a valid draw.
        """
        steps, rest = self.per_epoch, array.shape[1:]
        whole = np.full((steps * self.batch_size, *rest), array[0], dtype=array.dtype)
        kept = array[: len(whole)]
        whole[: len(kept)] = kept
        rows = np.full((steps, -(-self.share // aligned) * aligned, *rest), array[0], dtype=array.dtype)
        rows[:, : self.share] = whole.reshape(steps, self.batch_size, *rest)[:, self.rank :: self.ranks]
        return rows


def cut(samples: int, batch_size: int, drop_last: bool, rank: int = 0, ranks: int = 1) -> Steps:
    """The steps of an epoch of `samples` images as rank `rank` of `ranks` takes them.

    Raises `UsageError` if `batch_size` exceeds `samples` or cannot be shared out equally, and if the last batch would
    leave a rank without an image: BatchNorm has no statistics of nothing.
    """
    assert batch_size > 0, batch_size
    assert 0 <= rank < ranks, (rank, ranks)
    if batch_size > samples:
        raise UsageError(
            f"--batch-size {batch_size} is larger than the {samples:,} training images", f"choose at most {samples}"
        )
    if batch_size % ranks:
        near = max(batch_size // ranks, 1) * ranks
        raise UsageError(
            f"--batch-size {batch_size} cannot be shared out equally to {ranks} processes",
            f"it is the images of a step over all of them: choose a multiple of {ranks}, such as {near}",
        )
    if not drop_last and 0 < samples % batch_size < ranks:
        raise UsageError(
            f"the last batch of an epoch has {samples % batch_size} images ({samples:,} in batches of {batch_size}), "
            f"fewer than the {ranks} processes",
            "use --drop-last or another --batch-size",
        )
    return Steps(samples, batch_size, drop_last, rank, ranks)
