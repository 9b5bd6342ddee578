"""Training loops for the same network and images: of the source projects, of typical users, of airbench, of fastcifar.

Each loop is an infinite generator that trains one step per iteration and yields its number of images; LOOPS lists them.
All are written here. The first three follow the loop of the source projects: a batch from a DataLoader with two workers
over PIL images, gradient clipping, step, loss and accuracy read after every step. They and `ours` also exist for
inference, that is, the evaluation of test images. The loops in the style of airbench follow the fastest published CIFAR
programs: the data set is kept on the device and augmented there batch by batch, the weights have the precision of the
settings, the optimizer is a fused Nesterov SGD, without gradient clipping and without reading the loss.
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
from fastcifar.data.cifar_files import Split
from fastcifar.data.normalization import parse_normalization
from fastcifar.models import build_model
from fastcifar.recipe import Recipe
from fastcifar.training.build import build_trainer
from fastcifar.training.evaluate import EVAL_BATCH_SIZE, evaluate
from fastcifar.training.resolve import resolve
from fastcifar.training.step import DTYPES

WORKERS, EPOCHS = 2, 200

CUTOUT_SIZE = 8  # pixels


@dataclass(frozen=True)
class Augmentation:
    """An augmentation for fastcifar, as the value of --augment, and for torchvision, of PIL images and tensors."""

    spec: str
    image_transforms: Callable[[], list[Callable]]
    tensor_transforms: Callable[[], list[Callable]] = list


AUGMENTATIONS: dict[str, Augmentation] = {
    "crop-flip": Augmentation(
        "crop:4:zero,flip", lambda: [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    ),
    "crop-flip-cutout": Augmentation(
        f"crop:4:zero,flip,cutout:{CUTOUT_SIZE}:mean",
        lambda: [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()],
        lambda: [transforms.RandomErasing(1, ((CUTOUT_SIZE / 32) ** 2,) * 2, (1, 1))],
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
class Settings:
    """Settings of all loops: `data` as for `fastcifar train`, `device` "cuda" or "cpu", `precision` "bf16" or "fp32".

    `what` is "train" or "infer". The loop of the source projects always uses float32.
    """

    arch: str = "se68"
    batch_size: int = 128
    augment: str = "crop-flip"
    data: str | None = None
    device: str = "cpu"
    precision: str = "bf16"
    what: str = "train"


class Images(Dataset):
    """Images as torchvision.datasets.CIFAR10 returns them, also from files that it does not accept."""

    def __init__(self, split: Split, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images = np.ascontiguousarray(split.images.transpose(0, 2, 3, 1))
        self.labels = split.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def source_loop(settings: Settings) -> Iterator[int]:
    """Train with the loop of the source projects, as their code would be written today: float32, NCHW, eager."""
    yield from train_or_infer(settings, build_network(settings), torch.float32, torch.contiguous_format)


def eager(settings: Settings) -> Iterator[int]:
    """Train with the same loop under autocast, with a channels_last network."""
    model = build_network(settings).to(memory_format=torch.channels_last)
    yield from train_or_infer(settings, model, DTYPES[settings.precision], torch.channels_last)


def plain_compile(settings: Settings) -> Iterator[int]:
    """Train with the loop `eager` and `torch.compile(model)` with its defaults."""
    model = torch.compile(build_network(settings).to(memory_format=torch.channels_last))
    yield from train_or_infer(settings, model, DTYPES[settings.precision], torch.channels_last)


def ours(settings: Settings) -> Iterator[int]:
    """Train with the data loader and the training step of fastcifar, with the defaults of `fastcifar train`."""
    recipe = Recipe(
        arch=settings.arch,
        batch_size=settings.batch_size,
        augment=AUGMENTATIONS[settings.augment].spec,
        data=settings.data,
        device=settings.device,  # type: ignore[arg-type]
        precision=settings.precision,  # type: ignore[arg-type]
        val_size=0,
    )
    trainer = build_trainer(resolve(recipe))
    trainer.optimize()
    if settings.what == "train":
        yield from train_workload(trainer)
    test = trainer.data.test
    for start in itertools.cycle(range(0, len(test.labels), EVAL_BATCH_SIZE)):
        split = Split(*(array[start : start + EVAL_BATCH_SIZE] for array in (test.images, test.labels)))
        evaluate(trainer.model, trainer.eval_forward, split, trainer.device)
        yield len(split.labels)


def airbench_style(settings: Settings) -> Iterator[int]:
    """Train with data set and augmentation on the device, low-precision weights, channels_last, eager."""
    yield from train_on_device(settings, to_low_precision(build_network(settings), settings))


def airbench_style_compiled(settings: Settings) -> Iterator[int]:
    """Train with the loop `airbench_style`, compiled; on a GPU with the mode max-autotune, as airbench does."""
    model = to_low_precision(build_network(settings), settings)
    yield from train_on_device(
        settings, torch.compile(model, mode="max-autotune" if settings.device == "cuda" else None)
    )


LOOPS: dict[str, Callable[[Settings], Iterator[int]]] = {
    "source_loop": source_loop,
    "eager": eager,
    "plain_compile": plain_compile,
    "airbench_style": airbench_style,
    "airbench_style_compiled": airbench_style_compiled,
    "ours": ours,
}
ON_DEVICE = {"airbench_style", "airbench_style_compiled"}
ON_DEVICE_AUGMENTATIONS = {"crop-flip", "crop-flip-cutout"}  # supported by these loops


def to_low_precision(model: nn.Module, settings: Settings) -> nn.Module:
    """Convert a model to the precision of `settings` and channels_last, except BatchNorm, which remains float32."""
    model.to(DTYPES[settings.precision], memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    return model


def train_on_device(settings: Settings, model: nn.Module) -> Iterator[int]:
    """Train in the style of airbench: ON_DEVICE_AUGMENTATIONS only, and without the smaller last batch of an epoch."""
    if settings.augment not in ON_DEVICE_AUGMENTATIONS:
        raise SystemExit(f"airbench_style supports only --augment {' or '.join(sorted(ON_DEVICE_AUGMENTATIONS))}")
    padded, labels = load_on_device(settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True)
    steps = EPOCHS * -(-len(labels) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    model.train()
    for _ in itertools.count():
        order = torch.randperm(len(labels), device=settings.device)
        for index in order[: len(order) // settings.batch_size * settings.batch_size].split(settings.batch_size):
            images = crop_and_flip(padded[index])
            images = cut_out(images) if settings.augment == "crop-flip-cutout" else images
            loss = F.cross_entropy(model(images).float(), labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            yield len(index)


def load_on_device(settings: Settings) -> tuple[Tensor, Tensor]:
    """Return the training set on the device: normalized images [n,3,40,40], padded by 4 zeros, and labels [n]."""
    train = load_dataset(settings.data, download=False).train
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in parse_normalization("cifar10"))
    chunks = torch.from_numpy(np.ascontiguousarray(train.images)).split(5000)
    normalized = torch.cat([((chunk / 255 - mean) / std).to(DTYPES[settings.precision]) for chunk in chunks])
    padded = F.pad(normalized.to(settings.device), (4, 4, 4, 4))
    return padded.contiguous(memory_format=torch.channels_last), torch.from_numpy(train.labels).to(settings.device)


def crop_and_flip(padded: Tensor) -> Tensor:
    """Return a random crop of each image, half of them flipped, in one gather: [n,3,40,40] -> [n,3,32,32]."""
    count, side, device = len(padded), 32, padded.device
    top, left = torch.randint(padded.shape[2] - side + 1, (2, count, 1), device=device)
    offsets = torch.arange(side, device=device)
    flipped = torch.rand(count, 1, device=device) < 0.5
    rows, columns = top + offsets, left + torch.where(flipped, side - 1 - offsets, offsets)
    images = padded.permute(0, 2, 3, 1)[
        torch.arange(count, device=device).view(-1, 1, 1), rows[:, :, None], columns[:, None]
    ]
    return images.permute(0, 3, 1, 2)


def cut_out(images: Tensor) -> Tensor:
    """Set a random square of CUTOUT_SIZE pixels of each image to 0, the mean: [n,3,32,32] -> [n,3,32,32]."""
    count, _, side, _ = images.shape
    top, left = torch.randint(side - CUTOUT_SIZE + 1, (2, count, 1), device=images.device)
    offsets = torch.arange(side, device=images.device)
    rows, columns = ((offsets >= start) & (offsets < start + CUTOUT_SIZE) for start in (top, left))
    return images.masked_fill((rows[:, :, None] & columns[:, None])[:, None], 0)


def build_network(settings: Settings) -> nn.Module:
    """Return the network on the device, with weights from a fixed seed."""
    torch.manual_seed(0)
    return build_model(settings.arch).to(settings.device)


def train_or_infer(
    settings: Settings, model: nn.Module, dtype: torch.dtype, memory_format: torch.memory_format
) -> Iterator[int]:
    """Run `train` or `infer`."""
    yield from (train if settings.what == "train" else infer)(settings, model, dtype, memory_format)


def infer(
    settings: Settings, model: nn.Module, dtype: torch.dtype, memory_format: torch.memory_format
) -> Iterator[int]:
    """Evaluate the test images as the source projects do, with autocast to `dtype`."""
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(*parse_normalization("cifar10"))])
    split = load_dataset(settings.data, download=False).test
    batches = DataLoader(Images(split, transform), settings.batch_size, num_workers=WORKERS)
    model.eval()
    loss = correct = 0.0
    for _ in itertools.count():
        for images, labels in batches:
            images, labels = images.to(settings.device, memory_format=memory_format), labels.to(settings.device)
            with torch.no_grad(), torch.autocast(settings.device, dtype, enabled=dtype != torch.float32):
                logits = model(images)
                loss += F.cross_entropy(logits, labels).item()
            correct += logits.argmax(1).eq(labels).sum().item()
            yield len(labels)


def train(
    settings: Settings, model: nn.Module, dtype: torch.dtype, memory_format: torch.memory_format
) -> Iterator[int]:
    """Train with the loop that the first three have in common, with autocast to `dtype`."""
    normalize = transforms.Normalize(*parse_normalization("cifar10"))
    augmentation = AUGMENTATIONS[settings.augment]
    transform = transforms.Compose(
        [*augmentation.image_transforms(), transforms.ToTensor(), normalize, *augmentation.tensor_transforms()]
    )
    split = load_dataset(settings.data, download=False).train
    batches = DataLoader(Images(split, transform), settings.batch_size, shuffle=True, num_workers=WORKERS)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    optimizer = Lookahead(inner, k=5, alpha=0.5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(inner, T_max=EPOCHS)
    model.train()
    for _ in itertools.count():
        total_loss, correct, total = 0.0, 0, 0
        for images, labels in batches:
            images, labels = images.to(settings.device, memory_format=memory_format), labels.to(settings.device)
            optimizer.zero_grad()
            with torch.autocast(settings.device, dtype, enabled=dtype != torch.float32):
                logits = model(images)
                loss = F.cross_entropy(logits, labels)
            loss.backward()
            nn.utils.clip_grad_value_(model.parameters(), 0.1)
            optimizer.step()
            total_loss += loss.item()
            total += len(labels)
            correct += logits.max(1).indices.eq(labels).sum().item()
            _progress = total_loss / total, correct / total  # the source projects show these in a progress bar
            yield len(labels)
        schedule.step()
