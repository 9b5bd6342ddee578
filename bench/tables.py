"""Generate the tables of results in README.md and docs/ from bench/results.

    python bench/tables.py           rewrite the tables
    python bench/tables.py --check   exit with code 1 if they are out of date

The lines between `<!-- table: NAME -->` and `<!-- end -->` are replaced; NAME is a key of `TABLES`.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastcifar.format import MISSING, format_percent
from fastcifar.renamed import upgrade_options
from fastcifar.reporting.aggregate import MeanStd

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "bench" / "results"
SAME_ALLOCATOR, NOT_MEASURED = "+allocator", "not measured"  # the first as in peers/allocator.py


def accuracy() -> str:
    """Return the table of training results: mean and standard deviation of the test accuracy over n seeds."""
    heading = (
        "| recipe | parameters | epochs | n | test accuracy, mean ± std | test accuracy of each seed (%) "
        "| training PFLOP | total time, min-max (s) | device | result folder |"
    )
    rows = []
    for folder, summary, environment in recorded("test_acc"):
        tested = summary["test_acc"]
        seconds = summary["seconds_total"]
        rows.append(
            f"| `{summary['recipe']}` | {summary['params']:,} | {summary['epochs']} | {summary['n']} "
            f"| {mean_and_std(tested, 100, 2, ' %')} | {', '.join(f'{100 * value:.2f}' for value in tested['trials'])} "
            f"| {summary['train_flops'] / 1e15:.3f} | {min(seconds):.0f}-{max(seconds):.0f} "
            f"| {environment['device']}, {summary['precision']} | `{folder.name}` |"
        )
    return table(heading, rows)


def headline() -> str:
    """Return the short table of training results for the README, with links to the result folders.

    Of the speedruns, it contains those with enough runs for a standard deviation.
    """
    heading = (
        "| recipe | device | test accuracy, mean ± std (n) | total time, min-max (s) | training PFLOP | result folder |"
    )
    rows = []
    for folder, summary, environment in recorded("test_acc"):
        seconds = summary["seconds_total"]
        rows.append(
            f"| `{summary['recipe']}`, {summary['epochs']} epochs | {environment['device']}, {summary['precision']} "
            f"| {mean_and_std(summary['test_acc'], 100, 2, ' %')} (n={summary['n']}) "
            f"| {min(seconds):.0f}-{max(seconds):.0f} | {summary['train_flops'] / 1e15:.3f} "
            f"| [files](bench/results/{folder.name}) |"
        )
    for folder, summary, environment in recorded_speedruns():
        if summary["n"] < 3:
            continue
        accuracy, accuracy_tta = (mean_and_std(summary[name], 100, 2, " %") for name in ("acc", "acc_tta"))
        rows.append(
            f"| `{summary['recipe']}`, {summary['epochs']} epochs "
            f"| {environment['device']}, {environment['chosen']['precision']} "
            f"| {accuracy_tta} with test-time augmentation, {accuracy} without (n={summary['n']}) "
            f"| {speedrun_seconds(summary, environment)} | {summary['flops'] / 1e15:.3f} "
            f"| [files](bench/results/{folder.name}) |"
        )
    return table(heading, rows)


def peers() -> str:
    """Return the table of training-loop comparisons: the median of each loop and its speedup over four others."""
    heading = (
        "| network, batch size, augmentation | loop | n | images/s, median | images/s of each round "
        "| speedup over source_loop | with the same allocator | speedup over plain_compile | with the same allocator "
        "| CPU time per image (µs) "
        "| CPU cores used by other processes, max | device | result folder |"
    )
    rows = []
    for folder, summary, environment in recorded("loops"):
        for loop, figures in summary["loops"].items():
            rows.append(
                f"| `{summary['arch']}`, {summary['batch_size']}, `{summary['augment']}` | {loop} | {summary['n']} "
                f"| {figures['images_per_s']:,.1f} | {', '.join(f'{value:,.1f}' for value in figures['trials'])} "
                f"| {speedups(figures, 'source_loop')} | {speedups(figures, 'plain_compile')} "
                f"| {figures['cpu_us_per_image']:,.0f} | {figures['others_cores']:.2f} "
                f"| {', '.join(filter(None, (environment['device'], summary.get('precision'))))} | `{folder.name}` |"
            )
    return table(heading, rows)


def inference() -> str:
    """Return the table of inference comparisons: the median of each loop and its speedup over the source's loop."""
    heading = (
        "| network, batch size | loop | n | images/s, median | images/s of each round | speedup over source_loop "
        "| with the same allocator | setup time (s) | CPU cores used by other processes, max | device | result folder |"
    )
    rows = []
    for folder, summary, environment in recorded("inference"):
        for loop, figures in summary["inference"].items():
            rows.append(
                f"| `{summary['arch']}`, {summary['batch_size']} | {loop} | {summary['n']} "
                f"| {figures['images_per_s']:,.1f} | {', '.join(f'{value:,.1f}' for value in figures['trials'])} "
                f"| {speedups(figures, 'source_loop')} "
                f"| {', '.join(f'{value:.1f}' for value in figures['prepare_s'])} "
                f"| {figures['others_cores']:.2f} | {environment['device']} | `{folder.name}` |"
            )
    return table(heading, rows)


