"""The networks keep the published keys and compute what their sources define.

Keys are written out here, and forward passes in `reference.py`, independently of `fastcifar.models`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastcifar.models import MODELS
from tests.models.networks import on_meta, small
from tests.models.reference import FORWARDS


def shallow(arch: str, **options: Any) -> nn.Module:
    """Return the narrow network with two blocks in its first stage and one in every other."""
    parameters = inspect.signature(MODELS[arch]).parameters
    blocks = {"blocks": (2,) + (1,) * (len(parameters["blocks"].default) - 1)} if "blocks" in parameters else {}
    return small(arch, **blocks, **options)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # For networks this small, waiting for a second thread takes longer than it saves.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bn_keys(name: str) -> Iterator[str]:
    yield from (f"{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"))


def shortcut_keys(block: str) -> Iterator[str]:
    yield f"{block}.shortcut.0.weight"
    yield from bn_keys(f"{block}.shortcut.1")


def se_resnet_keys(blocks: tuple[int, ...], stem_se: bool, block_se: bool) -> Iterator[str]:
    gate = ("seblock.conv1.weight", "seblock.conv1.bias", "seblock.conv2.weight", "seblock.conv2.bias")
    yield from ("conv1.weight", "linear.weight", "linear.bias", *bn_keys("bn1"))
    yield from gate if stem_se else ()
    for stage, depth in enumerate(blocks):
        for index in range(depth):
            block = f"residual_layers.{stage}.{index}"
            yield from (f"{block}.conv1.weight", f"{block}.conv2.weight")
            yield from (*bn_keys(f"{block}.bn1"), *bn_keys(f"{block}.bn2"))
            yield from (f"{block}.{key}" for key in gate if block_se)
            yield from shortcut_keys(block) if stage > 0 and index == 0 else ()


def coconut_keys(blocks: tuple[int, ...], se: tuple[int, ...] = (), separable: tuple[int, ...] = ()) -> Iterator[str]:
    yield from ("conv1.weight", "conv2.weight", *bn_keys("bn1"), *bn_keys("bn2"), "linear.weight", "linear.bias")
    for stage, depth in enumerate(blocks, start=1):
        for index in range(depth):
            block = f"layer{stage}.{index}"
            for number in (1, 2, 3):
                yield from (f"{block}.conv{number}.weight", *bn_keys(f"{block}.bn{number}"))
            if stage in separable:
                yield f"{block}.pointwise.weight"
            if stage in se:
                yield from (f"{block}.se_block.{fc}.{part}" for fc in ("fc1", "fc2") for part in ("weight", "bias"))
            yield from shortcut_keys(block) if index == 0 else ()


KEYS: dict[str, Iterator[str] | list[str]] = {
    "se68": list(se_resnet_keys((4, 4, 3), stem_se=True, block_se=False)),
    "se55": list(se_resnet_keys((2, 2, 2, 2), stem_se=True, block_se=False)),
    "se68_block": list(se_resnet_keys((4, 4, 3), stem_se=False, block_se=True)),
    "se68_none": list(se_resnet_keys((4, 4, 3), stem_se=False, block_se=False)),
    "coconut_leaky": list(coconut_keys((2, 4, 6, 2))),
    "coconut_se": list(coconut_keys((2, 4, 6, 2), se=(3,))),
    "coconut_2452": list(coconut_keys((2, 4, 5, 2), se=(3, 4))),
    "coconut_sep": list(coconut_keys((3, 4, 6, 3), separable=(3, 4))),
    "coconut_over": list(coconut_keys((2, 4, 6, 2), se=(3, 4))),
}


@pytest.mark.parametrize("dropout", [None, 0.1])
@pytest.mark.parametrize("arch", KEYS)
def test_state_dict_keys_are_the_published_ones(arch: str, dropout: float | None) -> None:
    assert sorted(on_meta(arch, dropout=dropout).state_dict()) == sorted(KEYS[arch])


def test_published_shapes() -> None:
    se55, sep = on_meta("se55").state_dict(), on_meta("coconut_sep").state_dict()
    assert se55["seblock.conv1.weight"].shape == (4, 64, 1, 1)
    assert se55["residual_layers.3.0.shortcut.0.weight"].shape == (268, 232, 1, 1)
    assert sep["layer3.0.conv2.weight"].shape == (128, 1, 3, 3)
    assert sep["layer3.0.pointwise.weight"].shape == (128, 128, 1, 1)
    assert sep["layer2.0.conv2.weight"].shape == (64, 64, 3, 3)
    assert on_meta("coconut_se").state_dict()["layer3.0.se_block.fc1.weight"].shape == (32, 512)


@pytest.mark.parametrize("arch", FORWARDS)
def test_forward_equals_the_definition_in_float64(arch: str) -> None:
    torch.manual_seed(0)
    model = small(arch, se_reduction=4).double().eval()
    # Away from the initial state, in which BN is nearly the identity and hides a wrong order.
    for name, value in model.state_dict().items():
        if ".bn" in name or name.startswith("bn") or "shortcut.1" in name:
            value.copy_(torch.rand_like(value) + 0.5 if value.is_floating_point() else value)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = FORWARDS[arch](model.state_dict(), images)
        torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


def test_other_image_sizes_work() -> None:
    assert small("se55")(torch.randn(2, 3, 48, 40)).shape == (2, 10)
    assert small("coconut_sep")(torch.randn(2, 3, 48, 40)).shape == (2, 10)


@pytest.mark.parametrize("arch", MODELS)
def test_forward_keeps_channels_last_and_gradients_are_finite(arch: str) -> None:
    torch.manual_seed(0)
    model = shallow(arch, num_classes=7).to(memory_format=torch.channels_last)
    maps: list[tuple[str, bool]] = []
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _module, _inputs, output, name=name: (
                maps.append((name, output.is_contiguous(memory_format=torch.channels_last)))
                if output.dim() == 4
                else None
            )
        )
    logits = model(torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last))
    assert logits.shape == (2, 7)
    assert len(maps) > 5
    assert [name for name, kept in maps if not kept] == []
    F.cross_entropy(logits, torch.tensor([1, 6])).backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("arch", MODELS)
def test_the_forward_pass_is_one_graph(arch: str) -> None:
    torch.manual_seed(0)
    model, images = shallow(arch).eval(), torch.randn(2, 3, 32, 32)
    torch.compiler.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(images), model(images))
