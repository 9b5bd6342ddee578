"""The documents that commands print with --json, as tables for a terminal.

A public function formats one document; nothing is measured or built here. A value that was not measured is a dash.
"""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table

from fastcifar.format import (
    format_decimal,
    format_memory,
    format_option_value,
    format_percent,
    format_short_number,
    key_value_table,
)

MAX_CLASS_ROWS = 10  # in the table of scores


def summary_table(summary: dict[str, Any]) -> Table:
    """The main results of a run. `summary`: the document in summary.json."""
    rows = {
        "run": summary["run"],
        "network": f"{summary['arch']}, {summary['params']:,} parameters, {summary['macs'] / 1e6:,.2f} M MACs",
        "test accuracy": f"{format_percent(summary['test_acc'])}  ({summary['correct']:,} of {summary['total']:,}, "
        f"weights {summary['eval_weights']})",
        "  averaged weights": format_percent(summary["test_acc_ema"]),
        **_tta_row(summary["config"]["tta"], summary["test_acc_tta"]),
        "test loss, calibration error": f"{summary['test_loss']:.4f}, {summary['ece']:.4f}",
        "validation accuracy": f"{format_percent(summary['val_acc'])}, best {format_percent(summary['best_val_acc'])}",
        "hardest class": _format_hardest_class(summary["per_class"]),
        "epochs, steps": f"{summary['epochs']}, {summary['steps']:,}  (stopped by {summary['stop_reason']})",
        "images/s in training": format_short_number(summary["images_per_s"]),
        "seconds": _phase_seconds(summary["seconds"]),
        "peak memory": format_memory(summary["peak_memory_bytes"]),
    }
    return key_value_table("", rows)


def export_table(result: dict[str, Any]) -> Table:
    """An exported file and its comparison with the network. `result`: as `export_model` returns it."""
    sizes = ", ".join(map(str, result["batch_sizes"]))
    rows = {
        "file": f"{result['file']}, {result['bytes']:,} bytes",
        "model card": result["card"],
        "sha256": result["sha256"],
        "largest difference": f"{result['difference']:.2g}, on {result['images']} test images in batches of {sizes}",
    }
    return key_value_table("", rows)


def dry_run_table(result: dict[str, Any]) -> Table:
    """The estimates of `fastcifar train --dry-run`. `result`: as `dry_run` returns it."""
    rows = {
        **dict(line.split(": ", 1) for line in result["chosen"]),
        "epochs, steps": f"{result['epochs']}, {result['steps']:,}",
        "images/s in training": format_short_number(result["images_per_s"]),
        "expected seconds": _phase_seconds(result["seconds"]),
        "peak memory": format_memory(result["peak_memory_bytes"]),
        "written": "nothing",
    }
    return key_value_table("", rows)


def scores_table(scores: dict[str, Any]) -> Group:
    """The scores of a trained network. `scores`: as `evaluate_run` returns them."""
    low, high = scores["test_acc_interval"]
    scaled = scores["temperature_missing"] or (
        f"{scores['loss_scaled']:.4f}, {scores['ece_scaled']:.4f}  (logits divided by {scores['temperature']:.3f}, "
        "chosen on the validation split)"
    )
    rows = {
        "checkpoint": scores["checkpoint"],
        "test accuracy": f"{format_percent(scores['test_acc'])}  ({scores['correct']:,} of {scores['total']:,}; 95 %: "
        f"{format_percent(low)} to {format_percent(high)})",
        **_tta_row(scores["tta"], scores["test_acc_tta"]),
        "test loss, calibration error": f"{scores['test_loss']:.4f}, {scores['ece']:.4f}",
        "  at the best temperature": scaled,
        "Brier score": f"{scores['brier']:.4f}",
        **({"plots": scores["plots"]} if scores["plots"] else {}),
        "measured with": f"{scores['arch']}, weights {scores['eval_weights']}, normalisation {scores['normalize']}, "
        f"{scores['precision']} on {scores['device']}",
    }
    if shifted := scores["shifted"]:
        low, high = shifted["acc_interval"]
        rows[shifted["name"]] = (
            f"{format_percent(shifted['acc'])}  ({shifted['correct']:,} of {shifted['total']:,}; 95 %: "
            f"{format_percent(low)} to {format_percent(high)}), loss {shifted['loss']:.4f}, "
            f"calibration error {shifted['ece']:.4f}"
        )
    tables = [key_value_table("", rows), "", _class_table(scores)]
    if corruptions := scores["corruptions"]:
        tables += ["", _corruption_table(corruptions)]
    return Group(*tables)


def _class_table(scores: dict[str, Any]) -> Table:
    """Precision, recall and F1 of every class in order; of more than 10 classes, of the 10 with the lowest F1."""
    figures = [scores[f"{name}_per_class"] for name in ("precision", "recall", "f1")]
    names = scores["classes"]
    if many := len(names) > MAX_CLASS_ROWS:
        names = sorted(names, key=lambda name: figures[2][name] or 0)[:MAX_CLASS_ROWS]
    table = Table(f"the {MAX_CLASS_ROWS} hardest classes" if many else "class", box=None)
    for column in ("precision", "recall", "F1"):
        table.add_column(column, justify="right")
    for name in names:
        table.add_row(name, *(format_percent(figure[name]) for figure in figures))
    return table


