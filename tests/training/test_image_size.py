"""Sizes of image over the epochs: their spelling, what the step sees, what rehearsals and budgets make of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastcifar.errors import UsageError
from fastcifar.recipe import Recipe, parse_image_sizes
from fastcifar.recipes import shipped_recipes
from fastcifar.training import compilation, dry_run
from fastcifar.training.build import build_trainer
from fastcifar.training.dry_run import StepTiming, fit_epochs_to_time_budget, measure_step_timing
from fastcifar.training.resolve import resolve
from fastcifar.training.step import loss_and_correct, resized_forward
from fastcifar.training.trainer import Trainer


def parts_of(recipe: Recipe) -> Trainer:
    return build_trainer(resolve(recipe))


def test_the_sizes_of_the_epochs() -> None:
    resolved = resolve(Recipe.make(image_size="24:3,28:2,32", epochs=7))
    assert [resolved.image_size_at(epoch) for epoch in range(8)] == [24, 24, 24, 28, 28, 32, 32, 32]
    assert {resolve(Recipe()).image_size_at(epoch) for epoch in (0, 199, 1000)} == {32}


@pytest.mark.parametrize(
    ("text", "epochs", "words"),
    [
        ("24:3", 9, "each but the last"),
        ("24,32", 9, "each but the last"),
        ("24:3,28:2", 9, "each but the last"),
        ("24:0,32", 9, "whole number of epochs"),
        ("24:1.5,32", 9, "whole number of epochs"),
        ("12:1,32", 9, "from 16 to 64"),
        ("65", 9, "from 16 to 64"),
        ("", 9, "--image-size should be sizes"),
        (
            "24:3,28:2,32",
            5,
            "--image-size 24:3,28:2,32: the stages before the last take 5 epochs; set --epochs to more than 5",
        ),
    ],
)
def test_fault15_wrong_sizes(text: str, epochs: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Recipe.make(image_size=text, epochs=epochs)


def test_fault15_a_network_that_takes_no_such_size(tiny: Callable[..., Recipe]) -> None:
    deep = {"arch": "speed94", "blocks": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}
    parts_of(tiny(**deep))
    with pytest.raises(UsageError, match="--image-size 16:1,32: speed94 does not accept images of 16x16"):
        parts_of(tiny(**deep, image_size="16:1,32"))


@pytest.mark.parametrize("size", [16, 24, 28, 48])
def test_images_are_resized_as_pillow_does_it(size: int) -> None:
    """Pillow's bilinear filter of a float image, which is antialiased where it shrinks."""
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    seen: list[Tensor] = []
    resized_forward(lambda given: seen.append(given) or given, size)(images)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    for image, found in zip(images.flatten(0, 1), seen[0].flatten(0, 1), strict=True):
        wanted = Image.fromarray(image.float().numpy()).resize((size, size), Image.Resampling.BILINEAR)
        torch.testing.assert_close(found, torch.tensor(np.asarray(wanted)), atol=1e-3, rtol=0)


def test_each_epoch_takes_the_step_of_its_size_and_short_batches_its_plain_twin(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """160 images in batches of 48, so that the last is short. What is compiled is made before the first step."""
    prepared: list[int] = []
    taken: list[tuple[int, int]] = []
    parts = parts_of(tiny(image_size="24:1,28:2,32", epochs=5, batch_size=48, augment="crop:4:zero,cutmix:1.0"))
    parts.resolved = replace(parts.resolved, execution=replace(parts.execution, compile=True))
    plain = parts.forward
    monkeypatch.setattr(parts, "forward", lambda images: taken.append((images.shape[3], len(images))) or plain(images))

    def recorded(function: Callable, mode: str) -> Callable:
        prepared.append(len(prepared))
        return function

    monkeypatch.setattr(compilation, "compile_function", recorded)
    step = parts.build_train_step()
    assert len(prepared) == 3
    assert [size for size, _ in taken] == [24, 28, 32]  # the warm-up of each
    taken.clear()
    for epoch in range(5):
        parts.progress.epoch = epoch
        for batch in parts.batches(epoch):
            step(*batch)
    sizes = (24, 28, 28, 32, 32)
    assert taken == [(size, count) for size in sizes for count in (48, 48, 48, 16)]
    assert len(prepared) == 3
    assert parts.meter.compute().all_finite


def test_a_compiled_small_size_equals_the_plain_one() -> None:
    weight = torch.randn(10, 3 * 24 * 24) / 255
    function = loss_and_correct(resized_forward(lambda images: images.flatten(1) @ weight.T, 24), 0.1)
    images, labels = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8)
    images = images.contiguous(memory_format=torch.channels_last)
    expected, _ = function(images, labels)
    found, _ = compilation.compile_function(function)(images, labels)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_rehearsal_weighs_each_size_by_its_epochs(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = parts_of(tiny(image_size="24:3,32", epochs=4))
    seconds = {24: 1.0, 32: 5.0}
    monkeypatch.setattr(
        dry_run, "_measure_step_s", lambda trainer, epoch: seconds[trainer.resolved.image_size_at(epoch)]
    )
    pace = measure_step_timing(parts)
    assert pace.step_s == 2.0
    assert parts.progress.epoch == 0


def test_a_budget_shortens_the_stages_with_the_run(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "measure_step_timing", lambda trainer: StepTiming(2.0, 0.05))
    parts = parts_of(tiny(time_budget=1.0, epochs=16, image_size="16:3,24:8,32"))
    fit_epochs_to_time_budget(parts, elapsed_s=7.0)
    assert (parts.recipe.epochs, parts.recipe.image_size) == (4, "24:2,32")
    assert parse_image_sizes(parts.recipe.image_size)
    Recipe(**parts.recipe.model_dump())


def test_the_network_starts_from_the_first_training_images(tiny: Callable[..., Recipe]) -> None:
    """By the definition: the responses of the stem to these images, normalised, are as far spread in each direction."""

    def stem(parts: Trainer) -> Tensor:
        return parts.model.state_dict()["whiten.weight"]

    knobs = {"arch": "speed94", "blocks": None, "channels": None, "width": 0.125}
    parts = parts_of(tiny(**knobs))
    mean, std = (torch.tensor(of).view(1, 3, 1, 1) for of in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
    images = (torch.tensor(parts.train_split.images) / 255 - mean) / std
    spread = F.conv2d(images, stem(parts))[:, :12].square().mean((0, 2, 3))
    assert spread.max().item() == pytest.approx(1, abs=0.02)
    assert spread.min().item() > 0.8
    assert parts.prepare_s > 0
    assert torch.equal(stem(parts_of(tiny(**knobs, seed=5))), stem(parts)), "the seed decides nothing of it"


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name.startswith("speed")])
def test_a_shipped_recipe_is_one_that_can_be_run(name: str) -> None:
    recipe = Recipe.make(name)
    assert resolve(recipe).image_size_at(recipe.epochs - 1) == 32
    assert recipe.val_size > 0
