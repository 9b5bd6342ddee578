"""The loader in which NVIDIA DALI augments: its graph, what it is fed, its threads.

DALI decodes the data set's planar records and does the first ops of the list, those that it has exactly in uint8
(`FACES`); ops after them are left to the tensor loader's kernel. It draws nothing: its source is a pure function of
epoch and step, and a batch equals the tensor loader's bit for bit. DALI is imported when a loader is made, never
before, and its threads start with the first batch: after a CUDA graph has been captured.
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

CHUNK_IMAGES = {
    "cpu": 512,
    "cuda": 2048,
}  # images of one run of the graph, about; on a CPU more fall out of its cache (LOG.md)
PREFETCH_CHUNKS = 2  # chunks that DALI makes ahead
MAX_THREADS = 4  # of DALI, where there are as many cores; on two cores 1, 2 and 3 were alike

ChunkStart = tuple[int, int]  # (epoch, first step)
ParamArrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class DaliOp:
    """An op in DALI's words, on images of layout CHW or HWC.

    feed        (op, its draws [n]) -> what the operator is told of each image: one or more arrays [n] or [n,2]
    build       (dali, images, what was fed, op, fill) -> images
    takes       how many arrays it is fed
    only_first  it has to be the list's first op
    """

    make_inputs: Callable[[AugmentOp, ParamArrays], list[np.ndarray]]
    build_node: Callable[[Any, Any, Any, AugmentOp, FillColor], Any]
    num_inputs: int = 1
    must_be_first: bool = False


def _slice_window(dali: Any, images: Any, inputs: Any, op: AugmentOp | None, fill_color: FillColor) -> Any:
    """The window at a corner, black where it leaves the image."""
    return dali.fn.slice(
        images,
        start=inputs[0],
        shape=(CIFAR_IMAGE_SIZE, CIFAR_IMAGE_SIZE),
        axis_names="HW",
        out_of_bounds_policy="pad",
        fill_values=0,
    )


def _mirror_to_hwc(dali: Any, images: Any, inputs: Any, op: AugmentOp | None, fill_color: FillColor) -> Any:
    """Mirrored where it is told 1, in layout HWC: DALI turns planes into pixels in the same operator."""
    return dali.fn.crop_mirror_normalize(
        images, mirror=inputs[0], dtype=dali.types.UINT8, output_layout="HWC", mean=[0.0], std=[1.0]
    )


def _erase_square(dali: Any, images: Any, inputs: Any, op: AugmentOp, fill_color: FillColor) -> Any:
    """The square of the op's size at a corner filled, as far as it is inside the image."""
    return _erase_box(dali, images, (*inputs, 2 * (float(_int_value(op)),)), op, fill_color)


def _erase_box(dali: Any, images: Any, inputs: Any, op: AugmentOp, fill_color: FillColor) -> Any:
    """The box of a corner and a size filled."""
    colour = [float(value) for value in FILL_COLORS.get(op.variant, fill_color)]
    return dali.fn.erase(images, anchor=inputs[0], shape=inputs[1], axis_names="HW", fill_value=colour)


def _stack_params(params: ParamArrays, names: str, offset: int = 0, dtype: type = np.int32) -> np.ndarray:
    return np.stack([params[name] for name in names], axis=1).astype(dtype) - dtype(offset)


