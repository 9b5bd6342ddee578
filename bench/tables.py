"""The README's tables of results, generated from bench/results.

    python bench/tables.py           rewrites the tables in README.md
    python bench/tables.py --check   exits 1 if they are not current

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a row of TABLES.
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
    """Every recorded training result: mean and standard deviation over seeds, with n."""
    heading = (
        "| recipe | parameters | epochs | n | test accuracy, mean ± std | each seed "
        "| training PFLOP | seconds, start to end | device | result |"
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


def peers() -> str:
    """Every recorded comparison of training loops: the median of each, and its ratios to two others, with n."""
    heading = (
        "| network, batch, augmentation | loop | n | images/s, median | each round | times the source's loop "
        "| times plain torch.compile | CPU µs an image | cores that others used, at most | device | result |"
    )
    rows = []
    for folder, summary, environment in recorded("loops"):
        for loop, found in summary["loops"].items():
            rows.append(
                f"| `{summary['arch']}`, {summary['batch_size']}, `{summary['augment']}` | {loop} | {summary['n']} "
                f"| {found['images_per_s']:,.1f} | {', '.join(f'{value:,.1f}' for value in found['trials'])} "
                f"| {times(found, 'source_loop')} | {times(found, 'plain_compile')} "
                f"| {found['cpu_us_per_image']:,.0f} | {found['others_cores']:.2f} "
                f"| {environment['device']} | `{folder.name}` |"
            )
    return table(heading, rows)


def inference() -> str:
    """Every recorded comparison of inference: the median of each loop, and its ratio to the source's, with n."""
    heading = (
        "| network, images | loop | n | images/s, median | each round | times the source's loop "
        "| seconds before it | cores that others used, at most | device | result |"
    )
    rows = []
    for folder, summary, environment in recorded("inference"):
        for loop, found in summary["inference"].items():
            rows.append(
                f"| `{summary['arch']}`, {summary['images']:,} | {loop} | {summary['n']} "
                f"| {found['images_per_s']:,.1f} | {', '.join(f'{value:,.1f}' for value in found['trials'])} "
                f"| {found['times_source_loop']['median']:.2f} "
                f"| {', '.join(f'{value:.1f}' for value in found['prepare_s'])} "
                f"| {found['others_cores']:.2f} | {environment['device']} | `{folder.name}` |"
            )
    return table(heading, rows)


def starts() -> str:
    """Every recorded pair of starts: seconds to the end of the first step, with an empty compile cache and a full."""
    heading = (
        "| network, batch | n | cold start, s, median | warm start, s, median | warm over cold | device | result |"
    )
    rows = []
    for folder, summary, environment in recorded("cold_s"):
        share = summary["share"]
        rows.append(
            f"| `{summary['arch']}`, {summary['batch_size']} | {summary['n']} | {summary['cold_s']:.1f} "
            f"| {summary['warm_s']:.1f} | {share['median']:.2f} ({share['min']:.2f} to {share['max']:.2f}) "
            f"| {environment['device']} | `{folder.name}` |"
        )
    return table(heading, rows)


def loaders() -> str:
    """Every recorded comparison of loaders: the median of each, all rounds, its ratio to the baseline, with n."""
    heading = (
        "| augmentation, batch | loader | n | images/s, median | each round | times the baseline | CPU µs an image "
        "| cores that others used, at most | device | result |"
    )
    rows = []
    for folder, summary, environment in recorded("loaders"):
        for row in summary["loaders"]:
            times = f"{row['times']['median']:.1f} x {row['times']['of']}" if row["times"] else ""
            rows.append(
                f"| `{row['augment']}`, {summary['batch_size']} | {row['name']} | {summary['n']} "
                f"| {row['images_per_s']:,.0f} | {', '.join(f'{value:,.0f}' for value in row['trials'])} | {times} "
                f"| {row['cpu_us_per_image']:,.1f} | {row['others_cores']:.2f} "
                f"| {environment['device']} | `{folder.name}` |"
            )
    return table(heading, rows)


def table(heading: str, rows: list[str], none: str = "(None recorded yet.)") -> str:
    """The rows under their heading, or `none`."""
    rule = "|" + "---|" * (heading.count("|") - 1)
    return "\n".join([heading, rule, *rows]) if rows else none


def times(loop: dict[str, Any], other: str) -> str:
    """How often as fast as the `other` loop, or a dash if that was not measured beside it."""
    ratio = loop.get(f"times_{other}")
    return f"{ratio['median']:.2f}" if ratio else "-"


