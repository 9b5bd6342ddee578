"""Checkpoints of the source projects: safe and strict loading, and losses equal to an independent computation."""

from __future__ import annotations

import argparse
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcifar.data import cifar
from fastcifar.data.normalization import normalization_mean_std, normalization_name
from fastcifar.errors import CheckpointError, UsageError
from fastcifar.evaluation.evaluate_run import evaluate_run
from fastcifar.models import MODELS, build_model
from fastcifar.recipe import Recipe
from fastcifar.training import checkpoint
from fastcifar.training.train import train
from tests.models.reference import FORWARDS, Weights

# The values in the source projects, with all digits.
PER_PIXEL = ((0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784))
PER_IMAGE = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
SMALL = "synthetic:100"  # 20 test images


def random_state_dict(arch: str) -> dict[str, Tensor]:
    """Return random weights with running statistics near those of the images, so that logits differ between images."""
    torch.manual_seed(5)
    model = build_model(arch)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # use the statistics of the batch below
    with torch.no_grad():
        model((torch.from_numpy(cifar.load_dataset(SMALL).test.images).float() / 255 - 0.5) / 0.25)
        for norm in norms:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean += 0.3 * norm.running_var.sqrt() * torch.randn_like(norm.bias)
            norm.running_var *= torch.rand_like(norm.bias) + 0.5
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.3)
        model.get_submodule("linear").weight *= 5  # type: ignore[operator]
    return model.state_dict()


def save_file(folder: Path, **content: Any) -> str:
    torch.save(content, folder / "ckpt.pth")
    return str(folder / "ckpt.pth")


def reference_loss(arch: str, state: dict[str, Tensor], mean_std: tuple[tuple[float, ...], tuple[float, ...]]) -> float:
    test = cifar.load_dataset(SMALL).test
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in mean_std)
    images = (torch.from_numpy(test.images).float() / 255 - mean) / std
    with torch.no_grad():
        return F.cross_entropy(FORWARDS[arch](Weights(state), images).double(), torch.from_numpy(test.labels)).item()


@pytest.mark.medium
@pytest.mark.parametrize(
    ("arch", "mean_std", "prefix"),
    [
        ("se68", PER_PIXEL, "module."),
        ("coconut_leaky", PER_IMAGE, "module."),
        ("coconut_se", PER_IMAGE, ""),
        ("coconut_sep", PER_IMAGE, ""),
    ],
)
def test_loss_equals_an_independent_computation(
    tmp_path: Path, arch: str, mean_std: tuple[tuple[float, ...], tuple[float, ...]], prefix: str
) -> None:
    state = random_state_dict(arch)
    net = OrderedDict((prefix + key, value) for key, value in state.items())
    file = save_file(tmp_path, net=net, acc=np.float64(95.49), epoch=173, optimizer=optimizer_state())
    scores = evaluate_run(file, arch=arch, data=SMALL, device="cpu", precision="fp32")
    assert scores["test_loss"] == pytest.approx(reference_loss(arch, state, mean_std), rel=1e-4)
    assert (scores["arch"], scores["total"], scores["eval_weights"]) == (arch, 20, "published")
    other = PER_IMAGE if mean_std is PER_PIXEL else PER_PIXEL
    normalize = "kuangliu" if other is PER_IMAGE else "cifar10"
    scores = evaluate_run(file, arch=arch, data=SMALL, device="cpu", precision="fp32", normalize=normalize)
    assert scores["normalize"] == normalize
    assert scores["test_loss"] == pytest.approx(reference_loss(arch, state, other), rel=1e-4)


def optimizer_state() -> dict[str, Any]:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("arch", MODELS)
def test_default_normalization_of_each_architecture(arch: str) -> None:
    assert normalization_mean_std(Recipe(arch=arch)) == (PER_IMAGE if arch.startswith("coconut") else PER_PIXEL)
    assert normalization_name(Recipe(arch=arch, dataset="cifar100")) == "cifar100"
    assert normalization_name(Recipe(arch=arch, normalize="0.5:0.25")) == "0.5:0.25"


@pytest.mark.parametrize(
    "acc", [95.49, 95, np.float64(95.49), np.float32(95.5), np.int64(95), np.bool_(True), torch.tensor(95.49)]
)
def test_numpy_scalars_are_loaded_as_python_numbers(tmp_path: Path, acc: Any) -> None:
    torch.save({"net": {}, "acc": acc}, tmp_path / "f.pt")
    loaded = checkpoint.read_checkpoint(tmp_path / "f.pt", allow_foreign=True)["acc"]
    assert loaded == acc
    assert not isinstance(loaded, np.generic)


