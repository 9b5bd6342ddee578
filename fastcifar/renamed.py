"""Earlier names of options (`renamed.toml`): refused in command lines and recipe files, translated in saved results."""

import functools
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastcifar.format import option_flag


@functools.cache
def renamed_options(command: str = "") -> dict[str, list[str]]:
    """Map old to new names, for the options that all commands have and those that only `command` has."""
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
        elif name == "save_every":  # "500s": every 500 steps, not at the end of epochs; "2e": every 2 epochs
            text = str(value)
            count = int(text[:-1]) if re.fullmatch("[0-9]{1,9}", text[:-1]) else 1
            in_steps = {"save_every_epochs": 0, "save_every_steps": count}
            upgraded |= in_steps if text.endswith("s") else {"save_every_epochs": count}
        else:
            upgraded[renamed_options()[name][0]] = value
    if isinstance(upgraded.get("augment"), str):
        upgraded["augment"] = re.sub(r":grey\b", ":gray", upgraded["augment"])
    return upgraded
