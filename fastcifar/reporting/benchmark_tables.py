"""Tables and charts of the results of `bench` and `speedrun`, and the comparison of two benchmark documents.

A document is the JSON object that `bench --json` prints. Missing values are shown as dashes.
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

# The settings that identify a row besides `what`, in display order: its result depends on them.
SETTING_NAMES = ("arch", "batch_size", "mode", "precision", "loader", "workers", "augment", "data", "conv", "direction")


def setting_texts(row: BenchmarkRow) -> dict[str, str]:
    """Return the settings of a row as text, by name; `mode` combines `compiled` and `cuda_graph`."""
    mode = "captured" if row.get("cuda_graph") else "compiled" if row.get("compiled") else "eager"
    settings = row | ({"mode": mode} if "compiled" in row else {})
    texts = {name: format_option_value(settings[name]) for name in SETTING_NAMES if name in settings}
    if "batch_size" in texts:
        texts["batch_size"] = f"batch {texts['batch_size']}"
    if "direction" in texts:
        texts["direction"] = texts["direction"].replace("_", " + ")
    return texts


def label_rows(rows: Sequence[BenchmarkRow]) -> tuple[list[str], dict[str, str]]:
    """Return a label for each row, and the settings that all rows share, by name.

    A label lists the settings in which the row differs from other rows with the same `what`.
    """
    settings = [setting_texts(row) for row in rows]
    values = {name: {texts[name] for texts in settings if name in texts} for name in SETTING_NAMES}
    labels = []
    for row, texts in zip(rows, settings, strict=True):
        alike = [other for other, other_row in zip(settings, rows, strict=True) if other_row["what"] == row["what"]]
        labels.append(", ".join(texts[name] for name in texts if len({other.get(name) for other in alike}) > 1))
    return labels, {name: next(iter(values[name])) for name in SETTING_NAMES if len(values[name]) == 1}


def bench_table(document: dict[str, Any]) -> Group:
    """Return the table of a document: images/s, the range of the trials, and the utilization of the device."""
    rows = document["results"]
    labels, shared = label_rows(rows)
    table = Table("what", box=None, title_justify="left")
    for heading in ("images/s", "lowest", "highest", "CPU us/image", "ms", "TFLOP/s", "of peak", "GB/s", "of copy"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row, label in zip(rows, labels, strict=True):
        table.add_row(
            " ".join(filter(None, (row["what"], label))),
            *map(format_short_number, (row["images_per_s"], min(row["trials"]), max(row["trials"]))),
            format_decimal(row["cpu_us_per_image"], 1),
            *_format_device_cells(row),
        )
    return Group(*describe_setup(document, shared), table)


def describe_setup(document: dict[str, Any], shared: dict[str, str]) -> list[str]:
    """Return lines on what all rows share: device, settings, peak throughput, number of trials, longest setup time."""
    rows = document["results"]
    setup_times = {name: {row[name] for row in rows if name in row} for name in ("setup_s", "compile_s")}
    seconds = (f"{name} {max(values):.1f}" for name, values in setup_times.items() if values)
    peaks = (
        f"{precision}: matrix product {format_short_number(peak['matmul_tflop_per_s'])} TFLOP/s, "
        f"copy {format_short_number(peak['copy_gb_per_s'])} GB/s"
        for precision, peak in document.get("limits", {}).items()
    )
    settings = ", ".join((document["device"], *shared.values()))
    return [settings, *peaks, f"median of {len(rows[0]['trials'])} trials; longest {', '.join(seconds)}", ""]


def bench_panels(document: dict[str, Any]) -> tuple[str, list[BarPanel]]:
    """Return the chart title and a panel for each `what` with a bar for each row: images/s, for `conv` TFLOP/s."""
    rows = document["results"]
    all_labels, shared = label_rows(rows)
    panels = []
    for what in dict.fromkeys(row["what"] for row in rows):
        is_conv = what == "conv"
        panel_rows = [row for row in rows if row["what"] == what]
        labels = [label for row, label in zip(rows, all_labels, strict=True) if row["what"] == what]
        scales = [row["flop_per_image"] / 1e12 if is_conv else 1.0 for row in panel_rows]
        scaled_rows = list(zip(panel_rows, scales, strict=True))
        panels.append(
            BarPanel(
                title=f"{what}: {'TFLOP/s' if is_conv else 'images/s'}",
                groups=[row["direction"] if is_conv else setting_texts(row).get("mode", "") for row in panel_rows],
                labels=[
                    label or row.get("arch", row.get("loader", ""))
                    for row, label in zip(panel_rows, labels, strict=True)
                ],
                medians=[row["images_per_s"] * scale for row, scale in scaled_rows],
                trials=[[speed * scale for speed in row["trials"]] for row, scale in scaled_rows],
                notes=[", ".join(_bar_notes(row)) for row in panel_rows],
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
    """Return the document in the output of `bench --json`, which is all of `text` or its last line; None otherwise."""
    for candidate in (text, (text.strip().splitlines() or [""])[-1]):
        document = parse_json_object(candidate) or {}
        rows = document.get("results")
        if isinstance(rows, list) and rows and all(map(_is_benchmark_row, rows)):
            return document
    return None


def _is_benchmark_row(row: Any) -> bool:
    return isinstance(row, dict) and {"what", "images_per_s", "trials"} <= row.keys()


def compare_benchmarks(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Compare two documents row by row.

    Returns `rows` (in both documents), `only_a`, `only_b`, and the device and versions that `differ`. A row has its
    settings, the medians `a` and `b` in images/s, their `ratio` b / a, the trials, and whether the ranges of the trials
    `overlap`; if they do, the trials do not show a difference.
    """
    rows_a, rows_b = ({benchmark_row_key(row): row for row in document["results"]} for document in (a, b))
    rows = []
    for key, row_a in rows_a.items():
        if key not in rows_b:
            continue
        row_b = rows_b[key]
        trials_a, trials_b = row_a["trials"], row_b["trials"]
        rows.append(
            {
                **dict(key),
                "a": row_a["images_per_s"],
                "b": row_b["images_per_s"],
                "ratio": row_b["images_per_s"] / row_a["images_per_s"],
                "overlap": min(trials_a) <= max(trials_b) and min(trials_b) <= max(trials_a),
                "a_trials": trials_a,
                "b_trials": trials_b,
            }
        )
    setup_a, setup_b = ({"device": document.get("device"), **document.get("versions", {})} for document in (a, b))
    return {
        "rows": rows,
        "only_a": [dict(key) for key in rows_a if key not in rows_b],
        "only_b": [dict(key) for key in rows_b if key not in rows_a],
        "differ": {
            name: [setup_a.get(name), setup_b.get(name)]
            for name in setup_a | setup_b
            if setup_a.get(name) != setup_b.get(name)
        },
    }


