"""Tests of the mixers: MixUp and CutMix against torchvision, RICAP against its paper, one image at a time."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from fastcifar.data.augment import draw_mixer_params, format_augment, parse_augment, split_mixer
from fastcifar.data.mixers import MIXERS, mix_labels
from fastcifar.errors import UsageError

CLASSES = 7
B = 48


def batch(n: int = B) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images.contiguous(memory_format=torch.channels_last), torch.randint(CLASSES, (n,), generator=generator)


def draw(spec: str, n: int = B, epoch: int = 0) -> np.ndarray:
    return draw_mixer_params(parse_augment(spec), n, epoch, seed=0)


def mix(spec: str, images: Tensor, labels: Tensor, params: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the mixed images and the class probabilities [b,classes]."""
    out, weights = MIXERS[parse_augment(spec)[-1].name].apply(images, torch.from_numpy(params))
    return out, mix_labels(labels, weights, CLASSES)


@pytest.mark.parametrize("name", MIXERS)
def test_mixer_specs_are_complete_and_deterministic(name: str) -> None:
    spec = MIXERS[name]
    with pytest.raises(UsageError, match=f"write {name}:VALUE {re.escape(f'({spec.help})')}$"):
        parse_augment(f"{name}:1:nonsense")
    (op,) = parse_augment(name)
    assert (op.name, op.value) == (name, spec.default_value)
    assert parse_augment(format_augment(parse_augment(f"crop,{name}"))) == parse_augment(f"crop,{name}")
    assert split_mixer(parse_augment(f"crop,{name}")) == (parse_augment("crop"), op)
    assert split_mixer(parse_augment("crop,flip")) == (parse_augment("crop,flip"), None)
    first = draw(f"crop,{name}", 1000)
    assert first.dtype in (np.uint8, np.float32)
    assert len(first) == 1000
    assert np.array_equal(first, draw(f"crop,{name}", 1000))
    assert not np.array_equal(first, draw(f"crop,{name}", 1000, epoch=1))
    assert np.array_equal(first, draw(f"crop:7,{name}", 1000)), "the value is that of the mixer"
    assert not np.array_equal(first, draw(name, 1000)), "the stream depends on the position in the list"


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("n", [B, 3, 2, 1])
def test_batches_of_any_size_with_probabilities_that_sum_to_one(name: str, n: int) -> None:
    images, labels = batch(n)
    original = images.clone()
    out, targets = mix(name, images, labels, draw(name, n))
    assert out.shape == images.shape
    assert torch.equal(images, original), "the input was changed"
    assert (targets.dtype, targets.shape) == (torch.float32, (n, CLASSES))
    torch.testing.assert_close(targets.sum(1), torch.ones(n))
    if n > 1:
        assert out.is_contiguous(memory_format=torch.channels_last)
    elif name != "ricap":  # RICAP joins four patches of the single image
        assert torch.equal(out.float(), images.float())


def test_mixup_equals_torchvision() -> None:
    images, labels = batch()
    weights = draw("mixup:0.4")
    out, targets = mix("mixup:0.4", images, labels, weights)
    reference = v2.MixUp(alpha=0.4, num_classes=CLASSES)
    for i, weight in enumerate(weights.tolist()):
        params = {"labels": labels, "batch_size": B, "lam": weight}
        torch.testing.assert_close(out[i], reference.transform(images.float(), params)[i], rtol=1e-6, atol=1e-4)
        torch.testing.assert_close(targets[i], reference.transform(labels, params)[i], rtol=1e-6, atol=1e-7)


