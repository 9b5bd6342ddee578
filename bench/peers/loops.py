"""Ways to train the same network on the same images: the source projects', two that a user would try, airbench's, ours.

Each is a generator that trains one step each time it is asked and gives the number of its images, for ever; a row of
LOOPS. All of them are written here. The first three do what the source projects' loop does: take a batch from a
DataLoader of two workers over PIL images, clip, step, read the loss and count the hits. Those in airbench's style do
what the fast published CIFAR loops do: keep the whole set on the device, augment there a batch at a time, train 16-bit
weights with a fused Nesterov SGD, clip nothing and read nothing.
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

from fastcifar.benchmark.workloads import train_workload
from fastcifar.data.cifar import load_dataset
from fastcifar.data.normalization import parse_normalization
from fastcifar.models import build_model
from fastcifar.recipe import Recipe
from fastcifar.training.build import build_trainer
from fastcifar.training.resolve import resolve

WORKERS, EPOCHS = 2, 200

HOLE = 8  # pixels of a side


@dataclass(frozen=True)
class Augmentation:
    """One augmentation as fastcifar spells it and as torchvision does: of a PIL image, then of its tensor."""

    spelling: str
    of_image: Callable[[], list[Callable]]
    of_tensor: Callable[[], list[Callable]] = list


AUGMENTATIONS: dict[str, Augmentation] = {
    "crop-flip": Augmentation(
        "crop:4:zero,flip", lambda: [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    ),
    "crop-flip-cutout": Augmentation(
        f"crop:4:zero,flip,cutout:{HOLE}:mean",
        lambda: [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()],
        lambda: [transforms.RandomErasing(1, ((HOLE / 32) ** 2,) * 2, (1, 1))],
    ),
    "a": Augmentation(
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
        train = load_dataset(data, download=False).train
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
        augment=AUGMENTATIONS[setting.augment].spelling,
        data=setting.data,
        device=setting.device,  # type: ignore[arg-type]
        val_size=0,
    )
    parts = build_trainer(resolve(recipe))
    yield from train_workload(parts, parts.build_train_step())


def airbench_style(setting: Setting) -> Iterator[int]:
    """The set and its augmentation on the device, bf16 weights, channels_last, eager."""
    yield from train_on_device(setting, half(network(setting)))


def airbench_style_compiled(setting: Setting) -> Iterator[int]:
    """The same, compiled as those loops are: on a GPU with every kernel tuned and the passes replayed as graphs."""
    model = half(network(setting))
    yield from train_on_device(setting, torch.compile(model, mode="max-autotune" if setting.device == "cuda" else None))


LOOPS: dict[str, Callable[[Setting], Iterator[int]]] = {
    "source_loop": source_loop,
    "eager_bf16": eager_bf16,
    "plain_compile": plain_compile,
    "airbench_style": airbench_style,
    "airbench_style_compiled": airbench_style_compiled,
    "ours": ours,
}
ON_DEVICE = {"airbench_style", "airbench_style_compiled"}
THEIRS = {"crop-flip", "crop-flip-cutout"}  # what those on the device know


def half(model: nn.Module) -> nn.Module:
    """bf16 and channels_last, but for the norms, whose statistics stay float32."""
    model.to(torch.bfloat16, memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    return model


def train_on_device(setting: Setting, model: nn.Module) -> Iterator[int]:
    """The loop of the two in airbench's style: as theirs, it knows THEIRS alone and drops a short last batch."""
    if setting.augment not in THEIRS:
        raise SystemExit(f"the loops in airbench's style augment by {' or '.join(sorted(THEIRS))} only")
    padded, labels = resident(setting)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True)
    steps = EPOCHS * -(-len(labels) // setting.batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    model.train()
    for _ in itertools.count():
        order = torch.randperm(len(labels), device=setting.device)
        for index in order[: len(order) // setting.batch_size * setting.batch_size].split(setting.batch_size):
            images = crop_and_flip(padded[index])
            images = cut_out(images) if setting.augment == "crop-flip-cutout" else images
            loss = F.cross_entropy(model(images).float(), labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            yield len(index)


def resident(setting: Setting) -> tuple[Tensor, Tensor]:
    """The whole training set on the device: bf16 images [n,3,40,40], normalised, four zeros around; labels [n]."""
    train = load_dataset(setting.data, download=False).train
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in parse_normalization("cifar10"))
    parts = torch.from_numpy(np.ascontiguousarray(train.images)).split(5000)
    normalised = torch.cat([((part / 255 - mean) / std).to(torch.bfloat16) for part in parts])
    padded = F.pad(normalised.to(setting.device), (4, 4, 4, 4))
    return padded.contiguous(memory_format=torch.channels_last), torch.from_numpy(train.labels).to(setting.device)


def crop_and_flip(padded: Tensor) -> Tensor:
    """[n,3,40,40] -> [n,3,32,32]: a window of each image, half of them mirrored, in one gather."""
    count, side, device = len(padded), 32, padded.device
    top, left = torch.randint(padded.shape[2] - side + 1, (2, count, 1), device=device)
    offsets = torch.arange(side, device=device)
    mirrored = torch.rand(count, 1, device=device) < 0.5
    rows, columns = top + offsets, left + torch.where(mirrored, side - 1 - offsets, offsets)
    images = padded.permute(0, 2, 3, 1)[
        torch.arange(count, device=device).view(-1, 1, 1), rows[:, :, None], columns[:, None]
    ]
    return images.permute(0, 3, 1, 2)


def cut_out(images: Tensor) -> Tensor:
    """[n,3,32,32] with a square of HOLE pixels of each image at 0, the mean."""
    count, _, side, _ = images.shape
    top, left = torch.randint(side - HOLE + 1, (2, count, 1), device=images.device)
    offsets = torch.arange(side, device=images.device)
    rows, columns = ((offsets >= start) & (offsets < start + HOLE) for start in (top, left))
    return images.masked_fill((rows[:, :, None] & columns[:, None])[:, None], 0)


def network(setting: Setting) -> nn.Module:
    torch.manual_seed(0)
    return build_model(setting.arch).to(setting.device)


def train(setting: Setting, model: nn.Module, bf16: bool) -> Iterator[int]:
    """The loop that the first three share."""
    normalise = transforms.Normalize(*parse_normalization("cifar10"))
    ops = AUGMENTATIONS[setting.augment]
    transform = transforms.Compose([*ops.of_image(), transforms.ToTensor(), normalise, *ops.of_tensor()])
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
