"""torch.compile as a wrapper of functions, its persistent cache, and the settings of torch and of the allocator."""

import atexit
import ctypes
import errno
import logging
import os
import pickle
import shutil
import stat
import tempfile
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import platformdirs
import torch

from fastcifar.device import ExecutionPlan, allow_tf32
from fastcifar.errors import first_message_line
from fastcifar.format import one_line

INDUCTOR_CACHE_DIR_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
# tunable of glibc's malloc -> its parameter of mallopt, from malloc.h, and the value that keeps freed memory
MALLOC_SETTINGS = {"mmap_max": (-4, 0), "trim_threshold": (-1, 2**31 - 1), "top_pad": (-2, 64 * 2**20)}

# Warnings of torch that do not help: the beginning of the message -> why it does not apply
IGNORED_WARNINGS = {
    "TensorFloat32 tensor cores": "--precision determines whether TF32 is used",
    "This instance was constructed with capturable=True": "--no-cuda-graph is a choice, and the results are the same",
}
# Loggers of torch that warn on every machine with a CUDA compiler and no GPU, and on every small GPU
SILENCED_LOGGERS = ("torch.utils.cpp_extension", "torch._inductor.utils")

# Errors of a program or a description of one that was truncated or overwritten
DAMAGED_CACHE_ERRORS = (ImportError, OSError, EOFError, SyntaxError, pickle.UnpicklingError)
_cache_was_rebuilt = False

P = ParamSpec("P")
R = TypeVar("R")


def configure_process(execution: ExecutionPlan) -> None:
    """Configure torch and the memory allocator in this process for a run with `execution`."""
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in SILENCED_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("torch._inductor.codecache").addFilter(CACHE_MESSAGES)  # adding it again has no effect
    if execution.device == "cuda":
        allow_tf32(execution.precision == "tf32")
    else:
        keep_freed_memory()
    if execution.compile:
        enable_compile_cache()


def use_deterministic_algorithms(enabled: bool) -> None:
    """Make torch use only deterministic algorithms, or the fastest ones, in this process.

    If `enabled`, operations without a deterministic algorithm raise an error.
    """
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at the first use of the GPU
    torch.use_deterministic_algorithms(enabled)
    torch.backends.cudnn.deterministic = enabled
    torch.backends.cudnn.benchmark = not enabled  # a run has few shapes, and each occurs thousands of times


def compile_function(function: Callable[P, R], mode: str = "auto") -> Callable[P, R]:
    """Compile `function` as one full graph with static shapes. `mode`: "auto" or a mode of torch.compile."""
    # TorchDynamo caches compiled variants, up to a small limit, per code object: give each function its own copy.
    code, closure = function.__code__.replace(), function.__closure__
    function_copy = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    return torch.compile(function_copy, fullgraph=True, dynamic=False, mode="default" if mode == "auto" else mode)


def enable_compile_cache() -> Path:
    """Set and return torch.compile's cache folder, which contains programs: no other user may write to it.

    It is that of `TORCHINDUCTOR_CACHE_DIR`, else a folder in the user's cache folder, else a new temporary folder,
    which is removed when the process exits. A requested folder that cannot be used causes a warning.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # imports much that only compiling needs

    requested = os.environ.get(INDUCTOR_CACHE_DIR_VARIABLE)
    if requested and os.path.abspath(requested) == default_cache_dir():
        requested = None  # torch has set it, to a folder that another user can have created
    folder = Path(requested or Path(platformdirs.user_cache_dir("fastcifar")) / "compiled")
    if problem := _make_private_folder(folder, is_requested=bool(requested)):
        temporary = Path(tempfile.mkdtemp(prefix="fastcifar-compiled-"))
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        if requested:
            message = f"{INDUCTOR_CACHE_DIR_VARIABLE}={folder} is not used: {problem}"
            warnings.warn(message, UserWarning, stacklevel=2)
        folder = temporary
    os.environ[INDUCTOR_CACHE_DIR_VARIABLE] = str(folder)
    return folder


def _make_private_folder(folder: Path, is_requested: bool) -> str:
    """Create `folder` with mode 0700; return why it cannot be used, or ""."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
            return "it belongs to another user"
        if not is_requested:
            folder.chmod(0o700)
        elif hasattr(os, "geteuid") and status.st_mode & stat.S_IWOTH:
            return "other users can write to it"
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return str(error.strerror)


def rebuild_damaged_cache(error: BaseException) -> bool:
    """Return whether `error` may be the result of a damaged cache, which is then removed, with a warning.

    This is done once in a process, and not if the cache is empty.
    """
    global _cache_was_rebuilt
    cause: BaseException | None = error
    while cause and (not isinstance(cause, DAMAGED_CACHE_ERRORS) or getattr(cause, "errno", None) == errno.ENOSPC):
        cause = cause.__cause__ or cause.__context__
    folder = Path(os.environ.get(INDUCTOR_CACHE_DIR_VARIABLE, ""))
    if cause is None or _cache_was_rebuilt or not folder.is_absolute() or not any(folder.glob("*")):
        return False
    from torch._inductor.utils import clear_caches

    _cache_was_rebuilt = True
    reason = one_line(first_message_line(cause, type(cause).__name__))
    warnings.warn(f"the compile cache {folder} is damaged ({reason}); it is rebuilt", UserWarning, stacklevel=2)
    for path in folder.iterdir():
        shutil.rmtree(path, ignore_errors=True)
    torch.compiler.reset()
    clear_caches()
    return True


class _CacheMessages(logging.Filter):
    """Reports in one line, once, that torch builds damaged entries of the cache again, instead of with tracebacks."""

    is_reported = False

    def filter(self, record: logging.LogRecord) -> bool:
        if "unable to load compiled graph" not in str(record.msg):
            return True
        record.msg, record.args, record.exc_info = "a damaged entry of the compile cache is rebuilt", (), None
        self.is_reported, was_reported = True, self.is_reported
        return not was_reported


CACHE_MESSAGES = _CacheMessages()


def keep_freed_memory() -> bool:
    """Configure glibc's malloc to keep freed memory for reuse in this process; return False without glibc.

    By default, each step maps and zeroes the same large allocations again: a fifth of the step time on a CPU (LOG.md).
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    results = [mallopt(parameter, value) for parameter, value in MALLOC_SETTINGS.values()]
    return all(results)
