"""Writes the checkpoints of a run in a thread, so that training waits neither for the disk nor for the GPU."""

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastcifar.training import checkpoint
from fastcifar.training.distributed import get_world
from fastcifar.training.step import Metrics

ALIGNMENT = 64  # of each tensor in a buffer, in bytes: a multiple of the size of every dtype


class CheckpointWriter:
    """Saves the state of a run as it is at the call of `save`, one save at a time, while training goes on.

    Only rank 0 writes. An error of the thread that writes is raised on all ranks, by the next `wait` or `save`.
    """

    def __init__(self) -> None:
        self.world = get_world()
        self._buffers: CopyBuffers | None = None
        self._running: Future[None] | None = None

    def allocate(self, state: Mapping[str, Any]) -> None:
        """Allocate memory for copies of the tensors of `state`; otherwise, the first `save` does and is slow."""
        if self.world.is_main_process:
            self._buffers = CopyBuffers(list(_find_tensors(state).values()))

    def save(self, paths: Sequence[Path], state: Mapping[str, Any]) -> None:
        """Copy `state`, a `TrainingCheckpoint`, and start to write it to all `paths`, in this order.

        Nothing is written, and the error is `NonFiniteError`, if a step had a NaN or Inf or a weight is not finite.
        `checkpoint.save_checkpoint` describes other errors. Waits for the previous save.
        """
        self.wait()
        if self.world.is_main_process:
            copied_state = self._copy(state)
            executor = ThreadPoolExecutor(1, "checkpoint")
            self._running = executor.submit(self._write, paths, copied_state)
            executor.shutdown(wait=False)  # the thread ends after this save

    def wait(self) -> None:
        """Wait until the running save is complete, and raise its error. All ranks must call this together."""
        self.join()
        running, self._running = self._running, None
        if error := self.world.broadcast_object(running and running.exception()):
            raise error

    def join(self) -> None:
        """Wait until the running save is complete or has failed."""
        if self._running:
            wait([self._running])

    def _copy(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return `state` with copies of its tensors, which are complete after `CopyBuffers.synchronize`."""
        tensors = _find_tensors(state)
        if self._buffers is None or not self._buffers.fit(list(tensors.values())):
            self._buffers = CopyBuffers(list(tensors.values()))
        copies = dict(zip(tensors, self._buffers.copy(list(tensors.values())), strict=True))
        return pytree.tree_map_only(Tensor, lambda tensor: copies[_memory_key(tensor)], dict(state))

    def _write(self, paths: Sequence[Path], state: dict[str, Any]) -> None:
        assert self._buffers
        self._buffers.synchronize()
        Metrics.from_sums(state["meter"]).require_finite(state["step"])
        checkpoint.save_checkpoint(paths[0], state, links=paths[1:])


class CopyBuffers:
    """Host memory for copies of `tensors`, allocated once. Each `copy` overwrites the previous one.

    Tensors on a GPU are first copied on the GPU, by few kernels between two training steps. Another stream then copies
    them to pinned memory, while training goes on.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.layouts = [_layout(tensor) for tensor in tensors]
        device = next((tensor.device for tensor in tensors if tensor.is_cuda), torch.device("cpu"))
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.is_copied = torch.cuda.Event(blocking=True) if self.stream else None
        self.indices = [index for index, tensor in enumerate(tensors) if tensor.device == device]
        sizes = [-(-tensors[index].nbytes // ALIGNMENT) * ALIGNMENT for index in self.indices]
        self.host = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=self.stream is not None)
        self.staging = torch.empty_like(self.host, device=device) if self.stream else self.host
        self.copies: dict[int, Tensor] = {}  # index of a tensor -> its copy in `host`
        self.groups: dict[torch.dtype, tuple[list[int], list[Tensor]]] = {}  # indices of tensors, views of `staging`
        for index, offset in zip(self.indices, itertools.accumulate([0, *sizes[:-1]]), strict=True):
            tensor = tensors[index]
            strides = torch.empty_like(tensor, device="meta").stride()
            view = self.staging[offset : offset + tensor.nbytes].view(tensor.dtype).as_strided(tensor.shape, strides)
            group_indices, views = self.groups.setdefault(tensor.dtype, ([], []))
            group_indices.append(index)
            views.append(view)
            self.copies[index] = _host_view(self.host, offset, view)

    def fit(self, tensors: Sequence[Tensor]) -> bool:
        return self.layouts == [_layout(tensor) for tensor in tensors]

    @torch.no_grad()
    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Start to copy `tensors`, which must `fit`, and return the copies, which are complete after `synchronize`."""
        for indices, views in self.groups.values():
            torch._foreach_copy_(views, [tensors[index] for index in indices])
        if self.stream and self.is_copied:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
            with torch.cuda.stream(self.stream):
                self.host.copy_(self.staging, non_blocking=True)
                self.is_copied.record(self.stream)
        return [self.copies[index] if index in self.copies else tensor.clone() for index, tensor in enumerate(tensors)]

    def synchronize(self) -> None:
        """Wait until the copies are complete. The thread that waits does not use the CPU."""
        if self.is_copied:
            self.is_copied.synchronize()


def _host_view(buffer: Tensor, offset: int, like: Tensor) -> Tensor:
    """Return a tensor in the memory of `buffer`, with a storage of its own; `torch.save` writes whole storages."""
    if like.numel() == 0:
        return torch.empty_like(like, device="cpu")
    flat = torch.frombuffer(buffer.numpy(), dtype=like.dtype, count=like.numel(), offset=offset)
    return flat.as_strided(like.shape, like.stride())


def _find_tensors(state: Mapping[str, Any]) -> dict[Any, Tensor]:
    """Return the tensors in nested containers; one that occurs several times, as in `model` and `ema`, once."""
    leaves = pytree.tree_leaves(dict(state))
    return {_memory_key(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}


def _memory_key(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), *_layout(tensor)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.dtype, tensor.shape, tensor.stride()
