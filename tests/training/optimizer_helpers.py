"""Small networks, trainers and training loops for the tests of the training step and the optimizers."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import nn

from fastcifar.recipe import Recipe
from fastcifar.training.build import build_trainer
from fastcifar.training.lr_schedule import LRSchedule, parse_schedule
from fastcifar.training.optimizers import OptimizerWrapper, parse_optimizer
from fastcifar.training.resolve import resolve
from fastcifar.training.trainer import Trainer

NO_SKIP = torch.zeros(())
SCALER = torch.amp.GradScaler("cpu", enabled=False)


def make_trainer(recipe: Recipe) -> Trainer:
    return build_trainer(resolve(recipe))


def build_optimizer(model: nn.Module, recipe: Recipe) -> OptimizerWrapper:
    return OptimizerWrapper(model, recipe, parse_optimizer(recipe))


def build_schedule(recipe: Recipe, steps_per_epoch: int) -> LRSchedule:
    return LRSchedule(recipe, parse_schedule(recipe), steps_per_epoch)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False))
    return model.to(memory_format=torch.channels_last)


def network_with_head() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(6, 6), nn.Linear(6, 4))
    model[1].weight.requires_grad_(False)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it


def set_gradients(models: list[nn.Module], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for weights in zip(*(model.parameters() for model in models), strict=True):
        gradient = torch.randn(weights[0].shape, generator=generator)
        for weight in weights:
            weight.grad = torch.empty_like(weight).copy_(gradient)


def trained(values: dict[str, Any], steps: range, resume: io.BytesIO | None = None) -> tuple[nn.Module, io.BytesIO]:
    """Train a network for `steps`, two per epoch, from the start or from `resume`; return it and its checkpoint."""
    recipe = Recipe.make(**{"lr": 0.01, "epochs": 10, **values})
    model = network()
    optimizer, schedule = build_optimizer(model, recipe), build_schedule(recipe, 2)
    if resume:
        resume.seek(0)
        state = torch.load(resume, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images, labels = torch.randn(8, 3, 8, 8, generator=generator), torch.randint(4, (8,), generator=generator)
        optimizer.set_lr(schedule.lr_at(step))
        optimizer.inner.zero_grad()
        nn.functional.cross_entropy(model(images).mean((2, 3)), labels).backward()
        optimizer.step(SCALER, NO_SKIP)
        optimizer.after_step(step + 1)
        if step % 2:
            schedule.after_epoch(1.0)
    file = io.BytesIO()
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, file
    )
    return model, file
