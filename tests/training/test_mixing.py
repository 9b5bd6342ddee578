"""Mixers (CutMix, Mixup, ...) in the training step: the loss, and captured and compiled steps against plain ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from fastcifar import batches
from fastcifar.benchmark.bench import bench
from fastcifar.data.cifar_files import Split
from fastcifar.data.mixers import MIXERS
from fastcifar.errors import UsageError
from fastcifar.recipe import Recipe
from fastcifar.training.compilation import compile_function
from fastcifar.training.dry_run import dry_run
from fastcifar.training.step import build_forward, loss_and_correct
from fastcifar.training.train import train
from tests.training.optimizer_helpers import make_trainer


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cutmix_loss_equals_loss_of_torchvision_soft_labels(tiny: Callable[..., Recipe], smoothing: float) -> None:
    trainer = make_trainer(tiny(augment="cutmix", label_smoothing=smoothing))
    images, labels, boxes = next(trainer.batches(0))
    loss, correct = trainer.build_loss_function()(images, labels, boxes)
    cutmix, mixed_images, soft_labels = v2.CutMix(num_classes=10), [], []
    for i, (top, left, bottom, right) in enumerate(boxes.tolist()):
        lam = 1 - (bottom - top) * (right - left) / 1024
        params = {"labels": labels, "batch_size": 32, "box": (left, top, right, bottom), "lam_adjusted": lam}
        mixed_images.append(cutmix.transform(images, params)[i])
        soft_labels.append(cutmix.transform(labels, params)[i])
    logits, targets = trainer.forward(torch.stack(mixed_images)), torch.stack(soft_labels)
    expected = F.cross_entropy(logits, targets, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert correct == (logits.argmax(1) == targets.argmax(1)).sum()


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_equals_weighted_sum_of_losses_of_the_mixed_labels(
    tiny: Callable[..., Recipe], name: str, smoothing: float
) -> None:
    trainer = make_trainer(tiny(augment=name, label_smoothing=smoothing, batch_size=48))
    for images, labels, mixer_params in trainer.batches(1):  # the last batch has 16 images
        mixed, weights = MIXERS[name].apply(images, mixer_params)
        logits = trainer.forward(mixed)
        losses = [
            F.cross_entropy(logits, labels.roll(k), reduction="none", label_smoothing=smoothing)
            for k in range(weights.shape[1])
        ]
        loss, _ = trainer.build_loss_function()(images, labels, mixer_params)
        expected = (weights * torch.stack(losses, 1)).sum(1).mean()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MIXERS)
def test_mixing_before_normalization_equals_mixing_after(name: str) -> None:
    """The training step mixes images before it normalizes them; other implementations mix normalized images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    normalize = build_forward(torch.nn.Identity(), mean, std, "fp32", torch.device("cpu"))
    mixer_params = torch.from_numpy(MIXERS[name].draw(0.5, 8, np.random.default_rng(0)))
    apply = MIXERS[name].apply
    torch.testing.assert_close(normalize(apply(images, mixer_params)[0]), apply(normalize(images), mixer_params)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXERS)
def test_compiled_loss_and_gradient_equal_eager_ones(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (32, 3, 32, 32), dtype=torch.uint8, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (32,), generator=generator)
    mixer_params = torch.from_numpy(MIXERS[name].draw(0.5, 32, np.random.default_rng(0)))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
    forward = build_forward(model, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), "fp32", torch.device("cpu"))
    eager = loss_and_correct(forward, 0.1, MIXERS[name].apply)
    results = []
    for function in (eager, compile_function(eager)):
        model.zero_grad()
        loss, correct = function(images, labels, mixer_params)
        loss.backward()
        results.append((loss.detach(), correct, model[1].weight.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_training_with_a_mixer_learns_and_evaluates_unmixed_images(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny(augment="flip,cutmix", batch_size=24, epochs=8)  # 160 images: the last batch has 16
    summary = train(recipe)
    assert summary.test_acc is not None
    assert summary.test_acc > 0.3
    assert summary.config["augment"] == "flip,cutmix"
    assert dry_run(recipe)["step_s"] > 0
    results = bench(recipe, trials=1, trial_s=0.01).results
    assert {result.what for result in results} == {"loader", "step", "train"}


def test_mixer_is_refused_with_batch_size_1_and_outside_the_training_step(tiny: Callable[..., Recipe]) -> None:
    with pytest.raises(UsageError, match="cutmix mixes the images of a batch; use a --batch-size of 2 or more"):
        make_trainer(tiny(augment="flip,cutmix", batch_size=1))
    split = Split(torch.zeros(4, 3, 32, 32, dtype=torch.uint8).numpy(), torch.zeros(4, dtype=torch.int64).numpy())
    with pytest.raises(
        UsageError, match=r"batches\(\): mixup is applied in the training step; remove it, or use train"
    ):
        next(batches(split, batch_size=2, augment="flip,mixup"))
