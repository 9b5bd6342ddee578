"""Parameters, multiply-accumulates, layers and memory traffic: exact, and counted without changing the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastcifar.errors import UsageError
from fastcifar.models import MODELS, check_param_budget, count_macs, count_parameters
from fastcifar.models.count import count_conv_calls, feature_map_bytes_per_image, layer_table
from tests.models.networks import on_meta, small

BUDGET = 5_000_000
OVER_BUDGET = {"coconut_over", "resnet18"}

# Trainable parameters, and multiply-accumulates of one 32x32 image in millions (None: not published).
PUBLISHED: dict[str, tuple[int, float | None]] = {
    "resnet": (4_697_162, None),
    "se68": (4_697_742, 798.69),
    "se55": (4_994_878, 439.97),
    "se68_block": (4_733_610, None),
    "se68_none": (4_697_162, None),
    "coconut_leaky": (4_773_354, 298.69),
    "coconut_se": (4_973_226, None),
    "coconut_2452": (4_924_170, 281.29),
    "coconut_sep": (3_562_858, 259.40),
    "coconut_over": (5_237_546, 299.15),
    "res512a": (4_903_242, None),
    "res512b": (4_912_698, None),
    "res512c": (4_437_066, None),
    "res512d": (4_903_242, None),
    "resnet18": (11_173_962, 555.42),
    "speednet": (1_078_298, None),
    "speed94": (1_971_352, None),
}


@pytest.mark.parametrize("arch", PUBLISHED)
def test_fault22_parameters_and_macs_are_the_published_ones(arch: str) -> None:
    model = on_meta(arch)
    count, millions = PUBLISHED[arch]
    assert count_parameters(model) == count
    if millions is not None:
        assert round(count_macs(model) / 1e6, 2) == millions


@pytest.mark.parametrize("arch", MODELS)
def test_fault22_budget_is_refused_unless_allowed(arch: str) -> None:
    model = on_meta(arch)
    if arch in OVER_BUDGET:
        count = count_parameters(model)
        problem = rf"{arch} has {count:,} parameters, {count - BUDGET:,} over the budget of 5,000,000; "
        with pytest.raises(UsageError, match=rf"{problem}.*--max-params {count}") as caught:
            check_param_budget(arch, model, BUDGET)
        assert caught.value.exit_code == 2
    else:
        check_param_budget(arch, model, BUDGET)
    check_param_budget(arch, model, count_parameters(model))
    with pytest.raises(UsageError, match=", 1 over the budget"):
        check_param_budget(arch, model, count_parameters(model) - 1)


def test_frozen_parameters_do_not_count() -> None:
    model = on_meta("se68")
    for parameter in model.get_submodule("linear").parameters():
        parameter.requires_grad_(False)
    assert count_parameters(model) == 4_697_742 - (256 * 10 + 10)


def test_macs_by_hand_and_for_other_shapes() -> None:
    grouped = nn.Sequential(nn.Conv2d(4, 8, (3, 1), 2, (1, 0), groups=2), nn.Flatten(), nn.Linear(8 * 4 * 5, 7))
    assert count_macs(grouped, (4, 8, 10)) == 8 * 4 * 5 * 2 * 3 + 8 * 4 * 5 * 7
    assert count_macs(on_meta("se68_none"), (3, 64, 64)) - 2560 == 4 * (count_macs(on_meta("se68_none")) - 2560)


@pytest.mark.medium
@pytest.mark.parametrize("arch", MODELS)
def test_layers_and_convolution_calls_add_up(arch: str) -> None:
    model = on_meta(arch)
    rows = layer_table(model)
    linear = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear))
    assert sum(conv.macs * calls for conv, calls in count_conv_calls(model).items()) == count_macs(model) - linear
    assert sum(row["params"] for row in rows) == count_parameters(model)
    assert all(set(row) == {"name", "kind", "output", "params", "macs"} and row["output"] for row in rows)


def test_layer_table_is_in_forward_order_with_shapes() -> None:
    rows = layer_table(on_meta("se68"))
    names = [row["name"] for row in rows]
    assert names[:5] == ["conv1", "bn1", "activation", "seblock.conv1", "seblock.conv2"]
    assert rows[0] == {"name": "conv1", "kind": "Conv2d", "output": [64, 32, 32], "params": 1728, "macs": 1728 * 1024}
    assert rows[3]["output"] == [4, 1, 1]
    assert rows[-1] == {"name": "linear", "kind": "Linear", "output": [10], "params": 2570, "macs": 2560}
    by_name = {row["name"]: row for row in rows}
    assert by_name["residual_layers.2.0.shortcut.0"]["output"] == [256, 8, 8]


class Odd(nn.Module):
    """A module with its own parameter, a layer that is called twice, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.twice = nn.Conv2d(3, 3, 1)
        self.never = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(self.twice(x)).mean((2, 3)) * self.scale


def test_layer_table_of_other_modules_adds_up() -> None:
    rows = layer_table(Odd())
    assert [(row["name"], row["params"]) for row in rows] == [("twice", 12), ("twice", 0), ("", 3), ("never", 30)]
    assert sum(row["macs"] for row in rows) == count_macs(Odd()) == 2 * 9 * 1024


def test_counting_leaves_the_model_as_it_was_and_accepts_a_compiled_one() -> None:
    model = small("se68_block", blocks=(1, 1, 1)).bfloat16()
    model.get_submodule("bn1").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, random = [module.training for module in model.modules()], torch.get_rng_state()
    assert count_macs(model) > 0
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    compiled = torch.compile(model, backend="eager")
    assert isinstance(compiled, nn.Module)
    assert count_macs(compiled) == count_macs(model)


def test_feature_map_bytes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    images, maps = 3 * 32 * 32, 8 * 16 * 16
    assert feature_map_bytes_per_image(model, training=True, element_size=2) == 2 * (3 * (images + maps) + 8 * maps)
    assert feature_map_bytes_per_image(model, training=False, element_size=4) == 4 * (images + maps + 2 * maps)
    assert feature_map_bytes_per_image(on_meta("se68"), training=True) == pytest.approx(30.7e6, rel=0.01)
