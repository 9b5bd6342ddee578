"""The table of loaders, `LOADERS`, the tensor loader, the torchvision loader, and functions that use loaders."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastcifar.data.augment import AugmentOp, AugmentOps
from fastcifar.data.batch_loader import ChunkParams, EpochInputs, Loader, SelectInputs
from fastcifar.data.dali import DaliLoader
from fastcifar.data.epoch_draws import upload_array
from fastcifar.data.image_ops import CIFAR_IMAGE_SIZE, FILL_COLORS, FillColor
from fastcifar.data.policies import ERASE_ASPECT_RANGE, ERASE_PROBABILITY, MIN_ERASE_AREA
from fastcifar.data.transforms import seeded_generators, to_uint8_tensor
from fastcifar.device import import_optional
from fastcifar.errors import UsageError

TORCHVISION_REMEDY = "use --loader tensor, or pip install 'torchvision>=0.26'"
Transform = Callable[[Any], Any]
UPLOAD_IMAGES = 8192  # images per upload: 25 MB of pinned memory instead of a second copy of the data set


class TensorLoader(Loader):
    """Loader that keeps the data set on the device; compiled kernels gather and augment the images of a chunk.

    On a GPU, the next chunk is computed on a separate stream while the network trains on the current one.
    """

    # On a GPU, few launches for many batches; on a CPU, larger chunks exceed its cache.
    chunk_images: Mapping[str, int] = {"cpu": 1, "cuda": 4096}

    def _prepare(self, images: np.ndarray) -> SelectInputs:
        # NHWC, viewed as rows of 96 bytes, so that the output is channels_last without a copy.
        shape = (self.num_samples, CIFAR_IMAGE_SIZE, 3 * CIFAR_IMAGE_SIZE)
        self._rows = torch.empty(shape, dtype=torch.uint8, device=self._device)
        for start in range(0, self.num_samples, UPLOAD_IMAGES):
            uploaded = upload_array(images[start : start + UPLOAD_IMAGES], self._device)
            self._rows[start : start + UPLOAD_IMAGES] = uploaded.permute(0, 2, 3, 1).flatten(2)
        self._gather = self._make_gather(self._ops, self.num_samples)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        return lambda params: ([], [{"indices": params.permutation.astype(np.int32)}, *params.op_params])

    def _image_chunks(
        self, epoch: int, inputs: EpochInputs, params: list[ChunkParams], first_chunk: int
    ) -> Iterator[Tensor]:
        def gather(chunk: int) -> Tensor:
            _, indices, *op_params = params[chunk]
            with torch.no_grad():  # a change of the grad mode by the caller would trigger a recompilation
                return self._gather(self._rows, indices["indices"], tuple(op_params))

        chunks = range(first_chunk, len(params))
        yield from self._gather_ahead(gather, chunks, self._stream) if self._stream else map(gather, chunks)

    def _gather_ahead(
        self, gather: Callable[[int], Tensor], chunks: range, stream: torch.cuda.Stream
    ) -> Iterator[Tensor]:
        """Yield `gather(chunk)` for all chunks; each is computed on `stream` while the previous one is used.

        The memory of a chunk is allocated in the current stream. `stream` writes to it after everything that the
        current stream did before, and the current stream waits for `stream` before the chunk is used or freed.
        """
        current = torch.cuda.current_stream(self._device)
        shape = (self._chunk_size, CIFAR_IMAGE_SIZE, CIFAR_IMAGE_SIZE, 3)

        def start(chunk: int) -> Tensor:
            images = torch.empty(shape, dtype=torch.uint8, device=self._device).permute(0, 3, 1, 2)
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                return images.copy_(gather(chunk))

        try:
            ahead = start(chunks[0]) if chunks else None
            while ahead is not None:
                current.wait_stream(stream)
                images, chunks = ahead, chunks[1:]
                ahead = start(chunks[0]) if chunks else None
                yield images
        finally:  # the iteration may end early
            current.wait_stream(stream)


def _cutout(image: Image.Image, size: int, fill_color: FillColor) -> Image.Image:
    """Fill a square around a random center, clipped at the border; torchvision has no equivalent."""
    left, top = (torch.randint(CIFAR_IMAGE_SIZE, (2,)) - size // 2).tolist()
    image = image.copy()
    image.paste(fill_color, (left, top, left + size, top + size))
    return image


def _random_erasing(v2: Any, op: AugmentOp, fill_color: FillColor) -> Transform:
    color, area = FILL_COLORS.get(op.variant, fill_color), (MIN_ERASE_AREA, op.value)
    return v2.RandomErasing(ERASE_PROBABILITY, area, ERASE_ASPECT_RANGE, value=color)


# (name, variant) of an augmentation -> function (torchvision.transforms.v2, op, mean color) -> transform of a PIL image
TORCHVISION_TRANSFORMS: dict[tuple[str, str], Callable[[Any, Any, FillColor], Transform]] = {
    ("crop", "zero"): lambda v2, op, _: v2.RandomCrop(CIFAR_IMAGE_SIZE, padding=op.value),
    ("crop", "reflect"): lambda v2, op, _: v2.RandomCrop(CIFAR_IMAGE_SIZE, padding=op.value, padding_mode="reflect"),
    ("flip", "random"): lambda v2, op, _: v2.RandomHorizontalFlip(op.value),
    ("cutout", "mean"): lambda _, op, fill: partial(_cutout, size=op.value, fill_color=fill),
    ("cutout", "zero"): lambda _, op, fill: partial(_cutout, size=op.value, fill_color=(0, 0, 0)),
    **dict.fromkeys([("erase", "gray"), ("erase", "mean"), ("erase", "zero")], _random_erasing),
    ("rotate", ""): lambda v2, op, _: v2.RandomRotation(op.value),
    ("jitter", ""): lambda v2, op, _: v2.ColorJitter(op.value, op.value, op.value, op.value / 2),
    ("autoaugment", "cifar10"): lambda v2, op, _: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
    **{("randaugment", n): lambda v2, op, _: v2.RandAugment(int(op.variant), op.value) for n in ("1", "2", "3")},
    ("trivialaugment", "wide"): lambda v2, op, _: v2.TrivialAugmentWide(),
}


class TorchvisionLoader(Loader):
    """Loader that keeps the data set in host memory and creates a DataLoader with `workers` processes each epoch."""

    uses_workers = True

    def _prepare(self, images: np.ndarray) -> SelectInputs:
        self._transform = build_transform(self._ops, self._fill_color)
        self._ops = ()  # torchvision draws the random parameters
        self._pixels = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
        return lambda params: ([params.permutation], [])

    def _image_chunks(
        self, epoch: int, inputs: EpochInputs, params: list[ChunkParams], first_chunk: int
    ) -> Iterator[Tensor]:
        assert self._chunk_steps == 1, self._chunk_steps
        (table,), start_step = inputs.host, first_chunk
        steps = [(step, *indices[: self.slicing.local_count(step)].tolist()) for step, indices in enumerate(table)]
        loader = DataLoader(
            _TransformedImages(self._pixels, self._transform, (self._seed, epoch, self.slicing.rank)),
            batch_sampler=steps[start_step:],  # type: ignore[arg-type]  # a step is its number and the sample indices
            num_workers=min(self._workers, self.steps_per_epoch - start_step),
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # the global generator is used by the network
        )
        for images in loader:
            uploaded = images.to(self._device, non_blocking=True)
            yield uploaded.contiguous(memory_format=torch.channels_last)


class _TransformedImages(Dataset[Tensor]):
    """The data set in the workers, uint8 [n,32,32,3]; `__getitems__` returns all images of a step, uint8 [3,32,32]."""

    def __init__(self, pixels: np.ndarray, transform: Transform, seed_key: tuple[int, int, int]) -> None:
        self.pixels, self.transform, self.seed_key = pixels, transform, seed_key

    def __getitems__(self, step: tuple[int, ...]) -> list[Tensor]:
        number, *indices = step
        with seeded_generators((*self.seed_key, number)):  # without workers, the network shares the generators
            return [self.transform(Image.fromarray(self.pixels[index])) for index in indices]


def build_transform(ops: AugmentOps, fill_color: FillColor) -> Transform:
    """Return the transform of `ops`, PIL image -> uint8 [3,32,32]. Raises `UsageError` if an op has no equivalent."""
    for op in ops:
        if not op.function and (op.name, op.variant) not in TORCHVISION_TRANSFORMS:
            variants = [variant for name, variant in TORCHVISION_TRANSFORMS if name == op.name]
            alternative = f", or {op.name} with {' or '.join(variants)}" if variants else ""
            problem = f"--loader torchvision does not support {op}"
            raise UsageError(problem, f"use --loader tensor{alternative}")
    v2 = import_optional("torchvision.transforms.v2", TORCHVISION_REMEDY)
    transforms = [op.function or TORCHVISION_TRANSFORMS[op.name, op.variant](v2, op, fill_color) for op in ops]
    to_tensor = to_uint8_tensor if any(op.function for op in ops) else v2.PILToTensor()
    return v2.Compose([*transforms, to_tensor])


LOADERS: dict[str, type[Loader]] = {
    "tensor": TensorLoader,
    "dali": DaliLoader,
    "torchvision": TorchvisionLoader,  # the baseline for comparisons
}


def eval_batches(
    images: np.ndarray, labels: np.ndarray, batch_size: int, device: torch.device | str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the data in order without augmentation: (images uint8 channels_last [b,3,32,32], labels int64 [b])."""
    assert len(images) == len(labels), (len(images), len(labels))
    device = torch.device(device)
    for start in range(0, len(images), batch_size):
        image_batch = upload_array(images[start : start + batch_size], device)
        label_batch = upload_array(np.asarray(labels[start : start + batch_size], dtype=np.int64), device)
        yield image_batch.contiguous(memory_format=torch.channels_last), label_batch
