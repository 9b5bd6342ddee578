"""Names that options had in earlier versions: refused where a person writes them, translated where an old file has them.

The table is `renamed.toml`. No torch here.
"""

from __future__ import annotations

import functools
import re
import tomllib
from importlib import resources
from typing import Any

from fastcifar.format import option_flag


@functools.cache
def renamed_options(command: str = "") -> dict[str, list[str]]:
    """Old name -> new names, of the options of every command and of those that only `command` has."""
    text = resources.files("fastcifar").joinpath("renamed.toml").read_text(encoding="utf-8")
    tables = tomllib.loads(text)
    return {**tables["options"], **tables.get(command, {})}


def renaming_remedy(name: str, command: str = "") -> str:
    """What to write instead of the option `name`, as flags; "" if it was never renamed."""
    new_names = renamed_options(command).get(name, [])
    return f"it was renamed: use {' or '.join(map(option_flag, new_names))}" if new_names else ""


def upgrade_options(values: dict[str, Any]) -> dict[str, Any]:
    """The options of a saved recipe with today's names and values; what is not in the table is left as it is."""
    upgraded: dict[str, Any] = {}
    for name, value in values.items():
        if name not in renamed_options():
            upgraded[name] = value
        elif name == "decay_on":
            upgraded["bias_decay"] = value == "all"
        elif name == "save_every":
            upgraded.update(_upgrade_save_every(str(value)))
        else:
            upgraded[renamed_options()[name][0]] = value
    if isinstance(upgraded.get("augment"), str):
        upgraded["augment"] = re.sub(r":grey\b", ":gray", upgraded["augment"])
    return upgraded


def _upgrade_save_every(value: str) -> dict[str, int]:
    """`500s`, every 500 steps and not at the ends of epochs, or `1e`, every epoch."""
    count = int(value[:-1]) if value[:-1].isdigit() else 1
    return {"save_every_epochs": 0, "save_every_steps": count} if value.endswith("s") else {"save_every_epochs": count}
