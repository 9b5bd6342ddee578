"""The key figures of an acceptance test as a table, and the time of each kernel in a trace."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# part -> pattern of the result folders that its scripts write
RESULT_FOLDERS = {"peers": "results/*_peers-*", "loader-lists": "results/*_loaders"}
Figures = tuple[str, str, str, str]  # what was measured, images/s, model FLOP utilization (MFU), other results


def format_summary(out: Path, parts: Iterable[str]) -> str:
    """Return a Markdown table of the results of all parts in a folder, with their key figures."""
    rows = [("part", "result", "seconds", "measured", "images/s", "MFU", "other results"), ("---",) * 7]
    for name in parts:
        if not (file := out / f"{name}.part.json").is_file():
            continue
        part = json.loads(file.read_text("utf-8"))
        if "not_run" in part:
            rows.append((name, "not run", "", "", "", "", part["not_run"]))
            continue
        files = [out / command["out"] for command in part["commands"]]
        files += [folder / "summary.json" for folder in sorted(out.glob(RESULT_FOLDERS.get(name, "none")))]
        figures = [figure for file in files for figure in read_figures(file)]
        notes = [part[key] for key in ("problem",) if key in part]
        notes += [f"{command['out']}: {command['note']}" for command in part["commands"] if "note" in command]
        figures += [("", "", "", note.replace("|", "/")) for note in notes]
        first, *others = figures or [("", "", "", "")]
        rows.append((name, "passed" if part["passed"] else "FAILED", f"{part['seconds']:.0f}", *first))
        rows += [("", "", "", *figure) for figure in others]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def read_figures(file: Path) -> list[Figures]:
    """Return the key figures in the output of a command: a document of the package, or nothing for any other text."""
    try:
        text = file.read_text("utf-8").strip()
        document = json.loads(text if text.startswith("{") else text.splitlines()[-1])
        return [figures for key, read in FIGURES.items() if key in document for figures in read(document)]
    except (OSError, ValueError, TypeError, KeyError, IndexError):  # the command was stopped, or has no document
        return []


def read_bench(document: dict[str, Any]) -> list[Figures]:
    """Return the figures of each row of `bench`; those of all convolutions are combined."""
    figures = []
    for row in document["results"]:
        if row["what"] != "conv":
            names = ("what", "arch", "batch_size", "loader", "precision")
            words = [str(row[name]) for name in names if row.get(name) is not None]
            words.append("captured" if row.get("cuda_graph") else "compiled" if row.get("compiled") else "eager")
            other = f"peak memory {row['peak_memory_bytes'] / 2**30:.2f} GiB" if row.get("peak_memory_bytes") else ""
            figures.append((" ".join(words), f"{row['images_per_s']:,.0f}", format_share(row.get("mfu")), other))
    for direction in ("forward", "forward_backward"):
        convs = [row for row in document["results"] if row["what"] == "conv" and row["direction"] == direction]
        if convs:
            flop = sum(row["calls"] * row["flop_per_image"] for row in convs)
            seconds = sum(row["calls"] / row["images_per_s"] for row in convs)
            mfu = flop / seconds / 1e12 / document["limits"][convs[0]["precision"]]["matmul_tflop_per_s"]
            name = f"all convolutions of {convs[0]['arch']}, {convs[0]['batch_size']}, {direction}"
            figures.append((name, f"{1 / seconds:,.0f}", format_share(mfu), f"{flop / seconds / 1e12:,.1f} TFLOP/s"))
    for precision, limit in (document.get("limits") or {}).items():
        peak = f"{limit['matmul_tflop_per_s']:,.1f} TFLOP/s, copy {limit['copy_gb_per_s']:,.0f} GB/s"
        if published := limit.get("published_tflop_per_s"):
            peak += (
                f"; {format_share(limit['matmul_tflop_per_s'] / published)} of the published {published:,.1f} TFLOP/s"
            )
        figures.append((f"matrix product {precision} (MFU 100 %)", "", "", peak))
    return figures


def read_speedrun(document: dict[str, Any]) -> list[Figures]:
    seconds, accuracy = document["seconds"], document["acc_tta"] or document["acc"]
    if not seconds or not accuracy:
        return [("time to accuracy", "", "", f"{document['refused']} invalid runs of {document['n']}")]
    other = f"{seconds['mean']:.2f} s, accuracy {100 * accuracy['mean']:.2f} %, n = {len(seconds['trials'])}"
    other += "" if document["reached"] else ", which does not reach the target"
    return [(f"time to {100 * document['target']:g} %", "", "", other)]


def read_peers(document: dict[str, Any]) -> list[Figures]:
    figures = []
    for name, loop in document["loops"].items():
        ratio = f"{loop['times_plain_compile']['median']:.2f} x plain_compile" if "times_plain_compile" in loop else ""
        figures.append(
            (f"{name} {document['arch']} {document['batch_size']}", f"{loop['images_per_s']:,.0f}", "", ratio)
        )
    return figures


def read_loader_lists(document: dict[str, Any]) -> list[Figures]:
    return [
        (
            f"{row['name']}, {row['augment']}",
            f"{row['images_per_s']:,.0f}",
            "",
            f"{row['cpu_us_per_image']:.1f} CPU us/image",
        )
        for row in document["loaders"]
    ]


def read_checks(document: dict[str, Any]) -> list[Figures]:
    failed = [f"{check['check']} ({check['form']})" for check in document["checks"] if not check["passed"]]
    passed = f"{len(document['checks']) - len(failed)} of {len(document['checks'])} checks passed"
    return [("equality of the forms of the step", "", "", "; failed: ".join([passed, *failed]))]


def read_doctor(document: dict[str, Any]) -> list[Figures]:
    return [("verdict", "", "", document.get("error") or document["check"]["verdict"])]


def read_train(document: dict[str, Any]) -> list[Figures]:
    other = f"test accuracy {100 * document['test_acc']:.2f} %, {document['seconds']['total']:.0f} s"
    return [("training", f"{document['images_per_s']:,.0f}", "", other)]


# a key that a document contains -> function that returns its figures
FIGURES: dict[str, Callable[[dict[str, Any]], list[Figures]]] = {
    "results": read_bench,
    "reached": read_speedrun,
    "checks": read_checks,
    "loops": read_peers,
    "loaders": read_loader_lists,
    "imports": read_doctor,
    "stop_reason": read_train,
}


def format_share(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def summarize_trace(out: Path) -> None:
    """Write the time of every kernel in the trace to profile.txt, and compress the trace."""
    trace = out / "step.trace.json"
    events = json.loads(trace.read_text("utf-8"))["traceEvents"]
    category = "kernel" if any(event.get("cat") == "kernel" for event in events) else "cpu_op"
    (out / "profile.txt").write_text(format_kernel_times(events, category), "utf-8")
    (out / "step.trace.json.gz").write_bytes(gzip.compress(trace.read_bytes()))
    trace.unlink()


def format_kernel_times(events: list[dict[str, Any]], category: str, max_rows: int = 40) -> str:
    """Return a table of the events of one category of a Chrome trace by name: share, milliseconds and calls.

    The names with the most time are first.
    """
    durations: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == category and "dur" in event:
            durations[event["name"]] += event["dur"]
            calls[event["name"]] += 1
    total = sum(durations.values()) or 1
    lines = [
        f"{100 * us / total:6.1f} % {us / 1e3:10.3f} ms {calls[name]:6} {name[:160]}"
        for name, us in durations.most_common(max_rows)
    ]
    return "\n".join([f"{'share':>8} {'time':>13} {'calls':>6} {category}", *lines, ""])
