"""The loader that augments with NVIDIA DALI: its pipeline, its inputs and its threads.

DALI applies the first augmentations of the list, as far as it implements them exactly in uint8 (`DALI_OPS`); the kernel
of the tensor loader applies the rest. DALI draws no random numbers: its inputs are a pure function of epoch and step,
and a batch is bit-identical to the tensor loader's. DALI is imported when a loader is created, not before, and its
threads start with the first batch, after a CUDA graph has been captured.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcifar.data.augment import AugmentOp, AugmentParams, FillColor, draw_epoch
from fastcifar.data.batch_slicing import BatchSlicing, slice_epoch
from fastcifar.data.compiled_augment import (
    compile_gather,
    eager_gather,
    split_by_step,
    split_params_by_step,
    upload_array,
)
from fastcifar.data.crop_flip_erase import FILL_COLORS
from fastcifar.data.image_ops import CIFAR_IMAGE_SIZE
from fastcifar.device import DALI_MODULE, DALI_REMEDY, import_optional, usable_cpu_count
from fastcifar.errors import DeviceError

# Approximate number of images in one run of the pipeline; on a CPU, more do not fit into its cache (LOG.md).
CHUNK_IMAGES = {"cpu": 512, "cuda": 2048}
PREFETCH_CHUNKS = 2  # chunks that DALI prepares ahead
MAX_THREADS = 4  # DALI threads by default, limited by the number of cores; 1, 2 and 3 were equally fast on two cores

ChunkStart = tuple[int, int]  # (epoch, first step)
ParamArrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class DaliOp:
    """The DALI implementation of an augmentation, on images of layout CHW or HWC.

    make_inputs    (op, its parameters [n]) -> the input arrays of the operator, [n] or [n,2]
    build_node     (dali, images, input nodes, op, fill color) -> images
    num_inputs     number of input arrays
    must_be_first  whether it is supported only as the first augmentation of the list
    """

    make_inputs: Callable[[AugmentOp, ParamArrays], list[np.ndarray]]
    build_node: Callable[[Any, Any, Any, AugmentOp, FillColor], Any]
    num_inputs: int = 1
    must_be_first: bool = False


def _slice_window(dali: Any, images: Any, inputs: Any, op: AugmentOp | None, fill_color: FillColor) -> Any:
    """Crop the window at a corner, black outside the image."""
    return dali.fn.slice(
        images,
        start=inputs[0],
        shape=(CIFAR_IMAGE_SIZE, CIFAR_IMAGE_SIZE),
        axis_names="HW",
        out_of_bounds_policy="pad",
        fill_values=0,
    )


def _flip_and_convert_to_hwc(dali: Any, images: Any, inputs: Any, op: AugmentOp | None, fill_color: FillColor) -> Any:
    """Flip horizontally where the input is 1, and convert to layout HWC in the same operator."""
    return dali.fn.crop_mirror_normalize(
        images, mirror=inputs[0], dtype=dali.types.UINT8, output_layout="HWC", mean=[0.0], std=[1.0]
    )


def _erase_square(dali: Any, images: Any, inputs: Any, op: AugmentOp, fill_color: FillColor) -> Any:
    """Fill the square of `op.value` pixels at a corner, as far as it is inside the image."""
    return _erase_box(dali, images, (*inputs, 2 * (float(_int_value(op)),)), op, fill_color)


def _erase_box(dali: Any, images: Any, inputs: Any, op: AugmentOp, fill_color: FillColor) -> Any:
    """Fill the box given by its corner and size."""
    color = [float(value) for value in FILL_COLORS.get(op.variant, fill_color)]
    return dali.fn.erase(images, anchor=inputs[0], shape=inputs[1], axis_names="HW", fill_value=color)


def _stack_params(params: ParamArrays, names: str, offset: int = 0, dtype: type = np.int32) -> np.ndarray:
    return np.stack([params[name] for name in names], axis=1).astype(dtype) - dtype(offset)


# DALI has no single operator for reflection padding, so `ChunkSource` pads.
CROP_ZERO = DaliOp(lambda op, params: [_stack_params(params, "yx", _int_value(op))], _slice_window)
CROP_REFLECT = DaliOp(lambda op, params: [_stack_params(params, "yx")], _slice_window, must_be_first=True)
FLIP = DaliOp(lambda op, params: [params["flip"].astype(np.int32)], _flip_and_convert_to_hwc)
CUTOUT = DaliOp(lambda op, params: [_stack_params(params, "yx", _int_value(op) // 2, np.float32)], _erase_square)
ERASE = DaliOp(
    lambda op, params: [_stack_params(params, names, dtype=np.float32) for names in ("yx", "hw")],
    _erase_box,
    num_inputs=2,
)

# By name and variant. DALI's rotation and policies are not listed: they differ from ours in some pixels (LOG.md).
DALI_OPS: dict[tuple[str, str], DaliOp] = {
    ("crop", "zero"): CROP_ZERO,
    ("crop", "reflect"): CROP_REFLECT,
    ("flip", "random"): FLIP,
    ("flip", "alternating"): FLIP,
    ("cutout", "mean"): CUTOUT,
    ("cutout", "zero"): CUTOUT,
    ("erase", "gray"): ERASE,
    ("erase", "mean"): ERASE,
    ("erase", "zero"): ERASE,
}


def count_dali_ops(ops: tuple[AugmentOp, ...]) -> int:
    """Return how many of `ops`, counted from the first, DALI applies."""
    for index, op in enumerate(ops):
        dali_op = DALI_OPS.get((op.name, op.variant))
        if dali_op is None or (dali_op.must_be_first and index):
            return index
    return len(ops)


class ChunkSource:
    """The inputs of DALI as a function of (epoch, step); its only state is a cache of the last epochs' parameters.

    images  uint8 NumPy [n,3,32,32], planar, possibly a memory map; neither copied nor padded as a whole
    ops     the complete augmentation list, of which DALI applies the first `num_dali_ops`
    """

    def __init__(
        self, images: np.ndarray, ops: tuple[AugmentOp, ...], num_dali_ops: int, seed: int, slicing: BatchSlicing
    ) -> None:
        self.images, self.ops, self.seed, self.slicing = np.asarray(images), ops, seed, slicing
        self.dali_ops = ops[:num_dali_ops]
        first = self.dali_ops[0] if self.dali_ops else None
        self.padding = _int_value(first) if first and (first.name, first.variant) == ("crop", "reflect") else 0
        self._epoch_cache: dict[int, tuple[AugmentParams, list[np.ndarray]]] = {}

    def epoch_params(self, epoch: int) -> AugmentParams:
        """Return the result of `draw_epoch` for `epoch`."""
        return self._prepare_epoch(epoch)[0]

    def __call__(self, chunk: ChunkStart, num_steps: int) -> list[np.ndarray]:
        """Return the images [b,3,s,s] of `num_steps` steps from `chunk` on, and the inputs [b, ...] of all DALI ops."""
        epoch, start = chunk
        indices, *inputs = (table[start : start + num_steps] for table in self._prepare_epoch(epoch)[1])
        images = self.images[indices.reshape(-1)]
        images = pad_reflect(images, self.padding) if self.padding else images
        return [images, *(np.ascontiguousarray(table.reshape(-1, *table.shape[2:])) for table in inputs)]

    def _prepare_epoch(self, epoch: int) -> tuple[AugmentParams, list[np.ndarray]]:
        """Return the parameters of `epoch`, and the step tables of the permutation and of the inputs of DALI."""
        if epoch not in self._epoch_cache:
            # Two epochs: DALI prefetches the beginning of the next epoch while the end of this one is used.
            while len(self._epoch_cache) > 1:
                del self._epoch_cache[next(iter(self._epoch_cache))]
            epoch_params = draw_epoch(self.ops, self.slicing.num_samples, epoch, self.seed)
            arrays = [epoch_params.permutation]
            for op, params in zip(self.dali_ops, epoch_params.op_params, strict=False):
                arrays += DALI_OPS[op.name, op.variant].make_inputs(op, params)
            self._epoch_cache[epoch] = epoch_params, [self.slicing.step_table(array) for array in arrays]
        return self._epoch_cache[epoch]


def pad_reflect(images: np.ndarray, padding: int) -> np.ndarray:
    """Pad uint8 [b,3,32,32] to [b,3,32+2p,32+2p] as `numpy.pad` does in mode "reflect"."""
    side, last = CIFAR_IMAGE_SIZE + 2 * padding, CIFAR_IMAGE_SIZE - 1
    out = np.empty((*images.shape[:2], side, side), np.uint8)
    rows = out[:, :, padding : padding + CIFAR_IMAGE_SIZE]
    rows[..., padding : padding + CIFAR_IMAGE_SIZE] = images
    rows[..., :padding] = images[..., padding:0:-1]
    rows[..., padding + CIFAR_IMAGE_SIZE :] = images[..., last - 1 : last - 1 - padding : -1]
    out[:, :, :padding] = out[:, :, 2 * padding : padding : -1]
    out[:, :, padding + CIFAR_IMAGE_SIZE :] = out[:, :, padding + last - 1 : last - 1 : -1]
    return out


class _ChunkQueue:
    """The chunks that were fed to DALI and not yet returned by it, and the next chunk to feed.

    It has no reference to the pipeline, which holds a reference to it.
    """

    def __init__(self, source: ChunkSource, chunk_steps: int) -> None:
        self.source, self.chunk_steps = source, chunk_steps
        self.next_chunk: ChunkStart = (0, 0)
        self.pending: deque[ChunkStart] = deque()

    def feed_next(self, _iteration: int) -> list[np.ndarray]:
        """Return the inputs of the next chunk; the first chunk of the next epoch follows the last one of an epoch, so
        that an epoch starts without waiting."""
        epoch, start = self.next_chunk
        self.pending.append(self.next_chunk)
        end = start + self.chunk_steps
        self.next_chunk = (epoch, end) if end < self.source.slicing.steps_per_epoch else (epoch + 1, 0)
        return self.source((epoch, start), self.chunk_steps)


class DaliPipeline:
    """A DALI pipeline whose chunks can be requested in any order, fastest in sequence; `close` stops its threads."""

    def __init__(
        self, source: ChunkSource, chunk_steps: int, fill_color: FillColor, device: torch.device, num_threads: int
    ) -> None:
        self.dali = import_optional(DALI_MODULE, DALI_REMEDY, DeviceError)
        self.source, self.chunk_steps, self.fill_color, self.device = source, chunk_steps, fill_color, device
        self.num_threads = num_threads or min(MAX_THREADS, usable_cpu_count())
        self._queue = _ChunkQueue(source, chunk_steps)
        self._pipeline: Any = None
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pending_copy: tuple[Any, Any] | None = None  # the last output of DALI, and the event of its copy

    def get_chunk(self, chunk: ChunkStart) -> Tensor:
        """Return the images of a chunk, uint8 [b,32,32,3] on the device; later calls do not overwrite them."""
        queue = self._queue
        if self._pipeline is None:
            self._pipeline = self._build_pipeline(queue)
        if (queue.pending[0] if queue.pending else queue.next_chunk) != chunk:
            queue.next_chunk = chunk  # the loop below discards the chunks that were fed before it
        while True:
            images = self._run_pipeline()
            if queue.pending.popleft() == chunk:
                return images

    def close(self) -> None:
        """Stop the threads of DALI; `get_chunk` starts them again."""
        self._pipeline = self._pending_copy = None
        self._queue = _ChunkQueue(self.source, self.chunk_steps)

    def _build_pipeline(self, queue: _ChunkQueue) -> Any:
        dali, on_gpu = self.dali, self._copy_stream is not None
        nodes = [(DALI_OPS[op.name, op.variant], op) for op in self.source.dali_ops]
        num_inputs = sum(dali_op.num_inputs for dali_op, _ in nodes)
        index = self.device.index if self.device.index is not None else torch.cuda.current_device() if on_gpu else None
        pipeline = dali.Pipeline(
            batch_size=self.chunk_steps * self.source.slicing.local_batch_size,
            num_threads=self.num_threads,
            device_id=index if on_gpu else None,
            prefetch_queue_depth=PREFETCH_CHUNKS,
        )
        with _suppress_dali_warnings(), pipeline:
            images, *inputs = dali.fn.external_source(
                queue.feed_next,
                num_outputs=1 + num_inputs,
                layout=["CHW", *[""] * num_inputs],
                no_copy=not on_gpu,  # every array is new; for a GPU, DALI copies them to pinned memory
            )
            images = images.gpu() if on_gpu else images
            for dali_op, op in nodes:
                images = dali_op.build_node(dali, images, inputs[: dali_op.num_inputs], op, self.fill_color)
                del inputs[: dali_op.num_inputs]
            if not any(dali_op is FLIP for dali_op, _ in nodes):
                images = _flip_and_convert_to_hwc(dali, images, (0,), None, self.fill_color)
            pipeline.set_outputs(images)
            pipeline.build()
        return pipeline

    def _run_pipeline(self) -> Tensor:
        """Return the next chunk of DALI; on a GPU, a copy made on a separate stream while the network trains.

        DALI owns its output buffers. The reference to an output is kept until its copy is finished.
        """
        if self._copy_stream is None:
            (outputs,) = self._pipeline.run()
            return torch.from_dlpack(outputs.as_tensor())
        if self._pending_copy:
            self._pending_copy[1].synchronize()  # waits for the previous copy, not for the work of the network
        with torch.cuda.stream(self._copy_stream):
            (outputs,) = self._pipeline.run(self._copy_stream)
            images = torch.from_dlpack(outputs.as_tensor()).clone()
            self._pending_copy = outputs, self._copy_stream.record_event()
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._copy_stream)
        images.record_stream(current)
        return images


class DaliLoader:
    """Loader that keeps the data set in host memory and augments it with DALI, one chunk of steps ahead of training.

    Arguments and batches are those of `TensorLoader`, except that `images` is not copied. Additional arguments:

    chunk_size   images in one run of the pipeline, rounded down to whole steps (at least one); 0 for the default of the
                 device type
    num_threads  number of DALI threads; 0 for the number of cores, at most four

    Raises `UsageError` as `slice_epoch` does, `DeviceError` if DALI is not available.
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
        chunk_size: int = 0,
        num_threads: int = 0,
    ) -> None:
        assert images.dtype == np.uint8, images.dtype
        assert images.ndim == 4, images.shape
        assert len(images) == len(labels), (len(images), len(labels))
        assert all(0 <= value <= 255 for value in fill_color), fill_color
        self.num_samples = len(images)
        self.slicing = slice_epoch(self.num_samples, batch_size, drop_last, rank, world_size)
        self.steps_per_epoch = self.slicing.steps_per_epoch
        self.batch_size = batch_size
        self._device = torch.device(device)
        self._labels = np.array(labels, dtype=np.int64)
        self._num_dali_ops = count_dali_ops(augment)
        remaining_ops, local_size = augment[self._num_dali_ops :], self.slicing.local_batch_size
        chunk_images = chunk_size or CHUNK_IMAGES[self._device.type]
        self._chunk_steps = min(max(chunk_images // local_size, 1), self.steps_per_epoch)
        self._source = ChunkSource(images, augment, self._num_dali_ops, seed, self.slicing)
        self._pipeline = DaliPipeline(self._source, self._chunk_steps, fill_color, self._device, num_threads)
        gather = (
            compile_gather(remaining_ops, fill_color, local_size, local_size, self._device)
            if compile
            else eager_gather(remaining_ops, fill_color)
        )
        self._apply_remaining_ops = gather if remaining_ops else None
        self._all_indices = upload_array(np.arange(local_size, dtype=np.int32), self._device)

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's batches from `start_step` on: (images uint8 channels_last [b,3,32,32], labels int64 [b]).

        They are the batches of `TensorLoader`. If the iteration ends early, by a break or an error, the threads of DALI
        stop; they start again when they are needed.
        """
        assert 0 <= start_step <= self.steps_per_epoch, (start_step, self.steps_per_epoch)
        epoch_params, local_size = self._source.epoch_params(epoch), self.slicing.local_batch_size
        labels = split_by_step(self.slicing, self._labels[epoch_params.permutation], self._device)
        params = split_params_by_step(self.slicing, epoch_params.op_params[self._num_dali_ops :], self._device)
        try:
            for first in range(start_step, self.steps_per_epoch, self._chunk_steps):
                chunk = self._pipeline.get_chunk((epoch, first))
                for step in range(first, min(first + self._chunk_steps, self.steps_per_epoch)):
                    images = chunk[(step - first) * local_size :][:local_size].permute(0, 3, 1, 2)
                    if self._apply_remaining_ops:
                        with torch.no_grad():
                            rows = images.permute(0, 2, 3, 1).flatten(2)
                            images = self._apply_remaining_ops(rows, self._all_indices, params[step])
                    count = self.slicing.local_count(step)
                    yield images[:count], labels[step][:count]
        except BaseException:  # raised by DALI, or in the loop over this generator: GeneratorExit, KeyboardInterrupt
            self._pipeline.close()
            raise


@contextlib.contextmanager
def _suppress_dali_warnings() -> Iterator[None]:
    """Suppress the warnings of DALI about CUDA libraries that are not used here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no longer shipped with CUDA runtime|GPU is not available")
        yield


def _int_value(op: AugmentOp) -> int:
    assert isinstance(op.value, int), op
    return op.value