class Scalar:
    """Pickles as a call of NumPy's scalar function with arbitrary arguments."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return np.float64(1).__reduce__()[0], self.arguments


class MaliciousObject:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch sentinel",)


@pytest.mark.medium
@pytest.mark.parametrize(
    "acc",
    [
        MaliciousObject(),
        argparse.Namespace(lr=0.1),
        Scalar(np.dtype("O"), MaliciousObject()),
        Scalar(np.dtype("O"), b"12345678"),
        Scalar(np.dtype("V8"), b"12345678"),
        Scalar(np.dtype("f8"), b"1234"),
        Scalar(np.dtype(">f8"), b"12345678"),
        Scalar(np.dtype("U1000000"), b""),
        Scalar(1, 2),
        np.arange(3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_fault09_only_numbers_are_accepted_beside_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, acc: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    file = save_file(tmp_path, net=random_state_dict("se68_none"), acc=acc)
    with pytest.raises(CheckpointError) as caught:
        evaluate_run(file, arch="se68_none", data=SMALL)
    assert "\n" not in str(caught.value)
    names = {MaliciousObject: "posix.system", argparse.Namespace: "argparse.Namespace"}
    if name := names.get(type(acc)):
        assert f"it refers to {name}, which is not allowed in checkpoints" in str(caught.value)
    assert not (tmp_path / "sentinel").exists()


@pytest.mark.slow
def test_error_without_arch_names_matching_architectures(tmp_path: Path) -> None:
    with torch.device("meta"):
        states = {arch: build_model(arch).state_dict() for arch in MODELS}
    assert checkpoint.matching_architectures(states["coconut_sep"]) == [("coconut_sep", "cifar10")]
    wrapped = {f"module.{key}": value for key, value in states["se55"].items()}
    assert checkpoint.matching_architectures(wrapped) == [("se55", "cifar10")]
    names = ["resnet", "se68_none"]
    assert checkpoint.matching_architectures(states["se68_none"]) == [(name, "cifar10") for name in names]
    assert checkpoint.matching_architectures({"weight": torch.ones(2)}) == []
    file = str(tmp_path / "bare.pth")
    torch.save(random_state_dict("se55"), file)
    with pytest.raises(CheckpointError, match="does not name the architecture of its weights; set --arch se55"):
        evaluate_run(file, data=SMALL)
    assert evaluate_run(file, arch="se55", data=SMALL, device="cpu", precision="fp32")["total"] == 20
    with pytest.raises(CheckpointError, match="set --arch; no known architecture matches"):
        evaluate_run(save_file(tmp_path, net={"weight": torch.ones(2)}, acc=1.0), data=SMALL)


def test_mismatched_files_are_rejected(tmp_path: Path) -> None:
    file = save_file(tmp_path, net=build_model("se55").state_dict(), acc=1.0, epoch=1)
    with pytest.raises(CheckpointError, match=r"lacks residual_layers\.0\.2\.bn1.*check the architecture"):
        evaluate_run(file, arch="se68", data=SMALL)
    with pytest.raises(UsageError, match="did you mean 'se68'"):
        evaluate_run(file, arch="se86", data=SMALL)
    for content in ({"net": [1, 2]}, {"net": {}}, {"net": {"weight": 3}}, {"acc": 1.0}):
        with pytest.raises(CheckpointError, match="contains no weights"):
            evaluate_run(save_file(tmp_path, **content), arch="se68", data=SMALL)


@pytest.mark.medium
def test_fault22_parameter_limit_applies_to_published_checkpoints(tmp_path: Path) -> None:
    file = save_file(tmp_path, net=random_state_dict("coconut_over"), acc=1.0, epoch=1)
    with pytest.raises(UsageError, match="--max-params 5237546"):
        evaluate_run(file, arch="coconut_over", data=SMALL, device="cpu")
    assert evaluate_run(file, arch="coconut_over", data=SMALL, device="cpu", max_params=5_237_546)["total"] == 20


def test_fastcifar_checkpoint_contains_its_architecture(tiny: Callable[..., Recipe]) -> None:
    run = train(tiny(max_steps=1)).run
    assert evaluate_run(run, arch="resnet")["eval_weights"] == "last"
    with pytest.raises(CheckpointError, match="contains resnet, not se68; remove --arch"):
        evaluate_run(run, arch="se68")
