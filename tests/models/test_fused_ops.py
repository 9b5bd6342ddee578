"""Test the fused operators against float64, and their Triton kernels in Triton's interpreter and compiled for GPUs."""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar.device import allow_tf32
from fastcifar.errors import UsageError
from fastcifar.models import build_model, enable_fused_ops, fused_ops
from fastcifar.training.compilation import compile_function

BIT = 2.0**-7  # of bf16: twice the largest relative error of one rounding


def a_map(*shape: int, dtype: torch.dtype = torch.float32, offset: float = 0.0) -> Tensor:
    return (torch.randn(shape) + offset).to(dtype).contiguous(memory_format=torch.channels_last)


def distance(actual: Tensor | None, reference: Tensor | None) -> float:
    """Return the norm of the difference relative to the norm of the reference."""
    assert actual is not None
    assert reference is not None
    return ((actual.double() - reference).norm() / reference.double().norm()).item()


def layers(gated: bool) -> nn.ModuleDict:
    """Return a BatchNorm of 24 channels and, if `gated`, the layers of an SE whose hidden units are all positive."""
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(24)
    nn.init.uniform_(bn.weight, 0.5, 1.5)
    nn.init.normal_(bn.bias)
    if not gated:
        return nn.ModuleDict({"bn": bn})
    down, up = nn.Conv2d(24, 3, 1), nn.Conv2d(3, 24, 1)
    nn.init.constant_(down.bias, 3.0)  # type: ignore[arg-type]  # a convolution with a bias has one
    return nn.ModuleDict({"bn": bn, "down": down, "up": up})


def reference_norm_relu(of: nn.ModuleDict, x: Tensor, shortcut: Tensor | None) -> Tensor:
    """Compute BatchNorm, SE, addition and ReLU with PyTorch's layers."""
    y = of["bn"](x)
    if "down" in of:
        y = y * of["up"](F.relu(of["down"](y.mean((2, 3), keepdim=True)))).sigmoid()
    return F.relu(y if shortcut is None else y + shortcut)


def distances(
    gated: bool, added: bool, uses: int, dtype: torch.dtype, norm_relu=fused_ops.norm_relu
) -> dict[str, float]:
    """Return the relative distances of output, gradients and running statistics from float64."""
    fused = layers(gated)
    exact = copy.deepcopy(fused).double()
    shape = (6, 24, 5, 7)
    maps = [a_map(*shape, dtype=dtype, offset=1.0).requires_grad_() for _ in range(1 + added)]
    doubles = [value.detach().double().requires_grad_() for value in maps]
    gradients = [a_map(*shape, dtype=dtype) for _ in range(uses)]
    gate = (*fused["down"].parameters(), *fused["up"].parameters()) if gated else ()
    outputs = norm_relu(maps[0], fused["bn"], gate, maps[1] if added else None)
    y = reference_norm_relu(exact, doubles[0], doubles[1] if added else None)
    torch.autograd.backward(list(outputs[:uses]), gradients)
    y.backward(sum(gradient.double() for gradient in gradients))
    pairs = {"y": (outputs[0], y)}
    pairs |= {f"gradient of map {i}": (a.grad, b.grad) for i, (a, b) in enumerate(zip(maps, doubles, strict=True))}
    pairs |= {name: (weight.grad, exact.get_parameter(name).grad) for name, weight in fused.named_parameters()}
    pairs |= {name: (value, exact.get_buffer(name)) for name, value in fused.named_buffers()}
    return {name: distance(value, other) for name, (value, other) in pairs.items()}


@pytest.mark.parametrize("uses", [1, 2])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_norm_relu_equals_float64(gated: bool, added: bool, uses: int) -> None:
    exact = distances(gated, added, uses, torch.float32)
    assert max(exact.values()) < 1e-5, exact
    rounded = distances(gated, added, uses, torch.bfloat16)
    assert max(rounded.values()) < BIT, rounded


@pytest.mark.slow
def test_norm_relu_compiles_as_one_graph() -> None:
    fused_ops.allow_in_compiled_graphs()
    found = distances(True, True, 2, torch.float32, compile_function(fused_ops.norm_relu))
    assert max(found.values()) < 1e-5, found


def test_nan_propagates() -> None:
    x = a_map(2, 8, 4, 4)
    x[0, 3, 1, 1] = torch.nan
    y, _ = fused_ops.norm_relu(x, nn.BatchNorm2d(8))
    assert y[:, 3].isnan().all()


