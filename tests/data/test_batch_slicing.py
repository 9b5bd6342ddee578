"""The one rule of steps and shares: ranks interleave to the batches of one, and nobody is left without an image."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcifar.data.batch_slicing import BatchSlicing, slice_epoch
from fastcifar.errors import UsageError


@given(
    samples=st.integers(1, 60), per_rank=st.integers(1, 9), ranks=st.integers(1, 5), drop=st.booleans(),
    aligned=st.sampled_from([1, 4]),
)  # fmt: skip
def test_shares_interleave_to_the_batches_of_one_rank(
    samples: int, per_rank: int, ranks: int, drop: bool, aligned: int
) -> None:
    size = per_rank * ranks
    try:
        shares = [slice_epoch(samples, size, drop, rank, ranks) for rank in range(ranks)]
    except UsageError:
        assert size > samples or 0 < samples % size < ranks
        return
    order = np.random.default_rng(0).permutation(samples)
    tables = [steps.step_table(order, aligned) for steps in shares]
    batches = [order[start : start + size] for start in range(0, samples, size)]
    batches = [batch for batch in batches if len(batch) == size or not drop]
    assert {steps.steps_per_epoch for steps in shares} == {len(batches)}
    for step, batch in enumerate(batches):
        parts = [table[step][: steps.local_count(step)] for table, steps in zip(tables, shares, strict=True)]
        assert all(np.array_equal(part, batch[rank::ranks]) for rank, part in enumerate(parts))
        assert all(len(part) > 0 for part in parts)
        assert sum(map(len, parts)) == len(batch)
    for table in tables:
        assert table.shape[1] % aligned == 0
        assert np.isin(table, order).all(), "what fills a row up is a valid draw"


def test_a_table_keeps_the_dtype_and_the_other_axes() -> None:
    table = BatchSlicing(5, 2).step_table(np.arange(15, dtype=np.uint8).reshape(5, 3))
    assert (table.shape, table.dtype) == ((3, 2, 3), np.uint8)
    assert table[2].tolist() == [[12, 13, 14], [0, 1, 2]]


@pytest.mark.parametrize(
    ("samples", "batch_size", "ranks", "message"),
    [
        (50, 51, 1, "--batch-size 51 is larger than the 50 training images; choose at most 50"),
        (50, 30, 4, r"--batch-size 30 cannot be shared out equally to 4 processes; .* a multiple of 4, such as 28"),
        (50, 3, 4, r"such as 4"),
        (50, 48, 4, r"the last batch of an epoch has 2 images .* fewer than the 4 processes; use --drop-last"),
    ],
)
def test_what_cannot_be_cut_is_refused(samples: int, batch_size: int, ranks: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        slice_epoch(samples, batch_size, False, 0, ranks)


def test_dropping_the_short_batch_leaves_no_rank_without_an_image() -> None:
    assert slice_epoch(50, 48, True, 3, 4).steps_per_epoch == 1
