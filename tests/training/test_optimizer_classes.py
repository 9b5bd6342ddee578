"""Ranger and Muon against the libraries' plain forms, on the same gradients; what Newton-Schulz makes of a matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn

from fastcifar.recipe import Recipe
from fastcifar.training.optimizer_classes import as_matrix, centralize, orthogonalize, radam_rectification
from fastcifar.training.optimizers import OptimizerWrapper

OFF = torch.zeros(())
SCALER = torch.amp.GradScaler("cpu", enabled=False)


class Network(nn.Module):
    """Wide, square, tall and depthwise filters, some of equal shape, a linear layer, normalisation and biases."""

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


def on_the_same_gradients(*models: nn.Module, steps: int) -> Iterator[int]:
    """The number of each step, with gradients set: small and large, of a mean that is not 0."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for weights in zip(*(model.parameters() for model in models), strict=True):
            size = 10 ** (torch.rand((), generator=generator) * 4 - 3)
            gradient = (torch.randn(weights[0].shape, generator=generator) + 0.3) * size
            for weight in weights:
                weight.grad = torch.empty_like(weight).copy_(gradient)
        yield step


def assert_close(ours: nn.Module, theirs: nn.Module, tolerance: float) -> None:
    """Every weight within `tolerance` of its own norm."""
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (mine - other).norm() <= tolerance * other.norm(), name


@pytest.mark.parametrize("opt", [{}, {"k": 5, "alpha": 0.8, "use_gc": False}, {"betas": [0.9, 0.99], "eps": 1e-8}])
def test_ranger_equals_pytorch_optimizer(opt: dict) -> None:
    ours, theirs = Network(), Network()
    optimizer = OptimizerWrapper(ours, Recipe(optimizer="ranger", lr=0.1, weight_decay=5e-4, optimizer_arg=opt))
    reference = pytorch_optimizer.Ranger(theirs.parameters(), lr=0.1, weight_decay=5e-4, degenerated_to_sgd=True, **opt)
    for step in on_the_same_gradients(ours, theirs, steps=50):
        optimizer.set_lr(0.1 / (step + 1))
        reference.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimizer.step(SCALER, OFF)
        optimizer.after_step(step + 1)
        reference.step()
        assert_close(ours, theirs, 1e-5)


def test_ranger_counts_no_skipped_step() -> None:
    """Ten steps and, among them, skipped ones, the first too, are ten steps."""
    ours, theirs = Network(), Network()
    recipe = Recipe(optimizer="ranger", lr=0.1, optimizer_arg={"k": 100})
    with_skips, without = OptimizerWrapper(ours, recipe), OptimizerWrapper(theirs, recipe)
    for step in on_the_same_gradients(ours, theirs, steps=10):
        if step in (0, 7):
            kept = [weight.grad.clone() for weight in ours.parameters() if weight.grad is not None]
            ours.linear.weight.grad = torch.full_like(ours.linear.weight, math.nan)
            with_skips.step(SCALER, torch.ones(()))
            for weight, gradient in zip(ours.parameters(), kept, strict=True):
                weight.grad = gradient
        with_skips.step(SCALER, OFF)
        without.step(SCALER, OFF)
    for mine, other in zip(with_skips.state_tensors(), without.state_tensors(), strict=True):
        assert torch.equal(mine, other)
    assert_close(ours, theirs, 0.0)


@pytest.mark.parametrize("beta2", [0.9, 0.999, 0.9999])
def test_rectification_equals_the_papers_formula(beta2: float) -> None:
    for count in (1, 2, 5, 6, 7, 100, 70_000):
        factor, rectified = radam_rectification(torch.tensor(float(count)), 0.95, beta2, 5)
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * count * beta2**count / (1 - beta2**count)
        expected = 1 / (1 - 0.95**count)
        if length >= 5:
            size = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
            expected *= math.sqrt(size * (1 - beta2**count))
        assert rectified.item() == (length >= 5)
        assert factor.item() == pytest.approx(expected, rel=1e-6)


def test_centralised_gradients_have_no_mean() -> None:
    model = Network()
    next(on_the_same_gradients(model, steps=1))
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    expected = [
        gradient - gradient.mean(tuple(range(1, gradient.ndim)), keepdim=True)
        if gradient.ndim > 1
        else gradient.clone()
        for gradient in gradients
    ]
    centralize(gradients)
    for mine, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 144), (2, 32, 18), (2, 2, 8)])
def test_newton_schulz_comes_near_the_orthogonal_factor(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    gradients = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None, None]
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        made = orthogonalize(gradients, 5, dtype).double()
        u, _, vt = torch.linalg.svd(gradients.double(), full_matrices=False)
        along = u.mT @ made @ vt.mT  # diagonal, if it has the singular vectors of the gradient
        values = torch.diagonal(along, dim1=1, dim2=2)
        assert (along - torch.diag_embed(values)).abs().max() < near
        assert values.max() < 1.25
        assert values.median() > 0.68
    assert torch.equal(orthogonalize(torch.zeros(shape), 5), torch.zeros(shape, dtype=torch.bfloat16))


