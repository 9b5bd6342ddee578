"""A report on runs and sweeps: charts and misclassified images, as PNG files or on an HTML page that works offline."""

from __future__ import annotations

import base64
import io
import itertools
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from rich.console import Console, RenderableType

from fastcifar import plotting
from fastcifar._version import __version__
from fastcifar.device import DALI_PACKAGES, import_optional
from fastcifar.errors import DiskError, UsageError, disk_errors, lookup
from fastcifar.files import write_atomically
from fastcifar.format import add_wrap_points, format_count, one_line, option_flag, shorten
from fastcifar.plotting import LineSeries
from fastcifar.reporting.aggregate import RunGroup, group_runs
from fastcifar.reporting.records import RunRecord, read_records
from fastcifar.reporting.table import MAX_OPTION_COLUMNS, STD_COLUMNS, TABLE_FORMATS, ReportTable, build_report_table

if TYPE_CHECKING:
    from fastcifar.reporting.misclassified import Misclassified

MAX_LABELED_ITEMS = 15  # maximum number of epochs or classes that are labeled individually
MAX_PLOTTED_ROWS = 20  # rows of the table that charts and heatmaps show
MAX_LISTED_CLASSES = 10  # on a page, of more than `MAX_LABELED_ITEMS` classes
REPORTED_PACKAGES = ("torch", *DALI_PACKAGES, "fastcifar")  # packages whose versions affect results most

PlotlyObject = dict[str, Any]  # a figure, trace or layout in the JSON format of plotly.js
# the color-blind safe palette of Okabe and Ito and three more colors, all visible on white and on black
LINE_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#808080", "#8c6bb1", "#a6761d")


def build_report(
    paths: Sequence[Path],
    format: str = "terminal",
    sort_by: str | None = None,
    include_validation: bool = False,
    plots: Path | None = None,
    html: Path | None = None,
    num_misclassified: int = 0,
    console: Console | None = None,
    **overrides: Any,
) -> tuple[dict[str, Any], RenderableType]:
    """Report on the runs and sweeps in `paths`; return the document of --json and the table in the given format.

    The document contains `ReportTable.row_values` and the `runs` of each row, and the paths of the `written` files.

    PNG files are written to the folder `plots`, and a page to the file `html`. With `num_misclassified`, both also show
    confusion matrices and this many misclassified images of each group, from an evaluation of the finished runs with
    `overrides` (data, device, precision). The other arguments are checked before the evaluation.
    """
    render = lookup(TABLE_FORMATS, format, "format")
    if num_misclassified and not (plots or html):
        raise UsageError("--mistakes needs an output for its images", "add --html FILE or --plots DIR")
    if not num_misclassified and (given := [name for name, value in overrides.items() if value is not None]):
        problem = f"{option_flag(given[0])} applies only to the evaluation for --mistakes"
        raise UsageError(problem, f"add --mistakes INT, or omit {option_flag(given[0])}")
    table = build_report_table(group_runs(read_records(paths)), sort_by, include_validation)
    if html:
        if html.suffix.lower() not in (".html", ".htm"):
            raise UsageError(f"--html {html} is not the name of an HTML file", "give a name that ends in .html")
        for module in ("jinja2", "plotly.offline"):
            import_optional(module)
        if not html.parent.is_dir():
            raise DiskError(f"cannot write {html}: no folder {html.parent}", "give an existing folder")
    if plots:
        plotting.create_plots_dir(plots)
    misclassified = {}
    if num_misclassified:
        from fastcifar.reporting.misclassified import find_misclassified  # imports torch

        finished = [group for group in table.rows if group.finished_runs]
        misclassified = {
            group.name: find_misclassified(group, num_misclassified, console, **overrides) for group in finished
        }
    files = write_report_plots(plots, table, misclassified) if plots else []
    if html:
        names = [one_line(path.resolve().name) for path in paths]
        title = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        write_html_report(html, title, table, misclassified)
        files.append(html)
    rows = [{**table.row_values(group), "runs": list(map(_describe_run, group.records))} for group in table.rows]
    return {"rows": rows, "written": [str(path) for path in files]}, render(table)


