"""Names that options had in earlier versions, listed in `renamed.toml`.

Command lines and recipe files that use an old name are refused with the new one. Run folders, checkpoints and sweeps of
earlier versions are read with the options translated.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastcifar.format import option_flag


@functools.cache
def renamed_options(command: str = "") -> dict[str, list[str]]:
    """Return old name -> new names, for the options of all commands and those that only `command` has."""
    tables = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    return {**tables["options"], **tables.get(command, {})}


def renaming_remedy(name: str, command: str = "", format_name: Callable[[str], str] = option_flag) -> str:
    """Return the advice to use the new name of an option, formatted by `format_name`; "" if it was never renamed."""
    new_names = renamed_options(command).get(name, [])
    return f"it was renamed: use {' or '.join(map(format_name, new_names))}" if new_names else ""


def upgrade_options(values: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a saved recipe with their current names and values."""
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
    """Translate `500s`, every 500 steps and not at the end of epochs, or `1e`, every epoch."""
    count = int(value[:-1]) if value[:-1].isdigit() else 1
    return {"save_every_epochs": 0, "save_every_steps": count} if value.endswith("s") else {"save_every_epochs": count}
