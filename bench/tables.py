"""The README's tables of results, generated from bench/results.

    python bench/tables.py           rewrites the tables in README.md
    python bench/tables.py --check   exits 1 if they are not current

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a row of TABLES.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"


def accuracy() -> str:
    """Every recorded training result: mean and standard deviation over seeds, with n."""
    lines = [
        "| recipe | parameters | epochs | n | test accuracy, mean ± std | each seed "
        "| training PFLOP | seconds, start to end | device | result |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for folder in sorted(RESULTS.iterdir()):
        summary = json.loads((folder / "summary.json").read_text())
        if "test_acc" not in summary:
            continue
        tested, environment = summary["test_acc"], json.loads((folder / "env.json").read_text())
        spread = "" if tested["std"] is None else f" ± {100 * tested['std']:.2f}"
        seconds = summary["seconds_total"]
        lines.append(
            f"| `{summary['recipe']}` | {summary['params']:,} | {summary['epochs']} | {summary['n']} "
            f"| {100 * tested['mean']:.2f}{spread} % | {', '.join(f'{100 * value:.2f}' for value in tested['trials'])} "
            f"| {summary['train_flops'] / 1e15:.3f} | {min(seconds):.0f}-{max(seconds):.0f} "
            f"| {environment['device']}, {summary['precision']} | `{folder.name}` |"
        )
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {"accuracy": accuracy}


def renewed(text: str) -> str:
    """The README's text with every table generated anew."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    before = README.read_text(encoding="utf-8")
    after = renewed(before)
    if "--check" in sys.argv:
        sys.exit(before != after)
    README.write_text(after, encoding="utf-8")