def newton_schulz(gradient: Tensor, steps: int) -> Tensor:
    """One matrix, in its own dtype, as the page that published it writes it."""
    x = gradient / gradient.norm()
    for _ in range(steps):
        x = 3.4445 * x + (-4.7750 * (x @ x.T) + 2.0315 * (x @ x.T) @ (x @ x.T)) @ x
    return x


@pytest.mark.parametrize("shape", [(8, 72), (32, 18), (5, 5)])
def test_newton_schulz_equals_one_matrix_at_a_time(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    gradients = torch.randn(3, *shape)
    made = orthogonalize(gradients, 5, torch.float32)
    for mine, gradient in zip(made, gradients, strict=True):
        torch.testing.assert_close(mine.double(), newton_schulz(gradient.double(), 5), rtol=1e-4, atol=1e-4)


MUON = {"momentum": 0.95, "nesterov": True, "ns_steps": 5, "rest_lr": 1.0, "rest_momentum": 0.9}
PUBLISHED = {"nesterov": False, "ns_steps": 3, "momentum": 0.6, "rest_lr": 0.2, "rest_momentum": 0.85}


@pytest.mark.parametrize("opt", [{}, PUBLISHED, {"linear": True}, {"weight_norm": True}], ids=str)
def test_muon_equals_a_plain_one(opt: dict) -> None:
    """50 steps beside one weight at a time, without batches, views or foreach; Newton-Schulz in bf16 in both."""
    ours, theirs = Network(), Network()
    optimizer = OptimizerWrapper(ours, Recipe(optimizer="muon", lr=0.02, weight_decay=1e-2, optimizer_arg=opt))
    values = {**MUON, "linear": False, "weight_norm": False, **opt}
    buffers = {weight: torch.zeros_like(weight) for weight in theirs.parameters()}
    for step in on_the_same_gradients(ours, theirs, steps=50):
        optimizer.set_lr(0.02 / (step + 1))
        optimizer.step(SCALER, OFF)
        for weight, buffer in buffers.items():
            muon_of_one_weight(weight, buffer, 0.02 / (step + 1), values)
        assert_close(ours, theirs, 5e-3)


@torch.no_grad()
def muon_of_one_weight(weight: nn.Parameter, buffer: Tensor, lr: float, values: dict) -> None:
    """A step of Muon, or for what it leaves out of SGD, with a weight decay of 0.01."""
    assert weight.grad is not None
    turned = weight.ndim == 4 or (weight.ndim == 2 and values["linear"])
    momentum = values["momentum"] if turned else values["rest_momentum"]
    lr = lr if turned else lr * values["rest_lr"]
    buffer.mul_(momentum).add_(weight.grad)
    update = weight.grad + momentum * buffer if values["nesterov"] else buffer
    shrunk = weight * (1 - lr * 1e-2)
    if turned:
        flat = update.flatten(1).bfloat16()
        rows, columns = flat.shape
        if rows > columns:
            update = newton_schulz(flat.T, values["ns_steps"]).T * (rows / columns) ** 0.5
        else:
            update = newton_schulz(flat, values["ns_steps"])
        if values["weight_norm"]:
            shrunk = weight / weight.norm() * rows**0.5
    weight.copy_(shrunk - lr * update.float().reshape(weight.shape))


def test_muon_equals_torchs_on_matrices() -> None:
    """torch's takes parameters of two dimensions only: the same filters as matrices, decay and all."""
    ours = Network()
    filters = [nn.Parameter(weight.detach().flatten(1).clone()) for weight in ours.parameters() if weight.ndim == 4]
    optimizer = OptimizerWrapper(ours, Recipe(optimizer="muon", lr=0.02, weight_decay=1e-2))
    reference = torch.optim.Muon(filters, lr=0.02, weight_decay=1e-2, momentum=0.95, nesterov=True, ns_steps=5)
    for _ in on_the_same_gradients(ours, steps=50):
        gradients = [weight.grad for weight in ours.parameters() if weight.ndim == 4]
        for weight, gradient in zip(filters, gradients, strict=True):
            assert gradient is not None
            weight.grad = gradient.flatten(1).clone()
        optimizer.step(SCALER, OFF)
        reference.step()
    mine = [weight.flatten(1) for weight in ours.parameters() if weight.ndim == 4]
    for weight, other in zip(mine, filters, strict=True):
        assert (weight - other).norm() <= 5e-3 * other.norm()


def test_a_matrix_is_a_view_in_the_order_of_memory() -> None:
    for weight in Network().parameters():
        if weight.ndim > 1:
            view = as_matrix(weight.detach())
            assert view.shape == (len(weight), weight[0].numel())
            assert view.data_ptr() == weight.data_ptr()
            assert view.is_contiguous()
            assert torch.equal(view.sort(1).values, weight.detach().flatten(1).sort(1).values)
