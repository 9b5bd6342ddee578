"""Fallbacks for `torch.compile`, CUDA graphs and Winograd's algorithm if they fail on a machine, and a report of that.

An option that was chosen automatically and fails is switched off, and the others are kept: without a CUDA graph the
step is still compiled, and a step that cannot be compiled is still captured, as with `--no-compile`. An option that the
user requested is never switched off: its failure is an error.
"""

import gc
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import platformdirs
import torch

from fastcifar.device import ExecutionPlan, collect_environment
from fastcifar.errors import DeviceError, UserError, as_memory_error, first_message_line
from fastcifar.files import write_atomically
from fastcifar.format import format_timestamp, one_line, option_flag
from fastcifar.recipe import Recipe
from fastcifar.training import compilation
from fastcifar.training.distributed import SINGLE_PROCESS, World

T = TypeVar("T")

FAILURES = {
    "compile": "torch.compile failed",
    "cuda_graph": "the capture of a CUDA graph failed",
    "winograd": "the compilation of Winograd's algorithm failed",
}  # option -> what failed
PRIVATE_OPTIONS = ("data", "init", "out", "resume")  # paths, which a report does not contain
MAX_REASON_LENGTH = 200


@dataclass(frozen=True)
class Failure:
    """A failure of `option`, a key of `FAILURES`, on one rank; `is_device_lost`: CUDA can no longer be used."""

    option: str
    reason: str
    traceback: str
    rank: int
    is_device_lost: bool

    def __str__(self) -> str:
        return f"{FAILURES[self.option]} ({self.reason})"


class ExecutionError(DeviceError):
    """A failure of a compilation or of the capture of a CUDA graph."""

    def __init__(self, failure: Failure, report: Path | None = None) -> None:
        self.failure = failure
        problem, remedy = str(failure), f"use --no-{option_flag(failure.option)[2:]}"
        if failure.is_device_lost:
            problem += ", and this process can no longer use the GPU"
        super().__init__(problem, remedy + (f"; a report to attach to a bug report is in {report}" if report else ""))


def run_stage(option: str, function: Callable[[], T], device: torch.device, world: World = SINGLE_PROCESS) -> T:
    """Return `function()`; raise `ExecutionError` on all ranks if it fails on one of them.

    All ranks must call this together. `function` compiles or captures something for `option`, a key of `FAILURES`, and
    must not wait for other ranks. User errors and a lack of memory, also as the cause of another error, are raised
    unchanged.
    """
    result, failure = None, None
    try:
        try:
            result = function()
        except Exception as error:
            if option != "compile" or not compilation.rebuild_damaged_cache(error):
                raise
            result = function()
    except Exception as error:
        failure = _describe_failure(option, error, device, world)
    # outside of the `except` block, so that the error and what it refers to, such as the autograd graph, can be freed
    if failures := [failure for failure in world.all_gather_object(failure) if failure]:
        raise ExecutionError(max(failures, key=lambda failure: failure.is_device_lost))
    return result  # type: ignore[return-value]


def run_with_fallback(
    build: Callable[[ExecutionPlan, str], T],
    plan: ExecutionPlan,
    recipe: Recipe,
    compile_mode: str = "auto",
    world: World = SINGLE_PROCESS,
) -> T:
    """Return the result of `build(plan, compile_mode)`, or of the first fallback that works.

    If `build` raises `ExecutionError`, it is called again: with the `compile_mode` "auto" if it was another one, and
    then without the option that failed. A `UserWarning` on rank 0 then names the failure, what is used instead, and
    the report. Raises `ExecutionError` with the report if `recipe` requests that option or if CUDA cannot be used
    any more.
    """
    failures: list[Failure] = []
    original = plan
    while True:
        try:
            result = build(plan, compile_mode)
            break
        except Exception as error:
            if (failure := _find_failure(error)) is None:
                raise
        failures.append(failure)
        is_tuned = compile_mode != "auto"
        if failure.is_device_lost or (not is_tuned and is_requested(recipe, failure.option)):
            raise ExecutionError(failure, write_report(failures, original, plan, recipe, world))
        compile_mode = "auto"
        if not is_tuned:
            dropped = [failure.option]
            if failure.option == "compile" and recipe.winograd is None:
                dropped.append("winograd")  # by default it is used with torch.compile only
            reasons = {**plan.reasons, **dict.fromkeys(dropped, str(failure))}
            plan = replace(plan, **dict.fromkeys(dropped, False), reasons=reasons)
        free_memory()
    if failures:
        report = write_report(failures, original, plan, recipe, world)
        if world.is_main_process:
            saved = (
                f"a report to attach to a bug report is in {report}" if report else "the report could not be written"
            )
            used = describe_step(plan) if plan != original else "the default mode of torch.compile"
            problem = " and ".join(map(str, failures))
            warnings.warn(f"{problem}; continuing with {used}; {saved}", UserWarning, stacklevel=2)
    return result


