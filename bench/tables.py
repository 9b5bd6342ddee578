"""Tables of results in the README, generated from bench/results.

    python bench/tables.py           updates the tables in README.md
    python bench/tables.py --check   exits 1 if they are not up to date

A table is placed between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a key of TABLES.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastcifar.format import MISSING, format_mean_std, format_percent

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"


def accuracy() -> str:
    """Return the table of training results: mean and standard deviation over seeds."""
    heading = (
        "| recipe | parameters | epochs | n | test accuracy, mean ± std | each seed "
        "| training PFLOP | total seconds | device | result |"
    )
    rows = []
    for folder, summary, environment in read_results("test_acc"):
        test_acc = summary["test_acc"]
        seconds, percentages = summary["seconds_total"], [100 * value for value in test_acc["trials"]]
        rows.append(
            f"| `{summary['recipe']}` | {summary['params']:,} | {summary['epochs']} | {summary['n']} "
            f"| {mean_and_std(test_acc, 100, 2, ' %')} | {format_list(percentages, 2)} "
            f"| {summary['train_flops'] / 1e15:.3f} | {min(seconds):.0f}-{max(seconds):.0f} "
            f"| {environment['device']}, {summary['precision']} | `{folder.name}` |"
        )
    return format_table(heading, rows)


def peers() -> str:
    """Return the table of training loops: medians, and speeds relative to two other loops."""
    heading = (
        "| network, batch size, augmentation | loop | n | images/s, median | each round | relative to source_loop "
        "| relative to plain_compile | CPU µs per image | cores used by other processes, maximum | device | result |"
    )
    rows = []
    for folder, summary, environment in read_results("loops"):
        for loop, entry in summary["loops"].items():
            rows.append(
                f"| `{summary['arch']}`, {summary['batch_size']}, `{summary['augment']}` | {loop} | {summary['n']} "
                f"| {entry['images_per_s']:,.1f} | {format_list(entry['trials'], 1)} "
                f"| {format_ratio(entry, 'source_loop')} | {format_ratio(entry, 'plain_compile')} "
                f"| {entry['cpu_us_per_image']:,.0f} | {entry['others_cores']:.2f} "
                f"| {environment['device']} | `{folder.name}` |"
            )
    return format_table(heading, rows)


def inference() -> str:
    """Return the table of inference loops: medians, and speeds relative to the loop of the source projects."""
    heading = (
        "| network, images | loop | n | images/s, median | each round | relative to source_loop "
        "| seconds of preparation | cores used by other processes, maximum | device | result |"
    )
    rows = []
    for folder, summary, environment in read_results("inference"):
        for loop, entry in summary["inference"].items():
            rows.append(
                f"| `{summary['arch']}`, {summary['images']:,} | {loop} | {summary['n']} "
                f"| {entry['images_per_s']:,.1f} | {format_list(entry['trials'], 1)} "
                f"| {entry['times_source_loop']['median']:.2f} "
                f"| {format_list(entry['prepare_s'], 1)} "
                f"| {entry['others_cores']:.2f} | {environment['device']} | `{folder.name}` |"
            )
    return format_table(heading, rows)


def starts() -> str:
    """Return the table of starts: seconds to the end of the first step with an empty and a filled compile cache."""
    heading = (
        "| network, batch size | n | cold start, s, median | warm start, s, median | warm / cold | device | result |"
    )
    rows = []
    for folder, summary, environment in read_results("cold_s"):
        rows.append(
            f"| `{summary['arch']}`, {summary['batch_size']} | {summary['n']} | {summary['cold_s']:.1f} "
            f"| {summary['warm_s']:.1f} | {format_range(summary['share'])} "
            f"| {environment['device']} | `{folder.name}` |"
        )
    return format_table(heading, rows)


def loaders() -> str:
    """Return the table of data loaders: medians, every round, and speeds relative to the baseline."""
    heading = (
        "| augmentation, batch size | loader | n | images/s, median | each round | relative to the baseline "
        "| CPU µs per image | cores used by other processes, maximum | device | result |"
    )
    rows = []
    for folder, summary, environment in read_results("loaders"):
        for loader in summary["loaders"]:
            ratio = loader["times"]
            relative = f"{ratio['median']:.1f} x {ratio['of']}" if ratio else ""
            rows.append(
                f"| `{loader['augment']}`, {summary['batch_size']} | {loader['name']} | {summary['n']} "
                f"| {loader['images_per_s']:,.0f} | {format_list(loader['trials'], 0)} | {relative} "
                f"| {loader['cpu_us_per_image']:,.1f} | {loader['others_cores']:.2f} "
                f"| {environment['device']} | `{folder.name}` |"
            )
    return format_table(heading, rows)


def format_table(heading: str, rows: list[str], empty: str = "(None recorded yet.)") -> str:
    """Return a Markdown table, or `empty` if there are no rows."""
    rule = "|" + "---|" * (heading.count("|") - 1)
    return "\n".join([heading, rule, *rows]) if rows else empty


def format_ratio(loop: dict[str, Any], other: str) -> str:
    """Return the speed relative to the `other` loop, or a dash if that was not measured in the same comparison."""
    ratio = loop.get(f"times_{other}")
    return f"{ratio['median']:.2f}" if ratio else "-"


def airbench() -> str:
    """Return the table of the scripts of cifar10-airbench: accuracy, printed seconds, seconds from process start."""
    heading = (
        "| script | n | accuracy, mean | seconds printed by the script, mean | seconds from cold start "
        "| seconds from warm start | device | result |"
    )
    rows = []
    for folder, summary, environment in read_results("scripts"):
        for script, entry in summary["scripts"].items():
            starts = (format_list(entry[name], 1) for name in ("cold_s", "warm_s"))
            printed = entry["own_s"]
            rows.append(
                f"| `{script}` | {len(entry['accuracy'])} "
                f"| {format_percent(statistics.fmean(entry['accuracy']))} "
                f"| {f'{statistics.fmean(printed):.2f}' if printed else '-'} | {' | '.join(starts)} "
                f"| {environment['device']} | `{folder.name}` |"
            )
    return format_table(heading, rows, "(None recorded yet; they need CUDA.)")


def speedruns() -> str:
    """Return the table of speedruns on the test set: accuracy without and with TTA, share at the target, seconds."""
    heading = (
        "| recipe | parameters | target | n | accuracy, mean ± std | with TTA | share at the target "
        "| seconds, mean ± std | seconds from process start | training PFLOP | device | result |"
    )
    rows = []
    for folder, summary, environment in read_results("flops_to_target"):
        if summary["on"] != "test":
            continue  # the options were chosen on the validation split
        accuracy, accuracy_tta = (mean_and_std(summary[name], 100, 2, " %") for name in ("acc", "acc_tta"))
        final = summary["acc_tta"] or summary["acc"] or {"share": 0}
        cold = ", ".join(f"{value:.0f}" for value in summary["cold_start_s"]) or MISSING
        n = f"{summary['n'] - summary['refused']} of {summary['n']}" if summary["refused"] else summary["n"]
        rows.append(
            f"| `{summary['recipe']}` | {summary['params']:,} | {100 * summary['target']:g} % | {n} "
            f"| {accuracy} | {accuracy_tta} | {format_percent(final['share'], 0)} "
            f"| {mean_and_std(summary['seconds'], 1, 1)} | {cold} "
            f"| {summary['flops'] / 1e15:.4f} | {environment['device']} | `{folder.name}` |"
        )
    return format_table(heading, rows)


def pairs() -> str:
    """Return the table of speedruns alternating with a peer's script: means, seconds, and the ratio of seconds."""
    heading = (
        "| target | program | n | accuracy with TTA, mean | without TTA, mean | seconds, mean | each round "
        "| ours / peer, by round | training PFLOP | cores used by other processes, maximum | device | result |"
    )
    rows = []
    for folder, summary, environment in read_results("peer_script"):
        for side, name in (("ours", summary["recipe"]), ("peer", summary["peer_script"])):
            entry = summary[side]
            seconds_ratio = summary["seconds_over_peer"]
            ratio = format_range(seconds_ratio) if side == "ours" else ""
            flops = "-" if None in entry["flops"] else f"{statistics.fmean(entry['flops']) / 1e15:.4f}"
            rows.append(
                f"| {100 * summary['target']:g} % | {side}, `{name}` | {summary['n']} "
                f"| {format_percent(summary['mean_acc_tta'][side])} | {format_percent(summary['mean_acc'][side])} "
                f"| {statistics.fmean(entry['seconds']):.1f} "
                f"| {format_list(entry['seconds'], 1)} | {ratio} | {flops} "
                f"| {summary['others_cores']:.2f} | {environment['device']} | `{folder.name}` |"
            )
    return format_table(heading, rows)