def airbench() -> str:
    """Every recorded start of cifar10-airbench's scripts: accuracy, and the seconds by their rule and by ours."""
    heading = (
        "| script | n | accuracy, mean | seconds by its own rule, mean | by ours, cold start | warm start "
        "| device | result |"
    )
    rows = []
    for folder, summary, environment in recorded("scripts"):
        for script, found in summary["scripts"].items():
            ours = (", ".join(f"{value:.1f}" for value in found[name]) or "-" for name in ("cold_s", "warm_s"))
            own = found["own_s"]
            rows.append(
                f"| `{script}` | {len(found['accuracy'])} | {format_percent(statistics.fmean(found['accuracy']))} "
                f"| {f'{statistics.fmean(own):.2f}' if own else '-'} | {' | '.join(ours)} "
                f"| {environment['device']} | `{folder.name}` |"
            )
    return table(heading, rows, "(None recorded yet: they need CUDA.)")


def speedruns() -> str:
    """Every recorded speedrun on the test set: accuracy without and with views, share over the target, seconds."""
    heading = (
        "| recipe | parameters | target | n | accuracy, mean ± std | with views | of them over the target "
        "| seconds, mean ± std | from the start of the process, s | training PFLOP | device | result |"
    )
    rows = []
    for folder, summary, environment in recorded("flops_to_target"):
        if summary["on"] != "test":
            continue  # a split that chose something proves nothing
        plain, views = (mean_and_std(summary[name], 100, 2, " %") for name in ("acc", "acc_tta"))
        best = summary["acc_tta"] or summary["acc"] or {"share": 0}
        cold = ", ".join(f"{value:.0f}" for value in summary["cold_start_s"]) or "-"
        n = f"{summary['n'] - summary['refused']} of {summary['n']}" if summary["refused"] else summary["n"]
        rows.append(
            f"| `{summary['recipe']}` | {summary['params']:,} | {100 * summary['target']:g} % | {n} "
            f"| {plain} | {views} | {format_percent(best['share'], 0)} | {mean_and_std(summary['seconds'], 1, 1)} "
            f"| {cold} | {summary['flops'] / 1e15:.4f} | {environment['device']} | `{folder.name}` |"
        )
    return table(heading, rows)


def pairs() -> str:
    """Every recorded speedrun beside a peer's script: both sides' means and seconds, and ours over theirs."""
    heading = (
        "| target | side | n | accuracy with views, mean | without | seconds, mean | each round "
        "| over the peer's, by round | training PFLOP | cores that others used, at most | device | result |"
    )
    rows = []
    for folder, summary, environment in recorded("peer_script"):
        for side, name in (("ours", summary["recipe"]), ("peer", summary["peer_script"])):
            found = summary[side]
            share = summary["seconds_over_peer"]
            ratio = f"{share['median']:.2f} ({share['min']:.2f} to {share['max']:.2f})" if side == "ours" else ""
            flops = "-" if None in found["flops"] else f"{statistics.fmean(found['flops']) / 1e15:.4f}"
            rows.append(
                f"| {100 * summary['target']:g} % | {side}, `{name}` | {summary['n']} "
                f"| {format_percent(summary['mean_acc_tta'][side])} | {format_percent(summary['mean_acc'][side])} "
                f"| {statistics.fmean(found['seconds']):.1f} "
                f"| {', '.join(f'{value:.1f}' for value in found['seconds'])} | {ratio} | {flops} "
                f"| {summary['others_cores']:.2f} | {environment['device']} | `{folder.name}` |"
            )
    return table(heading, rows)


def mean_and_std(figure: dict[str, Any] | None, unit: float, decimals: int, sign: str = "") -> str:
    """`93.99 ± 0.12 %`, without the deviation where there was one run, or a dash where nothing was measured."""
    return f"{format_mean_std(figure['mean'], figure['std'], decimals, unit)}{sign}" if figure else MISSING


def faults() -> str:
    """Every recorded soak and fuzzing: how much was tried, and what came of it."""
    heading = "| what | tried | what came of it | seconds | device | result |"
    rows = []
    for folder, summary, environment in recorded("what"):
        if summary["what"] == "soak":
            signals = ", ".join(f"{count} {name}" for name, count in sorted(summary["by_signal"].items()))
            tried = f"{summary['runs']:,} runs, killed {summary['kills']:,} times ({signals})"
            found = f"{summary['equal']:,} ended as the run never stopped, bit for bit"
        elif summary["what"] == "fuzz-readers":
            tried = f"{summary['inputs']:,} damaged files, {summary['readers']} readers"
            found = f"{summary['refused']:,} refused in one line, {summary['read']:,} read; nothing else"
        else:
            continue
        rows.append(
            f"| {summary['what']} | {tried} | {found} | {summary['seconds']:,.0f} "
            f"| {environment['device']} | `{folder.name}` |"
        )
    return table(heading, rows)


def recorded(key: str) -> Iterator[tuple[Path, dict[str, Any], dict[str, Any]]]:
    """(folder, summary, environment) of every result, oldest first, whose summary has a `key`."""
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


def renewed(text: str) -> str:
    """The README's text with every table generated anew."""

    def anew(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", anew, text, flags=re.DOTALL)


if __name__ == "__main__":
    before = README.read_text(encoding="utf-8")
    after = renewed(before)
    if "--check" in sys.argv:
        sys.exit(before != after)
    README.write_text(after, encoding="utf-8")
