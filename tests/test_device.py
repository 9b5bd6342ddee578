"""Execution choices with their reasons, and diagnostics of a machine without a GPU or with broken libraries."""

from __future__ import annotations

import importlib.metadata
import io
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastcifar import device
from fastcifar.device import EXTRA_MODULES, extra_remedy
from fastcifar.errors import DeviceError
from fastcifar.recipe import Recipe

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is visible")


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


@NO_CUDA
def test_execution_without_a_gpu() -> None:
    execution = device.choose_execution(Recipe())
    assert (execution.device, execution.loader, execution.cuda_graph) == ("cpu", "tensor", False)
    assert len(execution.format_lines()) == 6
    assert all(line.endswith(")") for line in execution.format_lines())
    recipe = Recipe.make(device="cpu", precision="bf16", compile=False, loader="torchvision")
    requested = device.choose_execution(recipe)
    assert (requested.precision, requested.compile, requested.loader) == ("bf16", False, "torchvision")
    assert {requested.reasons[name] for name in ("device", "precision", "compile")} == {"requested"}


@NO_CUDA
@pytest.mark.parametrize(("flag", "precision"), [("amx_bf16", "bf16"), ("avx512_bf16", "bf16"), ("avx2", "fp32")])
def test_precision_depends_on_the_cpu(monkeypatch: pytest.MonkeyPatch, flag: str, precision: str) -> None:
    monkeypatch.setattr(device, "_read_cpuinfo", lambda *_: flag)
    execution = device.choose_execution(Recipe())
    assert execution.precision == precision
    assert "CPU" in execution.reasons["precision"]


@pytest.mark.usefixtures("a_gpu")
def test_precision_depends_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, precision in (((9, 0), "bf16"), ((7, 5), "fp16"), ((6, 1), "fp32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        execution = device.choose_execution(Recipe())
        assert (execution.device, execution.precision, execution.cuda_graph) == ("cuda", precision, True)


@NO_CUDA
@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_tf32_is_refused_on_a_cpu(name: str) -> None:
    with pytest.raises(DeviceError, match=r"^--precision tf32 needs a GPU .* 8\.0 or later; use --precision fp32$"):
        device.choose_execution(Recipe.make(precision="tf32", device=name))


@pytest.mark.usefixtures("a_gpu")
def test_tf32_needs_compute_capability_8(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.choose_execution(Recipe(precision="tf32")).precision == "tf32"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(DeviceError, match=r"--precision tf32"):
        device.choose_execution(Recipe(precision="tf32"))


@pytest.mark.slow
def test_tf32_is_allowed_with_precision_tf32_only() -> None:
    """Several runs of a process may have different precisions; no setting is deprecated or contradicts another."""
    code = """
import torch
from fastcifar.device import ExecutionPlan
from fastcifar.training.compilation import configure_process
for precision in ("fp32", "tf32", "fp32", "tf32", "bf16"):
    configure_process(ExecutionPlan("cuda", precision, "tensor", compile=False, cuda_graph=True))
    cudnn = torch.backends.cudnn
    # torch.compile reads the precision of all operators of cuDNN, and the older setting of matrix products
    settings = torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.fp32_precision
    print(precision, *settings, torch._C._get_cublas_allow_tf32())
"""
    command = [sys.executable, "-W", "error", "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    ieee, tf32 = "ieee ieee ieee False", "tf32 tf32 tf32 True"
    assert run.stdout.splitlines() == [f"fp32 {ieee}", f"tf32 {tf32}", f"fp32 {ieee}", f"tf32 {tf32}", f"bf16 {ieee}"]


@NO_CUDA
def test_compile_is_off_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    execution = device.choose_execution(Recipe())
    assert not execution.compile
    assert "install g++" in execution.reasons["compile"]
    assert device.choose_execution(Recipe(compile=True)).compile


def test_the_compiler_is_the_one_that_inductor_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"clang++", "g++"}
    monkeypatch.setattr(shutil, "which", lambda name: name if name in installed else None)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert device.find_cpp_compiler() == "g++"
    monkeypatch.setenv("CXX", "clang++")
    assert device.find_cpp_compiler() == "clang++"
    installed.remove("clang++")
    assert device.find_cpp_compiler() is None
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert device.find_cpp_compiler() is None


@NO_CUDA
@pytest.mark.parametrize(
    "values", [{"device": "cuda"}, {"cuda_graph": True}, {"cuda_graph": True, "device": "cpu"}, {"fused_ops": True}]
)
def test_fault17_unavailable_device_or_library(values: dict) -> None:
    with pytest.raises(DeviceError) as caught:
        device.choose_execution(Recipe.make(**values))
    assert caught.value.exit_code == 8
    assert caught.value.remedy


@pytest.mark.usefixtures("a_gpu")
def test_fault17_dali_is_the_loader_on_a_gpu_if_it_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, device.DALI_MODULE, SimpleNamespace(__version__="2.x"))  # type: ignore[arg-type]
    execution = device.choose_execution(Recipe())
    assert (execution.loader, "DALI 2.x" in execution.reasons["loader"]) == ("dali", True)
    assert device.choose_execution(Recipe(device="cpu")).loader == "tensor"
    monkeypatch.setitem(sys.modules, device.DALI_MODULE, None)
    execution = device.choose_execution(Recipe())
    assert (execution.loader, "nvidia.dali cannot be imported" in execution.reasons["loader"]) == ("tensor", True)
    with pytest.raises(DeviceError, match=r"nvidia.dali cannot be imported .*; use --loader tensor, or on Linux"):
        device.choose_execution(Recipe(device="cpu", loader="dali"))


def test_fault18_diagnostics_contain_versions_execution_and_failing_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "PROBED_MODULES", ("json", "no_such_module"))
    events: list[str] = []
    monkeypatch.setattr(
        device, "probe_import", lambda module, probe=device.probe_import: events.append(module) or probe(module)
    )
    diagnostics = device.collect_diagnostics(Recipe(), lambda rows: events.extend(rows))
    shown = [name for name in events if name in ("python", "torch", "json", "import json", "train, device")]
    assert shown == ["python", "torch", "json", "import json", "train, device"]  # each as soon as it is known
    assert diagnostics.imports == {"json": "works", "no_such_module": diagnostics.imports["no_such_module"]}
    assert "No module named 'no_such_module'" in diagnostics.imports["no_such_module"]
    assert diagnostics.versions["torch"] == torch.__version__.split("+")[0]
    assert diagnostics.python == sys.version.split()[0]
    assert any(line.startswith("precision: ") for line in diagnostics.chosen)


@pytest.mark.parametrize(
    ("installed", "import_outcome", "problem"),
    [
        (["cuda120"], "works", ""),
        (["cuda130"], "works", ""),
        ([], "ModuleNotFoundError: No module named 'nvidia.dali'", ""),
        (["cuda130"], "ImportError: libcuda.so.1: cannot open shared object file", ""),
        (
            ["cuda130"],
            "ModuleNotFoundError: No module named 'nvidia.dali'",
            "nvidia-dali-cuda130 is installed, but its files are missing, perhaps removed with another DALI package; "
            "pip install --force-reinstall --no-deps nvidia-dali-cuda130",
        ),
        (
            ["cuda120", "cuda130"],
            "works",
            "nvidia-dali-cuda120 and nvidia-dali-cuda130 are both installed and overwrite each other; "
            "pip uninstall nvidia-dali-cuda120 nvidia-dali-cuda130, then pip install one of them",
        ),
    ],
)
def test_dali_of_either_cuda_is_recorded_and_both_are_a_problem(
    monkeypatch: pytest.MonkeyPatch, installed: list[str], import_outcome: str, problem: str
) -> None:
    def find_version(package: str) -> str:
        if package.startswith("nvidia-dali") and package.removeprefix("nvidia-dali-") not in installed:
            raise importlib.metadata.PackageNotFoundError
        return "2.4.0"

    monkeypatch.setattr(importlib.metadata, "version", find_version)
    monkeypatch.setattr(device, "probe_import", lambda module: import_outcome if "dali" in module else "works")
    shown: dict[str, str] = {}
    diagnostics = device.collect_diagnostics(Recipe(device="cpu"), shown.update)
    assert diagnostics.problems == ([problem] if problem else [])
    assert shown.get("problem", "") == problem
    recorded = {name: version for name, version in diagnostics.versions.items() if "dali" in name}
    expected = {f"nvidia-dali-{cuda}": "2.4.0" for cuda in installed}
    assert recorded == {"nvidia-dali-cuda120": "missing"} | expected


@pytest.mark.usefixtures("a_gpu")
def test_environment_describes_the_device_without_the_name_of_the_kernel_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "6.18.44-someone-v657")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90_000)
    cpu, gpu = device.collect_environment("cpu"), device.collect_environment("auto")
    assert cpu.device == f"{cpu.cpu}, {cpu.cpu_count} cores"
    assert (cpu.cuda, cpu.cudnn) == (None, None)
    assert (gpu.device, gpu.cudnn) == ("a GPU", 90_000)
    assert cpu.platform == f"{platform.system()}-6.18-{platform.machine()}"


