"""Cells of metrics.csv and values of JSON documents as finite numbers."""

from __future__ import annotations

from typing import Any

import pytest

from fastcifar.training.metrics_file import METRICS_COLUMNS, parse_finite_float

OTHERS = ["", "0.5x", "nan", "inf", "-inf", "1e999", None, [], {}, [0.5], float("nan"), float("-inf"), 10**400]
NUMBERS = [("0.5", 0.5), (" 1e3\n", 1000.0), (3, 3.0), (-0.25, -0.25), ("0", 0.0), (10**30, 1e30)]


@pytest.mark.parametrize(("value", "expected"), [*NUMBERS, *((value, None) for value in OTHERS)])
def test_finite_numbers_are_parsed_and_other_values_are_none(value: Any, expected: float | None) -> None:
    number = parse_finite_float(value)
    assert (number, type(number)) == (expected, type(expected))


@pytest.mark.parametrize(("value", "limit", "expected"), [("9.9", 10, 9.9), ("10", 10, None), (-11, 10, None)])
def test_a_limit_applies_to_the_absolute_value(value: Any, limit: float, expected: float | None) -> None:
    assert parse_finite_float(value, limit) == expected


def test_columns_of_metrics_csv() -> None:
    columns = "epoch,step,lr,train_loss,train_acc,val_loss,val_acc,ema_val_acc,images_per_s,seconds"
    assert ",".join(METRICS_COLUMNS) == columns
