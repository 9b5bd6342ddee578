"""cifar10-airbench's own scripts, from a checkout of it, timed by their rule and by ours. Needs CUDA.

    python bench/peers/airbench.py CHECKOUT [--scripts airbench94_muon.py,airbench96_faster.py --runs 3 --starts 2]

Their rule is the seconds that a script prints itself: training and, at its end, the evaluation with views, without
imports and data; airbench94_muon.py compiles in a warm-up that it leaves out, and of a script without one the first run
of a start, which compiles inside its clock, is kept apart. Ours is the wall clock from the start of the process to the
printed accuracy of its first run: imports, compilation, data and all; the first start of a script finds empty compile
caches, the next ones full ones. None of its code is here: a script is started as it is, in a folder of its own with the
images as it keeps them, and stopped after `--runs` of its many runs.
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
ACCURACY, OWN_SECONDS = "tta_val_acc", ("time_seconds", "total_time_seconds")  # columns of the tables they print
FIGURES = ("accuracy", "own_s", "own_compiling_s", "cold_s", "warm_s")  # of a script, each of several runs or starts


def time_script(script: Path, folder: Path, runs: int) -> list[dict[str, Any]]:
    """`runs` runs of one process: accuracy, seconds by its own rule, and our seconds from the start of the process.

    Errors: SystemExit with the script's last line if it ends before.
    """
    started, found, last = time.perf_counter(), [], ""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "PYTHONUNBUFFERED": "1"}
    environment["TRITON_CACHE_DIR"] = str(folder / "triton")
    process = subprocess.Popen(
        [sys.executable, str(script)], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None

    def lines() -> Iterator[str]:
        nonlocal last
        for line in process.stdout or ():
            last = line.strip() or last
            yield line

    try:
        for run in finished_runs(lines()):
            found.append({**run, "since_start_s": time.perf_counter() - started})
            if len(found) == runs:
                return found
    finally:
        process.kill()
        process.wait()
    raise SystemExit(f"{script.name} ended after {len(found)} of {runs} runs: {last}")


def finished_runs(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """`accuracy`, `without_tta` and `own_s` of each run in the tables that a script prints, but for its warm-up's.

    `compiled`: whether something had run before, so that the seconds hold no compilation. A table's head names the
    columns; the first row of a run has its name in the first, the last one ends with the accuracy and the seconds.
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
            own = next(row[column] for column in OWN_SECONDS if column in row)
            plain = float(row.get("val_acc") or "nan")
            yield {"accuracy": float(row[ACCURACY]), "without_tta": plain, "own_s": float(own), "compiled": compiled}
        compiled = True


def write_images(folder: Path, data: str | None) -> None:
    """The data set as the scripts keep it, so that they download nothing: `cifar10/{train,test}.pt`."""
    found = load_dataset(data, download=False)
    (folder / "cifar10").mkdir()
    for name, split in (("train", found.train), ("test", found.test)):
        images = torch.from_numpy(split.images.transpose(0, 2, 3, 1).copy())
        content = {"images": images, "labels": torch.from_numpy(split.labels.copy()), "classes": list(found.classes)}
        torch.save(content, folder / "cifar10" / f"{name}.pt")


def require(checkout: Path, scripts: list[str]) -> None:
    """Errors: SystemExit for a script that is not there."""
    for script in scripts:
        if not (checkout / script).is_file():
            raise SystemExit(f"{checkout} has no {script}: give a checkout of KellerJordan/cifar10-airbench")


def measured(
    checkout: Path, scripts: list[str], data: str | None, runs: int = 3, starts: int = 2
) -> list[dict[str, Any]]:
    """A trial for each start of each script. Errors: SystemExit, in one line."""
    require(checkout, scripts)
    trials = []
    for script in scripts:
        with tempfile.TemporaryDirectory() as place:
            write_images(Path(place), data)
            for start in range(starts):
                found = time_script((checkout / script).absolute(), Path(place), runs)
                trials.append({"script": script, "start": "warm" if start else "cold", "runs": found})
                print(trials[-1], flush=True)
    return trials


def summary(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """By script: accuracies of every run, their own seconds without and with compilation, our seconds of each start."""
    scripts: dict[str, Any] = {}
    for trial in trials:
        of = scripts.setdefault(trial["script"], {name: [] for name in FIGURES})
        for run in trial["runs"]:
            of["accuracy"].append(run["accuracy"])
            of["own_s" if run["compiled"] else "own_compiling_s"].append(run["own_s"])
        of[f"{trial['start']}_s"].append(trial["runs"][0]["since_start_s"])
    return {"what": "seconds to the printed accuracy, their rule and ours", "scripts": scripts}


def table(found: dict[str, Any]) -> str:
    """The summary for a person."""
    lines = [f"{'script':24} {'n':>3} {'accuracy':>9} {'own rule':>9} {'cold start':>10} {'warm start':>10}  seconds"]
    for name, of in found["scripts"].items():
        mean = {key: sum(values) / len(values) if values else float("nan") for key, values in of.items()}
        lines.append(
            f"{name:24} {len(of['accuracy']):3} {100 * mean['accuracy']:8.2f}% {mean['own_s']:9.2f} "
            f"{mean['cold_s']:10.1f} {mean['warm_s']:10.1f}"
        )
    return "\n".join(lines)


def needs_cuda() -> str:
    """Why it cannot run here, or nothing."""
    return "" if torch.cuda.is_available() else "cifar10-airbench needs CUDA, and no CUDA device is visible"


def main() -> None:
    parser = argparse.ArgumentParser(description="cifar10-airbench's scripts by their rule and by ours.")
    parser.add_argument("checkout", type=Path, help="of KellerJordan/cifar10-airbench")
    parser.add_argument("--scripts", default=",".join(SCRIPTS))
    parser.add_argument("--runs", type=int, default=3, help="of one start of a script")
    parser.add_argument("--starts", type=int, default=2, help="of each script; the first is cold")
    parser.add_argument("--data", help="as `fastcifar train` takes it")
    arguments = parser.parse_args()
    if needs_cuda():
        print(needs_cuda(), file=sys.stderr)
        sys.exit(8)
    scripts = arguments.scripts.split(",")
    trials = measured(arguments.checkout, scripts, arguments.data, arguments.runs, arguments.starts)
    found = summary(trials)
    print(results_folder.write("airbench", collect_environment("cuda"), found, trials))
    print(table(found))


if __name__ == "__main__":
    main()
