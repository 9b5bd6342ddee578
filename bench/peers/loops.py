"""Four ways to train the same network on the same images: the source projects' own, two that a user would try, ours.

Each is a generator that trains one step each time it is asked and gives the number of its images, for ever; a row of
LOOPS. All of them are written here, from the description of the source projects, and do what their loop does: take a
batch from a DataLoader of two workers over PIL images, clip, step, read the loss and count the hits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pytorch_optimizer import Lookahead
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from fastcifar.data.cifar import load, normalisation
from fastcifar.device import choose
from fastcifar.lab.works import train_work
from fastcifar.models import build
from fastcifar.recipe import Recipe
from fastcifar.training.parts import assemble

WORKERS, EPOCHS = 2, 200

# name -> the same augmentation as fastcifar spells it and as torchvision does
AUGMENTATIONS: dict[str, tuple[str, Callable[[], list[Callable]]]] = {
    "crop-flip": (
        "crop:4:zero,flip",
        lambda: [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()],
    ),
    "a": (
        "crop:4:zero,flip,rotate:5,autoaugment:cifar10",
        lambda: [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.RandomRotation(5),
            transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10),
        ],
    ),
}


@dataclass(frozen=True)
class Setting:
    """What all loops share. `data` as `fastcifar train --data` takes it; `device` "cuda" or "cpu"."""

    arch: str = "se68"
    batch_size: int = 128
    augment: str = "crop-flip"
    data: str | None = None
    device: str = "cpu"


class Images(Dataset):
    """The training images as torchvision's CIFAR10 gives them, which refuses files in another order than published."""

    def __init__(self, data: str | None, transform: Callable[[Image.Image], Tensor]) -> None:
        train = load(data, download=False).train
        self.images = np.ascontiguousarray(train.images.transpose(0, 2, 3, 1))
        self.labels = train.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def source_loop(setting: Setting) -> Iterator[int]:
    """The source projects' loop, as its code would be written today: float32, NCHW, eager."""
    yield from train(setting, network(setting), bf16=False)


def eager_bf16(setting: Setting) -> Iterator[int]:
    """The same loop under bf16 autocast, with a channels_last network."""
    yield from train(setting, network(setting).to(memory_format=torch.channels_last), bf16=True)


def plain_compile(setting: Setting) -> Iterator[int]:
    """The same as `eager_bf16`, and `torch.compile(model)`, as a user would write it."""
    yield from train(setting, torch.compile(network(setting).to(memory_format=torch.channels_last)), bf16=True)


def ours(setting: Setting) -> Iterator[int]:
    """What `fastcifar train` runs: its loader and its step, at the settings it chooses by itself."""
    recipe = Recipe(
        arch=setting.arch,
        batch_size=setting.batch_size,
        augment=AUGMENTATIONS[setting.augment][0],
        data=setting.data,
        device=setting.device,  # type: ignore[arg-type]
        val_size=0,
    )
    parts = assemble(recipe, choose(recipe))
    yield from train_work(parts, parts.fast_step())


LOOPS: dict[str, Callable[[Setting], Iterator[int]]] = {
    "source_loop": source_loop,
    "eager_bf16": eager_bf16,
    "plain_compile": plain_compile,
    "ours": ours,
}


def network(setting: Setting) -> nn.Module:
    torch.manual_seed(0)
    return build(setting.arch).to(setting.device)


def train(setting: Setting, model: nn.Module, bf16: bool) -> Iterator[int]:
    """The loop that the first three share."""
    normalise = transforms.Normalize(*normalisation("cifar10"))
    transform = transforms.Compose([*AUGMENTATIONS[setting.augment][1](), transforms.ToTensor(), normalise])
    batches = DataLoader(Images(setting.data, transform), setting.batch_size, shuffle=True, num_workers=WORKERS)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    optimizer = Lookahead(inner, k=5, alpha=0.5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(inner, T_max=EPOCHS)
    layout = torch.channels_last if bf16 else torch.contiguous_format
    model.train()
    for _ in itertools.count():
        total_loss, hits, seen = 0.0, 0, 0
        for images, labels in batches:
            images, labels = images.to(setting.device, memory_format=layout), labels.to(setting.device)
            optimizer.zero_grad()
            with torch.autocast(setting.device, torch.bfloat16, enabled=bf16):
                logits = model(images)
                loss = F.cross_entropy(logits, labels)
            loss.backward()
            nn.utils.clip_grad_value_(model.parameters(), 0.1)
            optimizer.step()
            total_loss += loss.item()
            seen += len(labels)
            hits += logits.max(1).indices.eq(labels).sum().item()
            _running = total_loss / seen, hits / seen  # what its progress bar shows
            yield len(labels)
        schedule.step()
