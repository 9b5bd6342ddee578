"""Compiles kernels for a GPU that need not exist, in a process with the stub CUDA runtime preloaded.

    python stub_kernels.py FILE WORKLOAD...

torch.compile generates kernels for the compute capability in CUDA_STUB_CAPABILITY, and Triton and ptxas compile them.
FILE is a JSON document with one row for each compiled kernel, and the errors.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from stub_child import ignore_values
from stub_cudnn import replace_cudnn
from stub_faults import replace
from triton import knobs
from triton.backends.nvidia.compiler import CUDABackend

from fastcifar.data.augment import AUGMENTS
from fastcifar.data.mixers import MIXERS
from fastcifar.recipe import Recipe
from fastcifar.training.build import build_trainer
from fastcifar.training.evaluate import optimize_forward
from fastcifar.training.resolve import resolve
from fastcifar.training.trainer import Trainer

SMALL = {"arch": "resnet", "blocks": (1, 1), "channels": (8, 16), "se": "block"}
# what ptxas reports of a kernel -> pattern
PTXAS_PATTERNS = {
    "registers": r"Used (\d+) registers",
    "spill_store_bytes": r"(\d+) bytes spill stores",
    "spill_load_bytes": r"(\d+) bytes spill loads",
    "stack_bytes": r"(\d+) bytes stack frame",
}


def build(recipe: str | None = None, **options: Any) -> Trainer:
    """Return a trainer on synthetic images; steps and evaluation are compiled and captured."""
    fixed = {"data": "synthetic:2000", "val_size": 0, "device": "cuda", "loader": "tensor"}
    return build_trainer(resolve(Recipe.make(recipe, **{**fixed, **options})))


def compile_step(recipe: str | None = None, **options: Any) -> None:
    """Compile and capture the training step, for every image size of the recipe."""
    trainer = build(recipe, drop_last=True, **options)
    trainer.build_train_step()


def compile_loader(augment: str) -> None:
    """Compile the kernel that gathers and augments a batch."""
    trainer = build(augment=augment, drop_last=True, **SMALL)
    trainer.warm_up_loader()


def compile_evaluation(**options: Any) -> None:
    """Compile and capture the forward pass of an evaluation."""
    trainer = build(**options)
    optimize_forward(trainer.model, trainer.forward, trainer.device, compile=True, use_cuda_graph=True)


WORKLOADS: dict[str, Callable[[], None]] = {
    "step of se68": lambda: compile_step(arch="se68"),
    "step of se68_block": lambda: compile_step(arch="se68_block"),
    "step of se68 --fused-ops": lambda: compile_step(arch="se68", fused_ops=True),
    "step of se68_block --fused-ops": lambda: compile_step(arch="se68_block", fused_ops=True),
    "step of recipe speed94": lambda: compile_step("speed94"),
    "evaluation of se68": lambda: compile_evaluation(arch="se68"),
    "evaluation of speed94": lambda: compile_evaluation(recipe="speed94"),
    "loader, default augmentation": lambda: compile_loader(Recipe().augment),
    **{
        f"loader, {name}:{variant}".rstrip(":"): lambda name=name, variant=variant, value=spec.default_value: (
            compile_loader(":".join(filter(None, (name, "" if value is None else str(value), variant))))
        )
        for name, spec in AUGMENTS.items()
        for variant in spec.variants
    },
    **{f"step of a small network, {name}": lambda name=name: compile_step(augment=name, **SMALL) for name in MIXERS},
    "step of a small network": lambda: compile_step(**SMALL),
}


class Compilations:
    """The kernels that ptxas has compiled, and the errors."""

    def __init__(self) -> None:
        self.workload = ""
        self.kernels: list[dict[str, Any]] = []
        self.errors: list[dict[str, str]] = []
        knobs.nvidia.dump_ptxas_log = True  # printed by Triton, and read by `observe`
        replace(CUDABackend, "make_cubin", self._observe)

    def _observe(self, make_cubin: Callable[..., bytes]) -> Callable[..., bytes]:
        def run(backend: Any, ptx: Any, metadata: dict[str, Any], *args: Any) -> bytes:
            log = io.StringIO()
            row = {"workload": self.workload, "kernel": metadata["name"], "warps": metadata["num_warps"]}
            try:
                with contextlib.redirect_stdout(log):
                    cubin = make_cubin(backend, ptx, metadata, *args)
            except Exception as error:
                self.errors.append({**row, "error": str(error)})
                raise
            found = {name: re.search(pattern, log.getvalue()) for name, pattern in PTXAS_PATTERNS.items()}
            numbers = {name: int(match[1]) if match else 0 for name, match in found.items()}
            self.kernels.append({**row, **numbers, "shared_bytes": metadata["shared"]})
            return cubin

        return run

    @contextlib.contextmanager
    def attribute(self, workload: str) -> Iterator[None]:
        """Context whose kernels belong to `workload`; an exception is recorded."""
        self.workload = workload
        start, first = time.perf_counter(), len(self.kernels)
        try:
            yield
        except Exception:
            self.errors.append({"workload": workload, "error": traceback.format_exc()})
        seconds = time.perf_counter() - start
        print(f"{workload}: {len(self.kernels) - first} kernels in {seconds:.0f} s", file=sys.stderr, flush=True)


def main() -> None:
    faulthandler.enable()
    os.environ.pop("LD_PRELOAD")  # not for the compilers that Triton and inductor start
    file, *names = sys.argv[1:]
    replace_cudnn()
    ignore_values()
    compilations = Compilations()
    for name in names or WORKLOADS:
        with compilations.attribute(name):
            WORKLOADS[name]()
        torch.compiler.reset()
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    document = {"capability": capability, "kernels": compilations.kernels, "errors": compilations.errors}
    Path(file).write_text(json.dumps(document))


if __name__ == "__main__":
    main()
