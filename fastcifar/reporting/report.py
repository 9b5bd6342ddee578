"""`fastcifar report`: a report on runs and sweeps as a table, plots and an HTML page.

All arguments are checked before models are evaluated or files are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from rich.console import Console, RenderableType

from fastcifar.errors import UsageError, lookup
from fastcifar.format import one_line
from fastcifar.plotting import create_plots_dir
from fastcifar.reporting.aggregate import group_runs
from fastcifar.reporting.html import check_html_output, write_html_report
from fastcifar.reporting.misclassified import find_misclassified
from fastcifar.reporting.records import RunRecord, read_records
from fastcifar.reporting.report_plots import write_report_plots
from fastcifar.reporting.table import TABLE_FORMATS, build_report_table


class ReportDocument(TypedDict):
    """The document of `report --json`: `ReportTable.row_values` and the `runs` of each row, and paths of files."""

    rows: list[dict[str, Any]]
    written: list[str]


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
) -> tuple[ReportDocument, RenderableType]:
    """Report on the runs and sweeps in `paths`; return the document of --json and the table in the given format.

    sort_by            see `build_report_table`
    plots, html        folder for PNG files of the curves, path of a self-contained HTML page
    num_misclassified  if not 0, the finished runs are evaluated on the test set again, for confusion matrices and this
                       many misclassified images of each group
    overrides          options of the recipes that this evaluation replaces (data, device, precision)

    Raises `UsageError`, `CheckpointError`, `DiskError`, and the errors of `find_misclassified`.
    """
    render = lookup(TABLE_FORMATS, format, "format")
    if num_misclassified and not (plots or html):
        raise UsageError("--mistakes needs an output for its images", "add --html FILE or --plots DIR")
    table = build_report_table(group_runs(read_records(paths)), sort_by, include_validation)
    if html:
        check_html_output(html)
    if plots:
        create_plots_dir(plots)
    misclassified = {
        group.name: find_misclassified(group, num_misclassified, console, **overrides)
        for group in table.rows
        if num_misclassified and group.finished_runs
    }
    files = write_report_plots(plots, table.rows, misclassified) if plots else []
    if html:
        names = [one_line(path.resolve().name) for path in paths]
        title = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        write_html_report(html, title, table, misclassified)
        files.append(html)
    rows = [{**table.row_values(group), "runs": list(map(_describe_run, group.records))} for group in table.rows]
    return {"rows": rows, "written": [str(path) for path in files]}, render(table)


def _describe_run(record: RunRecord) -> dict[str, Any]:
    summary = record.summary if record.state == "done" else None
    return {
        "run": str(record.folder),
        "seed": record.seed,
        "state": record.state,
        "reason": record.reason or None,
        "test_acc": summary.test_acc if summary else None,
        "val_acc": summary.val_acc if summary else None,
    }
