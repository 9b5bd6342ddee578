"""What `bench` and `speedrun` measured, for people: tables, the panels of the chart, and two measurements compared.

A document is what `bench --json` ends with. Nothing here measures; a figure that is not there is a dash.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

from fastcifar.files import parse_json_object
from fastcifar.format import format_decimal, format_option_value, format_percent, format_short_number
from fastcifar.plotting import BarPanel

BenchmarkRow = dict[str, Any]

# What names a row beside `what`, in the order of reading: the settings that its figure depends on.
SETTING_NAMES = ("arch", "batch_size", "mode", "precision", "loader", "workers", "augment", "data", "conv", "direction")


def setting_texts(row: BenchmarkRow) -> dict[str, str]:
    """The settings of a row as text, by name; `compiled` and `cuda_graph` together are the mode."""
    mode = "captured" if row.get("cuda_graph") else "compiled" if row.get("compiled") else "eager"
    known = row | ({"mode": mode} if "compiled" in row else {})
    words = {name: format_option_value(known[name]) for name in SETTING_NAMES if name in known}
    if "batch_size" in words:
        words["batch_size"] = f"batch {words['batch_size']}"
    if "direction" in words:
        words["direction"] = words["direction"].replace("_", " + ")
    return words


def label_rows(rows: Sequence[BenchmarkRow]) -> tuple[list[str], dict[str, str]]:
    """For each row the settings that tell it from others of its kind, and the settings that all share, by name."""
    words = [setting_texts(row) for row in rows]
    values = {name: {word[name] for word in words if name in word} for name in SETTING_NAMES}
    found = []
    for row, word in zip(rows, words, strict=True):
        same_kind = [other for other, its in zip(words, rows, strict=True) if its["what"] == row["what"]]
        found.append(", ".join(word[name] for name in word if len({other.get(name) for other in same_kind}) > 1))
    return found, {name: next(iter(values[name])) for name in SETTING_NAMES if len(values[name]) == 1}


def bench_table(document: dict[str, Any]) -> Group:
    """A line for each row of a document: images/s with the range of the trials, and what the device made of it."""
    rows = document["results"]
    own, shared = label_rows(rows)
    table = Table("what", box=None, title_justify="left")
    for heading in ("images/s", "lowest", "highest", "CPU us/image", "ms", "TFLOP/s", "of peak", "GB/s", "of copy"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row, label in zip(rows, own, strict=True):
        table.add_row(
            " ".join(filter(None, (row["what"], label))),
            *map(format_short_number, (row["images_per_s"], min(row["trials"]), max(row["trials"]))),
            format_decimal(row["cpu_us_per_image"], 1),
            *_format_device_cells(row),
        )
    return Group(*describe_setup(document, shared), table)


def describe_setup(document: dict[str, Any], shared: dict[str, str]) -> list[str]:
    """What holds for all rows: the device and its limits, shared settings, trials, seconds before them."""
    rows = document["results"]
    spent = {name: {row[name] for row in rows if name in row} for name in ("setup_s", "compile_s")}
    seconds = (f"{name} {max(values):.1f}" for name, values in spent.items() if values)
    peaks = (
        f"{precision}: matrix product {format_short_number(most['matmul_tflop_per_s'])} TFLOP/s, "
        f"copy {format_short_number(most['copy_gb_per_s'])} GB/s"
        for precision, most in document.get("limits", {}).items()
    )
    settings = ", ".join((document["device"], *shared.values()))
    return [settings, *peaks, f"median of {len(rows[0]['trials'])} trials; longest {', '.join(seconds)}", ""]


def bench_panels(document: dict[str, Any]) -> tuple[str, list[BarPanel]]:
    """A title and a panel for each `what`, a bar for each row: images/s, or TFLOP/s of convolutions."""
    rows = document["results"]
    own, shared = label_rows(rows)
    panels = []
    for what in dict.fromkeys(row["what"] for row in rows):
        mine = [(row, label) for row, label in zip(rows, own, strict=True) if row["what"] == what]
        scale = [row["flop_per_image"] / 1e12 if what == "conv" else 1.0 for row, _ in mine]
        notes = [", ".join(_bar_notes(row)) for row, _ in mine]
        panels.append(
            BarPanel(
                title=f"{what}: {'TFLOP/s' if what == 'conv' else 'images/s'}",
                groups=[row["direction"] if what == "conv" else setting_texts(row).get("mode", "") for row, _ in mine],
                labels=[label or row.get("arch", row.get("loader", "")) for row, label in mine],
                medians=[row["images_per_s"] * unit for (row, _), unit in zip(mine, scale, strict=True)],
                trials=[[speed * unit for speed in row["trials"]] for (row, _), unit in zip(mine, scale, strict=True)],
                notes=notes,
            )
        )
    return "\n".join(line for line in describe_setup(document, shared) if line), panels


def _bar_notes(row: BenchmarkRow) -> list[str]:
    latency = [f"{format_decimal(row['latency_ms'], 2)} ms"] if "latency_ms" in row else []
    return [*latency, *([f"{format_percent(row['mfu'], 0)} of peak"] if "mfu" in row else [])]


def _format_device_cells(row: BenchmarkRow) -> Iterator[str]:
    for name in ("latency_ms", "tflop_per_s", "mfu", "gb_per_s", "mbu"):
        value = row.get(name)
        yield format_percent(value, 0) if name in ("mfu", "mbu") else format_short_number(value)


def parse_benchmark(text: str) -> dict[str, Any] | None:
    """The document in what `bench --json` printed, or None if there is none: the whole text, or its last line."""
    for part in (text, (text.strip().splitlines() or [""])[-1]):
        found = parse_json_object(part) or {}
        rows = found.get("results")
        if isinstance(rows, list) and rows and all(map(_is_benchmark_row, rows)):
            return found
    return None


def _is_benchmark_row(row: Any) -> bool:
    return isinstance(row, dict) and {"what", "images_per_s", "trials"} <= row.keys()


def compare_benchmarks(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Two documents row by row: `rows` that both have, `only_a`, `only_b`, and the device and versions that `differ`.

    A row has its settings, the medians `a` and `b`, their `ratio` b / a, and whether the trials' ranges `overlap`:
    if they do, the trials do not tell the two apart.
    """
    of_a, of_b = ({benchmark_row_key(row): row for row in found["results"]} for found in (a, b))
    rows = []
    for name in of_a.keys() & of_b.keys():
        mine, other = of_a[name], of_b[name]
        ranges = [(min(row["trials"]), max(row["trials"])) for row in (mine, other)]
        rows.append(
            {
                **dict(name),
                "a": mine["images_per_s"],
                "b": other["images_per_s"],
                "ratio": other["images_per_s"] / mine["images_per_s"],
                "overlap": ranges[0][0] <= ranges[1][1] and ranges[1][0] <= ranges[0][1],
                "a_trials": mine["trials"],
                "b_trials": other["trials"],
            }
        )
    order = list(of_a)
    about_a, about_b = ({"device": found.get("device"), **found.get("versions", {})} for found in (a, b))
    return {
        "rows": sorted(rows, key=lambda row: order.index(benchmark_row_key(row))),
        "only_a": [dict(name) for name in of_a if name not in of_b],
        "only_b": [dict(name) for name in of_b if name not in of_a],
        "differ": {
            name: [about_a.get(name), about_b.get(name)]
            for name in about_a | about_b
            if about_a.get(name) != about_b.get(name)
        },
    }


