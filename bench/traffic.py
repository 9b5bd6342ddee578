"""Memory traffic of a training step for each kernel, counted without a GPU and without timing.

    python bench/traffic.py [--arch se68 se68_block] [--batch-size 128] [--kernels] [--record]

The loss is traced as `train` compiles it, inductor compiles its forward and backward graphs for an H200, and is stopped
once it has decided which operations are fused into a kernel. Each buffer that a kernel reads or writes counts once with
its size; the backward pass of a convolution reads the gradient twice, once for each of its two kernels. Caches are not
modeled.
"""

from __future__ import annotations

import argparse
import contextlib
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import results_folder
import torch
import torch._functorch.config as functorch
from torch import nn
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode, Scheduler
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._triton import has_triton

from fastcifar.device import collect_environment
from fastcifar.models import build_model, enable_fused_ops
from fastcifar.models.memory_traffic import feature_map_bytes_per_image
from fastcifar.training.step import build_forward, loss_and_correct

GPU = torch.device("cuda", 0)
H200 = types.SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=141 * 10**9,
    L2_cache_size=50 * 2**20,
    shared_memory_per_multiprocessor=233472,
    shared_memory_per_block_optin=232448,
    gcnArchName="",
)
BANDWIDTH = 4.8e12  # bytes/s, from the data sheet of the H200
# Functions that inductor calls about the GPU, and their results. The output of a channels_last convolution is
# channels_last.
MOCKED_FUNCTIONS: dict[str, Any] = {
    "torch.cuda.is_available": lambda: True,
    "torch.cuda.device_count": lambda: 1,
    "torch.cuda.current_device": lambda: 0,
    "torch.cuda.get_device_name": lambda *_: H200.name,
    "torch.cuda.get_device_capability": lambda *_: (H200.major, H200.minor),
    "torch.cuda.get_device_properties": lambda *_: H200,
    "torch.cuda._exchange_device": lambda *_: 0,
    "torch.cuda._maybe_exchange_device": lambda *_: 0,
    "torch.cuda.get_rng_state": lambda *_: torch.empty(0),
    "torch.cuda.set_rng_state": lambda *_: None,
    "torch.cuda.is_current_stream_capturing": lambda *_: False,
    "torch.cuda.synchronize": lambda *_: None,
    "torch._C._conv_determine_backend_memory_format": lambda *_: torch.channels_last,
}
MOCKED_INTERFACE = {"get_device_properties": H200, "current_device": 0, "device_count": 1}


class Scheduled(BaseException):
    """Raised to stop inductor before it generates code, and the program before it runs that."""


@contextlib.contextmanager
def simulated_gpu() -> Iterator[None]:
    """Return a context in which inductor compiles for an H200, without a GPU."""
    with contextlib.ExitStack() as stack:
        stack.callback(has_triton.cache_clear)  # its result is cached
        has_triton.cache_clear()
        for name, answer in MOCKED_FUNCTIONS.items():
            stack.enter_context(mock.patch(name, answer))
        for name, value in MOCKED_INTERFACE.items():
            answer = staticmethod(lambda *_, value=value: value)
            stack.enter_context(mock.patch.object(CudaInterface, name, answer))
        yield


def collect_kernels(
    graph: torch.fx.GraphModule, inputs: list[Any], kernels: list[dict[str, Any]], **options: Any
) -> Any:
    """Append the kernels of `graph` on the simulated GPU to `kernels`; an inner compiler of inductor."""
    for node in graph.graph.nodes:
        node.args = tuple(GPU if isinstance(value, torch.device) else value for value in node.args)
        node.kwargs = {key: GPU if key == "device" else value for key, value in node.kwargs.items()}
    graph.recompile()
    backward = bool(options.get("is_backward"))

    def stop(scheduler: Scheduler) -> None:
        kernels.extend(describe_kernel(node, backward) for node in scheduler.nodes)
        raise Scheduled

    mode = torch._guards.detect_fake_mode(inputs)
    with simulated_gpu(), mock.patch.object(Scheduler, "codegen", stop), contextlib.suppress(Scheduled):
        with mode:
            moved = [
                torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=GPU)
                if isinstance(value, torch.Tensor)
                else value
                for value in inputs
            ]
        FakeTensorProp(graph, mode=mode).propagate_dont_convert_inputs(*moved)
        compile_fx_inner(graph, moved, **options)
    return graph


