"""The commands of `fastcifar`; each only passes its options on and prints the result.

Options are generated from the fields of `Recipe` (options.py); errors become messages and exit codes in exit.py. torch
is imported only when a command runs. With --json the last line of stdout is one JSON document.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fastcifar._version import __version__
from fastcifar.cli import data, reports
from fastcifar.cli.exit import run_cli
from fastcifar.cli.options import (
    CheckpointArchOption,
    DebugOption,
    DryRunOption,
    JsonOption,
    RecipeOption,
    RunArgument,
    recipe_options,
)
from fastcifar.recipe import Recipe, section_fields

app = typer.Typer(
    help="Train image classifiers on CIFAR fast, under a parameter budget, and report the results honestly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(data.data_app, name="data")
app.add_typer(reports.runs_app, name="runs")


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

    resolved = Recipe.make(recipe, **options)
    console = Console(stderr=as_json, quiet=os.environ.get("RANK", "0") != "0")  # of torchrun's processes rank 0 prints
    result = estimate_run(resolved) if dry_run else run(resolved, recipe, console)
    if not as_json:
        console.print(dry_run_table(result) if isinstance(result, dict) else summary_table(result))
    elif not console.quiet:
        print(json.dumps(result if isinstance(result, dict) else result.model_dump()))


@app.command("eval")
@recipe_options(
    ("eval_weights", "tta", "data", "device", "precision", "compile", "cuda_graph", "normalize", "max_params")
)
def evaluate(
    run: RunArgument,
    arch: CheckpointArchOption = None,
    plots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="folder to write the plots reliability.png and confusion.png to")
    ] = None,
    shifted: Annotated[
        Path | None, typer.Option(metavar="DIR", help="folder of the .npy files of CIFAR-10.1, evaluated in addition")
    ] = None,
    corruptions: Annotated[
        bool, typer.Option("--corruptions", help="evaluate on corrupted test images in addition")
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Evaluate a run, a checkpoint, or the published weights of another project on the test set."""
    from fastcifar.cli.tables import scores_table
    from fastcifar.evaluation.evaluate_run import evaluate_run

    console = Console(stderr=as_json)
    extras: dict[str, Any] = {"plots_dir": plots, "shifted_dir": shifted, "with_corruptions": corruptions}
    scores = evaluate_run(run, arch=arch, console=console, **extras, **options)
    print(json.dumps(scores)) if as_json else console.print(scores_table(scores))


@app.command()
@recipe_options(
    ("eval_weights", "tta", "data", "device", "precision", "compile", "cuda_graph", "normalize", "max_params")
)
def predict(
    run: RunArgument,
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT", help="images: a pickle, .npy file, image file, folder of images, data:test or data:train"
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="prediction file to write: .csv or .jsonl")],
    arch: CheckpointArchOption = None,
    ensemble: Annotated[
        list[str] | None,
        typer.Option(
            "--ensemble", metavar="RUN|CKPT", help="further run; logits are averaged over all; may be repeated"
        ),
    ] = None,
    top: Annotated[
        int, typer.Option(metavar="INT", help="number of most probable classes to write, with their probabilities")
    ] = 0,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="write the probability of every class")
    ] = False,
    names: Annotated[bool, typer.Option("--names", help="write class names instead of class indices")] = False,
    header: Annotated[
        str | None, typer.Option(metavar="ID,LABEL", help="header of a .csv file, by default ID,Labels")
    ] = None,
    show: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="image file to plot some images with their predicted labels to"),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Predict the classes of images with one trained network or an ensemble, and write a prediction file."""
    from fastcifar.cli.tables import predictions_table
    from fastcifar.evaluation.predict import predict_to_file
    from fastcifar.evaluation.prediction_files import PredictionFormat

    console = Console(stderr=as_json)
    result = predict_to_file(
        run,
        source,
        out,
        ensemble=ensemble or (),
        console=console,
        arch=arch,
        format=PredictionFormat(header, names, top, probabilities),
        plot_path=show,
        **options,
    )
    print(json.dumps(result)) if as_json else console.print(predictions_table(result))


@app.command()
@recipe_options(("eval_weights", "data", "normalize", "max_params"))
def export(
    run: RunArgument,
    format: Annotated[str, typer.Option(metavar="onnx|pt2|aoti|safetensors", help="file format")] = "onnx",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="file to write, by default in the run folder")
    ] = None,
    inputs: Annotated[
        str, typer.Option("--input", metavar="uint8|normalized", help="format of the input images")
    ] = "uint8",
    outputs: Annotated[
        str,
        typer.Option(
            "--output", metavar="probabilities|logits", help="output of the model: class probabilities or logits"
        ),
    ] = "probabilities",
    arch: CheckpointArchOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Export a trained network with a model card; the file is kept only if its outputs equal those of the network."""
    from fastcifar.cli.tables import export_table
    from fastcifar.evaluation.export import export_model

    result = export_model(run, format, out, inputs, outputs, arch=arch, **options)
    print(json.dumps(result)) if as_json else Console().print(export_table(result))


