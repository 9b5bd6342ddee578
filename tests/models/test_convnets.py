"""Test the networks for short schedules: whitening, initialization, trainable parameters and invalid options."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastcifar.errors import UsageError
from fastcifar.models import build_model, count_parameters
from fastcifar.models.convnets import AirbenchNet, ConvBlock, ConvGroup, CroppedConvBlock, PaddedConvBlock
from tests.models.networks import on_meta


def tiny(**options: object) -> AirbenchNet:
    torch.manual_seed(0)
    model = build_model("speed94", **{"channels": (32, 40), "blocks": (2, 3), **options})
    assert isinstance(model, AirbenchNet)
    return model


def smooth_images(count: int) -> Tensor:
    """Return images with correlated neighboring pixels and channels, like photographs."""
    noise = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return F.avg_pool2d(noise, 3, 1, 1) * 2 + noise[:, :1] * 0.3


@pytest.mark.medium
def test_the_stem_whitens_the_images() -> None:
    model, images = tiny(), smooth_images(1100)
    model.init_whitening(images)
    responses = F.conv2d(images, model.whiten.weight)
    assert responses.shape == (1100, 24, 31, 31)
    torch.testing.assert_close(responses[:, 12:], -responses[:, :12])
    flat = responses[:, :12].transpose(0, 1).flatten(1).double()
    moments = flat @ flat.T / flat.shape[1]
    variances = moments.diagonal()
    torch.testing.assert_close(moments, torch.diag(variances), atol=1e-4, rtol=0)
    patches = F.unfold(images, 2).double().transpose(0, 1).flatten(1)
    along = torch.linalg.eigvalsh(patches @ patches.T / patches.shape[1])
    torch.testing.assert_close(variances.sort()[0], (along / (along + 5e-4)).sort()[0], atol=1e-4, rtol=0)


def test_whitening_is_deterministic() -> None:
    model, images = tiny(), smooth_images(200)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    model.init_whitening(images)
    first = model.whiten.weight.clone()
    model.init_whitening(images)
    assert torch.equal(model.whiten.weight, first)
    assert torch.equal(torch.get_rng_state(), random)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, kept[name])]
    assert changed == ["whiten.weight"]


@pytest.mark.medium
@pytest.mark.parametrize("name", ["speed94", "speed95", "speed96"])
def test_batch_norm_has_the_momentum_of_airbench_and_the_eps_of_torch(name: str) -> None:
    norms = [module for module in on_meta(name).modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.4, 1e-5)}


def test_convolutions_are_initialized_to_the_identity() -> None:
    model = tiny()
    images = torch.randn(2, 24, 8, 8)
    conv = model.get_submodule("groups.0.first.conv")
    assert isinstance(conv, nn.Conv2d)
    torch.testing.assert_close(conv(images)[:, :24], images[:, :, 1:-1, 1:-1])
    assert conv.weight[24:].abs().max() > 0


def first_blocks() -> tuple[ConvBlock, PaddedConvBlock, CroppedConvBlock]:
    blocks = (ConvBlock(3, 5, nn.GELU, pool=True), PaddedConvBlock(3, 5, nn.GELU), CroppedConvBlock(3, 5, nn.GELU))
    for block in blocks:
        block.load_state_dict(blocks[0].state_dict())
    return blocks


@pytest.mark.parametrize("size", [(31, 31), (15, 7), (8, 8), (7, 8), (6, 5)])
def test_rows_and_columns_that_the_pooling_drops_are_not_computed(size: tuple[int, int]) -> None:
    images = torch.randn(4, 3, *size)
    full, padded, cropped = first_blocks()
    results = []
    for block in (full, padded):
        inputs = images.clone().requires_grad_()
        output = block(inputs)
        output.square().sum().backward()
        results.append((output, inputs.grad, block.conv.weight.grad, block.bn.running_var))
    assert results[0][0].shape == (4, 5, size[0] // 2, size[1] // 2)
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    even = images[:, :, : size[0] // 2 * 2, : size[1] // 2 * 2]
    torch.testing.assert_close(cropped(images), full(even))


def test_operations_of_even_maps() -> None:
    flops = []
    for block in first_blocks():
        with FlopCounterMode(display=False) as counter:
            block(torch.randn(1, 3, 31, 31))
        flops.append(counter.get_total_flops())
    assert flops == [2 * side**2 * 3 * 5 * 9 for side in (31, 30, 30)]


def test_odd_maps_of_a_network_are_padded_or_cropped() -> None:
    blocks = {odd_maps: tiny(odd_maps=odd_maps).get_submodule("groups.1.first") for odd_maps in ("pad", "crop")}
    assert isinstance(blocks["pad"], PaddedConvBlock)
    assert isinstance(blocks["crop"], CroppedConvBlock)
    assert isinstance(tiny().get_submodule("groups.0.first"), PaddedConvBlock)


def test_frozen_parameters_are_not_counted() -> None:
    """Count whitening bias, two groups of 2 and 3 convolutions with BatchNorm biases, and linear layer by hand."""
    model = tiny()
    convolutions = 9 * (24 * 32 + 32 * 32 + 32 * 40 + 2 * 40 * 40)
    assert count_parameters(model) == 24 + convolutions + 2 * 32 + 3 * 40 + 40 * 10
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    norms = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert frozen == {"whiten.weight", *norms}
    assert all(torch.equal(model.state_dict()[name], torch.ones_like(model.state_dict()[name])) for name in norms)


def test_the_linear_layer_has_unit_standard_deviation_and_divides_by_its_features() -> None:
    model = tiny().eval()
    assert model.linear.weight.std().item() == pytest.approx(1)
    assert model.linear.bias is None
    images = torch.randn(2, 3, 32, 32)
    features = model.groups(model.activation(model.whiten(images))).amax((2, 3))
    torch.testing.assert_close(model(images), features @ model.linear.weight.T / 40)


@pytest.mark.parametrize(("depth", "residual", "added"), [(2, True, False), (3, False, False), (3, True, True)])
def test_deep_groups_add_the_result_of_their_first_convolution(depth: int, residual: bool, added: bool) -> None:
    group = ConvGroup(8, 16, depth, nn.ReLU, 0, residual, "pad").eval()
    x = torch.randn(2, 8, 8, 8)
    first = group.first(x)
    torch.testing.assert_close(group(x), group.rest(first) + (first if added else 0))


def test_options() -> None:
    assert any("seblock.conv1" in key for key in tiny(se="block").state_dict())
    assert any(isinstance(module, nn.Dropout) for module in tiny(dropout=0.1).modules())
    assert count_parameters(on_meta("speed94", width=0.5)) < count_parameters(on_meta("speed94")) / 3
    for options, message in (({"se": "stem"}, "SE placement"), ({"blocks": (1,) * 5, "channels": (8,) * 5}, "2 to 4")):
        with pytest.raises(UsageError, match=message):
            tiny(**options)
