"""Numbers of kernel launches, graph replays and host synchronizations of a training run, counted without a GPU.

    python bench/stub_launches.py [--arch se68 --batch-size 128 --batch-size 1024 --option KEY=VALUE --record]

Trains two epochs on synthetic images with the stub CUDA runtime of tests/cuda_stub (docs/cuda-stub.md), with the
default recipe: compiled, captured, tensor loader. `--option` sets an option of the recipe to a value in JSON.
`--record` writes bench/results/<UTC>_<device>_launches/ with summary.json (the tables) and trials.jsonl (every kernel).

A convolution counts as one launch for each result (output, gradients of the input and of the weight). Compilation takes
minutes on the first run; torch keeps its results in TORCHINDUCTOR_CACHE_DIR.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "cuda_stub"))

import results_folder
from stub_build import (
    build_cached_library,
    find_missing_compile_requirement,
    find_missing_requirement,
    stub_environment,
)

from fastcifar.device import collect_environment

ROOT = Path(__file__).resolve().parents[1]
CHILD = ROOT / "tests" / "cuda_stub" / "stub_launch_counts.py"


def count_launches(options: dict[str, Any]) -> dict[str, Any]:
    """Return the result of `stub_launch_counts.py` for the recipe `options`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(CHILD), folder, json.dumps(options)]
        environment = stub_environment(build_cached_library(), ROOT)
        run = subprocess.run(command, env=environment, cwd=folder, check=False)
        result = Path(folder) / "result.json"
        if run.returncode or not result.is_file():
            raise SystemExit(f"the process ended with exit code {run.returncode}")
        return json.loads(result.read_text())


def format_tables(result: dict[str, Any]) -> str:
    """Return the tables of one result for the terminal."""
    lines = [f"{result['options']}: {result['steps']} steps in {result['epochs']} epochs"]
    for title, table in result["tables"].items():
        lines.append(f"\n{title}")
        lines += [f"{count:10g}  {name}" for name, count in table.items()]
    return "\n".join(lines)


def current_commit() -> str:
    """Return the commit of the working tree, with "+changes" if files differ from it."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    changes = subprocess.run([*git, "diff", "HEAD", "--name-only"], capture_output=True, text=True, check=True).stdout
    return commit.strip() + ("+changes" if changes else "")


def main() -> None:
    parser = argparse.ArgumentParser(description="Launches of a training run on a stub CUDA runtime.")
    parser.add_argument("--arch", default="se68")
    parser.add_argument("--batch-size", type=int, action="append", help="may be repeated; by default 128 and 1024")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="option of the recipe")
    parser.add_argument("--record", action="store_true", help="write a result folder")
    arguments = parser.parse_args()
    if missing := find_missing_requirement() or find_missing_compile_requirement():
        raise SystemExit(f"the stub CUDA runtime {missing}")
    options = {key: json.loads(value) for key, value in (item.split("=", 1) for item in arguments.option)}
    results = []
    for batch_size in arguments.batch_size or [128, 1024]:
        chosen = {"arch": arguments.arch, "batch_size": batch_size, **options}
        results.append(count_launches(chosen))
        print(format_tables(results[-1]), flush=True)
    if arguments.record:
        summary = {
            "what": "launches, replays and synchronizations of a training run on the stub CUDA runtime",
            "commit": current_commit(),
            "n": 1,
            "results": [{key: value for key, value in result.items() if key != "kernels"} for result in results],
        }
        trials = [{"options": result["options"], **kernel} for result in results for kernel in result["kernels"]]
        print(results_folder.write("launches", collect_environment("cpu"), summary, trials))


if __name__ == "__main__":
    main()
