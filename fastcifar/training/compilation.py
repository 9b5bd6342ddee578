"""torch.compile as a wrapper of functions, its persistent cache, and the allocator settings of the process."""

from __future__ import annotations

import ctypes
import logging
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import platformdirs
import torch

INDUCTOR_CACHE_DIR_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # from glibc's malloc.h

P = ParamSpec("P")
R = TypeVar("R")


def compile_function(function: Callable[P, R], mode: str = "auto") -> Callable[P, R]:
    """Compile `function` as one full graph with static shapes. `mode`: "auto" or a mode of torch.compile."""
    # torch would warn on every machine that has a CUDA compiler and no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # TorchDynamo caches compiled variants, up to a small limit, per code object: give each function its own copy.
    code, closure = function.__code__.replace(), function.__closure__
    function_copy = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    return torch.compile(function_copy, fullgraph=True, dynamic=False, mode="default" if mode == "auto" else mode)


def enable_compile_cache() -> Path | None:
    """Set and return torch.compile's cache folder: `TORCHINDUCTOR_CACHE_DIR` or a folder in the user's cache folder.

    If it cannot be created, return None: torch then uses a temporary folder.
    """
    user_folder = Path(platformdirs.user_cache_dir("fastcifar")) / "compiled"
    folder = Path(os.environ.get(INDUCTOR_CACHE_DIR_VARIABLE) or user_folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
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
