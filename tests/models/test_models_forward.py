"""The networks have the published keys and compute what their sources define.

Keys and forward passes are written out in `reference.py`, independently of `fastcifar.models`.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar.models import MODELS
from tests.models.networks import on_meta, small
from tests.models.reference import FORWARDS, Weights


def shallow(arch: str, **options: Any) -> nn.Module:
    """Return the narrow network with two blocks in its first stage and one in every other."""
    parameters = inspect.signature(MODELS[arch]).parameters
    blocks = {"blocks": (2,) + (1,) * (len(parameters["blocks"].default) - 1)} if "blocks" in parameters else {}
    return small(arch, **blocks, **options)


def test_published_shapes() -> None:
    se55, sep = on_meta("se55").state_dict(), on_meta("coconut_sep").state_dict()
    assert se55["seblock.conv1.weight"].shape == (4, 64, 1, 1)
    assert se55["residual_layers.3.0.shortcut.0.weight"].shape == (268, 232, 1, 1)
    assert sep["layer3.0.conv2.weight"].shape == (128, 1, 3, 3)
    assert sep["layer3.0.pointwise.weight"].shape == (128, 128, 1, 1)
    assert sep["layer2.0.conv2.weight"].shape == (64, 64, 3, 3)
    assert on_meta("coconut_se").state_dict()["layer3.0.se_block.fc1.weight"].shape == (32, 512)


@pytest.mark.parametrize("arch", FORWARDS)
def test_keys_and_forward_equal_the_definition_in_float64(arch: str) -> None:
    torch.manual_seed(0)
    model = small(arch, se_reduction=4).double().eval()
    # Away from the initial state, in which BN is nearly the identity and hides a wrong order.
    for name, value in model.state_dict().items():
        if ".bn" in name or name.startswith("bn") or "shortcut.1" in name:
            value.copy_(torch.rand_like(value) + 0.5 if value.is_floating_point() else value)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        weights = Weights(model.state_dict())
        expected = FORWARDS[arch](weights, images)
        torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
    assert weights.used == set(weights.state) == set(on_meta(arch, dropout=0.1).state_dict())


@pytest.mark.parametrize("arch", ["se55", "coconut_sep", *(name for name in MODELS if name.startswith("speed9"))])
@pytest.mark.parametrize("size", [(16, 16), (24, 28), (48, 40)])
def test_other_image_sizes_work(arch: str, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        assert small(arch)(torch.empty(2, 3, *size)).shape == (2, 10)


@pytest.mark.parametrize("arch", MODELS)
def test_forward_keeps_channels_last_and_gradients_are_finite(arch: str) -> None:
    torch.manual_seed(0)
    model = shallow(arch, num_classes=7).to(memory_format=torch.channels_last)
    maps: list[bool] = []  # of every feature map: whether it is in channels_last

    def check_output(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        maps.extend([output.is_contiguous(memory_format=torch.channels_last)] * (output.dim() == 4))

    for module in model.modules():
        module.register_forward_hook(check_output)
    logits = model(torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last))
    assert logits.shape == (2, 7)
    assert len(maps) > 5
    assert all(maps)
    F.cross_entropy(logits, torch.tensor([1, 6])).backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.medium
@pytest.mark.parametrize("arch", MODELS)
def test_the_forward_pass_is_one_graph(arch: str) -> None:
    model, images = shallow(arch).eval(), torch.randn(2, 3, 32, 32)
    torch.compiler.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(images), model(images))
