"""Tables for the terminal of the documents that commands print with --json, one function for each kind of document."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from rich.console import Group

from fastcifar.format import (
    MISSING,
    KeyValueTable,
    NumericTable,
    format_decimal,
    format_memory,
    format_option_value,
    format_percent,
    format_short_number,
)
from fastcifar.recipe import Recipe

if TYPE_CHECKING:  # these modules import torch
    from fastcifar.data.inspection import DatasetDescription
    from fastcifar.evaluation.evaluate_run import CorruptionsResult, EvalResult
    from fastcifar.evaluation.export import ExportResult
    from fastcifar.evaluation.predict import PredictResult
    from fastcifar.models.describe import Architecture, FittedWidth, NetworkLayers
    from fastcifar.training.dry_run import DryRunEstimate
    from fastcifar.training.summary import RunSummary

MAX_CLASS_ROWS = 10
NO_TEST_SET = "none, because the data set has no test set"


def summary_table(summary: RunSummary) -> KeyValueTable:
    """Return a table of the main results of a run."""
    class_accs = [(accuracy, name) for name, accuracy in summary.per_class.items() if accuracy is not None]
    lowest_acc, lowest_class = min(class_accs, default=(None, MISSING))
    stopped = "" if summary.stop_reason == "epochs" else f"  (stopped by {summary.stop_reason})"
    test_accuracy = NO_TEST_SET
    if summary.test_acc is not None:
        images = f"{summary.correct:,} of {summary.total:,}, weights {summary.eval_weights}"
        test_accuracy = f"{format_percent(summary.test_acc)}  ({images})"
    rows = {
        "run": summary.run,
        "network": f"{summary.arch}, {summary.params:,} parameters, {summary.macs / 1e6:,.2f} M MACs",
        "test accuracy": test_accuracy,
        "  moving average of weights": _percent_or_none(summary.test_acc_ema),
        f"  with --tta {summary.config['tta']}": _percent_or_none(summary.test_acc_tta),
        "test loss, calibration error": f"{format_decimal(summary.test_loss, 4)}, {format_decimal(summary.ece, 4)}",
        "validation accuracy": f"{format_percent(summary.val_acc)}, best {format_percent(summary.best_val_acc)}",
        "lowest class accuracy": f"{lowest_class}, {format_percent(lowest_acc)}",
        "epochs, steps": f"{summary.epochs}, {summary.steps:,}{stopped}",
        "images/s in training": format_short_number(summary.images_per_s),
        "seconds": _phase_seconds(summary.seconds),
        "peak memory": format_memory(summary.peak_memory_bytes),
    }
    return KeyValueTable(rows)


def next_commands(summary: RunSummary) -> list[str]:
    """Return lines with the commands that a user may want to run after `fastcifar train`."""
    from fastcifar.models.imports import import_options

    run, imports = shlex.quote(summary.run), import_options()
    predict = f"fastcifar predict {run} INPUT --out submission.csv{imports}"
    purpose, longer = ("train longer", f" --epochs {2 * summary.epochs}") if summary.complete else ("continue", "")
    if summary.stop_reason == "patience":
        longer = f" --patience {2 * summary.config['patience']}"
    commands = {
        "compare with other runs": f"fastcifar report {run} RUN ...",
        "predict labels, for example of a pickle file from Kaggle": predict,
        purpose: f"fastcifar train --resume {run}{imports}{longer}",
    }
    return ["next:", *(f"  {purpose}:\n    {command}" for purpose, command in commands.items())]


def export_table(result: ExportResult) -> KeyValueTable:
    """Return a table of an exported file."""
    sizes = ", ".join(map(str, result["batch_sizes"]))
    rows = {
        "file": f"{result['file']}, {result['bytes']:,} bytes",
        "model card": result["card"],
        "sha256": result["sha256"],
        "largest difference": f"{result['difference']:.2g} between the outputs of the file and of the network, "
        f"on {result['images']} test images in batches of {sizes}",
    }
    return KeyValueTable(rows)


def dry_run_table(result: DryRunEstimate) -> KeyValueTable:
    """Return a table of the estimates of `fastcifar train --dry-run`."""
    rows = {
        **dict(line.split(": ", 1) for line in result["chosen"]),
        "epochs, steps": f"{result['epochs']}, {result['steps']:,}",
        "images/s in training": format_short_number(result["images_per_s"]),
        "estimated seconds": _phase_seconds(result["seconds"]),
        "peak memory": format_memory(result["peak_memory_bytes"]),
        "files written": "none",
    }
    return KeyValueTable(rows)


def scores_table(scores: EvalResult) -> Group:
    """Return tables of the scores of a network, of its classes (the ten worst if there are more) and corruptions."""
    calibrated = scores["temperature_missing"] or (
        f"{format_decimal(scores['loss_scaled'], 4)}, {format_decimal(scores['ece_scaled'], 4)}  (logits divided by "
        f"{scores['temperature']:.3f}, fitted on the validation split)"
    )
    rows: dict[str, str | None] = {
        "checkpoint": scores["checkpoint"],
        "test accuracy": _format_accuracy(
            scores["test_acc"], scores["correct"], scores["total"], scores["test_acc_interval"]
        ),
        f"  with --tta {scores['tta']}": _percent_or_none(scores["test_acc_tta"]),
        "test loss, calibration error": f"{format_decimal(scores['test_loss'], 4)}, {format_decimal(scores['ece'], 4)}",
        "  after temperature scaling": calibrated,
        "Brier score": format_decimal(scores["brier"], 4),
        "validation accuracy": format_percent(scores["val_acc"]),
        "plots": scores["plots"],
        "measured with": f"{scores['arch']}, weights {scores['eval_weights']}, normalization {scores['normalize']}, "
        f"{scores['precision']} on {scores['device']}",
    }
    if shifted := scores["shifted"]:
        accuracy = _format_accuracy(shifted["acc"], shifted["correct"], shifted["total"], shifted["acc_interval"])
        rows[shifted["name"]] = f"{accuracy}, loss {shifted['loss']:.4f}, calibration error {shifted['ece']:.4f}"
    corrupted = [corruptions_table(result) for result in (scores["corruptions"], scores["corrupted"]) if result]
    corrupted_parts = [part for table in corrupted for part in ("", table)]
    if scores["test_acc"] is None:
        return Group(KeyValueTable(rows), *corrupted_parts)
    metrics = scores["precision_per_class"], scores["recall_per_class"], scores["f1_per_class"]
    names, heading = scores["classes"], "class"
    if len(names) > MAX_CLASS_ROWS:
        names = sorted(names, key=lambda name: metrics[2][name] or 0)[:MAX_CLASS_ROWS]
        heading = f"the {MAX_CLASS_ROWS} classes with the lowest F1"
    classes = NumericTable([heading], ("precision", "recall", "F1"))
    for name in names:
        classes.add_row(name, *(format_percent(metric[name]) for metric in metrics))
    return Group(KeyValueTable(rows), "", classes, *corrupted_parts)


def corruptions_table(result: CorruptionsResult) -> NumericTable:
    """Return a table of the accuracies on corrupted images; an asterisk marks those that are not in the mean."""
    from fastcifar.evaluation.published_test_sets import EXTRA_CORRUPTIONS  # imports torch

    title = None if result["source"] == "computed" else result["source"]
    table = NumericTable(["accuracy at severity"], ("1", "2", "3", "4", "5", "mean"), title)
    for name, accuracies in result["acc"].items():
        mark = "*" if title and name in EXTRA_CORRUPTIONS else ""
        mean = format_percent(sum(accuracies) / len(accuracies))
        table.add_row(f"{name}{mark}", *map(format_percent, accuracies), mean)
    table.add_row("mean without *" if title else "mean", "", "", "", "", "", format_percent(result["mean_acc"]))
    return table


def _format_accuracy(
    accuracy: float | None, correct: int | None, total: int | None, interval: tuple[float, float] | None
) -> str:
    if interval is None:
        return NO_TEST_SET
    low, high = map(format_percent, interval)
    return f"{format_percent(accuracy)}  ({correct:,} of {total:,}; 95 % interval {low} to {high})"


def predictions_table(result: PredictResult) -> KeyValueTable:
    """Return a table about a prediction file."""
    members = result["members"]
    networks = [f"{member['checkpoint']} ({member['arch']}, weights {member['eval_weights']})" for member in members]
    first = members[0]
    compiled, cuda_graph = map(format_option_value, (first["compiled"], first["cuda_graph"]))
    speed, seconds = format_short_number(result["images_per_s"]), result["seconds"]
    counts = ", ".join(f"{name} {count:,}" for name, count in result["counts"].items() if count)
    divisors = ", ".join(f"{member['temperature']:.3f}" for member in members if member["temperature"])
    temperatures = f"logits divided by {divisors}, fitted on the validation split" if divisors else None
    rows = {
        "images": f"{result['images']:,} from {result['source']}, {result['layout']}",
        "networks": "\n".join(networks),
        "test-time augmentation": result["tta"],
        "computed with": f"{first['precision']} on {first['device']}, compile {compiled}, CUDA graph {cuda_graph}",
        "images/s": f"{speed}  ({seconds['predict']:.1f} s, after {seconds['prepare']:.1f} s of preparation)",
        "temperatures": temperatures,
        "predicted classes": counts,
        "mean confidence": format_percent(result["confidence"]),
        "files written": ", ".join(filter(None, (result["out"], result["show"]))),
    }
    return KeyValueTable(rows)


def dataset_table(result: DatasetDescription) -> Group:
    """Return tables of a data set and its number of images per class."""
    splits = result["splits"]
    names = {"train": "training images", "val": "validation images", "test": "test images"}
    first = names[next(iter(splits))]
    shapes = {name: " x ".join(map(str, split["shape"])) for name, split in splits.items()}
    rows = {
        "data set": result["title"] if result["title"] == result["kind"] else f"{result['title']}, {result['kind']}",
        "source": result["source"],
        "official files": "yes, by the MD5 of every file" if result["official"] else "no",
        **{names[name]: f"{shapes[name]}, {split['dtype']}" for name, split in splits.items()},
        f"mean of {first}": ", ".join(f"{value:.8f}" for value in result["mean"]),
        f"std of {first}": ", ".join(f"{value:.8f}" for value in result["std"]),
        "cache": result["cache"] or "none, the images are kept in memory",
    }
    classes = NumericTable(["label", "class"], splits)
    for label, class_name in enumerate(result["classes"]):
        counts = (f"{split['per_class'][class_name]:,}" for split in splits.values())
        classes.add_row(str(label), class_name, *counts)
    return Group(KeyValueTable(rows), "", classes)


def architectures_table(architectures: list[Architecture]) -> Group:
    """Return a table of architectures; those over the default parameter budget are marked with an asterisk."""
    table = NumericTable(["name"], ("parameters", "MACs"), "architectures", description="description")
    for network in architectures:
        mark = " " if network["within_budget"] else "*"
        macs = f"{network['macs'] / 1e6:,.0f} M"
        table.add_row(network["name"], f"{network['params']:,}{mark}", macs, network["description"])
    return Group(table, f"* more than {Recipe.model_fields['max_params'].default:,} parameters: needs --max-params")


def layers_table(network: NetworkLayers) -> NumericTable:
    """Return a table of the layers in the order of the forward pass."""
    title = f"{network['name']}: {network['params']:,} parameters, {network['macs'] / 1e6:,.2f} M MACs"
    table = NumericTable(("layer", "kind", "output"), ("parameters", "MACs"), title)
    for layer in network["layers"]:
        shape = "x".join(map(str, layer["output"]))
        table.add_row(layer["name"], layer["kind"], shape, f"{layer['params']:,}", f"{layer['macs']:,}")
    return table


def width_table(result: FittedWidth) -> KeyValueTable:
    """Return a table of the largest width within a budget."""
    rows = {
        "--width": f"{result['width']:g}",
        "parameters": f"{result['params']:,} of {result['budget']:,}",
        "MACs": f"{result['macs']:,}",
    }
    return KeyValueTable(rows, title=result["name"])


def _percent_or_none(fraction: float | None) -> str | None:
    return None if fraction is None else format_percent(fraction)


def _phase_seconds(seconds: dict[str, float]) -> str:
    """Return the seconds of each phase: `setup 3  compile 41  train 612`."""
    return "  ".join(f"{phase} {format_decimal(value, 0)}" for phase, value in seconds.items())