def format_list(values: list[float], digits: int) -> str:
    """Return the values, comma-separated; a dash if there are none."""
    return ", ".join(f"{value:,.{digits}f}" for value in values) or MISSING


def format_range(ratio: dict[str, float]) -> str:
    """Return the median, minimum and maximum of ratios: `0.60 (0.40 to 0.80)`."""
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"


def mean_and_std(metric: dict[str, Any] | None, scale: float, digits: int, unit: str = "") -> str:
    """Return `93.99 ± 0.12 %`, without the standard deviation for a single run; a dash if nothing was measured."""
    return f"{format_mean_std(metric['mean'], metric['std'], digits, scale)}{unit}" if metric else MISSING


def faults() -> str:
    """Return the table of soak and fuzz tests: the number of trials and their outcome."""
    heading = "| test | trials | outcome | seconds | device | result |"
    rows = []
    for folder, summary, environment in read_results("what"):
        if summary["what"] == "soak":
            signals = ", ".join(f"{count} {name}" for name, count in sorted(summary["by_signal"].items()))
            trials = f"{summary['runs']:,} runs, killed {summary['kills']:,} times ({signals})"
            outcome = f"{summary['equal']:,} ended bit-identical to the uninterrupted run"
        elif summary["what"] == "fuzz-readers":
            trials = f"{summary['inputs']:,} damaged files, {summary['readers']} readers"
            outcome = (
                f"{summary['refused']:,} refused with a message of one line, {summary['read']:,} read; no other outcome"
            )
        else:
            continue
        rows.append(
            f"| {summary['what']} | {trials} | {outcome} | {summary['seconds']:,.0f} "
            f"| {environment['device']} | `{folder.name}` |"
        )
    return format_table(heading, rows)


def read_results(key: str) -> Iterator[tuple[Path, dict[str, Any], dict[str, Any]]]:
    """Yield (folder, summary, environment) of every result whose summary has `key`, oldest first."""
    for path in sorted(RESULTS.glob("*/summary.json")):
        summary = json.loads(path.read_text(encoding="utf-8"))
        if key in summary:
            yield path.parent, summary, json.loads((path.parent / "env.json").read_text(encoding="utf-8"))


TABLES: dict[str, Callable[[], str]] = {
    "accuracy": accuracy,
    "peers": peers,
    "inference": inference,
    "loaders": loaders,
    "starts": starts,
    "airbench": airbench,
    "speedruns": speedruns,
    "pairs": pairs,
    "faults": faults,
}


def update_tables(text: str) -> str:
    """Return the text of the README with every table generated again."""

    def generate(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", generate, text, flags=re.DOTALL)


if __name__ == "__main__":
    before = README.read_text(encoding="utf-8")
    after = update_tables(before)
    if "--check" in sys.argv:
        sys.exit(before != after)
    README.write_text(after, encoding="utf-8")
