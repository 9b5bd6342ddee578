"""The front door: commands of a few lines. No logic, and no torch until a command runs.

Options are generated from the fields of `Recipe` (options.py); how a command ends is ending.py's. With --json the last
line of stdout is one document.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fastcifar._version import __version__
from fastcifar.cli.exit import run_cli
from fastcifar.cli.options import DebugOption, DryRunOption, JsonOption, RecipeOption, recipe_options
from fastcifar.recipe import Recipe, section_fields

app = typer.Typer(
    help="Train networks on CIFAR fast, under a parameter budget, and tell the truth about it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

data_app = typer.Typer(help="Check a data set, or look at what an augmentation does to it.", no_args_is_help=True)
app.add_typer(data_app, name="data")
runs_app = typer.Typer(help="List run folders and sweeps, or remove some.", no_args_is_help=True)
app.add_typer(runs_app, name="runs")


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"fastcifar {__version__}")
        raise typer.Exit


@app.callback()
def root_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print it")
    ] = False,
) -> None:
    """Train networks on CIFAR fast, under a parameter budget, and tell the truth about it."""


@app.command()
@recipe_options(Recipe.model_fields)
def train(
    recipe: RecipeOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Train a network, test it once, keep it in a run folder.

    A recipe's values come first, then the options given here; the rest are the defaults.
    """
    from fastcifar.cli.tables import dry_run_table, summary_table
    from fastcifar.training.dry_run import dry_run as estimate_run
    from fastcifar.training.train import train as run

    made = Recipe.make(recipe, **options)
    console = Console(stderr=as_json, quiet=os.environ.get("RANK", "0") != "0")  # under torchrun one process speaks
    found = estimate_run(made) if dry_run else run(made, recipe, console)
    if as_json:
        print(json.dumps(found)) if not console.quiet else None
    else:
        console.print(dry_run_table(found) if dry_run else summary_table(found))


