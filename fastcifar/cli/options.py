"""Recipe fields as command-line options, and the options that several commands share.

Name, help text, choices and default of an option come from the field of `Recipe`, so that a new field becomes an option
of `train` without a change here. This module does not import torch.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from fastcifar.format import add_wrap_points, format_option_value, option_flag
from fastcifar.recipe import SECTION_FIRST_FIELDS, Recipe, section_fields

KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY

JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON document as the last line of stdout")]
DebugOption = Annotated[bool, typer.Option("--debug", help="print the traceback of an error")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="run a few steps and estimate the time and memory of the whole run")
]
RecipeOption = Annotated[
    str | None, typer.Option("--recipe", metavar="NAME|FILE", help="name of a shipped recipe, or a TOML file")
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN|CKPT", help="run folder or checkpoint file")]
CheckpointArchOption = Annotated[
    str | None, typer.Option("--arch", metavar="NAME", help="architecture of a checkpoint that does not name it")
]


def recipe_options(names: Iterable[str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that replaces the `**options` of a command by options for the recipe fields `names`.

    Their values are checked before the command runs, and so before it imports torch.
    """
    fields = list(names)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def checked_command(**arguments: Any) -> None:
            Recipe.check_options({name: arguments[name] for name in fields if arguments[name] is not None})
            command(**arguments)

        signature = inspect.signature(command, eval_str=True)
        parameters = [p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
        parameters += [_option_parameter(name) for name in fields]
        checked_command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        checked_command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return checked_command

    return decorate


def _option_parameter(name: str) -> inspect.Parameter:
    """Return the parameter of a command for the recipe field `name`."""
    field = Recipe.model_fields[name]
    section = next(section for section in SECTION_FIRST_FIELDS if name in section_fields(section))
    details: dict[str, Any] = {"rich_help_panel": section.capitalize(), "show_default": False}
    help_text, flag = field.description or "", option_flag(name)
    if bool in (field.annotation, *typing.get_args(field.annotation)):
        value_type: type = bool
        if field.default is not False:
            flag += f"/--no-{name.replace('_', '-')}"
    else:
        value_type = list[str] if name == "optimizer_arg" else str
        details["metavar"] = _metavar(field)
        if not all(choice in help_text for choice in _choices(field)):
            *first, last = _choices(field)
            help_text += f": {', '.join(first)} or {last}"
    details["help"] = help_text + _default_text(name, field)
    return inspect.Parameter(
        name, KEYWORD_ONLY, default=None, annotation=Annotated[value_type | None, typer.Option(flag, **details)]
    )


def _default_text(name: str, field: FieldInfo) -> str:
    """Return the default for the help text, ` [default: 128]`; nothing for flags, and where the description says it."""
    if field.default is None and name in section_fields("network"):
        return " \\[default: that of --arch]"
    if field.default is None or field.default is False or name == "optimizer_arg":
        return ""
    return f" \\[default: {add_wrap_points(format_option_value(field.default))}]"


def _choices(field: FieldInfo) -> tuple[str, ...]:
    """Return the values that the field accepts, in order; none if it is not a Literal."""
    types = [field.annotation, *typing.get_args(field.annotation)]
    return next((typing.get_args(item) for item in types if typing.get_origin(item) is typing.Literal), ())


def _metavar(field: FieldInfo) -> str:
    """Return the placeholder of the value in the help text."""
    if _choices(field):
        return "NAME"
    names = {dict: "KEY=VALUE", int: "INT", float: "FLOAT", str: "TEXT"}
    types = [field.annotation, *typing.get_args(field.annotation)]
    return next((names[item] for item in [*map(typing.get_origin, types), *types] if item in names), "INT,INT,...")
