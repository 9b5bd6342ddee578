"""Numerical equality of the forms of the training step, or of this working tree and an older commit.

    python bench/equality.py [--device cuda --steps 20 --quick]
    python bench/equality.py --against COMMIT

The first command compares the eager training step with the compiled one and with the CUDA graph, in one process. It
ends with one JSON document, `{"device", "versions", "forms", "left_out", "checks", "passed"}`, and exits 1 if a check
failed. Forms that the device does not support (a CUDA graph on a CPU) are left out. The network uses SiLU, because ReLU
amplifies rounding errors around 0, and cuDNN uses deterministic algorithms without autotuning.
`--quick` uses a tiny network on synthetic images.

The second command checks COMMIT out into a temporary git worktree, runs the cases of `commit_equality.py` with both
trees through the command line (CPU, one thread, float32, no compilation) and compares SHA-256 digests: of the input of
every network (the augmented, normalized images), of the logits, of the weights, moving average and optimizer state in
the last checkpoint, and of the results of `eval` and `predict`. It prints a Markdown table and ends with one JSON
document.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

import results_folder
import torch
from torch import Tensor

from fastcifar.benchmark.bench import EXECUTION_MODES, prepare_bench_recipe
from fastcifar.device import choose_execution, collect_environment
from fastcifar.recipe import Recipe
from fastcifar.training.build import build_trainer
from fastcifar.training.lr_schedule import constant_lr
from fastcifar.training.resolve import resolve
from fastcifar.training.trainer import Trainer

MAX_LOSS_DIFFERENCE = {"fp32": 1e-5, "bf16": 2e-2}  # absolute, after steps at the small learning rate
MAX_WEIGHT_DIFFERENCE = 1e-5  # norm relative to that of all weights, after one step at the large learning rate
SMALL_LR, LARGE_LR = 1e-3, 0.1
QUICK = {"arch": "resnet", "blocks": (1, 1), "channels": (8, 16), "batch_size": 32, "data": "synthetic:200"}
Check = dict[str, Any]


def run_checks(recipe: Recipe, modes: list[str], steps: int) -> list[Check]:
    """Return the checks of every mode except eager, in float32 and bf16."""
    checks: list[Check] = []
    for precision in MAX_LOSS_DIFFERENCE:
        torch.compiler.reset()
        forms = {mode: build_form(recipe, mode, precision) for mode in modes}
        batches = full_batches(forms["eager"], steps)
        checks += compare_losses(forms, batches, precision)
        if precision == "fp32":
            checks += compare_weights(forms, batches)
        if forms["eager"].device.type == "cuda":
            checks += [check_no_synchronization(mode, forms[mode]) for mode in modes]
    return checks


def build_form(recipe: Recipe, mode: str, precision: str) -> Trainer:
    """Return a new trainer in the execution mode `mode`."""
    changed = Recipe(**{**recipe.model_dump(), **EXECUTION_MODES[mode], "precision": precision})
    trainer = build_trainer(resolve(changed))
    torch.backends.cudnn.benchmark = False  # `build_trainer` enables it
    trainer.optimize()
    return trainer


def full_batches(trainer: Trainer, count: int) -> list[tuple[Tensor, ...]]:
    """Return copies of the first `count` full batches of training, over as many epochs as needed."""
    batches = itertools.chain.from_iterable(map(trainer.batches, itertools.count()))
    full = (batch for batch in batches if len(batch[1]) == trainer.recipe.batch_size)
    return [tuple(tensor.clone() for tensor in batch) for batch in itertools.islice(full, count)]


def compare_losses(forms: dict[str, Trainer], batches: list[tuple[Tensor, ...]], precision: str) -> list[Check]:
    """Train every form on all batches at the small learning rate, and compare the losses with those of eager."""
    losses = {mode: [] for mode in forms}
    for mode, trainer in forms.items():
        trainer.schedule = constant_lr(trainer.recipe, SMALL_LR)
        for batch in batches:
            trainer.meter.reset()
            trainer.train_step(batch)
            losses[mode].append(trainer.meter.compute().loss)
    return [
        make_check(
            f"losses of {len(batches)} steps at a learning rate of {SMALL_LR:g}, {precision}",
            mode,
            max(abs(loss - eager) for loss, eager in zip(losses[mode], losses["eager"], strict=True)),
            MAX_LOSS_DIFFERENCE[precision],
        )
        for mode in forms
        if mode != "eager"
    ]


def compare_weights(forms: dict[str, Trainer], batches: list[tuple[Tensor, ...]]) -> list[Check]:
    """Start every step from the state of eager, at the large learning rate, and compare the weights after it.

    The check uses the norm of the difference of all weights. The largest difference of a single tensor is reported too;
    it may be that of a bias that was initialized to 0 and so consists of one rounded gradient.
    """
    eager = forms["eager"]
    overall, single = ({mode: 0.0 for mode in forms if mode != "eager"} for _ in range(2))
    for trainer in forms.values():
        trainer.schedule = constant_lr(trainer.recipe, LARGE_LR)
    for batch in batches:
        before = [tensor.clone() for tensor in eager.state_tensors()]
        progress = replace(eager.progress)
        eager.train_step(batch)
        for mode in overall:
            trainer = forms[mode]
            trainer.progress = replace(progress)
            with torch.no_grad():
                for tensor, value in zip(trainer.state_tensors(), before, strict=True):
                    tensor.copy_(value)
            trainer.train_step(batch)
            pairs = list(zip(trainer.model.parameters(), eager.model.parameters(), strict=True))
            differences = torch.stack([(weight - expected).norm() for weight, expected in pairs])
            norms = torch.stack([expected.norm() for _, expected in pairs])
            overall[mode] = max_or_nan(overall[mode], differences.norm() / norms.norm())
            single[mode] = max_or_nan(single[mode], (differences / norms)[norms > 0].max())
    name = f"weights after each of {len(batches)} steps at a learning rate of {LARGE_LR:g} from eager's state, fp32"
    return [
        make_check(name, mode, largest, MAX_WEIGHT_DIFFERENCE) | {"largest_tensor": single[mode]}
        for mode, largest in overall.items()
    ]


def max_or_nan(largest: float, difference: Tensor) -> float:
    """Return the larger value, or NaN if `difference` is NaN."""
    value = difference.item()
    return value if not value <= largest else largest


def check_no_synchronization(mode: str, trainer: Trainer) -> Check:
    """Check that three batches and their training steps do not synchronize the host with the device."""
    batches = trainer.batches(0)
    trainer.train_step(next(batches))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in itertools.islice(batches, 3):
            trainer.train_step(batch)
        problem = ""
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    name = f"no host synchronization in a step and its batch, {trainer.execution.precision}"
    return {"check": name, "form": mode, "passed": not problem, **({"problem": problem} if problem else {})}


def make_check(name: str, mode: str, largest: float, limit: float) -> Check:
    """Return the result of a check on the largest difference; NaN fails."""
    return {"check": name, "form": mode, "largest": largest, "limit": limit, "passed": largest <= limit}


def without_autotuning(work: Callable[[], list[Check]]) -> list[Check]:
    """Call `work` with cuDNN's algorithms deterministic and not autotuned."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        return work()
    finally:
        cudnn.benchmark, cudnn.deterministic = before


