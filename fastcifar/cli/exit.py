"""The end of a command: errors in one line on stderr, and exit codes."""

from __future__ import annotations

import re
import sys

from fastcifar.device import as_memory_error
from fastcifar.errors import UsageError, UserError
from fastcifar.recipes import shipped_recipes
from fastcifar.renamed import renaming_remedy

SIGINT_EXIT_CODE, BROKEN_PIPE_EXIT_CODE, SIGTERM_EXIT_CODE = 130, 141, 143  # 128 + the number of the signal


def report_error(error: Exception) -> int:
    """Print a user error in one line and return its exit code; raise any other error again."""
    if user_error := error if isinstance(error, UserError) else as_memory_error(error):
        return print_error(str(user_error), user_error.exit_code)
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
    """Print `message` to stderr, and return `exit_code`."""
    print(f"fastcifar: {message}", file=sys.stderr)
    return exit_code
