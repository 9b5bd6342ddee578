"""The loader that augments with NVIDIA DALI. DALI is imported when a loader is created."""

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcifar.data.augment import AugmentOp, AugmentOps, AugmentParams, FillColor, ParamArrays
from fastcifar.data.batch_loader import ChunkParams, EpochInputs, Loader, SelectInputs
from fastcifar.data.epoch_draws import DrawAhead, upload_array
from fastcifar.data.image_ops import CIFAR_IMAGE_SIZE, FILL_COLORS
from fastcifar.device import DALI_MODULE, DALI_REMEDY, import_optional, usable_cpu_count
from fastcifar.errors import DeviceError

PREFETCH_CHUNKS = 2  # length of DALI's prefetch queue

Chunk = tuple[int, int]  # (epoch, index of the chunk in the epoch)


@dataclass(frozen=True, eq=False)
class DaliOp:
    """The DALI implementation of an augmentation, on images of layout CHW or HWC."""

    make_inputs: Callable[[AugmentOp, ParamArrays], list[np.ndarray]]  # parameters [n] -> inputs [n] or [n,2]
    build_node: Callable[[Any, Any, Any, AugmentOp, FillColor], Any]  # (dali, images, input nodes, op, fill color)
    num_inputs: int = 1


def _slice_window(dali: Any, images: Any, inputs: Any, op: AugmentOp | None, fill_color: FillColor) -> Any:
    shape = (CIFAR_IMAGE_SIZE, CIFAR_IMAGE_SIZE)
    return dali.fn.slice(
        images, start=inputs[0], shape=shape, axis_names="HW", out_of_bounds_policy="pad", fill_values=0
    )


def _flip_and_convert_to_hwc(dali: Any, images: Any, inputs: Any, op: AugmentOp | None, fill_color: FillColor) -> Any:
    """Flip horizontally where the input is 1, and convert to layout HWC in the same operator."""
    return dali.fn.crop_mirror_normalize(
        images, mirror=inputs[0], dtype=dali.types.UINT8, output_layout="HWC", mean=[0.0], std=[1.0]
    )


def _erase_box(dali: Any, images: Any, inputs: Any, op: AugmentOp, fill_color: FillColor) -> Any:
    """Fill the box at the corner `inputs[0]`; its size is `inputs[1]` if given, otherwise `op.value`."""
    size = inputs[1] if len(inputs) > 1 else 2 * (float(op.number),)
    color = [float(value) for value in FILL_COLORS.get(op.variant, fill_color)]
    return dali.fn.erase(images, anchor=inputs[0], shape=size, axis_names="HW", fill_value=color)


def _stack_params(params: ParamArrays, names: str, offset: int = 0, dtype: type = np.int32) -> np.ndarray:
    return np.stack([params[name] for name in names], axis=1).astype(dtype) - dtype(offset)


