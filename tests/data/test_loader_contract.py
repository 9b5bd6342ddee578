"""What every row of `LOADERS` promises: exact epochs in one order, uint8 channels_last, no state, nothing by chance."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastcifar.data.augment import draw_epoch, draw_mixer_params, parse_augment
from fastcifar.data.loaders import LOADERS, Loader, mixed_batches
from fastcifar.data.mixers import MIXERS
from fastcifar.errors import UsageError

N = 50
SPEC = "crop:4:reflect,flip,cutout:8:mean"
LABELS = np.arange(N)  # a label is its sample's number
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 3, 32, 32), dtype=np.uint8)
IMAGES.flags.writeable = False

pytestmark = pytest.mark.parametrize("name", LOADERS)


def loader(name: str, batch_size: int = 20, spec: str = SPEC, **settings: Any) -> Loader:
    """The row `name`, in this process and eager."""
    images = settings.pop("images", IMAGES)
    takes = inspect.signature(LOADERS[name]).parameters
    own = {key: value for key, value in {"compile": False, "workers": 0, "seed": 0, **settings}.items() if key in takes}
    ops = parse_augment(spec)
    return LOADERS[name](images, LABELS, batch_size=batch_size, augment=ops, device="cpu", fill_color=(9, 8, 7), **own)


def joined(batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def equal(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize(("batch_size", "steps"), [(1, 50), (20, 3), (25, 2), (50, 1)])
def test_an_epoch_is_the_permutation_of_the_seed_and_the_epoch(name: str, batch_size: int, steps: int) -> None:
    it = loader(name, batch_size, "none", seed=3)
    assert (it.num_samples, it.batch_size, it.steps_per_epoch) == (N, batch_size, steps)
    images, labels = joined(it.batches(2))
    assert np.array_equal(labels.numpy(), draw_epoch((), N, 2, 3).permutation)
    assert np.array_equal(images.numpy(), IMAGES[labels.numpy()])


def test_drop_last(name: str) -> None:
    it = loader(name, 20, drop_last=True)
    sizes = [len(labels) for _, labels in it.batches(0)]
    assert (it.steps_per_epoch, sizes) == (2, [20, 20])


@pytest.mark.parametrize("spec", ["none", SPEC])
def test_ranks_interleave_to_the_batches_of_one(name: str, spec: str) -> None:
    whole = list(loader(name, 20, spec).batches(1))
    shares = [list(loader(name, 20, spec, rank=rank, world_size=4).batches(1)) for rank in range(4)]
    assert {len(share) for share in shares} == {len(whole)}
    for step, (images, labels) in enumerate(whole):
        for rank, share in enumerate(shares):
            assert torch.equal(share[step][1], labels[rank::4])
            if name != "torchvision" or spec == "none":  # its augmentations draw for themselves
                assert torch.equal(share[step][0], images[rank::4])


def test_a_batch_that_cannot_be_shared_out(name: str) -> None:
    with pytest.raises(UsageError, match="--batch-size 18 cannot be shared out equally to 4 processes"):
        loader(name, 18, world_size=4)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("start_step", [0, 2])
def test_a_mixers_draws_come_with_the_batch(name: str, mixer: str, start_step: int) -> None:
    ops = parse_augment(f"flip,{mixer}")
    it = loader(name, 20, "flip", seed=3)
    batches = list(mixed_batches(it, ops, 1, 3, torch.device("cpu"), start_step))
    plain = list(it.batches(1, start_step))
    drawn = torch.from_numpy(draw_mixer_params(ops, N, 1, 3))[20 * start_step :].split(20)
    for (*batch, mix), without, wanted in zip(batches, plain, drawn, strict=True):
        assert equal((batch[0], batch[1]), without)
        assert torch.equal(mix, wanted)
    assert all(
        equal((a[0], a[1]), b)
        for a, b in zip(mixed_batches(it, ops[:1], 1, 3, torch.device("cpu")), it.batches(1), strict=True)
    )


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_mixers_draws_are_shared_out_as_the_images(name: str, mixer: str) -> None:
    ops = parse_augment(f"flip,{mixer}")
    whole = list(mixed_batches(loader(name, 20, "flip"), ops, 0, 0, torch.device("cpu")))
    for rank in range(2):
        share = mixed_batches(loader(name, 20, "flip", rank=rank, world_size=2), ops, 0, 0, torch.device("cpu"))
        assert all(torch.equal(mine[2], all_of_it[2][rank::2]) for mine, all_of_it in zip(share, whole, strict=True))


def test_batches_are_uint8_channels_last_and_int64(name: str) -> None:
    for images, labels in loader(name).batches(0):
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert images.shape[1:] == (3, 32, 32)
        assert images.stride() == (3072, 1, 96, 3)


@pytest.mark.parametrize("start_step", [0, 1, 3])
def test_fault01_resuming_in_an_epoch_gives_the_rest_of_it(name: str, start_step: int) -> None:
    whole, rest = list(loader(name).batches(2)), list(loader(name).batches(2, start_step=start_step))
    assert len(rest) == 3 - start_step
    assert all(equal(a, b) for a, b in zip(whole[start_step:], rest, strict=True))


def test_fault21_same_seed_same_batches_other_seed_others(name: str) -> None:
    it = loader(name)
    first, first_labels = joined(it.batches(0))
    assert equal(joined(loader(name).batches(0)), (first, first_labels))
    assert equal(joined(it.batches(0)), (first, first_labels)), "a loader has a state"
    for images, labels in (joined(it.batches(1)), joined(loader(name, seed=1).batches(0))):
        assert not torch.equal(labels, first_labels)
        assert not torch.equal(images[labels.argsort()], first[first_labels.argsort()]), "the same augmentation"


def test_the_global_generator_is_left_alone(name: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    joined(loader(name).batches(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_batch_larger_than_the_data_set(name: str) -> None:
    with pytest.raises(UsageError, match="--batch-size 51 is larger than the 50 training images; choose at most 50"):
        loader(name, 51)


def test_a_memory_map_will_do(name: str, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", IMAGES)
    mapped = loader(name, images=np.load(tmp_path / "images.npy", mmap_mode="r"))
    assert equal(joined(mapped.batches(0)), joined(loader(name).batches(0)))
