"""Gather and augmentation of a batch, eager or compiled to one kernel, and the upload of arrays to the device.

The loaders share these functions.
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

ALIGNMENT = 16  # the parameters of a step start at a multiple of this many elements

# (rows uint8 [n,32,96], indices int32 [b], parameters [b]) -> augmented samples: uint8 channels_last [b,3,32,32]
GatherFn = Callable[[Tensor, Tensor, tuple[OpParams, ...]], Tensor]

# With its default thresholds the compiler splits a chain of augmentations into two kernels and passes int32 rows
# between them through memory. Its index checks in the innermost loop cost time and are not needed: the indices of
# augmentations are clamped or reflected into the image, and those of samples are a permutation.
SINGLE_KERNEL_OPTIONS = {
    "realize_opcount_threshold": 10_000,
    "realize_acc_reads_threshold": 10_000,
    "assert_indirect_indexing": False,
}


def eager_gather(ops: tuple[AugmentOp, ...], fill_color: FillColor) -> GatherFn:
    """Return the eager version of `compile_gather`, which gives identical bytes."""

    def gather(rows: Tensor, indices: Tensor, params: tuple[OpParams, ...]) -> Tensor:
        augmented = apply_augment_rows(ops, rows[indices], params, fill_color)
        return augmented.unflatten(2, (CIFAR_IMAGE_SIZE, 3)).permute(0, 3, 1, 2)

    return gather


@functools.lru_cache(maxsize=64)
def compile_gather(
    ops: tuple[AugmentOp, ...], fill_color: FillColor, num_samples: int, batch_size: int, device: torch.device
) -> GatherFn:
    """Compile one kernel for these arguments and static shapes; all loaders with equal arguments share it.

    torch.compile limits the number of recompilations per code object. Each call therefore compiles a copy of the code
    object; without the copy, the ninth configuration of a sweep would fail.
    """
    eager = eager_gather(ops, fill_color)
    copy = types.FunctionType(eager.__code__.replace(), eager.__globals__, eager.__name__, None, eager.__closure__)
    return torch.compile(copy, fullgraph=True, dynamic=False, options=SINGLE_KERNEL_OPTIONS)


def upload_array(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy `array` to `device`; to a GPU through pinned memory, without waiting."""
    host = torch.from_numpy(np.array(array, order="C"))  # a copy, because torch warns about read-only arrays
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def split_by_step(slicing: BatchSlicing, array: np.ndarray, device: torch.device) -> tuple[Tensor, ...]:
    """Upload an array [n] over positions in one copy and return this rank's share of each step, [local_batch_size].

    Shares start at aligned addresses, because a compiled kernel first copies every misaligned input.
    """
    return upload_array(slicing.step_table(array, ALIGNMENT), device)[:, : slicing.local_batch_size].unbind(0)


def split_params_by_step(
    slicing: BatchSlicing, params: Sequence[Mapping[str, np.ndarray]], device: torch.device
) -> list[tuple[dict[str, Tensor], ...]]:
    """Upload `AugmentParams.op_params`, or part of it, and return the `params` of `apply_augment` for each step."""
    shares = [{name: split_by_step(slicing, array, device) for name, array in arrays.items()} for arrays in params]
    return [
        tuple({name: by_step[step] for name, by_step in op_shares.items()} for op_shares in shares)
        for step in range(slicing.steps_per_epoch)
    ]
