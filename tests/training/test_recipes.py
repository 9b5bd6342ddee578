"""Tests of the shipped recipes: each can train, and those of published results have the published options."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from fastcifar.data.augment import parse_augment, split_mixer
from fastcifar.data.mixers import MIXERS
from fastcifar.data.normalization import normalization_name
from fastcifar.models import MODELS
from fastcifar.recipe import Recipe, parse_clip_grad
from fastcifar.recipes import shipped_recipes
from fastcifar.training.optimizer_classes import Ranger
from fastcifar.training.optimizers import build_grad_clipper
from fastcifar.training.resolve import model_from_recipe
from tests.documentation import DOCUMENTATION
from tests.models.networks import on_meta, small
from tests.training.optimizer_helpers import build_optimizer, build_schedule

CROP = "crop:4:zero,flip"
AUTOAUGMENT = "crop:4:zero,flip,rotate:5,autoaugment:cifar10"
JITTER_ERASE = "crop:4:zero,flip,rotate:10,jitter:0.2,erase:0.1:gray"
LOOKAHEAD, SGD = "lookahead:sgd", "sgd"

# recipe -> published architecture, optimizer, learning rate, batch size, gradient clipping, augmentation,
# normalization, epochs, length of the cosine schedule in epochs, and its minimum learning rate. The 200 epochs of row1
# to row7 are the exception: the source trained for 210.
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "row1": ("se55", LOOKAHEAD, 0.1, 32, "value:0.1", AUTOAUGMENT, "cifar10", 200, 200, 0.0),
    "row2": ("se68", LOOKAHEAD, 0.1, 32, "value:0.1", AUTOAUGMENT, "cifar10", 200, 200, 0.0),
    "row3": ("se68", LOOKAHEAD, 0.1, 128, "value:0.1", AUTOAUGMENT, "cifar10", 200, 200, 0.0),
    "row4": ("se68", LOOKAHEAD, 0.01, 32, "value:0.1", AUTOAUGMENT, "cifar10", 200, 200, 0.0),
    "row5": ("se68", "ranger", 0.1, 32, "value:0.1", AUTOAUGMENT, "cifar10", 200, 200, 0.0),
    "row6": ("se68", LOOKAHEAD, 0.1, 32, "value:0.1", "none", "cifar10", 200, 200, 0.0),
    "row7": ("se68", LOOKAHEAD, 0.1, 32, "none", AUTOAUGMENT, "cifar10", 200, 200, 0.0),
    "efficient": ("se68", LOOKAHEAD, 0.1, 128, "value:0.1", CROP, "kuangliu", 200, 200, 0.0),
    "mini": ("se68", SGD, 0.1, 128, "value:0.1", CROP, "kuangliu", 30, 200, 0.0),
    "coconut": ("coconut_leaky", SGD, 0.05, 128, "none", JITTER_ERASE, "kuangliu", 200, 200, 5e-4),
    **{
        f"res512{variant}": (f"res512{variant}", SGD, 0.1, 128, "none", CROP, "cifar10", 200, 200, 0.0)
        for variant in "abcd"
    },
}

# recipe -> published test accuracy, in percent
PUBLISHED_ACCURACY = {
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


@pytest.mark.parametrize("name", PUBLISHED_ACCURACY)
def test_published_accuracy_is_in_the_recipe_and_the_documentation(name: str) -> None:
    accuracy = f"{PUBLISHED_ACCURACY[name]:.2f} %"
    first_line = shipped_recipes()[name].read_text(encoding="utf-8").splitlines()[0]
    assert re.search(rf"published with (a test accuracy of )?{re.escape(accuracy)}", first_line)
    (table_row,) = [line for line in DOCUMENTATION.splitlines() if line.startswith(f"| `{name}` |")]
    assert table_row.endswith(f"| {accuracy} |")


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_has_the_published_options(name: str) -> None:
    recipe = Recipe.make(name)
    assert (
        recipe.arch,
        recipe.optimizer,
        recipe.lr,
        recipe.batch_size,
        recipe.clip_grad,
        recipe.augment,
        normalization_name(recipe),
        recipe.epochs,
        recipe.schedule_epochs or recipe.epochs,
        recipe.min_lr,
    ) == PUBLISHED[name]
    assert (recipe.weight_decay, recipe.bias_decay, recipe.schedule) == (5e-4, True, "cosine")
    assert (recipe.warmup_epochs, recipe.ema_decay, recipe.val_size) == (0.0, 0.0, None)
    assert (recipe.label_smoothing, recipe.patience) == ((0.01, 30) if name == "coconut" else (0.0, 0))


@pytest.mark.parametrize("name", shipped_recipes())
def test_recipe_is_valid_and_within_the_parameter_budget(name: str) -> None:
    recipe = Recipe.make(name)
    assert recipe.max_params == 5_000_000
    model_from_recipe(recipe, 10)  # raises an error for a model over the budget
    pixel_ops, mixer = split_mixer(parse_augment(recipe.augment))
    assert mixer is None or mixer.name in MIXERS
    assert bool(pixel_ops) == (recipe.augment != "none")
    optimizer = build_optimizer(small(recipe.arch), recipe)
    for parameter in optimizer.parameters:
        parameter.grad = torch.ones_like(parameter)
    build_grad_clipper(parse_clip_grad(recipe.clip_grad), optimizer.parameters)()
    max_grad = max(float(parameter.grad.max()) for parameter in optimizer.parameters if parameter.grad is not None)
    assert max_grad == pytest.approx(1.0 if recipe.clip_grad == "none" else 0.1)
    schedule = build_schedule(recipe, 10)
    max_lr = max(schedule.lr_at(step) for step in range(10 * recipe.epochs))
    assert max_lr == pytest.approx(recipe.lr, rel=0.05)


def test_row5_uses_the_published_arguments_of_ranger() -> None:
    optimizer = build_optimizer(small("se68"), Recipe.make("row5"))
    assert isinstance(optimizer.inner, Ranger)
    (group,) = optimizer.inner.param_groups
    assert (group["betas"], group["eps"], group["n_sma_threshold"]) == ((0.95, 0.999), 1e-5, 5)
    assert (group["use_gc"], group["weight_decay"]) == (True, 5e-4)
    assert optimizer.spec.lookahead == {"k": 6, "alpha": 0.5}


def test_row1_uses_the_published_lookahead_and_momentum() -> None:
    optimizer = build_optimizer(small("se68"), Recipe.make("row1", arch="se68"))
    assert optimizer.spec.lookahead == {"k": 5, "alpha": 0.5}
    assert (optimizer.inner.defaults["momentum"], optimizer.inner.defaults["nesterov"]) == (0.9, False)


def test_mini_ends_at_a_high_learning_rate_and_coconut_at_its_minimum() -> None:
    mini, coconut = (build_schedule(Recipe.make(name), 100) for name in ("mini", "coconut"))
    assert mini.lr_at(30 * 100 - 1) == pytest.approx(0.05 * (1 + math.cos(math.pi * 30 / 200)), rel=1e-3)
    assert mini.lr_at(30 * 100 - 1) == pytest.approx(0.0946, abs=1e-4)
    assert coconut.lr_at(200 * 100) == pytest.approx(5e-4)


def test_every_res512_variant_ends_in_512_channels() -> None:
    for name in sorted(name for name in MODELS if name.startswith("res512")):
        assert on_meta(name).state_dict()["linear.weight"].shape == (10, 512), name
