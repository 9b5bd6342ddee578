"""The random number generators of a run; data loaders derive theirs from the seed and the epoch instead."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor


class RngState(TypedDict):
    """States of the random number generators, as values that a checkpoint can hold."""

    torch: Tensor
    cuda: Tensor | None
    numpy: list[Any]
    python: tuple[Any, ...]


def seed_all(seed: int) -> None:
    """Seed torch's generators on all devices, NumPy's and Python's (some optimizers use the latter two)."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def collect_rng_state(device: torch.device) -> RngState:
    """Return the states of the generators that `seed_all` seeds."""
    algorithm, keys, position, has_gauss, gauss = np.random.get_state()
    int64_keys = torch.from_numpy(np.asarray(keys, np.int64))
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [str(algorithm), int64_keys, int(position), int(has_gauss), float(gauss)],
        "python": random.getstate(),
    }


def restore_rng_state(state: RngState, device: torch.device) -> None:
    """Restore the result of `collect_rng_state`; without a saved GPU state, that of the GPU is kept."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    algorithm, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    random.setstate(state["python"])


@contextmanager
def preserve_state(state: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """Restore the tensors of `state`, in place, and torch's random generators after the `with` block."""
    saved_tensors = [tensor.detach().clone() for tensor in state]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(state, saved_tensors, strict=True):
                    tensor.copy_(value)
