"""Completion of option values in a shell, with names from the source code of the tables; torch is not imported."""

import ast
from collections.abc import Callable, Iterable
from pathlib import Path

import typer

from fastcifar.recipes import shipped_recipes

PACKAGE = Path(__file__).parents[1]

# option -> source files and the literal dicts in them whose keys are the names that the option takes
TABLES: dict[str, dict[str, str]] = {
    "arch": {"models/__init__.py": "MODELS"},
    "augment": {"data/augment.py": "AUGMENTS", "data/mixers.py": "MIXERS"},
    "loader": {"data/loaders.py": "LOADERS"},
    "optimizer": {"training/optimizers.py": "OPTIMIZERS"},
    "schedule": {"training/lr_schedule.py": "SCHEDULES"},
    "track": {"training/trackers.py": "TRACKERS"},
    "tta": {"training/evaluate.py": "VIEWS"},
}


def table_keys(path: Path, table: str) -> list[str]:
    """Return the keys, string literals, of the annotated dict `table` at the top level of a Python file."""
    statements = ast.parse(path.read_text(encoding="utf-8")).body
    annotated = [statement for statement in statements if isinstance(statement, ast.AnnAssign)]
    (value,) = (statement.value for statement in annotated if ast.unparse(statement.target) == table)
    assert isinstance(value, ast.Dict), (path, table)
    return [key.value for key in value.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]


def complete_from_tables(name: str) -> Callable[[str], list[str]]:
    """Return the completion function of the option `name` of `TABLES`; a list is completed in its last item."""

    def complete(incomplete: str) -> list[str]:
        done, comma, start = incomplete.rpartition(",")
        names = (key for file, table in TABLES[name].items() for key in table_keys(PACKAGE / file, table))
        return [f"{done}{comma}{key}" for key in names if key.startswith(start)]

    return complete


def complete_arch(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the architectures that begin with `incomplete`, with those in the files of --import, which are not run."""
    own = (name for source in ctx.params.get("imports") or () for name in networks_in_file(Path(source)))
    return [*complete_from_tables("arch")(incomplete), *_matching(own, incomplete)]


def networks_in_file(path: Path) -> list[str]:
    """Return the functions and classes of a Python file with a parameter `num_classes`, and what it adds to MODELS."""
    try:
        statements = ast.parse(path.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, ValueError):
        return []
    names = []
    for statement in statements:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            parameters = (node.arg for node in ast.walk(statement) if isinstance(node, ast.arg))
            names += [statement.name] * ("num_classes" in parameters)
        elif isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]).startswith("MODELS["):
            names += [node.value for node in ast.walk(statement.targets[0]) if isinstance(node, ast.Constant)]
    return names


def complete_recipe(incomplete: str) -> list[str]:
    """Return the shipped recipes and the TOML files in the current folder that begin with `incomplete`."""
    return _matching([*shipped_recipes(), *sorted(map(str, Path().glob("*.toml")))], incomplete)


def complete_run(incomplete: str) -> list[str]:
    """Return the run folders in runs/ that begin with `incomplete`, the newest first."""
    folders = sorted(Path("runs").glob("*/"), key=lambda folder: folder.name[-16:], reverse=True)
    return _matching(map(str, folders), incomplete)


def _matching(names: Iterable[str], start: str) -> list[str]:
    return [name for name in names if name.startswith(start)]
