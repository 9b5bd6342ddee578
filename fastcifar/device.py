"""The choice of device, precision, data loader, compilation and CUDA graph, and information about the machine."""

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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from fastcifar._version import __version__
from fastcifar.errors import DeviceError, UsageError, UserError, first_message_line
from fastcifar.format import format_option_value, format_timestamp, option_flag
from fastcifar.recipe import Recipe

if TYPE_CHECKING:
    import torch

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None

DALI_PACKAGES = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")  # either of them, the first is installed by default
PACKAGES = ("torch", "torchvision", "triton", DALI_PACKAGES[0], "pytorch_optimizer", "numpy", "pydantic", "typer")
DALI_MODULE = "nvidia.dali"
DALI_REMEDY = (
    "use --loader tensor, or on Linux pip install 'nvidia-dali-cuda120>=2,<3' (for CUDA 13 also nvidia-dali-cuda130)"
)
PROBED_MODULES = ("torchvision", DALI_MODULE, "pytorch_optimizer", "matplotlib")

# extra in pyproject.toml -> the modules that it installs and that the package imports
EXTRA_MODULES = {
    "onnx": ("onnxscript", "onnxruntime"),
    "html": ("plotly", "plotly.offline", "jinja2"),
    "sweep": ("ray", "optuna"),
    "tensorboard": ("torch.utils.tensorboard",),
    "mlflow": ("mlflow",),
    "wandb": ("wandb",),
}


@dataclass(frozen=True)
class ExecutionPlan:
    """How a run is executed.

    `device`: "cuda" or "cpu"; `precision`: "bf16", "fp16", "fp32" (IEEE float32) or "tf32" (float32 with TF32 matrix
    products and convolutions); `loader`: a name in `LOADERS`; `compile`: use torch.compile; `cuda_graph`: capture the
    training step; `winograd`: compute 3x3 convolutions with Winograd's algorithm; `reasons`: the reason for each one.
    """

    device: str
    precision: str
    loader: str
    compile: bool
    cuda_graph: bool
    winograd: bool = False
    reasons: dict[str, str] = field(default_factory=dict)

    def format_lines(self) -> list[str]:
        """Return a line for each option: `device: cpu (no CUDA device is visible)`."""
        names = ("device", "precision", "loader", "compile", "cuda_graph", "winograd")
        return [f"{name}: {format_option_value(getattr(self, name))} ({self.reasons[name]})" for name in names]


def choose_execution(recipe: Recipe) -> ExecutionPlan:
    """Return the execution of `recipe`. Raises `DeviceError` if a requested device or library is not available."""
    import torch

    has_cuda = torch.cuda.is_available()
    device, reasons = recipe.device, {"device": "requested"}
    if device == "auto":
        device = "cuda" if has_cuda else "cpu"
        reasons["device"] = torch.cuda.get_device_name() if has_cuda else "no CUDA device is visible"
    if device == "cuda" and not has_cuda:
        raise DeviceError("--device cuda: no CUDA device is visible", "use --device cpu, or see `fastcifar doctor`")
    for name in ("cuda_graph", "fused_ops"):
        if getattr(recipe, name) and device != "cuda":
            problem = f"{option_flag(name)} needs CUDA, but the device is cpu"
            raise DeviceError(problem, "remove it, or use --device cuda")
    if recipe.fused_ops and not importlib.util.find_spec("triton"):
        raise DeviceError("--fused-ops needs Triton, which is not installed", "remove it, or install triton")
    if recipe.precision == "tf32" and not supports_tf32(device):
        raise DeviceError("--precision tf32 needs a GPU of compute capability 8.0 or later", "use --precision fp32")
    if recipe.loader == "dali":
        import_optional(DALI_MODULE, DALI_REMEDY, DeviceError)
    chosen = {}
    for name, choose in AUTOMATIC_CHOICES.items():
        requested = getattr(recipe, name)
        is_automatic = requested in ("auto", None)
        chosen[name], reasons[name] = choose(device) if is_automatic else (requested, "requested")
    chosen["winograd"], reasons["winograd"] = _choose_winograd(device, chosen["precision"], chosen["compile"])
    if recipe.winograd is not None:
        if recipe.winograd and (device, chosen["precision"]) != ("cpu", "fp32"):
            problem = f"--winograd needs float32 on a CPU, but the run uses {chosen['precision']} on {device}"
            raise DeviceError(problem, "use --precision fp32 --device cpu, or remove it")
        chosen["winograd"], reasons["winograd"] = recipe.winograd, "requested"
    if recipe.loader == "torchvision":
        reasons["loader"] += ": the baseline, one image at a time in worker processes"
    return ExecutionPlan(device=device, **chosen, reasons=reasons)


def _choose_precision(device: str) -> tuple[str, str]:
    import torch

    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        if major >= 8:
            return "bf16", f"native in compute capability {major}.{minor}"
        if major >= 7:
            return "fp16", f"compute capability {major}.{minor} has no bf16; the loss is scaled"
        return "fp32", f"compute capability {major}.{minor} has neither bf16 nor fast fp16"
    if flags := _cpu_bf16_flags():
        return "bf16", f"this CPU has {flags[0]}"
    return "fp32", "this CPU has neither AMX nor AVX-512 bf16 instructions"


