"""Tests of collective operations with simulated ranks; tests/faults/test_ranks.py starts processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastcifar.errors import NonFiniteError
from fastcifar.recipe import Recipe
from fastcifar.training import build, cuda_graph
from fastcifar.training.distributed import World
from fastcifar.training.step import Meter
from fastcifar.training.trainer import Trainer
from tests.training.optimizer_helpers import make_trainer

NUM_RANKS = 4


def make_rank_trainer(recipe: Recipe, rank: int, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    monkeypatch.setattr(build, "get_world", lambda: World(rank, NUM_RANKS))
    return make_trainer(recipe)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch_size", "counts"),
    [
        (40, [10, 10, 9, 9]),  # the last of 158 images are 38: full shares for two of the ranks
        (60, [10, 10, 9, 9]),
        (44, [7, 7, 6, 6]),
    ],
)
def test_all_ranks_capture_and_replay_the_same_functions(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, batch_size: int, counts: list[int]
) -> None:
    """Compare the sequences of captures, replays and all-reduces, in which a difference would be a deadlock."""
    events: list[object] = []

    def capture(work: Callable[[], object]) -> Callable[[], object]:
        number = sum(str(event).startswith("capture") for event in events)
        events.append(f"capture {number}")
        return lambda: (events.append(f"replay {number}"), work())

    monkeypatch.setattr(cuda_graph, "capture_cuda_graph", capture)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, *_: events.append(tensor.shape))
    monkeypatch.setattr(dist, "all_gather_object", lambda *_: events.append("gather"))  # of failed captures
    recipe = tiny(val_size=42, batch_size=batch_size, image_size="24:1,32", epochs=2)
    sequences, last_counts = [], []
    for rank in range(NUM_RANKS):
        events.clear()
        last_count = 0
        trainer = make_rank_trainer(recipe, rank, monkeypatch)
        trainer.resolved = replace(trainer.resolved, execution=replace(trainer.execution, cuda_graph=True))
        trainer.optimize()
        for epoch in range(2):
            trainer.progress.epoch, trainer.progress.epoch_step = epoch, 0
            for batch in trainer.batches(epoch):
                trainer.train_step(batch)
                last_count = len(batch[1])
        last_counts.append(last_count)
        sequences.append(events.copy())
    assert last_counts == counts
    assert all(sequence == sequences[0] for sequence in sequences)
    replays = [event for event in sequences[0] if str(event).startswith("replay")]
    full_steps = 158 // batch_size
    assert replays == [*full_steps * ["replay 0"], "replay 2", *full_steps * ["replay 1"], "replay 3"]


class Operations(TorchDispatchMode):
    """Records the names of all operations, and the number of elements of the first argument if it is a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func._schema.name.removeprefix("aten::"), args[0].numel() if type(args[0]) is Tensor else 0))
        return func(*args, **(kwargs or {}))


def test_a_meter_counts_the_images_of_all_ranks_and_the_non_finite_steps_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [Meter(torch.device("cpu"), World(rank, 2)) for rank in range(2)]
    sums = torch.zeros(4, dtype=torch.float64)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, operation: tensor.copy_(sums))
    ranks[0].update(torch.tensor(0.5), torch.tensor(3), 4)
    ranks[1].update(torch.tensor(0.5), torch.tensor(1), 4)
    for meter in ranks:
        meter.found_inf.fill_(1)
        meter.update(torch.tensor(0.5), torch.tensor(0), 2)
    sums += ranks[0].sums + ranks[1].sums
    saved = ranks[0].total_sums().clone()
    for meter in ranks:
        metrics = meter.compute()
        assert (metrics.images, metrics.accuracy, metrics.loss, metrics.nonfinite_steps) == (12, 4 / 12, 0.5, 1)
        with pytest.raises(NonFiniteError, match="in step 25;"):
            metrics.require_finite(25)
        meter.load_total_sums(saved)
    assert ranks[0].sums.tolist() == [6, 4, 12, 1]
    assert ranks[1].sums.tolist() == [0, 0, 0, 0]


def test_gradients_are_averaged_in_memory_order_without_copies_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over 3 and 5 images of two ranks, for channels_last and contiguous gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(5, 7, 3), nn.BatchNorm2d(7), nn.Conv2d(7, 2, (1, 2)))
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    parameters = list(model.parameters())
    for _ in range(2):
        model(torch.randn(3, 5, 6, 6)).square().mean().backward()
    assert any(not weight.grad.is_contiguous() for weight in parameters if weight.grad is not None)
    gradients = [weight.grad for weight in parameters if weight.grad is not None]
    own, strides = [gradient.clone() for gradient in gradients], [gradient.stride() for gradient in gradients]
    others = [torch.randn_like(gradient) for gradient in gradients]
    assert [other.stride() for other in others] == strides
    rank_1 = [*(torch.as_strided(other, (other.numel(),), (1,)) for other in others), *torch.tensor([[2.0], [1.0]])]
    sums_of_rank_1 = torch.cat(rank_1) * 5
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.add_(sums_of_rank_1))
    with Operations() as operations:
        loss = World(0, 2).all_reduce_gradients(parameters, torch.tensor(4.0), 3)
    assert loss.item() == 2.75
    for gradient, mine, other, stride in zip(gradients, own, others, strides, strict=True):
        assert gradient.stride() == stride
        torch.testing.assert_close(gradient, (mine * 3 + other * 5) / 8, rtol=0, atol=1e-7)
    names = [name for name, _ in operations.calls]
    assert (names.count("cat"), names.count("_foreach_copy_")) == (1, 1)
    assert not {"copy_", "_to_copy", "contiguous"} & {*names}
    assert all(numel == 1 for name, numel in operations.calls if name == "clone")
