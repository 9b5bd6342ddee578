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

from fastcifar.reporting.records import breakable, spelt
from fastcifar.reporting.table import MEASURED, Ablation

MEANING = "accuracy: mean ± sample standard deviation over the n runs of a row, which differ by the seed alone"
NOT_AVERAGED = "not in the means"
WIDEST = 16  # letters of a knob in the terminal's table; what is longer is said above it
LATEX = (
    {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    | {letter: f"\\{letter}" for letter in "&%$#_{}"}
)


def terminal(table: Ablation) -> RenderableType:
    """What all rows share in one line, the rest as a table, and the runs that are not averaged.

    On a narrow terminal the knobs come first, in a table of their own.
    """
    texts = [table.texts(row) for row in table.rows]
    knobs = [heading for heading, column in table.columns.items() if column.is_knob]
    shared = {name: texts[0][name] for name in [*knobs, "of", "notes"] if len({text[name] for text in texts}) == 1}
    shown = [heading for heading in texts[0] if heading not in shared]
    long = dict.fromkeys(text[name] for text in texts for name in knobs if name in shown and len(text[name]) > WIDEST)
    letters = {text: f"({chr(ord('a') + place)})" for place, text in zip(range(26), long, strict=False)}

    def drawn(headings: Sequence[str]) -> Table:
        made = Table(box=None)
        for heading in headings:
            is_text = heading in ("row", "of", "notes")
            made.add_column(heading, justify="left" if is_text else "right", no_wrap=heading in MEASURED)
        for text in texts:
            made.add_row(*(Text(letters.get(text[heading], text[heading]), overflow="fold") for heading in headings))
        return made

    results = [heading for heading in shown if heading not in knobs]
    fits = Console(width=10_000).measure(drawn(shown)).maximum <= Console().width
    asked = ["row", *(heading for heading in shown if heading in knobs)]
    tables = [drawn(shown)] if fits or len(asked) == 1 else [drawn(asked), "", drawn(results)]
    said = [f"{name}: {breakable(text)}" for name, text in shared.items() if text]
    said += [f"{letter}: {breakable(text)}" for text, letter in letters.items()]
    parts: list[RenderableType] = [Text("; ".join(said)), "", *tables, "", Text(MEANING)]
    if left_out := table.left_out():
        others = Table(*left_out[0], box=None, title=NOT_AVERAGED, title_justify="left")
        for record in left_out:
            others.add_row(*(Text(text, overflow="fold") for text in record.values()))
        parts += ["", others]
    return Group(*parts)


def markdown(table: Ablation) -> str:
    """Two tables: the rows, and the runs that are not averaged."""
    shown = _markdown_table([table.texts(row) for row in table.rows])
    left_out = table.left_out()
    others = f"\n\n{NOT_AVERAGED.capitalize()}:\n\n{_markdown_table(left_out)}" if left_out else ""
    return f"{shown}\n\n{MEANING.capitalize()}.{others}"


def _markdown_table(records: Sequence[dict[str, str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(re.sub(r"([\\|*<`\[\]])", r"\\\1", cell) for cell in cells) + " |"

    headings = list(records[0])
    return "\n".join([line(headings), "|" + "---|" * len(headings), *(line([*record.values()]) for record in records)])


def as_csv(table: Ablation) -> str:
    """A line for each row: its values, not rounded, and why which runs are not averaged."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for place, row in enumerate(table.rows):
        values = table.values(row)
        if place == 0:
            writer.writerow([*values, NOT_AVERAGED])
        missing = [f"seed {spelt(record.seed)} {record.state}: {record.reason}" for record in row.left_out]
        cells = [spelt(value) if isinstance(value, list | dict) else value for value in values.values()]
        writer.writerow([*cells, "; ".join(missing)])
    return text.getvalue().rstrip("\n")


def latex(table: Ablation) -> str:
    """A tabular for booktabs, and the runs that are not averaged as comments."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join("".join(LATEX.get(letter, letter) for letter in cell) for cell in cells) + r" \\"

    texts = [table.texts(row) for row in table.rows]
    left_out = [f"% {NOT_AVERAGED}: {', '.join(record.values())}" for record in table.left_out()]
    return "\n".join(
        [
            r"% \usepackage{booktabs}; " + MEANING,
            rf"\begin{{tabular}}{{{'l' * len(texts[0])}}}",
            r"\toprule",
            line([*texts[0]]),
            r"\midrule",
            *(line([breakable(cell) for cell in text.values()]) for text in texts),
            r"\bottomrule",
            r"\end{tabular}",
            *left_out,
        ]
    )


FORMATS: dict[str, Callable[[Ablation], RenderableType]] = {
    "terminal": terminal,
    "markdown": markdown,
    "csv": as_csv,
    "latex": latex,
}
