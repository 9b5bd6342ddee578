"""torch.compile as a wrapper of functions, its persistent cache, and the settings of torch and of the allocator."""

from __future__ import annotations

import ctypes
import logging
import os
import tempfile
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import platformdirs
import torch

from fastcifar.device import ExecutionPlan, allow_tf32

INDUCTOR_CACHE_DIR_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # from glibc's malloc.h

# Warnings of torch that do not help: the beginning of the message -> why it does not apply
IGNORED_WARNINGS = {
    "TensorFloat32 tensor cores": "--precision determines whether TF32 is used",
    "This instance was constructed with capturable=True": "--no-cuda-graph is a choice, and the results are the same",
}
# Loggers of torch that warn on every machine with a CUDA compiler and no GPU, and on every small GPU
SILENCED_LOGGERS = ("torch.utils.cpp_extension", "torch._inductor.utils")

P = ParamSpec("P")
R = TypeVar("R")


def configure_process(execution: ExecutionPlan) -> None:
    """Configure torch and the memory allocator in this process for a run with `execution`."""
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in SILENCED_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if execution.device == "cuda":
        allow_tf32(execution.precision == "tf32")
    else:
        keep_freed_memory()
    if execution.compile:
        enable_compile_cache()


def compile_function(function: Callable[P, R], mode: str = "auto") -> Callable[P, R]:
    """Compile `function` as one full graph with static shapes. `mode`: "auto" or a mode of torch.compile."""
    # TorchDynamo caches compiled variants, up to a small limit, per code object: give each function its own copy.
    code, closure = function.__code__.replace(), function.__closure__
    function_copy = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    return torch.compile(function_copy, fullgraph=True, dynamic=False, mode="default" if mode == "auto" else mode)


def enable_compile_cache() -> Path | None:
    """Set and return torch.compile's cache folder: `TORCHINDUCTOR_CACHE_DIR` or a folder in the user's cache folder.

    If it cannot be created or written to, unset the variable and return None: torch then uses a temporary folder.
    """
    user_folder = Path(platformdirs.user_cache_dir("fastcifar")) / "compiled"
    folder = Path(os.environ.get(INDUCTOR_CACHE_DIR_VARIABLE) or user_folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        os.environ.pop(INDUCTOR_CACHE_DIR_VARIABLE, None)
        return None
    os.environ[INDUCTOR_CACHE_DIR_VARIABLE] = str(folder)
    return folder


def keep_freed_memory() -> bool:
    """Configure glibc's malloc to keep freed memory for reuse in this process; return False without glibc.

    By default, each step maps and zeroes the same large allocations again: a fifth of the step time on a CPU (LOG.md).
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, 2**31 - 1), mallopt(M_TOP_PAD, 64 * 2**20)])
