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

HTML_REMEDY = "pip install 'fastcifar[html]'"
MAX_LABELED_ITEMS = 15  # maximum number of epochs or classes that are labeled individually
REPORTED_PACKAGES = ("torch", "nvidia-dali-cuda120", "fastcifar")  # packages whose versions affect results most

TextRows = Sequence[Mapping[str, str]]


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
    path: Path,
    title: str,
    groups: Sequence[RunGroup],
    row_texts: TextRows,
    row_values: Sequence[Mapping[str, Any]],
    excluded_runs: TextRows,
    misclassified_by_group: Mapping[str, Misclassified],
) -> None:
    """Write the page to `path`. Raises `DiskError` if that fails.

    row_texts, row_values   for each group, heading -> the text of its cell and the value to sort by
    excluded_runs           heading -> text, for each run that is not averaged
    misclassified_by_group  group name -> misclassified images
    """
    figures = {name: plotly_chart(name, groups) for name in CHARTS}
    figures = {name: figure for name, figure in figures.items() if figure["data"]}
    confusions = {
        f"confusion-{index}": plotly_confusion_matrix(misclassified)
        for index, misclassified in enumerate(misclassified_by_group.values())
    }
    content = _load_template().render(
        title=title,
        version=__version__,
        date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        num_runs=sum(len(group.records) for group in groups),
        num_averaged=sum(len(group.finished_runs) for group in groups),
        numeric={heading for row in row_values for heading, value in row.items() if _is_number(value)},
        table=[_table_cells(text, value) for text, value in zip(row_texts, row_values, strict=True)],
        excluded_runs=excluded_runs,
        figures={**figures, **confusions},
        charts={name: (CHARTS[name].title, CHARTS[name].line_style_note(groups)) for name in figures},
        classes=_class_accuracies(groups),
        misclassified_by_group=[
            (name, misclassified, _images_with_captions(misclassified))
            for name, misclassified in misclassified_by_group.items()
        ],
        environments=_count_environments(groups),
        plotly_js=import_optional("plotly.offline", HTML_REMEDY).get_plotlyjs(),
    )
    try:
        write_atomically(path, content.encode())
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error.strerror}", "write --html to another folder") from None


def _load_template() -> Any:
    jinja = import_optional("jinja2", HTML_REMEDY)
    source = (resources.files("fastcifar.reporting") / "page.html").read_text(encoding="utf-8")
    return jinja.Environment(autoescape=True, undefined=jinja.StrictUndefined, trim_blocks=True).from_string(source)


def _table_cells(texts: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Map headings to the displayed text and the value to sort by, which is None if it is not a number."""
    cells = {}
    for heading, text in texts.items():
        value = values[heading.removesuffix(" %")]
        cells[heading] = (text, value) if _is_number(value) else (add_wrap_points(text), None)
    return cells


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def plotly_chart(name: str, groups: Sequence[RunGroup]) -> dict[str, Any]:
    """Return an entry of `CHARTS` as a plotly figure: bands, lines above them, and markers at the best epochs."""
    chart = CHARTS[name]
    data = [trace for line in chart_lines(chart, groups) for trace in _line_traces(line)]
    in_legend = set()
    for trace in data:  # one legend entry for each group; a click on it hides all traces of the group
        trace["showlegend"] = (
            trace["mode"].startswith("lines") and "fill" not in trace and trace["legendgroup"] not in in_legend
        )
        in_legend |= {trace["legendgroup"]} if trace["showlegend"] else set()
    last_epoch = max((trace["x"][-1] for trace in data if "fill" not in trace), default=0)
    integer_ticks = {"dtick": 1} if last_epoch <= MAX_LABELED_ITEMS else {"tickformat": "d"}
    axes = {"xaxis": {"title": {"text": "epoch"}, **integer_ticks}, "yaxis": {"title": {"text": chart.title}}}
    return {"data": data, "layout": axes}


def _line_traces(line: LineSeries) -> list[dict[str, Any]]:
    name = html.escape(line.name)  # plotly interprets some HTML in names
    shared = {"type": "scatter", "legendgroup": name, "name": name}
    hover_text = f"{name}{f', {line.variant}' if line.variant else ''}: %{{y:.6~g}} at epoch %{{x}}"
    curve = {
        **shared,
        "x": line.x,
        "y": line.y,
        "mode": "lines" if len(line.x) > 1 else "lines+markers",
        "line": {
            "color": line.color,
            "width": 1.2 if line.is_dashed else 2,
            "dash": "dash" if line.is_dashed else "solid",
        },
        "hovertemplate": f"{hover_text}<extra></extra>",
    }
    traces = [curve]
    if line.std:
        upper, lower = ([y + sign * std for y, std in zip(line.y, line.std, strict=True)] for sign in (1, -1))
        outline = {"mode": "lines", "line": {"width": 0, "color": line.color}, "hoverinfo": "skip"}
        red, green, blue = bytes.fromhex(line.color[1:])
        area = {"x": [*line.x, *line.x[::-1]], "y": [*upper, *lower[::-1]], "fill": "toself"}
        traces.insert(0, {**shared, **outline, **area, "fillcolor": f"rgba({red}, {green}, {blue}, 0.15)"})
    if line.marked_index is not None:
        point = {"x": [line.x[line.marked_index]], "y": [line.y[line.marked_index]], "mode": "markers"}
        style = {"marker": {"color": line.color, "size": 9}, "hovertemplate": f"best: {hover_text}<extra></extra>"}
        traces.append({**shared, **point, **style})
    return traces


def plotly_confusion_matrix(misclassified: Misclassified) -> dict[str, Any]:
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
    axes = {
        "xaxis": {"title": {"text": "predicted class"}, "side": "top", "tickangle": -40, "constrain": "domain"},
        "yaxis": {
            "title": {"text": "true class", "standoff": 16},
            "automargin": True,
            "autorange": "reversed",
            "scaleanchor": "x",
            "constrain": "domain",
        },
    }
    return {"data": [trace], "layout": {**axes, "height": 560 if show_counts else 900}}


def _class_accuracies(groups: Sequence[RunGroup]) -> dict[str, Any]:
    """Return the mean test accuracy of each class (None if missing) in each group that has any, and their range."""
    by_group = {group.name: accuracies for group in groups if (accuracies := group.per_class_accuracy())}
    classes = dict.fromkeys(name for accuracies in by_group.values() for name in accuracies)
    values = [value for accuracies in by_group.values() for value in accuracies.values()]
    return {
        "groups": list(by_group),
        "accuracies": {name: [accuracies.get(name) for accuracies in by_group.values()] for name in classes},
        "min": min(values, default=0),
        "max": max(values, default=1),
    }


def _images_with_captions(misclassified: Misclassified) -> list[tuple[str, str]]:
    """Return each image as a data URI, with its caption."""
    return [
        (_data_uri(image), caption)
        for image, caption in zip(misclassified.images, misclassified.captions(), strict=True)
    ]


def _data_uri(image: np.ndarray) -> str:
    """Return an image uint8 [height, width, 3] as a data URI with a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _count_environments(groups: Sequence[RunGroup]) -> dict[tuple[str, str], int]:
    """Map (device, versions) to the number of runs with that environment."""
    counts: Counter[tuple[str, str]] = Counter()
    for record in (record for group in groups for record in group.records):
        if not record.environment:
            continue
        versions = record.environment.get("versions")
        if not isinstance(versions, dict):
            versions = {}
        version_text = ", ".join(f"{name} {versions[name]}" for name in REPORTED_PACKAGES if name in versions)
        counts[record.device or "unknown", version_text or "unknown"] += 1
    return counts
