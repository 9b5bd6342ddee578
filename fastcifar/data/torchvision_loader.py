"""The loader as people write it: a DataLoader whose workers decode, transform and stack one image at a time.

It is the baseline that the others are compared with. The order of an epoch is theirs; the draws of the augmentations
are torchvision's own, from a seed for each step and rank, so that workers and resuming change nothing. torchvision is
imported when a loader is made, never before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastcifar.data.augment import SIDE, Fill, Op, draw_epoch, spell
from fastcifar.data.batch_slicing import cut
from fastcifar.data.crop_flip_erase import ASPECTS, COLOURS, ERASED, SMALLEST
from fastcifar.device import optional
from fastcifar.errors import UsageError

REMEDY = "use --loader tensor, or pip install 'torchvision>=0.26'"
Transform = Callable[[Any], Any]


class Cutout:
    """torchvision has none of fixed size: a square of `size` pixels around a random centre, cut off at the border."""

    def __init__(self, size: int, colour: Fill) -> None:
        self.size, self.colour = size, colour

    def __call__(self, image: Image.Image) -> Image.Image:
        left, top = (torch.randint(SIDE, (2,)) - self.size // 2).tolist()
        image = image.copy()
        image.paste(self.colour, (left, top, left + self.size, top + self.size))
        return image


def erasing(v2: Any, op: Op, colour: Fill) -> Transform:
    """torchvision's RandomErasing with the op's largest share of the area."""
    return v2.RandomErasing(ERASED, (SMALLEST, op.number), ASPECTS, value=colour)


# (name, word) of an op -> what does the same to a PIL image, from torchvision.transforms.v2, the op and the mean colour
COUNTERPARTS: dict[tuple[str, str], Callable[[Any, Any, Fill], Transform]] = {
    ("crop", "zero"): lambda v2, op, _: v2.RandomCrop(SIDE, padding=op.number),
    ("crop", "reflect"): lambda v2, op, _: v2.RandomCrop(SIDE, padding=op.number, padding_mode="reflect"),
    ("flip", "random"): lambda v2, op, _: v2.RandomHorizontalFlip(op.number),
    ("cutout", "mean"): lambda _, op, fill: Cutout(op.number, fill),
    ("cutout", "zero"): lambda _, op, fill: Cutout(op.number, (0, 0, 0)),
    ("erase", "grey"): lambda v2, op, _: erasing(v2, op, COLOURS["grey"]),
    ("erase", "mean"): lambda v2, op, fill: erasing(v2, op, fill),
    ("erase", "zero"): lambda v2, op, _: erasing(v2, op, COLOURS["zero"]),
    ("rotate", ""): lambda v2, op, _: v2.RandomRotation(op.number),
    ("jitter", ""): lambda v2, op, _: v2.ColorJitter(op.number, op.number, op.number, op.number / 2),
    ("autoaugment", "cifar10"): lambda v2, op, _: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
    ("randaugment", "1"): lambda v2, op, _: v2.RandAugment(1, op.number),
    ("randaugment", "2"): lambda v2, op, _: v2.RandAugment(2, op.number),
    ("randaugment", "3"): lambda v2, op, _: v2.RandAugment(3, op.number),
    ("trivialaugment", "wide"): lambda v2, op, _: v2.TrivialAugmentWide(),
}


class TorchvisionLoader:
    """The set in the host's memory; a DataLoader of `workers` processes (0: this one) for each epoch.

    The arguments are TensorLoader's; `workers` and the worker processes are all that differ.
    Raises `UsageError` for an op without a counterpart, without torchvision, and as `steps.cut` does.
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
        workers: int = 2,
        drop_last: bool = False,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        assert images.dtype == np.uint8, images.dtype
        assert len(images) == len(labels), (len(images), len(labels))
        self.samples = len(images)
        self.steps = cut(self.samples, batch_size, drop_last, rank, ranks)
        self.steps_per_epoch = self.steps.per_epoch
        self.batch_size = batch_size
        self._transform = transform(augment, fill)
        self._pixels = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
        self._labels = np.array(labels, dtype=np.int64)
        self._seed, self._device, self._workers = seed, torch.device(device), workers

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's batches from `start_step` on: (images uint8 channels_last [b,3,32,32], labels int64 [b]).

        Starting late gives exactly the batches that the whole epoch would have given from there.
        """
        assert 0 <= start_step <= self.steps_per_epoch, (start_step, self.steps_per_epoch)
        order = draw_epoch((), self.samples, epoch, self._seed).order
        shares = self.steps.table(order)
        steps = [_Step(step, share[: self.steps.count(step)]) for step, share in enumerate(shares)]
        on_gpu = self._device.type == "cuda"
        loader = DataLoader(
            _Images(self._pixels, self._labels, self._transform, (self._seed, epoch, self.steps.rank)),
            batch_sampler=steps[start_step:],  # type: ignore[arg-type]  # a step is a list of indices and its number
            num_workers=min(self._workers, self.steps_per_epoch - start_step),
            pin_memory=on_gpu,
            generator=torch.Generator(),  # the global one belongs to the network
        )
        for images, labels in loader:
            images, labels = (part.to(self._device, non_blocking=on_gpu) for part in (images, labels))
            yield images.contiguous(memory_format=torch.channels_last), labels


class _Step(list[int]):
    """The samples of one step, and its number: what travels to a worker."""

    def __init__(self, number: int, samples: np.ndarray) -> None:
        super().__init__(samples.tolist())
        self.number = number


class _Images(Dataset[tuple[Tensor, int]]):
    """What the workers hold: pixels uint8 [n,32,32,3] and labels [n]; one step's images are fetched by one call."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, transform: Transform, key: tuple[int, int, int]) -> None:
        self.pixels, self.labels, self.transform, self.key = pixels, labels, transform, key

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, step: _Step) -> list[tuple[Tensor, int]]:
        """The step's images, transformed: uint8 [3,32,32] each, and labels."""
        state = np.random.SeedSequence([*self.key, step.number]).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):  # without workers this process's generator is the network's
            torch.default_generator.manual_seed(int(state[0]))
            return [(self.transform(Image.fromarray(self.pixels[index])), int(self.labels[index])) for index in step]


def transform(ops: tuple[Op, ...], fill: Fill) -> Transform:
    """The ops in torchvision's words: a PIL image -> uint8 [3,32,32].

    Raises `UsageError` for an op that has no counterpart, and without torchvision.
    """
    for op in ops:
        if (op.name, op.word) not in COUNTERPARTS:
            words = [word for name, word in COUNTERPARTS if name == op.name]
            instead = f", or {op.name} with {' or '.join(words)}" if words else ""
            raise UsageError(f"--loader torchvision has no {spell((op,))}", f"use --loader tensor{instead}")
    v2 = optional("torchvision.transforms.v2", REMEDY)
    return v2.Compose([*(COUNTERPARTS[op.name, op.word](v2, op, fill) for op in ops), v2.PILToTensor()])
