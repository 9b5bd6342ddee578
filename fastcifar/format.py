"""Numbers, times and option values as text; a value that was not measured is shown as a dash, never as zero."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any

from rich.table import Table

MISSING = "-"  # the text of a value that was not measured


def format_percent(fraction: float | None, digits: int = 2) -> str:
    """Format a fraction as a percentage with `digits` decimals: 0.9399 -> `93.99 %`."""
    return MISSING if fraction is None else f"{100 * fraction:.{digits}f} %"


def format_decimal(value: float | None, digits: int, scale: float = 1) -> str:
    """Format `scale * value` with `digits` decimals and thousands separators: (1234.5, 2) -> `1,234.50`."""
    return MISSING if value is None else f"{scale * value:,.{digits}f}"


def format_count(count: float | None) -> str:
    """Format a count as an integer, a mean of counts with one decimal: 4697742 -> `4,697,742`, 7.5 -> `7.5`."""
    return MISSING if count is None else format_decimal(count, 0 if count == round(count) else 1)


def format_short_number(value: float | None) -> str:
    """Format a measurement, such as images/s: three significant digits below 100, an integer from 100 on."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def format_mean_std(mean: float, std: float | None, digits: int = 2, scale: float = 1) -> str:
    """Format a mean and its standard deviation, both times `scale`: `93.99 ± 0.12`; only the mean if `std` is None."""
    spread = "" if std is None else f" ± {scale * std:.{digits}f}"
    return f"{scale * mean:.{digits}f}{spread}"


def format_memory(num_bytes: float | None) -> str:
    """Format a number of bytes in GiB with two decimals."""
    return MISSING if num_bytes is None else f"{num_bytes / 2**30:.2f} GiB"


def format_duration(seconds: float | None) -> str:
    """Format a duration as `2:01:40` (hours, minutes, seconds), or as `9.5 s` below ten seconds."""
    if seconds is None:
        return MISSING
    return str(timedelta(seconds=round(seconds))) if round(seconds) >= 10 else f"{seconds:.1f} s"


def format_timestamp(seconds: float | None = None, *, for_file_name: bool = False) -> str:
    """Format a Unix time, by default the current one, in UTC: `2026-11-21T05:20:22Z`, or `20261121T052022Z`."""
    return time.strftime("%Y%m%dT%H%M%SZ" if for_file_name else "%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def format_option_value(value: Any, missing: str = MISSING) -> str:
    """Format the value of an option on one line: `on`, `4,4,3`, `0.0005`, `nesterov=true, momentum=0.9`.

    None and an empty mapping become `missing`. Two different numbers never have the same text.
    """
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    elif isinstance(value, Mapping):
        value = ", ".join(f"{key}={json.dumps(item, default=str)}" for key, item in value.items()) or missing
    elif isinstance(value, float):
        short = f"{value:g}"
        value = short if float(short) == value else repr(float(value))
    return missing if value is None else one_line(value)


def format_options(options: Mapping[str, Any], separator: str = ", ") -> str:
    """Format options with their values: `arch=se68, blocks=4,4,3`."""
    return separator.join(f"{name}={format_option_value(value)}" for name, value in options.items())


def format_differences(
    before: Mapping[str, Any], after: Mapping[str, Any], names: Iterable[str], format_name: Callable[[str], str] = str
) -> str:
    """Format the options `names` that differ, for an error message: `lr 0.1, not 0.5, width unset, not 2`."""
    texts = ((name, *(format_option_value(side.get(name), "unset") for side in (before, after))) for name in names)
    return ", ".join(f"{format_name(name)} {expected}, not {actual}" for name, expected, actual in texts)


def format_toml_value(value: Any) -> str:
    """Format a value as TOML: the syntax of JSON, except that TOML has no surrogate pairs and escapes DEL."""
    if isinstance(value, dict):
        items = (f"{format_toml_value(str(key))} = {format_toml_value(item)}" for key, item in value.items())
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(format_toml_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def option_flag(name: str) -> str:
    """Return the command-line flag of an option: `batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def one_line(text: object) -> str:
    """Return `text` on one line, with printable characters only and single spaces."""
    return " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())


def add_wrap_points(text: str) -> str:
    """Insert a space after each comma of a list such as `crop:4:zero,flip`, so that a table can wrap the text."""
    return re.sub(r",(?=[a-z])", ", ", text)


def key_value_table(rows: Mapping[str, str], title: str | None = None, name_width: int | None = None) -> Table:
    """Return a table of two columns without a header, with the names in bold, by default as wide as the longest."""
    table = Table(title=title, show_header=False, title_justify="left", box=None)
    table.add_column(style="bold", no_wrap=True, width=name_width)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def numeric_table(names: Iterable[str], numbers: Iterable[str], title: str | None = None) -> Table:
    """Return an empty table with the columns `names` on the left and the right-aligned columns `numbers`."""
    table = Table(*names, title=title, title_justify="left", box=None)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
