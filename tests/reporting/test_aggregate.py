"""Mean, sample standard deviation and standard error compared with NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastcifar.reporting.aggregate import MeanStd


def test_mean_std_matches_numpy() -> None:
    values = [0.9151, 0.9204, 0.9302, 0.9177]
    statistics = MeanStd.from_values(values)
    assert statistics is not None
    std = np.std(values, ddof=1)
    assert (statistics.mean, statistics.std, statistics.n) == (pytest.approx(np.mean(values)), pytest.approx(std), 4)
    assert statistics.standard_error == pytest.approx(std / math.sqrt(4))


def test_few_or_missing_values() -> None:
    assert MeanStd.from_values([0.5]) == MeanStd(mean=0.5, std=None, n=1)
    assert MeanStd(mean=0.5, std=None, n=1).standard_error is None
    assert MeanStd.from_values([]) is None
    assert MeanStd.from_values([0.5, None]) is None
