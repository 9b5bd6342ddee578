"""The conventional loader: a DataLoader whose workers transform and collate one image at a time with torchvision.

It is the baseline for comparisons. The order of an epoch is that of the other loaders; torchvision draws the random
parameters, seeded for each step and rank, so that neither the number of workers nor resuming changes a batch.
torchvision is imported when a loader is created, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastcifar.data.augment import CIFAR_IMAGE_SIZE, AugmentOp, FillColor, draw_epoch, format_augment
from fastcifar.data.batch_slicing import slice_epoch
from fastcifar.data.crop_flip_erase import ERASE_ASPECT_RANGE, ERASE_PROBABILITY, FILL_COLORS, MIN_ERASE_AREA
from fastcifar.device import import_optional
from fastcifar.errors import UsageError

TORCHVISION_REMEDY = "use --loader tensor, or pip install 'torchvision>=0.26'"
Transform = Callable[[Any], Any]


class Cutout:
    """Fill a square of `size` pixels around a random center, clipped at the border; torchvision has no equivalent."""

    def __init__(self, size: int, fill_color: FillColor) -> None:
        self.size, self.fill_color = size, fill_color

    def __call__(self, image: Image.Image) -> Image.Image:
        left, top = (torch.randint(CIFAR_IMAGE_SIZE, (2,)) - self.size // 2).tolist()
        image = image.copy()
        image.paste(self.fill_color, (left, top, left + self.size, top + self.size))
        return image


def make_random_erasing(v2: Any, op: AugmentOp, fill_color: FillColor) -> Transform:
    """Return torchvision's RandomErasing with `op.value` as the largest fraction of the area."""
    return v2.RandomErasing(ERASE_PROBABILITY, (MIN_ERASE_AREA, op.value), ERASE_ASPECT_RANGE, value=fill_color)


# (name, variant) of an augmentation -> (torchvision.transforms.v2, op, mean color) -> the same transform of a PIL image
TORCHVISION_TRANSFORMS: dict[tuple[str, str], Callable[[Any, Any, FillColor], Transform]] = {
    ("crop", "zero"): lambda v2, op, _: v2.RandomCrop(CIFAR_IMAGE_SIZE, padding=op.value),
    ("crop", "reflect"): lambda v2, op, _: v2.RandomCrop(CIFAR_IMAGE_SIZE, padding=op.value, padding_mode="reflect"),
    ("flip", "random"): lambda v2, op, _: v2.RandomHorizontalFlip(op.value),
    ("cutout", "mean"): lambda _, op, fill: Cutout(op.value, fill),
    ("cutout", "zero"): lambda _, op, fill: Cutout(op.value, (0, 0, 0)),
    ("erase", "gray"): lambda v2, op, _: make_random_erasing(v2, op, FILL_COLORS["gray"]),
    ("erase", "mean"): lambda v2, op, fill: make_random_erasing(v2, op, fill),
    ("erase", "zero"): lambda v2, op, _: make_random_erasing(v2, op, FILL_COLORS["zero"]),
    ("rotate", ""): lambda v2, op, _: v2.RandomRotation(op.value),
    ("jitter", ""): lambda v2, op, _: v2.ColorJitter(op.value, op.value, op.value, op.value / 2),
    ("autoaugment", "cifar10"): lambda v2, op, _: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
    ("randaugment", "1"): lambda v2, op, _: v2.RandAugment(1, op.value),
    ("randaugment", "2"): lambda v2, op, _: v2.RandAugment(2, op.value),
    ("randaugment", "3"): lambda v2, op, _: v2.RandAugment(3, op.value),
    ("trivialaugment", "wide"): lambda v2, op, _: v2.TrivialAugmentWide(),
}


