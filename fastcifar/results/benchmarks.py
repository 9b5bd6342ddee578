"""What `fastcifar bench` measured, for people: the table, the panels of the chart, and two measurements compared.

A document is what `bench --json` ends with. Nothing here measures; a figure that is not there is a dash.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

from fastcifar.results.plots import Panel

Row = dict[str, Any]

# What names a row beside `what`, in the order of reading: the settings that its figure depends on.
SETTINGS = ("arch", "batch_size", "mode", "precision", "loader", "workers", "augment", "data", "conv", "direction")


def spelt(row: Row) -> dict[str, str]:
    """A row's settings in words, by name; compile and graph are one, the mode."""
    mode = "captured" if row.get("cuda_graph") else "compiled" if row.get("compiled") else "eager"
    known = row | ({"mode": mode} if "compiled" in row else {})
    words = {name: str(known[name]) for name in SETTINGS if name in known}
    if "batch_size" in words:
        words["batch_size"] = f"batch {words['batch_size']}"
    if "direction" in words:
        words["direction"] = words["direction"].replace("_", " + ")
    return words


def labels(rows: Sequence[Row]) -> tuple[list[str], dict[str, str]]:
    """For each row the settings that tell it from others of its kind, and the settings that all share, by name."""
    words = [spelt(row) for row in rows]
    values = {name: {word[name] for word in words if name in word} for name in SETTINGS}
    found = []
    for row, word in zip(rows, words, strict=True):
        same_kind = [other for other, its in zip(words, rows, strict=True) if its["what"] == row["what"]]
        found.append(", ".join(word[name] for name in word if len({other.get(name) for other in same_kind}) > 1))
    return found, {name: next(iter(values[name])) for name in SETTINGS if len(values[name]) == 1}


def bench_table(found: dict[str, Any]) -> Group:
    """A line for each row of a document: images/s with the range of the trials, and what the device made of it."""
    rows = found["results"]
    own, shared = labels(rows)
    table = Table("what", box=None, title_justify="left")
    for heading in ("images/s", "lowest", "highest", "CPU us/image", "ms", "TFLOP/s", "of peak", "GB/s", "of copy"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row, label in zip(rows, own, strict=True):
        table.add_row(
            " ".join(filter(None, (row["what"], label))),
            *(f"{speed:,.0f}" for speed in (row["images_per_s"], min(row["trials"]), max(row["trials"]))),
            f"{row['cpu_us_per_image']:,.1f}",
            _figure(row, "latency_ms", "{:.2f}"),
            _figure(row, "tflop_per_s", "{:.3g}"),
            _figure(row, "mfu", "{:.0%}"),
            _figure(row, "gb_per_s", "{:,.3g}"),
            _figure(row, "mbu", "{:.0%}"),
        )
    return Group(*about(found, shared), table)


def about(found: dict[str, Any], shared: dict[str, str]) -> list[str]:
    """What holds for all rows: the device and its limits, shared settings, trials, seconds before them."""
    rows = found["results"]
    spent = {name: {row[name] for row in rows if name in row} for name in ("setup_s", "compile_s")}
    seconds = (f"{name} {max(values):.1f}" for name, values in spent.items() if values)
    peaks = (
        f"{precision}: matrix product {most['matmul_tflop_per_s']:.3g} TFLOP/s, copy {most['copy_gb_per_s']:,.3g} GB/s"
        for precision, most in found.get("limits", {}).items()
    )
    settings = ", ".join((found["device"], *shared.values()))
    return [settings, *peaks, f"median of {len(rows[0]['trials'])} trials; longest {', '.join(seconds)}", ""]


def bench_panels(found: dict[str, Any]) -> tuple[str, list[Panel]]:
    """A title and a panel for each `what`, a bar for each row: images/s, or TFLOP/s of convolutions."""
    rows = found["results"]
    own, shared = labels(rows)
    panels = []
    for what in dict.fromkeys(row["what"] for row in rows):
        mine = [(row, label) for row, label in zip(rows, own, strict=True) if row["what"] == what]
        scale = [row["flop_per_image"] / 1e12 if what == "conv" else 1.0 for row, _ in mine]
        notes = [", ".join(_notes(row)) for row, _ in mine]
        panels.append(
            Panel(
                title=f"{what}: {'TFLOP/s' if what == 'conv' else 'images/s'}",
                labels=[label or row.get("arch", row.get("loader", "")) for row, label in mine],
                medians=[row["images_per_s"] * unit for (row, _), unit in zip(mine, scale, strict=True)],
                trials=[[speed * unit for speed in row["trials"]] for (row, _), unit in zip(mine, scale, strict=True)],
                notes=notes,
            )
        )
    return "\n".join(line for line in about(found, shared) if line), panels


def _notes(row: Row) -> list[str]:
    shown = {"latency_ms": "{:.2f} ms", "mfu": "{:.0%} of peak"}
    return [text.format(row[name]) for name, text in shown.items() if name in row]


def _figure(row: Row, name: str, form: str) -> str:
    return form.format(row[name]) if name in row else "-"
