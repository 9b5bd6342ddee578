"""Recipe files: those of the package, which are in this folder, and those of users and run folders."""

import os
from pathlib import Path
from typing import Any

from fastcifar.errors import UsageError, suggest_name
from fastcifar.files import load_toml
from fastcifar.renamed import upgrade_options


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes in the package: name -> TOML file."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.toml"))}


def load_recipe_values(source: str) -> dict[str, Any]:
    """Return the options of a shipped recipe, given by name, or of a TOML file. Raises `UsageError`."""
    path = shipped_recipes().get(source) or Path(source)
    if not os.path.isfile(path):
        remedy = f"{suggest_name(source, shipped_recipes())} or give the path of a TOML file"
        raise UsageError(f"no recipe {source!r}", remedy)
    return load_toml(path)


def load_saved_recipe(folder: Path) -> dict[str, Any]:
    """Return the options in the recipe.toml of a run folder, with their current names. Raises `UsageError`."""
    return upgrade_options(load_toml(folder / "recipe.toml"))
