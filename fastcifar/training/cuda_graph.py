"""Speed from outside: compile and CUDA graph as wrappers f -> f, each with its eager twin.

The one room that may name torch.cuda's graphs. A wrapper changes when work happens, never what is computed: warm-up
runs leave weights, buffers, optimizer and random state exactly as they were.
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
    """`step` as one replay: inputs are copied into static ones, then everything it launched is launched at once.

    `example`: tensors of the shapes, dtypes and device that every later call must have. `state`: every tensor the
    step writes. Capture before any loader thread starts: their allocations would break it.
    Errors: `ValueError` that names the input whose shape, dtype or device differs.
    `record` is how work becomes a replay; the tests give one that runs it eagerly, the default is CUDA's.
    """
    capture_fn = capture_fn or capture_cuda_graph
    static = [tensor.clone() for tensor in example_inputs]
    with preserve_state(state, static[0].device):
        warm_up(lambda: step(*static), static[0].device)
    replay = capture_fn(lambda: step(*static))

    def run(*inputs: Tensor) -> None:
        for index, (mine, given) in enumerate(zip(static, inputs, strict=True)):
            if (mine.shape, mine.dtype, mine.device) != (given.shape, given.dtype, given.device):
                raise ValueError(
                    f"input {index} of the captured step is {_describe_tensor(mine)}, not {_describe_tensor(given)}: "
                    "another shape needs the plain step"
                )
            mine.copy_(given, non_blocking=True)
        replay()

    return run


def unroll_steps(step: Callable[..., None], num_steps: int) -> Callable[..., None]:
    """`count` steps as one function of the tensors of `count` batches, one batch after the other: one replay of
    `graphed` then launches them all. What changes from step to step, such as a learning rate, has to be an input."""

    def block(*tensors: Tensor) -> None:
        size = len(tensors) // num_steps
        assert size * num_steps == len(tensors), (len(tensors), num_steps)
        for start in range(0, len(tensors), size):
            step(*tensors[start : start + size])

    return block


def cuda_graphed_forward(
    forward: Callable[[Tensor], Tensor], example_images: Tensor, capture_fn: Callable[[Closure], Closure] | None = None
) -> Callable[[Tensor], Tensor]:
    """`forward`, images -> logits, as one replay for images of `example`'s shape. Call it, and this, under no_grad.

    The model must be in evaluation mode: what is recorded stays what it was. New weights in the same memory are seen.
    """
    logits = forward(example_images).clone()

    def step(images: Tensor) -> None:
        logits.copy_(forward(images))

    replay = cuda_graphed(step, [example_images], [], capture_fn)

    def replayed(images: Tensor) -> Tensor:
        replay(images)
        return logits.clone()  # the next replay writes into the same memory

    return replayed


def pad_batch(forward: Callable[[Tensor], Tensor], batch_size: int) -> Callable[[Tensor], Tensor]:
    """`forward` of `batch_size` images for fewer too: a short batch is filled up with black and its logits are cut."""

    def whole(images: Tensor) -> Tensor:
        missing = batch_size - len(images)
        if not missing:
            return forward(images)
        black = images.new_zeros(missing, *images.shape[1:])
        return forward(torch.cat([images, black]).contiguous(memory_format=torch.channels_last))[: len(images)]

    return whole


def warm_up(work: Closure, device: torch.device) -> None:
    """Runs `work` until lazy initialisation, autotuning and compilation are behind it; on CUDA on a side stream."""
    if device.type != "cuda":
        for _ in range(WARMUP_ITERATIONS):
            work()
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARMUP_ITERATIONS):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)


def capture_cuda_graph(work: Closure) -> Closure:
    """`work` captured as a CUDA graph; other threads may go on allocating (`thread_local`).

    Nothing is collected meanwhile: what an old cycle holds of the device may not be freed by a capturing thread.
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
    """Gives up every CUDA graph of this process; none may be replayed afterwards.

    NCCL waits for the graphs that hold its collectives before it ends, and a traceback may keep them alive.
    """
    for graph in _captured_graphs:
        graph.reset()


def dispatch_by_batch_size(
    full_batch_step: Callable[..., None], short_batch_step: Callable[..., None], batch_size: int
) -> Callable[..., None]:
    """`fast` for full batches, its plain twin for a short last one."""

    def step(images: Tensor, *others: Tensor) -> None:
        (full_batch_step if len(images) == batch_size else short_batch_step)(images, *others)

    return step


def _describe_tensor(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
