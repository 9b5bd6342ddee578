"""Recipe fields as command line options, and the options that several commands share. No torch.

Name, help, choices and default of an option come from the field: a field added to `Recipe` is an option at once.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer

from fastcifar.format import format_option_value, option_flag
from fastcifar.recipe import SECTION_FIRST_FIELDS, Recipe, section_fields

KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY

JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON document as the last line of stdout")]
DebugOption = Annotated[bool, typer.Option("--debug", help="show tracebacks of errors")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="run a few steps and estimate time and memory of the whole run")
]
RecipeOption = Annotated[
    str | None, typer.Option("--recipe", metavar="NAME|FILE", help="name of a shipped recipe, or a TOML file")
]


def recipe_options(names: Iterable[str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace the `**options` of a command by one option for each of the recipe fields `names`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind != p.VAR_KEYWORD]
        added = [_option_parameter(name) for name in names]
        command.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *added)}
        return command

    return decorate


def _option_parameter(name: str) -> inspect.Parameter:
    field, spelling = Recipe.model_fields[name], option_flag(name)
    panel = next(title for title in SECTION_FIRST_FIELDS if name in section_fields(title)).capitalize()
    boolean = bool in (field.annotation, *typing.get_args(field.annotation))
    has_default = field.default not in (None, False) and name != "optimizer_arg"
    default = f" \\[default: {format_option_value(field.default)}]" if has_default else ""
    if boolean and field.default is not False:
        spelling = f"{spelling}/--no-{name.replace('_', '-')}"
    shown = {"help": f"{field.description}{default}", "rich_help_panel": panel, "show_default": False}
    info = typer.Option(spelling, **shown) if boolean else typer.Option(spelling, metavar=_metavar(field), **shown)
    kind = bool if boolean else list[str] if name == "optimizer_arg" else str
    return inspect.Parameter(name, KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info])


def _metavar(field: Any) -> str:
    """The values as the help shows them: the choices, or the type."""
    kinds = [field.annotation, *typing.get_args(field.annotation)]
    for kind in kinds:
        if typing.get_origin(kind) is typing.Literal:
            return "|".join(typing.get_args(kind))
    named = {int: "INT", float: "FLOAT", str: "TEXT", dict: "KEY=VALUE"}
    found = [named[kind] for kind in [*kinds, *map(typing.get_origin, kinds)] if kind in named]
    return found[0] if found else "INT,INT,..."
