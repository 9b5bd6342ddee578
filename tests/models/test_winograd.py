"""Winograd's algorithm against direct convolutions: outputs, gradients, replaced layers, and its place in a run."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import platformdirs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar import device
from fastcifar.errors import DeviceError
from fastcifar.models import cpp_library, use_winograd, winograd
from fastcifar.models.winograd import WinogradConv2d, winograd_conv2d, winograd_weight_gradient
from fastcifar.recipe import Recipe
from fastcifar.training.train import train
from tests.models.networks import small
from tests.training.optimizer_helpers import make_trainer

RELATIVE_ERROR = 1e-5
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
# n, height, width, channels, output channels, padding
SHAPES = [
    (2, 4, 4, 8, 8, 1),
    (3, 14, 9, 16, 24, 1),
    (1, 5, 6, 24, 8, 0),
    (2, 3, 3, 64, 32, 1),
    (2, 3, 3, 8, 8, 0),
    (1, 1, 2, 8, 16, 1),
    (2, 32, 32, 32, 16, 1),
]
# height and width of the output -> M with the fewest multiplications: those of tiles of M + 2 by M + 2 values
TILE_SIZES = [
    (2, 2, 2),
    (3, 3, 3),
    (4, 4, 4),
    (5, 5, 5),
    (6, 6, 6),
    (12, 12, 6),
    (32, 32, 4),  # 64 tiles of 36 values, as many as 36 tiles of 64 values
    (10, 15, 5),
]


def relative_error(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()


def random_layer(n: int, height: int, width: int, channels: int, out_channels: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(out_channels, channels, 3, 3) / (9 * channels) ** 0.5
    return torch.randn(n, channels, height, width).requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize("chunk_bytes", [winograd.CHUNK_BYTES, 1], ids=["one chunk", "chunks of one tile"])
@pytest.mark.parametrize(("n", "height", "width", "channels", "out_channels", "padding"), SHAPES)
def test_output_and_gradients_equal_those_of_a_direct_convolution(
    n: int,
    height: int,
    width: int,
    channels: int,
    out_channels: int,
    padding: int,
    chunk_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(winograd, "CHUNK_BYTES", chunk_bytes)
    images, weight = random_layer(n, height, width, channels, out_channels)
    expected = F.conv2d(images.double(), weight.double(), padding=padding)
    output = winograd_conv2d(images, weight, padding)
    assert output.shape == expected.shape
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(output, expected) < RELATIVE_ERROR
    grads = torch.randn_like(output)
    gradients = torch.autograd.grad(output, (images, weight), grads)
    for gradient, exact in zip(gradients, torch.autograd.grad(expected, (images, weight), grads.double()), strict=True):
        assert relative_error(gradient, exact) < RELATIVE_ERROR


@pytest.mark.parametrize(("height", "width", "tile_size"), TILE_SIZES)
def test_tile_size_with_the_fewest_multiplications(height: int, width: int, tile_size: int) -> None:
    assert winograd.choose_tile_size(height, width) == tile_size


@pytest.mark.parametrize("tile_size", winograd.TILE_SIZES)
def test_each_position_of_a_filter_and_of_an_image(tile_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single one in the image meets a single one in the filter: nothing is shifted, mirrored or taken twice."""
    monkeypatch.setattr(winograd, "TILE_SIZES", (tile_size,))
    for row, column in [(0, 0), (1, 2), (2, 1), (2, 2)]:
        for y, x in [(0, 0), (3, 4), (5, 0), (6, 6)]:
            images, weight = torch.zeros(1, 8, 7, 7), torch.zeros(8, 8, 3, 3)
            images[0, 3, y, x] = weight[5, 3, row, column] = 1
            expected = F.conv2d(images, weight, padding=1)
            torch.testing.assert_close(winograd_conv2d(images, weight, 1), expected, rtol=0, atol=1e-5)


def test_only_the_needed_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    images, weight = random_layer(1, 4, 4, 8, 8)
    monkeypatch.setattr(winograd, "winograd_weight_gradient", None)
    winograd_conv2d(images, weight.detach(), 1).sum().backward()
    assert images.grad is not None
    monkeypatch.undo()
    winograd_conv2d(images.detach(), weight, 1).sum().backward()
    assert weight.grad is not None


def test_results_do_not_depend_on_the_number_of_threads_in_the_transforms() -> None:
    images = random_layer(3, 12, 12, 16, 8)[0].detach().contiguous(memory_format=torch.channels_last)
    tiles, threads, results = winograd.Tiles(4, 3, 3, 0, 27), torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        inputs = winograd._transform_input(images, 1, tiles)
        outputs = torch.zeros_like(images)
        winograd._write_output(inputs, tiles, outputs)
        results.append((inputs, winograd._transform_gradient(images, tiles), outputs))
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def test_operators_follow_the_rules_of_torch() -> None:
    images, weight = random_layer(1, 5, 4, 8, 16)
    torch.library.opcheck(winograd_conv2d, (images, weight, 1))
    grads = torch.randn(1, 16, 5, 4)
    torch.library.opcheck(winograd_weight_gradient, (images.detach(), grads, 1))


def conv(in_channels: int = 8, out_channels: int = 8, kernel_size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, **{"padding": 1, **options})


