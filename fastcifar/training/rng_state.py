"""The random generators of a run: torch's on each device, numpy's and Python's. Nothing is drawn here.

The loaders draw from none of them: their randomness is data, from the seed and the epoch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_all(seed: int) -> None:
    """Every generator that a part may draw from: torch's on each device, and numpy's and Python's (optimizers do)."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def collect_rng_state(device: torch.device) -> dict[str, Any]:
    """The states of the same generators, as values that a checkpoint may hold."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys, np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": random.getstate(),
    }


def restore_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Puts back what `random_state` gave; a device that the checkpoint does not know keeps its own state."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    random.setstate(state["python"])


@contextmanager
def preserve_state(state: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """Whatever runs inside, `state` and the random generators are afterwards as before, in the same memory."""
    kept = [tensor.detach().clone() for tensor in state]
    host = torch.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(state, kept, strict=True):
                tensor.copy_(value)
        torch.set_rng_state(host)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)