def test_cutmix_equals_torchvision_exactly() -> None:
    images, labels = batch()
    boxes = draw("cutmix")
    out, targets = mix("cutmix", images, labels, boxes)
    reference = v2.CutMix(alpha=1.0, num_classes=CLASSES)
    for i, (top, left, bottom, right) in enumerate(boxes.tolist()):
        weight = 1 - (bottom - top) * (right - left) / 1024
        params = {"labels": labels, "batch_size": B, "box": (left, top, right, bottom), "lam_adjusted": weight}
        assert torch.equal(out[i], reference.transform(images.float(), params)[i])
        assert torch.equal(targets[i], reference.transform(labels, params)[i])


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_cutmix_boxes_have_the_distribution_of_torchvision(alpha: float) -> None:
    torch.manual_seed(0)
    reference = v2.CutMix(alpha=alpha, num_classes=CLASSES)
    image = [torch.zeros(1, 3, 32, 32)]
    expected = np.array([reference.make_params(image)["box"] for _ in range(4000)])[:, [1, 0, 3, 2]]
    boxes = draw(f"cutmix:{alpha}", 40_000).astype(int)
    areas = tuple((box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) for box in (boxes, expected))
    for a, b in [*zip(boxes.T, expected.T, strict=True), areas]:
        assert ks_distance(a, b) < 2.2 * (1 / 40_000 + 1 / 4000) ** 0.5  # significance level of 1 in 10,000


def test_mixup_weights_have_a_beta_distribution() -> None:
    torch.manual_seed(0)
    expected = torch.distributions.Beta(0.2, 0.2).sample((40_000,)).numpy()
    # Rounded to four digits, because torch's float32 samples never reach 1, where many weights of float64 round to.
    assert ks_distance(draw("mixup:0.2", 40_000).round(4), expected.round(4)) < 2.2 * (2 / 40_000) ** 0.5


def ks_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Kolmogorov-Smirnov statistic of two samples."""
    values = np.sort(np.concatenate((a, b)))
    cdfs = [np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in (a, b)]
    return float(np.abs(cdfs[0] - cdfs[1]).max())


def test_ricap_equals_the_paper() -> None:
    """Compare with Algorithm 1 of Takahashi et al.: four crops of four images, and labels weighted by area."""
    images, labels = batch()
    params = draw("ricap:0.5")
    params[0, :2], params[1, :2], params[2, :2] = 0, 32, (0, 32)  # images that consist of a single patch
    params[:3, 2:] = 0
    out, targets = mix("ricap:0.5", images, labels, params)
    for i, (h, w, *corners) in enumerate(params.tolist()):
        sizes = [(h, w), (h, 32 - w), (32 - h, w), (32 - h, 32 - w)]
        patches, target = [], torch.zeros(CLASSES)
        for k, (height, width) in enumerate(sizes):
            y, x = corners[k], corners[4 + k]
            assert y + height <= 32
            assert x + width <= 32
            patches.append(images[(i - k) % B, :, y : y + height, x : x + width])
            target[labels[(i - k) % B]] += height * width / 1024
        expected = torch.cat((torch.cat(patches[:2], 2), torch.cat(patches[2:], 2)), 1)
        assert torch.equal(out[i], expected)
        torch.testing.assert_close(targets[i], target, rtol=0, atol=1e-7)


def test_ricap_sizes_have_a_beta_distribution_and_corners_are_uniform() -> None:
    params = draw("ricap:0.3", 40_000).astype(int)
    rng = np.random.default_rng(0)
    for column in range(2):
        assert ks_distance(params[:, column], np.rint(32 * rng.beta(0.3, 0.3, 40_000))) < 2.2 * (2 / 40_000) ** 0.5
    assert abs(np.corrcoef(params[:, 0], params[:, 1])[0, 1]) < 0.02
    h, w = params[:, :1], params[:, 1:2]
    heights, widths = np.hstack((h, h, 32 - h, 32 - h)), np.hstack((w, 32 - w, w, 32 - w))
    for corners, sizes in ((params[:, 2:6], heights), (params[:, 6:], widths)):
        assert (corners + sizes <= 32).all()
        for size in (0, 16, 31):
            selected = corners[sizes == size]
            counts = np.bincount(selected, minlength=33 - size)
            mean = len(selected) / (33 - size)
            assert np.abs(counts - mean).max() < 6 * mean**0.5
