"""Random erasing draws its boxes as torchvision does, and never one that is not smaller than the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from fastcifar.data.crop_flip_erase import ERASE_ASPECT_RANGE, ERASE_PROBABILITY, MIN_ERASE_AREA, draw_erasing_params

N, THEIRS = 40_000, 4000


def boxes_of_torchvision(largest: float) -> np.ndarray:
    """`THEIRS` boxes that torchvision draws: [n,4] of y, x, h, w; no size where it gave up."""
    torch.manual_seed(0)
    erasing = v2.RandomErasing(1.0, (MIN_ERASE_AREA, largest), ERASE_ASPECT_RANGE)
    drawn = [erasing.make_params([torch.zeros(3, 32, 32)]) for _ in range(THEIRS)]
    return np.array([[p["i"], p["j"], p["h"] * (p["v"] is not None), p["w"] * (p["v"] is not None)] for p in drawn])


@pytest.mark.parametrize("largest", [0.02, 0.1, 0.33, 1.0])
def test_boxes_are_distributed_as_torchvisions(largest: float) -> None:
    drawn = draw_erasing_params(largest, N, np.random.Generator(np.random.Philox(0)))
    ours = np.stack([drawn[name].astype(int) for name in "yxhw"], 1)
    erased = ours[ours[:, 2] > 0]
    assert abs(len(erased) / N - ERASE_PROBABILITY) < 0.01
    assert (erased[:, 2:] < 32).all()
    assert (erased[:, :2] + erased[:, 2:] <= 32).all()
    theirs = boxes_of_torchvision(largest)
    assert np.mean(theirs[:, 2] == 0) < 0.01  # it gives up hardly ever, and so do we: the share above
    theirs = theirs[theirs[:, 2] > 0]
    area, other = (boxes[:, 2] * boxes[:, 3] for boxes in (erased, theirs))
    for mine, wanted in [*zip(erased.T, theirs.T, strict=True), (area, other)]:
        # Kolmogorov and Smirnov: the largest distance of the two distributions, at a level of 1 in 10,000.
        values = np.arange(1025)
        shares = [np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in (mine, wanted)]
        assert np.abs(shares[0] - shares[1]).max() < 2.2 * (1 / len(mine) + 1 / len(wanted)) ** 0.5


def test_ten_tries_as_torchvision_and_then_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck:
        """Draws that always erase, and make a box of the whole image."""

        tries = 0

        def random(self, n: int) -> np.ndarray:
            return np.zeros(n)

        def uniform(self, low: float, high: float, n: int) -> np.ndarray:
            self.tries += high == 1.0
            return np.full(n, 1.0 if high == 1.0 else 0.0)

        def integers(self, low: int, high: np.ndarray, dtype: type, endpoint: bool) -> np.ndarray:
            assert endpoint
            return high.astype(dtype)

    random = Stuck()
    drawn = draw_erasing_params(1.0, 5, random)  # type: ignore[arg-type]
    assert random.tries == 10
    assert not drawn["h"].any()
    assert not drawn["w"].any()
