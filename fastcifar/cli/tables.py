"""Tables for people, and the same as documents for programs: summaries, scores, networks, the machine.

It formats what the other rooms measured; a figure that was not measured is a dash, never a zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Group
from rich.table import Table

from fastcifar.models import KNOBS, MODELS, build, largest_width, layer_table, macs, parameters
from fastcifar.recipe import Recipe

MOST_PAIRS = 15  # of labels in the table of a comparison
MOST_CLASSES = 10  # in the table of scores


@dataclass(frozen=True)
class Found:
    """The same answer twice: `table` for a terminal, `document` for --json."""

    table: Table
    document: Any


def summary_table(summary: dict[str, Any]) -> Table:
    """What a person wants at the end of a run. `summary`: as in summary.json."""
    seconds = summary["seconds"]
    spent = "  ".join(f"{phase} {value:.0f}" for phase, value in seconds.items())
    rows = {
        "run": summary["run"],
        "network": f"{summary['arch']}, {summary['params']:,} parameters, {summary['macs'] / 1e6:.1f} M MACs",
        "test accuracy": f"{_percent(summary['test_acc'])}  ({summary['correct']:,} of {summary['total']:,}, "
        f"weights {summary['weights']})",
        "  averaged weights": _percent(summary["test_acc_ema"]),
        **_over_views(summary["config"]["tta"], summary["test_acc_tta"]),
        "test loss, calibration error": f"{summary['test_loss']:.4f}, {summary['ece']:.4f}",
        "validation accuracy": f"{_percent(summary['val_acc'])}, best {_percent(summary['best_val_acc'])}",
        "hardest class": _hardest(summary["per_class"]),
        "epochs, steps": f"{summary['epochs']}, {summary['steps']:,}  (stopped by {summary['stop_reason']})",
        "images/s in training": f"{summary['images_per_s']:,.0f}",
        "seconds": spent,
        "peak memory": f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB",
    }
    return _pairs("", rows)


def export_table(found: dict[str, Any]) -> Table:
    """What was written and how it was checked. `found`: as `export` returns it."""
    sizes = ", ".join(map(str, found["batch_sizes"]))
    rows = {
        "file": f"{found['file']}, {found['bytes']:,} bytes",
        "model card": found["card"],
        "sha256": found["sha256"],
        "largest difference": f"{found['difference']:.2g}, on {found['images']} test images in batches of {sizes}",
    }
    return _pairs("", rows)


def rehearsal_table(found: dict[str, Any]) -> Table:
    """What `--dry-run` found. `found`: as `rehearse` returns it."""
    seconds = "  ".join(f"{phase} {value:,.0f}" for phase, value in found["seconds"].items())
    rows = {
        **dict(line.split(": ", 1) for line in found["chosen"]),
        "epochs, steps": f"{found['epochs']}, {found['steps']:,}",
        "images/s in training": f"{found['images_per_s']:,.0f}",
        "expected seconds": seconds,
        "peak memory": f"{found['peak_memory_bytes'] / 2**30:.2f} GiB",
        "written": "nothing",
    }
    return _pairs("", rows)


def scores_table(scores: dict[str, Any]) -> Group:
    """The scores of `fastcifar eval`."""
    low, high = scores["test_acc_interval"]
    scaled = scores["temperature_missing"] or (
        f"{scores['loss_scaled']:.4f}, {scores['ece_scaled']:.4f}  (logits divided by {scores['temperature']:.3f}, "
        "chosen on the validation split)"
    )
    rows = {
        "checkpoint": scores["checkpoint"],
        "test accuracy": f"{_percent(scores['test_acc'])}  ({scores['correct']:,} of {scores['total']:,}; 95 %: "
        f"{_percent(low)} to {_percent(high)})",
        **_over_views(scores["tta"], scores["test_acc_tta"]),
        "test loss, calibration error": f"{scores['test_loss']:.4f}, {scores['ece']:.4f}",
        "  at the best temperature": scaled,
        "Brier score": f"{scores['brier']:.4f}",
        **({"plots": scores["plots"]} if scores["plots"] else {}),
        "measured with": f"{scores['arch']}, weights {scores['weights']}, normalisation {scores['normalise']}, "
        f"{scores['precision']} on {scores['device']}",
    }
    if shifted := scores["shifted"]:
        low, high = shifted["acc_interval"]
        rows[shifted["name"]] = (
            f"{_percent(shifted['acc'])}  ({shifted['correct']:,} of {shifted['total']:,}; 95 %: "
            f"{_percent(low)} to {_percent(high)}), loss {shifted['loss']:.4f}, "
            f"calibration error {shifted['ece']:.4f}"
        )
    tables = [_pairs("", rows), "", _class_table(scores)]
    if corruptions := scores["corruptions"]:
        tables += ["", _corruption_table(corruptions)]
    return Group(*tables)


def _class_table(scores: dict[str, Any]) -> Table:
    """The classes in their order, or of many the hardest."""
    figures = [scores[f"{name}_per_class"] for name in ("precision", "recall", "f1")]
    names = scores["classes"]
    if many := len(names) > MOST_CLASSES:
        names = sorted(names, key=lambda name: figures[2][name] or 0)[:MOST_CLASSES]
    table = Table(f"the {MOST_CLASSES} hardest classes" if many else "class", box=None)
    for column in ("precision", "recall", "F1"):
        table.add_column(column, justify="right")
    for name in names:
        table.add_row(name, *(_percent(figure[name]) for figure in figures))
    return table


def _corruption_table(corruptions: dict[str, Any]) -> Table:
    """A row for each corruption, a column for each severity."""
    table = Table("accuracy at severity", box=None)
    for column in ("1", "2", "3", "4", "5", "mean"):
        table.add_column(column, justify="right")
    for name, accuracies in corruptions["acc"].items():
        table.add_row(name, *map(_percent, accuracies), _percent(sum(accuracies) / len(accuracies)))
    table.add_row("mean", "", "", "", "", "", _percent(corruptions["mean_acc"]), style="bold")
    return table


def predictions_table(found: dict[str, Any]) -> Table:
    """What `fastcifar predict` did."""
    members = [f"{member['checkpoint']} ({member['arch']}, weights {member['weights']})" for member in found["members"]]
    first = found["members"][0]
    seconds = found["seconds"]
    counts = ", ".join(f"{name} {count:,}" for name, count in found["counts"].items() if count)
    return _pairs(
        "",
        {
            "images": f"{found['images']:,} from {found['source']}, {found['layout']}",
            "by": "\n".join(members),
            "test-time augmentation": found["tta"],
            "measured with": f"{first['precision']} on {first['device']}, compile {_spelt(first['compiled'])}, "
            f"CUDA graph {_spelt(first['cuda_graph'])}",
            "images/s": f"{found['images_per_s']:,.0f}  ({seconds['predict']:.1f} s, after {seconds['prepare']:.1f} s "
            "to prepare)",
            "labels": counts,
            "mean confidence": _percent(found["confidence"]),
            "written": ", ".join(str(found[name]) for name in ("out", "show") if found[name]),
        },
    )


def comparison_table(found: dict[str, Any]) -> Group:
    """What `fastcifar compare` found of two submissions."""
    summary = _pairs(
        "",
        {
            "a": found["a"],
            "b": found["b"],
            "differ": f"{found['differ']:,} of {found['total']:,} labels, {_percent(found['share'])}",
        },
    )
    if not found["pairs"]:
        return Group(summary)
    pairs = Table("label in a", "label in b", box=None)
    pairs.add_column("images", justify="right")
    for pair in found["pairs"][:MOST_PAIRS]:
        pairs.add_row(pair["a"], pair["b"], f"{pair['count']:,}")
    left = len(found["pairs"]) - MOST_PAIRS
    return Group(summary, "", pairs, *([f"and {left} more pairs (--json has all)"] if left > 0 else []))


def data_table(found: dict[str, Any]) -> Group:
    """What `fastcifar data verify` found."""
    splits = found["splits"]
    shapes = {part: " x ".join(map(str, split["shape"])) for part, split in splits.items()}
    rows = {
        "data set": f"{found['dataset']}, {found['kind']}",
        "read from": found["source"],
        "official": "yes, every file's MD5" if found["official"] else "no",
        "training images": f"{shapes['train']}, {splits['train']['dtype']}",
        "test images": f"{shapes['test']}, {splits['test']['dtype']}",
        "mean of training": ", ".join(f"{value:.8f}" for value in found["mean"]),
        "std of training": ", ".join(f"{value:.8f}" for value in found["std"]),
        "cache": found["cache"] or "none, the images stay in memory",
    }
    classes = Table("class", box=None, title_justify="left")
    for part in splits:
        classes.add_column(part, justify="right")
    for name in splits["train"]["per_class"]:
        classes.add_row(name, *(f"{split['per_class'][name]:,}" for split in splits.values()))
    return Group(_pairs("", rows), "", classes)


def listing() -> Found:
    """Every architecture with its parameters and forward MACs of one 32x32 image."""
    table = Table("name", title="architectures", title_justify="left")
    table.add_column("parameters", justify="right")
    table.add_column("MACs", justify="right")
    document = []
    for name in MODELS:
        model = _weightless(Recipe(arch=name))
        document.append({"name": name, "params": parameters(model), "macs": macs(model)})
        table.add_row(name, f"{document[-1]['params']:,}", f"{document[-1]['macs'] / 1e6:,.2f} M")
    return Found(table, document)


def layers(recipe: Recipe) -> Found:
    """The layers of the recipe's network in the order of the forward pass."""
    model = _weightless(recipe)
    rows = layer_table(model)
    title = f"{recipe.arch}: {parameters(model):,} parameters, {macs(model) / 1e6:,.2f} M MACs"
    table = Table("layer", "kind", "output", title=title, title_justify="left")
    table.add_column("parameters", justify="right")
    table.add_column("MACs", justify="right")
    for row in rows:
        shape = " x ".join(map(str, row["output"]))
        table.add_row(row["name"], row["kind"], shape, f"{row['params']:,}", f"{row['macs']:,}")
    return Found(table, {"name": recipe.arch, "params": parameters(model), "macs": macs(model), "layers": rows})


