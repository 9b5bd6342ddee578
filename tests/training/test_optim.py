"""Optimizers against plain references, schedules, clipping, the average of the weights."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from pytorch_optimizer import Lookahead as ReferenceLookahead
from torch import nn

from fastcifar.errors import UsageError
from fastcifar.recipe import Recipe
from fastcifar.training.optim import OPTIMIZERS, SCHEDULES, Ema, Optimizer, clipper, parameter_groups, schedule

OFF = torch.zeros(())
SCALER = torch.amp.GradScaler("cpu", enabled=False)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False))
    return model.to(memory_format=torch.channels_last)


def set_gradients(models: list[nn.Module], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for weights in zip(*(model.parameters() for model in models), strict=True):
        gradient = torch.randn(weights[0].shape, generator=generator)
        for weight in weights:
            weight.grad = torch.empty_like(weight).copy_(gradient)


def assert_equal_weights(ours: nn.Module, theirs: nn.Module, tolerance: float = 0.0) -> None:
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("opt", [{}, {"nesterov": True}, {"momentum": 0.0}, {"dampening": 0.1}])
def test_sgd_equals_torch(opt: dict) -> None:
    ours, theirs = network(), network()
    optimizer = Optimizer(ours, Recipe(optimizer="sgd", lr=0.1, weight_decay=1e-2, opt=opt))
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1, weight_decay=1e-2, **{"momentum": 0.9, **opt})
    if "dampening" in opt:  # torch's first step has no dampening; ours has, so that every step is the same work
        for weight in theirs.parameters():
            reference.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    for step in range(20):
        set_gradients([ours, theirs], step)
        optimizer.step(SCALER, OFF)
        reference.step()
    assert_equal_weights(ours, theirs, 1e-6)


@pytest.mark.parametrize(("k", "alpha"), [(5, 0.5), (3, 0.8)])
def test_lookahead_equals_pytorch_optimizer(k: int, alpha: float) -> None:
    ours, theirs = network(), network()
    optimizer = Optimizer(ours, Recipe(optimizer="lookahead:sgd", lr=0.1, opt={"k": k, "alpha": alpha}))
    inner = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    reference = ReferenceLookahead(inner, k=k, alpha=alpha, pullback_momentum="none")
    for step in range(50):
        set_gradients([ours, theirs], step)
        optimizer.step(SCALER, OFF)
        optimizer.between_steps(step + 1)
        reference.step()
    assert_equal_weights(ours, theirs, 1e-5)


def test_learning_rate_is_one_tensor_that_every_group_reads() -> None:
    model = network()
    optimizer = Optimizer(model, Recipe(optimizer="sgd", decay_on="weights"))
    assert len(optimizer.inner.param_groups) == 2
    before = copy.deepcopy(model.state_dict())
    optimizer.set_lr(0.0)
    set_gradients([model], 0)
    optimizer.step(SCALER, OFF)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(group["lr"] is optimizer.lr for group in optimizer.inner.param_groups)


@pytest.mark.parametrize("name", [*OPTIMIZERS, *(f"lookahead:{name}" for name in OPTIMIZERS)])
def test_state_goes_into_the_tensors_that_are_there_and_resumes_exactly(name: str) -> None:
    ours, resumed = network(), network()
    first, second = Optimizer(ours, Recipe(optimizer=name)), Optimizer(resumed, Recipe(optimizer=name))
    for step in range(7):
        set_gradients([ours], step)
        first.step(SCALER, OFF)
        first.between_steps(step + 1)
    places = [tensor.data_ptr() for tensor in second.tensors()]
    resumed.load_state_dict(ours.state_dict())
    second.load_state_dict(first.state_dict())
    assert [tensor.data_ptr() for tensor in second.tensors()] == places
    for step in range(7, 14):
        set_gradients([ours, resumed], step)
        for optimizer in (first, second):
            optimizer.step(SCALER, OFF)
            optimizer.between_steps(step + 1)
    assert_equal_weights(ours, resumed)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fault14_a_skipped_step_changes_nothing(name: str) -> None:
    model = network()
    optimizer = Optimizer(model, Recipe(optimizer=name))
    set_gradients([model], 0)
    optimizer.step(SCALER, OFF)
    kept = [value.clone() for value in (*model.state_dict().values(), *optimizer.tensors())]
    set_gradients([model], 1)
    next(model.parameters()).grad.fill_(math.nan)  # type: ignore[union-attr]
    optimizer.step(SCALER, torch.ones(()))
    for before, after in zip(kept, (*model.state_dict().values(), *optimizer.tensors()), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optimizer": "sgdd"}, "did you mean 'sgd'"),
        ({"optimizer": "lokahead:sgd"}, "lookahead:NAME"),
        ({"optimizer": "sgd", "opt": {"nesterow": True}}, "did you mean 'nesterov'"),
        ({"optimizer": "sgd", "opt": {"k": 3}}, "no argument 'k'"),
        ({"optimizer": "sgd", "opt": {"momentum": -1}}, "momentum"),
        ({"optimizer": "sgd", "opt": {"momentum": 0, "nesterov": True}}, "Nesterov"),
        ({"optimizer": "lookahead:sgd", "opt": {"k": 0}}, "k >= 1"),
    ],
)
def test_fault15_wrong_optimizers_and_arguments(values: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Optimizer(network(), Recipe.make(**values))


def test_groups_cover_every_parameter_once() -> None:
    model = network()
    decayed, plain = parameter_groups(model, 0.1, "weights")
    assert {weight.ndim for weight in decayed["params"]} == {4}
    assert {weight.ndim for weight in plain["params"]} == {1}
    assert plain["weight_decay"] == 0
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    assert len(parameter_groups(model, 0.1, "all")) == 1


def test_cosine_ends_at_the_floor_and_never_rises_again() -> None:
    lr_at = schedule(Recipe(lr=0.1, lr_min=0.01, epochs=21, schedule_epochs=20), 10)
    rates = [lr_at(step) for step in range(210)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[100] == pytest.approx(0.055)
    assert rates[200:] == [pytest.approx(0.01)] * 10
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates))


def test_a_schedule_longer_than_the_run_is_cut() -> None:
    assert schedule(Recipe(lr=0.1, epochs=30, schedule_epochs=200), 1)(29) == pytest.approx(0.095, abs=2e-4)


def test_warm_up_rises_linearly_to_the_peak() -> None:
    lr_at = schedule(Recipe(lr=0.4, epochs=10, warmup_epochs=2), 5)
    assert [lr_at(step) for step in range(10)] == pytest.approx([0.4 * (step + 1) / 11 for step in range(10)])
    assert lr_at(10) == pytest.approx(0.4)
    assert lr_at(11) < 0.4


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_stay_within_the_peak(name: str) -> None:
    lr_at = schedule(Recipe(lr=0.1, epochs=3, schedule=name), 7)
    assert all(0 <= lr_at(step) <= 0.1 for step in range(30))


def test_schedule_errors() -> None:
    with pytest.raises(UsageError, match="did you mean 'cosine'"):
        schedule(Recipe(schedule="cosin"), 1)
    with pytest.raises(UsageError, match="not shorter"):
        schedule(Recipe(epochs=2, warmup_epochs=2), 1)


def test_clip() -> None:
    model = network()
    weights = list(model.parameters())
    set_gradients([model], 0)
    kept = [weight.grad.clone() for weight in weights if weight.grad is not None]
    clipper("none", weights)()
    assert all(torch.equal(weight.grad, old) for weight, old in zip(weights, kept, strict=True))  # type: ignore[arg-type]
    clipper("value:0.1", weights)()
    assert all(torch.equal(weight.grad, old.clamp(-0.1, 0.1)) for weight, old in zip(weights, kept, strict=True))  # type: ignore[arg-type]
    clipper("norm:0.01", weights)()
    norm = torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)
    for wrong in ("0.1", "value", "value:-1", "value:x", "length:1", "norm:inf"):
        with pytest.raises(UsageError, match="--clip"):
            clipper(wrong, weights)


def test_average_follows_its_rule_and_stands_in_only_for_a_while() -> None:
    model = network()
    ema = Ema(model, decay=0.9)
    expected = {name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()}
    for update in range(1, 31):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.1 * update)
        ema.update()
        share = max(0.1, 9 / (10 + update))
        for name, value in expected.items():
            value += share * (model.state_dict()[name] - value)
    live = copy.deepcopy(model.state_dict())
    with ema.applied():
        for name, value in expected.items():
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-5)
    for name, value in live.items():
        assert torch.equal(model.state_dict()[name], value)
    assert torch.equal(ema.state_dict(model)["1.num_batches_tracked"], live["1.num_batches_tracked"])
