"""`fastcifar report`: runs and sweeps as a table, as pictures and as a page.

It puts the other rooms together: `records` reads, `seeds` averages, `ablation` and `formats` tabulate, `mistakes` asks
networks, `pictures` and `page` draw. Everything that can be wrong with the command is found before any of it is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from fastcifar.errors import UsageError, pick
from fastcifar.plotting import make_folder
from fastcifar.reporting import report_plots
from fastcifar.reporting.aggregate import Row, rows
from fastcifar.reporting.html import prepare_page, write_page
from fastcifar.reporting.misclassified import Mistakes, look
from fastcifar.reporting.records import one_line, read
from fastcifar.reporting.table import tabulate
from fastcifar.reporting.table_formats import FORMATS


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
    files = report_plots.draw(plots, table.rows, seen) if plots else []
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
