"""Optimizers against reference implementations; resuming, skipped steps, invalid arguments; gradient clipping."""

from __future__ import annotations

import copy
import inspect
import math
import sys
from typing import Any

import pytest
import pytorch_optimizer
import torch
from pytorch_optimizer import Lookahead as ReferenceLookahead
from torch import nn
from torch.utils._pytree import tree_flatten

from fastcifar.errors import UsageError
from fastcifar.recipe import Recipe, parse_clip_grad
from fastcifar.training.lr_schedule import SCHEDULES
from fastcifar.training.optimizers import (
    OPTIMIZERS,
    SELF_SCHEDULED_OPTIMIZERS,
    OptimizerWrapper,
    build_grad_clipper,
)
from tests.training.optimizer_helpers import NO_SKIP, SCALER, build_optimizer, network, set_gradients, trained

LIBRARY_OPTIMIZERS = ("lion", "adabelief", "lamb")  # from pytorch_optimizer
LOOKAHEAD = [f"lookahead:{name}" for name in (*OPTIMIZERS, *LIBRARY_OPTIMIZERS) if name != "ranger"]  # includes it
ALL_OPTIMIZERS = [*OPTIMIZERS, *LIBRARY_OPTIMIZERS, *LOOKAHEAD]


def advance(pairs: list[tuple[nn.Module, OptimizerWrapper]], step: int) -> None:
    """Make step number `step` (from 0) of every network with the same gradients."""
    set_gradients([model for model, _ in pairs], step)
    for _, optimizer in pairs:
        optimizer.step(SCALER, NO_SKIP)
        optimizer.after_step(step + 1)


def assert_same(first: Any, second: Any) -> None:
    """Assert that nested containers of tensors and values are bit-identical."""
    (leaves, structure), (other_leaves, other_structure) = tree_flatten(first), tree_flatten(second)
    assert structure == other_structure
    for leaf, other in zip(leaves, other_leaves, strict=True):
        assert torch.equal(leaf, other) if isinstance(leaf, torch.Tensor) else leaf == other


def assert_equal_weights(model: nn.Module, reference: nn.Module, tolerance: float = 0.0) -> None:
    for weight, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "opt", "build", "arguments"),
    [
        ("sgd", {}, torch.optim.SGD, {"momentum": 0.9}),
        ("sgd", {"nesterov": True}, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        ("sgd", {"momentum": 0.0}, torch.optim.SGD, {}),
        ("sgd", {"dampening": 0.1}, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1}),
        ("adam", {}, torch.optim.Adam, {}),
        ("adam", {"betas": [0.8, 0.9], "amsgrad": True}, torch.optim.Adam, {"betas": (0.8, 0.9), "amsgrad": True}),
        ("adamw", {"eps": 1e-6}, torch.optim.AdamW, {"eps": 1e-6}),
        ("rmsprop", {}, torch.optim.RMSprop, {}),
        ("rmsprop", {"momentum": 0.9, "centered": True}, torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
        ("Lion", {}, pytorch_optimizer.Lion, {}),
        ("AdaBelief", {}, pytorch_optimizer.AdaBelief, {}),
        ("lamb", {}, pytorch_optimizer.Lamb, {}),
    ],
)
def test_optimizers_equal_reference_implementations(name: str, opt: dict, build: Any, arguments: dict) -> None:
    model, reference_model = network(), network()
    optimizer = build_optimizer(model, Recipe(optimizer=name, weight_decay=1e-2, optimizer_arg=opt))
    reference = build(reference_model.parameters(), lr=0.01, weight_decay=1e-2, **arguments)
    if "dampening" in opt:  # unlike torch, fastcifar also applies dampening to the first step
        for weight in reference_model.parameters():
            reference.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    for step in range(20):
        optimizer.set_lr(0.01 / (step + 1))
        reference.param_groups[0]["lr"] = 0.01 / (step + 1)
        set_gradients([model, reference_model], step)
        optimizer.step(SCALER, NO_SKIP)
        reference.step()
    assert_equal_weights(model, reference_model, 1e-5 if optimizer.spec.fused else 1e-6)