def _choose_loader(device: str) -> tuple[str, str]:
    if device == "cpu":
        return "tensor", "one compiled kernel per batch, the fastest on a CPU"
    try:
        version = import_optional(DALI_MODULE, DALI_REMEDY, DeviceError).__version__
    except DeviceError as error:
        return "tensor", f"{error.problem}; the data set is kept on the GPU"
    return "dali", f"DALI {version} augments on the GPU in parallel with training"


def _choose_compile(device: str) -> tuple[bool, str]:
    if device == "cpu":
        if compiler := find_cpp_compiler():
            return True, f"C++ compiler {compiler}"
        return False, "no C++ compiler was found; install g++, or set CXX, for faster training"
    try:
        import triton
    except ImportError:
        return False, "triton cannot be imported"
    return True, f"triton {triton.__version__}"


def _choose_winograd(device: str, precision: str, compile: bool) -> tuple[bool, str]:
    if (device, precision) != ("cpu", "fp32"):
        return False, "for float32 on a CPU"
    return compile, "3x3 convolutions take fewer multiplications" if compile else "by default only with torch.compile"


def find_cpp_compiler() -> str | None:
    """Return the C++ compiler that torch.compile uses on a CPU, or None if it is missing."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return name if shutil.which(name) else None


# field of `ExecutionPlan` -> function that returns the choice for a device, and its reason
AUTOMATIC_CHOICES: dict[str, Callable[[str], tuple[Any, str]]] = {
    "precision": _choose_precision,
    "loader": _choose_loader,
    "compile": _choose_compile,
    "cuda_graph": lambda device: (True, "one graph launch per step") if device == "cuda" else (False, "CUDA only"),
}


@functools.cache
def has_native_bf16(device: str) -> bool:
    """Return whether `device`, "cuda" or "cpu", has instructions for bf16 matrix products.

    Without them, these products are emulated: on a CPU, about 50 times slower than in float32.
    """
    return _choose_precision(device)[0] == "bf16"


def _cpu_bf16_flags() -> list[str]:
    """Return the names that Linux gives to the bf16 instructions of the CPU; none without /proc/cpuinfo."""
    flags = _read_cpuinfo("flags", "Features").split()
    return [name for name in ("amx_bf16", "avx512_bf16") if name in flags]


def _read_cpuinfo(*names: str) -> str:
    """Return the first value in /proc/cpuinfo whose name begins with one of `names`; "" without such a line or file."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next((line for line in lines if line.startswith(names)), "").partition(":")[2].strip()
    except OSError:
        return ""


def supports_tf32(device: str) -> bool:
    """Return whether TF32 is available on `device`: "auto", "cuda" or "cpu"."""
    import torch

    return device != "cpu" and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def allow_tf32(allowed: bool) -> None:
    """Allow or forbid TF32 in float32 matrix products and convolutions on CUDA, in this process.

    By default, torch allows it in the convolutions of cuDNN only. The older settings named `allow_tf32` must not be
    used beside these: torch refuses to read them if they differ.
    """
    import torch

    torch.set_float32_matmul_precision("high" if allowed else "highest")
    cudnn: Any = torch.backends.cudnn  # torch's annotations lack `conv`
    cudnn.fp32_precision = cudnn.conv.fp32_precision = "tf32" if allowed else "ieee"  # the first is for torch.compile


