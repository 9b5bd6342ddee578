"""torch.compile as a wrapper function -> function, its persistent cache, and the allocator settings of a process.

Compilation changes how fast a function runs, never what it computes: `precompile` leaves the state as it was.
"""

from __future__ import annotations

import ctypes
import logging
import os
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

import platformdirs
import torch
from torch import Tensor

from fastcifar.training.rng_state import preserve_state

COMPILE_MODES = {"auto": "default", "default": "default", "max-autotune-no-cudagraphs": "max-autotune-no-cudagraphs"}


INDUCTOR_CACHE_DIR_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # inductor's variable


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h


P = ParamSpec("P")
R = TypeVar("R")


def compile_function(function: Callable[P, R], mode: str = "auto") -> Callable[P, R]:
    """`function` through torch.compile: one graph, static shapes (another shape is another function's work)."""
    # It would warn of every machine that has a CUDA compiler and no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # The compiler keeps its variants, and their small limit, with the code object: each function gets one of its own.
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return torch.compile(own, fullgraph=True, dynamic=False, mode=COMPILE_MODES[mode])


def enable_compile_cache() -> Path | None:
    """Has torch.compile keep its code in the user cache, where a later start finds it: torch's own place is temporary.

    `TORCHINDUCTOR_CACHE_DIR` stands if it is set. Returns the folder; None, and torch's own place, if none can be made.
    """
    folder = Path(platformdirs.user_cache_dir("fastcifar")) / "compiled"
    folder = Path(os.environ.get(INDUCTOR_CACHE_DIR_VARIABLE) or folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    os.environ[INDUCTOR_CACHE_DIR_VARIABLE] = str(folder)
    return folder


def keep_freed_memory() -> bool:
    """Has glibc keep what is freed, for the whole process: each step frees and asks for the same tensors again.

    By default every large one is mapped and cleared anew, a fifth of a small network's step on a CPU (LOG.md).
    Returns whether it could be set: not without glibc.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, 2**31 - 1), mallopt(M_TOP_PAD, 64 * 2**20)])


def precompile(
    step: Callable[..., None], example_inputs: Sequence[Tensor], state: Sequence[Tensor]
) -> Callable[..., None]:
    """`step`, after one run on `example` that compiled it and left `state` untouched."""
    with preserve_state(state, example_inputs[0].device):
        step(*example_inputs)
    return step