# DALI pads with reflections only in several operators, so the source does it
CROP_ZERO = DaliOp(lambda op, drawn: [_stack_params(drawn, "yx", _int_value(op))], _slice_window)
CROP_REFLECT = DaliOp(lambda op, drawn: [_stack_params(drawn, "yx")], _slice_window, must_be_first=True)
FLIP = DaliOp(lambda op, drawn: [drawn["flip"].astype(np.int32)], _mirror_to_hwc)
CUTOUT = DaliOp(lambda op, drawn: [_stack_params(drawn, "yx", _int_value(op) // 2, np.float32)], _erase_square)
ERASE = DaliOp(
    lambda _, drawn: [_stack_params(drawn, names, dtype=np.float32) for names in ("yx", "hw")], _erase_box, num_inputs=2
)

# (name, word) of an op -> its face; DALI's rotation and policies differ from ours in a pixel here and there (LOG.md)
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
    """How many of `ops`, from the first on, DALI does."""
    for place, op in enumerate(ops):
        face = DALI_OPS.get((op.name, op.variant))
        if face is None or (face.must_be_first and place):
            return place
    return len(ops)


class ChunkSource:
    """What DALI is fed: a function of (epoch, step) that keeps nothing but the last epochs' draws, for speed.

    images  uint8 numpy [n,3,32,32], planar, perhaps a memory map; neither copied nor padded as a whole
    ops     the whole list, of which DALI does the first `inside`
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
        """All the randomness of `epoch`, as `draw_epoch` gives it."""
        return self._prepare_epoch(epoch)[0]

    def __call__(self, chunk: ChunkStart, num_steps: int) -> list[np.ndarray]:
        """The images [b,3,s,s] of so many steps of an epoch, and what each face is fed [b, ...]."""
        epoch, start = chunk
        order, *fed = (table[start : start + num_steps] for table in self._prepare_epoch(epoch)[1])
        images = self.images[order.reshape(-1)]
        images = pad_reflect(images, self.padding) if self.padding else images
        return [images, *(np.ascontiguousarray(table.reshape(-1, *table.shape[2:])) for table in fed)]

    def _prepare_epoch(self, epoch: int) -> tuple[AugmentParams, list[np.ndarray]]:
        """The draws of `epoch`, and by step what DALI needs of them."""
        if epoch not in self._epoch_cache:
            while (
                len(self._epoch_cache) > 1
            ):  # two: DALI is fed the next epoch's beginning while this one's end is used
                del self._epoch_cache[next(iter(self._epoch_cache))]
            draws = draw_epoch(self.ops, self.slicing.num_samples, epoch, self.seed)
            drawn = zip(self.dali_ops, draws.op_params, strict=False)
            fed = [array for op, params in drawn for array in DALI_OPS[op.name, op.variant].make_inputs(op, params)]
            self._epoch_cache[epoch] = draws, [self.slicing.step_table(array) for array in (draws.permutation, *fed)]
        return self._epoch_cache[epoch]


def pad_reflect(images: np.ndarray, padding: int) -> np.ndarray:
    """uint8 [b,3,32,32] -> [b,3,32+2m,32+2m], mirrored without repeating the edge, as numpy's "reflect"."""
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
    """The chunks that DALI was fed and has not given back, and the one it is fed next. It holds no pipeline."""

    def __init__(self, source: ChunkSource, chunk_steps: int) -> None:
        self.source, self.chunk_steps = source, chunk_steps
        self.next_chunk: ChunkStart = (0, 0)
        self.pending: deque[ChunkStart] = deque()

    def feed_next(self, _iteration: int) -> list[np.ndarray]:
        """The next chunk; after an epoch's last the next epoch's first, so that an epoch starts without waiting."""
        epoch, start = self.next_chunk
        self.pending.append(self.next_chunk)
        after = start + self.chunk_steps
        self.next_chunk = (epoch, after) if after < self.source.slicing.steps_per_epoch else (epoch + 1, 0)
        return self.source((epoch, start), self.chunk_steps)


class DaliPipeline:
    """DALI's pipeline behind `take`: images of any chunk at any time, fastest in order; its threads end by `close`."""

    def __init__(
        self, source: ChunkSource, chunk_steps: int, fill_color: FillColor, device: torch.device, num_threads: int
    ) -> None:
        self.dali = import_optional(DALI_MODULE, DALI_REMEDY, DeviceError)
        self.source, self.chunk_steps, self.fill_color, self.device = source, chunk_steps, fill_color, device
        self.num_threads = num_threads or min(MAX_THREADS, usable_cpu_count())
        self._queue = _ChunkQueue(source, chunk_steps)
        self._pipeline: Any = None
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pending_copy: tuple[Any, Any] | None = None  # what DALI gave, and the event of its copy

    def get_chunk(self, chunk: ChunkStart) -> Tensor:
        """The chunk's images, uint8 [b,32,32,3] on the device, which stay as they are."""
        plan = self._queue
        if self._pipeline is None:
            self._pipeline = self._build_pipeline(plan)
        if (plan.pending[0] if plan.pending else plan.next_chunk) != chunk:
            plan.next_chunk = chunk  # what was fed before it is of no use any more, and is thrown away below
        while True:
            images = self._run_pipeline()
            if plan.pending.popleft() == chunk:
                return images

    def close(self) -> None:
        """Ends DALI's threads; `take` would start them again."""
        self._pipeline = self._pending_copy = None
        self._queue = _ChunkQueue(self.source, self.chunk_steps)

    def _build_pipeline(self, queue: _ChunkQueue) -> Any:
        dali, on_gpu = self.dali, self._copy_stream is not None
        faces = [(DALI_OPS[op.name, op.variant], op) for op in self.source.dali_ops]
        takes = sum(face.num_inputs for face, _ in faces)
        index = self.device.index if self.device.index is not None else torch.cuda.current_device() if on_gpu else None
        pipeline = dali.Pipeline(
            batch_size=self.chunk_steps * self.source.slicing.local_batch_size,
            num_threads=self.num_threads,
            device_id=index if on_gpu else None,
            prefetch_queue_depth=PREFETCH_CHUNKS,
        )
        with _suppress_dali_warnings(), pipeline:
            images, *fed = dali.fn.external_source(
                queue.feed_next,
                num_outputs=1 + takes,
                layout=["CHW", *[""] * takes],
                no_copy=not on_gpu,  # every array is fresh; to a GPU they go through DALI's pinned memory
            )
            images = images.gpu() if on_gpu else images
            for face, op in faces:
                images = face.build_node(dali, images, fed[: face.num_inputs], op, self.fill_color)
                del fed[: face.num_inputs]
            if not any(face is FLIP for face, _ in faces):
                images = _mirror_to_hwc(dali, images, (0,), None, self.fill_color)
            pipeline.set_outputs(images)
            pipeline.build()
        return pipeline

    def _run_pipeline(self) -> Tensor:
        """The next chunk out of DALI; on a GPU a copy, made on a stream of its own while the network trains.

        What DALI gave belongs to DALI, and is given back when the copy is finished.
        """
        if self._copy_stream is None:
            (outputs,) = self._pipeline.run()
            return torch.from_dlpack(outputs.as_tensor())
        if self._pending_copy:
            self._pending_copy[1].synchronize()  # of the copy before this one, never of the network's work
        with torch.cuda.stream(self._copy_stream):
            (outputs,) = self._pipeline.run(self._copy_stream)
            images = torch.from_dlpack(outputs.as_tensor()).clone()
            self._pending_copy = outputs, self._copy_stream.record_event()
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._copy_stream)
        images.record_stream(current)
        return images


class DaliLoader:
    """The set in the host's memory, augmented by DALI chunk by chunk, ahead of the training.

    The arguments are TensorLoader's, and the batches are its batches; `images` is not copied. Own arguments:

    chunk    images of one run of DALI's graph, rounded down to whole steps (at least one); 0 is the device's own
    threads  of DALI; 0 is up to four, as many as there are cores

    Raises `UsageError` as `steps.cut` does, `DeviceError` without DALI.
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
        rest, share = augment[self._num_dali_ops :], self.slicing.local_batch_size
        self._chunk_steps = min(max((chunk_size or CHUNK_IMAGES[self._device.type]) // share, 1), self.steps_per_epoch)
        self._source = ChunkSource(images, augment, self._num_dali_ops, seed, self.slicing)
        self._pipeline = DaliPipeline(self._source, self._chunk_steps, fill_color, self._device, num_threads)
        kernel = (
            compile_gather(rest, fill_color, share, share, self._device) if compile else eager_gather(rest, fill_color)
        )
        self._apply_remaining_ops = kernel if rest else None
        self._all_indices = upload_array(np.arange(share, dtype=np.int32), self._device)

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's batches from `start_step` on: (images uint8 channels_last [b,3,32,32], labels int64 [b]).

        As TensorLoader's. Left before its end, by a break or by an error, it ends DALI's threads; they start anew when
        they are needed.
        """
        assert 0 <= start_step <= self.steps_per_epoch, (start_step, self.steps_per_epoch)
        draws, share = self._source.epoch_params(epoch), self.slicing.local_batch_size
        labels = split_by_step(self.slicing, self._labels[draws.permutation], self._device)
        params = split_params_by_step(self.slicing, draws.op_params[self._num_dali_ops :], self._device)
        try:
            for first in range(start_step, self.steps_per_epoch, self._chunk_steps):
                taken = self._pipeline.get_chunk((epoch, first))
                for step in range(first, min(first + self._chunk_steps, self.steps_per_epoch)):
                    images = taken[(step - first) * share :][:share].permute(0, 3, 1, 2)
                    if self._apply_remaining_ops:
                        with torch.no_grad():
                            rows = images.permute(0, 2, 3, 1).flatten(2)
                            images = self._apply_remaining_ops(rows, self._all_indices, params[step])
                    count = self.slicing.local_count(step)
                    yield images[:count], labels[step][:count]
        except BaseException:  # of DALI, or of the loop that this generator serves: GeneratorExit, a Ctrl-C
            self._pipeline.close()
            raise


@contextlib.contextmanager
def _suppress_dali_warnings() -> Iterator[None]:
    """Without DALI's warnings of CUDA libraries that nothing here uses."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no longer shipped with CUDA runtime|GPU is not available")
        yield


def _int_value(op: AugmentOp) -> int:
    assert isinstance(op.value, int), op
    return op.value