@pytest.mark.parametrize(
    ("lines", "numbers"),
    [
        ("cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: A 4\n", (25, 17)),
        ("cpu\t\t: POWER9\nmodel\t\t: 8335-GTH\n", (None, None)),
        ("", (None, None)),
    ],
)
def test_the_processor_is_recorded(monkeypatch: pytest.MonkeyPatch, lines: str, numbers: tuple) -> None:
    monkeypatch.setattr("builtins.open", lambda *_, **__: io.StringIO(lines))
    environment = device.collect_environment("cpu")
    assert (environment.cpu_family, environment.cpu_model) == numbers
    assert environment.cpu == ("A 4" if lines.startswith("cpu family") else platform.processor() or platform.machine())
    assert environment.threads == torch.get_num_threads()
    assert environment.matmul_tflop_per_s is None, "a training run does not take the time to measure it"


def test_extras_and_their_modules_are_those_of_the_project_file() -> None:
    document = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
    extras = document["project"]["optional-dependencies"]
    assert list(EXTRA_MODULES) == [name for name in extras if name not in ("dev", "docs")]
    for extra, modules in EXTRA_MODULES.items():
        packages = {re.match(r"[\w-]+", requirement)[0] for requirement in extras[extra]}  # type: ignore[index]
        for module in modules:
            assert module == "torch.utils.tensorboard" or module.partition(".")[0] in packages
            assert extra_remedy(module).startswith(f"pip install '.[{extra}]'")


def test_no_hint_installs_the_package_from_a_registry() -> None:
    for path in (Path(__file__).parents[1] / "fastcifar").rglob("*.py"):
        assert not re.search(r"install[^\n]*fastcifar\[", path.read_text("utf-8")), path
