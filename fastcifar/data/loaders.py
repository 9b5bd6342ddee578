"""Loaders: `LOADERS`, the ways from a data set in memory to augmented batches on the device.

Every loader yields uint8 channels_last images and int64 labels, in the same order for the same (seed, epoch), and the
same ones but for the torchvision baseline, whose augmentations draw for themselves. A loader holds no state that would
need saving; it must not normalise or cast (the training step does), nor wait for the device inside an epoch.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from fastcifar.data.augment import SIDE, Fill, Op, Params, apply_rows, draw_epoch, parse
from fastcifar.data.official import Split
from fastcifar.data.steps import cut
from fastcifar.data.torchvision_loader import TorchvisionLoader

UPLOAD = 8192  # images of one upload: 25 MB of pinned memory, not a second copy of the set
ALIGNED = 16  # elements: a step's slice of the draws starts at a multiple of this many

# (rows uint8 [n,32,96], order int32 [b], parameters [b]) -> those samples, augmented: uint8 channels_last [b,3,32,32]
Gather = Callable[[Tensor, Tensor, tuple[Params, ...]], Tensor]

# The compiler would cut a chain of ops in two at its thresholds, and pass int32 rows between the parts through memory.
# It would also check every index: those of the ops are clamped or mirrored into the image, those of the order are a
# permutation, and a check in the innermost loop costs time. The eager twin keeps its own.
ONE_KERNEL = {
    "realize_opcount_threshold": 10_000,
    "realize_acc_reads_threshold": 10_000,
    "assert_indirect_indexing": False,
}


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
        augment: tuple[Op, ...],
        seed: int,
        device: torch.device | str,
        fill: Fill = (0, 0, 0),
        compile: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        assert images.dtype == np.uint8, images.dtype
        assert images.ndim == 4, images.shape
        assert len(images) == len(labels), (len(images), len(labels))
        assert all(0 <= value <= 255 for value in fill), fill
        self.samples = len(images)
        self.steps = cut(self.samples, batch_size, drop_last, rank, ranks)
        self.steps_per_epoch = self.steps.per_epoch
        self.batch_size = batch_size
        self._ops, self._fill, self._seed = augment, fill, seed
        self._device = torch.device(device)
        self._labels = np.array(labels, dtype=np.int64)
        # NHWC, seen as rows of 96 bytes: the output is channels_last without a copy.
        self._rows = torch.empty(self.samples, SIDE, 3 * SIDE, dtype=torch.uint8, device=self._device)
        for start in range(0, self.samples, UPLOAD):
            part = _upload(images[start : start + UPLOAD], self._device)
            self._rows[start : start + UPLOAD] = part.permute(0, 2, 3, 1).flatten(2)
        self._gather = (
            _compiled(augment, fill, self.samples, self.steps.share, self._device) if compile else _plain(augment, fill)
        )

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's batches from `start_step` on: (images uint8 channels_last [b,3,32,32], labels int64 [b]).

        Over all ranks every sample comes once an epoch (but for what `drop_last` drops). Starting late gives exactly
        the batches that the whole epoch would have given from there, and nothing else is needed to resume.
        """
        assert 0 <= start_step <= self.steps_per_epoch, (start_step, self.steps_per_epoch)
        draws = draw_epoch(self._ops, self.samples, epoch, self._seed)
        order = self._by_step(draws.order.astype(np.int32))
        labels = self._by_step(self._labels[draws.order])
        params = [{name: self._by_step(array) for name, array in drawn.items()} for drawn in draws.params]
        for step in range(start_step, self.steps_per_epoch):
            drawn = tuple({name: slices[step] for name, slices in of_op.items()} for of_op in params)
            with torch.no_grad():  # a caller that changes the grad mode would have the kernel compiled anew
                images = self._gather(self._rows, order[step], drawn)
            # The last batch is computed at full size, so that one static shape serves the whole epoch, and cut here.
            count = self.steps.count(step)
            yield images[:count], labels[step][:count]

    def _by_step(self, array: np.ndarray) -> tuple[Tensor, ...]:
        """[n] over positions, on the host -> this rank's share [share] of each step, on the device, in one upload.

        Shares start at aligned addresses: a compiled kernel copies every misaligned input first.
        """
        return _upload(self.steps.table(array, ALIGNED), self._device)[:, : self.steps.share].unbind(0)


Loader = TensorLoader | TorchvisionLoader

LOADERS: dict[str, type[TensorLoader] | type[TorchvisionLoader]] = {
    "tensor": TensorLoader,
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
    batches. Raises `UsageError` for a wrong `augment`, or a `batch_size` larger than the split.
    """
    ops = parse(augment)
    loader = TensorLoader(
        split.images, split.labels, batch_size=batch_size, augment=ops, seed=seed, device=device, compile=compile
    )
    for epoch in range(epochs):
        yield from loader.batches(epoch)


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


def _plain(ops: tuple[Op, ...], fill: Fill) -> Gather:
    """The eager twin of `_compiled`."""

    def gather(rows: Tensor, order: Tensor, params: tuple[Params, ...]) -> Tensor:
        return apply_rows(ops, rows[order], params, fill).unflatten(2, (SIDE, 3)).permute(0, 3, 1, 2)

    return gather


@functools.lru_cache(maxsize=64)
def _compiled(ops: tuple[Op, ...], fill: Fill, samples: int, batch_size: int, device: torch.device) -> Gather:
    """One kernel for one setting and one static shape, shared by all loaders of that setting.

    The compiler keeps its variants, and their small limit, with the code object: each setting gets a code object of
    its own, or the ninth setting of a sweep would fail.
    """
    plain = _plain(ops, fill)
    own = types.FunctionType(plain.__code__.replace(), plain.__globals__, plain.__name__, None, plain.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False, options=ONE_KERNEL)


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy of `array` on `device`; to a GPU through pinned memory, without waiting."""
    host = torch.from_numpy(np.array(array, order="C"))  # a copy: torch refuses to be quiet about read-only arrays
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
