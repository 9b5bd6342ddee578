"""`fastcifar report --html`: rows as one page that needs nothing else, not even a network.

The page is `page.html`, a Jinja template that escapes whatever comes from a run folder; the charting library is
plotly.js, inlined from its Python package. A content security policy in the page has the browser refuse all else.
"""

from __future__ import annotations

import base64
import html
import io
import time
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
MAX_LABELED_ITEMS = 15  # epochs, and classes, that there is room to name each of
REPORTED_PACKAGES = ("torch", "nvidia-dali-cuda120", "fastcifar")  # versions that figures depend on most

TextRows = Sequence[Mapping[str, str]]


def check_html_output(path: Path) -> None:
    """Whether the page could be written, before anything is measured.

    Errors: `UsageError` without plotly, jinja2 or .html, `DiskError` without the folder.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--html {path} is not named as a page", "give a name that ends in .html")
    for module in ("jinja2", "plotly.offline"):
        import_optional(module, HTML_REMEDY)
    if not path.parent.is_dir():
        raise DiskError(f"cannot write {path}: no folder {path.parent}", "name a folder that is there")


def write_html_report(
    path: Path,
    title: str,
    rows: Sequence[RunGroup],
    row_texts: TextRows,
    row_values: Sequence[Mapping[str, Any]],
    excluded_runs: TextRows,
    misclassified_by_row: Mapping[str, Misclassified],
) -> None:
    """Writes the page to `path`. `texts`, `values`: of the table, a mapping a row. Errors: `DiskError`."""
    figures = {name: plotly_chart(name, rows) for name in CHARTS}
    figures = {name: figure for name, figure in figures.items() if figure["data"]}
    confusions = {
        f"confusion-{place}": plotly_confusion_matrix(found)
        for place, found in enumerate(misclassified_by_row.values())
    }
    content = _load_template().render(
        title=title,
        version=__version__,
        date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        runs=sum(len(row.records) for row in rows),
        averaged=sum(len(row.finished_runs) for row in rows),
        numeric={heading for row in row_values for heading, value in row.items() if _is_number(value)},
        table=[_table_cells(text, value) for text, value in zip(row_texts, row_values, strict=True)],
        left_out=excluded_runs,
        figures={**figures, **confusions},
        charts={name: (CHARTS[name].title, CHARTS[name].line_style_note(rows)) for name in figures},
        classes=_class_accuracies(rows),
        seen=[(name, found, _images_with_captions(found)) for name, found in misclassified_by_row.items()],
        machines=_count_environments(rows),
        plotly=import_optional("plotly.offline", HTML_REMEDY).get_plotlyjs(),
    )
    try:
        write_atomically(path, content.encode())
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error.strerror}", "give --html in another folder") from None


def _load_template() -> Any:
    jinja = import_optional("jinja2", HTML_REMEDY)
    source = (resources.files("fastcifar.results") / "page.html").read_text(encoding="utf-8")
    return jinja.Environment(autoescape=True, undefined=jinja.StrictUndefined, trim_blocks=True).from_string(source)


def _table_cells(texts: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """heading -> what is read and what is sorted by: the figure where it is one."""
    found = {}
    for heading, text in texts.items():
        value = values[heading.removesuffix(" %")]
        found[heading] = (text, value) if _is_number(value) else (add_wrap_points(text), None)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def plotly_chart(name: str, rows: Sequence[RunGroup]) -> dict[str, Any]:
    """A row of CHARTS as plotly's figure: its lines, their bands below them, a marker at the best epoch."""
    chart = CHARTS[name]
    data = [trace for line in chart_lines(chart, rows) for trace in _line_traces(line)]
    named = set()
    for trace in data:  # one entry in the legend for each row; a click on it hides all that belongs to it
        trace["showlegend"] = (
            trace["mode"].startswith("lines") and "fill" not in trace and trace["legendgroup"] not in named
        )
        named |= {trace["legendgroup"]} if trace["showlegend"] else set()
    longest = max((trace["x"][-1] for trace in data if "fill" not in trace), default=0)
    whole = {"dtick": 1} if longest <= MAX_LABELED_ITEMS else {"tickformat": "d"}  # there is no half an epoch
    axes = {"xaxis": {"title": {"text": "epoch"}, **whole}, "yaxis": {"title": {"text": chart.title}}}
    return {"data": data, "layout": axes}


