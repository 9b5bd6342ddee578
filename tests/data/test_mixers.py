"""The mixers against torchvision's MixUp and CutMix, and RICAP against the paper written out image by image."""

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
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=random)
    return images.contiguous(memory_format=torch.channels_last), torch.randint(CLASSES, (n,), generator=random)


def drawn(spec: str, n: int = B, epoch: int = 0) -> np.ndarray:
    return draw_mixer_params(parse_augment(spec), n, epoch, seed=0)


def mixed(spec: str, images: Tensor, labels: Tensor, draws: np.ndarray) -> tuple[Tensor, Tensor]:
    """(mixed images, shares of the classes [b,classes])."""
    out, weights = MIXERS[parse_augment(spec)[-1].name].apply(images, torch.from_numpy(draws))
    return out, mix_labels(labels, weights, CLASSES)


@pytest.mark.parametrize("name", MIXERS)
def test_rows_are_complete_and_draw_by_position(name: str) -> None:
    row = MIXERS[name]
    with pytest.raises(UsageError, match=f"write {name}:VALUE {re.escape(f'({row.help})')}$"):
        parse_augment(f"{name}:1:nonsense")
    (op,) = parse_augment(name)
    assert (op.name, op.value) == (name, row.default_value)
    assert parse_augment(format_augment(parse_augment(f"crop,{name}"))) == parse_augment(f"crop,{name}")
    assert split_mixer(parse_augment(f"crop,{name}")) == (parse_augment("crop"), op)
    assert split_mixer(parse_augment("crop,flip")) == (parse_augment("crop,flip"), None)
    first = drawn(f"crop,{name}", 1000)
    assert first.dtype in (np.uint8, np.float32)
    assert len(first) == 1000
    assert np.array_equal(first, drawn(f"crop,{name}", 1000))
    assert not np.array_equal(first, drawn(f"crop,{name}", 1000, epoch=1))
    assert not np.array_equal(first, drawn(name, 1000)), "a stream belongs to a place in the list"


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("n", [B, 3, 2, 1])
def test_batches_of_any_size_with_shares_that_sum_to_one(name: str, n: int) -> None:
    images, labels = batch(n)
    kept = images.clone()
    out, shares = mixed(name, images, labels, drawn(name, n))
    assert out.shape == images.shape
    assert torch.equal(images, kept), "the input was changed"
    assert (shares.dtype, shares.shape) == (torch.float32, (n, CLASSES))
    torch.testing.assert_close(shares.sum(1), torch.ones(n))
    if n > 1:
        assert out.is_contiguous(memory_format=torch.channels_last)
    elif name != "ricap":  # which puts four patches of the one image together
        assert torch.equal(out.float(), images.float())


def test_mixup_equals_torchvisions() -> None:
    images, labels = batch()
    shares = drawn("mixup:0.4")
    out, targets = mixed("mixup:0.4", images, labels, shares)
    theirs = v2.MixUp(alpha=0.4, num_classes=CLASSES)
    for i, share in enumerate(shares.tolist()):
        params = {"labels": labels, "batch_size": B, "lam": share}
        torch.testing.assert_close(out[i], theirs.transform(images.float(), params)[i], rtol=1e-6, atol=1e-4)
        torch.testing.assert_close(targets[i], theirs.transform(labels, params)[i], rtol=1e-6, atol=1e-7)


