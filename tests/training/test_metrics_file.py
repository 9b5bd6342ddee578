"""Cells of metrics.csv and values of JSON documents as finite numbers."""

from __future__ import annotations

from typing import Any

import pytest

from fastcifar.training.metrics_file import parse_finite_float


@pytest.mark.parametrize(
    ("value", "expected"), [("0.5", 0.5), (" 1e3\n", 1000.0), (3, 3.0), (-0.25, -0.25), ("0", 0.0), (10**30, 1e30)]
)
def test_numbers_are_parsed(value: Any, expected: float) -> None:
    number = parse_finite_float(value)
    assert (number, type(number)) == (expected, float)


@pytest.mark.parametrize(
    "value", ["", "0.5x", "nan", "inf", "-inf", "1e999", None, [], {}, [0.5], float("nan"), float("-inf"), 10**400]
)
def test_other_values_are_none(value: Any) -> None:
    assert parse_finite_float(value) is None


def test_a_limit_applies_to_the_absolute_value() -> None:
    assert parse_finite_float("9.9", limit=10) == 9.9
    assert parse_finite_float("10", limit=10) is parse_finite_float(-11, limit=10) is None