def _line_traces(line: LineSeries) -> list[dict[str, Any]]:
    name = html.escape(line.name)  # plotly reads some HTML in names
    shared = {"type": "scatter", "legendgroup": name, "name": name}
    shown = f"{name}{f', {line.variant}' if line.variant else ''}: %{{y:.6~g}} at epoch %{{x}}"
    drawn = {
        **shared,
        "x": line.x,
        "y": line.y,
        "mode": "lines" if len(line.x) > 1 else "lines+markers",
        "line": {
            "color": line.color,
            "width": 1.2 if line.is_dashed else 2,
            "dash": "dash" if line.is_dashed else "solid",
        },
        "hovertemplate": f"{shown}<extra></extra>",
    }
    found = [drawn]
    if line.std:
        above, below = ([y + sign * std for y, std in zip(line.y, line.std, strict=True)] for sign in (1, -1))
        edge = {"mode": "lines", "line": {"width": 0, "color": line.color}, "hoverinfo": "skip"}
        red, green, blue = bytes.fromhex(line.color[1:])
        filled = {"x": [*line.x, *line.x[::-1]], "y": [*above, *below[::-1]], "fill": "toself"}
        found.insert(0, {**shared, **edge, **filled, "fillcolor": f"rgba({red}, {green}, {blue}, 0.15)"})
    if line.marked_index is not None:
        point = {"x": [line.x[line.marked_index]], "y": [line.y[line.marked_index]], "mode": "markers"}
        best = {"marker": {"color": line.color, "size": 9}, "hovertemplate": f"best: {shown}<extra></extra>"}
        found.append({**shared, **point, **best})
    return found


def plotly_confusion_matrix(misclassified: Misclassified) -> dict[str, Any]:
    """The mean confusion matrix as plotly's figure; the shade is the root of the share of the row, as in `plots`."""
    totals = misclassified.confusion_matrix.sum(1, keepdims=True).clip(1)
    names = [html.escape(name) for name in misclassified.classes]
    few = len(names) <= MAX_LABELED_ITEMS
    trace = {
        "type": "heatmap",
        "x": names,
        "y": names,
        "z": np.sqrt(misclassified.confusion_matrix / totals).round(4).tolist(),
        "zmin": 0,
        "zmax": 1,
        "text": [[format_count(count) for count in row] for row in misclassified.confusion_matrix],
        **({"texttemplate": "%{text}"} if few else {}),
        "colorscale": [[0, "#f7fbff"], [0.5, "#9ecae1"], [1, "#08519c"]],
        "showscale": False,
        "hovertemplate": "%{text} of %{y} called %{x}<extra></extra>",
    }
    axes = {
        "xaxis": {"title": {"text": "the network says"}, "side": "top", "tickangle": -40, "constrain": "domain"},
        "yaxis": {
            "title": {"text": "the label is", "standoff": 16},
            "automargin": True,
            "autorange": "reversed",
            "scaleanchor": "x",
            "constrain": "domain",
        },
    }
    return {"data": [trace], "layout": {**axes, "height": 560 if few else 900}}


def _class_accuracies(rows: Sequence[RunGroup]) -> dict[str, Any]:
    """Of each class its mean test accuracy in each row, and the range of all; nothing where no row knows it."""
    by_row = {row.name: shares for row in rows if (shares := row.per_class_accuracy())}
    names = dict.fromkeys(name for shares in by_row.values() for name in shares)
    known = [share for shares in by_row.values() for share in shares.values()]
    accuracies = {name: [shares.get(name) for shares in by_row.values()] for name in names}
    return {"rows": list(by_row), "accuracies": accuracies, "low": min(known, default=0), "high": max(known, default=1)}


def _images_with_captions(misclassified: Misclassified) -> list[tuple[str, str]]:
    """Each image as a data URI, and its caption."""
    return [
        (_data_uri(image), caption)
        for image, caption in zip(misclassified.images, misclassified.captions(), strict=True)
    ]


def _data_uri(image: np.ndarray) -> str:
    """uint8 [height, width, 3] as a PNG in a URI."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _count_environments(rows: Sequence[RunGroup]) -> dict[tuple[str, str], int]:
    """(device, versions) -> how many of the runs say so."""
    found: dict[tuple[str, str], int] = {}
    for record in (record for row in rows for record in row.records):
        if not record.environment:
            continue
        versions = record.environment.get("versions")
        known = versions if isinstance(versions, dict) else {}
        said = ", ".join(f"{name} {known[name]}" for name in REPORTED_PACKAGES if name in known)
        machine = (record.device or "unknown", said or "unknown")
        found[machine] = found.get(machine, 0) + 1
    return found
