"""`fastcifar report`: runs and sweeps as the table of an ablation, in FORMATS, and what is drawn of them.

It puts the other rooms together: `records` reads, `seeds` averages, `mistakes` asks networks, `plots` and `page` draw.
A figure that was not measured is a dash, never a zero.
"""

from __future__ import annotations

import csv
import inspect
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastcifar.errors import UsageError, pick
from fastcifar.models import MODELS
from fastcifar.results import pictures
from fastcifar.results.mistakes import Mistakes, look
from fastcifar.results.page import prepare_page, write_page
from fastcifar.results.plots import make_folder
from fastcifar.results.records import breakable, one_line, read, spelt
from fastcifar.results.seeds import VALIDATION, Row, Spread, rows, varying

MEANING = "accuracy: mean ± sample standard deviation over the n runs of a row, which differ by the seed alone"
NOT_AVERAGED = "not in the means"
WIDEST = 16  # letters of a knob in the terminal's table; what is longer is said above it
LATEX = (
    {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    | {letter: f"\\{letter}" for letter in "&%$#_{}"}
)


@dataclass(frozen=True)
class Column:
    """A column of the table: its `value` in --json, --format csv and for --sort, and the `text` that a person reads.

    is_knob: it is asked for by the recipe, not measured.
    """

    value: Callable[[Row], Any]
    text: Callable[[Row], str] | None = None
    is_knob: bool = False


def _knob(name: str) -> Column:
    return Column(lambda row: row.knobs.get(name), is_knob=True)


def _blocks(row: Row) -> Any:
    """The blocks of each stage, by the recipe or, where it does not say, by its architecture."""
    arch = row.knobs.get("arch")
    if row.knobs.get("blocks") or arch not in MODELS:
        return row.knobs.get("blocks")
    taken = inspect.signature(MODELS[arch]).parameters.get("blocks")
    return list(taken.default) if taken and isinstance(taken.default, Sequence) else None


def _params(row: Row) -> int | None:
    return next((record.summary.params for record in row.done if record.summary), None)


def _mean(split: Callable[[Row], str]) -> Column:
    """The accuracy on a split: its mean, a fraction."""
    return Column(lambda row: _of(row.accuracy(split(row)), "mean"), lambda row: _percents(row.accuracy(split(row))))


def _std(split: Callable[[Row], str]) -> Column:
    return Column(lambda row: _of(row.accuracy(split(row)), "std"))


def _of(spread: Spread | None, name: str) -> Any:
    return getattr(spread, name) if spread else None


def _measured_on(row: Row) -> str:
    weights = sorted({record.summary.weights for record in row.done if record.summary})
    return f"{row.measured_on}, {'/'.join(weights)}" if weights else ""


# heading -> column, in the order of the source project's table; the knobs that rows differ in besides come after these
KNOBS = {
    "model": _knob("arch"),
    "blocks": Column(_blocks, is_knob=True),
    "optimizer": _knob("optimizer"),
    "lr": _knob("lr"),
    "augment": _knob("augment"),
    "clip": _knob("clip"),
    "batch": _knob("batch_size"),
}
SHOWN = ("arch", "blocks", "optimizer", "lr", "augment", "clip", "batch_size")  # the knobs in KNOBS
MEASURED = {
    "params": Column(_params, lambda row: _count(_params(row))),
    "accuracy %": _mean(lambda row: row.measured_on),
    "std": _std(lambda row: row.measured_on),
    "of": Column(_measured_on),
    "validation %": _mean(lambda row: VALIDATION),
    "validation std": _std(lambda row: VALIDATION),
    "n": Column(lambda row: len(row.done)),
    "time": Column(lambda row: _of(row.seconds, "mean"), lambda row: _time(_of(row.seconds, "mean"))),
    "notes": Column(lambda row: ", ".join([*row.notes, *_states(row)])),
}
IN_THE_MEAN = ("std", "validation std")  # a person reads it behind the mean


@dataclass(frozen=True)
class Ablation:
    """Rows and the columns to show of them."""

    rows: list[Row]
    columns: dict[str, Column]

    def values(self, row: Row) -> dict[str, Any]:
        """The row for programs: accuracies are fractions, times seconds, what was not measured is None."""
        return {heading.removesuffix(" %"): column.value(row) for heading, column in self.columns.items()}

    def texts(self, row: Row) -> dict[str, str]:
        """The row for people."""
        return {
            heading: column.text(row) if column.text else spelt(column.value(row))
            for heading, column in self.columns.items()
            if heading not in IN_THE_MEAN
        }

    def left_out(self) -> list[dict[str, str]]:
        """The runs that are in no mean, and why."""
        return [
            {
                "row": row.name,
                "seed": spelt(record.seed),
                "state": record.state,
                "reason": record.reason,
                "folder": one_line(record.folder),
            }
            for row in self.rows
            for record in row.left_out
        ]


def _states(row: Row) -> list[str]:
    states = [record.state for record in row.left_out]
    return [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]


def tabulate(found: Sequence[Row], sort: str | None = None, validation: bool = False) -> Ablation:
    """The table of rows. `sort`: by a column, figures from the largest, text from A, what is missing last.

    Errors: `UsageError` for another column.
    """
    others = [name for name in varying(found) if name not in SHOWN]
    columns = {"row": Column(lambda row: row.name), **KNOBS, **{name: _knob(name) for name in others}, **MEASURED}
    if not validation:
        columns = {heading: column for heading, column in columns.items() if not heading.startswith("validation")}
    if sort is None:
        return Ablation(list(found), columns)
    by = pick({heading.removesuffix(" %"): column for heading, column in columns.items()}, sort, "column")

    def key(row: Row) -> tuple[bool, float, str]:
        value = by.value(row)
        is_number = isinstance(value, int | float)
        return value is None or value == "", -value if is_number else 0.0, "" if is_number else spelt(value)

    return Ablation(sorted(found, key=key), columns)


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
    tables = (
        [drawn(shown)] if fits else [drawn(["row", *(name for name in shown if name in knobs)]), "", drawn(results)]
    )
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


def report(
    paths: Sequence[Path],
    format: str = "terminal",
    sort: str | None = None,
    *,
    validation: bool = False,
    plots: Path | None = None,
    html: Path | None = None,
    mistakes: int = 0,
    console: Console | None = None,
    **changes: Any,
) -> tuple[dict[str, Any], RenderableType]:
    """The runs and sweeps in `paths` as the document of --json, and as text in one of FORMATS.

    `plots`: a folder for curves. `html`: a page that needs nothing else. `mistakes`: the networks of each row are asked
    for the test set anew, for confusion matrices and so many of their worst mistakes, with `changes` to their recipes
    (data, device, precision). Errors: `UsageError`, `CheckpointError`, `DiskError`, and those of `mistakes.look`.
    """
    written = pick(FORMATS, format, "format")
    if mistakes and not (plots or html):
        raise UsageError("--mistakes has nowhere to be drawn", "add --html FILE or --plots DIR")
    table = tabulate(rows(read(paths)), sort, validation)
    if html:
        prepare_page(html)
    if plots:
        make_folder(plots)
    seen: dict[str, Mistakes] = {}
    if mistakes:
        seen = {row.name: look(row, mistakes, console, **changes) for row in table.rows if row.done}
    files = pictures.draw(plots, table.rows, seen) if plots else []
    if html:
        texts = [table.texts(row) for row in table.rows]
        values = [table.values(row) for row in table.rows]
        write_page(html, _title(paths), table.rows, texts, values, table.left_out(), seen)
        files.append(html)
    document = {
        "rows": [{**table.values(row), "runs": _runs(row)} for row in table.rows],
        "written": [str(path) for path in files],
    }
    return document, written(table)


def _title(paths: Sequence[Path]) -> str:
    names = [one_line(path.resolve().name) for path in paths]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _runs(row: Row) -> list[dict[str, Any]]:
    return [
        {
            "run": str(record.folder),
            "seed": record.seed,
            "state": record.state,
            "reason": record.reason or None,
            "test_acc": record.summary.test_acc if record.summary else None,
            "val_acc": record.summary.val_acc if record.summary else None,
        }
        for record in row.records
    ]


def _percents(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return f"{100 * spread.mean:.2f} ± {'-' if spread.std is None else f'{100 * spread.std:.2f}'}"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    unit, length = next((pair for pair in (("h", 3600), ("min", 60)) if seconds >= 2 * pair[1]), ("s", 1))
    return f"{seconds / length:.1f} {unit}"