def _describe_run(record: RunRecord) -> dict[str, Any]:
    summary = record.summary if record.state == "done" else None
    test_acc, val_acc = (summary.test_acc, summary.val_acc) if summary else (None, None)
    run = {"run": str(record.folder), "seed": record.seed, "state": record.state, "reason": record.reason or None}
    return {**run, "test_acc": test_acc, "val_acc": val_acc}


@dataclass(frozen=True)
class Chart:
    """A line chart of columns of metrics.csv."""

    title: str
    columns: dict[str, str]  # column -> label; the first is drawn solid, the second dashed
    scale: float = 1

    def line_style_note(self, groups: Sequence[RunGroup]) -> str:
        """Return the legend of the line styles in the chart of `groups`."""
        styles = zip(self.columns.values(), ("solid line", "dashed line"), strict=False)
        notes = [f"{label}: {style}" for label, style in styles if label]
        if any(column.startswith("val_") for column in self.columns):
            notes.append("dot: best epoch")
        if any(len(group.plotted_runs) > 2 for group in groups):
            notes.append("band: ± std over seeds")
        return "; ".join(notes)


CHARTS = {
    "accuracy": Chart("accuracy, %", {"val_acc": "validation", "train_acc": "training"}, scale=100),
    "loss": Chart("loss, nats", {"val_loss": "validation", "train_loss": "training"}),
    "throughput": Chart("training throughput, images/s", {"images_per_s": ""}),
}


def chart_lines(chart: Chart, groups: Sequence[RunGroup]) -> list[LineSeries]:
    """Return the curves of `chart`, one color for each group; the best epoch is marked on validation curves."""
    lines = []
    for group, color in zip(groups, itertools.cycle(LINE_COLORS), strict=False):
        name = group.name if group.finished_runs else f"{group.name} (not finished)"
        for index, (column, label) in enumerate(chart.columns.items()):
            if (curve := group.curve(column)) is None:
                continue
            best_epoch = group.best_epoch if column.startswith("val_") else None
            lines.append(
                LineSeries(
                    name=name,
                    variant=label,
                    color=color,
                    is_dashed=index > 0,
                    x=curve.epochs,
                    y=[chart.scale * mean for mean in curve.mean],
                    std=[chart.scale * std for std in curve.std] if curve.std and index == 0 else None,
                    marked_index=curve.epochs.index(best_epoch) if best_epoch in curve.epochs else None,
                )
            )
    return lines


def write_charts(folder: Path, groups: Sequence[RunGroup], note: str = "") -> list[Path]:
    """Write the entries of `CHARTS` that have a curve, with `note` after their titles; return the paths."""
    files = []
    for name, chart in CHARTS.items():
        if lines := chart_lines(chart, groups):
            files.append(folder / f"{name}.png")
            plotting.plot_line_chart(files[-1], chart.title + note, chart.line_style_note(groups), lines)
    return files


def describe_plotted_rows(table: ReportTable) -> str:
    """Return a note for the titles of charts that do not show all rows of the table; "" if they do."""
    return f" (first {MAX_PLOTTED_ROWS} of {len(table.rows)} rows)" if len(table.rows) > MAX_PLOTTED_ROWS else ""


def write_report_plots(
    folder: Path, table: ReportTable, misclassified_by_group: dict[str, Misclassified]
) -> list[Path]:
    """Write charts, the accuracy of each class and misclassified images as PNG files; return their paths."""
    note = describe_plotted_rows(table)
    files = write_charts(folder, table.rows[:MAX_PLOTTED_ROWS], note)
    if per_class := dict(itertools.islice(table.class_accuracies.items(), MAX_PLOTTED_ROWS)):
        files.append(folder / "classes.png")
        plotting.plot_fraction_heatmap(files[-1], f"test accuracy of each class, %{note}", per_class)
    for number, group in enumerate(table.rows, start=1):
        if (misclassified := misclassified_by_group.get(group.name)) is None:
            continue
        safe_name = re.sub(r"[^A-Za-z0-9.=-]+", "-", group.name)[:60].strip("-")
        files.append(folder / f"confusion-{number}-{safe_name}.png")
        plotting.plot_confusion_matrix(files[-1], misclassified.confusion_matrix, misclassified.classes)
        if len(misclassified.images):
            captions = [caption.replace(", not ", "\nnot ") for caption in misclassified.captions()]
            files.append(folder / f"mistakes-{number}-{safe_name}.png")
            plotting.plot_captioned_images(files[-1], misclassified.images, captions, [False] * len(captions))
    return files


