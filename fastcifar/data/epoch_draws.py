"""The arrays of an epoch that the CPU draws: computed ahead in a background thread, packed, and uploaded together."""

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes; a compiled kernel first copies an input whose address is not a multiple of 16

T = TypeVar("T")


class DrawAhead(Generic[T]):
    """Cache of `draw(epoch)`, a function of the epoch alone, whose next value a background thread can compute.

    `draw` must not use the GPU: an allocation in another thread can invalidate the capture of a CUDA graph. It must not
    refer to the owner of this object, whose memory and threads are released when the last reference to it is deleted.
    """

    def __init__(self, draw: Callable[[int], T]) -> None:
        self._draw = draw
        self._results: dict[int, T] = {}
        self._thread: threading.Thread | None = None

    def get(self, epoch: int) -> T:
        """Return `draw(epoch)`, and discard the results of all epochs other than this one and the next."""
        if self._thread:
            self._thread.join()
        result = self._results[epoch] if epoch in self._results else self._draw(epoch)
        kept = {epoch: result, **self._results}
        self._results = {key: kept[key] for key in (epoch, epoch + 1) if key in kept}
        return result

    def start(self, epoch: int) -> None:
        """Compute `draw(epoch)` in a background thread unless it is known or the thread is busy."""
        if epoch not in self._results and not (self._thread and self._thread.is_alive()):
            # Not a daemon: the interpreter waits for the thread, which ends after one epoch.
            self._thread = threading.Thread(target=self._store, args=(epoch,), name="fastcifar-draw-epoch")
            self._thread.start()

    def _store(self, epoch: int) -> None:
        # After an error, or in a child process, which has no copy of this thread, `get` calls `draw` itself.
        with contextlib.suppress(Exception):
            self._results[epoch] = self._draw(epoch)


class PackedArrays:
    """Groups of named arrays in one block of memory, so that one copy uploads all of them."""

    def __init__(self, groups: Sequence[Mapping[str, np.ndarray]]) -> None:
        self._layout = []
        offset, parts = 0, []
        for group in groups:
            entries = {}
            for name, array in group.items():
                padding = -array.nbytes % ALIGNMENT
                dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
                entries[name] = (offset, array.nbytes, dtype, array.shape)
                parts += [np.ascontiguousarray(array).reshape(-1).view(np.uint8), np.zeros(padding, np.uint8)]
                offset += array.nbytes + padding
            self._layout.append(entries)
        self._block = np.concatenate([np.empty(0, np.uint8), *parts])

    def upload(self, device: torch.device) -> list[dict[str, Tensor]]:
        """Return the groups as tensors on the device, which share one copy of the memory block."""
        block = upload_array(self._block, device)
        return [
            {name: block[start : start + size].view(dtype).view(shape) for name, (start, size, dtype, shape) in entries}
            for entries in (group.items() for group in self._layout)
        ]


def upload_array(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy `array` to `device`. Copies to a GPU use pinned memory and are asynchronous."""
    if device.type != "cuda":
        return torch.from_numpy(np.array(array, order="C"))
    writable = np.require(array, requirements=["C", "W"])  # torch warns about read-only arrays
    return torch.from_numpy(writable).pin_memory().to(device, non_blocking=True)