@pytest.mark.parametrize(
    ("layer", "is_suitable"),
    [
        (conv(), True),
        (conv(padding=0, bias=False), True),
        (conv(padding=2), False),
        (conv(padding="same"), False),
        (conv(padding_mode="reflect"), False),
        (conv(stride=2), False),
        (conv(dilation=2), False),
        (conv(groups=2), False),
        (conv(kernel_size=1), False),
        (conv(in_channels=3), False),
        (conv(out_channels=12), False),
        (nn.ConvTranspose2d(8, 8, 3), False),
        (nn.Linear(8, 8), False),
    ],
    ids=str,
)
def test_suitable_layers_are_replaced_and_restored(layer: nn.Module, is_suitable: bool) -> None:
    model, kind, state = nn.Sequential(layer), type(layer), layer.state_dict()
    images = torch.randn(2, 3, 8, 8)[:, :1].repeat(1, getattr(layer, "in_channels", 8), 1, 1)
    expected = model(images)
    use_winograd(model)
    assert type(model[0]) is (WinogradConv2d if is_suitable else kind)
    assert state.keys() == layer.state_dict().keys()
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    use_winograd(model, enabled=False)
    assert type(model[0]) is kind


@pytest.mark.parametrize("images", [torch.randn(2, 8, 4, 4).double(), torch.randn(8, 4, 4), torch.randn(2, 8, 4, 4)])
def test_other_inputs_and_exported_programs_use_a_direct_convolution(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = conv().to(images.dtype)
    expected = layer(images)
    use_winograd(layer)
    if images.dim() == 4 and images.dtype == torch.float32:
        program = torch.export.export(layer, (images,))
        assert "winograd" not in str(program.graph)
        layer = program.module()
    else:
        monkeypatch.setattr(winograd, "winograd_conv2d", None)
    assert torch.equal(layer(images), expected)


@pytest.mark.parametrize("arch", ["se68", "speednet", "speed94"])
def test_networks_compute_the_same(arch: str) -> None:
    """At a learning rate this small, two steps do not amplify the differences of rounding."""
    torch.manual_seed(0)
    direct, images, labels = small(arch), torch.randn(8, 3, 32, 32), torch.arange(8)
    fast = small(arch)
    fast.load_state_dict(direct.state_dict())
    use_winograd(fast)
    assert sum(isinstance(module, WinogradConv2d) for module in fast.modules()) >= 2
    losses: list[list[float]] = []
    for model in (direct, fast):
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        losses.append([])
        for _ in range(3):
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@NO_CUDA
def test_choice_of_the_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, is_used in [
        ({"precision": "fp32", "compile": True}, True),
        ({"precision": "fp32", "compile": False}, False),
        ({"precision": "fp32", "compile": False, "winograd": True}, True),
        ({"precision": "fp32", "compile": True, "winograd": False}, False),
        ({"precision": "bf16", "compile": True}, False),
    ]:
        execution = device.choose_execution(Recipe.make(**options))
        assert execution.winograd == is_used, options
        assert f"winograd: {'on' if is_used else 'off'} (" in "\n".join(execution.format_lines())
    with pytest.raises(DeviceError, match=r"^--winograd needs float32 on a CPU, but the run uses bf16 on cpu; use"):
        device.choose_execution(Recipe.make(precision="bf16", winograd=True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert not device.choose_execution(Recipe.make(precision="fp32")).winograd


@pytest.mark.medium
def test_compiled_and_eager_steps_are_equal(tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(winograd, "call_cpp", lambda *args: (calls.append(args[1]), cpp_library.call_cpp(*args)))
    losses = []
    for options in ({"compile": False}, {"compile": False, "winograd": True}, {"compile": True}):
        trainer = make_trainer(tiny(lr=1e-3, **options))
        trainer.optimize()
        uses_winograd = any(isinstance(module, WinogradConv2d) for module in trainer.model.modules())
        assert uses_winograd == trainer.execution.winograd == (len(losses) > 0)
        calls.clear()
        for batch in trainer.batches(0):
            trainer.train_step(batch)
        assert len(set(calls)) == (3 if uses_winograd else 0), "the transforms of input, gradient and output"
        losses.append(trainer.meter.compute().loss)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def fail_to_compile(command: list[str], **_: Any) -> SimpleNamespace:
    return SimpleNamespace(returncode=1, stderr="winograd.cpp:1: fatal error: omp.h not found\nsecond line")


@pytest.mark.medium
def test_direct_convolutions_are_used_if_the_transforms_cannot_be_compiled(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(platformdirs, "user_log_dir", lambda _: str(tmp_path / "log"))
    expected = train(tiny(compile=True, winograd=False))
    cpp_library.load_cpp_library.cache_clear()
    monkeypatch.setattr(subprocess, "run", fail_to_compile)
    problem = r"Winograd's algorithm failed \(RuntimeError: winograd.cpp:1: fatal error: omp.h not found\)"
    with pytest.warns(UserWarning, match=f"{problem}; continuing with compiled steps"):
        summary = train(tiny(compile=True))
    assert "omp.h" in summary.reasons["winograd"]
    assert (summary.test_loss, summary.val_acc) == (expected.test_loss, expected.val_acc)
    with pytest.raises(DeviceError, match=f"{problem}; use --no-winograd"):
        train(tiny(compile=False, winograd=True))
    monkeypatch.undo()
    assert cpp_library.load_cpp_library("winograd")