def write_html_report(
    path: Path, title: str, table: ReportTable, misclassified_by_group: Mapping[str, Misclassified]
) -> None:
    """Write the page to `path`; `misclassified_by_group` maps group names."""
    groups = table.rows
    plotted = groups[:MAX_PLOTTED_ROWS]
    figures = {name: figure for name in CHARTS if (figure := plotly_chart(name, plotted))["data"]}
    confusions = map(plotly_confusion_matrix, misclassified_by_group.values())
    rows = []  # for each group: column -> displayed text, and value to sort by or None if it is not a number
    for group, texts in zip(groups, table.display_rows(MAX_OPTION_COLUMNS), strict=True):
        numbers = {name: value for name, value in table.row_values(group).items() if type(value) in (int, float)}
        rows.append({name: (add_wrap_points(text), numbers.get(name)) for name, text in texts.items()})
    per_class = table.class_accuracies
    class_accuracies = [accuracy for accuracies in per_class.values() for accuracy in accuracies.values()]
    class_names = list(dict.fromkeys(name for accuracies in per_class.values() for name in accuracies))
    jinja = import_optional("jinja2")
    source = (resources.files("fastcifar.reporting") / "page.html").read_text(encoding="utf-8")
    template = jinja.Environment(autoescape=True, undefined=jinja.StrictUndefined, trim_blocks=True).from_string(source)
    content = template.render(
        title=title,
        version=__version__,
        date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        num_runs=sum(len(group.records) for group in groups),
        num_averaged=sum(len(group.finished_runs) for group in groups),
        caption=add_wrap_points(table.caption()),
        table=rows,
        headings={name: f"{name} %" if name in STD_COLUMNS else name for name in rows[0]},
        numeric={heading for row in rows for heading, (_, value) in row.items() if value is not None},
        excluded_runs=table.describe_excluded_runs(),
        figures=figures | {f"confusion-{index}": figure for index, figure in enumerate(confusions)},
        charts={
            name: (CHARTS[name].title + describe_plotted_rows(table), CHARTS[name].line_style_note(plotted))
            for name in figures
        },
        per_class=per_class,
        class_names=class_names,
        lists_classes=len(class_names) > MAX_LABELED_ITEMS,
        list_classes=list_lowest_classes,
        lowest_accuracy=min(class_accuracies, default=0),
        highest_accuracy=max(class_accuracies, default=1),
        misclassified_by_group=misclassified_by_group,
        data_uri=_data_uri,
        environments=_count_environments(groups),
        plotly_js=import_optional("plotly.offline").get_plotlyjs(),
    )
    with disk_errors(f"write {path}", "write --html to another folder"):
        write_atomically(path, content.encode())


def list_lowest_classes(accuracies: Mapping[str, float]) -> str:
    """Return the classes with the lowest accuracies in percent: `cat 51.0, dog 62.5`."""
    lowest = sorted(accuracies.items(), key=lambda item: item[1])[:MAX_LISTED_CLASSES]
    return ", ".join(f"{name} {100 * accuracy:.1f}" for name, accuracy in lowest)


def plotly_chart(name: str, groups: Sequence[RunGroup]) -> PlotlyObject:
    """Return an entry of `CHARTS` as a plotly figure: bands, lines above them, and markers at the best epochs."""
    chart = CHARTS[name]
    lines = chart_lines(chart, groups)
    first_lines = {line.name: line for line in reversed(lines)}  # the lines with a legend entry, one for each group
    data = [trace for line in lines for trace in _line_traces(line, first_lines[line.name] is line)]
    last_epoch = max((line.x[-1] for line in lines), default=0)
    integer_ticks = {"dtick": 1} if last_epoch <= MAX_LABELED_ITEMS else {"tickformat": "d"}
    axes = {"xaxis": {"title": {"text": "epoch"}, **integer_ticks}, "yaxis": {"title": {"text": chart.title}}}
    return {"data": data, "layout": axes}