@app.command()
@recipe_options(section_fields("network"))
def models(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="architecture whose layers are listed")] = None,
    budget: Annotated[
        float | None,
        typer.Option(metavar="PARAMS", help="maximum number of parameters; the largest --width that fits is computed"),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """List the architectures, list the layers of one, or fit its width to a parameter budget."""
    from fastcifar.cli.tables import architectures_table, layers_table, width_table
    from fastcifar.models.describe import describe_architectures, describe_layers, fit_width_to_budget

    arch = name or options["arch"]
    recipe = Recipe.make(**{**options, "arch": arch})
    if budget is not None:
        result: Any = fit_width_to_budget(recipe, int(budget))
        table = width_table(result)
    elif arch:
        result = describe_layers(recipe)
        table = layers_table(result)
    else:
        result = describe_architectures()
        table = architectures_table(result)
    print(json.dumps(result)) if as_json else Console().print(table)


@app.command()
@recipe_options((*section_fields("network"), "data", "dataset", "augment", "batch_size", *section_fields("execution")))
def bench(
    recipe: RecipeOption = None,
    what: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="benchmarks to run: loader, step, train (loader and step together), infer, conv, replay, or all",
        ),
    ] = "loader,step,train",
    archs: Annotated[str, typer.Option(metavar="NAME,...", help="architectures to measure, by default --arch")] = "",
    batch_sizes: Annotated[
        str, typer.Option(metavar="INT,...", help="batch sizes to measure, by default --batch-size")
    ] = "",
    modes: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="execution modes to measure: eager, compiled, captured; by default as --compile and --cuda-graph say",
        ),
    ] = "",
    trials: Annotated[
        int,
        typer.Option(metavar="INT", min=1, help="number of timed trials of a few seconds each; all are recorded"),
    ] = 5,
    profile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="file to write a Chrome trace of a few steps to")
    ] = None,
    chart: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="image file to write a bar chart of the results to")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Measure images/s of the data loader, of the training step on a fixed batch, of both together, and more."""
    from fastcifar.benchmark.bench import bench as run_bench
    from fastcifar.plotting import plot_bar_chart, require_png
    from fastcifar.reporting.benchmark_tables import bench_panels, bench_table

    console = Console(stderr=as_json)
    if chart:
        require_png(chart)
    lists = {"arch": archs, "batch_size": batch_sizes, "mode": modes}
    grid = {name: values.split(",") for name, values in lists.items() if values}
    result = run_bench(Recipe.make(recipe, **options), what, trials, profile, console, grid=grid)
    if chart:
        plot_bar_chart(chart, *bench_panels(result))
    print(json.dumps(result)) if as_json else console.print(bench_table(result))


@app.command()
@recipe_options(Recipe.model_fields)
def speedrun(
    target: Annotated[
        str | None, typer.Option("--target", metavar="94|95|96|96.5", help="target accuracy in percent, by default 94")
    ] = None,
    recipe: RecipeOption = None,
    n: Annotated[
        int,
        typer.Option("--n", metavar="INT", min=1, help="number of runs, with consecutive seeds beginning at --seed"),
    ] = 1,
    eval_split: Annotated[
        str | None,
        typer.Option(
            metavar="test|val", help="split to evaluate on, by default test; with test all images are trained on"
        ),
    ] = None,
    append: Annotated[
        Path | None,
        typer.Option("--append", metavar="DIR", help="result folder of an earlier speedrun to which runs are added"),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Time n training runs, evaluate them outside the timed region, and report how often the target is reached."""
    from fastcifar.benchmark.speedrun import speedrun as run_speedrun
    from fastcifar.reporting.benchmark_tables import speedrun_table

    console = Console(stderr=as_json)
    result = run_speedrun(target, recipe, n, eval_split, append, console, **options)
    print(json.dumps(result)) if as_json else console.print(speedrun_table(result))


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
            metavar="NAME",
            help="executor of the trials: process (one after another in this process), processes, gpus or ray",
        ),
    ] = "process",
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="INT|INT,...", help="number of seeds, or a list of seeds, by default that of the sweep file"
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(metavar="INT", min=1, help="number of concurrent trials, by default as many as fit")
    ] = None,
    cpus: Annotated[
        int | None,
        typer.Option(
            metavar="INT", min=1, help="number of CPU threads per trial, by default an equal share of the cores"
        ),
    ] = None,
    trials_per_gpu: Annotated[
        int, typer.Option(metavar="INT", min=1, help="number of concurrent trials on each GPU")
    ] = 1,
    address: Annotated[str, typer.Option(metavar="auto|local|HOST:PORT", help="address of the Ray cluster")] = "auto",
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="rerun the failed trials")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="list the trials and their number of steps without running them")
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Run or continue the trials of a sweep file: a grid, a list, a random search or an Optuna study, times seeds."""
    from fastcifar.sweep.executors import ExecutorOptions
    from fastcifar.sweep.sweep import plan_sweep, run_sweep
    from fastcifar.sweep.sweep_progress import plan_table, sweep_table

    console = Console(stderr=as_json)
    if dry_run:
        result = plan_sweep(source, out, executor, seeds, **options)
    else:
        executor_options = ExecutorOptions(jobs, cpus, trials_per_gpu, address)
        result = run_sweep(source, out, executor, executor_options, seeds, retry_failed, console, **options)
    print(json.dumps(result)) if as_json else console.print(plan_table(result) if dry_run else sweep_table(result))
    raise typer.Exit(int(not dry_run and result["counts"]["failed"] > 0))


for command in (reports.compare, reports.report):
    app.command()(command)


@app.command()
@recipe_options(section_fields("execution"))
def doctor(as_json: JsonOption = False, debug: DebugOption = False, **options: Any) -> None:
    """Show versions, devices, failing imports, and the execution that `train` chooses on this machine and why."""
    from fastcifar.cli.tables import diagnostics_table
    from fastcifar.device import collect_diagnostics

    result = collect_diagnostics(Recipe.make(**options))
    print(result.model_dump_json(exclude_unset=True)) if as_json else Console().print(diagnostics_table(result))


def main() -> None:
    """Run the command line."""
    run_cli(app)