def describe_kernel(node: BaseSchedulerNode, backward: bool) -> dict[str, Any]:
    """Return the operations of a kernel, its kind, and the number of bytes it reads and writes.

    The kind is "convolution", "op" (another operation that inductor does not generate), "reduction" or "pointwise".
    """
    origins = [fx for part in node.get_nodes() if part.node is not None for fx in part.node.origins]
    targets = {str(fx.target).removeprefix("aten.").split(".")[0] for fx in origins if fx.op == "call_function"}
    reads = node.get_read_write_buffer_accesses(include_reads=True, include_writes=False)
    writes = node.get_read_write_buffer_accesses(include_reads=False, include_writes=True)
    extern = isinstance(node, ExternKernelSchedulerNode)
    read = sum(reads.values())
    if extern and "convolution_backward" in targets and reads:
        read += reads[node.node.inputs[0].get_name()]
    kind = "reduction" if node.is_reduction() else "pointwise"
    if extern:
        kind = "convolution" if any("convolution" in name for name in targets) else "op"
    return {
        "pass": "backward" if backward else "forward",
        "kind": kind,
        "computes": ", ".join(sorted(targets)),
        "read": read,
        "written": sum(writes.values()),
    }


def list_kernels(model: nn.Module, batch_size: int) -> list[dict[str, Any]]:
    """Return the kernels of forward pass, loss and backward pass of `model` in bf16, as inductor fuses them."""
    collected: list[dict[str, Any]] = []
    device = torch.device("cpu")
    function = loss_and_correct(build_forward(model, (0.5,) * 3, (0.25,) * 3, "bf16", device), 0.0)
    images = torch.zeros(batch_size, 3, 32, 32, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(batch_size, dtype=torch.int64)

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compile_fx(graph, inputs, inner_compile=lambda *args, **options: collect_kernels(*args, collected, **options))
        raise Scheduled

    torch._C._ensureCUDADeviceGuardSet()
    torch._dynamo.reset()
    with functorch.patch(force_non_lazy_backward_lowering=True), contextlib.suppress(Scheduled):
        torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(images, labels)
    return [kernel for kernel in collected if kernel["read"] + kernel["written"]]


def measure(arch: str, batch_size: int, fused: bool) -> dict[str, Any]:
    """Return the kernels and bytes per image of `arch` by pass and kind, and those of the analytical model."""
    network = build_model(arch).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    model_bytes = feature_map_bytes_per_image(network, training=True)
    if fused:
        enable_fused_ops(network)
    kernels = list_kernels(network, batch_size)
    distinct: dict[tuple, dict[str, Any]] = {}
    groups: dict[str, dict[str, int]] = {}
    for kernel in kernels:
        kernel |= {key: round(kernel[key] / batch_size) for key in ("read", "written")}
        distinct.setdefault(tuple(kernel.values()), {"times": 0, **kernel})["times"] += 1
        group = groups.setdefault(f"{kernel['pass']} {kernel['kind']}", {"kernels": 0, "bytes_per_image": 0})
        group["kernels"] += 1
        group["bytes_per_image"] += kernel["read"] + kernel["written"]
    total = sum(group["bytes_per_image"] for group in groups.values())
    return {
        "arch": arch,
        "fused_ops": fused,
        "batch_size": batch_size,
        "kernels": len(kernels),
        "bytes_per_image": total,
        "model_bytes_per_image": model_bytes,
        "memory_seconds_per_step": total * batch_size / BANDWIDTH,
        "groups": groups,
        "rows": list(distinct.values()),
    }


def print_table(result: dict[str, Any], every_kernel: bool) -> None:
    """Print the result of `measure` as a table."""
    print(
        f"{result['arch']}, fused ops {'on' if result['fused_ops'] else 'off'}, batch size {result['batch_size']}, bf16"
    )
    for kernel in result["rows"] if every_kernel else ():
        size = f"{kernel['read']:>9,} read {kernel['written']:>9,} written"
        print(f"  {kernel['times']:>3} x {kernel['pass']:8} {kernel['kind']:11} {size}  {kernel['computes'][:60]}")
    for name, group in result["groups"].items():
        print(f"  {name:20} {group['kernels']:>4} kernels {group['bytes_per_image'] / 1e6:>6.2f} MB per image")
    seconds = result["memory_seconds_per_step"]
    print(f"  {'all':20} {result['kernels']:>4} kernels {result['bytes_per_image'] / 1e6:>6.2f} MB per image", end="")
    print(f", model {result['model_bytes_per_image'] / 1e6:.2f}; {seconds * 1e3:.2f} ms per step at 4.8 TB/s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Count the memory traffic of a training step on a GPU.")
    parser.add_argument("--arch", nargs="+", default=["se68", "se68_block"])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--kernels", action="store_true", help="print every distinct kernel with its count")
    parser.add_argument("--record", action="store_true", help="write a result to bench/results")
    arguments = parser.parse_args()
    trials = []
    for arch in arguments.arch:
        for fused in (False, True):
            trials.append(measure(arch, arguments.batch_size, fused))
            print_table(trials[-1], arguments.kernels)
    if arguments.record:
        summary = {"what": "traffic", "for": H200.name, "bandwidth": BANDWIDTH}
        summary["trials"] = [{key: value for key, value in trial.items() if key != "rows"} for trial in trials]
        print(results_folder.write("traffic", collect_environment("cpu"), summary, trials))
