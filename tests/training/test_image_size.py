"""`--image-size`: its format, resized images and steps in training, and its effect on dry runs and time budgets."""

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
from fastcifar.recipe import Recipe
from fastcifar.recipes import shipped_recipes
from fastcifar.training import compilation, dry_run
from fastcifar.training.dry_run import measure_step_timing
from fastcifar.training.resolve import resolve
from fastcifar.training.step import loss_and_correct
from fastcifar.training.trainer import Trainer
from tests.training.optimizer_helpers import make_trainer


def test_image_size_of_each_epoch() -> None:
    resolved = resolve(Recipe.make(image_size="24:3,28:2,32", epochs=7))
    assert [phase.image_size for phase in resolved.phases] == [24, 24, 24, 28, 28, 32, 32]
    assert {phase.image_size for phase in resolve(Recipe()).phases} == {32}


@pytest.mark.parametrize(
    ("text", "epochs", "message"),
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
def test_fault15_invalid_image_sizes_are_refused(text: str, epochs: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe.make(image_size=text, epochs=epochs)


def test_fault15_image_size_that_the_network_does_not_accept_is_refused(tiny: Callable[..., Recipe]) -> None:
    options = {"arch": "speed94", "blocks": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}
    make_trainer(tiny(**options))
    with pytest.raises(UsageError, match="--image-size 16:1,32: speed94 does not accept images of 16x16"):
        make_trainer(tiny(**options, image_size="16:1,32"))


@pytest.mark.parametrize("size", [16, 24, 28, 48])
def test_resized_images_equal_pillow_resize(size: int) -> None:
    """The reference is Pillow's bilinear filter on float images, which antialiases when the image gets smaller."""
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    inputs: list[Tensor] = []

    def forward(resized: Tensor) -> Tensor:
        inputs.append(resized)
        return resized.mean((2, 3))

    loss_and_correct(forward, 0.0, image_size=size)(images, torch.zeros(2, dtype=torch.int64))
    assert inputs[0].is_contiguous(memory_format=torch.channels_last)
    for image, actual in zip(images.flatten(0, 1), inputs[0].flatten(0, 1), strict=True):
        expected = Image.fromarray(image.float().numpy()).resize((size, size), Image.Resampling.BILINEAR)
        torch.testing.assert_close(actual, torch.tensor(np.asarray(expected)), atol=1e-3, rtol=0)


@pytest.mark.medium
def test_each_epoch_runs_the_step_of_its_image_size_and_short_batches_run_uncompiled(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 160 images in batches of 48, the last batch is short. All steps are compiled before the first one runs."""
    compiled: list[Callable] = []
    forward_calls: list[tuple[int, int]] = []  # (image size, batch size)
    trainer = make_trainer(tiny(image_size="24:1,28:2,32", epochs=5, batch_size=48, augment="crop:4:zero,cutmix:1.0"))
    trainer.resolved = replace(trainer.resolved, execution=replace(trainer.execution, compile=True))
    forward = trainer.forward

    def record_forward(images: Tensor) -> Tensor:
        forward_calls.append((images.shape[3], len(images)))
        return forward(images)

    def record_compile(function: Callable, mode: str) -> Callable:
        compiled.append(function)
        return function

    monkeypatch.setattr(trainer, "forward", record_forward)
    monkeypatch.setattr(compilation, "compile_function", record_compile)
    step = trainer.build_train_step()
    assert len(compiled) == 3
    assert [size for size, _ in forward_calls] == [24, 28, 32]  # the warm-up call of each size
    forward_calls.clear()
    for epoch in range(5):
        trainer.progress.epoch = epoch
        for batch in trainer.batches(epoch):
            step(*batch)
    sizes = (24, 28, 28, 32, 32)
    assert forward_calls == [(size, count) for size in sizes for count in (48, 48, 48, 16)]
    assert len(compiled) == 3
    assert trainer.meter.compute().all_finite


@pytest.mark.slow
def test_compiled_loss_of_resized_images_equals_eager_one() -> None:
    weight = torch.randn(10, 3 * 24 * 24) / 255
    function = loss_and_correct(lambda images: images.flatten(1) @ weight.T, 0.1, image_size=24)
    images, labels = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8)
    images = images.contiguous(memory_format=torch.channels_last)
    expected, _ = function(images, labels)
    actual, _ = compilation.compile_function(function)(images, labels)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)


def test_dry_run_weights_the_step_time_of_each_image_size_by_its_epochs(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny(image_size="24:3,32", epochs=4))
    step_s = {24: 1.0, 32: 5.0}
    monkeypatch.setattr(
        dry_run, "_measure_step_s", lambda trainer, epoch: step_s[trainer.resolved.phases[epoch].image_size]
    )
    assert measure_step_timing(trainer).step_s == 2.0
    assert trainer.progress.epoch == 0


def test_whitening_layer_is_initialized_from_the_first_training_images(tiny: Callable[..., Recipe]) -> None:
    """The layer whitens the normalized images: the mean square of its output is near 1 in every channel."""

    def whitening_weight(trainer: Trainer) -> Tensor:
        return trainer.model.state_dict()["whiten.weight"]

    options = {"arch": "speed94", "blocks": None, "channels": None, "width": 0.125}
    trainer = make_trainer(tiny(**options))
    mean = torch.tensor((0.4914, 0.4822, 0.4465)).view(1, 3, 1, 1)
    std = torch.tensor((0.2470, 0.2435, 0.2616)).view(1, 3, 1, 1)
    images = (torch.tensor(trainer.train_split.images) / 255 - mean) / std
    mean_square = F.conv2d(images, whitening_weight(trainer))[:, :12].square().mean((0, 2, 3))
    assert mean_square.max().item() == pytest.approx(1, abs=0.02)
    assert mean_square.min().item() > 0.8
    assert trainer.prepare_s > 0
    other_seed = make_trainer(tiny(**options, seed=5))
    assert torch.equal(whitening_weight(other_seed), whitening_weight(trainer)), "the weights depend on the seed"


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name.startswith("speed")])
def test_shipped_speed_recipes_resolve(name: str) -> None:
    recipe = Recipe.make(name)
    assert resolve(recipe).phases[-1].image_size == 32
    assert recipe.val_size != 0