class TorchvisionLoader:
    """Loader that keeps the data set in host memory and creates a DataLoader for each epoch.

    The arguments are those of `TensorLoader`, with `workers`, the number of worker processes (0 for none), instead of
    `compile`. Raises `UsageError` if an augmentation has no counterpart in torchvision or torchvision is not installed,
    and as `slice_epoch` does.
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
        workers: int = 2,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert images.dtype == np.uint8, images.dtype
        assert len(images) == len(labels), (len(images), len(labels))
        self.num_samples = len(images)
        self.slicing = slice_epoch(self.num_samples, batch_size, drop_last, rank, world_size)
        self.steps_per_epoch = self.slicing.steps_per_epoch
        self.batch_size = batch_size
        self._transform = build_transform(augment, fill_color)
        self._pixels = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
        self._labels = np.array(labels, dtype=np.int64)
        self._seed, self._device, self._workers = seed, torch.device(device), workers

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's batches from `start_step` on: (images uint8 channels_last [b,3,32,32], labels int64 [b]).

        A later `start_step` gives exactly the remaining batches of the epoch.
        """
        assert 0 <= start_step <= self.steps_per_epoch, (start_step, self.steps_per_epoch)
        permutation = draw_epoch((), self.num_samples, epoch, self._seed).permutation
        table = self.slicing.step_table(permutation)
        steps = [_StepIndices(step, indices[: self.slicing.local_count(step)]) for step, indices in enumerate(table)]
        on_gpu = self._device.type == "cuda"
        loader = DataLoader(
            _TransformedImages(self._pixels, self._labels, self._transform, (self._seed, epoch, self.slicing.rank)),
            batch_sampler=steps[start_step:],  # type: ignore[arg-type]  # a step is a list of indices and its number
            num_workers=min(self._workers, self.steps_per_epoch - start_step),
            pin_memory=on_gpu,
            generator=torch.Generator(),  # the global generator is used by the network
        )
        for images, labels in loader:
            images, labels = (tensor.to(self._device, non_blocking=on_gpu) for tensor in (images, labels))
            yield images.contiguous(memory_format=torch.channels_last), labels


class _StepIndices(list[int]):
    """The sample indices of one step and the step number, as sent to a worker."""

    def __init__(self, number: int, indices: np.ndarray) -> None:
        super().__init__(indices.tolist())
        self.number = number


class _TransformedImages(Dataset[tuple[Tensor, int]]):
    """The data set of the workers: pixels uint8 [n,32,32,3] and labels [n]; one call fetches the images of a step."""

    def __init__(
        self, pixels: np.ndarray, labels: np.ndarray, transform: Transform, seed_key: tuple[int, int, int]
    ) -> None:
        self.pixels, self.labels, self.transform, self.seed_key = pixels, labels, transform, seed_key

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, step: _StepIndices) -> list[tuple[Tensor, int]]:
        """Return the transformed images of a step, uint8 [3,32,32] each, and their labels."""
        state = np.random.SeedSequence([*self.seed_key, step.number]).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):  # without workers, the network uses the generator of this process
            torch.default_generator.manual_seed(int(state[0]))
            return [(self.transform(Image.fromarray(self.pixels[index])), int(self.labels[index])) for index in step]


def build_transform(ops: tuple[AugmentOp, ...], fill_color: FillColor) -> Transform:
    """Return the torchvision transform of `ops`, from a PIL image to uint8 [3,32,32].

    Raises `UsageError` if an augmentation has no counterpart in torchvision or torchvision is not installed.
    """
    for op in ops:
        if (op.name, op.variant) not in TORCHVISION_TRANSFORMS:
            variants = [variant for name, variant in TORCHVISION_TRANSFORMS if name == op.name]
            alternative = f", or {op.name} with {' or '.join(variants)}" if variants else ""
            raise UsageError(
                f"--loader torchvision does not support {format_augment((op,))}", f"use --loader tensor{alternative}"
            )
    v2 = import_optional("torchvision.transforms.v2", TORCHVISION_REMEDY)
    return v2.Compose(
        [*(TORCHVISION_TRANSFORMS[op.name, op.variant](v2, op, fill_color) for op in ops), v2.PILToTensor()]
    )
