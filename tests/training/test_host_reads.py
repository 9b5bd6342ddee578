"""No operation of an epoch reads a tensor on the host, which would synchronize with a GPU and end a capture.

These tests see the operations that torch chooses for the CPU. tests/cuda_stub runs those for CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastcifar.data.augment import AUGMENTS
from fastcifar.data.mixers import MIXERS
from fastcifar.models import MODELS, enable_fused_ops
from fastcifar.recipe import Recipe
from fastcifar.training.evaluate import VIEWS, predict_logits
from fastcifar.training.optimizers import OPTIMIZERS
from tests.models.networks import on_meta
from tests.training.optimizer_helpers import make_trainer

# On a CPU, torch's RMSprop counts its steps on the host; `capturable`, which is set on CUDA, changes that.
DEVICE_OPTIMIZERS = [name for name in OPTIMIZERS if name != "rmsprop"]
OPERATIONS_THAT_READ = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select", "_unique2")
OPERATIONS_WITH_INDICES = ("index", "index_put", "index_put_")  # they count the elements that a mask selects


class HostReads(TorchDispatchMode):
    """Records the operations that copy a value from a tensor to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        indices = args[1] if name in OPERATIONS_WITH_INDICES else []
        has_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        if name in OPERATIONS_THAT_READ or has_mask:
            self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.medium
@pytest.mark.parametrize(
    "changes",
    [
        *({"optimizer": name, "ema_decay": 0.9} for name in ("lookahead:sgd", *DEVICE_OPTIMIZERS)),
        {"optimizer": "ranger", "optimizer_arg": {"use_gc": False}, "bias_lr_mult": 2.0, "head_lr_mult": 3.0},
        {"optimizer": "lookahead:muon", "optimizer_arg": {"linear": True, "weight_norm": True, "nesterov": False}},
        {"optimizer": "sgd", "precision": "fp16", "clip_grad": "norm:1", "bias_decay": False},
        {"optimizer": "adamw", "precision": "bf16", "clip_grad": "none", "label_smoothing": 0.1, "dropout": 0.1},
        {"image_size": "24:1,32", "drop_last": True, "schedule": "one_cycle"},
        {"deterministic": False, "arch": "speed94", "blocks": None, "channels": None, "width": 0.125},
        *({"augment": name} for name in (*AUGMENTS, *MIXERS)),
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_an_epoch_reads_nothing_on_the_host(tiny: Callable[..., Recipe], changes: dict[str, Any]) -> None:
    trainer = make_trainer(tiny(data="synthetic:240", **changes))
    trainer.model.train()
    for epoch in range(2):  # of 7 steps; every 5 or 6 steps, Lookahead updates its slow weights
        trainer.progress.epoch, trainer.progress.epoch_step = epoch, 0
        with HostReads() as reads:
            for batch in trainer.batches(epoch):
                trainer.train_step(batch)
        assert not reads.operations
    assert trainer.progress.step == 2 * trainer.loader.steps_per_epoch >= 12


@pytest.mark.parametrize("tta", VIEWS)
def test_an_evaluation_reads_nothing_on_the_host_before_its_result(tiny: Callable[..., Recipe], tta: str) -> None:
    trainer = make_trainer(tiny(ema_decay=0.9))
    assert trainer.ema
    with HostReads() as reads, trainer.ema.averaged_weights():
        predict_logits(trainer.model, trainer.eval_forward, trainer.val_split, trainer.device, tta)
    assert not reads.operations


@pytest.mark.medium
@pytest.mark.parametrize("arch", MODELS)
def test_no_architecture_reads_a_tensor_on_the_host(arch: str) -> None:
    """Tensors on the meta device have no values, so that torch raises an error if one is read."""
    model = on_meta(arch, num_classes=10)
    model(torch.zeros(4, 3, 32, 32, device="meta")).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
    with pytest.raises(RuntimeError, match="meta tensors"):
        next(model.parameters()).sum().item()


def test_the_reference_of_the_fused_operations_reads_nothing_on_the_host(tiny: Callable[..., Recipe]) -> None:
    trainer = make_trainer(tiny(se="block"))
    enable_fused_ops(trainer.model)
    with HostReads() as reads:
        for batch in trainer.batches(0):
            trainer.train_step(batch)
    assert not reads.operations


@pytest.mark.parametrize(
    "operation",
    [
        lambda value, values: torch._foreach_add_(values, value),
        lambda value, values: torch._foreach_sub_(values, value),
        lambda value, values: torch._foreach_pow(values, value),
        lambda value, values: torch._foreach_lerp(values, values, value),
        lambda value, values: torch._foreach_clamp_min(values, value),
        lambda value, values: torch.add(values[0], values[0], alpha=value),
        lambda value, values: values[0].clamp_(min=0) if value > 0 else None,
        lambda value, values: float(value),
        lambda value, values: values[0][values[0] > 0],
    ],
)
def test_operations_that_read_a_tensor_are_recorded(operation: Callable[[Tensor, list[Tensor]], object]) -> None:
    """Functions for lists of tensors take a tensor where they expect a number, and read it."""
    with HostReads() as reads:
        operation(torch.tensor(2.0), [torch.ones(3)])
    assert reads.operations
