"""Optimizers against plain references, resumed, skipped and refused; clipping; the average of the weights."""

from __future__ import annotations

import copy
import inspect
import io
import math
import sys
from typing import Any

import pytest
import pytorch_optimizer
import torch
from pytorch_optimizer import Lookahead as ReferenceLookahead
from torch import nn

from fastcifar.errors import UsageError
from fastcifar.recipe import Recipe
from fastcifar.training.ema import Ema
from fastcifar.training.lr_schedule import SCHEDULES, LRSchedule
from fastcifar.training.optimizer_classes import Muon
from fastcifar.training.optimizers import (
    OPTIMIZERS,
    SELF_SCHEDULED_OPTIMIZERS,
    OptimizerWrapper,
    build_grad_clipper,
    build_param_groups,
    pytorch_optimizer_classes,
)

OFF = torch.zeros(())
SCALER = torch.amp.GradScaler("cpu", enabled=False)
LIBRARY = ("lion", "adabelief", "lamb")  # of pytorch_optimizer
AROUND = [f"lookahead:{name}" for name in (*OPTIMIZERS, *LIBRARY) if name != "ranger"]  # which has it already
EVERY = [*OPTIMIZERS, *LIBRARY, *AROUND]


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


def advance(pairs: list[tuple[nn.Module, OptimizerWrapper]], step: int) -> None:
    """One step, number `step` from 0, of every network on the same gradients."""
    set_gradients([model for model, _ in pairs], step)
    for _, optimizer in pairs:
        optimizer.step(SCALER, OFF)
        optimizer.after_step(step + 1)