# DALI has no single operator for reflection padding: `ChunkSource` pads, so the crop must be the first augmentation.
CROP_ZERO = DaliOp(lambda op, params: [_stack_params(params, "yx", int(op.number))], _slice_window)
CROP_REFLECT = DaliOp(lambda op, params: [_stack_params(params, "yx")], _slice_window)
FLIP = DaliOp(lambda op, params: [params["flip"].astype(np.int32)], _flip_and_convert_to_hwc)
CUTOUT = DaliOp(lambda op, params: [_stack_params(params, "yx", int(op.number) // 2, np.float32)], _erase_box)
ERASE = DaliOp(
    lambda op, params: [_stack_params(params, names, dtype=np.float32) for names in ("yx", "hw")],
    _erase_box,
    num_inputs=2,
)

# Keys are (name, variant). Rotation and policies are missing: DALI's differ from ours in some pixels (LOG.md).
DALI_OPS: dict[tuple[str, str], DaliOp] = {
    ("crop", "zero"): CROP_ZERO,
    ("crop", "reflect"): CROP_REFLECT,
    **dict.fromkeys([("flip", "random"), ("flip", "alternating")], FLIP),
    **dict.fromkeys([("cutout", "mean"), ("cutout", "zero")], CUTOUT),
    **dict.fromkeys([("erase", "gray"), ("erase", "mean"), ("erase", "zero")], ERASE),
}


def count_dali_ops(ops: AugmentOps) -> int:
    """Return the number of leading augmentations of `ops` that DALI applies; PyTorch applies the others."""
    for index, op in enumerate(ops):
        dali_op = DALI_OPS.get((op.name, op.variant))
        if dali_op is None or (dali_op is CROP_REFLECT and index):
            return index
    return len(ops)


class ChunkSource:
    """The inputs of DALI as a function of the chunk. The pipeline refers to this object, but not vice versa."""

    def __init__(self, images: np.ndarray, dali_ops: AugmentOps, num_chunks: int) -> None:
        self.images, self.dali_ops, self.num_chunks = np.asarray(images), dali_ops, num_chunks
        first = dali_ops[0] if dali_ops else None
        self.padding = int(first.number) if first and (first.name, first.variant) == ("crop", "reflect") else 0
        self.epochs: DrawAhead[EpochInputs] | None = None  # the loader's, assigned when it starts DALI
        self.reset()

    def reset(self) -> None:
        self.next_chunk: Chunk = (0, 0)  # the next chunk to feed to DALI
        self.pending: deque[Chunk] = deque()  # chunks fed to DALI that it has not returned

    def feed_next(self, _iteration: int) -> list[np.ndarray]:
        """Return the images [b,3,s,s] of the next chunk of any epoch, and the inputs [b, ...] of all DALI ops."""
        assert self.epochs is not None
        epoch, index = self.next_chunk
        self.pending.append(self.next_chunk)
        self.next_chunk = (epoch, index + 1) if index + 1 < self.num_chunks else (epoch + 1, 0)
        indices, *inputs = (table[index] for table in self.epochs.get(epoch).host)
        images = self.images[indices]
        return [pad_reflect(images, self.padding) if self.padding else images, *inputs]


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


class DaliLoader(Loader):
    """Loader that keeps the data set in host memory and augments chunks of steps with DALI, ahead of training."""

    # Approximate number of images in one run of the pipeline; larger runs exceed the cache of a CPU (LOG.md).
    chunk_images: Mapping[str, int] = {"cpu": 512, "cuda": 2048}
    max_threads = 4  # 1, 2 and 3 threads were equally fast on two cores

    def _prepare(self, images: np.ndarray) -> SelectInputs:
        self._dali = import_optional(DALI_MODULE, DALI_REMEDY, DeviceError)
        dali_ops = self._ops[: count_dali_ops(self._ops)]
        self._source = ChunkSource(images, dali_ops, -(-self.steps_per_epoch // self._chunk_steps))
        remaining_ops = self._ops[len(dali_ops) :]
        self._apply_remaining_ops = self._make_gather(remaining_ops, self._chunk_size) if remaining_ops else None
        self._all_indices = upload_array(np.arange(self._chunk_size, dtype=np.int32), self._device)
        self._pipeline: Any = None
        self._copy_stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._pending_copy: tuple[Any, Any] | None = None  # the last output of DALI, and the event of its copy

        def select(params: AugmentParams) -> tuple[list[np.ndarray], list[ParamArrays]]:
            arrays = [params.permutation]
            for op, op_params in zip(dali_ops, params.op_params, strict=False):
                arrays += DALI_OPS[op.name, op.variant].make_inputs(op, op_params)
            return arrays, list(params.op_params[len(dali_ops) :])

        return select

    def _image_chunks(
        self, epoch: int, inputs: EpochInputs, params: list[ChunkParams], first_chunk: int
    ) -> Iterator[Tensor]:
        try:
            for index in range(first_chunk, self._source.num_chunks):
                images = self._get_chunk((epoch, index))
                if self._apply_remaining_ops:
                    op_params = tuple(params[index][1:])
                    with torch.no_grad():
                        images = self._apply_remaining_ops(images.flatten(2), self._all_indices, op_params)
                    yield images
                else:
                    yield images.permute(0, 3, 1, 2)
        except BaseException:  # raised by DALI, or in the loop over this generator: GeneratorExit, KeyboardInterrupt
            self._pipeline = self._pending_copy = None  # stops the threads of DALI
            self._source.reset()
            raise

    def _get_chunk(self, chunk: Chunk) -> Tensor:
        """Return the images of a chunk, uint8 [b,32,32,3] on the device; later calls do not overwrite them."""
        source = self._source
        if self._pipeline is None:
            source.epochs = self._epochs
            self._pipeline = self._build_pipeline()
        if (source.pending[0] if source.pending else source.next_chunk) != chunk:
            source.next_chunk = chunk  # the loop below discards the chunks that were fed before it
        while True:
            images = self._run_pipeline()
            if source.pending.popleft() == chunk:
                return images

    def _build_pipeline(self) -> Any:
        dali, source, on_gpu = self._dali, self._source, self._copy_stream is not None
        nodes = [(DALI_OPS[op.name, op.variant], op) for op in source.dali_ops]
        num_inputs = sum(dali_op.num_inputs for dali_op, _ in nodes)
        gpu_index = torch.cuda.current_device() if on_gpu and self._device.index is None else self._device.index
        pipeline = dali.Pipeline(
            batch_size=self._chunk_size,
            num_threads=min(self.max_threads, usable_cpu_count()),
            device_id=gpu_index if on_gpu else None,
            prefetch_queue_depth=PREFETCH_CHUNKS,
        )
        with warnings.catch_warnings(), pipeline:
            # DALI warns about CUDA libraries that are not used here.
            warnings.filterwarnings("ignore", message=".*no longer shipped with CUDA runtime|GPU is not available")
            images, *inputs = dali.fn.external_source(
                source.feed_next,
                num_outputs=1 + num_inputs,
                layout=["CHW", *[""] * num_inputs],
                no_copy=not on_gpu,  # every array is new; for a GPU, DALI copies them to pinned memory
            )
            images = images.gpu() if on_gpu else images
            for dali_op, op in nodes:
                images = dali_op.build_node(dali, images, inputs[: dali_op.num_inputs], op, self._fill_color)
                del inputs[: dali_op.num_inputs]
            if not any(dali_op is FLIP for dali_op, _ in nodes):
                images = _flip_and_convert_to_hwc(dali, images, (0,), None, self._fill_color)
            pipeline.set_outputs(images)
            pipeline.build()
        return pipeline

    def _run_pipeline(self) -> Tensor:
        """Return the next chunk of DALI; on a GPU, a copy made on a separate stream while the network trains."""
        if self._copy_stream is None:
            (outputs,) = self._pipeline.run()
            return torch.from_dlpack(outputs.as_tensor())
        if self._pending_copy:
            self._pending_copy[1].synchronize()  # waits for the previous copy, not for the work of the network
        with torch.cuda.stream(self._copy_stream):
            (outputs,) = self._pipeline.run(self._copy_stream)
            images = torch.from_dlpack(outputs.as_tensor()).clone()
            self._pending_copy = outputs, self._copy_stream.record_event()
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._copy_stream)
        images.record_stream(current)
        return images