def networks(se: str, device: str = "cpu") -> tuple[nn.Module, nn.Module]:
    """Return the same small SE-ResNet without and with fused operators, with random BatchNorm parameters."""
    torch.manual_seed(0)
    plain = build_model("resnet", blocks=(2, 1), channels=(16, 24), se=se, se_reduction=4).to(device)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.5)
    fused = copy.deepcopy(plain)
    enable_fused_ops(fused)
    return tuple(network.to(memory_format=torch.channels_last) for network in (plain, fused))  # type: ignore[call-overload]


def training_pass(network: nn.Module, images: Tensor, precision: torch.dtype) -> dict[str, Tensor]:
    """Return the logits, all gradients in one vector and the running statistics after one forward and backward pass.

    One vector, because rounding may change the sign of a ReLU's input, which changes the gradient of a single bias.
    """
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
        logits = network(images.to(precision))
    F.cross_entropy(logits, torch.arange(len(images), device=images.device) % 10).backward()
    gradients = [weight.grad.flatten() for weight in network.parameters() if weight.grad is not None]
    return {"logits": logits, "gradients": torch.cat(gradients), **dict(network.named_buffers())}


def compare_networks(se: str, device: str, faster: Callable[[Callable], Callable]) -> None:
    """Compare the fused network, with its forward transformed by `faster`, with the other one in float64."""
    images = a_map(32, 3, 32, 32).to(device)
    exact = training_pass(networks(se, device)[0].double(), images, torch.float64)
    for precision, limit in ((torch.float32, 1e-3), (torch.bfloat16, 0.02)):
        fused = networks(se, device)[1]
        fused.forward = faster(fused.forward)
        apart = {name: distance(value, exact[name]) for name, value in training_pass(fused, images, precision).items()}
        assert max(apart.values()) < limit, (precision, apart)


@pytest.mark.medium
@pytest.mark.parametrize("se", ["none", "stem", "block"])
def test_a_fused_network_computes_the_same(se: str) -> None:
    compare_networks(se, "cpu", lambda forward: forward)
    plain, fused = networks(se)
    assert list(fused.state_dict()) == list(plain.state_dict())
    images = a_map(2, 3, 8, 8)
    assert torch.equal(fused.eval()(images), plain.eval()(images))


@pytest.mark.parametrize("options", [{"activation": "silu"}, {"dropout": 0.1}])
def test_unsupported_networks_are_refused(options: dict) -> None:
    for network in (build_model("resnet", **options), build_model("speednet")):
        with pytest.raises(UsageError, match="--fused-ops"):
            enable_fused_ops(network)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "faster",
    [lambda forward: forward, lambda forward: compile_function(lambda images: forward(images))],
    ids=["eager", "compiled"],
)
@pytest.mark.parametrize("se", ["none", "stem", "block"])
def test_a_fused_network_on_a_gpu(se: str, faster: Callable) -> None:
    allow_tf32(False)
    compare_networks(se, "cuda", faster)


def calls(dtype: torch.dtype, shape: tuple[int, int, int, int], shared: bool, chunk: int) -> dict[str, list[tuple]]:
    """Return valid arguments of every operator. `shared`: all images share the factors of the channels."""
    torch.manual_seed(0)
    x, y, gradient, second = (a_map(*shape, dtype=dtype, offset=0.5) for _ in range(4))
    scale, shift = (torch.randn(1 if shared else shape[0], shape[1]) for _ in range(2))
    slope, offset = (torch.randn(shape[:2]) for _ in range(2))
    return {
        "chunk_moments": [(x, chunk)],
        "scale_add_relu": [(x, scale, shift, None), (x, scale, shift, y)],
        "relu_backward_with_sums": [(gradient, None, x, y, chunk), (gradient, second, x, y, chunk)],
        "relu_backward_sums": [(gradient, x, scale, shift, chunk)],
        "norm_input_gradient": [(gradient, x, scale, None, slope, offset), (gradient, x, scale, shift, slope, offset)],
    }


@pytest.mark.parametrize("name", calls(torch.float32, (1, 1, 1, 1), True, 1))
def test_fake_results_have_the_real_shapes_and_dtypes(name: str) -> None:
    for arguments in calls(torch.bfloat16, (3, 24, 5, 7), False, 16)[name]:
        torch.library.opcheck(getattr(fused_ops, name), arguments, test_utils=("test_schema", "test_faketensor"))


