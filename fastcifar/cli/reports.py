"""Commands that read the results of many runs: `compare`, `report`, `runs ls` and `runs rm`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fastcifar.cli.options import Output, argument, command, option, switch

runs_app = typer.Typer(help="List run folders and sweeps, or remove them.", no_args_is_help=True)


def compare(
    a: Annotated[Path, argument("A", "run folder, prediction file or bench document")],
    b: Annotated[Path, argument("B", "another one of the same kind")],
) -> Output:
    """Compare two runs, two prediction files label by label, or two bench documents row by row."""
    from fastcifar.reporting.compare import COMPARERS, compare_paths

    return Output(compare_paths(a, b), lambda result: COMPARERS[result["kind"]].build_table(result))


@command(runs_app, "ls")
def runs_ls(
    folder: Annotated[Path, argument("DIR", "folder that is searched at any depth")] = Path("runs"),
    sort: Annotated[
        str, option("COLUMN", "column to sort by in ascending order, such as name, val_acc or bytes")
    ] = "date",
    reverse: Annotated[bool, switch("--reverse", "sort in descending order")] = False,
) -> Output:
    """List run folders and sweeps with their state, epochs, accuracies, seconds, size and date."""
    from fastcifar.reporting.runs import list_runs, runs_table

    return Output(list_runs(folder, sort, reverse), runs_table)


@command(runs_app, "rm")
def runs_rm(
    paths: Annotated[
        list[Path], argument("RUN...", "run or sweep folders; with --unfinished or --keep-best also folders of them")
    ],
    console: Console,
    unfinished: Annotated[bool, switch("--unfinished", "remove only interrupted or damaged runs")] = False,
    keep_best: Annotated[
        int | None, option("INT", "number of finished runs, of the highest val_acc, that are not removed", min=0)
    ] = None,
    checkpoints: Annotated[bool, switch("--checkpoints", "remove only the checkpoints")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="skip the confirmation")] = False,
) -> Output:
    """Remove run folders and sweeps, or only their checkpoints, after a confirmation; other files are never removed."""
    from fastcifar.reporting.runs import confirm_removal, remove_runs, select_for_removal

    rows = select_for_removal(paths, unfinished, keep_best, checkpoints)
    if rows and not yes:
        confirm_removal(rows, checkpoints, console)
    remove_runs(rows, checkpoints)
    return Output(rows, lambda rows: f"removed {len(rows)}")


def report(
    runs: Annotated[list[Path], argument("RUN|SWEEP...", "run or sweep folders")],
    format: Annotated[str, option("NAME", "output format: terminal, markdown, csv or latex")] = "terminal",
    sort: Annotated[
        str | None, option("COLUMN", "heading of the column to sort by, numbers in descending order")
    ] = None,
    validation: Annotated[
        bool, switch("--validation", "add the accuracy on the validation split to the table")
    ] = False,
    plots: Annotated[
        Path | None, option("DIR", "folder for plots of accuracy, loss, throughput and accuracy per class")
    ] = None,
    html: Annotated[Path | None, option("FILE", "self-contained HTML file to write")] = None,
    mistakes: Annotated[
        int,
        option(
            "INT",
            "number of misclassified images to show, with confusion matrices; the runs are evaluated again",
            min=0,
        ),
    ] = 0,
    **options: Any,
) -> Output:
    """Report runs and sweeps: mean and standard deviation over seeds, curves, and unfinished runs."""
    from fastcifar.reporting.report import build_report

    document, text = build_report(
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
    return Output(document, lambda _: text)
