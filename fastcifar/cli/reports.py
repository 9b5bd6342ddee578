"""Commands that read the results of many runs: `compare`, `report`, `runs ls` and `runs rm`.

As in app.py, each command only passes its options on. With --json the last line of stdout is one JSON document.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fastcifar.cli.options import DebugOption, JsonOption, recipe_options

runs_app = typer.Typer(help="List run folders and sweeps, or remove them.", no_args_is_help=True)


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="run folder, prediction file or bench document")],
    b: Annotated[Path, typer.Argument(metavar="B", help="another one of the same kind")],
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare two runs, two prediction files label by label, or two bench documents row by row."""
    from fastcifar.reporting.compare import COMPARERS, compare_paths

    result = compare_paths(a, b)
    print(json.dumps(result)) if as_json else Console().print(COMPARERS[result["kind"]].build_table(result))


@runs_app.command("ls")
def runs_ls(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder that is searched at any depth")] = Path("runs"),
    sort: Annotated[
        str, typer.Option(metavar="COLUMN", help="column to sort by in ascending order, such as name, val_acc or bytes")
    ] = "date",
    reverse: Annotated[bool, typer.Option("--reverse", help="sort in descending order")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List run folders and sweeps with their state, epochs, accuracies, seconds, size and date."""
    from fastcifar.reporting.runs import list_runs, runs_table

    rows = list_runs(folder, sort, reverse)
    print(json.dumps(rows)) if as_json else Console().print(runs_table(rows))


@runs_app.command("rm")
def runs_rm(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="run or sweep folders; with --unfinished or --keep-best also folders of them"
        ),
    ],
    unfinished: Annotated[bool, typer.Option("--unfinished", help="remove only interrupted or damaged runs")] = False,
    keep_best: Annotated[
        int | None,
        typer.Option(
            metavar="INT", min=0, help="number of finished runs, of the highest val_acc, that are not removed"
        ),
    ] = None,
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="remove only the checkpoints")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="skip the confirmation")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Remove run folders and sweeps, or only their checkpoints, after a confirmation; other files are never removed."""
    from fastcifar.reporting.runs import confirm_removal, remove_runs, select_for_removal

    console, rows = Console(stderr=as_json), select_for_removal(paths, unfinished, keep_best, checkpoints)
    if rows and not yes:
        confirm_removal(rows, checkpoints, console)
    remove_runs(rows, checkpoints)
    print(json.dumps(rows)) if as_json else console.print(f"removed {len(rows)}")


@recipe_options(("data", "device", "precision"))
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN|SWEEP...", help="run or sweep folders")],
    format: Annotated[
        str, typer.Option(metavar="NAME", help="output format: terminal, markdown, csv or latex")
    ] = "terminal",
    sort: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="heading of the column to sort by, numbers in descending order")
    ] = None,
    validation: Annotated[
        bool, typer.Option("--validation", help="add the accuracy on the validation split to the table")
    ] = False,
    plots: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="folder for plots of accuracy, loss, throughput and accuracy per class"),
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="self-contained HTML file to write")] = None,
    mistakes: Annotated[
        int,
        typer.Option(
            metavar="INT",
            min=0,
            help="number of misclassified images to show, with confusion matrices; the runs are evaluated again",
        ),
    ] = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Report runs and sweeps: mean and standard deviation over seeds, curves, and unfinished runs."""
    from fastcifar.reporting.report import build_report

    result, report_text = build_report(
        runs,
        format,
        sort,
        console=Console(stderr=True),
        include_validation=validation,
        plots=plots,
        html=html,
        num_misclassified=mistakes,
        **options,
    )
    if as_json or isinstance(report_text, str):
        print(json.dumps(result) if as_json else report_text)
    else:
        Console().print(report_text)
