"""A batch's augmentation as one compiled kernel beside its eager twin, and the way of arrays to the device.

What the loaders share; it must not know where a batch comes from.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fastcifar.data.augment import CIFAR_IMAGE_SIZE, AugmentOp, FillColor, OpParams, apply_augment_rows
from fastcifar.data.batch_slicing import BatchSlicing

ALIGNMENT = 16  # elements: a step's slice of the draws starts at a multiple of this many

# (rows uint8 [n,32,96], order int32 [b], parameters [b]) -> those samples, augmented: uint8 channels_last [b,3,32,32]
GatherFn = Callable[[Tensor, Tensor, tuple[OpParams, ...]], Tensor]

# The compiler would cut a chain of ops in two at its thresholds, and pass int32 rows between the parts through memory.
# It would also check every index: those of the ops are clamped or mirrored into the image, those of the order are a
# permutation, and a check in the innermost loop costs time. The eager twin keeps its own.
SINGLE_KERNEL_OPTIONS = {
    "realize_opcount_threshold": 10_000,
    "realize_acc_reads_threshold": 10_000,
    "assert_indirect_indexing": False,
}


def eager_gather(ops: tuple[AugmentOp, ...], fill_color: FillColor) -> GatherFn:
    """The eager twin of `compiled`."""

    def gather(rows: Tensor, order: Tensor, params: tuple[OpParams, ...]) -> Tensor:
        return (
            apply_augment_rows(ops, rows[order], params, fill_color)
            .unflatten(2, (CIFAR_IMAGE_SIZE, 3))
            .permute(0, 3, 1, 2)
        )

    return gather


@functools.lru_cache(maxsize=64)
def compile_gather(
    ops: tuple[AugmentOp, ...], fill_color: FillColor, num_samples: int, batch_size: int, device: torch.device
) -> GatherFn:
    """One kernel for one setting and one static shape, shared by all loaders of that setting.

    The compiler keeps its variants, and their small limit, with the code object: each setting gets a code object of
    its own, or the ninth setting of a sweep would fail.
    """
    eager = eager_gather(ops, fill_color)
    own = types.FunctionType(eager.__code__.replace(), eager.__globals__, eager.__name__, None, eager.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False, options=SINGLE_KERNEL_OPTIONS)


def upload_array(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy of `array` on `device`; to a GPU through pinned memory, without waiting."""
    host = torch.from_numpy(np.array(array, order="C"))  # a copy: torch refuses to be quiet about read-only arrays
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def split_by_step(slicing: BatchSlicing, array: np.ndarray, device: torch.device) -> tuple[Tensor, ...]:
    """[n] over positions, on the host -> this rank's share of each step [share], on the device, in one upload.

    Shares start at aligned addresses: a compiled kernel copies every misaligned input first.
    """
    return upload_array(slicing.step_table(array, ALIGNMENT), device)[:, : slicing.local_batch_size].unbind(0)


def split_params_by_step(
    slicing: BatchSlicing, params: Sequence[Mapping[str, np.ndarray]], device: torch.device
) -> list[tuple[dict[str, Tensor], ...]]:
    """`Draws.params`, or some of them -> for each step the tuple that `apply` takes: one dict for each op."""
    tables = [{name: split_by_step(slicing, array, device) for name, array in of_op.items()} for of_op in params]
    return [
        tuple({name: shares[step] for name, shares in of_op.items()} for of_op in tables)
        for step in range(slicing.steps_per_epoch)
    ]
