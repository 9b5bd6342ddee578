"""Benchmark of the scripts of cifar10-airbench, from a checkout, with two definitions of the time. Needs CUDA.

    python bench/peers/airbench.py CHECKOUT [--scripts airbench94_muon.py,airbench96_faster.py --runs 3 --starts 2]

The first time is the one that a script prints: training and the final evaluation with test-time augmentation, without
imports and data. airbench94_muon.py compiles in a warm-up that it does not count; for a script without a warm-up, the
first run of each start includes compilation and is kept separately. The second time is the wall-clock time from the
start of the process to the printed accuracy of its first run, with imports, compilation and data; the first start of a
script has empty compile caches, the later ones filled caches. A script is run unchanged, in a temporary folder with the
images in its format, and stopped after `--runs` of its many runs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import results_folder
import torch

from fastcifar.data.cifar import load_dataset
from fastcifar.device import collect_environment

SCRIPTS = ("airbench94_muon.py", "airbench96_faster.py")
ACCURACY, OWN_SECONDS = "tta_val_acc", ("time_seconds", "total_time_seconds")  # columns of the printed tables
METRICS = ("accuracy", "own_s", "own_compiling_s", "cold_s", "warm_s")  # of a script, for all its runs or starts


def time_script(script: Path, folder: Path, runs: int) -> list[dict[str, Any]]:
    """Run `script` in `folder` for `runs` runs; return the accuracy and the seconds of each.

    Raises SystemExit with the last line of the script if it ends early.
    """
    started, results, last_line = time.perf_counter(), [], ""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "PYTHONUNBUFFERED": "1"}
    environment["TRITON_CACHE_DIR"] = str(folder / "triton")
    process = subprocess.Popen(
        [sys.executable, str(script)], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None

    def lines() -> Iterator[str]:
        nonlocal last_line
        for line in process.stdout or ():
            last_line = line.strip() or last_line
            yield line

    try:
        for run in parse_runs(lines()):
            results.append({**run, "since_start_s": time.perf_counter() - started})
            if len(results) == runs:
                return results
    finally:
        process.kill()
        process.wait()
    raise SystemExit(f"{script.name} ended after {len(results)} of {runs} runs: {last_line}")


def parse_runs(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Yield `accuracy`, `without_tta`, `own_s` and `compiled` of each run, except the warm-up, in printed tables.

    `compiled` is whether an earlier run of the process has compiled the network, so that the seconds do not include
    compilation. The header of a table has the names of the columns; the first row of a run has the name of the run, and
    its last row the accuracy and the seconds.
    """
    columns: list[str] = []
    name, compiled = "", False
    for line in lines:
        if not line.startswith("|"):
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if ACCURACY in cells:
            columns = cells
            continue
        row = dict(zip(columns, cells, strict=False))
        name = row.get("run") or name
        if not row.get(ACCURACY):
            continue
        if name != "warmup":
            seconds = next(row[column] for column in OWN_SECONDS if column in row)
            without_tta = float(row.get("val_acc") or "nan")
            yield {
                "accuracy": float(row[ACCURACY]),
                "without_tta": without_tta,
                "own_s": float(seconds),
                "compiled": compiled,
            }
        compiled = True


def write_images(folder: Path, data: str | None) -> None:
    """Write the data set in the format of the scripts, `cifar10/{train,test}.pt`, so that they do not download it."""
    dataset = load_dataset(data, download=False)
    (folder / "cifar10").mkdir()
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        images = torch.from_numpy(split.images.transpose(0, 2, 3, 1).copy())
        content = {"images": images, "labels": torch.from_numpy(split.labels.copy()), "classes": list(dataset.classes)}
        torch.save(content, folder / "cifar10" / f"{name}.pt")


def require_scripts(checkout: Path, scripts: list[str]) -> None:
    """Raise SystemExit if a script does not exist."""
    for script in scripts:
        if not (checkout / script).is_file():
            raise SystemExit(f"{checkout} has no {script}; give a checkout of KellerJordan/cifar10-airbench")


def run_scripts(
    checkout: Path, scripts: list[str], data: str | None, runs: int = 3, starts: int = 2
) -> list[dict[str, Any]]:
    """Return a trial for each start of each script. Raises SystemExit with a message of one line."""
    require_scripts(checkout, scripts)
    trials = []
    for script in scripts:
        with tempfile.TemporaryDirectory() as folder:
            write_images(Path(folder), data)
            for start in range(starts):
                results = time_script((checkout / script).absolute(), Path(folder), runs)
                trials.append({"script": script, "start": "warm" if start else "cold", "runs": results})
                print(trials[-1], flush=True)
    return trials


def summarize(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the METRICS of each script: accuracies and printed seconds of all runs, seconds from process start."""
    scripts: dict[str, Any] = {}
    for trial in trials:
        metrics = scripts.setdefault(trial["script"], {name: [] for name in METRICS})
        for run in trial["runs"]:
            metrics["accuracy"].append(run["accuracy"])
            metrics["own_s" if run["compiled"] else "own_compiling_s"].append(run["own_s"])
        metrics[f"{trial['start']}_s"].append(trial["runs"][0]["since_start_s"])
    return {"what": "seconds to the printed accuracy, their rule and ours", "scripts": scripts}


def format_table(summary: dict[str, Any]) -> str:
    """Return the summary as a table for the terminal."""
    lines = [f"{'script':24} {'n':>3} {'accuracy':>9} {'printed':>9} {'cold start':>10} {'warm start':>10}  seconds"]
    for name, metrics in summary["scripts"].items():
        mean = {key: sum(values) / len(values) if values else float("nan") for key, values in metrics.items()}
        lines.append(
            f"{name:24} {len(metrics['accuracy']):3} {100 * mean['accuracy']:8.2f}% {mean['own_s']:9.2f} "
            f"{mean['cold_s']:10.1f} {mean['warm_s']:10.1f}"
        )
    return "\n".join(lines)


def missing_cuda_message() -> str:
    """Return why the scripts cannot be run on this machine; "" if they can."""
    return "" if torch.cuda.is_available() else "cifar10-airbench needs CUDA, and no CUDA device is visible"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the scripts of cifar10-airbench.")
    parser.add_argument("checkout", type=Path, help="checkout of KellerJordan/cifar10-airbench")
    parser.add_argument("--scripts", default=",".join(SCRIPTS), help="comma-separated names of scripts")
    parser.add_argument("--runs", type=int, default=3, help="number of runs of each start of a script, by default 3")
    parser.add_argument(
        "--starts",
        type=int,
        default=2,
        help="number of starts of each script, of which the first has empty compile caches; by default 2",
    )
    parser.add_argument("--data", help="data set, as for fastcifar train")
    arguments = parser.parse_args()
    if message := missing_cuda_message():
        print(message, file=sys.stderr)
        sys.exit(8)
    scripts = arguments.scripts.split(",")
    trials = run_scripts(arguments.checkout, scripts, arguments.data, arguments.runs, arguments.starts)
    summary = summarize(trials)
    print(results_folder.write("airbench", collect_environment("cuda"), summary, trials))
    print(format_table(summary))


if __name__ == "__main__":
    main()
