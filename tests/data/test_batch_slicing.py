"""Tests of batch slicing: the shares of the ranks interleave to the batches of a single process, and none is empty."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcifar.data.batch_loader import BatchSlicing
from fastcifar.errors import UsageError


@pytest.mark.medium
@given(
    num_samples=st.integers(1, 60), local_size=st.integers(1, 9), world_size=st.integers(1, 5), drop=st.booleans(),
    chunk_steps=st.integers(1, 4), alignment=st.sampled_from([1, 4]),
)  # fmt: skip
def test_shares_interleave_to_the_batches_of_one_process(
    num_samples: int, local_size: int, world_size: int, drop: bool, chunk_steps: int, alignment: int
) -> None:
    size = local_size * world_size
    try:
        slicings = [BatchSlicing(num_samples, size, drop, rank, world_size) for rank in range(world_size)]
    except UsageError:
        assert size > num_samples or 0 < num_samples % size < world_size
        return
    order = np.random.default_rng(0).permutation(num_samples)
    tables = [slicing.chunk_table(order, chunk_steps, alignment) for slicing in slicings]
    batches = [order[start : start + size] for start in range(0, num_samples, size)]
    batches = [batch for batch in batches if len(batch) == size or not drop]
    assert {slicing.steps_per_epoch for slicing in slicings} == {len(batches)}
    for step, batch in enumerate(batches):
        chunk, index = divmod(step, chunk_steps)
        steps = [table[chunk][index * local_size :] for table in tables]
        shares = [rest[: slicing.local_count(step)] for rest, slicing in zip(steps, slicings, strict=True)]
        assert all(np.array_equal(share, batch[rank::world_size]) for rank, share in enumerate(shares))
        assert all(len(share) > 0 for share in shares)
        assert sum(map(len, shares)) == len(batch)
    for table in tables:
        assert len(table) == -(-len(batches) // chunk_steps)
        assert table.shape[1] % alignment == 0
        assert np.isin(table, order).all(), "the padding must consist of valid values"


def test_a_chunk_table_keeps_the_dtype_and_the_other_dimensions() -> None:
    table = BatchSlicing(5, 2).chunk_table(np.arange(15, dtype=np.uint8).reshape(5, 3), chunk_steps=2)
    assert (table.shape, table.dtype) == ((2, 4, 3), np.uint8)
    assert table[1].tolist() == [[12, 13, 14], [0, 1, 2], [0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "world_size", "message"),
    [
        (50, 51, 1, "--batch-size 51 is larger than the 50 training images; choose at most 50"),
        (50, 30, 4, r"--batch-size 30 is not divisible by the 4 processes; .* a multiple of 4, such as 28"),
        (50, 3, 4, r"such as 4"),
        (50, 48, 4, r"the last batch of an epoch has 2 images .* fewer than the 4 processes; use --drop-last"),
    ],
)
def test_invalid_batch_sizes_are_refused(num_samples: int, batch_size: int, world_size: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BatchSlicing(num_samples, batch_size, False, 0, world_size)


def test_drop_last_allows_a_short_batch_smaller_than_the_world_size() -> None:
    assert BatchSlicing(50, 48, True, 3, 4).steps_per_epoch == 1
