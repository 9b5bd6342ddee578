"""The end of a command: user errors in one line and the exit code; a traceback only with --debug, or for a bug."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from fastcifar.device import as_memory_error
from fastcifar.errors import UsageError, UserError, print_warning
from fastcifar.renamed import renaming_remedy

SIGINT_EXIT_CODE, BROKEN_PIPE_EXIT_CODE, SIGTERM_EXIT_CODE = 130, 141, 143  # 128 + the number of the signal


def run_cli(app: Callable[..., object]) -> NoReturn:
    """Run the command in sys.argv, print user errors in one line, and exit with their exit code."""
    warnings.showwarning = print_warning
    signal.signal(signal.SIGTERM, handle_sigterm)
    try:
        code = app(standalone_mode=False)
        if code == SIGINT_EXIT_CODE:  # Typer returns this code for a KeyboardInterrupt
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(_print_error("stopped by SIGINT", SIGINT_EXIT_CODE))
    except BrokenPipeError:
        sys.exit(BROKEN_PIPE_EXIT_CODE)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        sys.exit(report_error(error))
    sys.exit(code if isinstance(code, int) else 0)


def handle_sigterm(*_: Any) -> None:
    """Exit with 143 after every `finally` block; training handles SIGTERM itself, with the same exit code."""
    sys.exit(_print_error("stopped by SIGTERM", SIGTERM_EXIT_CODE))


def report_error(error: Exception) -> int:
    """Print a user error in one line and return its exit code; raise any other error again."""
    user_error = error if isinstance(error, UserError) else as_memory_error(error)
    if user_error:
        return _print_error(str(user_error), user_error.exit_code)
    if type(error).__name__ == "Abort":  # a KeyboardInterrupt in older versions of Typer
        return _print_error("stopped by SIGINT", SIGINT_EXIT_CODE)
    if option := getattr(error, "option_name", ""):  # Click's NoSuchOption
        command = getattr(getattr(error, "ctx", None), "info_name", "")
        if remedy := renaming_remedy(option.lstrip("-").replace("-", "_"), command):
            return _print_error(f"no such option: {option}; {remedy}", UsageError.exit_code)
    if hasattr(error, "format_message"):  # a ClickException, such as an unknown option
        message = " ".join(error.format_message().split())  # type: ignore[attr-defined]
        return _print_error(message, getattr(error, "exit_code", UsageError.exit_code))
    raise error


def _print_error(message: str, exit_code: int) -> int:
    print(f"fastcifar: {message}", file=sys.stderr)
    return exit_code
