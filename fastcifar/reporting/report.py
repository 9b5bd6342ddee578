"""`fastcifar report`: a report on runs and sweeps as a table, plots and an HTML page.

All arguments are checked before models are evaluated or files are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from fastcifar.errors import UsageError, lookup
from fastcifar.format import one_line
from fastcifar.plotting import create_plots_dir
from fastcifar.reporting.aggregate import RunGroup, group_runs
from fastcifar.reporting.html import check_html_output, write_html_report
from fastcifar.reporting.misclassified import Misclassified, find_misclassified
from fastcifar.reporting.records import read_records
from fastcifar.reporting.report_plots import write_report_plots
from fastcifar.reporting.table import TABLE_FORMATS, build_report_table


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
    """Report on the runs and sweeps in `paths`; return the document of --json and the table in the given format.

    format              name in `TABLE_FORMATS`
    sort_by             column to sort by, see `build_report_table`
    include_validation  adds the accuracy on the validation split
    plots               folder for PNG files of the curves
    html                path of a self-contained HTML page
    num_misclassified   if not 0, the finished runs are evaluated on the test set again, for confusion matrices and this
                        many misclassified images of each group
    overrides           options of the recipes that this evaluation replaces (data, device, precision)

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
    misclassified: dict[str, Misclassified] = {}
    if num_misclassified:
        misclassified = {
            group.name: find_misclassified(group, num_misclassified, console, **overrides)
            for group in table.rows
            if group.finished_runs
        }
    files = write_report_plots(plots, table.rows, misclassified) if plots else []
    if html:
        texts = [table.row_texts(group) for group in table.rows]
        values = [table.row_values(group) for group in table.rows]
        excluded = table.describe_excluded_runs()
        write_html_report(html, _report_title(paths), table.rows, texts, values, excluded, misclassified)
        files.append(html)
    document = {
        "rows": [{**table.row_values(group), "runs": _run_documents(group)} for group in table.rows],
        "written": [str(path) for path in files],
    }
    return document, render(table)


def _report_title(paths: Sequence[Path]) -> str:
    names = [one_line(path.resolve().name) for path in paths]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _run_documents(group: RunGroup) -> list[dict[str, Any]]:
    return [
        {
            "run": str(record.folder),
            "seed": record.seed,
            "state": record.state,
            "reason": record.reason or None,
            "test_acc": record.summary.test_acc if record.summary else None,
            "val_acc": record.summary.val_acc if record.summary else None,
        }
        for record in group.records
    ]
