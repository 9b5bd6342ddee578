"""Casts and counters in multi-tensor kernels give the same results as autocast and BatchNorm by themselves."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastcifar.models import build_model, enable_fused_ops
from fastcifar.models.count import count_training_calls
from fastcifar.recipe import Recipe
from fastcifar.training.fine_tuning import freeze
from fastcifar.training.multi_tensor import share_kernels_between_layers
from fastcifar.training.step import DTYPES, LossAndCorrect, build_forward, loss_and_correct

CPU = torch.device("cpu")


class UnusualNetwork(nn.Module):
    """Uses its layers in every way that must not be replaced, and one as usual."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.repeated = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", bias=False)
        self.frozen = nn.Conv2d(4, 4, 1)
        self.frozen.weight.requires_grad_(False)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=None), nn.BatchNorm2d(4)
        self.untracked = nn.BatchNorm2d(4, track_running_stats=False)
        self.normalized = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
        self.shared1, self.shared2 = nn.Linear(4, 4), nn.Linear(4, 4)
        self.shared2.weight = self.shared1.weight
        self.float_linear = nn.Linear(4, num_classes)
        self.unused = nn.Linear(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.bn1(self.repeated(self.bn1(self.repeated(self.conv(images)))))
        x = self.untracked(self.bn3(self.bn2(self.frozen(x)))) * self.conv.weight.float().square().mean()
        x = F.relu(self.normalized(x)).mean((2, 3))
        x = self.shared2(self.shared1(x)).float()
        with torch.autocast("cpu", enabled=False):
            return self.float_linear(x)


def make_network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "unusual":
        model = UnusualNetwork().train()
        model.bn3.requires_grad_(False).eval()
    else:
        model = build_model("resnet", 10, blocks=(1, 1), channels=(8, 16), se="block").train()
    if name == "fused":
        enable_fused_ops(model)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it


def make_loss_function(model: nn.Module, precision: str) -> LossAndCorrect:
    return loss_and_correct(build_forward(model, (0.5,) * 3, (0.2,) * 3, precision, CPU), 0.1)


def random_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images.contiguous(memory_format=torch.channels_last), torch.arange(8)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", ["resnet", "fused", "unusual"])
def test_gradients_and_buffers_are_those_of_autocast(name: str, precision: str) -> None:
    reference = make_network(name)
    model = copy.deepcopy(reference)
    shared = share_kernels_between_layers(make_loss_function(model, precision), model, DTYPES[precision], CPU)
    plain = make_loss_function(reference, precision)
    for _ in range(2):
        results = []
        for owner, function in ((reference, plain), (model, shared)):
            owner.zero_grad()
            loss, correct = function(*random_batch())
            loss.backward()
            results.append((loss.item(), correct.item()))
        assert results[0] == results[1]
    for (key, value), expected in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.equal(value, expected), key
    for (key, weight), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (weight.grad is None) == (expected.grad is None), key
        if weight.grad is None or expected.grad is None:
            continue
        assert weight.grad.stride() == expected.grad.stride(), key
        # The two casts of a shared weight have their own gradients, which are added in float32.
        tolerance = 0.02 if "shared" in key and precision != "fp32" else 0.0
        torch.testing.assert_close(weight.grad, expected.grad, rtol=tolerance, atol=tolerance, msg=key)


def test_calls_in_training_are_counted_by_name() -> None:
    model = make_network("unusual")
    calls = count_training_calls(model, "cpu", torch.bfloat16)
    assert calls.tracked_batches == {"bn1": 2}
    expected = {"conv": 1, "repeated": 2, "frozen": 1, "normalized": 1, "shared1": 1, "shared2": 1}
    names = [*expected, "float_linear", "unused"]
    assert {name: calls.autocast[name] for name in names} == {**expected, "float_linear": 0, "unused": 0}
    assert not count_training_calls(model, "cpu", torch.float32).autocast
    fused = count_training_calls(make_network("fused"), "cpu", torch.bfloat16)
    assert len(fused.tracked_batches) == 6
    assert set(fused.tracked_batches.values()) == {1}


def test_network_that_cannot_run_on_the_meta_device_is_left_as_it_is() -> None:
    class HeadInFloat32(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            with torch.autocast(input.device.type, enabled=False):  # not supported on the meta device
                return super().forward(input.float())

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), HeadInFloat32(4 * 30 * 30, 10))
    calls = count_training_calls(model, "cpu", torch.bfloat16)
    assert not calls.autocast
    assert not calls.tracked_batches


class OperationCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_counter = isinstance(args[0], Tensor) and args[0].dtype == torch.int64 and args[0].ndim == 0
        name = func.overloadpacket.__name__
        self.counts[f"{name} of a counter" if is_counter else name] += 1
        return func(*args, **(kwargs or {}))


def test_there_is_one_operation_for_all_layers() -> None:
    model = make_network("resnet")
    plain = make_loss_function(model, "bf16")
    counts = []
    for function in (plain, share_kernels_between_layers(plain, model, torch.bfloat16, CPU)):
        model.zero_grad()
        with OperationCounter() as counter:
            function(*random_batch())[0].backward()
        counts.append(counter.counts)
    num_norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    num_layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())
    assert counts[0]["add_ of a counter"] == num_norms
    assert counts[1]["add_ of a counter"] == 0
    assert counts[0]["_to_copy"] - counts[1]["_to_copy"] == 2 * num_layers
    assert counts[1] - counts[0] == {"_foreach_copy_": 2, "_foreach_add_": 1, "empty_like": 2 * num_layers}


def test_no_gradient_is_computed_for_frozen_layers() -> None:
    model = make_network("resnet")
    freeze(model, Recipe(arch="resnet", blocks=(1, 1), channels=(8, 16), freeze="conv1,bn1,residual_layers.0"))
    plain = make_loss_function(model, "bf16")
    for function in (plain, share_kernels_between_layers(plain, model, torch.bfloat16, CPU)):
        with OperationCounter() as counter:
            function(*random_batch())[0].backward()
        names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
        assert len(names) == 10
        assert counter.counts["convolution_backward"] == 5  # two of the block, two of its SE and its shortcut
        assert counter.counts["native_batch_norm_backward"] == 3


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_restored(fails: bool) -> None:
    model = make_network("resnet")
    before = {name: (vars(module).copy(), dict(module._buffers)) for name, module in model.named_modules()}
    plain = make_loss_function(model, "bf16")

    def function(*batch: Tensor) -> tuple[Tensor, Tensor]:
        result = plain(*batch)
        assert all(
            module.num_batches_tracked is None for module in model.modules() if isinstance(module, nn.BatchNorm2d)
        )
        if fails:
            raise RuntimeError("in the forward pass")
        return result

    call: Callable[..., Any] = share_kernels_between_layers(function, model, torch.bfloat16, CPU)
    if fails:
        with pytest.raises(RuntimeError, match="in the forward pass"):
            call(*random_batch())
    else:
        call(*random_batch())
    for name, module in model.named_modules():
        attributes, buffers = before[name]
        assert vars(module).keys() == attributes.keys()
        assert module._buffers.keys() == buffers.keys()
        assert all(value is buffers[key] for key, value in module._buffers.items())
