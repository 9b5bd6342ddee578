"""CUDA graphs as wrappers of functions, each with an eager equivalent.

A wrapper changes when kernels are launched, never what is computed: warm-up runs leave the state unchanged.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastcifar.training.rng_state import preserve_state

Closure = Callable[[], object]
WARMUP_ITERATIONS = 3
_captured_graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()


def cuda_graphed(
    step: Callable[..., None],
    example_inputs: Sequence[Tensor],
    state: Sequence[Tensor],
    capture_fn: Callable[[Closure], Closure] | None = None,
) -> Callable[..., None]:
    """Capture `step` in a CUDA graph and return a function that copies its inputs to static tensors and replays it.

    `example_inputs`: tensors of the shapes, dtypes and device that every later call must have. `state`: every tensor
    that the step writes; the warm-up leaves it unchanged. `capture_fn` turns a function into its replay; the default
    is `capture_cuda_graph`, and tests pass one that runs the function eagerly.
    Call this before any loader thread starts, because an allocation in another thread can invalidate the capture.
    The returned function raises `ValueError` if the shape, dtype or device of an input differs.
    """
    capture_fn = capture_fn or capture_cuda_graph
    static = [tensor.clone() for tensor in example_inputs]
    with preserve_state(state, static[0].device):
        warm_up(lambda: step(*static), static[0].device)
    replay = capture_fn(lambda: step(*static))

    def run(*inputs: Tensor) -> None:
        for index, (target, source) in enumerate(zip(static, inputs, strict=True)):
            if (target.shape, target.dtype, target.device) != (source.shape, source.dtype, source.device):
                raise ValueError(
                    f"input {index} of the captured step must be {_describe_tensor(target)}, not "
                    f"{_describe_tensor(source)}; call the eager step for other shapes"
                )
            target.copy_(source, non_blocking=True)
        replay()

    return run


def unroll_steps(step: Callable[..., None], num_steps: int) -> Callable[..., None]:
    """Return a function that runs `num_steps` steps, so that one replay of `cuda_graphed` launches all of them.

    It takes the tensors of all batches, one batch after the other.
    """

    def run_steps(*tensors: Tensor) -> None:
        inputs_per_step = len(tensors) // num_steps
        for start in range(0, len(tensors), inputs_per_step):
            step(*tensors[start : start + inputs_per_step])

    return run_steps


def cuda_graphed_forward(
    forward: Callable[[Tensor], Tensor], example_images: Tensor, capture_fn: Callable[[Closure], Closure] | None = None
) -> Callable[[Tensor], Tensor]:
    """Capture `forward` (images -> logits) in a CUDA graph for images of the shape of `example_images`.

    Call this function and its result under `torch.no_grad()`, with the model in evaluation mode: the mode at capture
    time is kept. Weights that are updated in place take effect.
    """
    logits = forward(example_images).clone()

    def step(images: Tensor) -> None:
        logits.copy_(forward(images))

    replay = cuda_graphed(step, [example_images], [], capture_fn)

    def run(images: Tensor) -> Tensor:
        replay(images)
        return logits.clone()  # the next replay overwrites `logits`

    return run


def pad_batch(forward: Callable[[Tensor], Tensor], batch_size: int) -> Callable[[Tensor], Tensor]:
    """Return `forward` for batches of up to `batch_size` images: smaller ones are padded with black images."""

    def padded_forward(images: Tensor) -> Tensor:
        num_missing = batch_size - len(images)
        if not num_missing:
            return forward(images)
        black = images.new_zeros(num_missing, *images.shape[1:])
        return forward(torch.cat([images, black]).contiguous(memory_format=torch.channels_last))[: len(images)]

    return padded_forward


def warm_up(work: Closure, device: torch.device) -> None:
    """Run `work` a few times to complete lazy initialization, autotuning and compilation; on CUDA on a side stream."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    if stream:
        stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # without a stream, this does nothing
        for _ in range(WARMUP_ITERATIONS):
            work()
    if stream:
        torch.cuda.current_stream(device).wait_stream(stream)


def capture_cuda_graph(work: Closure) -> Closure:
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


def _describe_tensor(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
