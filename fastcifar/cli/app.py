"""The commands of `fastcifar`, a few lines each: no logic here, and torch is not imported until a command runs.

Options are generated from the fields of `Recipe` (options.py); errors become messages and exit codes in exit.py. With
--json the last line of stdout is one JSON document.
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
    help="Train image classifiers on CIFAR fast, under a parameter budget, and report the results honestly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

data_app = typer.Typer(help="Verify a data set, or show what an augmentation does to it.", no_args_is_help=True)
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
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Train image classifiers on CIFAR fast, under a parameter budget, and report the results honestly."""


@app.command()
@recipe_options(Recipe.model_fields)
def train(
    recipe: RecipeOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Train a network, evaluate it once on the test set, and save both in a run folder.

    Options given here override the recipe; the recipe overrides the defaults.
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
    run: Annotated[str, typer.Argument(metavar="RUN|CKPT", help="run folder or checkpoint file")],
    arch: Annotated[
        str | None, typer.Option(metavar="NAME", help="architecture of a checkpoint that does not name it")
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="folder for the plots reliability.png and confusion.png")
    ] = None,
    shifted: Annotated[
        Path | None, typer.Option(metavar="DIR", help="folder with the .npy files of CIFAR-10.1, evaluated in addition")
    ] = None,
    corruptions: Annotated[
        bool, typer.Option("--corruptions", help="evaluation on corrupted test images in addition")
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Evaluate a run, a checkpoint or published weights of a source project on the test set."""
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
    run: Annotated[str, typer.Argument(metavar="RUN|CKPT", help="run folder or checkpoint file")],
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="pickle, .npy file, image, folder of images, data:test or data:train")
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="prediction file to write: .csv, .jsonl or .parquet")
    ],
    arch: Annotated[
        str | None, typer.Option(metavar="NAME", help="architecture of a checkpoint that does not name it")
    ] = None,
    ensemble: Annotated[
        list[str] | None,
        typer.Option("--ensemble", metavar="RUN|CKPT", help="further run whose logits are averaged; may be repeated"),
    ] = None,
    top: Annotated[
        int, typer.Option(metavar="INT", help="number of most probable classes to add, with their probabilities")
    ] = 0,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="add the probability of every class")] = False,
    names: Annotated[bool, typer.Option("--names", help="class names instead of class indices")] = False,
    header: Annotated[
        str | None, typer.Option(metavar="ID,LABEL", help="header of the .csv file, by default ID,Labels")
    ] = None,
    show: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="plot of some images with their predicted labels")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Predict the classes of images with one trained network or an ensemble, and write a prediction file."""
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
    run: Annotated[str, typer.Argument(metavar="RUN|CKPT", help="run folder or checkpoint file")],
    format: Annotated[str, typer.Option(metavar="onnx|pt2|aoti|safetensors", help="file format")] = "onnx",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="file to write, by default in the run folder")
    ] = None,
    inputs: Annotated[
        str, typer.Option("--input", metavar="uint8|normalized", help="type of the input images")
    ] = "uint8",
    outputs: Annotated[
        str, typer.Option("--output", metavar="probabilities|logits", help="type of the output")
    ] = "probabilities",
    arch: Annotated[
        str | None, typer.Option(metavar="NAME", help="architecture of a checkpoint that does not name it")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Export a trained network with a model card; the file is kept only if its outputs equal the network's."""
    from fastcifar.cli.tables import export_table
    from fastcifar.evaluation.export import export_model as write

    found = write(run, format, out, inputs, outputs, arch=arch, **options)
    print(json.dumps(found)) if as_json else Console().print(export_table(found))


@app.command()
@recipe_options(section_fields("network"))
def models(
    name: Annotated[str | None, typer.Argument(help="architecture whose layers are listed")] = None,
    budget: Annotated[
        float | None, typer.Option(metavar="PARAMS", help="parameter budget for which the largest --width is computed")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """List the architectures, list the layers of one, or fit its width to a parameter budget."""
    from fastcifar.cli.tables import architectures_table, layers_table, width_table
    from fastcifar.models.describe import describe_architectures, describe_layers, fit_width_to_budget

    arch = name or options["arch"]
    given = Recipe.make(**{**options, "arch": arch})
    if budget is not None:
        result: Any = fit_width_to_budget(given, int(budget))
        table = width_table(result)
    elif arch:
        result = describe_layers(given)
        table = layers_table(result)
    else:
        result = describe_architectures()
        table = architectures_table(result)
    print(json.dumps(result)) if as_json else Console().print(table)


@data_app.command("verify")
@recipe_options(("data", "dataset"))
def data_verify(as_json: JsonOption = False, debug: DebugOption = False, **options: Any) -> None:
    """Read and verify every file of a data set, and report its source, its images and its classes."""
    from fastcifar.cli.tables import dataset_table
    from fastcifar.data.inspection import verify_dataset

    found = verify_dataset(Recipe.make(**options))
    print(json.dumps(found)) if as_json else Console().print(dataset_table(found))


@data_app.command("show")
@recipe_options(("augment", "data", "dataset", "seed"))
def data_show(
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE.png", help="image file to write; an existing one is overwritten")
    ],
    count: Annotated[int, typer.Option("--count", metavar="INT", help="number of images")] = 8,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Plot images before and after each augmentation of the list, and after all of them."""
    from fastcifar.data.inspection import plot_augmentations

    shown = plot_augmentations(Recipe.make(**options), out, count)
    print(json.dumps(shown) if as_json else f"wrote {shown['out']}")


@app.command()
@recipe_options((*section_fields("network"), "data", "dataset", "augment", "batch_size", *section_fields("execution")))
def bench(
    recipe: RecipeOption = None,
    what: Annotated[
        str,
        typer.Option(
            metavar="loader,step,train,infer,conv,replay|all",
            help="benchmarks to run; train is loader and step together",
        ),
    ] = "loader,step,train",
    archs: Annotated[str, typer.Option(metavar="NAME,...", help="architectures to measure")] = "",
    batch_sizes: Annotated[str, typer.Option(metavar="INT,...", help="batch sizes to measure")] = "",
    modes: Annotated[str, typer.Option(metavar="eager,compiled,captured", help="execution modes to measure")] = "",
    trials: Annotated[
        int, typer.Option(min=1, help="number of timed trials of a few seconds each; all are recorded")
    ] = 5,
    profile: Annotated[Path | None, typer.Option(metavar="FILE", help="Chrome trace of a few steps to write")] = None,
    chart: Annotated[Path | None, typer.Option(metavar="FILE.png", help="bar chart of the results to write")] = None,
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
        str | None, typer.Option("--target", metavar="94|95|96|96.5", help="target accuracy in percent, by default 94")
    ] = None,
    recipe: RecipeOption = None,
    n: Annotated[
        int, typer.Option("--n", metavar="INT", min=1, help="number of runs, with consecutive seeds from --seed on")
    ] = 1,
    eval_split: Annotated[
        str | None,
        typer.Option(metavar="test|val", help="split to evaluate on; test (the default) trains on all images"),
    ] = None,
    append: Annotated[
        Path | None, typer.Option("--append", metavar="DIR", help="result folder of an earlier speedrun to add runs to")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Time n training runs, evaluate them outside the timed region, and report how often a target is reached."""
    from fastcifar.benchmark.speedrun import speedrun as run
    from fastcifar.reporting.benchmark_tables import speedrun_table

    console = Console(stderr=as_json)
    found = run(target, recipe, n, eval_split, append, console, **options)
    print(json.dumps(found)) if as_json else console.print(speedrun_table(found))


@app.command()
@recipe_options(name for name in Recipe.model_fields if name not in ("seed", "out", "resume"))
def sweep(
    source: Annotated[
        str, typer.Argument(metavar="FILE|NAME", help="sweep file, name of a shipped sweep, or folder of a sweep")
    ],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="sweep folder, by default sweeps/NAME")] = None,
    executor: Annotated[
        str,
        typer.Option(
            metavar="process|processes|gpus|ray", help="where trials run: this process, processes, GPUs or Ray"
        ),
    ] = "process",
    seeds: Annotated[
        str | None, typer.Option(metavar="INT|INT,...", help="number of seeds, or a list of seeds")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="number of concurrent trials, by default as many as fit")
    ] = None,
    cpus: Annotated[
        int | None, typer.Option(min=1, help="CPU threads per trial, by default the cores divided equally")
    ] = None,
    trials_per_gpu: Annotated[int, typer.Option(min=1, help="number of trials that share a GPU")] = 1,
    address: Annotated[str, typer.Option(metavar="auto|local|HOST:PORT", help="address of the Ray cluster")] = "auto",
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="rerun failed trials")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="list the trials and their steps without running them")
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Run the trials of a sweep file (grid, list, random search or Optuna study, times seeds), or continue them."""
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
    a: Annotated[Path, typer.Argument(metavar="A", help="run folder, prediction file or bench document")],
    b: Annotated[Path, typer.Argument(metavar="B", help="another of the same kind")],
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare two runs, two prediction files label by label, or two bench documents row by row."""
    from fastcifar.reporting.compare import COMPARERS
    from fastcifar.reporting.compare import compare_paths as pair

    found = pair(a, b)
    print(json.dumps(found)) if as_json else Console().print(COMPARERS[found["kind"]].build_table(found))


