"""Faults that are planted in the package: each must be found when a case runs with the stub CUDA runtime."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastcifar.models import fused_ops
from fastcifar.training import compilation
from fastcifar.training.checkpoint_writer import CopyBuffers
from fastcifar.training.optimizers import OptimizerWrapper
from fastcifar.training.step import Meter
from fastcifar.training.trainer import Trainer


def replace(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace the function `name` of a module or class by `wrap` of it."""
    setattr(owner, name, wrap(getattr(owner, name)))


def change_loss(change: Callable[[Tensor], Tensor]) -> None:
    """Apply `change` to the loss of the step."""

    def wrap(build: Callable[..., Any]) -> Callable[..., Any]:
        def build_changed(*args: Any) -> Callable[..., Any]:
            loss_function = build(*args)

            def changed(*batch: Tensor) -> tuple[Tensor, Tensor]:
                loss, correct = loss_function(*batch)
                return change(loss), correct

            return changed

        return build_changed

    replace(Trainer, "build_loss_function", wrap)


def read_loss_in_step() -> None:
    def change(loss: Tensor) -> Tensor:
        loss.item()
        return loss

    change_loss(change)


def add_cpu_tensor_to_loss() -> None:
    weight = torch.tensor([2.0])
    change_loss(lambda loss: (loss * weight).sum())


def upload_tensor_in_loss() -> None:
    weight = torch.tensor(2.0)
    change_loss(lambda loss: loss * weight.to(loss.device))


def copy_pageable_memory() -> None:
    """Upload without pinned memory."""
    replace(torch.Tensor, "pin_memory", lambda _: lambda tensor: tensor)


def add_number_instead_of_tensor() -> None:
    """Ranger as it was: without `alpha`, `_foreach_add_` reads a tensor with one value on the host."""

    def wrap(add: Callable[..., None]) -> Callable[..., None]:
        return lambda tensors, other, **options: add(tensors, other)

    replace(torch, "_foreach_add_", wrap)


def copy_metrics_in_step() -> None:
    """Copy the sums to pinned memory in the captured step."""

    def wrap(update: Callable[..., None]) -> Callable[..., None]:
        def update_and_copy(meter: Meter, *args: Any) -> None:
            update(meter, *args)
            meter.host_sums.copy_(meter.sums, non_blocking=True)

        return update_and_copy

    replace(Meter, "update", wrap)


def run_on_unjoined_stream() -> None:
    def change(loss: Tensor) -> Tensor:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss.detach().add(1)
        return loss

    change_loss(change)


def run_on_other_stream() -> None:
    def change(loss: Tensor) -> Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            loss.detach().add_(1)
        return loss

    change_loss(change)


def allocate_on_other_stream() -> None:
    def change(loss: Tensor) -> Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.empty(2**25, device=loss.device)
        return loss

    change_loss(change)


def copy_pageable_memory_in_step() -> None:
    """Copy to the loss with the function of CUDA, since torch itself refuses to do this in a capture."""
    one = torch.ones(1)
    copy = ctypes.CDLL(None).cudaMemcpyAsync

    def change(loss: Tensor) -> Tensor:
        target, source = ctypes.c_void_p(loss.data_ptr()), ctypes.c_void_p(one.data_ptr())
        host_to_device = 1
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        copy(target, source, ctypes.c_size_t(4), host_to_device, stream)
        return loss

    change_loss(change)


