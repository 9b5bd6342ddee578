"""Functions in C++ for operations on CPU tensors, compiled when they are first used (about a second)."""

import ctypes
import functools
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

from fastcifar.device import find_cpp_compiler
from fastcifar.errors import first_message_line

COMPILER_FLAGS = ("-O3", "-march=native", "-fno-signed-zeros", "-std=c++17", "-fopenmp", "-shared", "-fPIC")


def is_exporting() -> bool:
    """Return whether torch.export traces the caller; `torch.compiler.is_exporting` is wrong in torch 2.11."""
    return torch.compiler._is_exporting_flag


@functools.cache
def load_cpp_library(name: str) -> ctypes.CDLL:
    """Compile and load `name`.cpp of this folder. Raises `RuntimeError` or `OSError` if that fails."""
    source = Path(__file__).with_name(f"{name}.cpp")
    with tempfile.TemporaryDirectory(prefix=f"fastcifar-{name}-") as folder:
        library = Path(folder) / f"{name}.so"
        command = [find_cpp_compiler() or "g++", *COMPILER_FLAGS, str(source), "-o", str(library)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise RuntimeError(result.stderr.strip() or f"{command[0]} ended with exit code {result.returncode}")
        return ctypes.CDLL(str(library))


@functools.cache
def can_load_cpp_library(name: str) -> bool:
    """Return whether `load_cpp_library` succeeds; otherwise warn that functions of PyTorch are used instead."""
    try:
        load_cpp_library(name)
    except (RuntimeError, OSError) as error:
        problem = f"{name}.cpp cannot be compiled: {first_message_line(error, type(error).__name__)}"
        warnings.warn(f"{problem}; slower functions of PyTorch are used instead", stacklevel=2)
        return False
    return True


def empty_channels_last(like: Tensor, *shape: int) -> Tensor:
    """Return an uninitialized channels_last tensor with `shape` [n, C, H, W] and the type and device of `like`."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def call_cpp(library: str, function: str, *arguments: Tensor | int | ctypes.Structure) -> None:
    """Call a function of a library with `arguments`, where tensors are pointers, and with the number of threads."""
    getattr(load_cpp_library(library), function)(*map(_as_c, arguments), ctypes.c_int(torch.get_num_threads()))


def _as_c(value: Tensor | int | ctypes.Structure) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.Structure:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else value
