"""Tests of the stratified split, including fault 47: a class with one image stays in training."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcifar.data.splits import stratified_split
from fastcifar.errors import UsageError


@settings(max_examples=100)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.data(), st.integers(0, 2**63))
def test_fault47_split_is_exact_stratified_and_deterministic(labels: list[int], data: st.DataObject, seed: int) -> None:
    array = np.array(labels, np.int64)
    size = data.draw(st.integers(0, len(labels) - len(set(labels))))
    train, val = stratified_split(array, size, seed)
    assert train.dtype == val.dtype == np.int64
    assert len(val) == size
    assert sorted([*train, *val]) == list(range(len(labels)))
    assert (np.diff(train) > 0).all()
    assert (np.diff(val) > 0).all()
    assert set(array[train]) == set(labels)
    counts = {label: labels.count(label) for label in set(labels)}
    expected = {label: size * count / len(labels) for label, count in counts.items()}
    if all(np.ceil(expected[label]) < counts[label] for label in counts):  # no class is limited to all but one image
        for label in counts:
            assert abs((array[val] == label).sum() - expected[label]) < 1
    assert np.array_equal(stratified_split(array, size, seed)[1], val)


def test_split_of_cifar_and_its_errors() -> None:
    labels = np.arange(50_000, dtype=np.int64) % 10
    _, val = stratified_split(labels, 5_000, 0)
    assert np.bincount(labels[val]).tolist() == [500] * 10
    # Published results depend on this split, so no version of NumPy may change it.
    assert val[:5].tolist() == [0, 21, 38, 43, 54]
    assert not np.array_equal(val, stratified_split(labels, 5_000, 1)[1])
    for size in (-1, 49_991, 50_000, 60_000):
        with pytest.raises(UsageError, match=r"--val-size .*choose 0 to 49,990"):
            stratified_split(labels, size, 0)
    with pytest.raises(UsageError, match="--val-seed"):
        stratified_split(labels, 10, -1)


# counts of the classes, size of the validation split, expected counts in the validation split
SMALL_CLASSES: dict[str, tuple[list[int], int, list[int]]] = {
    "one image": ([10, 10, 1], 2, [1, 1, 0]),
    "only small classes": ([1, 1, 1, 7], 5, [0, 0, 0, 5]),
    "two images": ([2, 2, 30], 20, [1, 1, 18]),
    "all that is possible": ([1, 2, 3], 3, [0, 1, 2]),
    "half of many": ([50, 1, 1], 26, [26, 0, 0]),
}


@pytest.mark.parametrize("name", SMALL_CLASSES)
@pytest.mark.parametrize("seed", range(3))
def test_fault47_every_class_stays_in_training(name: str, seed: int) -> None:
    counts, size, expected = SMALL_CLASSES[name]
    labels = np.repeat(np.arange(len(counts)), counts)
    train, val = stratified_split(labels, size, seed)
    assert np.bincount(labels[val], minlength=len(counts)).tolist() == expected
    assert np.bincount(labels[train], minlength=len(counts)).min() > 0
