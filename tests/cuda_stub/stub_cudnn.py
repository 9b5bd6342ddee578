"""The operators of cuDNN for the stub CUDA runtime: one kernel for each result of an operator."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

# operator of aten -> the name of the kernel for each of its results; no kernel for ""
KERNELS = {
    "convolution": ["cudnn_convolution"],
    "convolution_backward": [f"cudnn_convolution_backward_{name}" for name in ("input", "weight", "bias")],
    "cudnn_batch_norm": ["cudnn_batch_norm", "", "", ""],
    "cudnn_batch_norm_backward": ["cudnn_batch_norm_backward", "", ""],
}


_library = torch.library.Library("aten", "IMPL")


def replace_cudnn() -> None:
    """Replace the operators of cuDNN in this process.

    The results have the shapes, types and memory formats that torch expects of cuDNN, which may launch more kernels.
    """
    for name, kernels in KERNELS.items():
        _library.impl(name, _build_replacement(getattr(torch.ops.aten, name).default, kernels), "CUDA")


class Layout(NamedTuple):
    """What determines a new tensor besides its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def empty(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="cuda")


def to_hashable(value: Any) -> Any:
    """Return the layout of a tensor, a tuple for a list, and other values unchanged."""
    if isinstance(value, Tensor):
        return Layout(tuple(value.shape), value.stride(), value.dtype)
    return tuple(value) if isinstance(value, list) else value


def _build_replacement(operator: Any, kernels: list[str]) -> Callable[..., Any]:
    launch_kernel = ctypes.CDLL(None).cuda_stub_launch

    @functools.cache
    def infer_layouts(*args: Any) -> tuple[Layout | None, ...]:
        with FakeTensorMode():
            results = operator(*(arg.empty() if isinstance(arg, Layout) else arg for arg in args))
        return tuple(map(to_hashable, results if isinstance(results, tuple) else (results,)))

    def run(*args: Any) -> Any:
        results = [layout and layout.empty() for layout in infer_layouts(*map(to_hashable, args))]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        for kernel, result in zip(kernels, results, strict=True):
            if kernel and result is not None:
                launch_kernel(kernel.encode(), stream)
        return tuple(results) if len(results) > 1 else results[0]

    return run
