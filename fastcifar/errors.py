"""User errors: one line with the remedy, an exit code, and the look-up of names in tables.

Everything a user can get wrong is a `UserError`; `cli.py` prints it as one line and exits with its code.
A wrong state that only a bug can cause is an `assert`, not one of these. No torch here.
"""

from __future__ import annotations

import difflib
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


def print_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    """A warning as one line like an error's, without a place in the source."""
    kind = "" if category is UserWarning else f"{category.__name__}: "
    print(f"fastcifar: warning: {kind}{message}", file=sys.stderr)


def first_message_line(error: BaseException, default: str = "") -> str:
    """The first line of an error's message, or `otherwise` where it has none."""
    return next(iter(str(error).strip().splitlines()), default)


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