def compare_kernels(device: str) -> dict[str, float]:
    """Return the largest difference of every kernel from its operator in PyTorch, relative to the largest value."""
    worst: dict[str, float] = {}
    cases = [((2, 24, 5, 7), 16, False), ((2, 70, 3, 5), 16, True)]
    cases += [((4, 64, 32, 32), 128, False)] if device == "cuda" else []  # large for the interpreter
    for dtype, (shape, chunk, shared) in itertools.product((torch.float32, torch.bfloat16), cases):
        for name, choices in calls(dtype, shape, shared, chunk).items():
            for arguments in choices:
                moved = [value.to(device) if isinstance(value, Tensor) else value for value in arguments]
                operator = getattr(fused_ops, name)  # dispatches to the kernel on CUDA
                run_kernel = operator if device == "cuda" else partial(fused_ops.run_triton_kernel, name)
                pairs = [run_kernel(*moved), operator(*arguments)]
                actual, expected = (pair if isinstance(pair, tuple) else (pair,) for pair in pairs)
                key = f"{name} {str(dtype).removeprefix('torch.')}"
                for a, b in zip(actual, expected, strict=True):
                    worst[key] = max(worst.get(key, 0.0), ((a.cpu() - b).abs().max() / b.abs().max()).item())
    return worst


def check_kernel_errors(worst: dict[str, float]) -> None:
    assert len(worst) == 10
    for name, error in worst.items():
        assert error < (BIT if "bfloat16" in name else 1e-5), worst


@pytest.mark.gpu
def test_kernels_on_a_gpu() -> None:
    check_kernel_errors(compare_kernels("cuda"))


@pytest.mark.slow
def test_kernels_equal_the_operators_in_pytorch() -> None:
    """Compare in float32 up to rounding and in bf16 up to one bit: the interpreter truncates where a GPU rounds."""
    pytest.importorskip("triton", reason="Triton is not installed")
    code = "import json; from tests.models.test_fused_ops import *; print(json.dumps(compare_kernels('cpu')))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    check_kernel_errors(json.loads(run.stdout.splitlines()[-1]))


FLOATS = ("means", "deviations", "scale", "shift", "slope", "offset", "sums", "products")  # the others are feature maps
OPTIONAL = {"scale_add_relu": "shortcut_ptr", "relu_backward_with_sums": "second_gradient_ptr"}
OPTIONAL |= {"norm_input_gradient": "shift_ptr"}


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_fit_the_registers_of_a_gpu(capability: int, tmp_path: Path) -> None:
    """Compile for A100 and H100/H200: no register is spilled to local memory, and loads are 16 bytes wide."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from fastcifar.models import triton_kernels

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton contains no cuobjdump")
    for name, left_out in [*((name, None) for name in fused_ops.ALLOCATORS), *OPTIONAL.items()]:
        sizes = {"P": 1024, "C": 64, "CHUNK": 128, "BLOCK": fused_ops.MAX_TILE_CHANNELS}
        made = compile_kernel(getattr(triton_kernels, name), sizes, left_out, capability)
        binary = tmp_path / "kernel.cubin"
        binary.write_bytes(made.asm["cubin"])
        command = [tool, "--dump-resource-usage", binary]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
        form = name + (f" without {left_out}" if left_out else "")
        print(f"sm_{capability} {form}: {used}, {made.metadata.shared} bytes shared")
        assert (used["STACK"], used["LOCAL"]) == ("0", "0"), used
        assert int(used["REG"]) <= 128  # two programs of 8 warps to a multiprocessor's 65,536 registers
        assert "ld.global.v4" in made.asm["ptx"]


def compile_kernel(kernel: Any, sizes: dict[str, int], left_out: str | None, capability: int) -> Any:
    """Compile `kernel` for aligned feature maps in bf16, without the optional pointer `left_out`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastcifar.models.triton_kernels import NUM_WARPS

    constants: dict[str, int | None] = {**sizes, **({left_out: None} if left_out else {})}
    signature = {}
    for name in kernel.arg_names:
        pointer = "*fp32" if name.removesuffix("_ptr") in FLOATS else "*bf16"
        signature[name] = "constexpr" if name in constants else pointer if name.endswith("_ptr") else "i32"
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind != "constexpr"}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    with warnings.catch_warnings(action="ignore"):  # of defaults that a later Triton will change
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": NUM_WARPS})
