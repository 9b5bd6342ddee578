"""The loader in which NVIDIA DALI augments: its graph, what it is fed, its threads.

DALI decodes the data set's planar records and does the first ops of the list, those that it has exactly in uint8
(`FACES`); ops after them are left to the tensor loader's kernel. It draws nothing: its source is a pure function of
epoch and step, and a batch equals the tensor loader's bit for bit. DALI is imported when a loader is made, never
before, and its threads start with the first batch: after a CUDA graph has been captured.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcifar.data.augment import Draws, Fill, Op, draw_epoch
from fastcifar.data.batch_slicing import Steps, cut
from fastcifar.data.compiled_augment import by_step, compiled, params_by_step, plain, upload
from fastcifar.data.crop_flip_erase import COLOURS
from fastcifar.data.image_ops import SIDE
from fastcifar.device import DALI, DALI_REMEDY, optional
from fastcifar.errors import DeviceError

CHUNK = {
    "cpu": 512,
    "cuda": 2048,
}  # images of one run of the graph, about; on a CPU more fall out of its cache (LOG.md)
PREFETCH = 2  # chunks that DALI makes ahead
THREADS = 4  # of DALI, where there are as many cores; on two cores 1, 2 and 3 were alike

Chunk = tuple[int, int]  # (epoch, first step)
Drawn = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Face:
    """An op in DALI's words, on images of layout CHW or HWC.

    feed        (op, its draws [n]) -> what the operator is told of each image: one or more arrays [n] or [n,2]
    build       (dali, images, what was fed, op, fill) -> images
    takes       how many arrays it is fed
    only_first  it has to be the list's first op
    """

    feed: Callable[[Op, Drawn], list[np.ndarray]]
    build: Callable[[Any, Any, Any, Op, Fill], Any]
    takes: int = 1
    only_first: bool = False


def _window(dali: Any, images: Any, fed: Any, op: Op | None, fill: Fill) -> Any:
    """The window at a corner, black where it leaves the image."""
    return dali.fn.slice(
        images, start=fed[0], shape=(SIDE, SIDE), axis_names="HW", out_of_bounds_policy="pad", fill_values=0
    )


def _mirrored(dali: Any, images: Any, fed: Any, op: Op | None, fill: Fill) -> Any:
    """Mirrored where it is told 1, in layout HWC: DALI turns planes into pixels in the same operator."""
    return dali.fn.crop_mirror_normalize(
        images, mirror=fed[0], dtype=dali.types.UINT8, output_layout="HWC", mean=[0.0], std=[1.0]
    )


def _square(dali: Any, images: Any, fed: Any, op: Op, fill: Fill) -> Any:
    """The square of the op's size at a corner filled, as far as it is inside the image."""
    return _box(dali, images, (*fed, 2 * (float(_whole(op)),)), op, fill)


def _box(dali: Any, images: Any, fed: Any, op: Op, fill: Fill) -> Any:
    """The box of a corner and a size filled."""
    colour = [float(value) for value in COLOURS.get(op.word, fill)]
    return dali.fn.erase(images, anchor=fed[0], shape=fed[1], axis_names="HW", fill_value=colour)


def _pairs(drawn: Drawn, names: str, less: int = 0, dtype: type = np.int32) -> np.ndarray:
    return np.stack([drawn[name] for name in names], axis=1).astype(dtype) - dtype(less)


