"""Ranger and Muon against reference implementations with the same gradients; Newton-Schulz iteration."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn

from fastcifar.recipe import Recipe
from fastcifar.training.optimizer_classes import orthogonalize, radam_rectification
from tests.training.optimizer_helpers import NO_SKIP, SCALER, build_optimizer


class Network(nn.Module):
    """Wide, square, tall and depthwise filters, some of equal shape, a linear layer, normalization and biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.ModuleList(nn.Conv2d(8, 8, 3) for _ in range(2))
        self.tall = nn.Conv2d(2, 32, 3)
        self.squeeze = nn.Conv2d(8, 2, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 4)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it


def set_same_gradients(*models: nn.Module, steps: int) -> Iterator[int]:
    """Set the same gradients, of various scales and nonzero mean, in all models and yield the number of each step."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for weights in zip(*(model.parameters() for model in models), strict=True):
            scale = 10 ** (torch.rand((), generator=generator) * 4 - 3)
            gradient = (torch.randn(weights[0].shape, generator=generator) + 0.3) * scale
            for weight in weights:
                weight.grad = torch.empty_like(weight).copy_(gradient)
        yield step


def assert_close(model: nn.Module, reference: nn.Module, tolerance: float) -> None:
    """Assert that the difference of every weight is at most `tolerance` times its norm."""
    for (name, weight), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (weight - expected).norm() <= tolerance * expected.norm(), name


@pytest.mark.parametrize("opt", [{}, {"k": 5, "alpha": 0.8, "use_gc": False}, {"betas": [0.9, 0.99], "eps": 1e-8}])
def test_ranger_equals_pytorch_optimizer(opt: dict) -> None:
    model, reference_model = Network(), Network()
    optimizer = build_optimizer(model, Recipe(optimizer="ranger", lr=0.1, weight_decay=5e-4, optimizer_arg=opt))
    reference = pytorch_optimizer.Ranger(
        reference_model.parameters(), lr=0.1, weight_decay=5e-4, degenerated_to_sgd=True, **opt
    )
    for step in set_same_gradients(model, reference_model, steps=50):
        optimizer.set_lr(0.1 / (step + 1))
        reference.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimizer.step(SCALER, NO_SKIP)
        optimizer.after_step(step + 1)
        reference.step()
        assert_close(model, reference_model, 1e-5)


@pytest.mark.parametrize("beta2", [0.9, 0.999, 0.9999])
def test_rectification_equals_the_formula_of_the_paper(beta2: float) -> None:
    for count in (1, 2, 5, 6, 7, 100, 70_000):
        factor, rectified = radam_rectification(torch.tensor(float(count)), 0.95, beta2, 5)
        max_length = 2 / (1 - beta2) - 1
        length = max_length - 2 * count * beta2**count / (1 - beta2**count)
        expected = 1 / (1 - 0.95**count)
        if length >= 5:
            variance = (length - 4) * (length - 2) * max_length / ((max_length - 4) * (max_length - 2) * length)
            expected *= math.sqrt(variance * (1 - beta2**count))
        assert rectified.item() == (length >= 5)
        assert factor.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 144), (2, 32, 18), (2, 2, 8)])
def test_newton_schulz_approximates_the_orthogonal_factor(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    gradients = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None, None]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        result = orthogonalize(gradients, 5, dtype).double()
        u, _, vt = torch.linalg.svd(gradients.double(), full_matrices=False)
        projected = u.mT @ result @ vt.mT  # diagonal if the singular vectors are those of the gradient
        values = torch.diagonal(projected, dim1=1, dim2=2)
        assert (projected - torch.diag_embed(values)).abs().max() < tolerance
        assert values.max() < 1.25
        assert values.median() > 0.68
    zeros = torch.zeros(shape)
    assert torch.equal(orthogonalize(zeros, 5, torch.bfloat16), zeros.bfloat16())


def newton_schulz(gradient: Tensor, steps: int) -> Tensor:
    """Orthogonalize one matrix in its own dtype, as in the original publication."""
    x = gradient / gradient.norm()
    for _ in range(steps):
        x = 3.4445 * x + (-4.7750 * (x @ x.T) + 2.0315 * (x @ x.T) @ (x @ x.T)) @ x
    return x


MUON_DEFAULTS = {"momentum": 0.95, "nesterov": True, "ns_steps": 5, "rest_lr": 1.0, "rest_momentum": 0.9}
AIRBENCH94_MUON = {"nesterov": False, "ns_steps": 3, "momentum": 0.6, "rest_lr": 0.2, "rest_momentum": 0.85}


@pytest.mark.medium
@pytest.mark.parametrize("opt", [{}, AIRBENCH94_MUON, {"linear": True}, {"weight_norm": True}], ids=str)
def test_muon_equals_a_reference_implementation(opt: dict) -> None:
    """The reference updates one weight at a time, without batches, views or foreach; both use bf16 Newton-Schulz."""
    model, reference_model = Network(), Network()
    optimizer = build_optimizer(model, Recipe(optimizer="muon", lr=0.02, weight_decay=1e-2, optimizer_arg=opt))
    arguments = {**MUON_DEFAULTS, "linear": False, "weight_norm": False, **opt}
    buffers = {weight: torch.zeros_like(weight) for weight in reference_model.parameters()}
    for step in set_same_gradients(model, reference_model, steps=50):
        optimizer.set_lr(0.02 / (step + 1))
        optimizer.step(SCALER, NO_SKIP)
        for weight, buffer in buffers.items():
            update_one_weight(weight, buffer, 0.02 / (step + 1), arguments)
        assert_close(model, reference_model, 5e-3)


@torch.no_grad()
def update_one_weight(weight: nn.Parameter, buffer: Tensor, lr: float, arguments: dict) -> None:
    """Make one step of Muon, or of SGD for weights that are not filters, with a weight decay of 0.01."""
    assert weight.grad is not None
    is_filter = weight.ndim == 4 or (weight.ndim == 2 and arguments["linear"])
    momentum = arguments["momentum"] if is_filter else arguments["rest_momentum"]
    lr = lr if is_filter else lr * arguments["rest_lr"]
    buffer.mul_(momentum).add_(weight.grad)
    update = weight.grad + momentum * buffer if arguments["nesterov"] else buffer
    decayed = weight * (1 - lr * 1e-2)
    if is_filter:
        matrix = update.flatten(1).bfloat16()
        rows, columns = matrix.shape
        if rows > columns:
            update = newton_schulz(matrix.T, arguments["ns_steps"]).T * (rows / columns) ** 0.5
        else:
            update = newton_schulz(matrix, arguments["ns_steps"])
        if arguments["weight_norm"]:
            decayed = weight / weight.norm() * rows**0.5
    weight.copy_(decayed - lr * update.float().reshape(weight.shape))
