"""Counts launches, replays and synchronizations of a training run, in a process with the stub CUDA runtime preloaded.

    python stub_launch_counts.py FOLDER OPTIONS

Trains with the recipe OPTIONS (JSON) and writes FOLDER/result.json; `bench/stub_launches.py` starts it and prints it.
"""

from __future__ import annotations

import faulthandler
import json
import linecache
import os
import re
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from stub_child import compile_one_configuration, ignore_values
from stub_cudnn import replace_cudnn
from stub_faults import replace
from stub_recording import OUTSIDE, Recording

import fastcifar
from fastcifar.recipe import Recipe
from fastcifar.training import train as train_module
from fastcifar.training.trainer import Trainer

PACKAGE = str(Path(fastcifar.__file__).parent)
FULL_STEPS = 64  # of an epoch, which ends with a step of half a batch
VALIDATION_IMAGES = 500
BETWEEN_EPOCHS, VALIDATION, CHECKPOINT = "between epochs", "validation", "checkpoint"

# cause of launches, once or more a step -> its name in the tables; the other causes belong to an epoch
PARTS_OF_STEPS = {
    "first batch": "loader",
    "next batch": "loader",
    "learning rate": "learning rate",
    "step": "step",  # copies to the inputs of its graph
    "between steps": "between steps",
    "Lookahead": "Lookahead",
    "metrics": "metrics",
}
# pattern of a kernel's name -> what the kernel is; the first match counts
KERNEL_GROUPS = {
    r"cudnn_convolution": "convolutions (library)",
    r"cublas": "matrix products (library)",
    r"triton_[a-z]+_fused_(_?(_to_copy|convolution_backward|convolution))+_\d+$": "casts (compiled)",
    r"triton_[a-z]+_fused_(_?(add|copy_))+_\d+$": "num_batches_tracked (compiled)",
    r"triton_": "other compiled kernels",
    r"copy from|memset": "copies and memsets",
    r"": "kernels of single operators",
}


class LaunchRecording(Recording):
    """A recording that also keeps the kernels of each captured graph, with the lines of the step that launch them."""

    def __init__(self) -> None:
        self.graphs: dict[str, Counter[tuple[str, str]]] = {}  # graph -> (kernel, line) -> number
        super().__init__()

    def _receive(self, kind: bytes, name: bytes) -> None:
        if kind == b"capture":
            self.graphs[name.decode()] = Counter()
        elif kind == b"captured launch":
            graph = next(reversed(self.graphs.values()))
            graph[name.decode(), find_line()] += 1
        else:
            super()._receive(kind, name)


def find_line() -> str:
    """Return the line of training/step.py that the main thread executes, else the innermost line of the package.

    The kernels of a backward pass are launched by another thread, while the main thread waits for it.
    """
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    stack = traceback.StackSummary.extract(traceback.walk_stack(sys._current_frames()[main_thread]), lookup_lines=False)
    frames = [frame for frame in stack if frame.filename.startswith(PACKAGE)]  # innermost first
    in_step = [frame for frame in frames if frame.filename.endswith("step.py")]
    if not frames:
        return "?"
    frame = in_step[-1] if in_step else frames[0]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return f"{Path(frame.filename).name}: {line}"


def record_run(options: dict[str, Any], folder: Path) -> LaunchRecording:
    """Train two epochs with the recipe `options` and return what was recorded between the first step and the test."""
    batch_size = options["batch_size"]
    images = FULL_STEPS * batch_size + batch_size // 2 + VALIDATION_IMAGES
    fixed = {"data": f"synthetic:{images}", "val_size": VALIDATION_IMAGES, "epochs": 2, "device": "cuda"}
    recipe = Recipe.make(**{**fixed, "loader": "tensor", "out": str(folder / "run"), **options})
    recording = LaunchRecording()
    ignore_values()
    recording.instrument()

    def wrap_epochs(run_epochs: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            recording.reset()  # what was recorded during the preparation
            with recording.attribute(BETWEEN_EPOCHS):
                run_epochs(*args)

        return run

    replace(train_module, "run_epochs", wrap_epochs)
    replace(train_module, "save_run_checkpoint", lambda save: recording.with_cause(save, CHECKPOINT))
    replace(Trainer, "validate", lambda validate: recording.with_cause(validate, VALIDATION))
    train_module.train(recipe)
    return recording


def group_of(kernel: str) -> str:
    return next(group for pattern, group in KERNEL_GROUPS.items() if re.match(pattern, kernel))


def summarize(recording: LaunchRecording) -> dict[str, Any]:
    """Return the tables of a run, and every kernel of the graph of a full step."""
    document = recording.document()
    counts, steps, epochs = document["counts"], document["steps"], document["epochs"]

    def per_step(kind: str) -> dict[str, float]:
        totals = tabulate((PARTS_OF_STEPS[cause], total) for cause, total in totals_of(kind) if cause in PARTS_OF_STEPS)
        return {part: round(total / steps, 2) for part, total in totals.items()}

    def per_epoch(kind: str) -> dict[str, float]:
        totals = tabulate((cause, total) for cause, total in totals_of(kind) if cause not in PARTS_OF_STEPS)
        return {cause: round(total / epochs, 2) for cause, total in totals.items()}

    def totals_of(kind: str) -> list[tuple[str, int]]:
        return [(cause, sum(by_kind.get(kind, {}).values())) for cause, by_kind in counts.items() if cause != OUTSIDE]

    replays = counts.get("step", {}).get("replay", {})
    step_graph = max(replays, key=replays.get) if replays else ""
    kernels = recording.graphs.get(step_graph, Counter())
    tables = {
        "launches in one replay of the graph of a full step, by kind": tabulate(
            (group_of(kernel), count) for (kernel, _), count in kernels.items()
        ),
        "the same, by the line of the step": tabulate(
            (f"{line} [{group_of(kernel)}]", count) for (kernel, line), count in kernels.items()
        ),
        "launches outside a graph, a step": per_step("launch"),
        "launches outside a graph, an epoch": per_epoch("launch"),
        "replays, a step": per_step("replay"),
        "replays, an epoch": per_epoch("replay"),
        "host synchronizations, a step": per_step("synchronization"),
        "host synchronizations, an epoch": per_epoch("synchronization"),
        "copies of pageable memory, an epoch": per_epoch("pageable copy"),
        "violations": {event["name"]: 1 for event in document["events"] if event["kind"] == "violation"},
    }
    rows = [
        {"kernel": kernel, "line": line, "group": group_of(kernel), "count": count}
        for (kernel, line), count in kernels.most_common()
    ]
    outside = [
        {"kernel": kernel, "cause": cause, "count": count, "steps": steps, "epochs": epochs}
        for cause, by_kind in counts.items()
        if cause != OUTSIDE
        for kernel, count in by_kind.get("launch", {}).items()
    ]
    return {"steps": steps, "epochs": epochs, "tables": tables, "kernels": rows + outside}


def tabulate(items: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Return the sums of the items with equal names, largest first, after their total."""
    totals: Counter[str] = Counter()
    for name, count in items:
        totals[name] += count
    return {"total": sum(totals.values()), **{name: count for name, count in totals.most_common() if count}}


def main() -> None:
    faulthandler.enable()
    os.environ.pop("LD_PRELOAD")  # not for the compilers that Triton and inductor start
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    replace_cudnn()
    compile_one_configuration()
    result = {"options": options, **summarize(record_run(options, folder))}
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
