"""How an epoch is cut into steps: one rule for every loader."""

from __future__ import annotations

from fastcifar.errors import UsageError


def steps_per_epoch(samples: int, batch_size: int, drop_last: bool) -> int:
    """The batches of an epoch; the last one may be shorter, or is left out if `drop_last`.

    Raises `UsageError` if `batch_size` exceeds `samples`.
    """
    if batch_size > samples:
        raise UsageError(
            f"--batch-size {batch_size} is larger than the {samples:,} training images", f"choose at most {samples}"
        )
    return samples // batch_size if drop_last else -(-samples // batch_size)
