"""How a command ends: whatever a user can get wrong as one line with the remedy, and the exit code of errors.py.

A traceback comes only with --debug, or from what is a bug.
"""

from __future__ import annotations

import signal
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from fastcifar.device import as_memory_error
from fastcifar.errors import UsageError, UserError, print_warning
from fastcifar.renamed import renaming_remedy

SIGINT_EXIT_CODE, SIGTERM_EXIT_CODE = 130, 143  # the exit codes


def run_cli(app: Callable[..., object]) -> NoReturn:
    """Runs the command of sys.argv and turns what a user got wrong into one line and an exit code."""
    warnings.showwarning = print_warning
    signal.signal(signal.SIGTERM, handle_sigterm)
    try:
        code = app(standalone_mode=False)
        if code == SIGINT_EXIT_CODE:  # how Typer passes on a KeyboardInterrupt
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(_print_error("stopped by SIGINT", SIGINT_EXIT_CODE))
    except BrokenPipeError:
        sys.exit(141)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        sys.exit(report_error(error))
    sys.exit(code if isinstance(code, int) else 0)


def handle_sigterm(*_: Any) -> None:
    """SIGTERM where no run is training: out through every `finally`, and the same exit code as there."""
    sys.exit(_print_error("stopped by SIGTERM", SIGTERM_EXIT_CODE))


def report_error(error: Exception) -> int:
    """One line for what a user can get wrong, with its exit code; what is a bug is raised with its traceback."""
    if isinstance(error, UserError):
        return _print_error(str(error), error.exit_code)
    if type(error).__name__ == "Abort":  # and how older ones do
        return _print_error("stopped by SIGINT", SIGINT_EXIT_CODE)
    if short := as_memory_error(error):
        return _print_error(str(short), short.exit_code)
    if name := getattr(error, "option_name", ""):  # Click's NoSuchOption
        command = getattr(getattr(error, "ctx", None), "info_name", "")
        if remedy := renaming_remedy(name.lstrip("-").replace("-", "_"), command):
            return _print_error(f"no such option: {name}; {remedy}", UsageError.exit_code)
    if isinstance(getattr(error, "format_message", None), types.MethodType):  # a misspelt option, in Typer's words
        return _print_error(" ".join(error.format_message().split()), getattr(error, "exit_code", 2))  # type: ignore[attr-defined]
    raise error


def _print_error(message: str, exit_code: int) -> int:
    print(f"fastcifar: {message}", file=sys.stderr)
    return exit_code
