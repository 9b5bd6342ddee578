"""Mixers in the training step: its loss is that of soft labels, and its fast forms equal the plain one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from fastcifar.benchmark.bench import bench
from fastcifar.data.cifar_files import Split
from fastcifar.data.loaders import batches
from fastcifar.data.mixers import MIXERS
from fastcifar.errors import UsageError
from fastcifar.recipe import Recipe
from fastcifar.training.build import build_trainer
from fastcifar.training.compilation import compile_function
from fastcifar.training.cuda_graph import cuda_graphed, dispatch_by_batch_size
from fastcifar.training.dry_run import dry_run
from fastcifar.training.resolve import resolve
from fastcifar.training.step import build_forward, mixed_loss_and_correct
from fastcifar.training.train import train
from fastcifar.training.trainer import Trainer


def parts_of(recipe: Recipe) -> Trainer:
    return build_trainer(resolve(recipe))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cutmix_loss_is_that_of_torchvisions_soft_labels(tiny: Callable[..., Recipe], smoothing: float) -> None:
    parts = parts_of(tiny(augment="cutmix", label_smoothing=smoothing))
    images, labels, boxes = next(parts.batches(0))
    loss, hits = parts.build_loss_function()(images, labels, boxes)
    cutmix, pixels, soft = v2.CutMix(num_classes=10), [], []
    for i, (top, left, bottom, right) in enumerate(boxes.tolist()):
        kept = 1 - (bottom - top) * (right - left) / 1024
        params = {"labels": labels, "batch_size": 32, "box": (left, top, right, bottom), "lam_adjusted": kept}
        pixels.append(cutmix.transform(images, params)[i])
        soft.append(cutmix.transform(labels, params)[i])
    logits, targets = parts.forward(torch.stack(pixels)), torch.stack(soft)
    wanted = F.cross_entropy(logits, targets, label_smoothing=smoothing)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    assert hits == (logits.argmax(1) == targets.argmax(1)).sum()


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_sum_of_the_labels_losses_by_their_weights(
    tiny: Callable[..., Recipe], name: str, smoothing: float
) -> None:
    parts = parts_of(tiny(augment=name, label_smoothing=smoothing, batch_size=48))
    for images, labels, drawn in parts.batches(1):  # the last of 16 images
        mixed, weights = MIXERS[name].apply(images, drawn)
        logits = parts.forward(mixed)
        losses = [
            F.cross_entropy(logits, labels.roll(k), reduction="none", label_smoothing=smoothing)
            for k in range(weights.shape[1])
        ]
        loss, _ = parts.build_loss_function()(images, labels, drawn)
        wanted = (weights * torch.stack(losses, 1)).sum(1).mean()
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MIXERS)
def test_mixing_before_normalising_is_mixing_after(name: str) -> None:
    """What is mixed has not been normalised; recipes elsewhere mix what has."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=random)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    normalise = build_forward(torch.nn.Identity(), mean, std, "fp32", torch.device("cpu"))
    drawn = torch.from_numpy(MIXERS[name].draw(0.5, 8, np.random.default_rng(0)))
    apply = MIXERS[name].apply
    torch.testing.assert_close(normalise(apply(images, drawn)[0]), apply(normalise(images), drawn)[0])


@pytest.mark.parametrize("name", MIXERS)
def test_captured_steps_equal_plain_steps(tiny: Callable[..., Recipe], name: str) -> None:
    plain_parts, parts = (parts_of(tiny(augment=f"flip,{name}", batch_size=48)) for _ in range(2))
    plain, step = (of.build_step(of.build_loss_function()) for of in (plain_parts, parts))
    captured = dispatch_by_batch_size(
        cuda_graphed(step, parts.example_batch(), parts.state_tensors(), capture_fn=lambda work: work), step, 48
    )
    for batch, same in zip(plain_parts.batches(0), parts.batches(0), strict=True):
        plain(*batch)
        captured(*same)
    for mine, other in zip(parts.state_tensors(), plain_parts.state_tensors(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("name", MIXERS)
def test_compiled_equals_eager(name: str) -> None:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (32, 3, 32, 32), dtype=torch.uint8, generator=random)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (32,), generator=random)
    drawn = torch.from_numpy(MIXERS[name].draw(0.5, 32, np.random.default_rng(0)))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
    forward = build_forward(model, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), "fp32", torch.device("cpu"))
    plain = mixed_loss_and_correct(forward, 0.1, MIXERS[name].apply)
    seen = []
    for function in (plain, compile_function(plain)):
        model.zero_grad()
        loss, hits = function(images, labels, drawn)
        loss.backward()
        seen.append((loss.detach(), hits, model[1].weight.grad))
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-5, atol=1e-5)


def test_a_run_with_a_mixer_learns_and_evaluates_whole_images(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny(augment="flip,cutmix", batch_size=24, epochs=8)  # 160 images: the last batch has 16
    summary = train(recipe)
    assert summary["test_acc"] > 0.3
    assert summary["config"]["augment"] == "flip,cutmix"
    assert dry_run(recipe)["step_s"] > 0
    assert {row["what"] for row in bench(recipe, trials=1, trial_s=0.01)["results"]} == {"loader", "step", "train"}


def test_without_neighbours_a_mixer_is_refused(tiny: Callable[..., Recipe]) -> None:
    with pytest.raises(UsageError, match="cutmix mixes the images of a batch; use a --batch-size of 2 or more"):
        parts_of(tiny(augment="flip,cutmix", batch_size=1))
    split = Split(torch.zeros(4, 3, 32, 32, dtype=torch.uint8).numpy(), torch.zeros(4, dtype=torch.int64).numpy())
    with pytest.raises(
        UsageError, match=r"batches\(\): mixup is applied in the training step; remove it, or use train"
    ):
        next(batches(split, batch_size=2, augment="flip,mixup"))
