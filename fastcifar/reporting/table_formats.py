"""Render the table of a report for a terminal or as Markdown, CSV or LaTeX.

Each format also lists the runs that are not averaged, with the reasons, and escapes text from run folders.
"""

from __future__ import annotations

import csv
import io
import re
import string
from collections.abc import Callable, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastcifar.format import add_wrap_points, format_option_value
from fastcifar.reporting.table import RESULT_COLUMNS, ReportTable

ACCURACY_NOTE = "accuracy: mean ± sample standard deviation over the n runs of a row, which differ only by the seed"
EXCLUDED_HEADING = "not in the means"
MAX_OPTION_WIDTH = 16  # characters; longer option values are listed above the terminal table
LATEX_ESCAPES = (
    {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    | {char: f"\\{char}" for char in "&%$#_{}"}
)


def render_terminal(table: ReportTable) -> RenderableType:
    """Return the values that all rows share on one line, the other columns as a table, and the excluded runs.

    On a terminal that is too narrow for one table, options and results are two tables.
    """
    texts = [table.row_texts(group) for group in table.rows]
    options = [heading for heading, column in table.columns.items() if column.is_option]
    shared = {name: texts[0][name] for name in [*options, "of", "notes"] if len({text[name] for text in texts}) == 1}
    headings = [heading for heading in texts[0] if heading not in shared]
    long_texts = dict.fromkeys(
        text[name] for text in texts for name in options if name in headings and len(text[name]) > MAX_OPTION_WIDTH
    )
    labels = {text: f"({letter})" for text, letter in zip(long_texts, string.ascii_lowercase, strict=False)}
    short_texts = [{heading: labels.get(text, text) for heading, text in row.items()} for row in texts]

    option_headings = ["row", *(heading for heading in headings if heading in options)]
    result_headings = [heading for heading in headings if heading not in options]
    single_table = _terminal_table(headings, short_texts)
    fits = Console(width=10_000).measure(single_table).maximum <= Console().width
    tables = (
        [single_table]
        if fits or len(option_headings) == 1
        else [_terminal_table(option_headings, short_texts), "", _terminal_table(result_headings, short_texts)]
    )
    notes = [f"{name}: {add_wrap_points(text)}" for name, text in shared.items() if text]
    notes += [f"{label}: {add_wrap_points(text)}" for text, label in labels.items()]
    output: list[RenderableType] = [Text("; ".join(notes)), "", *tables, "", Text(ACCURACY_NOTE)]
    if excluded := table.describe_excluded_runs():
        excluded_table = Table(*excluded[0], box=None, title=EXCLUDED_HEADING, title_justify="left")
        for run in excluded:
            excluded_table.add_row(*(Text(text, overflow="fold") for text in run.values()))
        output += ["", excluded_table]
    return Group(*output)


def _terminal_table(headings: Sequence[str], rows: Sequence[dict[str, str]]) -> Table:
    table = Table(box=None)
    for heading in headings:
        is_text = heading in ("row", "of", "notes")
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=heading in RESULT_COLUMNS)
    for row in rows:
        table.add_row(*(Text(row[heading], overflow="fold") for heading in headings))
    return table


def render_markdown(table: ReportTable) -> str:
    """Return two Markdown tables: the rows, and the runs that are not averaged."""
    rows = _markdown_table([table.row_texts(group) for group in table.rows])
    excluded = table.describe_excluded_runs()
    excluded_text = f"\n\n{EXCLUDED_HEADING.capitalize()}:\n\n{_markdown_table(excluded)}" if excluded else ""
    return f"{rows}\n\n{ACCURACY_NOTE.capitalize()}.{excluded_text}"


def _markdown_table(rows: Sequence[dict[str, str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(re.sub(r"([\\|*<`\[\]])", r"\\\1", cell) for cell in cells) + " |"

    headings = list(rows[0])
    return "\n".join([line(headings), "|" + "---|" * len(headings), *(line([*row.values()]) for row in rows)])


def render_csv(table: ReportTable) -> str:
    """Return CSV text with a line for each row: its unrounded values, and the runs that are not averaged."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for index, group in enumerate(table.rows):
        values = table.row_values(group)
        if index == 0:
            writer.writerow([*values, EXCLUDED_HEADING])
        excluded = [
            f"seed {format_option_value(record.seed)} {record.state}: {record.reason}" for record in group.excluded_runs
        ]
        cells = [format_option_value(value) if isinstance(value, list | dict) else value for value in values.values()]
        writer.writerow([*cells, "; ".join(excluded)])
    return text.getvalue().rstrip("\n")


def render_latex(table: ReportTable) -> str:
    """Return a LaTeX tabular for the booktabs package, with the runs that are not averaged as comments."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join("".join(LATEX_ESCAPES.get(char, char) for char in cell) for cell in cells) + r" \\"

    texts = [table.row_texts(group) for group in table.rows]
    excluded = [f"% {EXCLUDED_HEADING}: {', '.join(run.values())}" for run in table.describe_excluded_runs()]
    return "\n".join(
        [
            r"% \usepackage{booktabs}; " + ACCURACY_NOTE,
            rf"\begin{{tabular}}{{{'l' * len(texts[0])}}}",
            r"\toprule",
            line([*texts[0]]),
            r"\midrule",
            *(line([add_wrap_points(cell) for cell in text.values()]) for text in texts),
            r"\bottomrule",
            r"\end{tabular}",
            *excluded,
        ]
    )


TABLE_FORMATS: dict[str, Callable[[ReportTable], RenderableType]] = {
    "terminal": render_terminal,
    "markdown": render_markdown,
    "csv": render_csv,
    "latex": render_latex,
}