@pytest.mark.parametrize(("k", "alpha"), [(5, 0.5), (3, 0.8)])
def test_lookahead_equals_pytorch_optimizer(k: int, alpha: float) -> None:
    model, reference_model = network(), network()
    optimizer = build_optimizer(
        model, Recipe(optimizer="lookahead:sgd", lr=0.1, optimizer_arg={"k": k, "alpha": alpha})
    )
    inner = torch.optim.SGD(reference_model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    reference = ReferenceLookahead(inner, k=k, alpha=alpha, pullback_momentum="none")
    for step in range(50):
        set_gradients([model, reference_model], step)
        optimizer.step(SCALER, NO_SKIP)
        optimizer.after_step(step + 1)
        reference.step()
    assert_equal_weights(model, reference_model, 1e-5)


@pytest.mark.parametrize("name", ["lookahead:sgd", "ranger"])
def test_skipped_step_does_not_change_the_slow_weights(name: str) -> None:
    """k = 5: step 10 is skipped and changes neither weights nor slow weights; step 15 changes both."""
    model = network()
    optimizer = build_optimizer(model, Recipe(optimizer=name, optimizer_arg={"k": 5}))
    for step in range(9):
        advance([(model, optimizer)], step)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    set_gradients([model], 9)
    next(model.parameters()).grad.fill_(math.inf)  # type: ignore[union-attr]
    optimizer.step(SCALER, torch.ones(()))
    optimizer.after_step(10, torch.ones(()))
    assert_same(before, (model.state_dict(), optimizer.state_dict()))
    for step in range(10, 15):
        advance([(model, optimizer)], step)
    assert all(torch.equal(slow, fast) for slow, fast in zip(optimizer.slow_weights, optimizer.parameters, strict=True))


@pytest.mark.parametrize("name", [name for name in ALL_OPTIMIZERS if name.rpartition(":")[2] in OPTIMIZERS])
def test_load_state_dict_copies_into_existing_tensors(name: str) -> None:
    model, resumed_model = network(), network()
    optimizer, resumed_optimizer = (build_optimizer(model, Recipe(optimizer=name)) for model in (model, resumed_model))
    addresses = [tensor.data_ptr() for tensor in resumed_optimizer.state_tensors()]
    optimizer.set_lr(0.03)
    for step in range(7):
        advance([(model, optimizer)], step)
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    assert all(group["lr"] is resumed_optimizer.lr for group in resumed_optimizer.inner.param_groups)
    assert [tensor.data_ptr() for tensor in resumed_optimizer.state_tensors()] == addresses
    for tensor, resumed_tensor in zip(optimizer.state_tensors(), resumed_optimizer.state_tensors(), strict=True):
        assert torch.equal(tensor, resumed_tensor)


@pytest.mark.parametrize("name", [*OPTIMIZERS, "lion"])
def test_building_an_optimizer_creates_its_state_and_preserves_weights_and_random_state(name: str) -> None:
    model = network()
    weights, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    optimizer = build_optimizer(model, Recipe(optimizer=name))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    if name == "lion":  # its steps create the state
        assert not optimizer.inner.state
        return
    addresses = [tensor.data_ptr() for tensor in optimizer.state_tensors()]
    assert len(addresses) > len(optimizer.parameters)
    nonzero_ids = {id(tensor) for tensor in (optimizer.lr, *optimizer.slow_weights)}
    assert not any(tensor.any() for tensor in optimizer.state_tensors() if id(tensor) not in nonzero_ids)
    advance([(model, optimizer)], 0)
    assert [tensor.data_ptr() for tensor in optimizer.state_tensors()] == addresses


@pytest.mark.parametrize(
    "values",
    [
        *({"optimizer": name, "optimizer_arg": {"k": 3} if ":" in name else {}} for name in ALL_OPTIMIZERS),
        *({"optimizer": "sgd", "schedule": name} for name in SCHEDULES),
        {"optimizer": "lookahead:rmsprop", "schedule": "plateau:1", "bias_decay": False},
        {
            "optimizer": "ranger",
            "schedule": "plateau:1",
            "bias_decay": False,
            "optimizer_arg": {"k": 4, "betas": [0.9, 0.99]},
        },
        {"optimizer": "muon", "optimizer_arg": {"weight_norm": True, "nesterov": False}},
        *(
            {"optimizer": name, "bias_lr_mult": 3.0, "bias_decay": False}
            for name in ("lookahead:sgd", "muon", "ranger", "lookahead:lion")
        ),
    ],
    ids=lambda values: "-".join(str(value) for value in values.values()),
)
def test_resumed_training_equals_uninterrupted_training(values: dict) -> None:
    uninterrupted, _ = trained(values, range(20))
    interrupted, checkpoint = trained(values, range(10))
    resumed, _ = trained(values, range(10, 20), resume=checkpoint)
    for key, value in uninterrupted.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert not any(
        torch.equal(weight, interrupted_weight)
        for weight, interrupted_weight in zip(uninterrupted.parameters(), interrupted.parameters(), strict=True)
    )


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("name", "arguments"), [*((name, {}) for name in ALL_OPTIMIZERS), ("muon", {"weight_norm": True})]
)
def test_fault14_skipped_step_changes_nothing(name: str, arguments: dict[str, Any], first: bool) -> None:
    model = network()
    optimizer = build_optimizer(model, Recipe(optimizer=name, lr=0.01, optimizer_arg=arguments))
    if not first:
        advance([(model, optimizer)], 0)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    set_gradients([model], 1)
    next(model.parameters()).grad.fill_(math.nan)  # type: ignore[union-attr]
    optimizer.step(SCALER, torch.ones(()))
    assert_same(before, (model.state_dict(), optimizer.state_dict()))


