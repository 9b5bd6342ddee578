"""The commands of `fastcifar`: each passes its options on and returns its result, which options.py prints.

Errors become messages and exit codes in exit.py. torch is imported only when a command runs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fastcifar._version import __version__
from fastcifar.cli import reports, tables
from fastcifar.cli.exit import run_cli
from fastcifar.cli.options import (
    CheckpointArchOption,
    Output,
    RecipeOption,
    RunArgument,
    argument,
    command,
    option,
    switch,
)
from fastcifar.recipe import Recipe, section_fields

MODEL_FIELDS = ("eval_weights", "data", "normalize", "max_params")
EVALUATION_FIELDS = (*MODEL_FIELDS, "tta", "device", "precision", "compile", "cuda_graph")

app = typer.Typer(
    help="Train image classifiers on CIFAR fast, under a parameter budget, and report the results honestly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Verify a data set, or plot the effect of augmentations.", no_args_is_help=True)
app.add_typer(data_app, name="data")
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


@command(app, fields=Recipe.model_fields)
def train(
    console: Console,
    recipe: RecipeOption = None,
    dry_run: Annotated[
        bool, switch("--dry-run", "run a few steps and estimate the time and memory of the whole run")
    ] = False,
    **options: Any,
) -> Output:
    """Train a network, evaluate it once on the test set, and save both in a run folder.

    Options given here override the recipe; the recipe overrides the defaults.
    """
    from fastcifar.training.dry_run import dry_run as estimate_run
    from fastcifar.training.train import train as run

    console.quiet = os.environ.get("RANK", "0") != "0"  # of the processes that torchrun starts, rank 0 prints
    resolved = Recipe.make(recipe, **options)
    if dry_run:
        return Output(estimate_run(resolved), tables.dry_run_table)
    return Output(run(resolved, recipe, console), tables.summary_table)


@command(app, "eval", fields=EVALUATION_FIELDS)
def evaluate(
    run: RunArgument,
    console: Console,
    arch: CheckpointArchOption = None,
    plots: Annotated[Path | None, option("DIR", "folder to write reliability.png and confusion.png to")] = None,
    shifted: Annotated[
        Path | None, option("DIR", "folder of the .npy files of CIFAR-10.1, evaluated in addition")
    ] = None,
    corruptions: Annotated[bool, switch("--corruptions", "evaluate on corrupted test images in addition")] = False,
    **options: Any,
) -> Output:
    """Evaluate a run, a checkpoint, or the published weights of another project on the test set."""
    from fastcifar.evaluation.evaluate_run import evaluate_run

    extras: dict[str, Any] = {"plots_dir": plots, "shifted_dir": shifted, "with_corruptions": corruptions}
    return Output(evaluate_run(run, arch=arch, console=console, **extras, **options), tables.scores_table)


@command(app, fields=EVALUATION_FIELDS)
def predict(
    run: RunArgument,
    source: Annotated[
        str, argument("INPUT", "images: a pickle, .npy file, image file, folder of images, data:test or data:train")
    ],
    out: Annotated[Path, option("FILE", "prediction file to write: .csv or .jsonl")],
    console: Console,
    arch: CheckpointArchOption = None,
    ensemble: Annotated[
        list[str] | None, option("RUN|CKPT", "further run; logits are averaged over all; may be repeated")
    ] = None,
    top: Annotated[int, option("INT", "number of most probable classes to write, with their probabilities")] = 0,
    probabilities: Annotated[bool, switch("--probabilities", "write the probability of every class")] = False,
    names: Annotated[bool, switch("--names", "write class names instead of class indices")] = False,
    header: Annotated[str | None, option("ID,LABEL", "header of a .csv file, by default ID,Labels")] = None,
    show: Annotated[
        Path | None, option("FILE.png", "image file to plot some images with their predicted labels to")
    ] = None,
    **options: Any,
) -> Output:
    """Predict the classes of images with one trained network or an ensemble, and write a prediction file."""
    from fastcifar.evaluation.predict import predict_to_file
    from fastcifar.evaluation.prediction_files import PredictionFormat

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
    return Output(result, tables.predictions_table)


@command(app, fields=MODEL_FIELDS)
def export(
    run: RunArgument,
    format: Annotated[str, option("onnx|pt2|aoti|safetensors", "file format")] = "onnx",
    out: Annotated[Path | None, option("FILE", "file to write, by default in the run folder")] = None,
    inputs: Annotated[str, option("uint8|normalized", "format of the input images", "--input")] = "uint8",
    outputs: Annotated[
        str, option("probabilities|logits", "output of the model: class probabilities or logits", "--output")
    ] = "probabilities",
    arch: CheckpointArchOption = None,
    **options: Any,
) -> Output:
    """Export a trained network with a model card; the file is kept only if its outputs equal those of the network."""
    from fastcifar.evaluation.export import export_model

    return Output(export_model(run, format, out, inputs, outputs, arch=arch, **options), tables.export_table)


@command(app, fields=section_fields("network"))
def models(
    name: Annotated[str | None, argument("NAME", "architecture whose layers are listed")] = None,
    budget: Annotated[
        float | None, option("PARAMS", "maximum number of parameters; the largest --width that fits is computed")
    ] = None,
    **options: Any,
) -> Output:
    """List the architectures, list the layers of one, or fit its width to a parameter budget."""
    from fastcifar.models.describe import describe_architectures, describe_layers, fit_width_to_budget

    arch = name or options["arch"]
    recipe = Recipe.make(**{**options, "arch": arch})
    if budget is not None:
        return Output(fit_width_to_budget(recipe, int(budget)), tables.width_table)
    if arch:
        return Output(describe_layers(recipe), tables.layers_table)
    return Output(describe_architectures(), tables.architectures_table)


@command(
    app, fields=(*section_fields("network"), "data", "dataset", "augment", "batch_size", *section_fields("execution"))
)
def bench(
    console: Console,
    recipe: RecipeOption = None,
    what: Annotated[
        str,
        option(
            "NAME,...", "benchmarks to run: loader, step, train (loader and step together), infer, conv, replay, or all"
        ),
    ] = "loader,step,train",
    archs: Annotated[str, option("NAME,...", "architectures to measure, by default --arch")] = "",
    batch_sizes: Annotated[str, option("INT,...", "batch sizes to measure, by default --batch-size")] = "",
    modes: Annotated[
        str,
        option(
            "NAME,...",
            "execution modes to measure: eager, compiled, captured; by default as --compile and --cuda-graph say",
        ),
    ] = "",
    trials: Annotated[int, option("INT", "number of timed trials of a few seconds each; all are recorded", min=1)] = 5,
    profile: Annotated[Path | None, option("FILE", "file to write a Chrome trace of a few steps to")] = None,
    chart: Annotated[Path | None, option("FILE.png", "image file to write a bar chart of the results to")] = None,
    **options: Any,
) -> Output:
    """Measure images/s of the data loader, of the training step on a fixed batch, of both together, and more."""
    from fastcifar.benchmark.bench import bench as run_bench
    from fastcifar.plotting import plot_bar_chart, require_png
    from fastcifar.reporting.benchmark_tables import bench_panels, bench_table

    if chart:
        require_png(chart)
    lists = {"arch": archs, "batch_size": batch_sizes, "mode": modes}
    grid = {name: values.split(",") for name, values in lists.items() if values}
    result = run_bench(Recipe.make(recipe, **options), what, trials, profile, console, grid=grid)
    if chart:
        plot_bar_chart(chart, *bench_panels(result))
    return Output(result, bench_table)


@command(app, fields=Recipe.model_fields)
def speedrun(
    console: Console,
    target: Annotated[str | None, option("94|95|96", "target accuracy in percent, by default 94")] = None,
    recipe: RecipeOption = None,
    n: Annotated[int, option("INT", "number of runs, with consecutive seeds beginning at --seed", "--n", min=1)] = 1,
    eval_split: Annotated[
        str | None, option("test|val", "split to evaluate on, by default test; with test all images are trained on")
    ] = None,
    append: Annotated[
        Path | None, option("DIR", "result folder of an earlier speedrun to which runs are added")
    ] = None,
    **options: Any,
) -> Output:
    """Time n training runs, evaluate them outside the timed region, and report how often the target is reached."""
    from fastcifar.benchmark.speedrun import speedrun as run_speedrun
    from fastcifar.benchmark.speedrun_results import speedrun_table

    return Output(run_speedrun(target, recipe, n, eval_split, append, console, **options), speedrun_table)


@command(app, fields=[name for name in Recipe.model_fields if name not in ("seed", "out", "resume")])
def sweep(
    source: Annotated[str, argument("FILE|NAME", "sweep file, name of a shipped sweep, or folder of a sweep")],
    console: Console,
    out: Annotated[Path | None, option("DIR", "sweep folder, by default sweeps/NAME")] = None,
    executor: Annotated[
        str,
        option("NAME", "executor of the trials: process (one after another in this process), processes, gpus or ray"),
    ] = "process",
    seeds: Annotated[
        str | None, option("INT|INT,...", "number of seeds, or a list of seeds, by default that of the sweep file")
    ] = None,
    jobs: Annotated[int | None, option("INT", "number of concurrent trials, by default as many as fit", min=1)] = None,
    cpus: Annotated[
        int | None, option("INT", "number of CPU threads per trial, by default an equal share of the cores", min=1)
    ] = None,
    trials_per_gpu: Annotated[int, option("INT", "number of concurrent trials on each GPU", min=1)] = 1,
    address: Annotated[str, option("auto|local|HOST:PORT", "address of the Ray cluster")] = "auto",
    retry_failed: Annotated[bool, switch("--retry-failed", "rerun the failed trials")] = False,
    dry_run: Annotated[
        bool, switch("--dry-run", "list the trials and their number of steps without running them")
    ] = False,
    **options: Any,
) -> Output:
    """Run or continue the trials of a sweep file: a grid, a list, a random search or an Optuna study, times seeds."""
    from fastcifar.sweep.executors import ExecutorOptions
    from fastcifar.sweep.sweep import plan_sweep, run_sweep
    from fastcifar.sweep.sweep_progress import plan_table, sweep_table

    if dry_run:
        return Output(plan_sweep(source, out, executor, seeds, **options), plan_table)
    executor_options = ExecutorOptions(jobs, cpus, trials_per_gpu, address)
    result = run_sweep(source, out, executor, executor_options, seeds, retry_failed, console, **options)
    return Output(result, sweep_table, exit_code=int(result["counts"]["failed"] > 0))


command(app)(reports.compare)
command(app, fields=("data", "device", "precision"))(reports.report)


@command(data_app, "verify", fields=("data", "dataset"))
def data_verify(**options: Any) -> Output:
    """Verify every file of a data set, and report its source, images and classes."""
    from fastcifar.data.inspection import verify_dataset

    return Output(verify_dataset(Recipe.make(**options)), tables.dataset_table)


@command(data_app, "show", fields=("augment", "data", "dataset", "seed"))
def data_show(
    out: Annotated[Path, option("FILE.png", "image file to write; an existing one is overwritten")],
    count: Annotated[int, option("INT", "number of images")] = 8,
    **options: Any,
) -> Output:
    """Plot images before and after each augmentation in --augment, and after all of them."""
    from fastcifar.data.inspection import plot_augmentations

    return Output(plot_augmentations(Recipe.make(**options), out, count), lambda result: f"wrote {result['out']}")


@command(app, fields=section_fields("execution"))
def doctor(**options: Any) -> Output:
    """Show versions, devices, failing imports, and the execution that `train` chooses on this machine and why."""
    from fastcifar.device import collect_diagnostics

    diagnostics = collect_diagnostics(Recipe.make(**options))
    return Output(diagnostics.model_dump(exclude_unset=True), lambda _: tables.diagnostics_table(diagnostics))


def main() -> None:
    """Run the command line."""
    run_cli(app)
