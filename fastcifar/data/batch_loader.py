"""Code shared by all loaders: arguments, order of the batches, the augmentation kernel, copies to the device."""

from __future__ import annotations

import abc
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastcifar.data.augment import AugmentOps, AugmentParams, OpParams, apply_augment_rows, draw_epoch
from fastcifar.data.image_ops import FillColor
from fastcifar.errors import UsageError

ALIGNMENT = 16  # the parameters of a step start at a multiple of this many elements

# (rows uint8 [n,32,96], indices int32 [b], parameters [b]) -> augmented samples: uint8 channels_last [b,3,32,32]
GatherFn = Callable[[Tensor, Tensor, tuple[OpParams, ...]], Tensor]

# With its default thresholds the compiler splits a chain of augmentations into two kernels and passes int32 rows
# between them through memory. Its index checks in the innermost loop cost time and are not needed: the indices of
# augmentations are clamped or reflected into the image, and those of samples are a permutation.
SINGLE_KERNEL_OPTIONS = {
    "realize_opcount_threshold": 10_000,
    "realize_acc_reads_threshold": 10_000,
    "assert_indirect_indexing": False,
}


@dataclass(frozen=True)
class BatchSlicing:
    """How steps and ranks divide an epoch: rank r takes every `world_size`-th image of each batch, starting at image r.

    No rank may be without an image in a short last batch: BatchNorm cannot compute the statistics of an empty batch.
    """

    num_samples: int
    batch_size: int
    drop_last: bool = False
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        num_samples, batch_size, world_size = self.num_samples, self.batch_size, self.world_size
        assert batch_size > 0, batch_size
        if batch_size > num_samples:
            problem = f"--batch-size {batch_size} is larger than the {num_samples:,} training images"
            raise UsageError(problem, f"choose at most {num_samples}")
        if batch_size % world_size:
            nearest = max(batch_size // world_size, 1) * world_size
            problem = f"--batch-size {batch_size} is not divisible by the {world_size} processes"
            remedy = f"it is the global batch size: choose a multiple of {world_size}, such as {nearest}"
            raise UsageError(problem, remedy)
        remainder = num_samples % batch_size
        if not self.drop_last and 0 < remainder < world_size:
            sizes = f"{remainder} images ({num_samples:,} in batches of {batch_size})"
            problem = f"the last batch of an epoch has {sizes}, fewer than the {world_size} processes"
            raise UsageError(problem, "use --drop-last or another --batch-size")

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.batch_size if self.drop_last else -(-self.num_samples // self.batch_size)

    @property
    def has_short_step(self) -> bool:
        """Whether the last step of an epoch has fewer images than the others, on all ranks together."""
        return not self.drop_last and self.num_samples % self.batch_size > 0

    @property
    def local_batch_size(self) -> int:
        """Number of images of this rank in a full step."""
        return self.batch_size // self.world_size

    def local_count(self, step: int) -> int:
        """Return the number of images of this rank in `step`; some ranks may have a full share of a short last step."""
        num_images = min(self.batch_size, self.num_samples - step * self.batch_size)
        return len(range(self.rank, num_images, self.world_size))

    def step_table(self, array: np.ndarray, alignment: int = 1) -> np.ndarray:
        """Return this rank's share of `array` [n, ...] as a table [steps, width, ...], padded with `array[0]`."""
        steps, local_size, item_shape = self.steps_per_epoch, self.local_batch_size, array.shape[1:]
        padded = np.full((steps * local_size, *item_shape), array[0], dtype=array.dtype)
        share = array[self.rank :: self.world_size][: len(padded)]  # for all steps: ranks divide full steps evenly
        padded[: len(share)] = share
        width = -(-local_size // alignment) * alignment
        table = np.full((steps, width, *item_shape), array[0], dtype=array.dtype)
        table[:, :local_size] = padded.reshape(steps, local_size, *item_shape)
        return table


class Loader(abc.ABC):
    """Base class of the loaders, which turn a data set in memory into augmented batches on the device.

    The batches of all loaders are identical for the same seed and epoch, except for the torchvision baseline, which
    draws its own random parameters. A loader has no state to save and, within an epoch, does not wait for training.
    """

    uses_workers = False

    def __init__(
        self,
        images: np.ndarray,  # uint8 [n,3,32,32], planar; may be a read-only memory map
        labels: np.ndarray,  # int64 [n]
        *,
        batch_size: int,  # global
        augment: AugmentOps,  # without a mixer
        seed: int,
        device: torch.device | str,
        fill_color: FillColor = (0, 0, 0),  # mean color, 0..255 for each channel
        compile: bool = True,  # eager mode gives bit-identical batches
        workers: int = 2,  # number of worker processes, 0 for none; ignored unless `uses_workers`
        drop_last: bool = False,  # whether to drop a shorter last batch
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert images.dtype == np.uint8, images.dtype
        assert len(images) == len(labels), (len(images), len(labels))
        self.num_samples = len(images)
        self.slicing = BatchSlicing(self.num_samples, batch_size, drop_last, rank, world_size)
        self.steps_per_epoch = self.slicing.steps_per_epoch
        self.batch_size = batch_size
        self._ops, self._fill_color, self._seed = augment, fill_color, seed
        self._compile, self._workers = compile, workers
        self._device = torch.device(device)
        self._labels = np.array(labels, dtype=np.int64)
        self._prepare(images)

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's batches from `start_step` on: images uint8 channels_last [b,3,32,32], labels int64 [b]."""
        assert 0 <= start_step <= self.steps_per_epoch, (start_step, self.steps_per_epoch)
        params = self._draw_epoch(epoch)
        labels = split_by_step(self.slicing, self._labels[params.permutation], self._device)
        for step, images in enumerate(self._image_batches(epoch, params, start_step), start_step):
            # A short last batch is computed at full size, so that one static shape is enough, and sliced here.
            count = self.slicing.local_count(step)
            yield images[:count], labels[step][:count]

    @abc.abstractmethod
    def _prepare(self, images: np.ndarray) -> None:
        """Prepare for `batches`; called at the end of `__init__`."""

    @abc.abstractmethod
    def _image_batches(self, epoch: int, params: AugmentParams, start_step: int) -> Iterator[Tensor]:
        """Yield the images of each step; a short last batch may be full size."""

    def _draw_epoch(self, epoch: int) -> AugmentParams:
        return draw_epoch(self._ops, self.num_samples, epoch, self._seed)

    def _make_gather(self, ops: AugmentOps, num_rows: int) -> GatherFn:
        if not self._compile:
            return eager_gather(ops, self._fill_color)
        return compile_gather(ops, self._fill_color, num_rows, self.slicing.local_batch_size, self._device)


def eager_gather(ops: AugmentOps, fill_color: FillColor) -> GatherFn:
    """Return the eager version of `compile_gather`, which gives identical bytes."""

    def gather(rows: Tensor, indices: Tensor, params: tuple[OpParams, ...]) -> Tensor:
        return apply_augment_rows(ops, rows[indices], params, fill_color)

    return gather


@functools.lru_cache(maxsize=64)
def compile_gather(
    ops: AugmentOps, fill_color: FillColor, num_samples: int, batch_size: int, device: torch.device
) -> GatherFn:
    """Compile one kernel for these arguments and static shapes; all loaders with equal arguments share it.

    Each call compiles a copy of the code object, because torch.compile limits how often one code object is compiled.
    """
    eager = eager_gather(ops, fill_color)
    copy = types.FunctionType(eager.__code__.replace(), eager.__globals__, eager.__name__, None, eager.__closure__)
    return torch.compile(copy, fullgraph=True, dynamic=False, options=SINGLE_KERNEL_OPTIONS)


def upload_array(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy `array` to `device`. Copies to a GPU use pinned memory and are asynchronous."""
    host = torch.from_numpy(np.array(array, order="C"))  # a copy, because torch warns about read-only arrays
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def split_by_step(slicing: BatchSlicing, array: np.ndarray, device: torch.device) -> tuple[Tensor, ...]:
    """Upload an array [n] over positions and return this rank's share of each step, [local_batch_size]."""
    # The share of each step starts at an aligned address, because a compiled kernel first copies a misaligned input.
    return upload_array(slicing.step_table(array, ALIGNMENT), device)[:, : slicing.local_batch_size].unbind(0)


def split_params_by_step(
    slicing: BatchSlicing, params: Sequence[Mapping[str, np.ndarray]], device: torch.device
) -> list[tuple[dict[str, Tensor], ...]]:
    """Upload `AugmentParams.op_params`, or part of it, and return the `params` of `apply_augment` for each step."""
    shares = [{name: split_by_step(slicing, array, device) for name, array in arrays.items()} for arrays in params]
    return [
        tuple({name: by_step[step] for name, by_step in op_shares.items()} for op_shares in shares)
        for step in range(slicing.steps_per_epoch)
    ]
