"""Builds the stub CUDA runtime with g++ and the headers of CUDA 13."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import platformdirs
import torch

FOLDER = Path(__file__).parent
SOURCES = sorted((FOLDER / "runtime").glob("*.cpp"))
LIBRARY_NAME = (
    "libcuda.so.1"  # the driver's name, so that the library also replaces the driver, which torch loads later
)
CAPABILITIES = ("7.5", "8.0", "9.0", "12.0")  # that the device of the stub may have
# `crt/host_defines.h` is in the package nvidia-cuda-crt, all other headers are in packages that torch installs
REQUIRED_HEADERS = ("cuda.h", "cuda_runtime_api.h", "crt/host_defines.h")
HEADERS_REMEDY = "install CUDA 13, or the package nvidia-cuda-crt>=13.0,<13.1"


def find_include_folders() -> list[Path]:
    """The folders with headers of CUDA 13: of the packages of NVIDIA, of CUDA_HOME and of installed toolkits."""
    package = importlib.util.find_spec("nvidia")
    roots = [Path(path) / "cu13" for path in (package.submodule_search_locations or [])] if package else []
    roots += [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    roots += sorted(Path("/usr/local").glob("cuda*"))
    return [root / "include" for root in roots if _cuda_major_version(root / "include") == 13]


def _cuda_major_version(folder: Path) -> int | None:
    """The major version of the CUDA headers in `folder`; None if there are none."""
    header = folder / "cuda_runtime_api.h"
    version = re.search(r"#define CUDART_VERSION\s+(\d+)", header.read_text()) if header.is_file() else None
    return int(version[1]) // 1000 if version else None


def find_missing_requirement() -> str | None:
    """What is missing to build and use the stub runtime, with the remedy; None if nothing is."""
    if (torch.version.cuda or "").partition(".")[0] != "13":
        return f"needs torch built for CUDA 13, and this one is for {torch.version.cuda or 'the CPU only'}"
    if not shutil.which("g++"):
        return "needs g++, which is not installed"
    folders = find_include_folders()
    for header in REQUIRED_HEADERS:
        if not any((folder / header).is_file() for folder in folders):
            return f"needs the header {header} of CUDA 13: {HEADERS_REMEDY}"
    return None


def find_missing_compile_requirement() -> str | None:
    """Return what is missing to compile kernels with torch.compile and Triton, with the remedy; None if nothing is."""
    if not importlib.util.find_spec("triton"):
        return "needs triton, which is not installed"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "needs Python.h to build the launcher of Triton: install the headers of Python, such as python3-dev"
    return None


def build_library(folder: Path) -> Path:
    """Compile the stub runtime in `folder` and return the path of the shared library."""
    library = folder / LIBRARY_NAME
    options = ["-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY_NAME}"]
    include = [f"-isystem{folder}" for folder in find_include_folders()]
    command = ["g++", *options, *include, *map(str, SOURCES), "-o", str(library), "-ldl"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return library


def build_cached_library() -> Path:
    """Return the path of the shared library in the user's cache folder, and compile it if the sources have changed."""
    digest = hashlib.sha256()
    for source in sorted((FOLDER / "runtime").iterdir()):
        digest.update(source.read_bytes())
    folder = Path(platformdirs.user_cache_dir("fastcifar")) / f"cuda_stub-{digest.hexdigest()[:16]}"
    if (library := folder / LIBRARY_NAME).is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:  # another process may compile it at the same time
        build_library(Path(temporary)).replace(library)
    return library


def stub_environment(library: Path, package_root: Path, capability: str = "9.0") -> dict[str, str]:
    """Return the environment of a process that imports fastcifar from `package_root` and uses the stub runtime.

    `capability`: the compute capability of the device, one of CAPABILITIES.
    """
    return {
        **os.environ,
        "LD_PRELOAD": str(library),
        "TRITON_LIBCUDA_PATH": str(library.parent),
        "CUDA_STUB_CAPABILITY": capability,
        "PYTHONPATH": os.pathsep.join((str(package_root), str(FOLDER))),
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # compile in the process, where the stub is
    }
