"""Runs cases with the stub CUDA runtime preloaded, each in a forked process, and writes what was recorded.

    python stub_child.py FOLDER NAME...

FOLDER/NAME.json is the result of case NAME. Kernels compute nothing, so tensors on the device hold arbitrary values;
`ignore_values` replaces the checks of the package that would read them.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from stub_cases import CASES, RECIPE, fault_case
from stub_cudnn import replace_cudnn
from stub_failed_captures import FAILED_CAPTURES
from stub_faults import FAULTS, replace
from stub_recording import EVALUATION, Recording

from fastcifar.data.loaders import TensorLoader
from fastcifar.python_objects import PythonObjects, use_objects
from fastcifar.recipe import Recipe
from fastcifar.training import checkpoint, evaluate
from fastcifar.training.build import build_trainer
from fastcifar.training.optimizers import OptimizerWrapper
from fastcifar.training.resolve import resolve
from fastcifar.training.step import Metrics
from fastcifar.training.train import train


def train_and_evaluate(recording: Recording, recipe: Recipe, folder: Path) -> None:
    """All epochs of `recipe` step by step, then the captured evaluation of the validation split."""
    trainer = build_trainer(resolve(recipe))
    trainer.optimize()
    trainer.model.train()
    for epoch in range(recipe.epochs):
        for batch in trainer.batches(epoch):
            trainer.train_step(batch)
            trainer.meter.compute_delayed()
        trainer.progress.epoch, trainer.progress.epoch_step = epoch + 1, 0
    with recording.attribute(EVALUATION):
        trainer.validate()


def train_and_resume(recording: Recording, recipe: Recipe, folder: Path) -> None:
    """A whole run with checkpoints, interrupted after an epoch and a half, and resumed."""
    run = folder / "run"
    train(recipe.model_copy(update={"out": str(run), "max_steps": 4}))
    train(recipe.model_copy(update={"resume": str(run)}))


def train_with_checkpoints(recording: Recording, recipe: Recipe, folder: Path) -> None:
    """A whole run, which saves as often as `recipe` specifies."""
    train(recipe.model_copy(update={"out": str(folder / "run")}))


def time_two_seeds(recording: Recording, recipe: Recipe, folder: Path) -> None:
    """A speedrun of two seeds, which share the captured step."""
    # This import looks for a GPU, after which a process must not be forked.
    from fastcifar.benchmark.speedrun import speedrun

    file = folder / "recipe.toml"
    file.write_text(recipe.to_toml())
    speedrun(recipe_name=str(file), n=2, eval_split="val", out=str(folder / "trials"))


def add_noise(images: torch.Tensor) -> torch.Tensor:
    return images ^ torch.randint(0, 2, images.shape, dtype=torch.uint8, device=images.device)


def train_with_noise(recording: Recording, recipe: Recipe, folder: Path) -> None:
    """The steps with a transform of batches from Python, which draws random numbers on the device."""
    with use_objects(PythonObjects(batch_transform=add_noise)):
        train_and_evaluate(recording, recipe, folder)


SCENARIOS = {
    "steps": train_and_evaluate,
    "noise": train_with_noise,
    "resume": train_and_resume,
    "checkpoints": train_with_checkpoints,
    "speedrun": time_two_seeds,
}


@contextmanager
def any_learning_rate() -> Iterator[None]:
    """Context in which torch's optimizers accept a learning rate on the device, whose value is arbitrary."""
    results = {"__lt__": False, "__ge__": True}  # comparison -> its result for a learning rate and 0.0
    originals = {name: getattr(torch.Tensor, name) for name in results}

    def compare(name: str, tensor: torch.Tensor, other: Any) -> Any:
        is_check = tensor.is_cuda and tensor.ndim == 0 and isinstance(other, float) and other == 0
        return results[name] if is_check else originals[name](tensor, other)

    for name in results:
        setattr(torch.Tensor, name, lambda tensor, other, name=name: compare(name, tensor, other))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch.Tensor, name, original)