def starts() -> str:
    """Return the table of start-up times: from process start to the end of the first step, cold and warm cache."""
    heading = (
        "| network, batch size | n | cold start, median (s) | warm start, median (s) "
        "| warm / cold, median (min to max) | device | result folder |"
    )
    rows = []
    for folder, summary, environment in recorded("cold_s"):
        rows.append(
            f"| `{summary['arch']}`, {summary['batch_size']} | {summary['n']} | {summary['cold_s']:.1f} "
            f"| {summary['warm_s']:.1f} | {median_and_range(summary['share'])} "
            f"| {environment['device']} | `{folder.name}` |"
        )
    return table(heading, rows)


def loaders() -> str:
    """Return the table of data-loader comparisons: the median of each loader and its speedup over a baseline."""
    heading = (
        "| augmentation, batch size | loader | n | images/s, median | images/s of each round | speedup "
        "| CPU time per image (µs) | CPU cores used by other processes, max | device | result folder |"
    )
    rows = []
    for folder, summary, environment in recorded("loaders"):
        for row in summary["loaders"]:
            speedup = f"{row['times']['median']:.1f} x {row['times']['of']}" if row["times"] else ""
            augment = upgrade_options({"augment": row["augment"]})["augment"]
            rows.append(
                f"| `{augment}`, {summary['batch_size']} | {row['name']} | {summary['n']} "
                f"| {row['images_per_s']:,.0f} | {', '.join(f'{value:,.0f}' for value in row['trials'])} | {speedup} "
                f"| {row['cpu_us_per_image']:,.1f} | {row['others_cores']:.2f} "
                f"| {environment['device']} | `{folder.name}` |"
            )
    return table(heading, rows)


def table(heading: str, rows: list[str], none: str = "(None recorded yet.)") -> str:
    """Return a Markdown table, or the text `none` if there are no rows."""
    rule = "|" + "---|" * (heading.count("|") - 1)
    return "\n".join([heading, rule, *rows]) if rows else none


def speedups(loop: dict[str, Any], other: str) -> str:
    """Return the cells with the median speedup over the loop `other`, as shipped and with the same allocator."""
    ratios = (loop.get(f"times_{name}") for name in (other, other + SAME_ALLOCATOR))
    return " | ".join(f"{ratio['median']:.2f}" if ratio else NOT_MEASURED for ratio in ratios)


