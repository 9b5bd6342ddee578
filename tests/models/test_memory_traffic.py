"""What a network moves, against a count by hand; its convolutions, against another way of counting."""

from __future__ import annotations

import pytest
from torch import nn

from fastcifar.models import MODELS, build_model, count_macs
from fastcifar.models.count import count_conv_calls, feature_map_bytes_per_image


def test_a_convolution_and_its_norm_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    images, maps = 3 * 32 * 32, 8 * 16 * 16
    assert feature_map_bytes_per_image(model, training=True, element_size=2) == 2 * (3 * (images + maps) + 8 * maps)
    assert feature_map_bytes_per_image(model, training=False, element_size=4) == 4 * (images + maps + 2 * maps)


def test_se68_moves_what_its_limit_was_computed_with() -> None:
    assert feature_map_bytes_per_image(build_model("se68"), training=True) == pytest.approx(30.7e6, rel=0.01)


@pytest.mark.parametrize("arch", MODELS)
def test_convolutions_have_the_macs_of_the_network_but_for_its_linear_layers(arch: str) -> None:
    model = build_model(arch)
    linear = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear))
    assert sum(conv.macs * calls for conv, calls in count_conv_calls(model).items()) == count_macs(model) - linear
