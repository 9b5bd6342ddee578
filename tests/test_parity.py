"""Parity with timm, torch.optim, torchvision and torch's operation counter, beside the comparisons in other tests."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers import SEModule
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models.resnet import BasicBlock, ResNet
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, accuracy
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets

from fastcifar.data.cifar import DATASETS
from fastcifar.models import MODELS, build_model, count_macs
from fastcifar.recipe import Recipe
from fastcifar.training.step import Ema, loss_and_correct
from tests.models.networks import on_meta
from tests.training.optimizer_helpers import NO_SKIP, SCALER, build_optimizer, build_schedule, set_gradients

RENAMED_LAYERS = {  # parts of state-dict keys here and in timm
    "residual_layers.0.": "layer1.",
    "residual_layers.1.": "layer2.",
    "residual_layers.2.": "layer3.",
    "residual_layers.3.": "layer4.",
    "seblock.conv1": "se.fc1",
    "seblock.conv2": "se.fc2",
    "shortcut": "downsample",
    "linear.": "fc.",
}


def timm_key(key: str) -> str:
    for ours, theirs in RENAMED_LAYERS.items():
        key = key.replace(ours, theirs)
    return key


@pytest.mark.parametrize("se", ["none", "block"])
def test_residual_networks_equal_timm(se: str) -> None:
    """Compare outputs, gradients and running statistics; timm's stem for 224x224 images is replaced."""
    depths, widths = (2, 1, 2, 1), (16, 24, 32, 48)
    model = build_model("resnet", num_classes=7, blocks=depths, channels=widths, se=se, se_reduction=8)
    attention = {"attn_layer": partial(SEModule, rd_ratio=1 / 8, rd_divisor=1)} if se == "block" else {}
    block: Any = BasicBlock
    reference = ResNet(block, depths, num_classes=7, channels=widths, block_args=attention)
    reference.conv1, reference.maxpool = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.Identity()
    reference.bn1 = nn.BatchNorm2d(16)
    first: Any = reference.get_submodule("layer1.0")
    first.conv1, first.downsample = nn.Conv2d(16, 16, 3, 1, 1, bias=False), None
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.rand(value.shape, generator=generator) * 0.2 + 0.05 if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    reference.load_state_dict({timm_key(name): value for name, value in state.items()})
    model, reference = model.double(), reference.double()
    images = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 3, 6, 3])
    for network in (model.train(), reference.train()):
        nn.functional.cross_entropy(network(images), labels).backward()
    expected = dict(reference.named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[timm_key(name)].grad, msg=name)
    buffers = dict(reference.named_buffers())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, buffers[timm_key(name)], msg=name)
    torch.testing.assert_close(model.eval()(images), reference.eval()(images))


@pytest.mark.medium
@pytest.mark.parametrize("arch", MODELS)
def test_macs_equal_the_operation_counter_of_torch(arch: str) -> None:
    model = on_meta(arch)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 32, 32, device="meta"))
    assert 2 * count_macs(model) == counter.get_total_flops()


def test_moving_average_equals_timm() -> None:
    """After the first updates, whose weight is larger, the decay is constant."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    average, reference = Ema(model, decay=0.9), ModelEmaV3(model, decay=0.9)
    average.num_updates.fill_(1000)
    for _ in range(20):
        model(torch.randn(4, 3, 8, 8) * 2 + 1)  # changes the running statistics
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight))
        average.update()
        reference.update(model)
    expected = reference.module.state_dict()
    for name, value in average.state_dict(model).items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("warmup_epochs", [0, 2])
def test_cosine_schedule_with_warm_up_equals_timm(warmup_epochs: int) -> None:
    steps, warmup, peak = 40, 4 * warmup_epochs, 0.4
    schedule = build_schedule(Recipe(lr=peak, min_lr=0.01, epochs=10, warmup_epochs=warmup_epochs), 4)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    reference = CosineLRScheduler(
        optimizer,
        t_initial=steps - warmup,
        lr_min=0.01,
        warmup_t=warmup,
        warmup_lr_init=peak / (warmup + 1),
        warmup_prefix=True,
        t_in_epochs=False,
    )
    for step in range(steps):
        reference.step_update(step)
        assert schedule.lr_at(step) == pytest.approx(optimizer.param_groups[0]["lr"]), step


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_loss_equals_timm(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 10, generator=generator) * 3, torch.tensor([0, 9, 3, 3, 5, 1])
    loss, correct = loss_and_correct(lambda images: images, smoothing)(logits, labels)
    torch.testing.assert_close(loss, LabelSmoothingCrossEntropy(smoothing)(logits, labels))
    assert correct == accuracy(logits, labels)[0] * 6 / 100
    soft = nn.functional.one_hot(labels, 10) * (1 - smoothing) + smoothing / 10
    torch.testing.assert_close(loss, SoftTargetCrossEntropy()(logits, soft))


def test_weight_decay_without_biases_equals_timm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, bias=False), nn.Linear(6, 5))
    reference_model = copy.deepcopy(model)
    recipe = Recipe(optimizer="sgd", lr=0.1, weight_decay=0.05, bias_decay=False)
    optimizer = build_optimizer(model, recipe)
    reference = torch.optim.SGD(param_groups_weight_decay(reference_model, 0.05), lr=0.1, momentum=0.9)
    compare_steps(model, reference_model, optimizer, reference, 1e-6)


def test_muon_equals_torch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20, bias=False), nn.Linear(20, 8, bias=False))
    reference_model = copy.deepcopy(model)
    recipe = Recipe(optimizer="muon", lr=0.02, weight_decay=0.01, optimizer_arg={"linear": True})
    reference = torch.optim.Muon(reference_model.parameters(), lr=0.02, weight_decay=0.01, momentum=0.95)
    compare_steps(model, reference_model, build_optimizer(model, recipe), reference, 5e-3)


def compare_steps(
    model: nn.Module, reference_model: nn.Module, optimizer: Any, reference: torch.optim.Optimizer, tolerance: float
) -> None:
    """Make 30 steps of both optimizers with the same gradients, and compare the weights after each of them."""
    optimizer.set_lr(reference.param_groups[0]["lr"])
    for step in range(30):
        set_gradients([model, reference_model], step)
        optimizer.step(SCALER, NO_SKIP)
        optimizer.after_step(step + 1)
        reference.step()
        for weight, expected in zip(model.parameters(), reference_model.parameters(), strict=True):
            torch.testing.assert_close(weight, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "reference"), [("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)])
def test_official_files_are_those_of_torchvision(name: str, reference: type[datasets.CIFAR10]) -> None:
    spec = DATASETS[name]
    assert (spec.url, spec.archive_md5) == (reference.url, reference.tgz_md5)
    names = "airplane automobile bird cat deer dog frog horse ship truck" if name == "cifar10" else ""
    assert " ".join(spec.class_names) == names  # of batches.meta; CIFAR-100's are read from its file
    for split, files in (("train", reference.train_list), ("test", reference.test_list)):
        assert [[batch.name, batch.md5] for batch in spec.python.batches if batch.split == split] == files
    assert (spec.python.meta_file, spec.python.meta_md5) == (reference.meta["filename"], reference.meta["md5"])