def airbench() -> str:
    """Return the table of the cifar10-airbench scripts: accuracy, the time they report and the time of the process."""
    heading = (
        "| script | n | accuracy, mean | time reported by the script, mean (s) | process time, cold start (s) "
        "| process time, warm start (s) | device | result folder |"
    )
    rows = []
    for folder, summary, environment in recorded("scripts"):
        for script, figures in summary["scripts"].items():
            process_times = (
                ", ".join(f"{value:.1f}" for value in figures[name]) or "-" for name in ("cold_s", "warm_s")
            )
            reported = figures["own_s"]
            rows.append(
                f"| `{script}` | {len(figures['accuracy'])} | {format_percent(statistics.fmean(figures['accuracy']))} "
                f"| {f'{statistics.fmean(reported):.2f}' if reported else '-'} | {' | '.join(process_times)} "
                f"| {environment['device']} | `{folder.name}` |"
            )
    return table(heading, rows, "(None recorded yet: these scripts need CUDA.)")


def speedruns() -> str:
    """Return the table of speedruns on the test set: accuracy without and with test-time augmentation, and time."""
    heading = (
        "| recipe | parameters | target | n | accuracy, mean ± std (range if n = 2) | accuracy with TTA "
        "| runs that reach the target with TTA | time (s) | process start to end of first run (s) "
        "| training PFLOP | device | result folder |"
    )
    rows = []
    for folder, summary, environment in recorded_speedruns():
        accuracy, accuracy_tta = (mean_and_std(summary[name], 100, 2, " %") for name in ("acc", "acc_tta"))
        best = summary["acc_tta"] or summary["acc"] or {"share": 0}
        cold = ", ".join(f"{value:.0f}" for value in summary["cold_start_s"]) or "-"
        n = f"{summary['n'] - summary['refused']} of {summary['n']}" if summary["refused"] else summary["n"]
        rows.append(
            f"| `{summary['recipe']}` | {summary['params']:,} | {100 * summary['target']:g} % | {n} "
            f"| {accuracy} | {accuracy_tta} | {format_percent(best['share'], 0)} "
            f"| {speedrun_seconds(summary, environment)} | {cold} "
            f"| {summary['flops'] / 1e15:.4f} | {environment['device']} | `{folder.name}` |"
        )
    return table(heading, rows)


def recorded_speedruns() -> Iterator[tuple[Path, dict[str, Any], dict[str, Any]]]:
    """Yield what `recorded` does for every speedrun on the test set, because the validation split is for tuning."""
    return (result for result in recorded("flops_to_target") if result[1]["on"] == "test")


def speedrun_seconds(summary: dict[str, Any], environment: dict[str, Any]) -> str:
    """Return the mean and standard deviation of the training seconds of a speedrun, if they were measured."""
    return NOT_MEASURED if "untimed" in environment else mean_and_std(summary["seconds"], 1, 1)


def pairs() -> str:
    """Return the table of speedruns alternated with a peer's script: accuracies, times, and the ratio of the times."""
    heading = (
        "| target | script | n | accuracy with TTA, mean | accuracy, mean | time, mean (s) | time of each round (s) "
        "| time / the peer's time, median (min to max) | with the same allocator | training PFLOP "
        "| CPU cores used by other processes, max "
        "| device | result folder |"
    )
    rows = []
    for folder, summary, environment in recorded("peer_script"):
        peer = summary["peer_script"]
        names = {
            "ours": f"`{summary['recipe']}`",
            "peer": f"`{peer}`",
            "peer_same_allocator": f"`{peer}`, allocator of fastcifar",
        }
        for side in filter(summary.__contains__, names):
            figures = summary[side]
            ratios = [summary.get(f"seconds_over_{other}") for other in names if other != "ours"]
            texts = [median_and_range(ratio) if ratio else NOT_MEASURED for ratio in ratios]
            ratio_cells = " | ".join(texts if side == "ours" else ["", ""])
            flops = "-" if None in figures["flops"] else f"{statistics.fmean(figures['flops']) / 1e15:.4f}"
            rows.append(
                f"| {100 * summary['target']:g} % | {side.partition('_')[0]}, {names[side]} | {summary['n']} "
                f"| {format_percent(summary['mean_acc_tta'][side])} | {format_percent(summary['mean_acc'][side])} "
                f"| {statistics.fmean(figures['seconds']):.1f} "
                f"| {', '.join(f'{value:.1f}' for value in figures['seconds'])} | {ratio_cells} | {flops} "
                f"| {summary['others_cores']:.2f} | {environment['device']} | `{folder.name}` |"
            )
    return table(heading, rows)


