"""`fastcifar report`: runs and sweeps as a table, as pictures and as a page.

It puts the other rooms together: `records` reads, `seeds` averages, `ablation` and `formats` tabulate, `mistakes` asks
networks, `pictures` and `page` draw. Everything that can be wrong with the command is found before any of it is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from fastcifar.errors import UsageError, lookup
from fastcifar.format import one_line
from fastcifar.plotting import create_plots_dir
from fastcifar.reporting import report_plots
from fastcifar.reporting.aggregate import RunGroup, group_runs
from fastcifar.reporting.html import check_html_output, write_html_report
from fastcifar.reporting.misclassified import Misclassified, find_misclassified
from fastcifar.reporting.records import read_records
from fastcifar.reporting.table import build_report_table
from fastcifar.reporting.table_formats import TABLE_FORMATS


def build_report(
    paths: Sequence[Path],
    format: str = "terminal",
    sort_by: str | None = None,
    *,
    include_validation: bool = False,
    plots: Path | None = None,
    html: Path | None = None,
    num_misclassified: int = 0,
    console: Console | None = None,
    **overrides: Any,
) -> tuple[dict[str, Any], RenderableType]:
    """The runs and sweeps in `paths` as the document of --json, and as text in one of FORMATS.

    `plots`: a folder for curves. `html`: a page that needs nothing else. `mistakes`: the networks of each row are asked
    for the test set anew, for confusion matrices and so many of their worst mistakes, with `changes` to their recipes
    (data, device, precision). Errors: `UsageError`, `CheckpointError`, `DiskError`, and those of `mistakes.look`.
    """
    written = lookup(TABLE_FORMATS, format, "format")
    if num_misclassified and not (plots or html):
        raise UsageError("--mistakes has nowhere to be drawn", "add --html FILE or --plots DIR")
    table = build_report_table(group_runs(read_records(paths)), sort_by, include_validation)
    if html:
        check_html_output(html)
    if plots:
        create_plots_dir(plots)
    seen: dict[str, Misclassified] = {}
    if num_misclassified:
        seen = {
            row.name: find_misclassified(row, num_misclassified, console, **overrides)
            for row in table.rows
            if row.finished_runs
        }
    files = report_plots.write_report_plots(plots, table.rows, seen) if plots else []
    if html:
        texts = [table.row_texts(row) for row in table.rows]
        values = [table.row_values(row) for row in table.rows]
        write_html_report(html, _report_title(paths), table.rows, texts, values, table.describe_excluded_runs(), seen)
        files.append(html)
    document = {
        "rows": [{**table.row_values(row), "runs": _run_documents(row)} for row in table.rows],
        "written": [str(path) for path in files],
    }
    return document, written(table)


def _report_title(paths: Sequence[Path]) -> str:
    names = [one_line(path.resolve().name) for path in paths]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _run_documents(row: RunGroup) -> list[dict[str, Any]]:
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
