"""Code shared by all loaders: arguments, order of the batches, random draws of an epoch, the augmentation kernel."""

import abc
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastcifar.data import transforms
from fastcifar.data.augment import (
    AugmentOps,
    AugmentParams,
    OpParams,
    ParamArrays,
    apply_augment_rows,
    draw_epoch,
    draw_mixer_params,
    split_mixer,
)
from fastcifar.data.epoch_draws import DrawAhead, PackedArrays
from fastcifar.data.image_ops import FillColor
from fastcifar.errors import UsageError

ALIGNMENT = 16  # the parameters of a chunk start at a multiple of this many elements

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

    def chunk_table(self, array: np.ndarray, chunk_steps: int, alignment: int = 1) -> np.ndarray:
        """Return this rank's share of `array` [n, ...] as a table [chunks, width, ...], padded with `array[0]`.

        A chunk consists of `chunk_steps` steps, and `width` is a multiple of `alignment`.
        """
        num_chunks, size = -(-self.steps_per_epoch // chunk_steps), chunk_steps * self.local_batch_size
        share = array[self.rank :: self.world_size]  # for all steps: ranks divide full steps evenly
        share = share[: self.steps_per_epoch * self.local_batch_size]
        padded = np.full((num_chunks * size, *array.shape[1:]), array[0], dtype=array.dtype)
        padded[: len(share)] = share
        table = np.full((num_chunks, -(-size // alignment) * alignment, *array.shape[1:]), array[0], dtype=array.dtype)
        table[:, :size] = padded.reshape(num_chunks, size, *array.shape[1:])
        return table


@dataclass(frozen=True)
class EpochInputs:
    """The inputs of a loader for one epoch, as tables of chunks (`BatchSlicing.chunk_table`)."""

    host: tuple[np.ndarray, ...]
    device: PackedArrays  # labels and parameters of the mixer, then what the loader needs on the device


# The items of a chunk's batches other than images (labels, parameters of the mixer), then the groups of parameters
# that the loader selected for the device; all are [chunk size, ...].
ChunkParams = list[dict[str, Tensor]]

# A loader's choice among the drawn parameters: (those that it needs in host memory, those that it needs on the device)
SelectInputs = Callable[[AugmentParams], tuple[list[np.ndarray], list[ParamArrays]]]


def split_by_chunk(groups: list[dict[str, Tensor]], chunk_size: int) -> list[ChunkParams]:
    """Split tables [chunks, width, ...] into the parameters of each chunk."""
    split = [{name: table[:, :chunk_size].unbind(0) for name, table in group.items()} for group in groups]
    num_chunks = len(split[0]["labels"])
    return [[{name: parts[chunk] for name, parts in group.items()} for group in split] for chunk in range(num_chunks)]


class Loader(abc.ABC):
    """Base class of the loaders, which turn a data set in memory into augmented batches on the device.

    The batches of all loaders are identical for the same seed and epoch, except for the torchvision baseline, which
    draws its own random parameters. A loader has no state to save and, within an epoch, does not wait for training.
    """

    uses_workers = False
    # Approximate number of images that are processed together, by device type: a chunk of one or more steps.
    chunk_images: Mapping[str, int] = {"cpu": 1, "cuda": 1}

    def __init__(
        self,
        images: np.ndarray,  # uint8 [n,3,32,32], planar; may be a read-only memory map
        labels: np.ndarray,  # int64 [n]
        *,
        batch_size: int,  # global
        augment: AugmentOps,  # may end with a mixer
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
        loader_ops, mixer = split_mixer(augment)
        self._ops = tuple(op for op in loader_ops if op.name != "batch_transform")
        self._batch_transform = next((op for op in loader_ops if op.name == "batch_transform"), None)
        self._fill_color, self._seed = fill_color, seed
        self._compile, self._workers = compile, workers
        self._device = torch.device(device)
        local_size = self.slicing.local_batch_size
        self._chunk_steps = min(max(self.chunk_images[self._device.type] // local_size, 1), self.steps_per_epoch)
        self._chunk_size = self._chunk_steps * local_size
        for op in loader_ops:
            if op.function:
                transforms.check_transform(op, images[:2], self._device, self.uses_workers)
        select = self._prepare(images)
        labels, slicing, ops, chunk_steps = labels.astype(np.int64), self.slicing, self._ops, self._chunk_steps

        def draw(epoch: int) -> EpochInputs:  # does not refer to `self`, as `DrawAhead` requires
            params = draw_epoch(ops, len(labels), epoch, seed)
            host, device = select(params)
            batch_items = {"labels": labels[params.permutation]}
            if mixer:
                batch_items["mixer"] = draw_mixer_params(augment, len(labels), epoch, seed)
            tables = [
                {name: slicing.chunk_table(array, chunk_steps, ALIGNMENT) for name, array in group.items()}
                for group in (batch_items, *device)
            ]
            return EpochInputs(tuple(slicing.chunk_table(array, chunk_steps) for array in host), PackedArrays(tables))

        self._epochs = DrawAhead(draw)

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Yield this rank's batches from `start_step` on: images uint8 channels_last [b,3,32,32], labels int64 [b].

        If the augmentations end with a mixer, its parameters [b] or [b,k] are the third element. Later batches do not
        overwrite earlier ones. A batch must be used in the CUDA stream that is current while this generator runs.
        """
        assert 0 <= start_step <= self.steps_per_epoch, (start_step, self.steps_per_epoch)
        inputs, chunk_steps = self._epochs.get(epoch), self._chunk_steps
        params = split_by_chunk(inputs.device.upload(self._device), self._chunk_size)
        first_chunk = start_step // chunk_steps
        for chunk, images in enumerate(self._image_chunks(epoch, inputs, params, first_chunk), first_chunk):
            tensors = (images, *params[chunk][0].values())
            chunk_start = chunk * chunk_steps
            for step in range(max(chunk_start, start_step), min(chunk_start + chunk_steps, self.steps_per_epoch)):
                # A short last batch is computed at full size, so that one static shape is enough, and sliced here.
                first_image = (step - chunk_start) * self.slicing.local_batch_size
                end = first_image + self.slicing.local_count(step)
                batch = tuple(tensor[first_image:end] for tensor in tensors)
                if self._batch_transform:
                    seed_key = (self._seed, epoch, self.slicing.rank, step)
                    batch = (transforms.transform_batch(self._batch_transform, batch[0], seed_key), *batch[1:])
                yield batch
                if step == start_step:
                    self._epochs.start(epoch + 1)

    @abc.abstractmethod
    def _prepare(self, images: np.ndarray) -> SelectInputs:
        """Prepare for `batches`, and return which of the drawn parameters the loader needs; called by `__init__`."""

    @abc.abstractmethod
    def _image_chunks(
        self, epoch: int, inputs: EpochInputs, params: list[ChunkParams], first_chunk: int
    ) -> Iterator[Tensor]:
        """Yield the images of the chunks from `first_chunk` on; `params` are the parameters of all chunks."""

    def _make_gather(self, ops: AugmentOps, num_rows: int) -> GatherFn:
        if not self._compile:
            return eager_gather(ops, self._fill_color)
        return compile_gather(ops, self._fill_color, num_rows, self._chunk_size, self._device)


def eager_gather(ops: AugmentOps, fill_color: FillColor) -> GatherFn:
    """Return the eager version of `compile_gather`, which gives identical bytes."""

    def gather(rows: Tensor, indices: Tensor, params: tuple[OpParams, ...]) -> Tensor:
        return apply_augment_rows(ops, rows[indices], params, fill_color)

    return gather


@functools.lru_cache(maxsize=64)
def compile_gather(
    ops: AugmentOps, fill_color: FillColor, num_samples: int, chunk_size: int, device: torch.device
) -> GatherFn:
    """Compile one kernel for these arguments and static shapes; all loaders with equal arguments share it.

    Each call compiles a copy of the code object, because torch.compile limits how often one code object is compiled.
    """
    eager = eager_gather(ops, fill_color)
    copy = types.FunctionType(eager.__code__.replace(), eager.__globals__, eager.__name__, None, eager.__closure__)
    return torch.compile(copy, fullgraph=True, dynamic=False, options=SINGLE_KERNEL_OPTIONS)