def benchmark_row_key(row: BenchmarkRow) -> tuple[tuple[str, Any], ...]:
    """What a row measured: two rows of one key can be compared. A data set's folder is no part of that."""
    names = ("what", *(name for name in (*SETTING_NAMES, "compiled", "cuda_graph") if name in row and name != "data"))
    return tuple((name, row[name]) for name in names)


def benchmark_comparison_table(comparison: dict[str, Any]) -> Group:
    """What `compare_benchmarks` found; above it what differs beside the figures, below it what has no partner."""
    named = [{"what": row["what"], **setting_texts(row)} for row in comparison["rows"]]
    table = Table("what", box=None, title_justify="left")
    for heading in ("A", "B", "B / A", "the trials"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row, words in zip(comparison["rows"], named, strict=True):
        told = "overlap" if row["overlap"] else "B is faster" if row["ratio"] > 1 else "B is slower"
        table.add_row(
            ", ".join(words.values()),
            format_short_number(row["a"]),
            format_short_number(row["b"]),
            f"{row['ratio']:.3f}",
            told,
        )
    differ = [
        "{}: {} in A, {} in B".format(name, *map(format_option_value, values))
        for name, values in comparison["differ"].items()
    ]
    alone = [
        f"only in {side}: {', '.join([row['what'], *setting_texts(row).values()])}"
        for side, rows in (("A", comparison["only_a"]), ("B", comparison["only_b"]))
        for row in rows
    ]
    return Group(*differ, "images/s, medians", table, *alone)


def speedrun_table(summary: dict[str, Any]) -> Group:
    """A line for each figure of a speedrun's summary: mean, deviation, error of the mean, share over the target."""
    table = Table("", box=None, title_justify="left")
    for heading in ("mean", "std", "std. error", f"over {100 * summary['target']:g} %", "each seed"):
        table.add_column(heading, justify="right")
    figures = {
        "acc": ("accuracy, %", 100),
        "acc_tta": (f"with {summary['tta']}, %", 100),
        "seconds": ("seconds", 1),
        "train_s": ("  training", 1),
        "prepare_s": ("  preparing", 1),
        "build_s": ("building, free", 1),
    }
    for name, (heading, scale) in figures.items():
        if figure := summary[name]:
            values = [figure["mean"], figure["std"], figure["stderr"], *figure["trials"]]
            mean, std, stderr, *trials = (format_decimal(value, 2, scale) for value in values)
            share = format_percent(figure["share"], 0) if "share" in figure else ""
            table.add_row(heading, mean, std, stderr, share, ", ".join(trials))
    cold = "".join(
        f", {value:.1f} s from the start of a process to the end of its first run" for value in summary["cold_start_s"]
    )
    lines = [
        f"{summary['recipe']} on the {'test set' if summary['on'] == 'test' else 'validation split'}: {summary['n']} runs of "
        f"{summary['epochs']} epochs, {summary['flops'] / 1e15:.3f} PFLOP each{cold}",
        *([f"{summary['refused']} of them do not count; see trials.jsonl"] if summary["refused"] else []),
    ]
    return Group(*lines, table, f"result: {summary['folder']}")