def save_finite_weights(save_checkpoint: Callable[..., None]) -> Callable[..., None]:
    """`save_checkpoint` with NaN and Inf replaced, which it would refuse."""

    def save(path: Path, state: Mapping[str, Any], **options: Any) -> None:
        weights = {
            part: {name: value.cpu().nan_to_num() for name, value in state[part].items()}
            for part in ("model", "ema")
            if state[part]
        }
        save_checkpoint(path, {**state, **weights}, **options)

    return save


def read_metrics(sums: torch.Tensor) -> Metrics:
    """Wait for the sums of the meter, and return metrics without a NaN."""
    sums.tolist()
    return Metrics(loss=1.0, accuracy=0.0, images=1, nonfinite_steps=0)


def ignore_values() -> None:
    """Accept arbitrary learning rates, metrics, weights and logits."""

    def build_with_any_learning_rate(build: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            with any_learning_rate():
                build(*args)

        return run

    replace(OptimizerWrapper, "__init__", build_with_any_learning_rate)
    replace(Metrics, "from_sums", lambda _: read_metrics)
    replace(checkpoint, "save_checkpoint", save_finite_weights)
    replace(
        evaluate,
        "compute_scores",
        lambda compute_scores: lambda logits, labels: compute_scores(torch.zeros_like(logits), labels),
    )


def compile_one_configuration() -> None:
    """Compile only the first block size of each kernel: durations mean nothing, so torch would choose it anyway."""
    # This import looks for a GPU, after which a process must not be forked.
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    def wrap(initialize: Callable[..., None]) -> Callable[..., None]:
        def run(tuner: Any, fn: Any, triton_meta: Any, configs: list[Any], *args: Any, **keywords: Any) -> None:
            initialize(tuner, fn, triton_meta, configs[:1], *args, **keywords)

        return run

    replace(CachingAutotuner, "__init__", wrap)


def run_case(name: str, folder: Path) -> None:
    """Run the case or planted fault `name` and write its result."""
    ignore_values()
    TensorLoader.chunk_images = {"cuda": 64}  # two chunks in an epoch, instead of a single one
    recording = Recording()
    recording.instrument()
    if name in FAILED_CAPTURES:
        outcome = FAILED_CAPTURES[name](Recipe.make(**RECIPE), folder)
        (folder / "result.json").write_text(json.dumps({**recording.document(), "outcome": outcome}))
        return
    if name in FAULTS:
        plant, options, _ = FAULTS[name]
        plant()
        case = fault_case(options)
    else:
        case = CASES[name]
    recipe = Recipe.make(**{**RECIPE, **case.options})
    if recipe.compile:
        compile_one_configuration()
    error = None
    try:
        SCENARIOS[case.scenario](recording, recipe, folder)
    except Exception:
        error = traceback.format_exc()
    backends: Any = torch.backends  # torch's annotations lack `conv`
    float32_precision = {
        "cuda.matmul.fp32_precision": backends.cuda.matmul.fp32_precision,
        "cudnn.fp32_precision": backends.cudnn.fp32_precision,
        "cudnn.conv.fp32_precision": backends.cudnn.conv.fp32_precision,
    }
    result = {**recording.document(), "float32_precision": float32_precision, "error": error}
    (folder / "result.json").write_text(json.dumps(result))


def main() -> None:
    faulthandler.enable()  # a function that is not replaced may end the process
    os.environ.pop("LD_PRELOAD")  # not for the processes that the package starts
    replace_cudnn()
    importlib.import_module("torch._dynamo")  # here, because its import takes longer than most cases
    gc.collect()
    gc.freeze()  # the cases collect garbage before every capture
    folder, *names = sys.argv[1:]
    for name in names:
        case_folder = Path(folder) / name
        case_folder.mkdir(parents=True)
        process = os.fork()
        if process == 0:
            run_case(name, case_folder)
            os._exit(0)
        os.waitpid(process, 0)


if __name__ == "__main__":
    main()