def benchmark_row_key(row: BenchmarkRow) -> tuple[tuple[str, Any], ...]:
    """Return the settings of a row as a key: rows with equal keys are comparable. The data folder is not part of it."""
    names = ("what", *(name for name in (*SETTING_NAMES, "compiled", "cuda_graph") if name in row and name != "data"))
    return tuple((name, row[name]) for name in names)


def benchmark_comparison_table(comparison: dict[str, Any]) -> Group:
    """Return the table of a comparison by `compare_benchmarks`.

    The lines above it list differences in device and versions, those below it the rows of only one document.
    """
    table = Table("what", box=None, title_justify="left")
    for heading in ("A", "B", "B / A", "trials"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in comparison["rows"]:
        verdict = "overlap" if row["overlap"] else "B is faster" if row["ratio"] > 1 else "B is slower"
        table.add_row(
            _describe_row(row),
            format_short_number(row["a"]),
            format_short_number(row["b"]),
            f"{row['ratio']:.3f}",
            verdict,
        )
    differences = [
        "{}: {} in A, {} in B".format(name, *map(format_option_value, values))
        for name, values in comparison["differ"].items()
    ]
    unpaired = [
        f"only in {side}: {_describe_row(row)}"
        for side, rows in (("A", comparison["only_a"]), ("B", comparison["only_b"]))
        for row in rows
    ]
    return Group(*differences, "median images/s", table, *unpaired)


def _describe_row(row: BenchmarkRow) -> str:
    return ", ".join([row["what"], *setting_texts(row).values()])


def speedrun_table(summary: dict[str, Any]) -> Group:
    """Return the table of a speedrun's summary.

    For each quantity: mean, standard deviation, standard error, fraction of the runs above the target, each run.
    """
    table = Table("", box=None, title_justify="left")
    for heading in ("mean", "std", "std. error", f"over {100 * summary['target']:g} %", "each seed"):
        table.add_column(heading, justify="right")
    quantities = {
        "acc": ("accuracy, %", 100),
        "acc_tta": (f"with {summary['tta']}, %", 100),
        "seconds": ("seconds", 1),
        "train_s": ("  training", 1),
        "prepare_s": ("  preparation", 1),
        "build_s": ("build, not timed", 1),
    }
    for name, (heading, scale) in quantities.items():
        if quantity := summary[name]:
            values = [quantity["mean"], quantity["std"], quantity["stderr"], *quantity["trials"]]
            mean, std, stderr, *trials = (format_decimal(value, 2, scale) for value in values)
            share = format_percent(quantity["share"], 0) if "share" in quantity else ""
            table.add_row(heading, mean, std, stderr, share, ", ".join(trials))
    split = "test set" if summary["on"] == "test" else "validation split"
    cold_starts = "".join(
        f", {seconds:.1f} s from the start of a process to the end of its first run"
        for seconds in summary["cold_start_s"]
    )
    lines = [
        f"{summary['recipe']} on the {split}: {summary['n']} runs of {summary['epochs']} epochs, "
        f"{summary['flops'] / 1e15:.3f} PFLOP each{cold_starts}",
        *([f"{summary['refused']} invalid runs are not in the means; see trials.jsonl"] if summary["refused"] else []),
    ]
    return Group(*lines, table, f"results: {summary['folder']}")
