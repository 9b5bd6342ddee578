"""Two comparisons: the training step in its forms against the eager one, and this working tree against an older commit.

    python bench/equality.py [--device cuda --steps 20 --quick]
    python bench/equality.py --against COMMIT

The first runs in one process: eager = compiled = CUDA graph. It ends with one JSON document, `{"device", "versions",
"forms", "checks", "passed"}`, and exits 1 if a check failed. A form that this device does not have (a CUDA graph on a
CPU) is left out, and said to be. The network is smooth (SiLU),
for an activation within a rounding of 0 is on one side of ReLU's kink or the other; float32 is without TF32, and cuDNN
chooses its algorithms without trying them. `--quick` takes a tiny network on synthetic images.

The second checks COMMIT out into a temporary git worktree, runs the cases of `commit_equality.py` with both trees
through the command line (CPU, one thread, float32, no compilation) and compares SHA-256 digests: of every network's
input (the augmented, normalized images), of the logits, of the weights, average and optimizer state in the last
checkpoint, and of what `eval` and `predict` report. It prints a Markdown table and ends with one JSON document.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcifar.benchmark.bench import EXECUTION_MODES, prepare_bench_recipe
from fastcifar.device import choose_execution, describe_device, package_versions
from fastcifar.recipe import Recipe
from fastcifar.training.build import build_trainer
from fastcifar.training.resolve import resolve
from fastcifar.training.step import TrainStep
from fastcifar.training.trainer import Trainer

LOSSES = {"fp32": 1e-5, "bf16": 2e-2}  # how far losses may be apart, absolutely, at a small learning rate
WEIGHTS = 1e-5  # and all weights together after a step from the same state at a large one, relative to their norm
SMALL, LARGE = 1e-3, 0.1
QUICK = {"arch": "resnet", "blocks": (1, 1), "channels": (8, 16), "batch_size": 32, "data": "synthetic:200"}
Form = tuple[Trainer, TrainStep]
Check = dict[str, Any]


def checks(recipe: Recipe, modes: list[str], steps: int) -> list[Check]:
    """Every check of every mode but eager, in float32 and bf16."""
    found: list[Check] = []
    for precision in LOSSES:
        torch.compiler.reset()
        forms = {mode: form(recipe, mode, precision) for mode in modes}
        batches = full_batches(forms["eager"][0], steps)
        found += equal_losses(forms, batches, precision)
        if precision == "fp32":
            found += equal_steps(forms, batches)
        if forms["eager"][0].device.type == "cuda":
            found += [asks_nothing(mode, *forms[mode]) for mode in modes]
    return found


def form(recipe: Recipe, mode: str, precision: str) -> Form:
    """The parts of a run in `mode`, and its step, with its Lookahead's and meter's state as at the start."""
    changed = Recipe.from_dict({**recipe.model_dump(), **EXECUTION_MODES[mode], "precision": precision})
    parts = build_trainer(resolve(changed))
    torch.backends.cudnn.benchmark = False  # a run has it on
    return parts, parts.build_train_step()


def full_batches(parts: Trainer, count: int) -> list[tuple[Tensor, ...]]:
    """The run's first full batches, of as many epochs as it takes, in memory of their own."""
    batches = itertools.chain.from_iterable(map(parts.batches, itertools.count()))
    full = (batch for batch in batches if len(batch[1]) == parts.recipe.batch_size)
    return [tuple(tensor.clone() for tensor in batch) for batch in itertools.islice(full, count)]


def equal_losses(forms: dict[str, Form], batches: list[tuple[Tensor, ...]], precision: str) -> list[Check]:
    """Every form goes its own way for all batches at a small learning rate: the losses stay together."""
    losses = {mode: [] for mode in forms}
    for mode, (parts, step) in forms.items():
        parts.optimizer.set_lr(SMALL)
        for done, batch in enumerate(batches, start=1):
            parts.meter.reset()
            step(*batch)
            parts.optimizer.after_step(done)
            losses[mode].append(parts.meter.compute().loss)
    return [
        verdict(
            f"losses of {len(batches)} steps at a learning rate of {SMALL:g}, {precision}",
            mode,
            max(abs(mine - eager) for mine, eager in zip(losses[mode], losses["eager"], strict=True)),
            LOSSES[precision],
        )
        for mode in forms
        if mode != "eager"
    ]