@contextmanager
def reported_failures(plan: ExecutionPlan, recipe: Recipe) -> Iterator[None]:
    """Context in which a failure of compilation or of a capture is an error, with a report and without a fallback."""
    try:
        yield
    except ExecutionError as error:
        raise ExecutionError(error.failure, write_report([error.failure], plan, plan, recipe, SINGLE_PROCESS)) from None


def is_requested(recipe: Recipe, option: str) -> bool:
    """Return whether `recipe` requests `option`, a key of `FAILURES`, instead of leaving the choice open."""
    return bool(getattr(recipe, option)) or (option == "compile" and recipe.compile_mode != "auto")


def describe_step(plan: ExecutionPlan) -> str:
    """Return how `plan` executes a step: `compiled steps without a CUDA graph`."""
    return f"{'compiled' if plan.compile else 'eager'} steps {'in' if plan.cuda_graph else 'without'} a CUDA graph"


def is_usable(device: torch.device) -> bool:
    """Return whether `device` still works: after an illegal memory access, every call of CUDA in a process fails."""
    if device.type == "cpu":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return False
    return True


def free_memory() -> None:
    """Free the memory of objects that a failed attempt has left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def write_report(
    failures: list[Failure], original: ExecutionPlan, final: ExecutionPlan, recipe: Recipe, world: World
) -> Path | None:
    """Write a report of `failures` to the user's log folder, on rank 0, and return its path on all ranks.

    `original` and `final`: the execution plan before and after the failures. None is returned if the file cannot be
    written. The report contains no paths but those in tracebacks, where "~" replaces the home folder.
    """
    path = None
    if world.is_main_process:
        folder = Path(platformdirs.user_log_dir("fastcifar"))
        path = folder / f"failure-{format_timestamp(for_file_name=True)}-{os.getpid()}.txt"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, format_report(failures, original, final, recipe, world).encode())
        except OSError:
            path = None
    return world.broadcast_object(path)


def format_report(
    failures: list[Failure], original: ExecutionPlan, final: ExecutionPlan, recipe: Recipe, world: World
) -> str:
    """Return the text of the report: failures, execution plan, recipe, environment and tracebacks."""
    shared_recipe = recipe.model_copy(update=dict.fromkeys(PRIVATE_OPTIONS))
    environment = collect_environment(original.device).model_dump_json(indent=1)
    sections = {
        "failures": "\n".join(f"rank {failure.rank} of {world.world_size}: {failure}" for failure in failures),
        "execution plan": "\n".join(original.format_lines()),
        "execution plan after the failures": "\n".join(final.format_lines()),
        "recipe": shared_recipe.to_toml(),
        "environment": environment,
        **{f"traceback {number}": failure.traceback for number, failure in enumerate(failures, 1)},
    }
    text = "\n".join(f"== {title} ==\n{content}\n" for title, content in sections.items())
    home = str(Path.home())
    return text if home == "/" else text.replace(home, "~")


def _describe_failure(option: str, error: Exception, device: torch.device, world: World) -> Failure:
    """Return the failure that `error` is; raise the user error or the lack of memory that caused it, if any."""
    for cause in _causes(error):
        if user_error := cause if isinstance(cause, UserError) else as_memory_error(cause):
            raise user_error from error
    reason = one_line(first_message_line(error))[:MAX_REASON_LENGTH]
    text = "".join(traceback.format_exception(error))
    return Failure(option, f"{type(error).__name__}: {reason}", text, world.rank, not is_usable(device))


def _find_failure(error: BaseException) -> Failure | None:
    """Return the failure of the first `ExecutionError` among the causes of `error`."""
    return next((cause.failure for cause in _causes(error) if isinstance(cause, ExecutionError)), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield `error` and the errors that it was raised from or while handling."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
