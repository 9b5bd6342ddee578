"""The table of a report for a terminal or as Markdown, CSV or LaTeX, with the runs that are not averaged."""

from __future__ import annotations

import csv
import io
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastcifar.errors import lookup
from fastcifar.format import (
    MISSING,
    add_wrap_points,
    format_count,
    format_duration,
    format_mean_std,
    format_option_value,
    one_line,
)
from fastcifar.reporting.aggregate import VALIDATION_SPLIT, RunGroup, varying_options

# heading -> option, in the order of columns; the other options that differ between rows follow these
OPTION_COLUMNS = {
    "model": "arch",
    **{name: name for name in ("blocks", "optimizer", "lr", "augment", "clip_grad")},
    "batch": "batch_size",
}
STD_COLUMNS = {"accuracy": "std", "validation": "validation std"}  # mean -> its deviation; one text shows both
ACCURACY_NOTE = "accuracy: mean ± sample standard deviation over the n runs of a row, which differ only by the seed"
EXCLUDED_HEADING = "not in the means"
MAX_OPTION_WIDTH = 16  # characters; longer option values are listed above the terminal table
LATEX_ESCAPES = str.maketrans(
    {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    | {char: f"\\{char}" for char in "&%$#_{}"}
)


@dataclass(frozen=True)
class ReportTable:
    """The rows of a report, one for each group of runs."""

    rows: list[RunGroup]
    options: dict[str, str]  # heading -> option, for the options that are shown
    include_validation: bool

    def row_values(self, group: RunGroup) -> dict[str, Any]:
        """Return the values of a row for programs: accuracies as fractions, times in seconds, None if not measured."""
        accuracy, validation = group.accuracy(group.accuracy_split), group.accuracy(VALIDATION_SPLIT)
        weights = "/".join(sorted({summary.eval_weights for summary in group.summaries}))
        excluded = Counter(record.state for record in group.excluded_runs)
        values = {
            "row": group.name,
            **{heading: group.options.get(option) for heading, option in self.options.items()},
            "params": group.summaries[0].params if group.summaries else None,
            "accuracy": accuracy.mean if accuracy else None,
            "std": accuracy.std if accuracy else None,
            "of": f"{group.accuracy_split}, {weights}" if weights else "",
        }
        if self.include_validation:
            values["validation"] = validation.mean if validation else None
            values["validation std"] = validation.std if validation else None
        return {
            **values,
            "n": len(group.finished_runs),
            "time": group.total_seconds.mean if group.total_seconds else None,
            "notes": ", ".join([*group.notes, *(f"{count} {state}" for state, count in excluded.items())]),
        }

    def row_texts(self, group: RunGroup) -> dict[str, str]:
        """Return the displayed texts of a row. A value that was not measured is shown as a dash, never as zero."""
        values = self.row_values(group)
        texts = {}
        for heading, value in values.items():
            if heading in STD_COLUMNS:
                std = values[STD_COLUMNS[heading]]
                texts[f"{heading} %"] = MISSING if value is None else format_mean_std(value, std, scale=100)
            elif heading not in STD_COLUMNS.values():
                format_value = {"params": format_count, "time": format_duration}.get(heading, format_option_value)
                texts[heading] = format_value(value)
        return texts

    @property
    def class_accuracies(self) -> dict[str, dict[str, float]]:
        """Group name -> class -> mean test accuracy, for the groups that have these accuracies."""
        return {group.name: group.class_accuracies for group in self.rows if group.class_accuracies}

    def describe_excluded_runs(self) -> list[dict[str, str]]:
        """Return the runs that are not averaged, with their states and reasons."""
        return [
            {
                "row": group.name,
                "seed": format_option_value(record.seed),
                "state": record.state,
                "reason": record.reason,
                "folder": one_line(record.folder),
            }
            for group in self.rows
            for record in group.excluded_runs
        ]


def build_report_table(
    groups: Sequence[RunGroup], sort_by: str | None = None, include_validation: bool = False
) -> ReportTable:
    """Return the table of `groups`, sorted with numbers descending, texts ascending and missing values last."""
    others = {name: name for name in varying_options(groups) if name not in OPTION_COLUMNS.values()}
    table = ReportTable(list(groups), OPTION_COLUMNS | others, include_validation)
    if sort_by is not None:

        def key(group: RunGroup) -> tuple[bool, float, str]:
            value = lookup(table.row_values(group), sort_by, "column")
            if isinstance(value, int | float):
                return False, -value, ""
            return value is None or value == "", 0, format_option_value(value)

        table.rows.sort(key=key)
    return table


def render_terminal(table: ReportTable) -> RenderableType:
    """Return a line of shared values, a table of the others (two tables if one is too wide), and the excluded runs."""
    texts = [table.row_texts(group) for group in table.rows]
    values = {heading: list(dict.fromkeys(text[heading] for text in texts)) for heading in texts[0]}
    shared = {heading: values[heading][0] for heading in (*table.options, "of", "notes") if len(values[heading]) == 1}
    options = [heading for heading in table.options if heading not in shared]
    results = [heading for heading in values if heading not in table.options and heading not in shared]
    long_texts = dict.fromkeys(text[name] for text in texts for name in options if len(text[name]) > MAX_OPTION_WIDTH)
    labels = {text: f"({letter})" for text, letter in zip(long_texts, string.ascii_lowercase, strict=False)}
    short_texts = [{heading: labels.get(text, text) for heading, text in row.items()} for row in texts]
    single_table = _terminal_table(["row", *options, *results[1:]], table, short_texts)
    tables: list[RenderableType] = [single_table]
    if options and Console(width=10_000).measure(single_table).maximum > Console().width:
        option_table = _terminal_table(["row", *options], table, short_texts)
        tables = [option_table, "", _terminal_table(results, table, short_texts)]
    notes = [f"{name}: {add_wrap_points(text)}" for name, text in shared.items() if text]
    notes += [f"{label}: {add_wrap_points(text)}" for text, label in labels.items()]
    output: list[RenderableType] = [Text("; ".join(notes)), "", *tables, "", Text(ACCURACY_NOTE)]
    if excluded := table.describe_excluded_runs():
        excluded_table = Table(*excluded[0], box=None, title=EXCLUDED_HEADING, title_justify="left")
        for run in excluded:
            excluded_table.add_row(*(Text(text, overflow="fold") for text in run.values()))
        output += ["", excluded_table]
    return Group(*output)


def _terminal_table(headings: Sequence[str], report: ReportTable, rows: Sequence[dict[str, str]]) -> Table:
    table = Table(box=None)
    for heading in headings:
        is_text = heading in ("row", "of", "notes")
        is_option = heading == "row" or heading in report.options
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=not is_option)
    for row in rows:
        table.add_row(*(Text(row[heading], overflow="fold") for heading in headings))
    return table


