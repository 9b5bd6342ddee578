"""Numbers, times and option values as text; a value that was not measured is shown as a dash, never as zero."""

import itertools
import json
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment
from rich.text import Text

from fastcifar.errors import escape

MISSING = "-"  # the text of a value that was not measured
COLUMN_GAP = "  "
MIN_TEXT_WIDTH, MAX_TEXT_WIDTH = 16, 48  # characters: texts are wrapped to no less, numbers left out for no more


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
    """Return `text` on one line, with single spaces and other characters escaped (see `escape`)."""
    return escape(" ".join(str(text).split()))


def shorten(text: str, length: int = 40) -> str:
    """Return `text` with an ellipsis in place of its middle if it is longer than `length` characters."""
    tail = length // 3
    return text if len(text) <= length else f"{text[: length - tail - 1]}…{text[-tail:]}"


def csv_cell(value: Any) -> Any:
    """Return a cell of a CSV file; a text that a spreadsheet would take for a formula begins with an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def add_wrap_points(text: str) -> str:
    """Insert a space after each comma of a list such as `crop:4:zero,flip`, so that a table can wrap the text."""
    return re.sub(r",(?=[a-z])", ", ", text)


def whole_line(text: str, style: str = "") -> Text:
    """Return a line that a console prints whole, even if it is wider than the terminal: a path can be copied."""
    return Text(text, style, no_wrap=True, overflow="ignore")


@dataclass(frozen=True)
class KeyValueTable:
    """A table of two columns without a header, with the names in bold. Values are wrapped between words only.

    Rows whose value is None are left out.
    """

    rows: Mapping[str, str | None]
    title: str | None = None
    name_width: int = 0  # minimum width of the first column, in characters

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = {name: value for name, value in self.rows.items() if value is not None}
        indent = max([self.name_width, *map(len, rows)]) + len(COLUMN_GAP)
        if self.title:
            yield whole_line(self.title, "italic")
        for name, value in rows.items():
            lines = [part for line in value.split("\n") for part in _wrap(escape(line), options.max_width - indent)]
            yield whole_line("").append(f"{name:<{indent}}", "bold").append(f"\n{' ' * indent}".join(lines))


class NumericTable:
    """A table of text columns `names`, right-aligned columns `numbers`, and a column of texts or paths on the right.

    Columns of numbers without a value are left out. If the table is wider than the terminal, the numbers after the
    first `num_required` are left out, the last ones first, and a line below names them; then the widest text columns
    are wrapped between words. Nothing is cut, and paths are not wrapped: the terminal wraps a line that is too wide.
    """

    def __init__(
        self,
        names: Iterable[str],
        numbers: Iterable[str] = (),
        title: str | None = None,
        *,
        num_required: int | None = None,
        description: str | None = None,
        path: str | None = None,
    ) -> None:
        names, numbers = list(names), list(numbers)
        self.headings = [*map(escape, names), *numbers, *filter(None, (description, path))]
        self.number_columns = range(len(names), len(names) + len(numbers))
        self.optional_columns = list(self.number_columns[len(numbers) if num_required is None else num_required :])
        self.path_column = len(self.headings) - 1 if path else None
        self.title = title
        self.rows: list[tuple[str, ...]] = []

    def add_row(self, *cells: str) -> None:
        """Add a row with a cell for each column."""
        self.rows.append(tuple(map(escape, cells)))

    @property
    def column_widths(self) -> dict[int, int]:
        """The width of the longest text in each column that has a value."""
        columns = enumerate(zip(self.headings, *self.rows, strict=True))
        has_value = {i: cells for i, cells in columns if i not in self.number_columns or {*cells[1:]} - {"", MISSING}}
        return {i: max(map(len, cells)) for i, cells in has_value.items()}

    @property
    def width(self) -> int:
        """The width with all columns that have a value."""
        widths = self.column_widths.values()
        return sum(widths) + len(COLUMN_GAP) * (len(widths) - 1)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = self.column_widths
        shown = list(widths)

        def excess(longest_text: int) -> int:
            needed = [widths[i] if i in self.number_columns else min(widths[i], longest_text) for i in shown]
            return sum(needed) + len(COLUMN_GAP) * (len(shown) - 1) - options.max_width

        omitted: list[str] = []
        for i in reversed(self.optional_columns):
            if i in shown and excess(MAX_TEXT_WIDTH) > 0:
                shown.remove(i)
                omitted.insert(0, self.headings[i])
        wrapped = [i for i in shown if i not in (*self.number_columns, self.path_column)]
        widest = max(wrapped, key=widths.__getitem__)
        while excess(sys.maxsize) > 0 and widths[widest] > MIN_TEXT_WIDTH:
            widths[widest] -= 1
            widest = max(wrapped, key=widths.__getitem__)
        if self.title:
            yield whole_line(self.title, "italic")
        for row in (self.headings, *self.rows):
            cells = [_wrap(row[i], widths[i]) if i in wrapped else [row[i]] for i in shown]
            if len(cells[0][0]) > widths[0]:  # a word that is wider than the column
                yield whole_line(cells[0][0])
                cells[0][0] = ""
            for parts in itertools.zip_longest(*cells, fillvalue=""):
                padded = [
                    part.rjust(widths[i]) if i in self.number_columns else part.ljust(widths[i])
                    for i, part in zip(shown, parts, strict=True)
                ]
                yield whole_line(COLUMN_GAP.join(padded).rstrip(), "bold" if row is self.headings else "")
        if omitted:
            yield f"left out to fit {options.max_width} columns: {', '.join(omitted)}; --json prints all values"


def _wrap(text: str, width: int) -> list[str]:
    """Split a text between words into lines of `width`; [""] for an empty text. A longer word is not split."""
    return textwrap.wrap(text, max(width, MIN_TEXT_WIDTH), break_long_words=False, break_on_hyphens=False) or [""]


class DataConsole(Console):
    """A console that shows data as it is: without markup and emoji codes, and with control characters escaped."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(escape(text, kept="\n"), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else escape(text, kept="\n"), style, control)
