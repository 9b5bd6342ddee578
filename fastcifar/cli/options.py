"""The decorator of every command: options from recipe fields, --json, --debug, and printing of the result."""

import inspect
import json
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import typer
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python
from rich.console import Console, RenderableType

from fastcifar.cli.completion import TABLES, complete_arch, complete_from_tables, complete_recipe, complete_run
from fastcifar.cli.exit import optional_output, stdout_errors
from fastcifar.errors import UsageError, escape
from fastcifar.format import DataConsole, add_wrap_points, format_option_value, option_flag
from fastcifar.recipe import SECTION_STARTS, Recipe, section_fields

METAVARS = {dict: "KEY=VALUE", int: "INT", float: "FLOAT", str: "TEXT"}


def argument(default: Any, metavar: str, help_text: str, **settings: Any) -> Any:
    """Return the declaration of a positional argument, which is required if `default` is `...`."""
    return typer.Argument(default, metavar=metavar, help=help_text, **settings)


def option(default: Any, metavar: str, help_text: str, *flags: str, **settings: Any) -> Any:
    """Return the declaration of an option with a value; its flag is the name of the parameter unless given."""
    return typer.Option(default, *flags, metavar=metavar, help=help_text, **settings)


def switch(flag: str, help_text: str, *further_flags: str) -> Any:
    """Return the declaration of an option without a value, by default off."""
    return typer.Option(False, flag, *further_flags, metavar="", help=help_text)  # newer versions of Typer show <bool>


RUN = argument(..., "RUN|CKPT", "run folder, checkpoint file or pretrained:NAME", autocompletion=complete_run)
RECIPE = option(None, "NAME|FILE", "name of a built-in recipe, or a TOML file", autocompletion=complete_recipe)
CHECKPOINT_ARCH = option(None, "NAME", "architecture of a checkpoint that does not name it")
JSON = switch("--json", "print one JSON document as the last line of stdout")
DEBUG = switch("--debug", "print the traceback of an error")
IMPORTS = option(
    None, "FILE.py|MODULE", "Python file or module with additional architectures; may be repeated", "--import"
)


class Output(NamedTuple):
    """What a command prints: `document` as one line of JSON with --json, else the result of `format_document`, if any.

    `last_lines` are printed after it, or to stderr with --json, and are not wrapped.
    """

    document: Any
    format_document: Callable[[Any], RenderableType] | None = None
    exit_code: int = 0
    last_lines: Sequence[str] = ()


def import_torch(console: Console) -> None:
    """Import torch, which takes some seconds, and say so on a terminal."""
    with console.status("importing PyTorch ..."):
        import torch  # noqa: F401


def import_networks(console: Console, imports: Sequence[str] | None, arguments: dict[str, Any]) -> None:
    """Import the files and modules of --import, and those of architectures MODULE:NAME in the `arguments`."""
    names = ",".join(arguments.get(name) or "" for name in ("name", "arch", "archs")).split(",")
    modules = [name.rpartition(":")[0] for name in names if ":" in name]
    if not (imports or modules):
        return
    import_torch(console)
    from fastcifar.models.imports import IMPORTED, import_models

    for source in imports or ():
        import_models(source)
    for module in modules:
        if module.endswith(".py"):
            raise UsageError(f"--arch: {module} is a file, not a module", f"use --import {module} --arch NAME")
        if module not in IMPORTED:
            import_models(module)


