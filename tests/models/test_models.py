"""Test building networks: the effect of every option, invalid options, and the largest width within a budget."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastcifar import models
from fastcifar.errors import UsageError
from fastcifar.models import MODELS, build_model, count_macs, count_parameters
from fastcifar.models.resnet import ACTIVATIONS, scale_channels
from tests.models.networks import on_meta


def conv(model: nn.Module, name: str) -> nn.Conv2d:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Conv2d)
    return module


def count_of(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


TINY = {"blocks": (1, 2), "channels": (8, 16), "se": "block"}
EFFECTS: dict[tuple[str, Any], Callable[[nn.Module], bool]] = {
    ("width", 2.0): lambda m: (
        conv(m, "conv1").out_channels == 16 and conv(m, "residual_layers.1.1.conv2").in_channels == 32
    ),
    ("dropout", 0.5): lambda m: count_of(m, nn.Dropout) == 4,
    ("activation", "leaky_relu"): lambda m: count_of(m, nn.LeakyReLU) == 4 and count_of(m, nn.ReLU) == 0,
    ("activation", "silu"): lambda m: count_of(m, nn.SiLU) == 4,
    ("activation", "gelu"): lambda m: count_of(m, nn.GELU) == 4,
    ("activation", "mish"): lambda m: count_of(m, nn.Mish) == 4,
    ("se", "none"): lambda m: not any("seblock." in key for key in m.state_dict()),
    ("se", "stem"): lambda m: (
        "seblock.conv1.weight" in m.state_dict() and "residual_layers.0.0.seblock.conv1.weight" not in m.state_dict()
    ),
    ("se_reduction", 2): lambda m: conv(m, "residual_layers.1.0.seblock.conv1").out_channels == 8,
    ("blocks", (3, 1)): lambda m: len(list(m.get_submodule("residual_layers.0").children())) == 3,
    ("channels", (24, 40)): lambda m: (
        conv(m, "conv1").out_channels == 24 and conv(m, "residual_layers.1.0.conv1").out_channels == 40
    ),
    ("kernel", 5): lambda m: (
        conv(m, "residual_layers.0.0.conv1").kernel_size == (5, 5) and conv(m, "conv1").kernel_size == (3, 3)
    ),
    ("shortcut_kernel", 3): lambda m: conv(m, "residual_layers.1.0.shortcut.0").kernel_size == (3, 3),
    ("conv", "separable"): lambda m: (
        conv(m, "residual_layers.1.0.conv1").groups == 8
        and conv(m, "residual_layers.1.0.pointwise1").out_channels == 16
    ),
}


@pytest.mark.parametrize(("option", "value"), EFFECTS, ids=str)
def test_every_option_has_its_effect(option: str, value: Any) -> None:
    def logits(**options: Any) -> Tensor:
        torch.manual_seed(0)
        model = build_model("resnet", **{**TINY, **options})
        torch.manual_seed(1)
        return model(torch.randn(2, 3, 32, 32))

    expected = EFFECTS[option, value]
    assert expected(build_model("resnet", **{**TINY, option: value}))
    assert not expected(build_model("resnet", **TINY))
    assert not torch.equal(logits(**{option: value}), logits())


def test_every_option_is_tested_and_accepted_by_resnet() -> None:
    assert {option for option, _ in EFFECTS} == set(models.MODEL_OPTIONS)
    assert set(models.MODEL_OPTIONS) <= set(inspect.signature(MODELS["resnet"]).parameters)
    assert {value for option, value in EFFECTS if option == "activation"} | {"relu"} == set(ACTIVATIONS)


def test_options_of_the_coconut_architectures() -> None:
    assert conv(on_meta("coconut_se", width=0.5), "conv1").out_channels == 16
    assert count_of(on_meta("coconut_leaky", dropout=0.1), nn.Dropout) == 2 + 4 + 6 + 2 + 1
    assert count_of(on_meta("coconut_leaky"), nn.LeakyReLU) == 6 + 2
    assert count_of(on_meta("coconut_leaky", activation="mish"), nn.Mish) == 1 + 2 + 4 + 6 + 2
    assert count_parameters(on_meta("coconut_over", se="none")) == 4_773_354
    assert "layer1.0.se_block.fc1.weight" in on_meta("coconut_leaky", se="block").state_dict()
    assert on_meta("coconut_se", se_reduction=8).state_dict()["layer3.0.se_block.fc1.weight"].shape == (64, 512)
    assert len(list(on_meta("coconut_se", blocks=(1, 1, 2, 1)).get_submodule("layer3").children())) == 2


def test_none_keeps_the_default_and_num_classes_sizes_the_linear_layer() -> None:
    assert count_parameters(on_meta("se68", width=None, se=None, blocks=None, activation=None)) == 4_697_742
    assert count_parameters(on_meta("se68", num_classes=100)) == 4_697_742 + 90 * 257


def test_dropout_acts_in_train_mode_only_and_the_gate_keeps_a_hidden_channel() -> None:
    model = build_model("resnet", **TINY, dropout=0.5)
    assert model.state_dict()["residual_layers.0.0.seblock.conv1.weight"].shape == (1, 8, 1, 1)
    images = torch.randn(4, 3, 32, 32)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


@pytest.mark.medium
def test_res512d_has_one_dropout_before_the_linear_layer() -> None:
    model = on_meta("res512d")
    assert [name for name, module in model.named_modules() if isinstance(module, nn.Dropout)] == ["dropout"]
    assert model.state_dict()["linear.weight"].shape == (10, 512)
    stronger = on_meta("res512d", dropout=0.4).get_submodule("dropout")
    assert isinstance(stronger, nn.Dropout)
    assert stronger.p == 0.4


@pytest.mark.parametrize(
    ("width", "expected"),
    [(1.0, (64, 232, 268)), (1.001, (64, 232, 272)), (0.5, (32, 120, 136)), (0.3125, (24, 72, 80)), (0.01, (8, 8, 8))],
)
def test_channels_are_rounded_to_multiples_of_eight(width: float, expected: tuple[int, ...]) -> None:
    assert scale_channels((64, 232, 268), width) == expected


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("se86", {}, "unknown architecture 'se86'; did you mean 'se68'"),
        ("coconut_se", {"shortcut_kernel": 3}, "has no option --shortcut-kernel; its options: .*--se-reduction"),
        ("se68", {"se_stages": (3,)}, "se68 has no option --se-stages; its options: --width"),
        ("se68", {"blocks": (4, 4)}, "2 stages of blocks and 3 of channels; .*--channels"),
        ("resnet", {"blocks": (1,), "channels": (8,)}, "1 stages of blocks .* 2 to 5$"),
        ("resnet", {"blocks": (1,) * 6, "channels": (8,) * 6}, "6 stages of blocks .* 2 to 5$"),
        ("resnet", {"kernel": 4}, "--kernel 4 .*odd"),
        ("resnet", {"shortcut_kernel": 2}, "--shortcut-kernel 2 .*odd"),
        ("resnet", {"se": "blocks"}, "unknown SE placement 'blocks'; did you mean 'block'"),
        ("resnet", {"conv": "deep"}, "unknown convolution 'deep'; choose from full, separable"),
        ("resnet", {"activation": "leaky"}, "unknown activation 'leaky'"),
        ("coconut_se", {"activation": "rleu"}, "did you mean 'relu'"),
        ("coconut_se", {"se": "stem"}, "unknown SE placement 'stem'"),
        ("coconut_se", {"blocks": (1, 1, 1), "channels": (8, 8, 8)}, "has 4 stages, not 3"),
    ],
)
def test_invalid_options_are_refused_in_one_line_with_a_remedy(
    arch: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        on_meta(arch, **options)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


def test_an_architecture_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(num_classes: int, depth: int = 1) -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), *(nn.Linear(3072, 3072) for _ in range(depth - 1)), nn.Linear(3072, num_classes)
        )

    monkeypatch.setitem(MODELS, "mine", mine)
    monkeypatch.setitem(MODELS, "fixed", lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))
    monkeypatch.setitem(MODELS, "anything", lambda **given: mine(given["num_classes"]))
    images = torch.randn(2, 3, 32, 32)
    assert build_model("mine", num_classes=4)(images).shape == (2, 4)
    assert build_model("mine", width=None)(images).shape == (2, 10)
    assert count_parameters(on_meta("mine", depth=2)) == 3072 * 3073 + 30730
    assert build_model("fixed")(images).shape == (2, 10)
    assert build_model("anything", num_classes=3, depth=9)(images).shape == (2, 3)
    with pytest.raises(UsageError, match="architecture fixed has no option --se-reduction; its options: none"):
        build_model("fixed", se_reduction=8)
    assert (count_parameters(build_model("mine")), count_macs(build_model("mine"))) == (30730, 30720)