def compare_forms(device: str, steps: int, quick: bool) -> dict[str, Any]:
    """Return the document of the comparison of the forms of the training step."""
    recipe = prepare_bench_recipe(
        Recipe.make(activation="silu", device=device, loader="tensor", **(QUICK if quick else {}))
    )
    graphs = choose_execution(recipe).device == "cuda"
    modes = [mode for mode in EXECUTION_MODES if graphs or not EXECUTION_MODES[mode]["cuda_graph"]]
    checks = without_autotuning(lambda: run_checks(recipe, modes, steps))
    environment = collect_environment(device)
    return {
        "device": environment.device,
        "versions": environment.versions,
        "forms": modes,
        "left_out": [mode for mode in EXECUTION_MODES if mode not in modes],
        "checks": checks,
        "passed": all(check["passed"] for check in checks),
    }


def compare_with_commit(commit: str) -> dict[str, Any]:
    """Return the document of `--against`: whether each digest of this working tree equals that of `commit`."""
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
    checks = [
        {"case": case, **{name: value == after.get(case, {}).get(name) for name, value in digests_before.items()}}
        for case, digests_before in before.items()
    ]
    passed = before.keys() == after.keys() and all(value for check in checks for value in check.values())
    environment = collect_environment("cpu")
    return {
        "commit": commit,
        "device": environment.device,
        "versions": environment.versions,
        "checks": checks,
        "passed": passed,
    }


def run_cases(tree: Path, folder: Path) -> dict[str, dict[str, str]]:
    """Run `commit_equality.py` of this working tree with the package of `tree`, and return its document."""
    script = Path(__file__).with_name("commit_equality.py")
    variables = {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(script), str(folder)]
    run = subprocess.run(command, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout)


def format_markdown(checks: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the checks of `--against` with a row for each case and a column for each digest."""
    columns = list(dict.fromkeys(name for check in checks for name in check))
    texts = {True: "equal", False: "DIFFERS", None: ""}
    lines = [columns, ["---"] * len(columns)]
    lines += [[check["case"], *(texts[check.get(name)] for name in columns[1:])] for check in checks]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Numerical equality of the forms of the training step, or with an older commit."
    )
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--steps", type=int, default=20, help="number of steps of each comparison, by default 20")
    parser.add_argument("--quick", action="store_true", help="use a tiny network on synthetic images")
    parser.add_argument("--against", metavar="COMMIT", help="compare this working tree with an older commit instead")
    parser.add_argument("--record", action="store_true", help="write the result of --against to bench/results")
    arguments = parser.parse_args()
    if arguments.against:
        document = compare_with_commit(arguments.against)
        print(format_markdown(document["checks"]))
        if arguments.record:
            summary = {key: value for key, value in document.items() if key not in ("checks", "versions")}
            print(results_folder.write("equality", collect_environment("cpu"), summary, document["checks"]))
    else:
        document = compare_forms(arguments.device, arguments.steps, arguments.quick)
    print(json.dumps(document))
    sys.exit(not document["passed"])