def command(
    app: typer.Typer,
    name: str | None = None,
    fields: Iterable[str] = (),
    needs_output: bool = True,
    builds_networks: bool = False,
    shown_defaults: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., Output]], Callable[..., int]]:
    """Return a decorator that adds a function to `app` as a command, by default with the name of the function.

    The options of the command are the parameters of the function, the recipe fields `fields` in place of `**options`,
    --json and --debug. The values of recipe fields are checked before the function runs, and so before it imports
    torch. A parameter `console` is the console for progress messages: stderr with --json, else stdout. Without
    `needs_output`, the command goes on if stdout or stderr is closed or full. With `builds_networks`, it has --import.
    `shown_defaults` replaces the defaults of recipe fields in the help text; "" shows none.
    """
    recipe_fields = list(fields)

    def decorate(function: Callable[..., Output]) -> Callable[..., int]:
        signature = inspect.signature(function, eval_str=True)

        def run(**arguments: Any) -> int:
            with nullcontext() if needs_output else optional_output():
                return run_and_print(**arguments)

        def run_and_print(as_json: bool, debug: bool, **arguments: Any) -> int:
            given = {name: arguments[name] for name in recipe_fields if arguments[name] is not None}
            Recipe.check_options(given)
            console = DataConsole(stderr=as_json)
            if builds_networks:
                import_networks(console, arguments.pop("imports"), arguments)
            if "console" in signature.parameters:
                arguments["console"] = console
            output = function(**arguments)
            with stdout_errors():
                if as_json:
                    if not console.quiet:
                        print(json.dumps(to_jsonable_python(output.document, inf_nan_mode="null")))
                elif output.format_document:
                    text = output.format_document(output.document)
                    print(escape(text, kept="\n\t")) if isinstance(text, str) else console.print(text, crop=False)
                for line in output.last_lines:
                    console.print(line, highlight=False, soft_wrap=True)
            return output.exit_code

        parameters = [
            *(p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD and p.name != "console"),
            _parameter("as_json", JSON, bool),
            _parameter("debug", DEBUG, bool),
            *([_parameter("imports", IMPORTS, list[str] | None)] if builds_networks else []),
            *(_option_parameter(name, shown_defaults or {}) for name in recipe_fields),
        ]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return app.command(name or function.__name__, help=inspect.getdoc(function))(run)

    return decorate


def _option_parameter(name: str, shown_defaults: Mapping[str, str]) -> inspect.Parameter:
    """Return the parameter of a command for a recipe field, with the help text, choices and default of the field."""
    field, flag = Recipe.model_fields[name], option_flag(name)
    section = next(section for section in SECTION_STARTS if name in section_fields(section))
    details: dict[str, Any] = {"rich_help_panel": section.capitalize(), "show_default": False}
    types = [field.annotation, *typing.get_args(field.annotation)]
    choices = next((list(typing.get_args(item)) for item in types if typing.get_origin(item) is typing.Literal), [])
    help_text = field.description or ""
    if not all(choice in help_text for choice in choices):
        help_text += f": {', '.join(choices[:-1])} or {choices[-1]}"
    if default := shown_defaults.get(name, _shown_default(field, section)):
        help_text += f" \\[default: {default}]"
    value_type: Any = list[str] if name == "optimizer_arg" else str
    if name == "arch":
        details["autocompletion"] = complete_arch
    elif name in TABLES:
        details["autocompletion"] = complete_from_tables(name)
    elif name in ("init", "resume"):
        details["autocompletion"] = complete_run
    elif choices:
        details["autocompletion"] = lambda incomplete: [choice for choice in choices if choice.startswith(incomplete)]
    if bool in types:
        value_type, details["metavar"] = bool, ""
        flag += "" if field.default is False else f"/--no-{flag[2:]}"
    else:
        named = (METAVARS[item] for item in [*map(typing.get_origin, types), *types] if item in METAVARS)
        details["metavar"] = "NAME" if choices else next(named, "INT,INT,...")
    return _parameter(name, typer.Option(None, flag, help=help_text, **details), value_type | None)


def _shown_default(field: FieldInfo, section: str) -> str:
    """Return the default of a recipe field as the help text shows it, or "" if it shows none."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and extra["shown_default"]:
        return str(extra["shown_default"])
    if field.default is None:
        return "that of --arch" if section == "network" else ""
    if field.default is False or field.default == {}:
        return ""
    return add_wrap_points(format_option_value(field.default))


def _parameter(name: str, declaration: Any, value_type: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=declaration, annotation=value_type)