def _line_traces(line: LineSeries, is_in_legend: bool) -> list[PlotlyObject]:
    """Return traces of the line and, if `line` has them, of the standard deviation (a band) and the marked point."""
    name, full_name = escape(shorten(line.name)), escape(line.name)  # plotly interprets some HTML in names
    hover_text = f"{full_name}{f', {line.variant}' if line.variant else ''}: %{{y:.6~g}} at epoch %{{x}}<extra></extra>"
    shared = {"type": "scatter", "legendgroup": full_name, "name": name}
    traces = []
    if line.std:
        lower, upper = np.subtract(line.y, line.std).tolist(), np.add(line.y, line.std).tolist()
        area = {"x": [*line.x, *line.x[::-1]], "y": [*upper, *lower[::-1]], "fill": "toself", "hoverinfo": "skip"}
        outline = {"mode": "lines", "line": {"width": 0, "color": line.color}, "showlegend": False}
        red, green, blue = bytes.fromhex(line.color[1:])
        traces.append({**shared, **area, **outline, "fillcolor": f"rgba({red}, {green}, {blue}, 0.15)"})
    dash, width = ("dash", 1.2) if line.is_dashed else ("solid", 2)
    style = {"mode": "lines" if len(line.x) > 1 else "lines+markers", "showlegend": is_in_legend}
    style["line"] = {"color": line.color, "width": width, "dash": dash}
    traces.append({**shared, **style, "x": line.x, "y": line.y, "hovertemplate": hover_text})
    if line.marked_index is not None:
        point = {"x": [line.x[line.marked_index]], "y": [line.y[line.marked_index]], "mode": "markers"}
        style = {"marker": {"color": line.color, "size": 9}, "showlegend": False}
        traces.append({**shared, **style, **point, "hovertemplate": f"best: {hover_text}"})
    return traces


def plotly_confusion_matrix(misclassified: Misclassified) -> PlotlyObject:
    """Return the mean confusion matrix as a plotly figure, colored by the square root of the fraction of the row."""
    matrix, names = misclassified.confusion_matrix, list(map(escape, misclassified.classes))
    shades = np.sqrt(matrix / matrix.sum(1, keepdims=True).clip(1)).round(4).tolist()
    show_counts = len(names) <= MAX_LABELED_ITEMS
    trace: PlotlyObject = {"type": "heatmap", "x": names, "y": names, "z": shades, "zmin": 0, "zmax": 1}
    trace |= {"colorscale": [[0, "#f7fbff"], [0.5, "#9ecae1"], [1, "#08519c"]], "showscale": False}
    trace |= {"text": [[format_count(count) for count in row] for row in matrix]}
    trace |= {"texttemplate": "%{text}"} if show_counts else {}
    trace |= {"hovertemplate": "%{text} of class %{y} predicted as %{x}<extra></extra>"}
    x_axis = {"title": {"text": "predicted class"}, "side": "top", "tickangle": -40, "constrain": "domain"}
    y_axis = {"title": {"text": "true class", "standoff": 16}, "automargin": True, "autorange": "reversed"}
    y_axis |= {"scaleanchor": "x", "constrain": "domain"}
    return {"data": [trace], "layout": {"xaxis": x_axis, "yaxis": y_axis, "height": 560 if show_counts else 900}}


def _data_uri(image: np.ndarray) -> str:
    """Return an image uint8 [height, width, 3] as a data URI with a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _count_environments(groups: Sequence[RunGroup]) -> Counter[tuple[str, str]]:
    """Map (device, versions) to the number of runs with that environment."""
    counts: Counter[tuple[str, str]] = Counter()
    for record in (record for group in groups for record in group.records):
        versions = record.environment.versions
        if versions or record.device:
            names = [name for name in REPORTED_PACKAGES if versions.get(name, "missing") != "missing"]
            version_text = ", ".join(f"{name} {versions[name]}" for name in names)
            counts[record.device or "unknown", version_text or "unknown"] += 1
    return counts
