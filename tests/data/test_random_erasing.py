"""Tests of the boxes of random erasing against torchvision; every box is lower and narrower than the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from fastcifar.data.policies import draw_erasing_params

N, N_TORCHVISION = 40_000, 4000


def torchvision_boxes(max_area: float) -> np.ndarray:
    """Draw boxes with torchvision: [n,4] of y, x, h, w; the size is 0 if it finds no box."""
    torch.manual_seed(0)
    erasing = v2.RandomErasing(1.0, (0.02, max_area), (0.3, 3.3))
    params = [erasing.make_params([torch.zeros(3, 32, 32)]) for _ in range(N_TORCHVISION)]
    return np.array([[p["i"], p["j"], p["h"] * (p["v"] is not None), p["w"] * (p["v"] is not None)] for p in params])


@pytest.mark.medium
@pytest.mark.parametrize("max_area", [0.02, 0.1, 0.33, 1.0])
def test_boxes_have_the_distribution_of_torchvision(max_area: float) -> None:
    params = draw_erasing_params(max_area, N, np.random.Generator(np.random.Philox(0)))
    boxes = np.stack([params[name].astype(int) for name in "yxhw"], 1)
    erased = boxes[boxes[:, 2] > 0]
    assert abs(len(erased) / N - 0.5) < 0.01
    assert (erased[:, 2:] < 32).all()
    assert (erased[:, :2] + erased[:, 2:] <= 32).all()
    expected = torchvision_boxes(max_area)
    assert np.mean(expected[:, 2] == 0) < 0.01  # torchvision almost always finds a box
    expected = expected[expected[:, 2] > 0]
    areas = tuple(sample[:, 2] * sample[:, 3] for sample in (erased, expected))
    for samples in [*zip(erased.T, expected.T, strict=True), areas]:
        # Kolmogorov-Smirnov test at a significance level of 1 in 10,000.
        values = np.arange(1025)
        cdfs = [np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in samples]
        assert np.abs(cdfs[0] - cdfs[1]).max() < 2.2 * sum(1 / len(sample) for sample in samples) ** 0.5


def test_aspect_ratios_lie_in_the_range_of_torchvision() -> None:
    """The largest area that fits gives the most exact ratio of height to width: 0.3 to 3.3, uniform on a log scale."""
    aspects = np.array([])
    for seed in range(4):
        params = draw_erasing_params(0.33, N, np.random.Generator(np.random.Philox(seed)))
        height, width = (params[name].astype(float) for name in "hw")
        large = height * width > 200
        aspects = np.append(aspects, (height / width.clip(1))[large])
    # a height and a width of about 8 to 26 pixels are rounded to integers
    assert np.percentile(aspects, 0.1) == pytest.approx(0.3, abs=0.015)
    assert np.percentile(aspects, 99.9) == pytest.approx(3.3, abs=0.16)
    assert np.exp(np.log(aspects).mean()) == pytest.approx((0.3 * 3.3) ** 0.5, rel=0.02)


def test_ten_attempts_as_in_torchvision_and_then_no_box() -> None:
    class FullSizeGenerator:
        """A generator whose draws always select erasing and give a box of the size of the image."""

        attempts = 0

        def random(self, n: int) -> np.ndarray:
            return np.zeros(n)

        def uniform(self, low: float, high: float, n: int) -> np.ndarray:
            self.attempts += high == 1.0
            return np.full(n, 1.0 if high == 1.0 else 0.0)

        def integers(self, low: int, high: np.ndarray, dtype: type, endpoint: bool) -> np.ndarray:
            assert endpoint
            return high.astype(dtype)

    rng = FullSizeGenerator()
    params = draw_erasing_params(1.0, 5, rng)  # type: ignore[arg-type]
    assert rng.attempts == 10
    assert not params["h"].any()
    assert not params["w"].any()
