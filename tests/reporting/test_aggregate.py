"""Mean, sample standard deviation and standard error against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastcifar.reporting.aggregate import MeanStd


def test_mean_std_and_standard_error_are_those_of_numpy() -> None:
    values = [0.9151, 0.9204, 0.9302, 0.9177]
    found = MeanStd.from_values(values)
    assert found is not None
    std = np.std(values, ddof=1)
    assert (found.mean, found.std, found.n) == (pytest.approx(np.mean(values)), pytest.approx(std), 4)
    assert found.standard_error == pytest.approx(std / math.sqrt(4))


def test_a_single_value_has_no_deviation() -> None:
    assert MeanStd.from_values([0.5]) == MeanStd(mean=0.5, std=None, n=1)
    assert MeanStd(mean=0.5, std=None, n=1).standard_error is None


def test_there_is_no_mean_where_a_value_is_missing() -> None:
    assert MeanStd.from_values([]) is None
    assert MeanStd.from_values([0.5, None]) is None