def test_cutmix_equals_torchvisions_exactly() -> None:
    images, labels = batch()
    boxes = drawn("cutmix")
    out, targets = mixed("cutmix", images, labels, boxes)
    theirs = v2.CutMix(alpha=1.0, num_classes=CLASSES)
    for i, (top, left, bottom, right) in enumerate(boxes.tolist()):
        kept = 1 - (bottom - top) * (right - left) / 1024
        params = {"labels": labels, "batch_size": B, "box": (left, top, right, bottom), "lam_adjusted": kept}
        assert torch.equal(out[i], theirs.transform(images.float(), params)[i])
        assert torch.equal(targets[i], theirs.transform(labels, params)[i])


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_cutmix_draws_as_torchvision(alpha: float) -> None:
    torch.manual_seed(0)
    theirs = v2.CutMix(alpha=alpha, num_classes=CLASSES)
    image = [torch.zeros(1, 3, 32, 32)]
    wanted = np.array([theirs.make_params(image)["box"] for _ in range(4000)])[:, [1, 0, 3, 2]]
    ours = drawn(f"cutmix:{alpha}", 40_000).astype(int)
    area, other = ((box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) for box in (ours, wanted))
    for mine, theirs_ in [*zip(ours.T, wanted.T, strict=True), (area, other)]:
        assert distance(mine, theirs_) < 2.2 * (1 / 40_000 + 1 / 4000) ** 0.5  # a level of 1 in 10,000


def test_mixup_draws_a_beta() -> None:
    torch.manual_seed(0)
    wanted = torch.distributions.Beta(0.2, 0.2).sample((40_000,)).numpy()
    # To four digits: torch's float32 has no 1, and a fiftieth of these shares is nearer to it than to its neighbour.
    assert distance(drawn("mixup:0.2", 40_000).round(4), wanted.round(4)) < 2.2 * (2 / 40_000) ** 0.5


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov and Smirnov's: the largest between two distributions."""
    at = np.sort(np.concatenate((a, b)))
    shares = [np.searchsorted(np.sort(sample), at, side="right") / len(sample) for sample in (a, b)]
    return float(np.abs(shares[0] - shares[1]).max())


def test_ricap_equals_the_paper() -> None:
    """Algorithm 1 of Takahashi et al.: four crops of four images, side by side, and labels by area."""
    images, labels = batch()
    draws = drawn("ricap:0.5")
    draws[0, :2], draws[1, :2], draws[2, :2] = 0, 32, (0, 32)  # the image of one patch alone
    draws[:3, 2:] = 0
    out, targets = mixed("ricap:0.5", images, labels, draws)
    for i, (h, w, *corners) in enumerate(draws.tolist()):
        sizes = [(h, w), (h, 32 - w), (32 - h, w), (32 - h, 32 - w)]
        patches, shares = [], torch.zeros(CLASSES)
        for k, (tall, wide) in enumerate(sizes):
            y, x = corners[k], corners[4 + k]
            assert y + tall <= 32
            assert x + wide <= 32
            patches.append(images[(i - k) % B, :, y : y + tall, x : x + wide])
            shares[labels[(i - k) % B]] += tall * wide / 1024
        whole = torch.cat((torch.cat(patches[:2], 2), torch.cat(patches[2:], 2)), 1)
        assert torch.equal(out[i], whole)
        torch.testing.assert_close(targets[i], shares, rtol=0, atol=1e-7)


def test_ricap_draws_sizes_by_beta_and_corners_uniformly() -> None:
    draws = drawn("ricap:0.3", 40_000).astype(int)
    random = np.random.default_rng(0)
    for column in range(2):
        assert distance(draws[:, column], np.rint(32 * random.beta(0.3, 0.3, 40_000))) < 2.2 * (2 / 40_000) ** 0.5
    assert abs(np.corrcoef(draws[:, 0], draws[:, 1])[0, 1]) < 0.02
    h, w = draws[:, :1], draws[:, 1:2]
    heights, widths = np.hstack((h, h, 32 - h, 32 - h)), np.hstack((w, 32 - w, w, 32 - w))
    for corners, sizes in ((draws[:, 2:6], heights), (draws[:, 6:], widths)):
        assert (corners + sizes <= 32).all()
        for size in (0, 16, 31):
            found = corners[sizes == size]
            counts = np.bincount(found, minlength=33 - size)
            mean = len(found) / (33 - size)
            assert np.abs(counts - mean).max() < 6 * mean**0.5
