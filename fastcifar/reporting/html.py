"""`fastcifar report --html`: a report as a single HTML file that loads nothing else and works offline.

The Jinja template `page.html` escapes all text from run folders. The charts use plotly.js, which is inlined from its
Python package. A content security policy in the page makes the browser block all requests.
"""

from __future__ import annotations

import base64
import html
import io
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastcifar._version import __version__
from fastcifar.device import import_optional
from fastcifar.errors import DiskError, UsageError
from fastcifar.files import write_atomically
from fastcifar.format import add_wrap_points, format_count
from fastcifar.plotting import LineSeries
from fastcifar.reporting.aggregate import RunGroup
from fastcifar.reporting.misclassified import Misclassified
from fastcifar.reporting.report_plots import CHARTS, chart_lines
from fastcifar.reporting.table import ReportTable

HTML_REMEDY = "pip install 'fastcifar[html]'"
MAX_LABELED_ITEMS = 15  # maximum number of epochs or classes that are labeled individually
REPORTED_PACKAGES = ("torch", "nvidia-dali-cuda120", "fastcifar")  # packages whose versions affect results most

PlotlyObject = dict[str, Any]  # a figure, trace or layout in the JSON format of plotly.js


def check_html_output(path: Path) -> None:
    """Check that a page can be written to `path`, before any work is done.

    Raises `UsageError` if the name does not end in .html or plotly or jinja2 is missing, and `DiskError` if the folder
    does not exist.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--html {path} is not the name of an HTML file", "give a name that ends in .html")
    for module in ("jinja2", "plotly.offline"):
        import_optional(module, HTML_REMEDY)
    if not path.parent.is_dir():
        raise DiskError(f"cannot write {path}: no folder {path.parent}", "give an existing folder")


def write_html_report(
    path: Path, title: str, table: ReportTable, misclassified_by_group: Mapping[str, Misclassified]
) -> None:
    """Write the page to `path`; `misclassified_by_group` maps group names. Raises `DiskError` if that fails."""
    groups = table.rows
    figures = {name: figure for name in CHARTS if (figure := plotly_chart(name, groups))["data"]}
    confusions = map(plotly_confusion_matrix, misclassified_by_group.values())
    cells = [_table_cells(table, group) for group in groups]
    per_class = {group.name: group.class_accuracies for group in groups if group.class_accuracies}
    class_accuracies = [accuracy for accuracies in per_class.values() for accuracy in accuracies.values()]
    jinja = import_optional("jinja2", HTML_REMEDY)
    source = (resources.files("fastcifar.reporting") / "page.html").read_text(encoding="utf-8")
    template = jinja.Environment(autoescape=True, undefined=jinja.StrictUndefined, trim_blocks=True).from_string(source)
    content = template.render(
        title=title,
        version=__version__,
        date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        num_runs=sum(len(group.records) for group in groups),
        num_averaged=sum(len(group.finished_runs) for group in groups),
        table=cells,
        numeric={heading for row in cells for heading, (_, value) in row.items() if value is not None},
        excluded_runs=table.describe_excluded_runs(),
        figures=figures | {f"confusion-{index}": figure for index, figure in enumerate(confusions)},
        charts={name: (CHARTS[name].title, CHARTS[name].line_style_note(groups)) for name in figures},
        per_class=per_class,
        class_names=dict.fromkeys(name for accuracies in per_class.values() for name in accuracies),
        lowest_accuracy=min(class_accuracies, default=0),
        highest_accuracy=max(class_accuracies, default=1),
        misclassified_by_group=misclassified_by_group,
        data_uri=_data_uri,
        environments=_count_environments(groups),
        plotly_js=import_optional("plotly.offline", HTML_REMEDY).get_plotlyjs(),
    )
    try:
        write_atomically(path, content.encode())
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error.strerror}", "write --html to another folder") from None


def _table_cells(table: ReportTable, group: RunGroup) -> dict[str, tuple[str, float | None]]:
    """Map headings to the displayed text and the value to sort by, which is None if it is not a number."""
    cells, values = {}, table.row_values(group)
    for heading, text in table.row_texts(group).items():
        value = values[heading.removesuffix(" %")]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        cells[heading] = (text, value) if is_number else (add_wrap_points(text), None)
    return cells


def plotly_chart(name: str, groups: Sequence[RunGroup]) -> PlotlyObject:
    """Return an entry of `CHARTS` as a plotly figure: bands, lines above them, and markers at the best epochs."""
    chart = CHARTS[name]
    lines = chart_lines(chart, groups)
    # one legend entry for each group; a click on it hides all traces of the group
    first_lines = {line.name: line for line in reversed(lines)}
    data = [trace for line in lines for trace in _line_traces(line, first_lines[line.name] is line)]
    last_epoch = max((line.x[-1] for line in lines), default=0)
    integer_ticks = {"dtick": 1} if last_epoch <= MAX_LABELED_ITEMS else {"tickformat": "d"}
    axes = {"xaxis": {"title": {"text": "epoch"}, **integer_ticks}, "yaxis": {"title": {"text": chart.title}}}
    return {"data": data, "layout": axes}


def _line_traces(line: LineSeries, is_in_legend: bool) -> list[PlotlyObject]:
    """Return the band of the standard deviation, the line and the marked point of `line`, as far as it has them."""
    name = html.escape(line.name)  # plotly interprets some HTML in names
    hover_text = f"{name}{f', {line.variant}' if line.variant else ''}: %{{y:.6~g}} at epoch %{{x}}<extra></extra>"
    shared = {"type": "scatter", "legendgroup": name, "name": name}
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
    """Return the mean confusion matrix as a plotly figure.

    The color is the square root of the fraction of the row, as in `plotting.plot_confusion_matrix`.
    """
    totals = misclassified.confusion_matrix.sum(1, keepdims=True).clip(1)
    names = [html.escape(name) for name in misclassified.classes]
    show_counts = len(names) <= MAX_LABELED_ITEMS
    trace = {
        "type": "heatmap",
        "x": names,
        "y": names,
        "z": np.sqrt(misclassified.confusion_matrix / totals).round(4).tolist(),
        "zmin": 0,
        "zmax": 1,
        "text": [[format_count(count) for count in row] for row in misclassified.confusion_matrix],
        **({"texttemplate": "%{text}"} if show_counts else {}),
        "colorscale": [[0, "#f7fbff"], [0.5, "#9ecae1"], [1, "#08519c"]],
        "showscale": False,
        "hovertemplate": "%{text} of class %{y} predicted as %{x}<extra></extra>",
    }
    x_axis = {"title": {"text": "predicted class"}, "side": "top", "tickangle": -40, "constrain": "domain"}
    y_axis = {"title": {"text": "true class", "standoff": 16}, "automargin": True, "autorange": "reversed"}
    y_axis |= {"scaleanchor": "x", "constrain": "domain"}
    layout = {"xaxis": x_axis, "yaxis": y_axis, "height": 560 if show_counts else 900}
    return {"data": [trace], "layout": layout}


def _data_uri(image: np.ndarray) -> str:
    """Return an image uint8 [height, width, 3] as a data URI with a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _count_environments(groups: Sequence[RunGroup]) -> dict[tuple[str, str], int]:
    """Map (device, versions) to the number of runs with that environment."""
    counts: Counter[tuple[str, str]] = Counter()
    for record in (record for group in groups for record in group.records):
        versions = record.environment.versions
        if not versions and not record.device:
            continue
        version_text = ", ".join(f"{name} {versions[name]}" for name in REPORTED_PACKAGES if name in versions)
        counts[record.device or "unknown", version_text or "unknown"] += 1
    return counts
