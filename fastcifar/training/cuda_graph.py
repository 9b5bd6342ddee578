"""Wrappers that capture a function in a CUDA graph. They change how kernels are launched, not what is computed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARMUP_ITERATIONS = 3
_captured_graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()


def cuda_graphed(step: Callable[..., object], example_inputs: Sequence[Tensor]) -> Callable[..., None]:
    """Capture `step` in a CUDA graph and return a function that copies its inputs to static tensors and replays it.

    Before the capture, `step` runs a few times to complete lazy initialization, autotuning and compilation; the caller
    restores what these runs change. Call this before any loader thread starts, because an allocation in another thread
    can invalidate the capture. The returned function raises `ValueError` if the shape, dtype or device of an input
    differs from that of `example_inputs`.
    """
    static = [tensor.clone() for tensor in example_inputs]
    device = static[0].device
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    if stream:
        stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # without a stream, this does nothing
        for _ in range(WARMUP_ITERATIONS):
            step(*static)
    if stream:
        torch.cuda.current_stream(device).wait_stream(stream)
    replay = capture_cuda_graph(lambda: step(*static))

    def run(*inputs: Tensor) -> None:
        for index, (target, source) in enumerate(zip(static, inputs, strict=True)):
            if (source.shape, source.dtype, source.device) != (target.shape, target.dtype, target.device):
                expected, given = (f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (target, source))
                problem = f"input {index} of the captured step must be {expected}, got {given}"
                raise ValueError(f"{problem}; call the eager step for other shapes")
            target.copy_(source, non_blocking=True)
        replay()

    return run


def cuda_graphed_forward(forward: Callable[[Tensor], Tensor], example_images: Tensor) -> Callable[[Tensor], Tensor]:
    """Capture `forward` (images -> logits) in a CUDA graph for images of the shape of `example_images`.

    Call this function and its result under `torch.no_grad()`, with the model in evaluation mode: the graph keeps the
    mode that was set during the capture. It uses the current values of weights that are updated in place.
    """
    logits = forward(example_images).clone()
    replay = cuda_graphed(lambda images: logits.copy_(forward(images)), [example_images])

    def run(images: Tensor) -> Tensor:
        replay(images)
        return logits.clone()  # the next replay overwrites `logits`

    return run


def capture_cuda_graph(work: Callable[[], object]) -> Callable[[], object]:
    """Capture `work` as a CUDA graph and return its replay.

    Other threads may allocate during the capture (`capture_error_mode="thread_local"`). Garbage collection is disabled
    meanwhile: the capturing thread must not free device memory that an old reference cycle holds.
    """
    graph = torch.cuda.CUDAGraph()
    _captured_graphs.add(graph)
    gc.collect()
    gc.disable()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work()
    finally:
        gc.enable()
    return graph.replay


def reset_cuda_graphs() -> None:
    """Reset every CUDA graph of this process; none may be replayed afterwards.

    NCCL waits at shutdown for the graphs that contain its collectives, and a traceback may keep them alive.
    """
    for graph in _captured_graphs:
        graph.reset()
