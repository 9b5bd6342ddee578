"""The table of a report for a terminal or as Markdown, CSV or LaTeX, with the runs that are not averaged."""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from fastcifar.errors import lookup
from fastcifar.format import (
    MISSING,
    NumericTable,
    add_wrap_points,
    csv_cell,
    format_count,
    format_duration,
    format_option_value,
    one_line,
    whole_line,
)
from fastcifar.reporting.aggregate import VALIDATION_SPLIT, RunGroup, varying_options

# options that a report states, in a column if they differ between the rows; the others that differ follow them
REPORTED_OPTIONS = ("arch", "epochs", "batch_size", "optimizer", "lr", "weight_decay", "augment", "clip_grad")
STD_COLUMNS = {"accuracy": "std", "validation": "validation std"}  # mean -> its deviation; one text shows both
VALUE_FORMATS: dict[str, Callable[[Any], str]] = {"params": format_count, "n": format_count, "time": format_duration}
# names of columns in a publication; the other ones are those of the terminal with spaces for underscores
PUBLISHED_NAMES = {
    "lr": "learning rate",
    "arch": "architecture",
    "params": "parameters",
    "clip_grad": "gradient clipping",
}
NUMBER_COLUMNS = (*STD_COLUMNS, "n", "params", "time")  # aligned on the right
REQUIRED_COLUMNS = ("accuracy", "n", "validation", "split", "weights")  # the first columns, shown on any terminal
EXCLUDED_HEADING = "not in the means"
MAX_OPTION_COLUMNS = 4  # if more options differ, one column lists them
LATEX_ESCAPES = str.maketrans(
    {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    | {char: f"\\{char}" for char in "&%$#_{}"}
)


@dataclass(frozen=True)
class ReportTable:
    """The rows of a report, one for each group of runs."""

    rows: list[RunGroup]
    include_validation: bool = False

    @cached_property
    def varying_options(self) -> list[str]:
        """The names of the options that differ between rows."""
        names = varying_options(self.rows)
        return [name for name in dict.fromkeys((*REPORTED_OPTIONS, *names)) if name in names]

    def row_values(self, group: RunGroup) -> dict[str, Any]:
        """Return the values of a row for programs: accuracies as fractions, times in seconds, None if not measured."""
        accuracy, validation = group.accuracy(group.accuracy_split), group.accuracy(VALIDATION_SPLIT)
        excluded = Counter(record.state for record in group.excluded_runs)
        values: dict[str, Any] = {
            "name": group.name,
            "accuracy": accuracy.mean if accuracy else None,
            "std": accuracy.std if accuracy else None,
            "n": len(group.finished_runs),
        }
        if self.include_validation:
            values["validation"] = validation.mean if validation else None
            values["validation std"] = validation.std if validation else None
        return {
            **values,
            "split": group.accuracy_split or None,
            "weights": "/".join(sorted({summary.eval_weights for summary in group.summaries})) or None,
            **{name: group.options.get(name) for name in dict.fromkeys((*REPORTED_OPTIONS, *self.varying_options))},
            "params": group.summaries[0].params if group.summaries else None,
            "time": group.total_seconds.mean if group.total_seconds else None,
            "notes": ", ".join([*group.notes, *(f"{count} {state}" for state, count in excluded.items())]),
        }

    @cached_property
    def texts(self) -> list[dict[str, str]]:
        """The texts of each row. A value that was not measured is shown as a dash, never as zero."""
        rows = []
        for group in self.rows:
            values = self.row_values(group)
            texts = {name: VALUE_FORMATS.get(name, format_option_value)(value) for name, value in values.items()}
            for mean, split in (("accuracy", group.accuracy_split), ("validation", VALIDATION_SPLIT)):
                if mean in texts and (statistics := group.accuracy(split)):
                    texts[mean] = statistics.format(scale=100)
            rows.append({name: text for name, text in texts.items() if name not in STD_COLUMNS.values()})
        return rows

    @cached_property
    def constants(self) -> dict[str, str]:
        """The texts that all rows share, other than the name and the results; without values that are not set."""
        varying = ("name", "n", "time", "notes", *STD_COLUMNS, *self.varying_options)
        names = [name for name in self.texts[0] if name not in varying]
        unique = {name: {text[name] for text in self.texts} - {MISSING} for name in names}
        return {name: texts.pop() for name, texts in unique.items() if len(texts) == 1}

    def display_rows(
        self, max_options: int | None = None, format_option: Callable[[str, str], str] = "{}={}".format
    ) -> list[dict[str, str]]:
        """Return the texts of each row without constants, options that the name contains, and empty columns.

        If there are more than `max_options` columns of options, a column "options" replaces them, in which
        `format_option` formats the name and the value of each option.
        """
        options = [name for name in self.varying_options if not all(_is_in_name(name, text) for text in self.texts)]
        listed = options if max_options is not None and len(options) > max_options else []
        empty = {name for name in self.texts[0] if {text[name] for text in self.texts} <= {"", MISSING}}
        hidden = {*self.constants, *self.varying_options, *REPORTED_OPTIONS, *empty} - {*options} | {*listed}
        rows = []
        for text in self.texts:
            row = {name: value for name, value in text.items() if name not in hidden}
            if listed:
                row["options"] = "; ".join(format_option(name, text[name]) for name in listed if text[name] != MISSING)
            rows.append(row)
        return rows

    def caption(self, format_name: Callable[[str], str] = str) -> str:
        """Return what the accuracy is, and the constants: `Test accuracy in %: mean ± ...; arch se68, epochs 200`."""
        constants = dict(self.constants)
        split, weights = constants.pop("split", ""), constants.pop("weights", "")
        measured = f"{split} accuracy in %".strip().capitalize() + (f" with the {weights} weights" if weights else "")
        sizes = {len(group.finished_runs) for group in self.rows}
        spread = " ± sample standard deviation" if max(sizes) > 2 else ""
        spread += (" (n = 2: range)" if spread else " (range)") if 2 in sizes else ""
        over = f": mean{spread} over n runs that differ only by the seed" if spread else ", n = 1"
        shared = ", ".join(f"{format_name(name)} {value}" for name, value in constants.items())
        return "; ".join(filter(None, (measured + over, shared)))

    @property
    def class_accuracies(self) -> dict[str, dict[str, float]]:
        """Group name -> class -> mean test accuracy, for the groups that have these accuracies."""
        return {group.name: group.class_accuracies for group in self.rows if group.class_accuracies}

    def describe_excluded_runs(self) -> list[dict[str, str]]:
        """Return the runs that are not averaged, with their states and reasons."""
        return [
            {
                "name": group.name,
                "seed": format_option_value(record.seed),
                "state": record.state,
                "reason": record.reason,
                "folder": one_line(record.folder),
            }
            for group in self.rows
            for record in group.excluded_runs
        ]


def _is_in_name(option: str, texts: dict[str, str]) -> bool:
    """Return whether the name of a row contains the value of an option, so that no column is needed."""
    value = texts[option]
    return value == MISSING or f"{option}={value}" in texts["name"] or (option == "arch" and value in texts["name"])


def build_report_table(
    groups: Sequence[RunGroup], sort_by: str | None = None, include_validation: bool = False
) -> ReportTable:
    """Return the table of `groups`, sorted with numbers descending, texts ascending and missing values last."""
    table = ReportTable(list(groups), include_validation)
    if sort_by is None:
        return table

    def key(group: RunGroup) -> tuple[bool, float, str]:
        value = lookup(table.row_values(group), sort_by, "column")
        if isinstance(value, int | float):
            return False, -value, ""
        return value is None or value == "", 0, format_option_value(value)

    return ReportTable(sorted(groups, key=key), include_validation)


def render_terminal(table: ReportTable) -> RenderableType:
    """Return the table, a list of the options that differ if they do not fit beside the results, and the other runs."""
    rows = table.display_rows()
    results = _terminal_table(rows)
    output: list[RenderableType] = [Text(add_wrap_points(table.caption())), "", results]
    if results.width > Console().width and any(name in row for row in rows for name in table.varying_options):
        rows = table.display_rows(max_options=0)
        options = NumericTable(["name"], description="options that differ")
        for row in rows:
            options.add_row(row["name"], add_wrap_points(row.pop("options")))
        output[2:] = [_terminal_table(rows), "", options]
    if excluded := table.describe_excluded_runs():
        output += ["", f"{EXCLUDED_HEADING}:"]
    for run in excluded:
        output.append(Text(f"{run['name']}, seed {run['seed']}: {run['state']}, {run['reason']}"))
        output.append(whole_line(f"  {run['folder']}"))
    return Group(*output)


def _terminal_table(rows: Sequence[dict[str, str]]) -> NumericTable:
    has_notes = "notes" in rows[0]
    numbers = [name for name in rows[0] if name not in ("name", "notes")]
    headings = [f"{name} %" if name in STD_COLUMNS else name for name in numbers]
    num_required = sum(name in REQUIRED_COLUMNS for name in numbers)
    table = NumericTable(["name"], headings, num_required=num_required, description="notes" if has_notes else None)
    for row in rows:
        table.add_row(row["name"], *(row[name] for name in numbers), *([row["notes"]] if has_notes else []))
    return table


def published_name(column: str) -> str:
    """Return the name of a column in words: `batch_size` -> `batch size`, `lr` -> `learning rate`."""
    return PUBLISHED_NAMES.get(column, column.replace("_", " "))


def published_heading(column: str) -> str:
    """Return the heading of a column: `Batch size`, `Accuracy (%)`."""
    name = published_name(column)
    return name if name == "n" else name[0].upper() + name[1:] + (" (%)" if column in STD_COLUMNS else "")


def published_rows(table: ReportTable) -> list[dict[str, str]]:
    """Return the rows that have a finished run, or all rows if there is none, with few columns."""
    rows = table.display_rows(MAX_OPTION_COLUMNS, lambda name, value: f"{published_name(name)} {value}")
    return [row for row in rows if row["n"] != "0"] or rows


def render_markdown(table: ReportTable) -> str:
    """Return the caption and two Markdown tables: the rows, and the runs that are not averaged."""
    sections = [f"{_escape_markdown(table.caption(published_name))}.", _markdown_table(published_rows(table))]
    if excluded := table.describe_excluded_runs():
        sections += [f"{EXCLUDED_HEADING.capitalize()}:", _markdown_table(excluded)]
    return "\n\n".join(sections)


def _markdown_table(rows: Sequence[dict[str, str]]) -> str:
    header, *body = (
        f"| {' | '.join(map(_escape_markdown, cells))} |"
        for cells in (map(published_heading, rows[0]), *(row.values() for row in rows))
    )
    return "\n".join([header, "|" + "".join("---:|" if name in NUMBER_COLUMNS else "---|" for name in rows[0]), *body])


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\|*_<`\[\]])", r"\\\1", text)


def render_csv(table: ReportTable) -> str:
    """Return CSV text with a line for each row: its unrounded values, and the runs that are not averaged."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*table.row_values(table.rows[0]), EXCLUDED_HEADING], lineterminator="\n")
    writer.writeheader()
    for group in table.rows:
        cells = table.row_values(group)
        cells |= {name: format_option_value(value) for name, value in cells.items() if isinstance(value, list | dict)}
        excluded = (f"seed {format_option_value(run.seed)} {run.state}: {run.reason}" for run in group.excluded_runs)
        cells |= {EXCLUDED_HEADING: "; ".join(excluded)}
        writer.writerow({name: csv_cell(value) for name, value in cells.items()})
    return text.getvalue().rstrip("\n")


def render_latex(table: ReportTable) -> str:
    """Return a LaTeX table for the booktabs package, with notes and the runs that are not averaged as comments."""
    rows = [{name: text for name, text in row.items() if name != "notes"} for row in published_rows(table)]

    def line(cells: Iterable[str]) -> str:
        return " & ".join(cell.translate(LATEX_ESCAPES) for cell in cells) + r" \\"

    headings = line(map(published_heading, rows[0])).replace(" n ", " $n$ ")
    caption = add_wrap_points(table.caption(published_name)).translate(LATEX_ESCAPES)
    comments = [f"{text['name']}: {text['notes']}" for text in table.texts if text["notes"]]
    comments += [f"{EXCLUDED_HEADING}: {', '.join(run.values())}" for run in table.describe_excluded_runs()]
    lines = [
        r"% needs \usepackage{booktabs}",
        *(f"% {comment}" for comment in comments),
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{caption.replace(' n ', ' $n$ ')}.}}",
        rf"\begin{{tabular}}{{{''.join('r' if name in NUMBER_COLUMNS else 'l' for name in rows[0])}}}",
        r"\toprule",
        headings,
        r"\midrule",
        *(line(map(add_wrap_points, row.values())) for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines)


TABLE_FORMATS: dict[str, Callable[[ReportTable], RenderableType]] = {
    "terminal": render_terminal,
    "markdown": render_markdown,
    "csv": render_csv,
    "latex": render_latex,
}
