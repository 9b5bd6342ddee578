"""Plots of one run, which `fastcifar train` writes into the run folder."""

import warnings
from pathlib import Path

import numpy as np

from fastcifar import plotting
from fastcifar.data import cifar
from fastcifar.data.inspection import plot_first_batch
from fastcifar.errors import UserError, first_message_line
from fastcifar.format import format_percent
from fastcifar.recipe import Recipe
from fastcifar.reporting.aggregate import group_runs
from fastcifar.reporting.records import read_records
from fastcifar.reporting.report import write_charts
from fastcifar.training.build import split_validation
from fastcifar.training.summary import RunSummary

PLOTS_FOLDER = "plots"  # in the run folder


def plot_finished_run(summary: RunSummary) -> list[str]:
    """Write the plots of `write_run_plots` and return a line about them; an error causes one warning and no line."""
    try:
        files = write_run_plots(summary)
    except Exception as error:  # a run must not fail for its plots, whatever their libraries raise
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_message_line(error)}"
        warnings.warn(f"the plots of the run were not written: {reason}; --no-plots omits them", stacklevel=2)
        return []
    return [f"plots: {files[0].parent} ({', '.join(file.stem for file in files)})"]


def write_run_plots(summary: RunSummary) -> list[Path]:
    """Plot the curves of a run, its confusion matrix if there is a test set, and its first batch; return the PNG files.

    The test set is not evaluated again: the confusion matrix is that of `summary`.
    """
    folder = Path(summary.run) / PLOTS_FOLDER
    plotting.create_plots_dir(folder)
    files = write_charts(folder, group_runs(read_records([Path(summary.run)])))
    if summary.test_acc is not None:
        files.append(folder / "confusion.png")
        score = f"{format_percent(summary.test_acc)}, {summary.correct:,} of {summary.total:,} images"
        title = f"test set, weights {summary.eval_weights}: {score}"
        plotting.plot_confusion_matrix(files[-1], np.array(summary.confusion), list(summary.per_class), title)
    recipe = Recipe(**summary.config)
    with warnings.catch_warnings(action="ignore"):  # the run has shown the warnings about the data set
        data = cifar.load_recipe_dataset(recipe)
    files.append(folder / "batch.png")
    train_split, _ = split_validation(data, recipe.val_size, recipe.val_seed)
    plot_first_batch(files[-1], recipe, train_split, data.classes)
    return files