def render_markdown(table: ReportTable) -> str:
    """Return two Markdown tables: the rows, and the runs that are not averaged."""
    sections = [_markdown_table([table.row_texts(group) for group in table.rows]), f"{ACCURACY_NOTE.capitalize()}."]
    if excluded := table.describe_excluded_runs():
        sections += [f"{EXCLUDED_HEADING.capitalize()}:", _markdown_table(excluded)]
    return "\n\n".join(sections)


def _markdown_table(rows: Sequence[dict[str, str]]) -> str:
    lines = [[re.sub(r"([\\|*<`\[\]])", r"\\\1", cell) for cell in row] for row in (rows[0], *map(dict.values, rows))]
    header, *body = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([header, "|" + "---|" * len(rows[0]), *body])


def render_csv(table: ReportTable) -> str:
    """Return CSV text with a line for each row: its unrounded values, and the runs that are not averaged."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*table.row_values(table.rows[0]), EXCLUDED_HEADING], lineterminator="\n")
    writer.writeheader()
    for group in table.rows:
        cells = table.row_values(group)
        cells |= {name: format_option_value(value) for name, value in cells.items() if isinstance(value, list | dict)}
        excluded = (f"seed {format_option_value(run.seed)} {run.state}: {run.reason}" for run in group.excluded_runs)
        writer.writerow({**cells, EXCLUDED_HEADING: "; ".join(excluded)})
    return text.getvalue().rstrip("\n")


def render_latex(table: ReportTable) -> str:
    """Return a LaTeX tabular for the booktabs package, with the runs that are not averaged as comments."""

    def line(cells: Iterable[str]) -> str:
        return " & ".join(cell.translate(LATEX_ESCAPES) for cell in cells) + r" \\"

    texts = [table.row_texts(group) for group in table.rows]
    lines = [r"% \usepackage{booktabs}; " + ACCURACY_NOTE, rf"\begin{{tabular}}{{{'l' * len(texts[0])}}}"]
    lines += [r"\toprule", line(texts[0]), r"\midrule"]
    lines += [line(map(add_wrap_points, text.values())) for text in texts]
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [f"% {EXCLUDED_HEADING}: {', '.join(run.values())}" for run in table.describe_excluded_runs()]
    return "\n".join(lines)


TABLE_FORMATS: dict[str, Callable[[ReportTable], RenderableType]] = {
    "terminal": render_terminal,
    "markdown": render_markdown,
    "csv": render_csv,
    "latex": render_latex,
}