@runs_app.command("ls")
def runs_ls(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder to search, at any depth")] = Path("runs"),
    sort: Annotated[
        str, typer.Option(metavar="COLUMN", help="column to sort by, ascending: name, val_acc, bytes, ...")
    ] = "date",
    reverse: Annotated[bool, typer.Option("--reverse", help="descending order")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List run folders and sweeps with state, epochs, accuracies, seconds, size and date."""
    from fastcifar.reporting.runs import list_runs, runs_table

    found = list_runs(folder, sort, reverse)
    print(json.dumps(found)) if as_json else Console().print(runs_table(found))


@runs_app.command("rm")
def runs_rm(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="run or sweep folders; with a filter also folders that contain them"),
    ],
    unfinished: Annotated[bool, typer.Option("--unfinished", help="only interrupted or damaged runs")] = False,
    keep_best: Annotated[
        int | None, typer.Option(min=0, help="all finished runs but this many with the highest val_acc")
    ] = None,
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="only the checkpoints")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="skip the confirmation")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Remove run folders and sweeps, or their checkpoints, after a confirmation; files of others are never removed."""
    from fastcifar.reporting.runs import confirm_removal, remove_runs, select_for_removal

    console, found = Console(stderr=as_json), select_for_removal(paths, unfinished, keep_best, checkpoints)
    if found and not yes:
        confirm_removal(found, checkpoints, console)
    remove_runs(found, checkpoints)
    print(json.dumps(found)) if as_json else console.print(f"removed {len(found)}")


@app.command()
def ui(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of the runs")] = Path("runs"),
    page: Annotated[str, typer.Option("--with", metavar="auto|mlflow|tensorboard", help="tracker")] = "auto",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="port, by default 5000 for mlflow and 6006 for tensorboard")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Serve the web page of MLflow or TensorBoard for tracked runs (`train --track`) until Ctrl-C."""
    from fastcifar.reporting.ui import serve_tracker_ui

    def announce(found: dict[str, str]) -> None:
        print(json.dumps(found) if as_json else f"{found['page']}: {found['url']}  (Ctrl-C ends it)", flush=True)

    serve_tracker_ui(folder, page, port, announce)


@app.command()
@recipe_options(("data", "device", "precision"))
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN|SWEEP...", help="run or sweep folders")],
    format: Annotated[str, typer.Option(metavar="terminal|markdown|csv|latex", help="output format")] = "terminal",
    sort: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="column heading to sort by, numbers in descending order")
    ] = None,
    validation: Annotated[bool, typer.Option("--validation", help="add the accuracy on the validation split")] = False,
    plots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="folder for plots of accuracy, loss, throughput and classes")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="self-contained HTML page to write")] = None,
    mistakes: Annotated[
        int, typer.Option(min=0, help="number of misclassified images to show, with confusion matrices; evaluates anew")
    ] = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Report runs and sweeps: mean and std over seeds, curves, and the runs that are not finished."""
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
    """Show versions, devices, broken imports, and what `train` would choose on this machine and why."""
    from fastcifar.cli.tables import diagnostics_table
    from fastcifar.device import collect_diagnostics

    found = collect_diagnostics(Recipe.make(**options))
    print(json.dumps(found)) if as_json else Console().print(diagnostics_table(found))


def main() -> None:
    """The entry point."""
    run_cli(app)