def fitted(recipe: Recipe, budget: int) -> Found:
    """The recipe's network at the largest width that has at most `budget` parameters."""
    given = {knob: getattr(recipe, knob) for knob in KNOBS if knob != "width"}
    width = largest_width(recipe.arch, budget, **given)
    model = _weightless(recipe.model_copy(update={"width": width}))
    document = {"name": recipe.arch, "width": width, "params": parameters(model), "macs": macs(model), "budget": budget}
    shown = {
        "--width": f"{width:g}",
        "parameters": f"{document['params']:,} of {budget:,}",
        "MACs": f"{document['macs']:,}",
    }
    return Found(_pairs(recipe.arch, shown), document)


def examination(found: dict[str, Any]) -> Table:
    """What `doctor` found."""
    rows: dict[str, str] = {"device": found["device"], "python": found["python"], "threads": str(found["threads"])}
    rows |= dict(found["versions"].items())
    rows |= {f"import {module}": verdict for module, verdict in found["imports"].items()}
    rows |= dict(line.split(": ", 1) for line in (f"train would use {line}" for line in found["chosen"]))
    if "error" in found:
        rows["train would stop"] = found["error"]
    return _pairs("", rows)


def _weightless(recipe: Recipe) -> torch.nn.Module:
    """The recipe's network on the meta device: shapes without memory."""
    with torch.device("meta"):
        return build(recipe.arch, **{knob: getattr(recipe, knob) for knob in KNOBS})


def _pairs(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title or None, show_header=False, title_justify="left", box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _over_views(tta: str, accuracy: float | None) -> dict[str, str]:
    """The line of test-time augmentation, where there was one."""
    return {} if accuracy is None else {f"  over views, {tta}": _percent(accuracy)}


def _spelt(value: bool) -> str:
    return "on" if value else "off"


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.2f} %"


def _hardest(per_class: dict[str, float | None]) -> str:
    measured = {name: value for name, value in per_class.items() if value is not None}
    name = min(measured, key=lambda name: measured[name])
    return f"{name}, {_percent(measured[name])}"