# DALI pads with reflections only in several operators, so the source does it
ZERO = Face(lambda op, drawn: [_pairs(drawn, "yx", _whole(op))], _window)
REFLECT = Face(lambda op, drawn: [_pairs(drawn, "yx")], _window, only_first=True)
FLIP = Face(lambda op, drawn: [drawn["flip"].astype(np.int32)], _mirrored)
CUTOUT = Face(lambda op, drawn: [_pairs(drawn, "yx", _whole(op) // 2, np.float32)], _square)
ERASE = Face(lambda _, drawn: [_pairs(drawn, names, dtype=np.float32) for names in ("yx", "hw")], _box, takes=2)

# (name, word) of an op -> its face; DALI's rotation and policies differ from ours in a pixel here and there (LOG.md)
FACES: dict[tuple[str, str], Face] = {
    ("crop", "zero"): ZERO,
    ("crop", "reflect"): REFLECT,
    ("flip", "random"): FLIP,
    ("flip", "alternating"): FLIP,
    ("cutout", "mean"): CUTOUT,
    ("cutout", "zero"): CUTOUT,
    ("erase", "grey"): ERASE,
    ("erase", "mean"): ERASE,
    ("erase", "zero"): ERASE,
}


def prefix(ops: tuple[Op, ...]) -> int:
    """How many of `ops`, from the first on, DALI does."""
    for place, op in enumerate(ops):
        face = FACES.get((op.name, op.word))
        if face is None or (face.only_first and place):
            return place
    return len(ops)


class Source:
    """What DALI is fed: a function of (epoch, step) that keeps nothing but the last epochs' draws, for speed.

    images  uint8 numpy [n,3,32,32], planar, perhaps a memory map; neither copied nor padded as a whole
    ops     the whole list, of which DALI does the first `inside`
    """

    def __init__(self, images: np.ndarray, ops: tuple[Op, ...], inside: int, seed: int, steps: Steps) -> None:
        self.images, self.ops, self.seed, self.steps = np.asarray(images), ops, seed, steps
        self.inside = ops[:inside]
        first = self.inside[0] if self.inside else None
        self.margin = _whole(first) if first and (first.name, first.word) == ("crop", "reflect") else 0
        self._epochs: dict[int, tuple[Draws, list[np.ndarray]]] = {}

    def draws(self, epoch: int) -> Draws:
        """All the randomness of `epoch`, as `draw_epoch` gives it."""
        return self._epoch(epoch)[0]

    def __call__(self, chunk: Chunk, steps: int) -> list[np.ndarray]:
        """The images [b,3,s,s] of so many steps of an epoch, and what each face is fed [b, ...]."""
        epoch, start = chunk
        order, *fed = (table[start : start + steps] for table in self._epoch(epoch)[1])
        images = self.images[order.reshape(-1)]
        images = reflected(images, self.margin) if self.margin else images
        return [images, *(np.ascontiguousarray(table.reshape(-1, *table.shape[2:])) for table in fed)]

    def _epoch(self, epoch: int) -> tuple[Draws, list[np.ndarray]]:
        """The draws of `epoch`, and by step what DALI needs of them."""
        if epoch not in self._epochs:
            while len(self._epochs) > 1:  # two: DALI is fed the next epoch's beginning while this one's end is used
                del self._epochs[next(iter(self._epochs))]
            draws = draw_epoch(self.ops, self.steps.samples, epoch, self.seed)
            drawn = zip(self.inside, draws.params, strict=False)
            fed = [array for op, params in drawn for array in FACES[op.name, op.word].feed(op, params)]
            self._epochs[epoch] = draws, [self.steps.table(array) for array in (draws.order, *fed)]
        return self._epochs[epoch]


def reflected(images: np.ndarray, margin: int) -> np.ndarray:
    """uint8 [b,3,32,32] -> [b,3,32+2m,32+2m], mirrored without repeating the edge, as numpy's "reflect"."""
    side, last = SIDE + 2 * margin, SIDE - 1
    out = np.empty((*images.shape[:2], side, side), np.uint8)
    rows = out[:, :, margin : margin + SIDE]
    rows[..., margin : margin + SIDE] = images
    rows[..., :margin] = images[..., margin:0:-1]
    rows[..., margin + SIDE :] = images[..., last - 1 : last - 1 - margin : -1]
    out[:, :, :margin] = out[:, :, 2 * margin : margin : -1]
    out[:, :, margin + SIDE :] = out[:, :, margin + last - 1 : last - 1 : -1]
    return out


class _Plan:
    """The chunks that DALI was fed and has not given back, and the one it is fed next. It holds no pipeline."""

    def __init__(self, source: Source, stride: int) -> None:
        self.source, self.stride = source, stride
        self.next: Chunk = (0, 0)
        self.fed: deque[Chunk] = deque()

    def feed(self, _iteration: int) -> list[np.ndarray]:
        """The next chunk; after an epoch's last the next epoch's first, so that an epoch starts without waiting."""
        epoch, start = self.next
        self.fed.append(self.next)
        after = start + self.stride
        self.next = (epoch, after) if after < self.source.steps.per_epoch else (epoch + 1, 0)
        return self.source((epoch, start), self.stride)


class Chunks:
    """DALI's pipeline behind `take`: images of any chunk at any time, fastest in order; its threads end by `close`."""

    def __init__(self, source: Source, stride: int, fill: Fill, device: torch.device, threads: int) -> None:
        self.dali = optional(DALI, DALI_REMEDY, DeviceError)
        self.source, self.stride, self.fill, self.device = source, stride, fill, device
        self.threads = threads or min(THREADS, len(os.sched_getaffinity(0)))
        self._plan = _Plan(source, stride)
        self._pipeline: Any = None
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._handed: tuple[Any, Any] | None = None  # what DALI gave, and the event of its copy

    def take(self, chunk: Chunk) -> Tensor:
        """The chunk's images, uint8 [b,32,32,3] on the device, which stay as they are."""
        plan = self._plan
        if self._pipeline is None:
            self._pipeline = self._build(plan)
        if (plan.fed[0] if plan.fed else plan.next) != chunk:
            plan.next = chunk  # what was fed before it is of no use any more, and is thrown away below
        while True:
            images = self._run()
            if plan.fed.popleft() == chunk:
                return images

    def close(self) -> None:
        """Ends DALI's threads; `take` would start them again."""
        self._pipeline = self._handed = None
        self._plan = _Plan(self.source, self.stride)

    def _build(self, plan: _Plan) -> Any:
        dali, on_gpu = self.dali, self._side is not None
        faces = [(FACES[op.name, op.word], op) for op in self.source.inside]
        takes = sum(face.takes for face, _ in faces)
        index = self.device.index if self.device.index is not None else torch.cuda.current_device() if on_gpu else None
        pipeline = dali.Pipeline(
            batch_size=self.stride * self.source.steps.share,
            num_threads=self.threads,
            device_id=index if on_gpu else None,
            prefetch_queue_depth=PREFETCH,
        )
        with _quiet(), pipeline:
            images, *fed = dali.fn.external_source(
                plan.feed,
                num_outputs=1 + takes,
                layout=["CHW", *[""] * takes],
                no_copy=not on_gpu,  # every array is fresh; to a GPU they go through DALI's pinned memory
            )
            images = images.gpu() if on_gpu else images
            for face, op in faces:
                images = face.build(dali, images, fed[: face.takes], op, self.fill)
                del fed[: face.takes]
            if not any(face is FLIP for face, _ in faces):
                images = _mirrored(dali, images, (0,), None, self.fill)
            pipeline.set_outputs(images)
            pipeline.build()
        return pipeline

    def _run(self) -> Tensor:
        """The next chunk out of DALI; on a GPU a copy, made on a stream of its own while the network trains.

        What DALI gave belongs to DALI, and is given back when the copy is finished.
        """
        if self._side is None:
            (outputs,) = self._pipeline.run()
            return torch.from_dlpack(outputs.as_tensor())
        if self._handed:
            self._handed[1].synchronize()  # of the copy before this one, never of the network's work
        with torch.cuda.stream(self._side):
            (outputs,) = self._pipeline.run(self._side)
            images = torch.from_dlpack(outputs.as_tensor()).clone()
            self._handed = outputs, self._side.record_event()
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._side)
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
        augment: tuple[Op, ...],
        seed: int,
        device: torch.device | str,
        fill: Fill = (0, 0, 0),
        compile: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        ranks: int = 1,
        chunk: int = 0,
        threads: int = 0,
    ) -> None:
        assert images.dtype == np.uint8, images.dtype
        assert images.ndim == 4, images.shape
        assert len(images) == len(labels), (len(images), len(labels))
        assert all(0 <= value <= 255 for value in fill), fill
        self.samples = len(images)
        self.steps = cut(self.samples, batch_size, drop_last, rank, ranks)
        self.steps_per_epoch = self.steps.per_epoch
        self.batch_size = batch_size
        self._device = torch.device(device)
        self._labels = np.array(labels, dtype=np.int64)
        self._inside = prefix(augment)
        rest, share = augment[self._inside :], self.steps.share
        self._stride = min(max((chunk or CHUNK[self._device.type]) // share, 1), self.steps_per_epoch)
        self._source = Source(images, augment, self._inside, seed, self.steps)
        self._chunks = Chunks(self._source, self._stride, fill, self._device, threads)
        kernel = compiled(rest, fill, share, share, self._device) if compile else plain(rest, fill)
        self._after = kernel if rest else None
        self._all = upload(np.arange(share, dtype=np.int32), self._device)

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's batches from `start_step` on: (images uint8 channels_last [b,3,32,32], labels int64 [b]).

        As TensorLoader's. Left before its end, by a break or by an error, it ends DALI's threads; they start anew when
        they are needed.
        """
        assert 0 <= start_step <= self.steps_per_epoch, (start_step, self.steps_per_epoch)
        draws, share = self._source.draws(epoch), self.steps.share
        labels = by_step(self.steps, self._labels[draws.order], self._device)
        params = params_by_step(self.steps, draws.params[self._inside :], self._device)
        try:
            for first in range(start_step, self.steps_per_epoch, self._stride):
                taken = self._chunks.take((epoch, first))
                for step in range(first, min(first + self._stride, self.steps_per_epoch)):
                    images = taken[(step - first) * share :][:share].permute(0, 3, 1, 2)
                    if self._after:
                        with torch.no_grad():
                            rows = images.permute(0, 2, 3, 1).flatten(2)
                            images = self._after(rows, self._all, params[step])
                    count = self.steps.count(step)
                    yield images[:count], labels[step][:count]
        except BaseException:  # of DALI, or of the loop that this generator serves: GeneratorExit, a Ctrl-C
            self._chunks.close()
            raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without DALI's warnings of CUDA libraries that nothing here uses."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no longer shipped with CUDA runtime|GPU is not available")
        yield


def _whole(op: Op) -> int:
    assert isinstance(op.number, int), op
    return op.number
