"""The end of a command: errors in one line on stderr, and exit codes."""

import contextlib
import errno
import io
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TextIO

from fastcifar.errors import DiskError, UsageError, UserError, as_memory_error, escape
from fastcifar.recipes import shipped_recipes
from fastcifar.renamed import renaming_remedy

# 128 + the number of the signal
SIGHUP_EXIT_CODE, SIGINT_EXIT_CODE, BROKEN_PIPE_EXIT_CODE, SIGTERM_EXIT_CODE = 129, 130, 141, 143


def report_error(error: Exception) -> int:
    """Print a user error in one line and return its exit code; raise any other error again."""
    if user_error := error if isinstance(error, UserError) else as_memory_error(error):
        return print_error(str(user_error), user_error.exit_code)
    if isinstance(error, OSError) and error.filename is not None:
        kind = UsageError if error.errno == errno.ENAMETOOLONG else DiskError
        return print_error(f"cannot use {os.fsdecode(error.filename)}: {error.strerror}", kind.exit_code)
    if type(error).__name__ == "Abort":  # a KeyboardInterrupt in older versions of Typer
        return print_error("stopped by SIGINT", SIGINT_EXIT_CODE)
    if flag := getattr(error, "option_name", ""):  # Click's NoSuchOption
        command_name = getattr(getattr(error, "ctx", None), "info_name", "")
        if remedy := renaming_remedy(flag.lstrip("-").replace("-", "_"), command_name):
            return print_error(f"no such option: {flag}; {remedy}", UsageError.exit_code)
    if hasattr(error, "format_message"):  # a ClickException, such as an unknown option
        message = " ".join(error.format_message().split())  # type: ignore[attr-defined]
        extra = re.fullmatch(r".*unexpected extra argument\(?s?\)? \((\S+).*\)", message)
        if extra and extra[1] in shipped_recipes():
            message += f"; did you mean --recipe {extra[1]}?"
        return print_error(message, getattr(error, "exit_code", UsageError.exit_code))
    raise error


def print_error(message: str, exit_code: int) -> int:
    """Print `message` on one line to stderr, and return `exit_code`."""
    with contextlib.suppress(OSError):  # stderr is closed or full
        print(f"fastcifar: {escape(message)}", file=sys.stderr, flush=True)
    return exit_code


class OptionalStream:
    """A text stream that discards everything after an error, such as that of a closed pipe or a full disk."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, function: Callable[[], object]) -> None:
        try:
            function()
        except OSError:
            discard_output(self.stream)


def discard_output(stream: TextIO) -> None:
    """Discard what `stream` still holds and all that follows, so that flushing it at the end of Python succeeds."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


@contextlib.contextmanager
def stdout_errors() -> Iterator[None]:
    """Context that prints to stdout, and writes what it still holds. Raises `DiskError` for a file on a full disk."""
    try:
        yield
        if sys.stdout:
            sys.stdout.flush()
    except OSError as error:
        discard_output(sys.stdout)
        raise DiskError(f"cannot write to stdout: {error.strerror}", "free disk space") from None


@contextlib.contextmanager
def optional_output() -> Iterator[None]:
    """Context of a command that trains, which goes on without output if stdout or stderr is closed or full."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    streams = [stream and OptionalStream(stream) for stream in (sys.stdout, sys.stderr)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):  # type: ignore[type-var]
        yield
        for stream in filter(None, streams):
            stream.flush()


def handle_signals() -> None:
    """Exit on SIGTERM, on SIGHUP unless it is ignored, and on SIGPIPE if stdout is closed.

    `sys.exit` runs all `finally` blocks. Training has its own handler of SIGTERM and SIGHUP, with the same exit codes.
    """
    for name, exit_code in (("SIGTERM", SIGTERM_EXIT_CODE), ("SIGHUP", SIGHUP_EXIT_CODE)):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, partial(_exit_on_signal, name, exit_code))
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, _exit_if_stdout_is_closed)


def _exit_on_signal(name: str, exit_code: int, *_: object) -> None:
    sys.exit(print_error(f"stopped by {name}", exit_code))


def _exit_if_stdout_is_closed(*_: object) -> None:
    """Exit if the reader of stdout has gone; otherwise, a connection was closed, which raises `BrokenPipeError`."""
    poll = select.poll()
    poll.register(1, 0)
    if poll.poll(0):
        discard_output(sys.stdout)
        sys.exit(BROKEN_PIPE_EXIT_CODE)


def prepare_streams() -> None:
    """Escape what the encoding of stdout and stderr lacks, and open the standard streams that are closed.

    Otherwise, the next file that is opened, such as a checkpoint, would receive what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
