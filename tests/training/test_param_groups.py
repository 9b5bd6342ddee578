"""Parameter groups: weight decay and learning-rate multipliers of biases and head."""

from __future__ import annotations

import pytest
import pytorch_optimizer
import torch

from fastcifar.errors import UsageError
from fastcifar.recipe import Recipe
from fastcifar.training.optimizer_classes import Muon
from fastcifar.training.optimizers import build_param_groups
from tests.training.optimizer_helpers import (
    NO_SKIP,
    SCALER,
    build_optimizer,
    network,
    network_with_head,
    set_gradients,
)


def test_groups_contain_every_parameter_once() -> None:
    model = network()
    decayed, not_decayed = build_param_groups(model, Recipe(weight_decay=0.1, bias_decay=False))
    assert {weight.ndim for weight in decayed["params"]} == {4}
    assert {weight.ndim for weight in not_decayed["params"]} == {1}
    assert not_decayed["weight_decay"] == 0
    assert len(decayed["params"]) + len(not_decayed["params"]) == len(list(model.parameters()))


def test_groups_with_lr_multipliers_contain_every_trainable_parameter_once() -> None:
    model = network_with_head()
    (group,) = build_param_groups(model, Recipe())  # multipliers of 1 add no groups
    assert group.keys() == {"params", "weight_decay"}
    assert group["params"] == [weight for weight in model.parameters() if weight.requires_grad]
    rest, head, biases = build_param_groups(model, Recipe(weight_decay=0.1, bias_lr_mult=4.0, head_lr_mult=0.5))
    assert [weight.ndim for weight in rest["params"]] == [4, 2]
    assert head["params"] == [model[3].weight]
    assert biases["params"] == [model[0].bias, model[1].bias, model[2].bias, model[3].bias]
    assert [group.get("times", 1.0) for group in (rest, head, biases)] == [1.0, 0.5, 4.0]
    assert [group["weight_decay"] for group in (rest, head, biases)] == [0.1, 0.2, 0.025]
    equal_multipliers = build_param_groups(model, Recipe(bias_decay=False, bias_lr_mult=4.0, head_lr_mult=4.0))
    assert [len(group["params"]) for group in equal_multipliers] == [2, 1, 4]
    with pytest.raises(UsageError, match="--head-lr-mult 2: the network has no linear layer"):
        build_param_groups(network(), Recipe(head_lr_mult=2.0))


@pytest.mark.parametrize("name", ["sgd", "adamw", "adam", "rmsprop", "lion"])
def test_lr_multipliers_equal_a_reference_optimizer_with_groups(name: str) -> None:
    """Weight decay is divided by the multiplier, so decoupled decay shrinks each group by lr * decay per step."""
    model, reference_model = network_with_head(), network_with_head()
    optimizer = build_optimizer(
        model, Recipe(optimizer=name, lr=0.01, weight_decay=1e-2, bias_lr_mult=4.0, head_lr_mult=0.5)
    )
    build = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "adam": torch.optim.Adam,
             "rmsprop": torch.optim.RMSprop, "lion": pytorch_optimizer.Lion}[name]  # fmt: skip
    trainable = [weight for weight in reference_model.parameters() if weight.requires_grad]
    weights_by_multiplier = {
        1.0: [weight for weight in trainable if weight.ndim > 1 and weight is not reference_model[3].weight],
        0.5: [reference_model[3].weight],
        4.0: [weight for weight in trainable if weight.ndim == 1],
    }
    groups = [
        {"params": weights, "lr": 0.01 * multiplier, "weight_decay": 1e-2 / multiplier}
        for multiplier, weights in weights_by_multiplier.items()
    ]
    reference = build(groups, lr=0.01, **({"momentum": 0.9} if name == "sgd" else {}))
    for step in range(10):
        optimizer.set_lr(0.01 / (step + 1))
        for group, multiplier in zip(reference.param_groups, weights_by_multiplier, strict=True):
            group["lr"] = 0.01 / (step + 1) * multiplier
        set_gradients([model, reference_model], step)
        optimizer.step(SCALER, NO_SKIP)
        reference.step()
    for weight, expected in zip(model.parameters(), reference_model.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)


def test_muon_with_sgd_at_two_learning_rates() -> None:
    """Filters use Muon; biases and head use Nesterov SGD with separate learning rates, as in the speed recipes."""
    opt = {"momentum": 0.6, "ns_steps": 3, "weight_norm": True, "rest_lr": 50.0, "rest_momentum": 0.85}
    model, reference_model = network_with_head(), network_with_head()
    recipe = Recipe(optimizer="muon", lr=0.24, weight_decay=0, head_lr_mult=12.0, optimizer_arg=opt)
    optimizer = build_optimizer(model, recipe)
    head = reference_model[3].weight
    others = [
        weight
        for weight in reference_model.parameters()
        if weight.requires_grad and weight.ndim < 4 and weight is not head
    ]
    filters = Muon([reference_model[0].weight], lr=0.24, momentum=0.6, ns_steps=3, weight_norm=True)
    rest = torch.optim.SGD(
        [{"params": others, "lr": 12.0}, {"params": [head], "lr": 144.0}], momentum=0.85, nesterov=True
    )
    for step in range(10):
        factor = 1 - step / 10
        optimizer.set_lr(0.24 * factor)
        filters.param_groups[0]["lr"] = 0.24 * factor
        for group, lr in zip(rest.param_groups, (12.0, 144.0), strict=True):
            group["lr"] = lr * factor
        set_gradients([model, reference_model], step)
        optimizer.step(SCALER, NO_SKIP)
        filters.step()
        rest.step()
    for weight, expected in zip(model.parameters(), reference_model.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)