def assert_same(one: Any, other: Any) -> None:
    """Equal bit for bit, containers and counters too."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        assert_same([*one.values()], [*other.values()])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_same(mine, theirs)
    else:
        assert one == other


def assert_equal_weights(ours: nn.Module, theirs: nn.Module, tolerance: float = 0.0) -> None:
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("opt", [{}, {"nesterov": True}, {"momentum": 0.0}, {"dampening": 0.1}])
def test_sgd_equals_torch(opt: dict) -> None:
    ours, theirs = network(), network()
    optimizer = OptimizerWrapper(ours, Recipe(optimizer="sgd", lr=0.1, weight_decay=1e-2, optimizer_arg=opt))
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1, weight_decay=1e-2, **{"momentum": 0.9, **opt})
    if "dampening" in opt:  # torch's first step has no dampening; ours has, so that every step is the same work
        for weight in theirs.parameters():
            reference.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    for step in range(20):
        set_gradients([ours, theirs], step)
        optimizer.step(SCALER, OFF)
        reference.step()
    assert_equal_weights(ours, theirs, 1e-6)


@pytest.mark.parametrize(
    ("name", "opt", "build", "arguments"),
    [
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
def test_equals_the_plain_optimizer(name: str, opt: dict, build: Any, arguments: dict) -> None:
    ours, theirs = network(), network()
    optimizer = OptimizerWrapper(ours, Recipe(optimizer=name, weight_decay=1e-2, optimizer_arg=opt))
    reference = build(theirs.parameters(), lr=0.01, weight_decay=1e-2, **arguments)
    for step in range(20):
        optimizer.set_lr(0.01 / (step + 1))
        reference.param_groups[0]["lr"] = 0.01 / (step + 1)
        set_gradients([ours, theirs], step)
        optimizer.step(SCALER, OFF)
        reference.step()
    assert_equal_weights(ours, theirs, 1e-5 if optimizer.spec.fused else 1e-6)


@pytest.mark.parametrize(("k", "alpha"), [(5, 0.5), (3, 0.8)])
def test_lookahead_equals_pytorch_optimizer(k: int, alpha: float) -> None:
    ours, theirs = network(), network()
    optimizer = OptimizerWrapper(
        ours, Recipe(optimizer="lookahead:sgd", lr=0.1, optimizer_arg={"k": k, "alpha": alpha})
    )
    inner = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    reference = ReferenceLookahead(inner, k=k, alpha=alpha, pullback_momentum="none")
    for step in range(50):
        set_gradients([ours, theirs], step)
        optimizer.step(SCALER, OFF)
        optimizer.after_step(step + 1)
        reference.step()
    assert_equal_weights(ours, theirs, 1e-5)


@pytest.mark.parametrize("name", ["lookahead:sgd", "ranger"])
def test_a_skipped_step_has_no_slow_weights_after_it(name: str) -> None:
    """k = 5: the tenth step is skipped, and neither weights nor slow weights move; the fifteenth is not."""
    model = network()
    optimizer = OptimizerWrapper(model, Recipe(optimizer=name, optimizer_arg={"k": 5}))
    for step in range(9):
        advance([(model, optimizer)], step)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    set_gradients([model], 9)
    next(model.parameters()).grad.fill_(math.inf)  # type: ignore[union-attr]
    optimizer.step(SCALER, torch.ones(()))
    optimizer.after_step(10, torch.ones(()))
    assert_same(kept, (model.state_dict(), optimizer.state_dict()))
    for step in range(10, 15):
        advance([(model, optimizer)], step)
    assert all(torch.equal(slow, fast) for slow, fast in zip(optimizer.slow_weights, optimizer.parameters, strict=True))


def test_learning_rate_is_one_tensor_that_every_group_reads() -> None:
    model = network()
    optimizer = OptimizerWrapper(model, Recipe(optimizer="sgd", bias_decay=False))
    assert len(optimizer.inner.param_groups) == 2
    before = copy.deepcopy(model.state_dict())
    optimizer.set_lr(0.0)
    set_gradients([model], 0)
    optimizer.step(SCALER, OFF)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(group["lr"] is optimizer.lr for group in optimizer.inner.param_groups)


@pytest.mark.parametrize("name", [name for name in EVERY if name.rpartition(":")[2] in OPTIMIZERS])
def test_state_goes_into_the_tensors_that_are_there(name: str) -> None:
    ours, resumed = network(), network()
    first, second = (OptimizerWrapper(model, Recipe(optimizer=name)) for model in (ours, resumed))
    places = [tensor.data_ptr() for tensor in second.state_tensors()]
    first.set_lr(0.03)
    for step in range(7):
        advance([(ours, first)], step)
    second.load_state_dict(first.state_dict())
    assert all(group["lr"] is second.lr for group in second.inner.param_groups)
    assert [tensor.data_ptr() for tensor in second.state_tensors()] == places
    for mine, other in zip(first.state_tensors(), second.state_tensors(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_whole_state_is_there_before_the_first_step(name: str) -> None:
    model = network()
    weights = copy.deepcopy(model.state_dict())
    optimizer = OptimizerWrapper(model, Recipe(optimizer=name))
    places = [tensor.data_ptr() for tensor in optimizer.state_tensors()]
    assert len(places) > len(optimizer.parameters)
    given = {id(tensor) for tensor in (optimizer.lr, *optimizer.slow_weights)}
    assert not any(tensor.any() for tensor in optimizer.state_tensors() if id(tensor) not in given)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    advance([(model, optimizer)], 0)
    assert [tensor.data_ptr() for tensor in optimizer.state_tensors()] == places


def trained(values: dict[str, Any], steps: range, resume: io.BytesIO | None = None) -> tuple[nn.Module, io.BytesIO]:
    """A network after `steps`, two an epoch, on synthetic images, fresh or from `resume`, and what a run would save."""
    recipe = Recipe.make(**{"lr": 0.01, "epochs": 10, **values})
    model = network()
    optimizer, schedule = OptimizerWrapper(model, recipe), LRSchedule(recipe, 2)
    if resume:
        resume.seek(0)
        state = torch.load(resume, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images, labels = torch.randn(8, 3, 8, 8, generator=generator), torch.randint(4, (8,), generator=generator)
        optimizer.set_lr(schedule.lr_at(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images).mean((2, 3)), labels).backward()
        optimizer.step(SCALER, OFF)
        optimizer.after_step(step + 1)
        if step % 2:
            schedule.after_epoch(1.0)
    file = io.BytesIO()
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, file
    )
    return model, file


@pytest.mark.parametrize(
    "values",
    [
        *({"optimizer": name, "optimizer_arg": {"k": 3} if ":" in name else {}} for name in EVERY),
        *({"optimizer": "sgd", "schedule": name} for name in SCHEDULES),
        {"optimizer": "lookahead:rmsprop", "schedule": "plateau:1", "bias_decay": False},
        {
            "optimizer": "ranger",
            "schedule": "plateau:1",
            "bias_decay": False,
            "optimizer_arg": {"k": 4, "betas": [0.9, 0.99]},
        },
        {"optimizer": "muon", "optimizer_arg": {"weight_norm": True, "nesterov": False}},
    ],
    ids=lambda values: "-".join(str(value) for value in values.values()),
)
def test_twenty_steps_resumed_at_ten_are_twenty_steps(values: dict) -> None:
    whole, _ = trained(values, range(20))
    half, saved = trained(values, range(10))
    resumed, _ = trained(values, range(10, 20), resume=saved)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert not any(torch.equal(mine, other) for mine, other in zip(whole.parameters(), half.parameters(), strict=True))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", EVERY)
def test_fault14_a_skipped_step_changes_nothing(name: str, first: bool) -> None:
    model = network()
    optimizer = OptimizerWrapper(model, Recipe(optimizer=name, lr=0.01))
    if not first:
        advance([(model, optimizer)], 0)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    set_gradients([model], 1)
    next(model.parameters()).grad.fill_(math.nan)  # type: ignore[union-attr]
    optimizer.step(SCALER, torch.ones(()))
    assert_same(kept, (model.state_dict(), optimizer.state_dict()))


@pytest.mark.parametrize("name", [*OPTIMIZERS, "lion"])
def test_fault14_a_scaler_skips_what_overflowed_and_steps_otherwise(name: str) -> None:
    model = network()
    optimizer = OptimizerWrapper(model, Recipe(optimizer=name, lr=0.01))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for poison in (math.inf, 1.0):
        kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        set_gradients([model], 1)
        next(model.parameters()).grad.mul_(poison)  # type: ignore[union-attr]
        scaler.scale(torch.zeros(()))
        scaler.unscale_(optimizer.inner)
        optimizer.step(scaler, OFF)
        scaler.update()
        if poison == math.inf:
            assert_same(kept, (model.state_dict(), optimizer.state_dict()))
    assert not any(torch.equal(value, kept[0][key]) for key, value in model.named_parameters())


@pytest.mark.parametrize(
    ("values", "words"),
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
        ({"optimizer": "ranger", "optimizer_arg": {"betas": [0.9, 1.0]}}, "betas are in"),
        ({"optimizer": "ranger", "optimizer_arg": {"k": 0}}, "whole k >= 1"),
        ({"optimizer": "lookahead:ranger"}, "ranger has Lookahead in it"),
        ({"optimizer": "muon", "optimizer_arg": {"rest": 3}}, "did you mean 'rest_lr'"),
        ({"optimizer": "muon", "optimizer_arg": {"ns_steps": 2.5}}, "ns_steps is a whole number"),
        ({"optimizer": "muon", "optimizer_arg": {"momentum": 1}}, "momentum is in"),
        ({"optimizer": "muon", "optimizer_arg": {"linear": "no"}}, "linear are true or false"),
        ({"optimizer": "ranger", "optimizer_arg": {"use_gc": "no"}}, "use_gc is true or false"),
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
        ({"optimizer": "schedulefreesgd"}, "evaluates other weights"),
        ({"optimizer": "adamuon"}, "adamuon cannot train this network"),
        ({"optimizer": "adamp"}, "adamp cannot train this network"),
        ({"optimizer": "adashift", "weight_decay": 0}, "plain values and tensors"),
        ({"optimizer": "lbfgs", "weight_decay": 0}, "closure"),
    ],
)
def test_fault15_wrong_optimizers_and_arguments(values: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        OptimizerWrapper(network(), Recipe.make(**values))


def test_fault18_without_pytorch_optimizer_the_rest_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    for name in OPTIMIZERS:
        OptimizerWrapper(network(), Recipe(optimizer=name))
    with pytest.raises(UsageError, match=r"pip install 'pytorch_optimizer>=4.1") as caught:
        OptimizerWrapper(network(), Recipe(optimizer="lion"))
    assert caught.value.exit_code == 2


def test_every_class_of_pytorch_optimizer_trains_or_is_refused() -> None:
    trains = []
    for name, build in pytorch_optimizer_classes().items():
        has_decay = "weight_decay" in inspect.signature(build).parameters
        model = network()
        try:
            optimizer = OptimizerWrapper(model, Recipe(optimizer=name, lr=0.01, weight_decay=0.01 if has_decay else 0))
        except UsageError:
            continue
        advance([(model, optimizer)], 0)
        assert all(weight.isfinite().all() for weight in model.parameters()), name
        trains.append(name)
    assert len(trains) >= 90
    assert SELF_SCHEDULED_OPTIMIZERS - set(trains) == {"ranger21"}  # it wants to know the number of steps


def test_lookaheads_arguments_are_its_own() -> None:
    around = OptimizerWrapper(network(), Recipe(optimizer="lookahead:rmsprop", optimizer_arg={"k": 7, "alpha": 0.8}))
    assert (around.lookahead_k, around.lookahead_alpha, around.inner.param_groups[0]["alpha"]) == (7, 0.8, 0.99)
    bare = OptimizerWrapper(network(), Recipe(optimizer="RMSprop", optimizer_arg={"alpha": 0.8}))
    assert (bare.lookahead_k, bare.inner.param_groups[0]["alpha"]) == (0, 0.8)


def test_trying_an_optimizer_leaves_weights_and_random_state() -> None:
    model = network()
    weights = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    optimizer = OptimizerWrapper(model, Recipe(optimizer="lion"))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not optimizer.inner.state
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_groups_cover_every_parameter_once() -> None:
    model = network()
    decayed, plain = build_param_groups(model, 0.1, False)
    assert {weight.ndim for weight in decayed["params"]} == {4}
    assert {weight.ndim for weight in plain["params"]} == {1}
    assert plain["weight_decay"] == 0
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    assert len(build_param_groups(model, 0.1, True)) == 1


def network_with_a_head() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(6, 6), nn.Linear(6, 4))
    model[1].weight.requires_grad_(False)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it


def test_groups_of_rates_cover_every_trainable_parameter_once() -> None:
    model = network_with_a_head()
    rest, head, biases = build_param_groups(model, 0.1, True, bias_lr_mult=4.0, head_lr_mult=0.5)
    assert [weight.ndim for weight in rest["params"]] == [4, 2]
    assert head["params"] == [model[3].weight]
    assert biases["params"] == [model[0].bias, model[1].bias, model[2].bias, model[3].bias]
    assert [group.get("times", 1.0) for group in (rest, head, biases)] == [1.0, 0.5, 4.0]
    assert [group["weight_decay"] for group in (rest, head, biases)] == [0.1, 0.2, 0.025]
    assert [len(group["params"]) for group in build_param_groups(model, 0.1, False, 4.0, 4.0)] == [2, 1, 4]
    with pytest.raises(UsageError, match="--head-lr-mult 2: the network has no linear layer"):
        build_param_groups(network(), 0.1, True, head_lr_mult=2.0)


@pytest.mark.parametrize("name", ["sgd", "adamw", "adam", "rmsprop", "lion"])
def test_groups_of_rates_equal_a_plain_optimizer_with_groups(name: str) -> None:
    """With decay: divided by the multiple of the rate, a decoupled one shrinks each group by lr * decay a step."""
    ours, theirs = network_with_a_head(), network_with_a_head()
    optimizer = OptimizerWrapper(
        ours, Recipe(optimizer=name, lr=0.01, weight_decay=1e-2, bias_lr_mult=4.0, head_lr_mult=0.5)
    )
    build = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "adam": torch.optim.Adam,
             "rmsprop": torch.optim.RMSprop, "lion": pytorch_optimizer.Lion}[name]  # fmt: skip
    plain = [weight for weight in theirs.parameters() if weight.requires_grad]
    parts = [
        ([weight for weight in plain if weight.ndim > 1 and weight is not theirs[3].weight], 1.0),
        ([theirs[3].weight], 0.5),
        ([weight for weight in plain if weight.ndim == 1], 4.0),
    ]
    groups = [{"params": weights, "lr": 0.01 * times, "weight_decay": 1e-2 / times} for weights, times in parts]
    reference = build(groups, lr=0.01, **({"momentum": 0.9} if name == "sgd" else {}))
    for step in range(10):
        optimizer.set_lr(0.01 / (step + 1))
        for group, (_, times) in zip(reference.param_groups, parts, strict=True):
            group["lr"] = 0.01 / (step + 1) * times
        set_gradients([ours, theirs], step)
        optimizer.step(SCALER, OFF)
        reference.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_muon_and_sgd_of_two_rates_in_one_optimizer() -> None:
    """The recipe of the speed networks: filters by Muon, biases and head by Nesterov SGD at rates of their own."""
    opt = {"momentum": 0.6, "ns_steps": 3, "weight_norm": True, "rest_lr": 50.0, "rest_momentum": 0.85}
    ours, theirs = network_with_a_head(), network_with_a_head()
    recipe = Recipe(optimizer="muon", lr=0.24, weight_decay=0, head_lr_mult=12.0, optimizer_arg=opt)
    optimizer = OptimizerWrapper(ours, recipe)
    head = theirs[3].weight
    others = [
        weight for weight in theirs.parameters() if weight.requires_grad and weight.ndim < 4 and weight is not head
    ]
    filters = Muon([theirs[0].weight], lr=0.24, momentum=0.6, ns_steps=3, weight_norm=True)
    rest = torch.optim.SGD(
        [{"params": others, "lr": 12.0}, {"params": [head], "lr": 144.0}], momentum=0.85, nesterov=True
    )
    for step in range(10):
        share = 1 - step / 10
        optimizer.set_lr(0.24 * share)
        filters.param_groups[0]["lr"] = 0.24 * share
        for group, lr in zip(rest.param_groups, (12.0, 144.0), strict=True):
            group["lr"] = lr * share
        set_gradients([ours, theirs], step)
        optimizer.step(SCALER, OFF)
        filters.step()
        rest.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lookahead:sgd", "muon", "ranger", "lookahead:lion"])
def test_groups_of_rates_are_resumed(name: str) -> None:
    values = {"optimizer": name, "bias_lr_mult": 3.0, "bias_decay": False}
    whole, _ = trained(values, range(12))
    _, saved = trained(values, range(6))
    resumed, _ = trained(values, range(6, 12), resume=saved)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_at_a_multiple_of_one_groups_and_state_are_as_without() -> None:
    model = network_with_a_head()
    (group,) = build_param_groups(model, 0.1, True)
    assert group.keys() == {"params", "weight_decay"}
    assert group["params"] == [weight for weight in model.parameters() if weight.requires_grad]
    assert not OptimizerWrapper(model, Recipe(optimizer="sgd")).scaled_lrs


def test_clip() -> None:
    model = network()
    weights = list(model.parameters())
    set_gradients([model], 0)
    kept = [weight.grad.clone() for weight in weights if weight.grad is not None]
    build_grad_clipper("none", weights)()
    assert all(torch.equal(weight.grad, old) for weight, old in zip(weights, kept, strict=True))  # type: ignore[arg-type]
    build_grad_clipper("value:0.1", weights)()
    assert all(torch.equal(weight.grad, old.clamp(-0.1, 0.1)) for weight, old in zip(weights, kept, strict=True))  # type: ignore[arg-type]
    build_grad_clipper("norm:0.01", weights)()
    norm = torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)
    for wrong in ("0.1", "value", "value:-1", "value:x", "length:1", "norm:inf"):
        with pytest.raises(UsageError, match="--clip-grad"):
            build_grad_clipper(wrong, weights)


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
    with ema.averaged_weights():
        for name, value in expected.items():
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-5)
    for name, value in live.items():
        assert torch.equal(model.state_dict()[name], value)
    assert torch.equal(ema.state_dict(model)["1.num_batches_tracked"], live["1.num_batches_tracked"])
