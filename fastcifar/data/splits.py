"""Splitting the images of a data set into training, validation and test images."""

import numpy as np

from fastcifar.errors import UsageError


def stratified_split(labels: np.ndarray, val_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return sorted int64 indices `(train, val)` into `labels` int64 [n]: a stratified split fixed by `seed`.

    At least one image of every class stays in `train`. Raises `UsageError` if `val_size` is too large for that.
    """
    n = len(labels)
    classes, counts = np.unique(labels, return_counts=True)
    if not 0 <= val_size <= n - len(classes):
        problem = f"--val-size {val_size} is out of range for {n:,} training images of {len(classes)} classes"
        raise UsageError(problem, f"choose 0 to {n - len(classes):,}")
    if seed < 0:
        raise UsageError(f"--val-seed {seed} is negative", "choose 0 or more")
    quota, remainder = np.divmod(val_size * counts, max(n, 1))
    largest_first = np.argsort(-remainder, kind="stable")
    while missing := val_size - quota.sum():
        splittable = largest_first[(quota < counts - 1)[largest_first]]
        quota[splittable[:missing]] += 1
    # NumPy guarantees the same `random_raw` in all versions, but not the same `Generator.permutation`.
    order = np.argsort(np.random.Philox(key=seed).random_raw(n), kind="stable")
    in_val = np.zeros(n, bool)
    for label, size in zip(classes, quota, strict=True):
        in_val[order[labels[order] == label][:size]] = True
    return np.flatnonzero(~in_val).astype(np.int64), np.flatnonzero(in_val).astype(np.int64)


def split_80_10_10(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return indices `(train, val, test)` into `labels` int64 [n]: stratified splits of 80, 10 and 10 %.

    They are fixed by `seed`, and at least one image of every class stays in `train`.
    """
    size = min(len(labels) // 10, (len(labels) - len(np.unique(labels))) // 2)
    kept, test = stratified_split(labels, size, seed)
    train, val = (kept[indices] for indices in stratified_split(labels[kept], size, seed))
    return train, val, test
