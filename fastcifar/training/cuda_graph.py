"""Speed from outside: compile and CUDA graph as wrappers f -> f, each with its eager twin.

The one room that may name torch.cuda's graphs. A wrapper changes when work happens, never what is computed: warm-up
runs leave weights, buffers, optimizer and random state exactly as they were.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import platformdirs
import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
Replay = Callable[[], object]
MODES = {"auto": "default", "default": "default", "max-autotune-no-cudagraphs": "max-autotune-no-cudagraphs"}
WARM_UPS = 3
COMPILED_CODE = "TORCHINDUCTOR_CACHE_DIR"  # inductor's variable
_recorded: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h


def compiled(function: Callable[P, R], mode: str = "auto") -> Callable[P, R]:
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
    return torch.compile(own, fullgraph=True, dynamic=False, mode=MODES[mode])


def keep_compiled_code() -> Path | None:
    """Has torch.compile keep its code in the user cache, where a later start finds it: torch's own place is temporary.

    `TORCHINDUCTOR_CACHE_DIR` stands if it is set. Returns the folder; None, and torch's own place, if none can be made.
    """
    folder = Path(platformdirs.user_cache_dir("fastcifar")) / "compiled"
    folder = Path(os.environ.get(COMPILED_CODE) or folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    os.environ[COMPILED_CODE] = str(folder)
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


@contextmanager
def untouched(state: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """Whatever runs inside, `state` and the random generators are afterwards as before, in the same memory."""
    kept = [tensor.detach().clone() for tensor in state]
    host = torch.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(state, kept, strict=True):
                tensor.copy_(value)
        torch.set_rng_state(host)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)


def warmed(step: Callable[..., None], example: Sequence[Tensor], state: Sequence[Tensor]) -> Callable[..., None]:
    """`step`, after one run on `example` that compiled it and left `state` untouched."""
    with untouched(state, example[0].device):
        step(*example)
    return step


def graphed(
    step: Callable[..., None],
    example: Sequence[Tensor],
    state: Sequence[Tensor],
    record: Callable[[Replay], Replay] | None = None,
) -> Callable[..., None]:
    """`step` as one replay: inputs are copied into static ones, then everything it launched is launched at once.

    `example`: tensors of the shapes, dtypes and device that every later call must have. `state`: every tensor the
    step writes. Capture before any loader thread starts: their allocations would break it.
    Errors: `ValueError` that names the input whose shape, dtype or device differs.
    `record` is how work becomes a replay; the tests give one that runs it eagerly, the default is CUDA's.
    """
    record = record or record_on_cuda
    static = [tensor.clone() for tensor in example]
    with untouched(state, static[0].device):
        warm_up(lambda: step(*static), static[0].device)
    replay = record(lambda: step(*static))

    def run(*inputs: Tensor) -> None:
        for index, (mine, given) in enumerate(zip(static, inputs, strict=True)):
            if (mine.shape, mine.dtype, mine.device) != (given.shape, given.dtype, given.device):
                raise ValueError(
                    f"input {index} of the captured step is {_kind(mine)}, not {_kind(given)}: "
                    "another shape needs the plain step"
                )
            mine.copy_(given, non_blocking=True)
        replay()

    return run


def in_blocks(step: Callable[..., None], count: int) -> Callable[..., None]:
    """`count` steps as one function of the tensors of `count` batches, one batch after the other: one replay of
    `graphed` then launches them all. What changes from step to step, such as a learning rate, has to be an input."""

    def block(*tensors: Tensor) -> None:
        size = len(tensors) // count
        assert size * count == len(tensors), (len(tensors), count)
        for start in range(0, len(tensors), size):
            step(*tensors[start : start + size])

    return block


def captured_forward(
    forward: Callable[[Tensor], Tensor], example: Tensor, record: Callable[[Replay], Replay] | None = None
) -> Callable[[Tensor], Tensor]:
    """`forward`, images -> logits, as one replay for images of `example`'s shape. Call it, and this, under no_grad.

    The model must be in evaluation mode: what is recorded stays what it was. New weights in the same memory are seen.
    """
    logits = forward(example).clone()

    def step(images: Tensor) -> None:
        logits.copy_(forward(images))

    replay = graphed(step, [example], [], record)

    def replayed(images: Tensor) -> Tensor:
        replay(images)
        return logits.clone()  # the next replay writes into the same memory

    return replayed


def filled(forward: Callable[[Tensor], Tensor], batch_size: int) -> Callable[[Tensor], Tensor]:
    """`forward` of `batch_size` images for fewer too: a short batch is filled up with black and its logits are cut."""

    def whole(images: Tensor) -> Tensor:
        missing = batch_size - len(images)
        if not missing:
            return forward(images)
        black = images.new_zeros(missing, *images.shape[1:])
        return forward(torch.cat([images, black]).contiguous(memory_format=torch.channels_last))[: len(images)]

    return whole


def warm_up(work: Replay, device: torch.device) -> None:
    """Runs `work` until lazy initialisation, autotuning and compilation are behind it; on CUDA on a side stream."""
    if device.type != "cuda":
        for _ in range(WARM_UPS):
            work()
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)


def record_on_cuda(work: Replay) -> Replay:
    """`work` captured as a CUDA graph; other threads may go on allocating (`thread_local`).

    Nothing is collected meanwhile: what an old cycle holds of the device may not be freed by a capturing thread.
    """
    graph = torch.cuda.CUDAGraph()
    _recorded.add(graph)
    gc.collect()
    gc.disable()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work()
    finally:
        gc.enable()
    return graph.replay


def forget_recorded() -> None:
    """Gives up every CUDA graph of this process; none may be replayed afterwards.

    NCCL waits for the graphs that hold its collectives before it ends, and a traceback may keep them alive.
    """
    for graph in _recorded:
        graph.reset()


def by_batch_size(fast: Callable[..., None], plain: Callable[..., None], batch_size: int) -> Callable[..., None]:
    """`fast` for full batches, its plain twin for a short last one."""

    def step(images: Tensor, *others: Tensor) -> None:
        (fast if len(images) == batch_size else plain)(images, *others)

    return step


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
