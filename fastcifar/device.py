"""The machine's part of a run: device, precision, loader, compile and graph, each chosen with its reason.

`train`, `bench` and `doctor` ask here, so that they agree. `examine` is what `doctor` shows: versions, devices and
imports that may be broken, each tried in a process of its own. torch is imported inside the functions only.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fastcifar._version import __version__
from fastcifar.errors import DeviceError, InsufficientMemoryError, UsageError, UserError, first_message_line
from fastcifar.format import format_option_value, format_timestamp
from fastcifar.recipe import Recipe

if TYPE_CHECKING:
    import torch

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None

VERSIONED_PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "nvidia-dali-cuda120",
    "pytorch_optimizer",
    "numpy",
    "pydantic",
    "typer",
)
DALI_MODULE = "nvidia.dali"
DALI_REMEDY = "use --loader tensor, or on Linux pip install 'nvidia-dali-cuda120>=2,<3'"
PROBED_MODULES = ("torchvision", DALI_MODULE, "pytorch_optimizer", "matplotlib")


@dataclass(frozen=True)
class ExecutionPlan:
    """What a run will use. `device` is "cuda" or "cpu"; `reasons` says why, by the knob's name."""

    device: str
    precision: str
    loader: str
    compile: bool
    cuda_graph: bool
    reasons: dict[str, str] = field(default_factory=dict)

    def format_lines(self) -> list[str]:
        """`device: cpu (no CUDA device is visible)`, a line for each knob."""
        values = {name: getattr(self, name) for name in ("device", "precision", "loader", "compile", "cuda_graph")}
        return [f"{name}: {format_option_value(value)} ({self.reasons[name]})" for name, value in values.items()]


def choose_execution(recipe: Recipe) -> ExecutionPlan:
    """The device, precision, loader, compile and graph for `recipe` on this machine.

    Errors: `DeviceError` for what was asked for and is not there, with the remedy.
    """
    device, why_device = _choose_device(recipe.device)
    precision, why_precision = _choose_precision(recipe.precision, device)
    loader, why_loader = _choose_loader(recipe.loader, device)
    compiled, why_compile = _choose_compile(recipe.compile, device)
    graph, why_graph = _choose_cuda_graph(recipe.cuda_graph, device)
    _check_fused_ops(recipe.fused_ops, device)
    reasons = {
        "device": why_device,
        "precision": why_precision,
        "loader": why_loader,
        "compile": why_compile,
        "cuda_graph": why_graph,
    }
    return ExecutionPlan(device, precision, loader, compiled, graph, reasons)


def _choose_device(requested: str) -> tuple[str, str]:
    import torch

    visible = torch.cuda.is_available()
    if requested == "cuda" and not visible:
        raise DeviceError("--device cuda: no CUDA device is visible", "use --device cpu, or see `fastcifar doctor`")
    if requested != "auto":
        return requested, "asked for"
    return ("cuda", torch.cuda.get_device_name()) if visible else ("cpu", "no CUDA device is visible")


def _choose_precision(requested: str, device: str) -> tuple[str, str]:
    import torch

    if requested != "auto":
        return requested, "asked for"
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        if major >= 8:
            return "bf16", f"native in compute capability {major}.{minor}"
        if major >= 7:
            return "fp16", f"compute capability {major}.{minor} has no bf16; loss scaled on the device"
        return "fp32", f"compute capability {major}.{minor} has neither bf16 nor fast fp16"
    for name in ("amx_bf16", "avx512_bf16"):
        if name in _cpu_flags():
            return "bf16", f"this CPU has {name}"
    return "fp32", "this CPU has neither AMX nor AVX-512 bf16"


def _choose_loader(requested: str, device: str) -> tuple[str, str]:
    if requested == "torchvision":
        return requested, "asked for: the baseline, one image at a time in worker processes"
    if requested == "dali":
        import_optional(DALI_MODULE, DALI_REMEDY, DeviceError)
    if requested != "auto":
        return requested, "asked for"
    if device == "cpu":
        return "tensor", "one compiled kernel a batch, the least work for a CPU"
    try:
        version = import_optional(DALI_MODULE, DALI_REMEDY, DeviceError).__version__
    except DeviceError as error:
        return "tensor", f"{error.problem}; the data set stays on the device"
    return "dali", f"DALI {version} augments on the GPU, ahead of the step"


def _choose_compile(requested: bool | None, device: str) -> tuple[bool, str]:
    if requested is not None:
        return requested, "asked for"
    if device == "cpu":
        compiler = next((name for name in (os.environ.get("CXX"), "g++", "clang++") if name and shutil.which(name)), "")
        if not compiler:
            return False, "no C++ compiler was found; install g++ to train faster"
        return True, f"C++ compiler {compiler}"
    try:
        import triton
    except ImportError:
        return False, "triton cannot be imported"
    return True, f"triton {triton.__version__}"


def _choose_cuda_graph(requested: bool | None, device: str) -> tuple[bool, str]:
    if requested and device != "cuda":
        raise DeviceError("--cuda-graph needs CUDA, and the device is cpu", "leave it out, or use --device cuda")
    if requested is not None:
        return requested, "asked for"
    return device == "cuda", "one replay a step" if device == "cuda" else "CUDA only"


