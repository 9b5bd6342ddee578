"""User errors: one line with the remedy, an exit code, and the look-up of names in tables.

Everything a user can get wrong is a `UserError`; `cli.py` prints it as one line and exits with its code.
A wrong state that only a bug can cause is an `assert`, not one of these. No torch here.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(Exception):
    """What went wrong and, after it, what the user can do about it; `exit_code` is the process's."""

    exit_code = 1

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem}; {remedy}" if remedy else problem)


class UsageError(UserError):
    """A wrong option, name, value or recipe."""

    exit_code = 2


class DataError(UserError):
    """A data set that is missing, damaged, malicious or of the wrong shape."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another model."""

    exit_code = 4


class NonFiniteError(UserError):
    """NaN or infinity in the loss or the gradients."""

    exit_code = 5


class InsufficientMemoryError(UserError):
    """Out of host or device memory."""

    exit_code = 6


class DiskError(UserError):
    """Disk full, folder not writable."""

    exit_code = 7


class DeviceError(UserError):
    """A device, or DALI, that was asked for and is not there."""

    exit_code = 8


class Interrupted(UserError):
    """Stopped by a signal, after the checkpoint was written."""

    def __init__(self, signal: str, exit_code: int, step: int, checkpoint: str) -> None:
        self.exit_code = exit_code
        super().__init__(f"stopped by {signal} after step {step}", f"the checkpoint is {checkpoint}")


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
    free = "".join(f", {available:,} bytes are available" for available in _available_bytes())
    return InsufficientMemoryError(f"out of memory{f': {asked[1]} more were asked for' if asked else ''}{free}", remedy)


def print_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    """A warning as one line like an error's, without a place in the source."""
    kind = "" if category is UserWarning else f"{category.__name__}: "
    print(f"fastcifar: warning: {kind}{message}", file=sys.stderr)


def first_message_line(error: BaseException, default: str = "") -> str:
    """The first line of an error's message, or `otherwise` where it has none."""
    return next(iter(str(error).strip().splitlines()), default)


def _available_bytes() -> list[int]:
    """What the host could still give; nothing where it does not say."""
    with contextlib.suppress(OSError, ValueError):
        return [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    return []


def lookup(table: Mapping[str, T], name: str, noun: str) -> T:
    """The row `name` of `table`; otherwise a `UsageError` that names the nearest row.

    `what` is the singular noun for the message, such as "architecture".
    """
    if name in table:
        return table[name]
    raise UsageError(f"unknown {noun} {name!r}", suggest_name(name, table))


def suggest_name(name: str, known: Mapping[str, object] | list[str]) -> str:
    """The remedy for a misspelt name: the closest known one, or the list of all."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(names)}"
