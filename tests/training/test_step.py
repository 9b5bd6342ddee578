"""The training step against a plain PyTorch loop, the meter, and NaN or Inf in the loss or a gradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from fastcifar.recipe import Recipe
from fastcifar.training.step import Ema, Meter, build_forward, loss_and_correct
from fastcifar.training.trainer import Trainer
from tests.training.optimizer_helpers import make_trainer, network

CPU = torch.device("cpu")


def first_batch(trainer: Trainer) -> tuple[torch.Tensor, ...]:
    return next(iter(trainer.loader.batches(0)))


def test_forward_equals_plain_normalization() -> None:
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    actual = build_forward(torch.nn.Identity(), mean, std, "fp32", CPU)(images)
    expected = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_step_equals_plain_pytorch_loop(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny(optimizer="sgd", clip_grad="norm:0.5", label_smoothing=0.1)
    trainer, reference_trainer = make_trainer(recipe), make_trainer(recipe)
    step = trainer.build_step(loss_and_correct(trainer.forward, 0.1))
    reference_optimizer = torch.optim.SGD(reference_trainer.model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    losses = []
    for images, labels in trainer.loader.batches(0):
        step(images, labels)
        reference_optimizer.zero_grad()
        loss = F.cross_entropy(reference_trainer.forward(images), labels, label_smoothing=0.1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference_trainer.model.parameters(), 0.5)
        reference_optimizer.step()
        losses.append(loss.item() * len(labels))
    expected = reference_trainer.model.state_dict()
    for (name, actual), expected_value in zip(trainer.model.state_dict().items(), expected.values(), strict=True):
        torch.testing.assert_close(actual, expected_value, rtol=1e-5, atol=1e-6, msg=name)
    assert trainer.meter.compute().loss == pytest.approx(sum(losses) / 160, rel=1e-5)
    assert trainer.meter.compute().images == 160


def test_meter_averages_over_images_not_batches() -> None:
    meter = Meter(CPU)
    meter.update(torch.tensor(1.0), torch.tensor(3), 4)
    meter.update(torch.tensor(2.0), torch.tensor(1), 1)
    metrics = meter.compute()
    assert (metrics.loss, metrics.accuracy, metrics.images, metrics.all_finite) == (6 / 5, 4 / 5, 5, True)
    meter.reset()
    assert math.isnan(meter.compute().loss)
    assert meter.compute_delayed().images == 0


@pytest.mark.medium
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_steps_reduce_the_loss_and_keep_fp32_weights(
    tiny: Callable[..., Recipe], precision: str
) -> None:
    trainer = make_trainer(tiny(precision=precision, optimizer="sgd"))
    step = trainer.build_step(loss_and_correct(trainer.forward, 0.0))
    images, labels = first_batch(trainer)
    for _ in range(12):
        step(images, labels)
    trainer.model.eval()
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}
    assert F.cross_entropy(trainer.forward(images), labels).item() < 2.2
    assert trainer.meter.compute().all_finite


@pytest.mark.parametrize("source", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop", "ranger", "muon", "lion"])
def test_fault14_no_update_from_the_first_step_with_nan_or_inf_on(
    tiny: Callable[..., Recipe], source: str, optimizer: str
) -> None:
    trainer = make_trainer(tiny(optimizer=optimizer))
    images, labels = first_batch(trainer)
    weight = next(trainer.model.parameters())
    factor = torch.ones(())

    def loss_function(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, correct = loss_and_correct(trainer.forward, 0.0)(images, labels)
        return (loss * factor, correct) if source == "loss" else (loss + (weight * 0).sum() * factor, correct)

    step = trainer.build_step(loss_function)
    step(images, labels)
    assert trainer.meter.compute().all_finite
    weights_before = [value.detach().clone() for value in trainer.model.parameters()]
    factor.fill_(math.inf if source == "gradient" else math.nan)
    step(images, labels)
    factor.fill_(1.0)
    step(images, labels)  # finite again, but later updates are skipped too: the run is to stop
    assert not trainer.meter.compute().all_finite
    for before, after in zip(weights_before, trainer.model.parameters(), strict=True):
        assert torch.equal(before, after)


def test_ema_equals_its_formula_and_is_used_only_inside_the_context() -> None:
    model = network()
    ema = Ema(model, decay=0.9)
    expected = {name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()}
    for update in range(1, 31):
        with torch.no_grad():
            for weight in (*model.parameters(), *model.buffers()):
                if weight.is_floating_point():
                    weight.add_(0.1 * update)
        ema.update()
        update_weight = max(0.1, 9 / (10 + update))
        for name, value in expected.items():
            value += update_weight * (model.state_dict()[name] - value)
    original = copy.deepcopy(model.state_dict())
    with ema.averaged_weights():
        for name, value in expected.items():
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-5)
    for name, value in original.items():
        assert torch.equal(model.state_dict()[name], value)
    assert torch.equal(ema.state_dict(model)["1.num_batches_tracked"], original["1.num_batches_tracked"])


def test_ema_continues_from_its_saved_state() -> None:
    model = network()
    ema, other = Ema(model, decay=0.9), Ema(network(), decay=0.9)
    for _ in range(3):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(1)
        ema.update()
    other.load_state_dict(ema.state_dict(model), ema.num_updates)
    for first, second in zip(ema.state_tensors(), other.state_tensors(), strict=True):
        assert torch.equal(first, second)
