"""`--hard-example-fraction`: which images a step trains on, what the selection leaves unchanged, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar.benchmark.speedrun import count_flops
from fastcifar.data.mixers import MIXERS, mix_labels
from fastcifar.errors import UsageError
from fastcifar.recipe import Recipe
from fastcifar.training.resolve import resolve
from fastcifar.training.step import build_selection, loss_and_correct, resize_images
from fastcifar.training.train import train
from tests.faults.runs import assert_equal_runs
from tests.training.optimizer_helpers import make_trainer

MakeRecipe = Callable[..., Recipe]
HALF = {"hard_example_fraction": 0.5}


def random_batch(num_images: int = 32) -> tuple[Tensor, Tensor]:
    images = torch.randint(256, (num_images, 3, 32, 32), dtype=torch.uint8)
    return images.contiguous(memory_format=torch.channels_last), torch.arange(num_images) % 10


@pytest.mark.parametrize(("fraction", "count"), [(0.5, 16), (0.3, 10), (0.001, 1), (0.99, 32)])
def test_images_with_the_largest_losses_are_selected(tiny: MakeRecipe, fraction: float, count: int) -> None:
    recipe = tiny(hard_example_fraction=fraction, label_smoothing=0.1, hard_example_size=24)
    trainer = make_trainer(recipe)
    images, labels = random_batch()
    select = build_selection(trainer.forward, trainer.model, recipe)
    assert select
    losses = F.cross_entropy(trainer.forward(resize_images(images, 24)), labels, label_smoothing=0.1, reduction="none")
    selected = select(images, lambda _: labels)
    assert set(selected.tolist()) == set(losses.argsort(descending=True)[:count].tolist())


def test_loss_gradients_and_statistics_are_those_of_the_selected_images(tiny: MakeRecipe) -> None:
    """The reference is a step without selection on these images."""
    trainer, reference = (make_trainer(tiny(image_size="24", **options)) for options in (HALF, {}))
    images, labels = random_batch()
    select = build_selection(trainer.forward, trainer.model, trainer.recipe)
    assert select
    for owner in (trainer, reference):
        owner.model.train()
    hard = select(images, lambda _: labels)
    loss, correct = trainer.build_loss_function(24)(images, labels)
    expected_loss, expected_correct = reference.build_loss_function(24)(images[hard], labels[hard])
    assert (loss.item(), correct.item()) == (expected_loss.item(), 2 * expected_correct.item())
    loss.backward()
    expected_loss.backward()
    expected = {name: weight.grad for name, weight in reference.model.named_parameters()}
    for name, weight in trainer.model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], atol=0, rtol=0, msg=name)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, reference.model.state_dict()[name]), name
    assert trainer.model.state_dict()["bn1.num_batches_tracked"] == 1


@pytest.mark.parametrize("name", MIXERS)
def test_mixed_images_are_selected_with_their_mixed_labels(tiny: MakeRecipe, name: str) -> None:
    trainer = make_trainer(tiny(augment=name, batch_size=16, **HALF))
    images, labels, params = next(iter(trainer.batches(0)))
    weight = torch.randn(3 * 16 * 16, 10) / 255

    def forward(inputs: Tensor) -> Tensor:
        return resize_images(inputs, 16).flatten(1) @ weight

    select = build_selection(forward, nn.Identity(), trainer.recipe)
    loss, _ = loss_and_correct(forward, 0.0, MIXERS[name].apply, select=select)(images, labels, params)
    mixed, label_weights = MIXERS[name].apply(images, params)
    targets = mix_labels(labels, label_weights, 10)
    losses = F.cross_entropy(forward(mixed), targets, reduction="none")
    assert loss.item() == pytest.approx(losses.topk(8).values.mean().item(), rel=1e-5)


@pytest.mark.slow
def test_compiled_step_equals_eager_one(tiny: MakeRecipe) -> None:
    eager, compiled = (make_trainer(tiny(compile=flag, augment="cutmix:1.0", **HALF)) for flag in (False, True))
    compiled.optimize()
    for trainer in (eager, compiled):
        trainer.model.train()
        trainer.train_step(next(iter(trainer.batches(0))))
    for name, value in eager.model.state_dict().items():
        torch.testing.assert_close(compiled.model.state_dict()[name], value, atol=1e-5, rtol=1e-5, msg=name)
    assert compiled.meter.compute().images == 32


@pytest.mark.medium
def test_resumed_run_is_bit_identical(tiny: MakeRecipe, tmp_path: Path) -> None:
    """The images of an epoch are counted once each, whether they are selected or not."""
    values = {**HALF, "epochs": 4, "augment": "crop:4:zero,flip,mixup", "ema_decay": 0.9}
    summary = train(tiny(**values))
    train(tiny(**values, max_steps=7, out=str(tmp_path / "again")))
    train(tiny(**values, out=str(tmp_path / "again"), resume="auto"))
    assert_equal_runs(tmp_path / "again", tmp_path / "run")
    assert summary.images_trained == 4 * 160


def test_operations_are_those_of_the_selection_and_of_training_on_the_selected_images(tiny: MakeRecipe) -> None:
    recipe = tiny(arch="speed94", blocks=(1, 1), channels=(4, 8), image_size="16", hard_example_fraction=0.25)
    whiten, first, second, linear = 15 * 15 * 24 * 12, 14 * 14 * 4 * 24 * 9, 6 * 6 * 8 * 4 * 9, 8 * 10
    forward, step = whiten + first + second + linear, whiten + 3 * (first + second + linear)
    assert count_flops(resolve(recipe), 10, num_images=40) == 2 * (40 * forward + 10 * step)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hard_example_fraction": 0}, "--hard-example-fraction should be greater than 0"),
        ({"hard_example_fraction": 1.5}, "--hard-example-fraction should be less than or equal to 1"),
        ({"hard_example_size": 12}, "--hard-example-size should be greater than or equal to 16"),
        (HALF, "--hard-example-size 16: speed94 does not accept images of 16x16; choose another size"),
    ],
)
def test_invalid_options_are_refused(tiny: MakeRecipe, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(tiny(arch="speed94", blocks=(1, 1, 1, 1), channels=(8, 8, 8, 8), **values))
    resolve(tiny(arch="speed94", blocks=(1, 1, 1, 1), channels=(8, 8, 8, 8), hard_example_size=16))
