"""FORMATS: the table of an ablation for a terminal, as Markdown, CSV and LaTeX, each with who is in no mean, and why.

Whatever comes from a run folder is escaped as the format needs it. Nothing is computed here.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastcifar.format import add_wrap_points, format_option_value
from fastcifar.reporting.table import RESULT_COLUMNS, ReportTable

ACCURACY_NOTE = "accuracy: mean ± sample standard deviation over the n runs of a row, which differ by the seed alone"
EXCLUDED_HEADING = "not in the means"
MAX_OPTION_WIDTH = 16  # letters of a knob in the terminal's table; what is longer is said above it
LATEX_ESCAPES = (
    {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    | {letter: f"\\{letter}" for letter in "&%$#_{}"}
)


def render_terminal(table: ReportTable) -> RenderableType:
    """What all rows share in one line, the rest as a table, and the runs that are not averaged.

    On a narrow terminal the knobs come first, in a table of their own.
    """
    texts = [table.row_texts(row) for row in table.rows]
    knobs = [heading for heading, column in table.columns.items() if column.is_option]
    shared = {name: texts[0][name] for name in [*knobs, "of", "notes"] if len({text[name] for text in texts}) == 1}
    shown = [heading for heading in texts[0] if heading not in shared]
    long = dict.fromkeys(
        text[name] for text in texts for name in knobs if name in shown and len(text[name]) > MAX_OPTION_WIDTH
    )
    letters = {text: f"({chr(ord('a') + place)})" for place, text in zip(range(26), long, strict=False)}

    def drawn(headings: Sequence[str]) -> Table:
        made = Table(box=None)
        for heading in headings:
            is_text = heading in ("row", "of", "notes")
            made.add_column(heading, justify="left" if is_text else "right", no_wrap=heading in RESULT_COLUMNS)
        for text in texts:
            made.add_row(*(Text(letters.get(text[heading], text[heading]), overflow="fold") for heading in headings))
        return made

    results = [heading for heading in shown if heading not in knobs]
    fits = Console(width=10_000).measure(drawn(shown)).maximum <= Console().width
    asked = ["row", *(heading for heading in shown if heading in knobs)]
    tables = [drawn(shown)] if fits or len(asked) == 1 else [drawn(asked), "", drawn(results)]
    said = [f"{name}: {add_wrap_points(text)}" for name, text in shared.items() if text]
    said += [f"{letter}: {add_wrap_points(text)}" for text, letter in letters.items()]
    parts: list[RenderableType] = [Text("; ".join(said)), "", *tables, "", Text(ACCURACY_NOTE)]
    if left_out := table.describe_excluded_runs():
        others = Table(*left_out[0], box=None, title=EXCLUDED_HEADING, title_justify="left")
        for record in left_out:
            others.add_row(*(Text(text, overflow="fold") for text in record.values()))
        parts += ["", others]
    return Group(*parts)


def render_markdown(table: ReportTable) -> str:
    """Two tables: the rows, and the runs that are not averaged."""
    shown = _markdown_table([table.row_texts(row) for row in table.rows])
    left_out = table.describe_excluded_runs()
    others = f"\n\n{EXCLUDED_HEADING.capitalize()}:\n\n{_markdown_table(left_out)}" if left_out else ""
    return f"{shown}\n\n{ACCURACY_NOTE.capitalize()}.{others}"


def _markdown_table(records: Sequence[dict[str, str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(re.sub(r"([\\|*<`\[\]])", r"\\\1", cell) for cell in cells) + " |"

    headings = list(records[0])
    return "\n".join([line(headings), "|" + "---|" * len(headings), *(line([*record.values()]) for record in records)])


def render_csv(table: ReportTable) -> str:
    """A line for each row: its values, not rounded, and why which runs are not averaged."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for place, row in enumerate(table.rows):
        values = table.row_values(row)
        if place == 0:
            writer.writerow([*values, EXCLUDED_HEADING])
        missing = [
            f"seed {format_option_value(record.seed)} {record.state}: {record.reason}" for record in row.excluded_runs
        ]
        cells = [format_option_value(value) if isinstance(value, list | dict) else value for value in values.values()]
        writer.writerow([*cells, "; ".join(missing)])
    return text.getvalue().rstrip("\n")


def render_latex(table: ReportTable) -> str:
    """A tabular for booktabs, and the runs that are not averaged as comments."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join("".join(LATEX_ESCAPES.get(letter, letter) for letter in cell) for cell in cells) + r" \\"

    texts = [table.row_texts(row) for row in table.rows]
    left_out = [f"% {EXCLUDED_HEADING}: {', '.join(record.values())}" for record in table.describe_excluded_runs()]
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
            *left_out,
        ]
    )


TABLE_FORMATS: dict[str, Callable[[ReportTable], RenderableType]] = {
    "terminal": render_terminal,
    "markdown": render_markdown,
    "csv": render_csv,
    "latex": render_latex,
}
