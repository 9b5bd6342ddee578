"""Errors that a user can cause or remedy, with their exit codes; `cli.app` prints each in one line."""

import contextlib
import difflib
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(Exception):
    """An error whose message is the problem and, after a semicolon, what the user can do about it."""

    exit_code = 1

    def __init_subclass__(cls, exit_code: int | None = None) -> None:
        cls.exit_code = exit_code or cls.exit_code

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem, self.remedy = problem, remedy
        super().__init__(escape(f"{problem}; {remedy}" if remedy else problem))


class UsageError(UserError, exit_code=2):
    """An invalid option, name, value or recipe."""


class DataError(UserError, exit_code=3):
    """A missing, damaged or malicious data set, or one with wrong shapes."""


class CheckpointError(UserError, exit_code=4):
    """A missing or damaged checkpoint, or one of another model."""


class NonFiniteError(UserError, exit_code=5):
    """NaN or infinity in the loss, a gradient, the logits or a value to be saved in a checkpoint."""


class InsufficientMemoryError(UserError, exit_code=6):
    """Too little host or device memory."""


class DiskError(UserError, exit_code=7):
    """A full disk, or a folder that cannot be written."""


class DeviceError(UserError, exit_code=8):
    """A requested device or library (DALI, Triton) that is not available."""


class Interrupted(UserError):
    """A run that was stopped by a signal; its checkpoint has been written."""

    def __init__(self, signal: str, exit_code: int, step: int, resume_command: str) -> None:
        self.exit_code = exit_code
        super().__init__(f"stopped by {signal} after step {step}", f"continue with: {resume_command}")


@contextlib.contextmanager
def disk_errors(task: str, remedy: str = "") -> Iterator[None]:
    """Context that raises `DiskError` for an `OSError`: `cannot write a.csv: No space left on device`."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"cannot {task}: {error.strerror or error}", remedy) from None


def print_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    """Print a warning in one line, without its position in the source. This replaces `warnings.showwarning`."""
    kind = "" if category is UserWarning else f"{category.__name__}: "
    print(f"fastcifar: warning: {kind}{escape(' '.join(str(message).split()))}", file=sys.stderr)


def escape(text: str, kept: str = "") -> str:
    r"""Return `text` with escapes, such as `\x1b`, for characters that are neither printable, spaces nor in `kept`.

    A name of a file, or a text in it, could otherwise control the terminal, or begin a new line.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in kept or unicodedata.category(char) == "Zs" else ascii(char)[1:-1]
        for char in text
    )


def first_message_line(error: BaseException, default: str = "") -> str:
    """Return the first line of the message of `error`, or `default` if the message is empty."""
    return next(iter(str(error).strip().splitlines()), default)


def lookup(table: Mapping[str, T], name: str, noun: str) -> T:
    """Return `table[name]`. Raises `UsageError` with the remedy of `suggest_name`; `noun` says what is named."""
    if name in table:
        return table[name]
    raise UsageError(f"unknown {noun} {name!r}", suggest_name(name, table))


def suggest_name(name: str, valid_names: Iterable[str]) -> str:
    """Return the remedy for a misspelled name: the most similar valid name, or the list of all."""
    names = sorted(valid_names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(names)}"


def as_memory_error(error: BaseException) -> InsufficientMemoryError | None:
    """Return the user error for a failed allocation (on a GPU, the host or in a DataLoader); None for other errors."""
    text = " ".join(str(error).split())
    remedy = "use a smaller --batch-size or --width"
    if type(error).__name__ == "OutOfMemoryError":
        numbers = re.findall(r"(?:Tried to allocate|GPU \d+ has) .*?[.](?= |$)", text)
        return InsufficientMemoryError(f"out of memory on the GPU: {' '.join(numbers).rstrip('.') or text}", remedy)
    if text.startswith("DataLoader worker"):  # raised from a signal handler, at any line of this process
        problem = "a worker process of the data loader died, perhaps because of a lack of memory"
        return InsufficientMemoryError(problem, "use fewer --workers, or --loader tensor")
    if not isinstance(error, MemoryError) and "DefaultCPUAllocator" not in text:
        return None
    problem = "out of memory"
    if size := re.search(r"allocate (\d+ bytes|[\d.]+ [KMGTP]?iB)", text):
        problem += f": {size[1]} more were requested"
    with contextlib.suppress(AttributeError, OSError, ValueError):  # systems that do not report the free memory
        problem += f", {os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'):,} bytes are available"
    return InsufficientMemoryError(problem, remedy)