def launch_new_kernel_in_capture() -> None:
    """Launch a Triton kernel that has not been loaded before the capture."""

    def change(loss: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            images = loss.detach().expand(1, 8, 4, 4).contiguous(memory_format=torch.channels_last)
            fused_ops.chunk_moments(images, 16)
        return loss

    change_loss(change)


def free_memory_of_graph() -> None:
    """Free a tensor that the captured step copies from."""
    tensors: list[Tensor] = []

    def change(loss: Tensor) -> Tensor:
        if not torch.cuda.is_current_stream_capturing() and not tensors:
            tensors.append(torch.empty(2**25, device="cuda"))
        tensors[0].clone()
        return loss

    def wrap(optimize: Callable[..., None]) -> Callable[..., None]:
        def optimize_and_free(trainer: Trainer) -> None:
            optimize(trainer)
            tensors.clear()
            torch.cuda.empty_cache()

        return optimize_and_free

    change_loss(change)
    replace(Trainer, "optimize", wrap)


def read_sums_between_steps() -> None:
    def wrap(train_step: Callable[..., None]) -> Callable[..., None]:
        def train_and_read(trainer: Trainer, batch: Any) -> None:
            train_step(trainer, batch)
            trainer.meter.sums.tolist()

        return train_and_read

    replace(Trainer, "train_step", wrap)


def launch_between_steps() -> None:
    def wrap(set_lr: Callable[..., None]) -> Callable[..., None]:
        def set_twice(optimizer: OptimizerWrapper, lr: float) -> None:
            set_lr(optimizer, lr)
            set_lr(optimizer, lr)

        return set_twice

    replace(OptimizerWrapper, "set_lr", wrap)


def keep_settings_of_torch() -> None:
    replace(compilation, "allow_tf32", lambda _: lambda allowed: None)


def copy_state_without_waiting() -> None:
    """Copy the state to the host without waiting for the training step."""

    def wrap(copy: Callable[..., Any]) -> Callable[..., Any]:
        def copy_at_once(buffers: CopyBuffers, tensors: Any) -> Any:
            wait_stream = torch.cuda.Stream.wait_stream
            replace(torch.cuda.Stream, "wait_stream", lambda _: lambda *_: None)
            try:
                return copy(buffers, tensors)
            finally:
                torch.cuda.Stream.wait_stream = wait_stream

        return copy_at_once

    replace(CopyBuffers, "copy", wrap)


def copy_state_to_pageable_memory() -> None:
    def wrap(build: Callable[..., None]) -> Callable[..., None]:
        def build_pageable(buffers: CopyBuffers, tensors: Any) -> None:
            build(buffers, tensors)
            buffers.host = torch.empty(len(buffers.host), dtype=torch.uint8)

        return build_pageable

    replace(CopyBuffers, "__init__", wrap)


def read_loss_scale() -> None:
    """Save the state of the scaler as torch returns it."""
    replace(Trainer, "_scaler_state_dict", lambda _: lambda trainer: trainer.scaler.state_dict())


SAVES = {"precision": "fp16", "save_every_steps": 1}


def capture_in_separate_pools() -> None:
    def wrap(graph: Callable[..., Any]) -> Callable[..., Any]:
        return lambda captured, pool, **options: graph(captured, **options)

    replace(torch.cuda, "graph", wrap)


def keep_tensor_of_captured_step() -> None:
    tensors: list[Tensor] = []

    def change(loss: Tensor) -> Tensor:
        tensors[:] = [loss.detach() + 1]
        return loss

    change_loss(change)


# name -> (how to plant it, options of the recipe, a part of the problem that must be reported)
# Unless an option says otherwise, a capture is requested, so that its failure is an error (stub_failed_captures.py).
FAULTS: dict[str, tuple[Callable[[], None], dict[str, Any], str]] = {
    "item() in the step": (read_loss_in_step, {}, "synchronization of a capturing stream"),
    "CPU tensor in the loss": (add_cpu_tensor_to_loss, {}, "Expected all tensors to be on the same device"),
    "upload in the loss": (upload_tensor_in_loss, {}, "Cannot copy between CPU and CUDA tensors"),
    "pageable copy in the step": (copy_pageable_memory_in_step, {}, "pageable copy from host to device in a capture"),
    "pageable copy": (copy_pageable_memory, {}, "pageable copy: copy from host to device (first batch)"),
    "Ranger as it was": (add_number_instead_of_tensor, {"optimizer": "ranger"}, "synchronization of a capturing"),
    "copy of metrics in the step": (copy_metrics_in_step, {}, "copy from device to host in a capture"),
    "stream that is not joined": (run_on_unjoined_stream, {}, "a stream was not joined"),
    "stream outside the capture": (run_on_other_stream, {}, "on a stream outside the current capture"),
    "allocation outside the capture": (allocate_on_other_stream, {}, "cudaMalloc during a capture"),
    "kernel loaded in the capture": (launch_new_kernel_in_capture, {}, "cuModuleLoadData during a capture"),
    "memory freed before a replay": (free_memory_of_graph, {}, "in memory that was freed"),
    "host read between steps": (read_sums_between_steps, {}, "synchronization: cudaStreamSynchronize (between steps)"),
    "launches between steps": (launch_between_steps, {}, "12 launches in 'learning rate', more than 6"),
    "TF32 in convolutions of fp32": (
        keep_settings_of_torch,
        {"precision": "fp32"},
        "cudnn.conv.fp32_precision is tf32",
    ),
    "state copied too early": (copy_state_without_waiting, SAVES, "that does not wait for the default stream"),
    "state copied to pageable memory": (copy_state_to_pageable_memory, SAVES, "pageable copy: copy from device"),
    "loss scale read by a save": (read_loss_scale, SAVES, "synchronization: cudaStreamSynchronize (checkpoint)"),
    "memory pool for each graph": (capture_in_separate_pools, {}, "3 memory pools of CUDA graphs"),
    "tensor of a captured step": (keep_tensor_of_captured_step, {}, "bytes of tensors that other graphs may overwrite"),
    "step without a CUDA graph": (lambda: None, {"cuda_graph": False}, "0 replays in 6 steps"),
    "capture that is replaced by a fallback": (read_loss_in_step, {"cuda_graph": None}, "0 replays in 6 steps"),
}
