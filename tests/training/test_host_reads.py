"""No operation of a training step reads a tensor on the host, which would synchronize with a GPU and end a capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from fastcifar.data.mixers import MIXERS
from fastcifar.recipe import Recipe
from fastcifar.training.build import build_trainer
from fastcifar.training.optimizers import OPTIMIZERS
from fastcifar.training.resolve import resolve

# On a CPU, torch's RMSprop counts its steps on the host; `capturable`, which is set on CUDA, changes that.
DEVICE_OPTIMIZERS = [name for name in OPTIMIZERS if name != "rmsprop"]
OPERATIONS_THAT_READ = ("_local_scalar_dense", "nonzero", "is_nonzero", "item")


class HostReads(TorchDispatchMode):
    """Records the operations that copy a value from a tensor to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::") in OPERATIONS_THAT_READ:
            self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes",
    [
        *({"optimizer": name, "ema_decay": 0.9} for name in ("lookahead:sgd", *DEVICE_OPTIMIZERS)),
        *({"augment": mixer} for mixer in MIXERS),
        {"optimizer": "ranger", "optimizer_arg": {"use_gc": False}, "bias_lr_mult": 2.0},
        {"optimizer": "sgd", "precision": "fp16", "clip_grad": "norm:1"},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_a_step_reads_nothing_on_the_host(tiny: Callable[..., Recipe], changes: dict[str, Any]) -> None:
    trainer = build_trainer(resolve(tiny(data="synthetic:240", **changes)))
    trainer.model.train()
    for batch in trainer.batches(0):
        with HostReads() as reads:
            trainer.train_step(batch)
        assert not reads.operations
    assert trainer.progress.step == 7  # in step 5 or 6, Lookahead has updated its slow weights
