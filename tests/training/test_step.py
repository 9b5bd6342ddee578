"""The plain step against a textbook loop; the meter; what is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from fastcifar.recipe import Recipe
from fastcifar.training.build import build_trainer
from fastcifar.training.resolve import resolve
from fastcifar.training.step import Meter, build_forward, compute_found_inf, loss_and_correct
from fastcifar.training.trainer import Trainer

CPU = torch.device("cpu")


def parts_of(recipe: Recipe) -> Trainer:
    return build_trainer(resolve(recipe))


def batch(parts: Trainer) -> tuple[torch.Tensor, torch.Tensor]:
    return next(iter(parts.loader.batches(0)))


def test_forward_normalises_as_the_textbook_does() -> None:
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    ours = build_forward(torch.nn.Identity(), mean, std, "fp32", CPU)(images)
    expected = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_step_equals_a_textbook_loop(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny(optimizer="sgd", clip_grad="norm:0.5", label_smoothing=0.1)
    ours, theirs = parts_of(recipe), parts_of(recipe)
    step = ours.build_step(loss_and_correct(ours.forward, 0.1))
    reference = torch.optim.SGD(theirs.model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    losses = []
    for images, labels in ours.loader.batches(0):
        step(images, labels)
        reference.zero_grad()
        loss = F.cross_entropy(theirs.forward(images), labels, label_smoothing=0.1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.model.parameters(), 0.5)
        reference.step()
        losses.append(loss.item() * len(labels))
    for (name, mine), other in zip(ours.model.state_dict().items(), theirs.model.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6, msg=name)
    assert ours.meter.compute().loss == pytest.approx(sum(losses) / 160, rel=1e-5)
    assert ours.meter.compute().images == 160


def test_meter_sums_over_images_not_batches() -> None:
    meter = Meter(CPU)
    meter.update(torch.tensor(1.0), torch.tensor(3), 4)
    meter.update(torch.tensor(2.0), torch.tensor(1), 1)
    reading = meter.compute()
    assert (reading.loss, reading.accuracy, reading.images, reading.all_finite) == (6 / 5, 4 / 5, 5, True)
    meter.reset()
    assert math.isnan(meter.compute().loss)
    assert meter.compute_delayed().images == 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_steps_learn_and_keep_fp32_weights(tiny: Callable[..., Recipe], precision: str) -> None:
    parts = parts_of(tiny(precision=precision, optimizer="sgd"))
    step = parts.build_step(loss_and_correct(parts.forward, 0.0))
    images, labels = batch(parts)
    for _ in range(12):
        step(images, labels)
    parts.model.eval()
    assert {weight.dtype for weight in parts.model.parameters()} == {torch.float32}
    assert F.cross_entropy(parts.forward(images), labels).item() < 2.2
    assert parts.meter.compute().all_finite


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop", "ranger", "muon", "lion"])
def test_fault14_nothing_is_updated_from_the_first_step_that_is_not_finite(
    tiny: Callable[..., Recipe], where: str, optimizer: str
) -> None:
    parts = parts_of(tiny(optimizer=optimizer))
    images, labels = batch(parts)
    weight = next(parts.model.parameters())
    poison = torch.ones(())

    def function(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, hits = loss_and_correct(parts.forward, 0.0)(images, labels)
        return (loss * poison, hits) if where == "loss" else (loss + (weight * 0).sum() * poison, hits)

    step = parts.build_step(function)
    step(images, labels)
    assert parts.meter.compute().all_finite
    kept = [value.detach().clone() for value in parts.model.parameters()]
    poison.fill_(math.inf if where == "gradient" else math.nan)
    step(images, labels)
    poison.fill_(1.0)
    step(images, labels)  # finite again, and still nothing moves: the run is to stop, not to limp on
    assert not parts.meter.compute().all_finite
    for before, after in zip(kept, parts.model.parameters(), strict=True):
        assert torch.equal(before, after)


def test_not_finite_sees_loss_and_gradients() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    assert compute_found_inf(torch.tensor(1.0), [weight]).item() == 0
    weight.grad = torch.tensor([1.0, math.inf, 1.0])
    assert compute_found_inf(torch.tensor(1.0), [weight]).item() == 1
    weight.grad = torch.zeros(3)
    assert compute_found_inf(torch.tensor(math.nan), [weight]).item() == 1


def test_not_finite_without_gradients_stays_on_the_device_of_the_loss() -> None:
    assert compute_found_inf(torch.zeros((), device="meta"), []).device.type == "meta"
