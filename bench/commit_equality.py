"""The cases of `equality.py --against COMMIT` for one source tree: digests of everything that a case computes.

    PYTHONPATH=TREE python bench/commit_equality.py FOLDER      prints one JSON document: case -> {quantity: SHA-256}

The package is used only through its command line and observed by hooks on torch's modules, so that the same script can
run an older source tree. It uses only options that have the same names in both.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SHARED = ["--device", "cpu", "--precision", "fp32", "--no-compile", "--data", "synthetic:1000", "--val-size", "100"]
NETWORKS = {
    "se68": ["--arch", "se68", "--width", "0.25", "--batch-size", "32"],
    "row5": ["--recipe", "row5", "--width", "0.25"],
    "coconut": ["--recipe", "coconut", "--width", "0.25", "--batch-size", "32"],
    "speed94": ["--recipe", "speed94", "--width", "0.25", "--batch-size", "128", "--image-size", "24:1,28:1,32"],
    "best200 with CutMix": ["--recipe", "best200", "--width", "0.125", "--batch-size", "32",
                            "--augment", "crop:4:reflect,flip,trivialaugment:wide,cutmix"],
}  # fmt: skip
TINY = ["--arch", "resnet", "--blocks", "1,1", "--channels", "8,16", "--batch-size", "100"]
AUGMENTS = (
    "none", "crop:4:zero", "crop:4:reflect", "flip", "flip:0.5:alternating", "cutout:8:mean", "cutout:8", "rotate:15",
    "jitter:0.2", "erase", "autoaugment:cifar10", "randaugment", "trivialaugment", "trivialaugment:wide", "mixup",
    "cutmix", "ricap", "crop:4:zero,flip,rotate:5,autoaugment:cifar10",
)  # fmt: skip


class Observer:
    """Digests of the input images and the logits of every network, computed by hooks on all modules."""

    def __init__(self) -> None:
        self.inputs, self.logits = hashlib.sha256(), hashlib.sha256()

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Return a context in which the hooks are registered."""
        modules = torch.nn.modules.module
        before = modules.register_module_forward_pre_hook(self._before)
        after = modules.register_module_forward_hook(self._after)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _before(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Conv2d) and isinstance(inputs[0], Tensor) and inputs[0].shape[1] == 3:
            self.inputs.update(tensor_bytes(inputs[0]))

    def _after(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, nn.Linear) and module.out_features == 10:
            self.logits.update(tensor_bytes(output))


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return the values of a tensor in the order of its dimensions, independently of its memory format."""
    if tensor.device.type == "meta":
        return b""
    return tensor.detach().contiguous().numpy().tobytes()


def digest(value: Any) -> str:
    """Return the SHA-256 of nested dicts, lists, tensors and plain values."""
    sha256 = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, Tensor):
            sha256.update(f"{item.dtype} {tuple(item.shape)}".encode() + tensor_bytes(item))
        elif isinstance(item, dict):
            for key in sorted(item, key=str):
                sha256.update(str(key).encode())
                add(item[key])
        elif isinstance(item, list | tuple):
            for element in item:
                add(element)
        else:
            sha256.update(repr(item).encode())

    add(value)
    return sha256.hexdigest()


def fastcifar(*arguments: str) -> str:
    """Run the command and return its standard output. Raises `RuntimeError` with the exit code if it fails."""
    output, argv = io.StringIO(), sys.argv
    sys.argv = ["fastcifar", *arguments]
    try:
        with contextlib.redirect_stdout(output):
            runpy.run_module("fastcifar", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{' '.join(arguments)} ended with exit code {end.code}") from None
    finally:
        sys.argv = argv
    return output.getvalue()


def run_observed(*arguments: str) -> tuple[dict[str, str], str]:
    """Run the command and return the digests of images and logits, and its output."""
    observer = Observer()
    with observer.hooks():
        output = fastcifar(*arguments)
    return {"images": observer.inputs.hexdigest(), "logits": observer.logits.hexdigest()}, output


def checkpoint_digests(folder: Path) -> dict[str, str]:
    """Return digests of the weights, their moving average and the optimizer state in the last checkpoint of a run."""
    state = torch.load(folder / "checkpoints" / "last.pt", map_location="cpu", weights_only=True)
    return {name: digest(state[name]) for name in ("model", "ema", "optimizer")}


def train(folder: Path, arguments: list[str], steps: int) -> dict[str, str]:
    """Train for a number of steps in `folder` and return the digests."""
    digests, _ = run_observed("train", *arguments, *SHARED, "--max-steps", str(steps), "--out", str(folder))
    return {**digests, **checkpoint_digests(folder)}


def run_cases(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the name and the digests of every case."""
    for name, arguments in NETWORKS.items():
        for loader in ("tensor", "dali"):
            case, run = f"{name}, 20 steps, {loader} loader", folder / f"{name.split()[0]}-{loader}"
            yield case, train(run, [*arguments, "--loader", loader], 20)
            stopped = run.with_name(f"{run.name}-stopped")
            train(stopped, [*arguments, "--loader", loader], 10)
            fastcifar("train", "--resume", str(stopped), "--max-steps", "20")
            yield f"{name}, 10 steps, stopped, resumed to 20, {loader} loader", checkpoint_digests(stopped)
    run = folder / "se68-tensor"
    digests, output = run_observed("eval", str(run), "--data", "synthetic:1000", "--device", "cpu", "--json")
    scores = json.loads(output.splitlines()[-1])
    yield "eval", {**digests, "scores": digest({name: scores[name] for name in ("test_acc", "test_loss", "correct")})}
    predictions = folder / "predictions.csv"
    options = ["--data", "synthetic:1000", "--device", "cpu", "--probabilities", "--out", str(predictions)]
    digests, _ = run_observed("predict", str(run), "data:test", *options)
    yield "predict", {**digests, "file": hashlib.sha256(predictions.read_bytes()).hexdigest()}
    for number, augment in enumerate(AUGMENTS):
        yield f"augmentation {augment}", train(folder / f"augment-{number}", [*TINY, "--augment", augment], 10)


def main(folder: Path) -> None:
    """Run all cases in `folder` and print the JSON document."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    print(json.dumps(dict(run_cases(folder))))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
