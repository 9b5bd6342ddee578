"""Loaders: `LOADERS`, the ways from a data set in memory to augmented batches on the device.

Every loader yields uint8 channels_last images and int64 labels, and the same ones for the same (seed, epoch):
what differs is only where the work is done. A loader holds no state that would need saving; it must not normalise
or cast (the training step does), and must not wait for the device inside an epoch.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from fastcifar.data.augment import Fill, Op, Params, apply, draw_epoch
from fastcifar.errors import UsageError

UPLOAD = 8192  # images of one upload: 25 MB of pinned memory, not a second copy of the set
ALIGNED = 16  # elements: the rows of an epoch's draws start at multiples of this many (see `_rows`)

# The compiler would cut a chain of ops in two at its thresholds, and pass int32 rows between the parts through memory.
# It would also check every index: those of the ops are clamped or mirrored into the image, those of the order are a
# permutation, and a quarter of the time is saved on a CPU. The eager twin keeps its checks.
ONE_KERNEL = {
    "realize_opcount_threshold": 10_000,
    "realize_acc_reads_threshold": 10_000,
    "assert_indirect_indexing": False,
}


class TensorLoader:
    """The data set resident on the device; gather and augmentation of a batch in one compiled kernel.

    images      uint8 numpy [n,3,32,32], planar; may be a read-only memory map (it is copied)
    labels      int64 numpy [n]
    batch_size  images of a batch; the last one of an epoch is shorter unless `drop_last`
    augment     the ops, in order, from `augment.parse`
    seed        of the permutations and draws, >= 0
    fill        the mean colour, 0..255 for each channel, that ops fill with
    compile     False runs the eager twin, whose batches are the same bit for bit

    Raises `UsageError` if `batch_size` exceeds n.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        batch_size: int,
        augment: tuple[Op, ...],
        seed: int,
        device: torch.device | str,
        fill: Fill = (0, 0, 0),
        compile: bool = True,
        drop_last: bool = False,
    ) -> None:
        assert images.dtype == np.uint8, images.dtype
        assert images.ndim == 4, images.shape
        assert len(images) == len(labels), (len(images), len(labels))
        assert batch_size > 0, batch_size
        self.samples = len(images)
        if batch_size > self.samples:
            raise UsageError(
                f"--batch-size {batch_size} is larger than the {self.samples:,} training images",
                f"choose at most {self.samples}",
            )
        self.batch_size = batch_size
        self.steps_per_epoch = self.samples // batch_size if drop_last else -(-self.samples // batch_size)
        self._ops, self._fill, self._seed = augment, fill, seed
        self._device = torch.device(device)
        self._labels = np.array(labels, dtype=np.int64)
        # NHWC, so that a pixel is three adjacent bytes and the output is channels_last without a copy.
        self._pixels = torch.empty(self.samples, *images.shape[2:], 3, dtype=torch.uint8, device=self._device)
        for start in range(0, self.samples, UPLOAD):
            part = _upload(images[start : start + UPLOAD], self._device)
            self._pixels[start : start + UPLOAD] = part.permute(0, 2, 3, 1)
        self._eager = functools.partial(_gather, augment, fill)
        self._full = _compiled(augment, fill, self.samples, batch_size, self._device) if compile else self._eager

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches from `start_step` on: (images uint8 channels_last [b,3,32,32], labels int64 [b]).

        Every sample comes once an epoch (but for what `drop_last` drops). Starting late gives exactly the batches that
        the whole epoch would have given from there, and nothing else is needed to resume.
        """
        assert 0 <= start_step <= self.steps_per_epoch, (start_step, self.steps_per_epoch)
        draws = draw_epoch(self._ops, self.samples, epoch, self._seed)
        order = self._rows(draws.order.astype(np.int32))
        labels = self._rows(self._labels[draws.order])
        params = [{name: self._rows(array) for name, array in drawn.items()} for drawn in draws.params]
        for step in range(start_step, self.steps_per_epoch):
            count = min(self.batch_size, self.samples - step * self.batch_size)
            gather = self._full if count == self.batch_size else self._eager
            drawn = tuple({name: rows[step, :count] for name, rows in of_op.items()} for of_op in params)
            yield gather(self._pixels, order[step, :count], drawn), labels[step, :count]

    def _rows(self, array: np.ndarray) -> Tensor:
        """[n] on the host -> [steps, batch_size and padding] on the device; row i is the slice of batch i.

        The padding starts each row on an aligned address: a compiled kernel copies every misaligned input first.
        """
        width = self.batch_size
        array = array[: self.steps_per_epoch * width]
        whole = len(array) // width
        rows = np.zeros((self.steps_per_epoch, -(-width // ALIGNED) * ALIGNED), dtype=array.dtype)
        rows[:whole, :width] = array[: whole * width].reshape(whole, width)
        rows[whole:, : len(array) - whole * width] = array[whole * width :]
        return _upload(rows, self._device)


LOADERS = {"tensor": TensorLoader}


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
        part = _upload(images[start : start + batch_size], device)
        wanted = _upload(np.asarray(labels[start : start + batch_size], dtype=np.int64), device)
        yield part.contiguous(memory_format=torch.channels_last), wanted


def _gather(ops: tuple[Op, ...], fill: Fill, pixels: Tensor, order: Tensor, params: tuple[Params, ...]) -> Tensor:
    """The samples `order` [b] of `pixels` [n,32,32,3], augmented: uint8 channels_last [b,3,32,32]."""
    return apply(ops, pixels[order].permute(0, 3, 1, 2), params, fill)


@functools.lru_cache(maxsize=64)
def _compiled(
    ops: tuple[Op, ...], fill: Fill, samples: int, batch_size: int, device: torch.device
) -> Callable[[Tensor, Tensor, tuple[Params, ...]], Tensor]:
    """`_gather` compiled for one setting and one static shape, shared by all loaders of that setting.

    The compiler keeps its variants, and their small limit, with the code object: each setting gets a code object of
    its own, or the ninth setting of a sweep would fail.
    """

    def gather(pixels: Tensor, order: Tensor, params: tuple[Params, ...]) -> Tensor:
        return _gather(ops, fill, pixels, order, params)

    own = types.FunctionType(gather.__code__.replace(), globals(), "gather", None, gather.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False, options=ONE_KERNEL)


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy of `array` on `device`; to a GPU through pinned memory, without waiting."""
    host = torch.from_numpy(np.array(array, order="C"))  # a copy: torch refuses to be quiet about read-only arrays
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
