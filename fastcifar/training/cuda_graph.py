"""Wrappers that capture a function in a CUDA graph. They change how kernels are launched, not what is computed.

All graphs of a process share one memory pool: those of the training step, for each image size and for a short last
batch, and that of the evaluation. The pool is as large as the largest graph needs, not as all graphs need together.
"""

import contextlib
import functools
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Replay = Callable[[], object]
RunCapture = Callable[[Callable[[], Replay]], Replay]

WARMUP_ITERATIONS = 3
_failed_captures: dict[Any, torch.cuda.CUDAGraph] = {}  # memory pool -> graph
_captured_graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()


def cuda_graphed(
    step: Callable[..., object],
    example_inputs: Sequence[Tensor],
    run_capture: RunCapture = lambda capture: capture(),
) -> Callable[..., None]:
    """Capture `step` in a CUDA graph and return a function that copies its inputs to static tensors and replays it.

    Before the capture, `step` runs a few times to complete lazy initialization, autotuning and compilation; the caller
    restores what these runs change. Call this before any loader thread starts, because an allocation in another thread
    can invalidate the capture. The returned function raises `ValueError` if the shape, dtype or device of an input
    differs from that of `example_inputs`. `run_capture` calls the function that it is given, which captures the graph.
    """
    static = [tensor.clone() for tensor in example_inputs]
    device = static[0].device
    stream = _warmup_stream(device) if device.type == "cuda" else None
    if stream:
        stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # without a stream, this does nothing
        for _ in range(WARMUP_ITERATIONS):
            step(*static)
    if stream:
        torch.cuda.current_stream(device).wait_stream(stream)
    replay = run_capture(lambda: capture_cuda_graph(lambda: step(*static)))

    def run(*inputs: Tensor) -> None:
        for index, (target, source) in enumerate(zip(static, inputs, strict=True)):
            if (source.shape, source.dtype, source.device) != (target.shape, target.dtype, target.device):
                expected, given = (f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (target, source))
                problem = f"input {index} of the captured step must be {expected}, got {given}"
                raise ValueError(f"{problem}; call the eager step for other shapes")
            target.copy_(source, non_blocking=True)
        replay()

    return run


@functools.cache
def _warmup_stream(device: torch.device) -> torch.cuda.Stream:
    """Return one stream for all warm-ups: cuBLAS keeps a workspace of up to 64 MiB for each stream that it ran on."""
    return torch.cuda.Stream(device)


def cuda_graphed_gradients(
    compute: Callable[..., object],
    parameters: Sequence[Tensor],
    example_inputs: Sequence[Tensor],
    run_capture: RunCapture = lambda capture: capture(),
) -> Callable[..., None]:
    """Capture `compute`, which sets the gradients of `parameters`, as `cuda_graphed` does.

    The returned function sets the gradients to tensors outside the memory pool, so that an optimizer can use them.
    """
    gradients: dict[Tensor, Tensor] = {}  # parameter -> copy of its gradient, allocated by the first warm-up iteration

    def compute_and_copy(*inputs: Tensor) -> None:
        compute(*inputs)
        computed = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
        for parameter, gradient in computed.items():
            if parameter not in gradients:
                gradients[parameter] = torch.empty_like(gradient)
        torch._foreach_copy_([gradients[parameter] for parameter in computed], list(computed.values()))

    replay = cuda_graphed(compute_and_copy, example_inputs, run_capture)

    def run(*inputs: Tensor) -> None:
        replay(*inputs)
        for parameter in parameters:
            parameter.grad = gradients.get(parameter)

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
    """Capture `work` as a CUDA graph and return its replay. If that fails, torch can be used as before.

    The graph uses the memory pool of the other graphs. Therefore, a tensor that `work` allocates is valid only until
    another graph is replayed, and graphs must not be replayed at the same time. A result that is needed for longer must
    be copied, in `work`, to a tensor that was allocated before the capture.

    Other threads may allocate during the capture (`capture_error_mode="thread_local"`). Garbage collection is disabled
    meanwhile: the capturing thread must not free device memory that an old reference cycle holds.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    pools = (other.pool() for other in _captured_graphs)
    pool = next((pool for pool in pools if pool not in _failed_captures), None) or torch.cuda.graph_pool_handle()
    first_error: BaseException | None = None
    gc.collect()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            try:
                work()
            except BaseException as error:
                first_error = error
                raise
    except BaseException as error:
        _clean_up_failed_capture(graph, pool, stream)
        raise (first_error or error) from None  # that of the end of an invalid capture only says that it is invalid
    finally:
        gc.enable()
    _captured_graphs.add(graph)
    return graph.replay


def _clean_up_failed_capture(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> None:
    """Do what torch leaves out after CUDA has invalidated a capture, because ending the capture raises an error.

    A step that fails is skipped: torch has done it already, or the GPU cannot be used any more.
    """
    # torch's allocator of pinned memory may keep a pointer to the graph, and then refuses another graph with this pool
    _failed_captures[pool] = graph
    device = stream.device_index

    def release_pool() -> None:
        torch._C._cuda_endAllocateToPool(device, pool)  # raises an error if torch has released the pool already
        torch._C._cuda_releasePool(device, pool)

    def replace_generator() -> None:
        # before torch 2.12, the generator would stay in the state of a capture, in which it draws nothing
        copy = torch.Generator(stream.device)
        copy.set_state(torch.cuda.default_generators[device].get_state())
        torch.cuda.default_generators[device].graphsafe_set_state(copy)

    for step in (lambda: torch.cuda.set_stream(stream), release_pool, graph.reset, replace_generator):
        with contextlib.suppress(RuntimeError):
            step()


def reset_cuda_graphs() -> None:
    """Reset every CUDA graph of this process; none may be replayed afterwards.

    NCCL waits at shutdown for the graphs that contain its collectives, and a traceback may keep them alive.
    """
    for graph in _captured_graphs:
        graph.reset()
    _captured_graphs.clear()
