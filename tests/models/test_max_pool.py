"""2x2 max pooling in C++ against that of torch: values, gradients, and when a network uses it."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar.models import cpp_library, max_pool
from fastcifar.models.max_pool import FUNCTIONS, MaxPool2x2, max_pool2x2, max_pool2x2_backward
from fastcifar.recipe import Recipe
from fastcifar.training.step import DTYPES
from tests.training.optimizer_helpers import make_trainer

SHAPES = [(1, 1, 2, 2), (2, 3, 4, 6), (3, 64, 10, 2), (2, 33, 8, 8)]


def random_images(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return images with few different values, so that many maxima occur twice in a window."""
    torch.manual_seed(0)
    return torch.randint(-2, 3, shape).to(dtype).requires_grad_()


@pytest.fixture(params=[True, False], ids=["C++", "no C++"])
def can_compile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether max_pool.cpp can be compiled; without a compiler, the operators use functions of PyTorch."""
    if not request.param:
        monkeypatch.setattr(max_pool, "can_load_cpp_library", lambda _: False)
        monkeypatch.setattr(max_pool, "call_cpp", None)
    return request.param


@pytest.mark.usefixtures("can_compile")
@pytest.mark.parametrize("dtype", FUNCTIONS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_torch(
    shape: tuple[int, ...], memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    images = random_images(shape, dtype)
    expected = F.max_pool2d(images, 2)
    grads = torch.randn(expected.shape).to(dtype)
    values, offsets = max_pool2x2(images.contiguous(memory_format=memory_format))
    assert torch.equal(values, expected)
    assert values.is_contiguous(memory_format=torch.channels_last)
    assert offsets.dtype == torch.int8
    (gradient,) = torch.autograd.grad(values, images, grads.contiguous(memory_format=memory_format))
    assert torch.equal(gradient, torch.autograd.grad(expected, images, grads)[0])


@pytest.mark.usefixtures("can_compile")
@pytest.mark.parametrize("dtype", FUNCTIONS)
@pytest.mark.parametrize(
    "window", [(math.nan, 1, 2, 3), (1, math.nan, 2, math.nan), (-math.inf,) * 4, (1, 2, math.inf, 0)]
)
def test_values_that_are_not_finite(window: tuple[float, ...], dtype: torch.dtype) -> None:
    images = torch.tensor(window, dtype=dtype).view(1, 1, 2, 2).repeat(1, 16, 1, 1).requires_grad_()
    expected, (values, _) = F.max_pool2d(images, 2), max_pool2x2(images)
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
    gradients = [torch.autograd.grad(output.sum(), images)[0] for output in (values, expected)]
    assert torch.equal(*gradients)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    images, threads, results = random_images((3, 16, 6, 6), torch.float32), torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        values, offsets = max_pool2x2(images)
        results.append((values, offsets, max_pool2x2_backward(values, offsets)))
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def test_a_library_that_cannot_be_compiled_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stderr="max_pool.cpp:1: fatal error: omp.h not found\nsecond line")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    for function in (cpp_library.load_cpp_library, cpp_library.can_load_cpp_library):
        function.cache_clear()
    problem = r"^max_pool.cpp cannot be compiled: max_pool.cpp:1: fatal error: omp.h not found; slower functions of PyT"
    with pytest.warns(UserWarning, match=problem) as warnings:
        results = [max_pool2x2(torch.ones(1, 8, 2, 2))[0] for _ in range(2)]
    assert len(warnings) == 1
    assert torch.equal(*results)
    monkeypatch.undo()
    cpp_library.can_load_cpp_library.cache_clear()
    assert cpp_library.can_load_cpp_library("max_pool")


def test_operators_follow_the_rules_of_torch() -> None:
    images = random_images((2, 5, 4, 6), torch.float32)
    torch.library.opcheck(max_pool2x2, (images,))
    values, offsets = max_pool2x2(images.detach())
    torch.library.opcheck(max_pool2x2_backward, (values, offsets))


@pytest.mark.parametrize(
    ("images", "is_supported"),
    [
        (torch.zeros(1, 2, 4, 4), True),
        (torch.zeros(1, 2, 4, 4, dtype=torch.bfloat16), True),
        (torch.zeros(1, 2, 5, 4), False),
        (torch.zeros(1, 2, 4, 5), False),
        (torch.zeros(2, 4, 4), False),
        (torch.zeros(1, 2, 4, 4, dtype=torch.float64), False),
        (torch.zeros(1, 2, 4, 4, device="meta"), False),
    ],
)
def test_supported_images(images: Tensor, is_supported: bool) -> None:
    assert max_pool.is_supported(images) == is_supported
    assert MaxPool2x2()(images).shape == nn.MaxPool2d(2)(images).shape


def test_exported_programs_use_the_operator_of_torch() -> None:
    program = torch.export.export(MaxPool2x2(), (torch.zeros(1, 8, 4, 4, requires_grad=True),))
    assert "fastcifar" not in str(program.graph)


@pytest.mark.medium
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_steps_are_equal_to_those_with_the_pooling_of_torch(
    precision: str, tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    losses: list[float] = []

    def call_cpp(library: str, function: str, *arguments: Any) -> None:
        calls.append(function.removesuffix(f"_{FUNCTIONS[DTYPES[precision]]}"))
        cpp_library.call_cpp(library, function, *arguments)

    monkeypatch.setattr(max_pool, "call_cpp", call_cpp)
    for forward in (MaxPool2x2.forward, nn.MaxPool2d.forward):
        monkeypatch.setattr(MaxPool2x2, "forward", forward)
        trainer = make_trainer(tiny(arch="speednet", lr=1e-3, compile=True, precision=precision))
        trainer.optimize()
        for batch in trainer.batches(0):
            trainer.train_step(batch)
        losses.append(trainer.meter.compute().loss)
        assert set(calls) == ({"max_pool", "max_pool_backward"} if len(losses) == 1 else set())
        calls.clear()
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
