"""The commands of `fastcifar`. Each imports torch only when it runs and returns its result, which options.py prints."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console, Group

from fastcifar._version import __version__
from fastcifar.cli import fields, tables
from fastcifar.cli.exit import (
    SIGINT_EXIT_CODE,
    handle_signals,
    prepare_streams,
    print_error,
    report_error,
    stdout_errors,
)
from fastcifar.cli.options import CHECKPOINT_ARCH, RECIPE, RUN, Output, argument, command, import_torch, option, switch
from fastcifar.errors import DeviceError, UsageError, print_warning
from fastcifar.format import DataConsole, KeyValueTable, option_flag
from fastcifar.recipe import Recipe, section_fields

DIAGNOSTICS_NAME_WIDTH = len("import pytorch_optimizer")  # the longest name that `doctor` prints

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)
data_app = typer.Typer(help="Verify a data set, or plot the effect of augmentations.", no_args_is_help=True)
runs_app = typer.Typer(help="List run folders and sweeps, or remove them.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(runs_app, name="runs")


@app.callback(invoke_without_command=True)
def root_command(version: bool = switch("--version", "print the version and exit", "-V")) -> None:
    """Train image classifiers on CIFAR fast, under a parameter budget, and report the results honestly."""
    if version:
        typer.echo(f"fastcifar {__version__}")
        raise typer.Exit


@command(app, fields=Recipe.model_fields, needs_output=False, builds_networks=True)
def train(
    console: Console,
    recipe: str | None = RECIPE,
    dry_run: bool = switch("--dry-run", "run a few steps and estimate the time and memory of the whole run"),
    print_config: bool = switch("--print-config", "print all options of the run as a recipe file, and exit"),
    plots: bool = option(True, "", "plot the results and the first batch of a finished run", "--plots/--no-plots"),
    **options: Any,
) -> Output:
    """Train a network, evaluate it once on the test set, and save the weights and results in a run folder.

    Options given here override the recipe; the recipe overrides the defaults.
    """
    resolved = Recipe.make(recipe, **options)
    if print_config:
        return Output(resolved, lambda recipe: recipe.to_toml().rstrip("\n"))
    console.quiet = os.environ.get("RANK", "0") != "0"  # of the processes that torchrun starts, rank 0 prints
    import_torch(console)
    from fastcifar.reporting.run_plots import plot_finished_run
    from fastcifar.training.dry_run import dry_run as estimate_run
    from fastcifar.training.progress import print_scaling
    from fastcifar.training.trackers import view_commands
    from fastcifar.training.train import train as run

    print_scaling(console, recipe, options)
    if dry_run:
        return Output(estimate_run(resolved), tables.dry_run_table)
    summary = run(resolved, recipe, console)
    written = plot_finished_run(summary) if plots and not console.quiet else []
    lines = [*written, *tables.next_commands(summary), *view_commands(summary.config["track"], Path(summary.run))]
    return Output(summary, tables.summary_table, last_lines=lines)


@command(app, "eval", fields=fields.EVALUATION_FIELDS, builds_networks=True, shown_defaults=fields.EVALUATION_DEFAULTS)
def evaluate(
    console: Console,
    run: str = RUN,
    arch: str | None = CHECKPOINT_ARCH,
    plots: Path | None = option(None, "DIR", "folder to write reliability.png and confusion.png to"),
    shifted: Path | None = option(None, "DIR", "folder of the .npy files of CIFAR-10.1 to evaluate on as well"),
    corruptions: bool = switch("--corruptions", "also evaluate on test images that are corrupted by fastcifar itself"),
    corrupted: Path | None = option(
        None, "DIR", "folder of the .npy files of CIFAR-10-C or CIFAR-100-C to evaluate on as well"
    ),
    **options: Any,
) -> Output:
    """Evaluate a run, a checkpoint, or the published weights of another project on the test set."""
    import_torch(console)
    from fastcifar.evaluation.evaluate_run import evaluate_run

    folders = {"plots_dir": plots, "shifted_dir": shifted, "corrupted_dir": corrupted}
    scores = evaluate_run(run, arch=arch, with_corruptions=corruptions, console=console, **folders, **options)
    return Output(scores, tables.scores_table)


@command(app, fields=fields.EVALUATION_FIELDS, builds_networks=True, shown_defaults=fields.EVALUATION_DEFAULTS)
def predict(
    console: Console,
    run: str = RUN,
    source: str = argument(..., "INPUT", "pickle, .npy file, image file, folder of images, data:test or data:train"),
    out: Path = option(..., "FILE", "prediction file to write: .csv or .jsonl"),
    arch: str | None = CHECKPOINT_ARCH,
    ensemble: list[str] | None = option(None, "RUN|CKPT", "another run; the logits are averaged; may be repeated"),
    top: int = option(0, "INT", "number of most probable classes to write, with their probabilities"),
    probabilities: bool = switch("--probabilities", "write the probability of every class"),
    calibrated: bool = switch(
        "--calibrated", "calibrate the probabilities: divide the logits by a temperature fitted on the validation split"
    ),
    names: bool = switch("--names", "write class names instead of class indices"),
    header: str | None = option(None, "ID,LABEL", "header of a .csv file, by default ID,Labels"),
    show: Path | None = option(None, "FILE.png", "image file to plot some images with their predicted labels to"),
    **options: Any,
) -> Output:
    """Predict the classes of images with one trained network or an ensemble, and write a prediction file."""
    import_torch(console)
    from fastcifar.evaluation.predict import predict_to_file
    from fastcifar.evaluation.prediction_files import PredictionFormat

    format = PredictionFormat(header, names, top, probabilities, calibrated)
    result = predict_to_file(
        run, source, out, ensemble=ensemble or (), console=console, arch=arch, format=format, plot_path=show, **options
    )
    return Output(result, tables.predictions_table)


@command(app, fields=fields.MODEL_FIELDS, builds_networks=True, shown_defaults=fields.OF_THE_RUN)
def export(
    run: str = RUN,
    format: str = option("onnx", "onnx|pt2|aoti|safetensors", "file format"),
    out: Path | None = option(None, "FILE", "file to write, by default in the run folder"),
    inputs: str = option("uint8", "uint8|normalized", "format of the input images", "--input"),
    outputs: str = option("probabilities", "probabilities|logits", "output of the model", "--output"),
    arch: str | None = CHECKPOINT_ARCH,
    **options: Any,
) -> Output:
    """Export a trained network with a model card; the file is kept only if its outputs match those of the network."""
    from fastcifar.evaluation.export import export_model

    return Output(export_model(run, format, out, inputs, outputs, arch=arch, **options), tables.export_table)


@command(app, fields=section_fields("network"), builds_networks=True)
def models(
    name: str | None = argument(None, "NAME", "architecture whose layers are listed"),
    budget: float | None = option(None, "PARAMS", "parameter budget; the largest --width within it is computed"),
    **options: Any,
) -> Output:
    """List the architectures, list the layers of one, or fit its width to a parameter budget."""
    from fastcifar.models.describe import describe_architectures, describe_layers, fit_width_to_budget

    arch = name or options["arch"]
    if name and options["arch"] not in (None, name):
        raise UsageError(f"both {name} and --arch {options['arch']} are given", "give one of them")
    recipe = Recipe.make(**{**options, "arch": arch})
    if budget is not None:
        return Output(fit_width_to_budget(recipe, budget), tables.width_table)
    if arch:
        return Output(describe_layers(recipe), tables.layers_table)
    if given := [field for field, value in options.items() if value is not None]:
        raise UsageError(f"{option_flag(given[0])} applies only to one architecture", "give its NAME")
    return Output(describe_architectures(), tables.architectures_table)


@command(app, fields=fields.BENCH_FIELDS, builds_networks=True, shown_defaults=fields.BENCH_DEFAULTS)
def bench(
    console: Console,
    recipe: str | None = RECIPE,
    what: str = option(
        "loader,step,train", "NAME,...", "benchmarks: loader, step, train (both together), infer, conv, replay, or all"
    ),
    archs: str = option("", "NAME,...", "architectures to measure, by default --arch"),
    batch_sizes: str = option("", "INT,...", "batch sizes to measure, by default --batch-size"),
    modes: str = option(
        "",
        "NAME,...",
        "execution modes: eager, compiled, captured (in a CUDA graph); by default those of --compile and --cuda-graph",
    ),
    trials: int = option(5, "INT", "number of timed trials of about two seconds each; all are recorded", min=1),
    profile: Path | None = option(None, "FILE", "file to write a Chrome trace of a few steps to"),
    chart: Path | None = option(None, "FILE.png", "image file to write a bar chart of the results to"),
    **options: Any,
) -> Output:
    """Measure images/s of the data loader, of the training step on a fixed batch, of both together, and more."""
    import_torch(console)
    from fastcifar.benchmark.bench import bench as run_bench
    from fastcifar.plotting import plot_bar_chart, require_png
    from fastcifar.reporting.benchmark_tables import bench_panels, bench_table

    if chart:
        require_png(chart)
    lists = {"arch": archs, "batch_size": batch_sizes, "mode": modes}
    grid = {name: values.split(",") for name, values in lists.items() if values}
    result = run_bench(Recipe.make(recipe, **options), what, trials, profile, console, grid=grid)
    lines = []
    if profile:
        viewers = "open it at https://ui.perfetto.dev or in chrome://tracing"
        lines.append(f"wrote {profile}, a trace of {profile.stat().st_size:,} bytes; {viewers}")
    if chart:
        plot_bar_chart(chart, *bench_panels(result))
        lines.append(f"wrote {chart}")
    return Output(result, bench_table, last_lines=lines)


@command(
    app,
    fields=fields.SPEEDRUN_FIELDS,
    needs_output=False,
    builds_networks=True,
    shown_defaults=fields.SPEEDRUN_DEFAULTS,
)
def speedrun(
    console: Console,
    target: str | None = option(None, "94|95|96", "target accuracy in percent, by default 94"),
    recipe: str | None = RECIPE,
    n: int = option(1, "INT", "number of runs, with consecutive seeds beginning at --seed", "--n", min=1),
    eval_split: str | None = option(None, "test|val", "split to evaluate on, by default test (trains on all images)"),
    append: Path | None = option(None, "DIR", "result folder of an earlier speedrun to which runs are added"),
    **options: Any,
) -> Output:
    """Time n training runs, evaluate them outside the timed region, and report how often the target is reached.

    Options given here override the recipe.
    """
    import_torch(console)
    from fastcifar.benchmark.speedrun import speedrun as run_speedrun
    from fastcifar.benchmark.speedrun_results import speedrun_table

    return Output(run_speedrun(target, recipe, n, eval_split, append, console, **options), speedrun_table)


@command(
    app, fields=fields.SWEEP_FIELDS, needs_output=False, builds_networks=True, shown_defaults=fields.SWEEP_DEFAULTS
)
def sweep(
    console: Console,
    source: str = argument(..., "FILE|NAME", "sweep file, name of a built-in sweep, or folder of a sweep"),
    out: Path | None = option(None, "DIR", "sweep folder, by default sweeps/NAME"),
    executor: str = option("process", "NAME", "process (one trial after another), processes, gpus or ray"),
    seeds: str | None = option(None, "INT|INT,...", "number or list of seeds, by default that of the sweep file"),
    jobs: int | None = option(None, "INT", "number of concurrent trials, by default what cores or GPUs allow", min=1),
    cpus: int | None = option(None, "INT", "CPU threads per trial, by default an equal share of the cores", min=1),
    trials_per_gpu: int = option(1, "INT", "number of concurrent trials on each GPU", min=1),
    address: str = option("auto", "auto|local|HOST:PORT", "address of the Ray cluster"),
    retry_failed: bool = switch("--retry-failed", "rerun the failed trials"),
    dry_run: bool = switch("--dry-run", "list the trials and their number of steps without running them"),
    **options: Any,
) -> Output:
    """Run or continue the trials of a sweep file: a grid, list, random search or Optuna study, for each seed.

    Recipe options given here override those that the sweep file sets for all trials.
    """
    import_torch(console)
    from fastcifar.sweep.executors import ExecutorOptions
    from fastcifar.sweep.sweep import plan_sweep, run_sweep
    from fastcifar.sweep.sweep_progress import plan_table, sweep_table

    if dry_run:
        return Output(plan_sweep(source, out, executor, seeds, **options), plan_table)
    executor_options = ExecutorOptions(jobs, cpus, trials_per_gpu, address)
    result = run_sweep(source, out, executor, executor_options, seeds, retry_failed, console, **options)
    return Output(result, sweep_table, exit_code=int(result.counts["failed"] > 0))


@command(app)
def compare(
    a: Path = argument(..., "A", "run folder, prediction file or file of `bench --json`"),
    b: Path = argument(..., "B", "another one of the same kind"),
) -> Output:
    """Compare two runs, two prediction files label by label, or two files of `bench --json` row by row."""
    from fastcifar.reporting.compare import compare_paths

    document, table = compare_paths(a, b)
    return Output(document, lambda _: table)


@command(app, fields=("data", "device", "precision"), builds_networks=True, shown_defaults=fields.OF_THE_RUN)
def report(
    runs: list[Path] = argument(..., "RUN|SWEEP|DIR", "runs, sweeps, or folders that contain some at any depth"),
    format: str = option("terminal", "NAME", "output format: terminal, markdown, csv or latex"),
    sort: str | None = option(None, "COLUMN", "column to sort by, its heading without %; numbers in descending order"),
    validation: bool = switch("--validation", "add the accuracy on the validation split to the table"),
    plots: Path | None = option(None, "DIR", "folder for plots of accuracy, loss, throughput and accuracy per class"),
    html: Path | None = option(None, "FILE", "self-contained HTML file to write"),
    mistakes: int = option(
        0, "INT", "number of misclassified images to add to --html or --plots; evaluates the runs again", min=0
    ),
    **options: Any,
) -> Output:
    """Report runs and sweeps: mean and standard deviation over seeds, curves, and unfinished runs."""
    from fastcifar.reporting.report import build_report

    result, text = build_report(
        runs, format, sort, validation, plots, html, mistakes, DataConsole(stderr=True), **options
    )
    return Output(result, lambda _: text)


@command(runs_app, "ls")
def runs_ls(
    folder: Path = argument(Path("runs"), "DIR", "folder that is searched at any depth"),
    sort: str = option("date", "KEY", "key of --json to sort by in ascending order, such as name, val_acc or bytes"),
    reverse: bool = switch("--reverse", "sort in descending order"),
) -> Output:
    """List run folders and sweeps with their state, epochs, accuracies, seconds, size and date."""
    from fastcifar.reporting.runs import list_runs, runs_table

    return Output(list_runs(folder, sort, reverse), runs_table)


@command(runs_app, "rm")
def runs_rm(
    console: Console,
    paths: list[Path] = argument(..., "RUN", "runs, sweeps, or, with a filter, folders that contain them"),
    unfinished: bool = switch("--unfinished", "filter: remove only interrupted or damaged runs"),
    keep_best: int | None = option(None, "INT", "filter: remove finished runs, keep the INT of highest val_acc", min=0),
    checkpoints: bool = switch("--checkpoints", "remove only the checkpoints"),
    yes: bool = switch("--yes", "skip the confirmation", "-y"),
) -> Output:
    """Remove run folders and sweeps, or only their checkpoints, after a confirmation; other files are never removed."""
    from fastcifar.reporting.runs import confirm_removal, remove_runs, select_for_removal

    rows = select_for_removal(paths, unfinished, keep_best, checkpoints)
    if rows and not yes:
        confirm_removal(rows, checkpoints, console)
    remove_runs(rows, checkpoints)
    return Output(rows, lambda rows: f"removed {len(rows)}")


@command(data_app, "verify", fields=fields.DATA_FIELDS)
def data_verify(**options: Any) -> Output:
    """Verify every file of a data set, and report its source, images and classes."""
    from fastcifar.data.inspection import verify_dataset

    return Output(verify_dataset(Recipe.make(**options)), tables.dataset_table)


@command(data_app, "show", fields=("augment", *fields.DATA_FIELDS, "seed"))
def data_show(
    out: Path = option(..., "FILE.png", "image file to write; an existing one is overwritten"),
    count: int = option(8, "INT", "number of images"),
    **options: Any,
) -> Output:
    """Plot images before and after each augmentation in --augment, and after all of them."""
    from fastcifar.data.inspection import plot_augmentations

    return Output(plot_augmentations(Recipe.make(**options), out, count), lambda result: f"wrote {result['out']}")


@command(app, fields=section_fields("execution"))
def doctor(
    console: Console,
    check: bool = switch("--check", "train a small network in every execution mode, and compare the results"),
    **options: Any,
) -> Output:
    """Show versions, devices, failing imports, and the execution that `train` chooses on this machine and why.

    With --check, the exit code is 8 if an execution mode fails or its results differ from those of eager mode.
    """
    from fastcifar.device import collect_diagnostics

    recipe = Recipe.make(**options)
    with console.status("importing PyTorch and the optional modules ..."):
        diagnostics = collect_diagnostics(
            recipe, lambda rows: console.print(KeyValueTable(rows, name_width=DIAGNOSTICS_NAME_WIDTH), crop=False)
        )
    document = diagnostics.model_dump(exclude_unset=True)
    if not check:
        return Output(document)
    from fastcifar.training.execution_check import check_execution, check_tables

    console.print()
    result = check_execution(options, console)
    document["check"] = result.model_dump()
    exit_code = 0 if result.works else DeviceError.exit_code
    return Output(document, lambda _: Group("", check_tables(result)), exit_code)


def main() -> NoReturn:
    """Run the command in sys.argv and exit with its code; print user errors in one line, others with a traceback."""
    warnings.showwarning = print_warning
    prepare_streams()
    handle_signals()
    try:
        code = app(standalone_mode=False)
        with stdout_errors():  # what --help and --version print
            pass
        if code == SIGINT_EXIT_CODE:  # Typer returns this code for a KeyboardInterrupt
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(print_error("stopped by SIGINT", SIGINT_EXIT_CODE))
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        sys.exit(report_error(error))
    sys.exit(code if isinstance(code, int) else 0)