def _check_fused_ops(requested: bool, device: str) -> None:
    if requested and device != "cuda":
        raise DeviceError("--fused-ops needs CUDA, and the device is cpu", "leave it out, or use --device cuda")
    if requested and not importlib.util.find_spec("triton"):
        raise DeviceError("--fused-ops needs Triton, and it is not installed", "leave it out, or install triton")


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """The processor's feature names as Linux spells them; empty where there is no /proc/cpuinfo."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            line = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return frozenset()
    return frozenset(line.partition(":")[2].split())


def enable_deterministic_algorithms() -> None:
    """Has torch use deterministic algorithms alone, for the whole process; what has none raises.

    cuBLAS reads its variable when it starts: nothing may have used the GPU before.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def describe_device(device: str = "auto") -> str:
    """The device in words: the GPU's name, or the CPU's model and cores. "auto" is the GPU if there is one."""
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_cpu_name()}, {os.cpu_count()} cores"


@functools.cache
def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            named = (line for line in lines if line.startswith("model name"))
            return next(named, "").partition(":")[2].strip() or platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def usable_cpu_count() -> int:
    """CPU cores that this process may run on; all cores where the system does not limit a process to some."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory_bytes() -> int | None:
    """Free bytes of the host's memory; None where the system does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def peak_memory_bytes(device: torch.device) -> int | None:
    """The peak of the allocator on a GPU, of the process's memory on a CPU; None where the system does not say."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def process_times(process_id: str = "self") -> tuple[float, float] | None:
    """CPU seconds of a process, and seconds since it was started; None where the system has no Linux /proc."""
    try:
        fields = Path(f"/proc/{process_id}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        user, system, started = (int(fields[index]) / os.sysconf("SC_CLK_TCK") for index in (11, 12, 19))
        return user + system, time.clock_gettime(time.CLOCK_BOOTTIME) - started  # `started` counts from the boot
    except (AttributeError, OSError, ValueError, IndexError):
        return None


def as_memory_error(error: BaseException) -> InsufficientMemoryError | None:
    """What an allocation that failed says to the user, with its numbers; None for another error.

    It knows torch's errors by their names and words, on a GPU, in the host's memory and in a loader's worker.
    """
    text = " ".join(str(error).split())
    remedy = "use a smaller --batch-size or --width"
    if type(error).__name__ == "OutOfMemoryError":
        numbers = re.findall(r"(?:Tried to allocate|GPU \d+ has) .*?[.](?= |$)", text)
        return InsufficientMemoryError(f"out of memory on the GPU: {' '.join(numbers).rstrip('.') or text}", remedy)
    if text.startswith("DataLoader worker"):  # torch raises it wherever this process happens to be
        return InsufficientMemoryError(
            "a worker process of the loader died", "memory may be short: use fewer --workers, or --loader tensor"
        )
    if not isinstance(error, MemoryError) and "DefaultCPUAllocator" not in text:
        return None
    asked = re.search(r"allocate (\d+ bytes|[\d.]+ [KMGTP]?iB)", text)
    available = available_memory_bytes()
    free = "" if available is None else f", {available:,} bytes are available"
    return InsufficientMemoryError(f"out of memory{f': {asked[1]} more were asked for' if asked else ''}{free}", remedy)


def result_folder_name(device: str, label: str) -> str:
    """The name of a result's folder, <UTC>_<device>_<what>. `device`: in words."""
    spelt = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-").lower()
    return f"{format_timestamp(for_file_name=True)}_{spelt}_{label}"


def collect_environment(device: str) -> dict[str, Any]:
    """What a result on `device` ("auto", "cuda", "cpu") depends on beside its recipe: versions, device, platform (for
    env.json). Of the kernel its version alone: what its builder called it says more of the machine than a result needs.
    """
    import torch

    cuda = device != "cpu" and torch.cuda.is_available()
    release = re.match(r"\d+(\.\d+)?", platform.release())
    return {
        "versions": package_versions(),
        "python": platform.python_version(),
        "platform": "-".join((platform.system(), release[0] if release else "unknown", platform.machine())),
        "device": describe_device(device),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "cpu_bf16": sorted(_cpu_flags() & {"amx_bf16", "avx512_bf16"}),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
    }


def package_versions() -> dict[str, str]:
    """The installed versions of what the figures depend on; "missing" where a package is not installed."""
    return {"fastcifar": __version__, **{name: _package_version(name) for name in VERSIONED_PACKAGES}}


def _package_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def probe_import(module: str) -> tuple[bool, str]:
    """Whether `module` imports in a process of its own, and the last line it printed if not."""
    try:
        run = subprocess.run(
            [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=120, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    lines = run.stderr.strip().splitlines()
    return run.returncode == 0, "" if run.returncode == 0 else (lines[-1] if lines else f"exit {run.returncode}")


def import_optional(module: str, remedy: str, error_type: type[UserError] = UsageError) -> ModuleType:
    """The library `module`, which only some features need. Errors: `kind` if it is missing or does not import."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken build raises anything: torchvision beside another torch a RuntimeError
        problem = f"{module} cannot be imported ({type(error).__name__}: {first_message_line(error)})"
        raise error_type(problem, remedy) from None


def collect_diagnostics(recipe: Recipe) -> dict[str, Any]:
    """Everything `doctor` shows: `environment`, imports tried, and what `train` would choose and why."""
    imports = {}
    for module in PROBED_MODULES:
        works, reason = probe_import(module)
        imports[module] = "works" if works else reason
    try:
        choice: dict[str, Any] = {"chosen": choose_execution(recipe).format_lines()}
    except (DeviceError, UsageError) as error:
        choice = {"chosen": [], "error": str(error)}
    return {**collect_environment(recipe.device), "imports": imports, **choice}