def median_and_range(ratio: dict[str, float]) -> str:
    """Return `0.72 (0.65 to 0.75)`, or `0.72` if all values are equal, as for a single round."""
    extremes = f" ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio["min"] < ratio["max"] else ""
    return f"{ratio['median']:.2f}{extremes}"


def mean_and_std(figure: dict[str, Any] | None, unit: float, decimals: int, sign: str = "") -> str:
    """Return `93.99 ± 0.12 %`, with the range of two runs, only the mean of one, or a dash without a measurement."""
    statistics = MeanStd.from_values(figure["trials"] if figure else [])
    return f"{statistics.format(decimals, unit)}{sign}" if statistics else MISSING


def faults() -> str:
    """Return the table of soak tests and of fuzz tests of the file readers."""
    heading = "| test | inputs | outcome | time (s) | device | result folder |"
    rows = []
    for folder, summary, environment in recorded("what"):
        if summary["what"] == "soak":
            signals = ", ".join(f"{count} {name}" for name, count in sorted(summary["by_signal"].items()))
            inputs = f"{summary['runs']:,} runs, killed {summary['kills']:,} times ({signals})"
            outcome = f"{summary['equal']:,} bit-identical to an uninterrupted run"
        elif summary["what"] == "fuzz-readers":
            inputs = f"{summary['inputs']:,} damaged files, {summary['readers']} readers"
            outcome = (
                f"{summary['refused']:,} refused with a one-line error, {summary['read']:,} read, no other outcome"
            )
        else:
            continue
        rows.append(
            f"| {summary['what']} | {inputs} | {outcome} | {summary['seconds']:,.0f} "
            f"| {environment['device']} | `{folder.name}` |"
        )
    return table(heading, rows)


def kernels() -> str:
    """Return the table of the compiled kernels: one row for each compute capability."""
    heading = (
        "| compute capability | kernels | with all block sizes | most registers | most shared memory (bytes) "
        "| kernels that spill registers | result folder |"
    )
    rows = [
        f"| {row['capability']} | {row['kernels']:,} | {row['compiled']:,} | {row['registers']} "
        f"| {row['shared_bytes']:,} | {row['spilling']} | `{folder.name}` |"
        for folder, summary, _ in recorded("rows")
        for row in summary["rows"]
        if row.get("workload") == "all"
    ]
    return table(heading, rows)


def recorded(key: str) -> Iterator[tuple[Path, dict[str, Any], dict[str, Any]]]:
    """Yield (folder, summary, environment) of every result whose summary has the key `key`, oldest first."""
    for path in sorted(RESULTS.glob("*/summary.json")):
        summary = json.loads(path.read_text(encoding="utf-8"))
        if key in summary:
            yield path.parent, summary, json.loads((path.parent / "env.json").read_text(encoding="utf-8"))


TABLES: dict[str, Callable[[], str]] = {
    "accuracy": accuracy,
    "headline": headline,
    "peers": peers,
    "inference": inference,
    "loaders": loaders,
    "starts": starts,
    "airbench": airbench,
    "speedruns": speedruns,
    "pairs": pairs,
    "faults": faults,
    "kernels": kernels,
}


def update_tables(text: str) -> str:
    """Return the text of a page with every table regenerated."""

    def regenerate(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", regenerate, text, flags=re.DOTALL)


if __name__ == "__main__":
    before = {page: page.read_text(encoding="utf-8") for page in PAGES}
    after = {page: update_tables(text) for page, text in before.items()}
    if "--check" in sys.argv:
        sys.exit(before != after)
    for page, text in after.items():
        page.write_text(text, encoding="utf-8")