def equal_steps(forms: dict[str, Form], batches: list[tuple[Tensor, ...]]) -> list[Check]:
    """Every step starts from eager's own state, at a large learning rate: the weights after it are the same.

    All of them together; the furthest single tensor, perhaps a bias that began at 0 and holds one rounded gradient, is
    reported beside it.
    """
    eager, plain = forms["eager"]
    together, single = ({mode: 0.0 for mode in forms if mode != "eager"} for _ in range(2))
    for parts, _ in forms.values():
        parts.optimizer.set_lr(LARGE)
    for batch in batches:
        before = [tensor.clone() for tensor in eager.state_tensors()]
        plain(*batch)
        for mode in together:
            parts, step = forms[mode]
            with torch.no_grad():
                for mine, other in zip(parts.state_tensors(), before, strict=True):
                    mine.copy_(other)
            step(*batch)
            pairs = list(zip(parts.model.parameters(), eager.model.parameters(), strict=True))
            apart = torch.stack([(mine - other).norm() for mine, other in pairs])
            norms = torch.stack([other.norm() for _, other in pairs])
            together[mode] = furthest(together[mode], apart.norm() / norms.norm())
            single[mode] = furthest(single[mode], (apart / norms)[norms > 0].max())
    about = f"weights after each of {len(batches)} steps at a learning rate of {LARGE:g} from eager's state, fp32"
    return [verdict(about, mode, apart, WEIGHTS) | {"largest_tensor": single[mode]} for mode, apart in together.items()]


def furthest(so_far: float, apart: Tensor) -> float:
    """The larger of both; a NaN is the furthest."""
    found = apart.item()
    return found if not found <= so_far else so_far


def asks_nothing(mode: str, parts: Trainer, step: TrainStep) -> Check:
    """Three batches and their steps while any wait of the host for the device is an error."""
    batches = parts.batches(0)
    step(*next(batches))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in itertools.islice(batches, 3):
            step(*batch)
        problem = ""
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    about = f"no wait for the device in a step and its batch, {parts.execution.precision}"
    return {"check": about, "form": mode, "passed": not problem, **({"problem": problem} if problem else {})}


def verdict(about: str, mode: str, largest: float, limit: float) -> Check:
    """A check by how far the furthest pair is apart; a NaN fails."""
    return {"check": about, "form": mode, "largest": largest, "limit": limit, "passed": largest <= limit}


def exactly(work: Callable[[], list[Check]]) -> list[Check]:
    """`work` with float32 as float32, and cuDNN's algorithms deterministic and chosen without a trial."""
    backends = torch.backends
    cudnn, matmul = backends.cudnn, backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark, cudnn.deterministic
    cudnn.allow_tf32 = matmul.allow_tf32 = cudnn.benchmark = False
    cudnn.deterministic = True
    try:
        return work()
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark, cudnn.deterministic = before


def compared(device: str, steps: int, quick: bool) -> dict[str, Any]:
    """The document."""
    recipe = prepare_bench_recipe(
        Recipe.make(activation="silu", device=device, loader="tensor", **(QUICK if quick else {}))
    )
    graphs = choose_execution(recipe).device == "cuda"
    modes = [mode for mode in EXECUTION_MODES if graphs or not EXECUTION_MODES[mode]["cuda_graph"]]
    found = exactly(lambda: checks(recipe, modes, steps))
    return {
        "device": describe_device(device),
        "versions": package_versions(),
        "forms": modes,
        "left_out": [mode for mode in EXECUTION_MODES if mode not in modes],
        "checks": found,
        "passed": all(check["passed"] for check in found),
    }


def against(commit: str) -> dict[str, Any]:
    """The document of `--against`: every digest of this working tree equal to that of `commit`, or not."""
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as temporary:
        older = Path(temporary) / "older"
        subprocess.run(["git", "worktree", "add", "--detach", str(older), commit], cwd=root, check=True)
        try:
            trees = {"before": older, "after": root}
            digests = {name: run_cases(tree, Path(temporary) / name) for name, tree in trees.items()}
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(older)], cwd=root, check=True)
    before, after = digests["before"], digests["after"]
    rows = [
        {"case": case, **{what: value == after.get(case, {}).get(what) for what, value in found.items()}}
        for case, found in before.items()
    ]
    same = before.keys() == after.keys() and all(value for row in rows for value in row.values())
    return {
        "commit": commit,
        "device": describe_device("cpu"),
        "versions": package_versions(),
        "checks": rows,
        "passed": same,
    }


def run_cases(tree: Path, folder: Path) -> dict[str, dict[str, str]]:
    """What `commit_equality.py` of this tree prints, with the package of `tree`."""
    script = Path(__file__).with_name("commit_equality.py")
    alone = {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(script), str(folder)]
    run = subprocess.run(command, env={**os.environ, **alone}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The checks of `--against` as a table: a case per row, a digest per column."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    spell = {True: "equal", False: "DIFFERS", None: ""}
    lines = [columns, ["---"] * len(columns)]
    lines += [[row["case"], *(spell[row.get(name)] for name in columns[1:])] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The training step in its forms against the eager one.")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="a tiny network on synthetic images")
    parser.add_argument("--against", metavar="COMMIT", help="compare this working tree with an older commit instead")
    arguments = parser.parse_args()
    if arguments.against:
        document = against(arguments.against)
        print(markdown(document["checks"]))
    else:
        document = compared(arguments.device, arguments.steps, arguments.quick)
    print(json.dumps(document))
    sys.exit(not document["passed"])
