"""Functions in C++ for operations on CPU tensors, compiled when they are first used (about a second)."""

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from fastcifar.device import find_cpp_compiler

COMPILER_FLAGS = ("-O3", "-march=native", "-fno-signed-zeros", "-std=c++17", "-fopenmp", "-shared", "-fPIC")


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


def call_cpp(library: str, function: str, *arguments: Tensor | int | ctypes.Structure) -> None:
    """Call a function of a library with `arguments`, where tensors are pointers, and with the number of threads."""
    getattr(load_cpp_library(library), function)(*map(_as_c, arguments), ctypes.c_int(torch.get_num_threads()))


def _as_c(value: Tensor | int | ctypes.Structure) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.Structure:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else value
