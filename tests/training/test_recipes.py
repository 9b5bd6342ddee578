"""The shipped recipes: each can train, and those of the sources have the sources' published values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcifar.data.augment import parse_augment, split_mixer
from fastcifar.data.mixers import MIXERS
from fastcifar.data.normalization import normalization_name
from fastcifar.models import MODELS
from fastcifar.recipe import Recipe, shipped_recipes
from fastcifar.training.build import model_from_recipe
from fastcifar.training.lr_schedule import LRSchedule
from fastcifar.training.optimizer_classes import Ranger
from fastcifar.training.optimizers import OptimizerWrapper, build_grad_clipper
from tests.models.networks import on_meta, small

A = "crop:4:zero,flip,rotate:5,autoaugment:cifar10"
B = "crop:4:zero,flip,rotate:10,jitter:0.2,erase:0.1:gray"
CROP = "crop:4:zero,flip"
LOOKAHEAD, SGD = "lookahead:sgd", "sgd"

# The sources' own values: network, optimizer, rate, batch, clip, augmentation, normalisation, epochs, the cosine's
# length in epochs and its floor. Of the SE-ResNet's rows 200 epochs are ours: they had 210.
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "row1": ("se55", LOOKAHEAD, 0.1, 32, "value:0.1", A, "cifar10", 200, 200, 0.0),
    "row2": ("se68", LOOKAHEAD, 0.1, 32, "value:0.1", A, "cifar10", 200, 200, 0.0),
    "row3": ("se68", LOOKAHEAD, 0.1, 128, "value:0.1", A, "cifar10", 200, 200, 0.0),
    "row4": ("se68", LOOKAHEAD, 0.01, 32, "value:0.1", A, "cifar10", 200, 200, 0.0),
    "row5": ("se68", "ranger", 0.1, 32, "value:0.1", A, "cifar10", 200, 200, 0.0),
    "row6": ("se68", LOOKAHEAD, 0.1, 32, "value:0.1", "none", "cifar10", 200, 200, 0.0),
    "row7": ("se68", LOOKAHEAD, 0.1, 32, "none", A, "cifar10", 200, 200, 0.0),
    "efficient": ("se68", LOOKAHEAD, 0.1, 128, "value:0.1", CROP, "kuangliu", 200, 200, 0.0),
    "mini": ("se68", SGD, 0.1, 128, "value:0.1", CROP, "kuangliu", 30, 200, 0.0),
    "coconut": ("coconut_leaky", SGD, 0.05, 128, "none", B, "kuangliu", 200, 200, 5e-4),
    **{f"res512{of}": (f"res512{of}", SGD, 0.1, 128, "none", CROP, "cifar10", 200, 200, 0.0) for of in "abcd"},
}


# in percent, as the sources' tables have them
ACCURACY = {
    "row1": 95.81,
    "row2": 96.28,
    "row3": 96.48,
    "row4": 96.23,
    "row5": 95.67,
    "row6": 91.82,
    "row7": 95.80,
    "efficient": 96.04,
    "mini": 85.39,
    "coconut": 95.49,
}


@pytest.mark.parametrize("name", ACCURACY)
def test_the_published_accuracy_stands_beside_the_recipe(name: str) -> None:
    figure = f"{ACCURACY[name]:.2f} %"
    assert f"published as {figure}" in shipped_recipes()[name].read_text(encoding="utf-8").splitlines()[0]
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in readme.splitlines() if line.startswith(f"| `{name}` |")]
    assert row.endswith(f"| {figure} |")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_sources_recipe_has_the_published_values(name: str) -> None:
    recipe = Recipe.make(name)
    length = recipe.schedule_epochs or recipe.epochs
    of_images = (recipe.batch_size, recipe.clip_grad, recipe.augment, normalization_name(recipe))
    found = (recipe.arch, recipe.optimizer, recipe.lr, *of_images, recipe.epochs, length, recipe.min_lr)
    assert found == PUBLISHED[name]
    rest = (
        recipe.weight_decay,
        recipe.bias_decay,
        recipe.schedule,
        recipe.warmup_epochs,
        recipe.ema_decay,
        recipe.val_size,
    )
    assert rest == (5e-4, True, "cosine", 0.0, 0.0, 5000)
    smoothing, patience = {"coconut": (0.01, 30)}.get(name, (0.0, 0))
    assert (recipe.label_smoothing, recipe.patience) == (smoothing, patience)


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_builds_under_the_budget_and_assembles(name: str) -> None:
    recipe = Recipe.make(name)
    assert recipe.max_params == 5_000_000
    model_from_recipe(recipe, 10)  # refuses what is over the budget
    pixel_ops, mixer = split_mixer(parse_augment(recipe.augment))
    assert mixer is None or mixer.name in MIXERS
    assert bool(pixel_ops) == (recipe.augment != "none")
    optimizer = OptimizerWrapper(small(recipe.arch), recipe)
    for weight in optimizer.parameters:
        weight.grad = torch.ones_like(weight)
    build_grad_clipper(recipe.clip_grad, optimizer.parameters)()
    largest = max(float(weight.grad.max()) for weight in optimizer.parameters if weight.grad is not None)
    assert largest == pytest.approx(1.0 if recipe.clip_grad == "none" else 0.1)
    schedule = LRSchedule(recipe, steps_per_epoch=10)
    peak = max(schedule.lr_at(step) for step in range(10 * recipe.epochs))
    assert peak == pytest.approx(recipe.lr, rel=0.05)


def test_row_5_trains_by_rangers_published_arguments() -> None:
    optimizer = OptimizerWrapper(small("se68"), Recipe.make("row5"))
    assert isinstance(optimizer.inner, Ranger)
    (group,) = optimizer.inner.param_groups
    assert (group["betas"], group["eps"], group["n_sma_threshold"]) == ((0.95, 0.999), 1e-5, 5)
    assert (group["use_gc"], group["weight_decay"]) == (True, 5e-4)
    assert (optimizer.lookahead_k, optimizer.lookahead_alpha) == (6, 0.5)


def test_the_lookahead_of_the_rows_and_momentum_are_the_published_ones() -> None:
    optimizer = OptimizerWrapper(small("se68"), Recipe.make("row1", arch="se68"))
    assert (optimizer.lookahead_k, optimizer.lookahead_alpha) == (5, 0.5)
    assert (optimizer.inner.defaults["momentum"], optimizer.inner.defaults["nesterov"]) == (0.9, False)


def test_mini_keeps_its_rate_and_coconut_ends_at_its_floor() -> None:
    mini, coconut = (LRSchedule(Recipe.make(name), 100) for name in ("mini", "coconut"))
    assert mini.lr_at(30 * 100 - 1) == pytest.approx(0.05 * (1 + math.cos(math.pi * 30 / 200)), rel=1e-3)
    assert mini.lr_at(30 * 100 - 1) == pytest.approx(0.0946, abs=1e-4)
    assert coconut.lr_at(200 * 100) == pytest.approx(5e-4)


def test_the_readings_of_the_fourth_source_end_in_512_channels() -> None:
    for name in sorted(name for name in MODELS if name.startswith("res512")):
        assert on_meta(name).state_dict()["linear.weight"].shape == (10, 512), name