@app.command("eval")
@recipe_options(
    ("eval_weights", "tta", "data", "device", "precision", "compile", "cuda_graph", "normalize", "max_params")
)
def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN|CKPT", help="a run folder or a checkpoint")],
    arch: Annotated[str | None, typer.Option(metavar="NAME", help="the network of a published checkpoint")] = None,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="draw reliability.png and confusion.png")] = None,
    shifted: Annotated[Path | None, typer.Option(metavar="DIR", help="measure on CIFAR-10.1 too: its .npy")] = None,
    corruptions: Annotated[bool, typer.Option("--corruptions", help="and on the corrupted test set")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Measure a run, a checkpoint or a source project's published weights on the test set."""
    from fastcifar.cli.tables import scores_table
    from fastcifar.evaluation.evaluate_run import evaluate_run

    console, asked = (
        Console(stderr=as_json),
        {"plots_dir": plots, "shifted_dir": shifted, "with_corruptions": corruptions},
    )
    scores = evaluate_run(run, arch=arch, console=console, **asked, **options)
    print(json.dumps(scores)) if as_json else console.print(scores_table(scores))


@app.command()
@recipe_options(
    ("eval_weights", "tta", "data", "device", "precision", "compile", "cuda_graph", "normalize", "max_params")
)
def predict(
    run: Annotated[str, typer.Argument(metavar="RUN|CKPT", help="a run folder or a checkpoint")],
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="pickle, .npy, image, folder of images, data:test or data:train")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="to write: .csv, .jsonl or .parquet")],
    arch: Annotated[str | None, typer.Option(metavar="NAME", help="the network of a published checkpoint")] = None,
    ensemble: Annotated[
        list[str] | None, typer.Option("--ensemble", metavar="RUN|CKPT", help="one more network, repeated: mean logits")
    ] = None,
    top: Annotated[int, typer.Option(metavar="INT", help="add so many best classes and their probabilities")] = 0,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="add the probability of every class")] = False,
    names: Annotated[bool, typer.Option("--names", help="class names instead of numbers")] = False,
    header: Annotated[str | None, typer.Option(metavar="ID,LABEL", help="of a .csv; default ID,Labels")] = None,
    show: Annotated[Path | None, typer.Option(metavar="FILE.png", help="a picture of some images, labelled")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Label images with a run, a checkpoint or several, and write them as a file."""
    from fastcifar.cli.tables import predictions_table
    from fastcifar.evaluation.predict import predict_to_file as label

    console = Console(stderr=as_json)
    asked = {
        "arch": arch,
        "top_k": top,
        "with_probabilities": probabilities,
        "use_class_names": names,
        "header": header,
        "plot_path": show,
    }
    found = label(run, source, out, ensemble=ensemble or (), console=console, **asked, **options)
    print(json.dumps(found)) if as_json else console.print(predictions_table(found))


@app.command()
@recipe_options(("eval_weights", "data", "normalize", "max_params"))
def export(
    run: Annotated[str, typer.Argument(metavar="RUN|CKPT", help="a run folder or a checkpoint")],
    format: Annotated[str, typer.Option(metavar="onnx|pt2|aoti|safetensors", help="what to write")] = "onnx",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="default: in the run folder")] = None,
    inputs: Annotated[str, typer.Option("--input", metavar="uint8|normalised", help="what goes in")] = "uint8",
    outputs: Annotated[str, typer.Option("--output", metavar="probabilities|logits")] = "probabilities",
    arch: Annotated[str | None, typer.Option(metavar="NAME", help="the network of a published checkpoint")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Write a trained network as a file for others, compared with the network before it is kept, and its card."""
    from fastcifar.cli.tables import export_table
    from fastcifar.evaluation.export import export_model as write

    found = write(run, format, out, inputs, outputs, arch=arch, **options)
    print(json.dumps(found)) if as_json else Console().print(export_table(found))


@app.command()
@recipe_options(section_fields("network"))
def models(
    name: Annotated[str | None, typer.Argument(help="print this architecture's layers")] = None,
    budget: Annotated[float | None, typer.Option(metavar="PARAMS", help="the largest --width that fits")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """List the architectures, print one's layers, or fit one to a budget."""
    from fastcifar.cli.tables import describe_architectures, describe_layers, fit_width_to_budget

    given = Recipe.make(**{**options, "arch": name or options["arch"]})
    if budget is not None:
        found: Any = fit_width_to_budget(given, int(budget))
    else:
        found = describe_layers(given) if name or options["arch"] else describe_architectures()
    print(json.dumps(found.document)) if as_json else Console().print(found.table)


@data_app.command("verify")
@recipe_options(("data", "dataset"))
def data_verify(as_json: JsonOption = False, debug: DebugOption = False, **options: Any) -> None:
    """Read every file anew and say what was found, where, whether it is official, and what is in it."""
    from fastcifar.cli.tables import dataset_table
    from fastcifar.data.inspection import verify_dataset

    found = verify_dataset(Recipe.make(**options))
    print(json.dumps(found)) if as_json else Console().print(dataset_table(found))


@data_app.command("show")
@recipe_options(("augment", "data", "dataset", "seed"))
def data_show(
    out: Annotated[Path, typer.Option("--out", metavar="FILE.png", help="the picture; overwritten if it is there")],
    count: Annotated[int, typer.Option("--count", metavar="INT", help="images")] = 8,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Draw images before and after each augmentation of the list, and after all of it."""
    from fastcifar.data.inspection import plot_augmentations

    shown = plot_augmentations(Recipe.make(**options), out, count)
    print(json.dumps(shown) if as_json else f"wrote {shown['out']}")


@app.command()
@recipe_options((*section_fields("network"), "data", "dataset", "augment", "batch_size", *section_fields("execution")))
def bench(
    recipe: RecipeOption = None,
    what: Annotated[
        str, typer.Option(metavar="loader,step,train,infer,conv,replay|all", help="train is end to end")
    ] = "loader,step,train",
    archs: Annotated[str, typer.Option(metavar="NAME,...", help="measure each of these")] = "",
    batch_sizes: Annotated[str, typer.Option(metavar="INT,...", help="measure at each of these")] = "",
    modes: Annotated[str, typer.Option(metavar="eager,compiled,captured", help="measure in each of these")] = "",
    trials: Annotated[int, typer.Option(min=1, help="timed stretches of each, of a few seconds; all are kept")] = 5,
    profile: Annotated[Path | None, typer.Option(metavar="FILE", help="write a chrome trace of a few steps")] = None,
    chart: Annotated[Path | None, typer.Option(metavar="FILE.png", help="draw what was measured")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Measure images/s of the loader, of the training step on a fixed batch, of both together, and more."""
    from fastcifar.benchmark.bench import bench as measure
    from fastcifar.plotting import plot_bar_chart, require_png
    from fastcifar.reporting.benchmark_tables import bench_panels, bench_table

    console = Console(stderr=as_json)
    if chart:
        require_png(chart)
    grid = {"arch": archs, "batch_size": batch_sizes, "mode": modes}
    listed = {name: values.split(",") for name, values in grid.items() if values}
    found = measure(Recipe.make(recipe, **options), what, trials, profile, console, grid=listed)
    if chart:
        plot_bar_chart(chart, *bench_panels(found))
    print(json.dumps(found)) if as_json else console.print(bench_table(found))


@app.command()
@recipe_options(Recipe.model_fields)
def speedrun(
    target: Annotated[
        str | None, typer.Option("--target", metavar="94|95|96|96.5", help="percent to reach; default 94")
    ] = None,
    recipe: RecipeOption = None,
    n: Annotated[int, typer.Option("--n", metavar="INT", min=1, help="runs, of the seeds from --seed on")] = 1,
    eval_split: Annotated[
        str | None, typer.Option(metavar="test|val", help="split to evaluate on, by default test after training on all")
    ] = None,
    append: Annotated[Path | None, typer.Option("--append", metavar="DIR", help="go on with an earlier result")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Train n times by the clock, evaluate outside of it, and say how often and how fast a target is reached."""
    from fastcifar.benchmark.speedrun import speedrun as run
    from fastcifar.reporting.benchmark_tables import speedrun_table

    console = Console(stderr=as_json)
    found = run(target, recipe, n, eval_split, append, console, **options)
    print(json.dumps(found)) if as_json else console.print(speedrun_table(found))


@app.command()
@recipe_options(name for name in Recipe.model_fields if name not in ("seed", "out", "resume"))
def sweep(
    source: Annotated[str, typer.Argument(metavar="FILE|NAME", help="sweep file, shipped sweep, or a sweep's folder")],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="its folder; default: sweeps/NAME")] = None,
    executor: Annotated[str, typer.Option(metavar="process|processes|gpus|ray", help="where trials run")] = "process",
    seeds: Annotated[str | None, typer.Option(metavar="INT|INT,...", help="how many, or which")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="trials at a time; default: as there is room")] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="threads of a trial; default: the cores shared out")] = None,
    trials_per_gpu: Annotated[int, typer.Option(min=1, help="that share a GPU")] = 1,
    address: Annotated[str, typer.Option(metavar="auto|local|HOST:PORT", help="of the Ray cluster")] = "auto",
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="try failed trials again")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the trials and their steps")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Run the trials of a file: a grid, a list, random points or a study, times seeds. The same command goes on."""
    from fastcifar.sweep.executors import ExecutorOptions
    from fastcifar.sweep.sweep import plan_sweep
    from fastcifar.sweep.sweep import run_sweep as go_through
    from fastcifar.sweep.sweep_progress import plan_table, sweep_table

    console = Console(stderr=as_json)
    if dry_run:
        found = plan_sweep(source, out, executor, seeds, **options)
    else:
        how = ExecutorOptions(jobs, cpus, trials_per_gpu, address)
        found = go_through(source, out, executor, how, seeds, retry_failed, console, **options)
    print(json.dumps(found)) if as_json else console.print(plan_table(found) if dry_run else sweep_table(found))
    raise typer.Exit(int(not dry_run and found["counts"]["failed"] > 0))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="a run folder, a submission, or what `bench --json` printed")],
    b: Annotated[Path, typer.Argument(metavar="B", help="another of the same kind")],
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare two runs, two submissions label by label, or two measurements row by row."""
    from fastcifar.reporting.compare import COMPARERS
    from fastcifar.reporting.compare import compare_paths as pair

    found = pair(a, b)
    print(json.dumps(found)) if as_json else Console().print(COMPARERS[found["kind"]].build_table(found))


@runs_app.command("ls")
def runs_ls(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="where to look, at any depth")] = Path("runs"),
    sort: Annotated[str, typer.Option(metavar="COLUMN", help="largest last; name, val_acc, bytes, ...")] = "date",
    reverse: Annotated[bool, typer.Option("--reverse", help="largest first")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List run folders and sweeps: state, epochs, accuracies, seconds, size, date."""
    from fastcifar.reporting.runs import list_runs, runs_table

    found = list_runs(folder, sort, reverse)
    print(json.dumps(found)) if as_json else Console().print(runs_table(found))


@runs_app.command("rm")
def runs_rm(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN...", help="runs, sweeps; with a filter folders of them")],
    unfinished: Annotated[bool, typer.Option("--unfinished", help="only runs interrupted or damaged")] = False,
    keep_best: Annotated[int | None, typer.Option(min=0, help="only finished runs, but the best by val_acc")] = None,
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="only their checkpoints")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Remove run folders and sweeps, or their checkpoints; it asks first, and removes nothing that is not theirs."""
    from fastcifar.reporting.runs import confirm_removal, remove_runs, select_for_removal

    console, found = Console(stderr=as_json), select_for_removal(paths, unfinished, keep_best, checkpoints)
    if found and not yes:
        confirm_removal(found, checkpoints, console)
    remove_runs(found, checkpoints)
    print(json.dumps(found)) if as_json else console.print(f"removed {len(found)}")


@app.command()
def ui(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="the folder of your runs")] = Path("runs"),
    page: Annotated[str, typer.Option("--with", metavar="auto|mlflow|tensorboard")] = "auto",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="default: 5000 for mlflow, 6006")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Serve MLflow's or TensorBoard's own page over tracked runs (`train --track`), until Ctrl-C."""
    from fastcifar.reporting.ui import serve_tracker_ui

    def announce(found: dict[str, str]) -> None:
        print(json.dumps(found) if as_json else f"{found['page']}: {found['url']}  (Ctrl-C ends it)", flush=True)

    serve_tracker_ui(folder, page, port, announce)


@app.command()
@recipe_options(("data", "device", "precision"))
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN|SWEEP...", help="run folders, sweeps, or both")],
    format: Annotated[str, typer.Option(metavar="terminal|markdown|csv|latex", help="to print it in")] = "terminal",
    sort: Annotated[str | None, typer.Option(metavar="COLUMN", help="by its heading, figures from the largest")] = None,
    validation: Annotated[bool, typer.Option("--validation", help="add the accuracy on the validation split")] = False,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="draw accuracy, loss, throughput, classes")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="write it all as one page, offline")] = None,
    mistakes: Annotated[int, typer.Option(min=0, help="ask the networks anew: confusion, so many mistakes")] = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Tabulate runs and sweeps: mean and std over seeds of each row, its curves, and what was not finished."""
    from fastcifar.reporting.report import build_report as tabulate

    asked = {"include_validation": validation, "plots": plots, "html": html, "num_misclassified": mistakes}
    found, shown = tabulate(runs, format, sort, console=Console(stderr=True), **asked, **options)
    if as_json or isinstance(shown, str):
        print(json.dumps(found) if as_json else shown)
    else:
        Console().print(shown)


@app.command()
@recipe_options(section_fields("execution"))
def doctor(as_json: JsonOption = False, debug: DebugOption = False, **options: Any) -> None:
    """Versions, devices, imports that may be broken, and what `train` would choose here and why."""
    from fastcifar.cli.tables import diagnostics_table
    from fastcifar.device import collect_diagnostics

    found = collect_diagnostics(Recipe.make(**options))
    print(json.dumps(found)) if as_json else Console().print(diagnostics_table(found))


def main() -> None:
    """The entry point."""
    run_cli(app)