@pytest.mark.parametrize("name", [*OPTIMIZERS, "lion"])
def test_fault14_scaler_skips_only_steps_with_overflow(name: str) -> None:
    model = network()
    optimizer = build_optimizer(model, Recipe(optimizer=name, lr=0.01))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (math.inf, 1.0):
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        set_gradients([model], 1)
        next(model.parameters()).grad.mul_(factor)  # type: ignore[union-attr]
        scaler.scale(torch.zeros(()))
        scaler.unscale_(optimizer.inner)
        optimizer.step(scaler, NO_SKIP)
        scaler.update()
        if factor == math.inf:
            assert_same(before, (model.state_dict(), optimizer.state_dict()))
    assert not any(torch.equal(value, before[0][key]) for key, value in model.named_parameters())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "sgdd"}, "did you mean 'sgd'"),
        ({"optimizer": "rangr"}, "did you mean 'ranger'"),
        ({"optimizer": "lookahead:rmspropp"}, "did you mean 'rmsprop'"),
        ({"optimizer": "lokahead:sgd"}, "lookahead:NAME"),
        ({"optimizer": "sgd", "optimizer_arg": {"nesterow": True}}, "did you mean 'nesterov'"),
        ({"optimizer": "adam", "optimizer_arg": {"beta": 0.9}}, "did you mean 'betas'"),
        ({"optimizer": "adam", "optimizer_arg": {"fused": False}}, "no argument 'fused'"),
        ({"optimizer": "ranger", "optimizer_arg": {"n_sma_treshold": 5}}, "did you mean 'n_sma_threshold'"),
        ({"optimizer": "ranger", "optimizer_arg": {"kwargs": 5}}, "no argument 'kwargs'"),
        ({"optimizer": "ranger", "optimizer_arg": {"betas": [0.9, 1.0]}}, "betas must be in"),
        ({"optimizer": "adam", "optimizer_arg": {"betas": [0.9]}}, "adam cannot train this network"),
        ({"optimizer": "ranger", "optimizer_arg": {"k": 0}}, "integer k >= 1"),
        ({"optimizer": "lookahead:ranger"}, "ranger already includes Lookahead"),
        ({"optimizer": "muon", "optimizer_arg": {"rest": 3}}, "did you mean 'rest_lr'"),
        ({"optimizer": "muon", "optimizer_arg": {"ns_steps": 2.5}}, "ns_steps must be an integer"),
        ({"optimizer": "muon", "optimizer_arg": {"momentum": 1}}, "momentum and rest_momentum must be in"),
        ({"optimizer": "muon", "optimizer_arg": {"rest_momentum": 1}}, "momentum and rest_momentum must be in"),
        ({"optimizer": "muon", "optimizer_arg": {"momentum": -0.1}}, "momentum and rest_momentum must be in"),
        ({"optimizer": "muon", "optimizer_arg": {"rest_momentum": -0.1}}, "momentum and rest_momentum must be in"),
        ({"optimizer": "muon", "optimizer_arg": {"linear": "no"}}, "linear must be true or false"),
        ({"optimizer": "ranger", "optimizer_arg": {"use_gc": "no"}}, "use_gc must be true or false"),
        ({"optimizer": "sgd", "optimizer_arg": {"k": 3}}, "no argument 'k'"),
        ({"optimizer": "sgd", "optimizer_arg": {"momentum": -1}}, "momentum"),
        ({"optimizer": "sgd", "optimizer_arg": {"momentum": 0, "nesterov": True}}, "Nesterov"),
        ({"optimizer": "adam", "optimizer_arg": {"eps": "small"}}, "cannot train"),
        ({"optimizer": "lion", "optimizer_arg": {"betas": [2, 0.9]}}, "cannot train"),
        ({"optimizer": "lookahead:sgd", "optimizer_arg": {"k": 0}}, "k >= 1"),
        ({"optimizer": "lookahead:sgd", "optimizer_arg": {"k": 2.5}}, "k >= 1"),
        ({"optimizer": "lookahead:adam", "optimizer_arg": {"alpha": "half"}}, "alpha <= 1"),
        ({"optimizer": "ranger21"}, "--optimizer-arg num_iterations=VALUE"),
        ({"optimizer": "alig"}, "learning rate"),
        ({"optimizer": "fromage"}, "--weight-decay 0"),
        ({"optimizer": "schedulefreesgd"}, "evaluates different weights"),
        ({"optimizer": "adamuon"}, "adamuon cannot train this network"),
        ({"optimizer": "adamp"}, "adamp cannot train this network"),
        ({"optimizer": "adashift", "weight_decay": 0}, "plain values and tensors"),
        ({"optimizer": "lbfgs", "weight_decay": 0}, "closure"),
    ],
)
def test_fault15_invalid_optimizers_and_arguments_are_rejected(values: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_optimizer(network(), Recipe.make(**values))


def test_fault18_built_in_optimizers_work_without_pytorch_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    for name in OPTIMIZERS:
        build_optimizer(network(), Recipe(optimizer=name))
    with pytest.raises(UsageError, match=r"pip install 'pytorch_optimizer>=4.1") as caught:
        build_optimizer(network(), Recipe(optimizer="lion"))
    assert caught.value.exit_code == 2


@pytest.mark.medium
def test_every_class_of_pytorch_optimizer_trains_or_is_rejected() -> None:
    supported = []
    for name in pytorch_optimizer.get_supported_optimizers():
        build = pytorch_optimizer.load_optimizer(name)
        has_decay = "weight_decay" in inspect.signature(build).parameters
        model = network()
        try:
            optimizer = build_optimizer(model, Recipe(optimizer=name, lr=0.01, weight_decay=0.01 if has_decay else 0))
        except UsageError:
            continue
        advance([(model, optimizer)], 0)
        assert all(weight.isfinite().all() for weight in model.parameters()), name
        supported.append(name)
    assert len(supported) >= 90
    assert SELF_SCHEDULED_OPTIMIZERS - set(supported) == {"ranger21"}  # needs the number of steps


def test_lookahead_arguments_take_precedence_over_the_inner_optimizer() -> None:
    recipe = Recipe(optimizer="lookahead:rmsprop", optimizer_arg={"k": 7, "alpha": 0.8})
    with_lookahead = build_optimizer(network(), recipe)
    assert with_lookahead.spec.lookahead == {"k": 7, "alpha": 0.8}
    assert with_lookahead.inner.param_groups[0]["alpha"] == 0.99
    without_lookahead = build_optimizer(network(), Recipe(optimizer="RMSprop", optimizer_arg={"alpha": 0.8}))
    assert (without_lookahead.spec.lookahead, without_lookahead.inner.param_groups[0]["alpha"]) == ({}, 0.8)


def test_gradient_clipping() -> None:
    model = network()
    weights = list(model.parameters())
    set_gradients([model], 0)
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    original = [gradient.clone() for gradient in gradients]
    assert len(gradients) == len(weights)
    build_grad_clipper(parse_clip_grad("none"), weights)()
    assert all(map(torch.equal, gradients, original))
    build_grad_clipper(parse_clip_grad("value:0.1"), weights)()
    assert all(map(torch.equal, gradients, [gradient.clamp(-0.1, 0.1) for gradient in original]))
    build_grad_clipper(parse_clip_grad("norm:0.01"), weights)()
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)
    for invalid in ("0.1", "value", "value:-1", "value:x", "length:1", "norm:inf"):
        with pytest.raises(UsageError, match="--clip-grad should be value:LIMIT, norm:LIMIT or none"):
            Recipe(clip_grad=invalid)
