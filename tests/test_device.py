"""The choice of device, precision, compile and graph, its reasons, and what cannot be had."""

from __future__ import annotations

import platform
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from fastcifar import device
from fastcifar.errors import DeviceError
from fastcifar.recipe import Recipe

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is visible")


@NO_CUDA
def test_a_machine_without_a_gpu() -> None:
    choice = device.choose_execution(Recipe())
    assert (choice.device, choice.loader, choice.cuda_graph) == ("cpu", "tensor", False)
    assert len(choice.format_lines()) == 5
    assert all(line.endswith(")") for line in choice.format_lines())


@NO_CUDA
@pytest.mark.parametrize(("flag", "precision"), [("amx_bf16", "bf16"), ("avx512_bf16", "bf16"), ("avx2", "fp32")])
def test_precision_follows_the_cpu(monkeypatch: pytest.MonkeyPatch, flag: str, precision: str) -> None:
    monkeypatch.setattr(device, "_cpu_flags", lambda: frozenset({flag}))
    choice = device.choose_execution(Recipe())
    assert choice.precision == precision
    assert "CPU" in choice.reasons["precision"]


@pytest.mark.parametrize(("capability", "precision"), [((9, 0), "bf16"), ((7, 5), "fp16"), ((6, 1), "fp32")])
def test_precision_follows_the_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    choice = device.choose_execution(Recipe())
    assert (choice.device, choice.precision, choice.cuda_graph) == ("cuda", precision, True)


@NO_CUDA
def test_no_compiler_means_no_compile_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    choice = device.choose_execution(Recipe())
    assert not choice.compile
    assert "install g++" in choice.reasons["compile"]
    assert device.choose_execution(Recipe(compile=True)).compile


@NO_CUDA
@pytest.mark.parametrize(
    "values", [{"device": "cuda"}, {"cuda_graph": True}, {"cuda_graph": True, "device": "cpu"}, {"fused_ops": True}]
)
def test_fault17_what_is_not_there(values: dict) -> None:
    with pytest.raises(DeviceError) as caught:
        device.choose_execution(Recipe.make(**values))
    assert caught.value.exit_code == 8
    assert caught.value.remedy


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


@pytest.mark.usefixtures("a_gpu")
def test_the_loader_of_a_gpu_is_dali_where_it_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, device.DALI_MODULE, SimpleNamespace(__version__="2.x"))  # type: ignore[arg-type]
    choice = device.choose_execution(Recipe())
    assert (choice.loader, "DALI 2.x" in choice.reasons["loader"]) == ("dali", True)
    assert device.choose_execution(Recipe(device="cpu")).loader == "tensor"
    monkeypatch.setitem(sys.modules, device.DALI_MODULE, None)
    choice = device.choose_execution(Recipe())
    assert (choice.loader, "nvidia.dali cannot be imported" in choice.reasons["loader"]) == ("tensor", True)


def test_fault17_dali_asked_for_and_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, device.DALI_MODULE, None)
    with pytest.raises(DeviceError, match=r"nvidia.dali cannot be imported .*; use --loader tensor, or on Linux") as it:
        device.choose_execution(Recipe(device="cpu", loader="dali"))
    assert it.value.exit_code == 8
    assert device.choose_execution(Recipe(device="cpu")).loader == "tensor"


def test_asked_for_is_given_and_said() -> None:
    choice = device.choose_execution(Recipe.make(device="cpu", precision="fp32", compile=False, loader="tensor"))
    assert (choice.precision, choice.compile) == ("fp32", False)
    assert choice.reasons["precision"] == "asked for"


def test_fault18_a_broken_import_is_reported_not_raised() -> None:
    works, reason = device.probe_import("no_such_module_at_all")
    assert not works
    assert "no_such_module_at_all" in reason
    assert device.probe_import("json") == (True, "")


def test_examine_names_versions_imports_and_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "PROBED_MODULES", ("json",))
    found = device.collect_diagnostics(Recipe())
    assert found["imports"] == {"json": "works"}
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert found["python"] == sys.version.split()[0]
    assert any(line.startswith("precision: ") for line in found["chosen"])


@pytest.mark.usefixtures("a_gpu")
def test_the_environment_is_of_the_chosen_device_and_names_no_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "6.18.44-someone-v657")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90_000)
    of_cpu, of_gpu = device.collect_environment("cpu"), device.collect_environment("auto")
    assert of_cpu["device"] == device.describe_device("cpu") != "a GPU"
    assert (of_cpu["cuda"], of_cpu["cudnn"]) == (None, None)
    assert (of_gpu["device"], of_gpu["cudnn"]) == ("a GPU", 90_000)
    assert of_cpu["platform"] == f"{platform.system()}-6.18-{platform.machine()}"