def usable_cpu_count() -> int:
    """Return the number of CPU cores that this process may run on; of all cores if the system does not report it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory_bytes(device: torch.device) -> int | None:
    """Return the peak bytes reserved by torch (GPU) or used by the process (CPU); None if the system reports none.

    Reserved memory includes the memory pool of CUDA graphs, of which little counts as allocated after the capture.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def process_times(process_id: str = "self") -> tuple[float, float] | None:
    """Return the CPU seconds of a process and the seconds since its start; None on systems without Linux's /proc."""
    try:
        fields = Path(f"/proc/{process_id}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        user, system, start = (int(fields[index]) / os.sysconf("SC_CLK_TCK") for index in (11, 12, 19))
        return user + system, time.clock_gettime(time.CLOCK_BOOTTIME) - start  # `start` is in seconds since boot
    except (AttributeError, OSError, ValueError, IndexError):
        return None


def result_folder_name(device: str, label: str) -> str:
    """Return the name of a result folder, TIME_DEVICE_LABEL in UTC, for the `device` of an `Environment`."""
    device_name = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-").lower()
    return f"{format_timestamp(for_file_name=True)}_{device_name}_{label}"


class Environment(BaseModel):
    """What a result depends on besides its recipe: the document env.json, to which its writers may add keys.

    `versions`: name -> installed version, or "missing"; `device`: the name of the GPU, or the CPU and its cores;
    `cpu_family`, `cpu_model`: numbers of an x86 CPU; `matmul_tflop_per_s`: precision -> rate on the CPU, if measured.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    schema_version: int = 1
    versions: dict[str, str] = {}
    python: str = ""
    platform: str = ""
    device: str = ""
    cpu: str = ""
    cpu_family: int | None = None
    cpu_model: int | None = None
    cpu_count: int | None = None
    cpu_bf16: list[str] = []
    threads: int | None = None
    matmul_tflop_per_s: dict[str, float] | None = None
    cuda: str | None = None
    cudnn: int | None = None


class Diagnostics(Environment):
    """The document of `fastcifar doctor`.

    `imports`: module -> "works" or the error; `chosen`: the execution; `problems`: of the installation, with remedies.
    """

    imports: dict[str, str]
    problems: list[str] = []
    chosen: list[str]
    error: str = ""


def collect_environment(device: str) -> Environment:
    """Return the environment of this process for a run on `device`: "auto", "cuda" or "cpu"."""
    import torch

    cuda = device != "cpu" and torch.cuda.is_available()
    release = re.match(r"\d+(\.\d+)?", platform.release())  # the rest may identify the machine
    cpu = _read_cpuinfo("model name") or platform.processor() or platform.machine()
    numbers = map(_read_cpuinfo, ("cpu family", "model\t"))
    family, model = (int(text) if text.isdecimal() else None for text in numbers)
    versions = {package: installed_version(package) or "missing" for package in PACKAGES}
    versions |= {package: version for package in DALI_PACKAGES if (version := installed_version(package))}
    return Environment(
        versions={"fastcifar": __version__, **versions},
        python=platform.python_version(),
        platform="-".join((platform.system(), release[0] if release else "unknown", platform.machine())),
        device=torch.cuda.get_device_name() if cuda else f"{cpu}, {os.cpu_count()} cores",
        cpu=cpu,
        cpu_family=family,
        cpu_model=model,
        cpu_count=os.cpu_count(),
        cpu_bf16=_cpu_bf16_flags(),
        threads=torch.get_num_threads(),
        cuda=torch.version.cuda if cuda else None,
        cudnn=torch.backends.cudnn.version() if cuda else None,
    )


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_dali_problem(import_outcome: str) -> str:
    """Return a problem of the installation of DALI with its remedy, or ""; `import_outcome`: see `probe_import`.

    The packages of `DALI_PACKAGES` contain the same files: the one that was installed last has overwritten the other,
    and if one of them is uninstalled, the files of both are removed.
    """
    installed = [package for package in DALI_PACKAGES if installed_version(package)]
    if len(installed) > 1:
        names = " ".join(installed)
        problem = f"{' and '.join(installed)} are both installed and overwrite each other"
        return f"{problem}; pip uninstall {names}, then pip install one of them"
    if installed and import_outcome.startswith("ModuleNotFoundError: No module named 'nvidia"):
        problem = f"{installed[0]} is installed, but its files are missing, perhaps removed with another DALI package"
        return f"{problem}; pip install --force-reinstall --no-deps {installed[0]}"
    return ""


def probe_import(module: str) -> str:
    """Import `module` in a separate process; return "works", or the last line of the error."""
    command = [sys.executable, "-c", f"import {module}"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if run.returncode == 0:
        return "works"
    return next(reversed(run.stderr.strip().splitlines()), f"exit code {run.returncode}")


def import_optional(module: str, remedy: str = "", error_type: type[UserError] = UsageError) -> ModuleType:
    """Import a module that only some features need.

    Raises `error_type` if that fails, with `remedy`, or by default with how to install the extra that contains it.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # not only ImportError: torchvision with another torch version raises RuntimeError
        problem = f"{module} cannot be imported ({type(error).__name__}: {first_message_line(error)})"
        raise error_type(problem, remedy or extra_remedy(module)) from None


def extra_remedy(module: str) -> str:
    """Return how to install `module`, a module in `EXTRA_MODULES`. The package itself is not in a package registry."""
    extra = next(extra for extra, modules in EXTRA_MODULES.items() if module in modules)
    return f"pip install '.[{extra}]' in the folder of the source code of fastcifar"


def collect_diagnostics(recipe: Recipe, show: Callable[[dict[str, str]], None] = lambda rows: None) -> Diagnostics:
    """Return the environment, the result of importing each optional module, and the execution of `recipe`.

    `show` is called with names and values to print as soon as they are known.
    """
    show({"fastcifar": __version__, "python": platform.python_version()})
    environment = collect_environment(recipe.device)
    document = environment.model_dump(exclude_unset=True)
    packages = {name: version for name, version in environment.versions.items() if name != "fastcifar"}
    show({**packages, "device": environment.device, "threads": str(environment.threads)})
    document["imports"] = imports = {}
    for module in PROBED_MODULES:
        imports[module] = probe_import(module)
        show({f"import {module}": imports[module]})
    if problem := find_dali_problem(imports.get(DALI_MODULE, "")):
        document["problems"] = [problem]
        show({"problem": problem})
    try:
        document["chosen"] = choose_execution(recipe).format_lines()
        show(dict(f"train, {line}".split(": ", 1) for line in document["chosen"]))
    except (DeviceError, UsageError) as error:
        document |= {"chosen": [], "error": str(error)}
        show({"train, error": str(error)})
    return Diagnostics(**document)