def _corruption_table(corruptions: dict[str, Any]) -> Table:
    """Accuracy for each corruption (rows) and severity (columns)."""
    table = Table("accuracy at severity", box=None)
    for column in ("1", "2", "3", "4", "5", "mean"):
        table.add_column(column, justify="right")
    for name, accuracies in corruptions["acc"].items():
        table.add_row(name, *map(format_percent, accuracies), format_percent(sum(accuracies) / len(accuracies)))
    table.add_row("mean", "", "", "", "", "", format_percent(corruptions["mean_acc"]), style="bold")
    return table


def predictions_table(result: dict[str, Any]) -> Table:
    """A summary of predictions. `result`: as `predict_to_file` returns it."""
    members = [
        f"{member['checkpoint']} ({member['arch']}, weights {member['eval_weights']})" for member in result["members"]
    ]
    first = result["members"][0]
    compiled, cuda_graph = (format_option_value(first[name]) for name in ("compiled", "cuda_graph"))
    speed, seconds = format_short_number(result["images_per_s"]), result["seconds"]
    counts = ", ".join(f"{name} {count:,}" for name, count in result["counts"].items() if count)
    return key_value_table(
        "",
        {
            "images": f"{result['images']:,} from {result['source']}, {result['layout']}",
            "by": "\n".join(members),
            "test-time augmentation": result["tta"],
            "measured with": f"{first['precision']} on {first['device']}, compile {compiled}, CUDA graph {cuda_graph}",
            "images/s": f"{speed}  ({seconds['predict']:.1f} s, after {seconds['prepare']:.1f} s to prepare)",
            "labels": counts,
            "mean confidence": format_percent(result["confidence"]),
            "written": ", ".join(str(result[name]) for name in ("out", "show") if result[name]),
        },
    )


def dataset_table(result: dict[str, Any]) -> Group:
    """The data set that `fastcifar data verify` checked, with the number of images of each class."""
    splits = result["splits"]
    shapes = {part: " x ".join(map(str, split["shape"])) for part, split in splits.items()}
    rows = {
        "data set": f"{result['dataset']}, {result['kind']}",
        "read from": result["source"],
        "official": "yes, every file's MD5" if result["official"] else "no",
        "training images": f"{shapes['train']}, {splits['train']['dtype']}",
        "test images": f"{shapes['test']}, {splits['test']['dtype']}",
        "mean of training": ", ".join(f"{value:.8f}" for value in result["mean"]),
        "std of training": ", ".join(f"{value:.8f}" for value in result["std"]),
        "cache": result["cache"] or "none, the images stay in memory",
    }
    classes = Table("class", box=None, title_justify="left")
    for part in splits:
        classes.add_column(part, justify="right")
    for name in splits["train"]["per_class"]:
        classes.add_row(name, *(f"{split['per_class'][name]:,}" for split in splits.values()))
    return Group(key_value_table("", rows), "", classes)


def architectures_table(architectures: list[dict[str, Any]]) -> Table:
    """The architectures with their sizes. `architectures`: as `describe_architectures` returns them."""
    table = Table("name", title="architectures", title_justify="left")
    table.add_column("parameters", justify="right")
    table.add_column("MACs", justify="right")
    for row in architectures:
        table.add_row(row["name"], f"{row['params']:,}", f"{row['macs'] / 1e6:,.2f} M")
    return table


def layers_table(network: dict[str, Any]) -> Table:
    """The layers of one network in the order of its forward pass. `network`: as `describe_layers` returns it."""
    title = f"{network['name']}: {network['params']:,} parameters, {network['macs'] / 1e6:,.2f} M MACs"
    table = Table("layer", "kind", "output", title=title, title_justify="left")
    table.add_column("parameters", justify="right")
    table.add_column("MACs", justify="right")
    for row in network["layers"]:
        shape = " x ".join(map(str, row["output"]))
        table.add_row(row["name"], row["kind"], shape, f"{row['params']:,}", f"{row['macs']:,}")
    return table


def width_table(result: dict[str, Any]) -> Table:
    """The largest width within a parameter budget. `result`: as `fit_width_to_budget` returns it."""
    rows = {
        "--width": f"{result['width']:g}",
        "parameters": f"{result['params']:,} of {result['budget']:,}",
        "MACs": f"{result['macs']:,}",
    }
    return key_value_table(result["name"], rows)


def diagnostics_table(diagnostics: dict[str, Any]) -> Table:
    """The environment and the choices of `fastcifar doctor`. `diagnostics`: as `collect_diagnostics` returns them."""
    rows: dict[str, str] = {
        "device": diagnostics["device"],
        "python": diagnostics["python"],
        "threads": str(diagnostics["threads"]),
    }
    rows |= dict(diagnostics["versions"].items())
    rows |= {f"import {module}": verdict for module, verdict in diagnostics["imports"].items()}
    rows |= dict(line.split(": ", 1) for line in (f"train would use {line}" for line in diagnostics["chosen"]))
    if "error" in diagnostics:
        rows["train would stop"] = diagnostics["error"]
    return key_value_table("", rows)


def _tta_row(tta: str, accuracy: float | None) -> dict[str, str]:
    """The row of the accuracy with test-time augmentation, if it was used."""
    return {} if accuracy is None else {f"  over views, {tta}": format_percent(accuracy)}


def _phase_seconds(seconds: dict[str, float]) -> str:
    """`setup 3  compile 41  train 612`."""
    return "  ".join(f"{phase} {format_decimal(value, 0)}" for phase, value in seconds.items())


def _format_hardest_class(per_class: dict[str, float | None]) -> str:
    measured = {name: value for name, value in per_class.items() if value is not None}
    name = min(measured, key=lambda name: measured[name])
    return f"{name}, {format_percent(measured[name])}"
