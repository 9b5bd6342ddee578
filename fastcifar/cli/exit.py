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

from fastcifar.errors import UserError, out_of_memory

SIGINT, SIGTERM = 130, 143  # the exit codes


def run_to_the_end(app: Callable[..., object]) -> NoReturn:
    """Runs the command of sys.argv and turns what a user got wrong into one line and an exit code."""
    warnings.showwarning = warned
    signal.signal(signal.SIGTERM, terminated)
    try:
        code = app(standalone_mode=False)
        if code == SIGINT:  # how Typer passes on a KeyboardInterrupt
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(_fail("stopped by SIGINT", SIGINT))
    except BrokenPipeError:
        sys.exit(141)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        sys.exit(explained(error))
    sys.exit(code if isinstance(code, int) else 0)


def terminated(*_: Any) -> None:
    """SIGTERM where no run is training: out through every `finally`, and the same exit code as there."""
    sys.exit(_fail("stopped by SIGTERM", SIGTERM))


def warned(message: Warning | str, category: type[Warning], *_: Any) -> None:
    """A warning as one line like an error's, without a place in the source."""
    kind = "" if category is UserWarning else f"{category.__name__}: "
    print(f"fastcifar: warning: {kind}{message}", file=sys.stderr)


def explained(error: Exception) -> int:
    """One line for what a user can get wrong, with its exit code; what is a bug is raised with its traceback."""
    if isinstance(error, UserError):
        return _fail(str(error), error.exit_code)
    if type(error).__name__ == "Abort":  # and how older ones do
        return _fail("stopped by SIGINT", SIGINT)
    if short := out_of_memory(error):
        return _fail(str(short), short.exit_code)
    if isinstance(getattr(error, "format_message", None), types.MethodType):  # a misspelt option, in Typer's words
        return _fail(" ".join(error.format_message().split()), getattr(error, "exit_code", 2))  # type: ignore[attr-defined]
    raise error


def _fail(line: str, code: int) -> int:
    print(f"fastcifar: {line}", file=sys.stderr)
    return code
