"""The decorator of every command: options from recipe fields, --json, --debug, and printing of the result.

Name, help text, choices and default of an option come from the field of `Recipe`, so that a new field becomes an option
of `train` without a change here. This module does not import torch.
"""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Any, NamedTuple

import typer
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python
from rich.console import Console, RenderableType

from fastcifar.format import add_wrap_points, format_option_value, option_flag
from fastcifar.recipe import SECTION_FIRST_FIELDS, Recipe, section_fields

KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY


def argument(metavar: str, help_text: str) -> Any:
    """Return the declaration of a positional argument."""
    return typer.Argument(metavar=metavar, help=help_text)


def option(metavar: str, help_text: str, *flags: str, **settings: Any) -> Any:
    """Return the declaration of an option with a value; its flag is the name of the parameter unless given."""
    return typer.Option(*flags, metavar=metavar, help=help_text, **settings)


def switch(flag: str, help_text: str) -> Any:
    """Return the declaration of an option without a value."""
    return typer.Option(flag, help=help_text)


JsonOption = Annotated[bool, switch("--json", "print one JSON document as the last line of stdout")]
DebugOption = Annotated[bool, switch("--debug", "print the traceback of an error")]
RecipeOption = Annotated[str | None, option("NAME|FILE", "name of a shipped recipe, or a TOML file")]
RunArgument = Annotated[str, argument("RUN|CKPT", "run folder or checkpoint file")]
CheckpointArchOption = Annotated[str | None, option("NAME", "architecture of a checkpoint that does not name it")]


class Output(NamedTuple):
    """What a command prints: with --json `document` as one line of JSON, else what `format_document` returns for it."""

    document: Any
    format_document: Callable[[Any], RenderableType]
    exit_code: int = 0


def command(
    app: typer.Typer, name: str | None = None, fields: Iterable[str] = ()
) -> Callable[[Callable[..., Output]], Callable[..., int]]:
    """Return a decorator that adds a function to `app` as a command, by default with the name of the function.

    The options of the command are the parameters of the function, those of the recipe fields `fields` in place of
    `**options`, --json and --debug. The values of recipe fields are checked before the function runs, and so before it
    imports torch. A parameter `console` is the console for progress messages: stderr with --json, else stdout.
    """
    recipe_fields = list(fields)

    def decorate(function: Callable[..., Output]) -> Callable[..., int]:
        signature = inspect.signature(function, eval_str=True)

        def run(as_json: bool, debug: bool, **arguments: Any) -> int:
            given = {name: arguments[name] for name in recipe_fields if arguments[name] is not None}
            Recipe.check_options(given)
            console = Console(stderr=as_json)
            if "console" in signature.parameters:
                arguments["console"] = console
            output = function(**arguments)
            if not as_json:
                text = output.format_document(output.document)
                print(text) if isinstance(text, str) else console.print(text)
            elif not console.quiet:
                print(json.dumps(to_jsonable_python(output.document)))
            return output.exit_code

        parameters = [
            *(p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD and p.name != "console"),
            inspect.Parameter("as_json", KEYWORD_ONLY, default=False, annotation=JsonOption),
            inspect.Parameter("debug", KEYWORD_ONLY, default=False, annotation=DebugOption),
            *map(_option_parameter, recipe_fields),
        ]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return app.command(name or function.__name__, help=inspect.getdoc(function))(run)

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
