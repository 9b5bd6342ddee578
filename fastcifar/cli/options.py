"""Recipe fields as command-line options, and the options that several commands share.

Name, help text, choices and default of an option come from the field of `Recipe`, so that a new field becomes an option
of `train` without a change here. This module does not import torch.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from fastcifar.format import add_wrap_points, format_option_value, option_flag
from fastcifar.recipe import SECTION_FIRST_FIELDS, Recipe, section_fields

KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY
MAX_METAVAR_WIDTH = 18  # a longer list of choices would be broken within a word in a terminal of 80 columns

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
    """Return a decorator that replaces the `**options` of a command by options for the recipe fields `names`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        parameters = [p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
        parameters += [_option_parameter(name) for name in names]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

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
        details["metavar"], choices = _metavar_and_choices(field)
        help_text += f": {choices}" if choices else ""
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


def _metavar_and_choices(field: FieldInfo) -> tuple[str, str]:
    """Return the placeholder of the value in the help text, and the list of choices if it is too long for that."""
    types = [field.annotation, *typing.get_args(field.annotation)]
    for candidate in types:
        if typing.get_origin(candidate) is typing.Literal:
            *first, last = typing.get_args(candidate)
            metavar = "|".join((*first, last))
            return (metavar, "") if len(metavar) <= MAX_METAVAR_WIDTH else ("NAME", f"{', '.join(first)} or {last}")
    names = {dict: "KEY=VALUE", int: "INT", float: "FLOAT", str: "TEXT"}
    types = [*map(typing.get_origin, types), *types]
    return next((names[candidate] for candidate in types if candidate in names), "INT,INT,..."), ""
