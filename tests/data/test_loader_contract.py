"""Tests for every entry of `LOADERS`: complete epochs, batch format, determinism and the absence of state."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastcifar.data.augment import draw_epoch, draw_mixer_params, parse_augment
from fastcifar.data.loaders import LOADERS, Loader
from fastcifar.data.mixers import MIXERS
from fastcifar.errors import UsageError

N = 50
SPEC = "crop:4:reflect,flip,cutout:8:mean"
LABELS = np.arange(N)  # the label of a sample is its index
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 3, 32, 32), dtype=np.uint8)
IMAGES.flags.writeable = False

pytestmark = pytest.mark.parametrize("name", LOADERS)


def make_loader(name: str, batch_size: int = 20, spec: str = SPEC, **options: Any) -> Loader:
    """Create the loader `name` in eager mode without worker processes."""
    images = options.pop("images", IMAGES)
    options = {"compile": False, "workers": 0, "seed": 0, "fill_color": (9, 8, 7), **options}
    ops = parse_augment(spec)
    return LOADERS[name](images, LABELS, batch_size=batch_size, augment=ops, device="cpu", **options)


def concatenate(batches: Iterator[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def equal(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize(("batch_size", "steps"), [(1, 50), (20, 3), (25, 2), (49, 2), (50, 1)])
@pytest.mark.parametrize("drop_last", [False, True])
def test_an_epoch_is_the_permutation_of_the_seed_and_the_epoch(
    name: str, batch_size: int, steps: int, drop_last: bool, tmp_path: Path
) -> None:
    np.save(tmp_path / "images.npy", IMAGES)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = make_loader(name, batch_size, "none", seed=3, drop_last=drop_last, images=mapped)
        batches = list(loader.batches(2))
    steps = N // batch_size if drop_last else steps
    assert (loader.num_samples, loader.batch_size, loader.steps_per_epoch) == (N, batch_size, steps)
    assert [len(labels) for _, labels in batches[:-1]] == [batch_size] * (steps - 1)
    images, labels = concatenate(iter(batches))
    assert np.array_equal(labels.numpy(), draw_epoch((), N, 2, 3).permutation[: steps * batch_size])
    assert np.array_equal(images.numpy(), IMAGES[labels.numpy()])


@pytest.mark.parametrize("spec", ["none", SPEC])
def test_ranks_interleave_to_the_batches_of_one_process(name: str, spec: str) -> None:
    batches = list(make_loader(name, 20, spec).batches(1))
    shares = [list(make_loader(name, 20, spec, rank=rank, world_size=4).batches(1)) for rank in range(4)]
    assert {len(share) for share in shares} == {len(batches)}
    for step, (images, labels) in enumerate(batches):
        for rank, share in enumerate(shares):
            assert torch.equal(share[step][1], labels[rank::4])
            if name != "torchvision" or spec == "none":  # torchvision draws its own random parameters
                assert torch.equal(share[step][0], images[rank::4])


def test_a_batch_size_that_is_not_divisible_by_the_world_size_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="--batch-size 18 is not divisible by the 4 processes"):
        make_loader(name, 18, world_size=4)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("start_step", [0, 2])
def test_mixer_parameters_are_added_to_the_batches(name: str, mixer: str, start_step: int) -> None:
    ops = parse_augment(f"flip,{mixer}")
    batches = list(make_loader(name, 20, f"flip,{mixer}", seed=3).batches(1, start_step))
    loader_batches = list(make_loader(name, 20, "flip", seed=3).batches(1, start_step))
    params = torch.from_numpy(draw_mixer_params(ops, N, 1, 3))[20 * start_step :].split(20)
    for (*batch, actual), loader_batch, expected in zip(batches, loader_batches, params, strict=True):
        assert equal((batch[0], batch[1]), loader_batch)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("mixer", MIXERS)
def test_mixer_parameters_are_divided_among_ranks_as_the_images(name: str, mixer: str) -> None:
    batches = list(make_loader(name, 20, f"flip,{mixer}").batches(0))
    for rank in range(2):
        share = make_loader(name, 20, f"flip,{mixer}", rank=rank, world_size=2).batches(0)
        assert all(torch.equal(local[2], batch[2][rank::2]) for local, batch in zip(share, batches, strict=True))


def test_batches_are_uint8_channels_last_and_int64(name: str) -> None:
    for images, labels in make_loader(name).batches(0):
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert images.shape[1:] == (3, 32, 32)
        assert images.stride() == (3072, 1, 96, 3)


@pytest.mark.parametrize("start_step", [0, 1, 3])
def test_fault01_resuming_within_an_epoch_gives_the_remaining_batches(name: str, start_step: int) -> None:
    complete = list(make_loader(name).batches(2))
    remaining = list(make_loader(name).batches(2, start_step=start_step))
    assert len(remaining) == 3 - start_step
    assert all(equal(a, b) for a, b in zip(complete[start_step:], remaining, strict=True))


def test_fault21_batches_are_determined_by_the_seed(name: str) -> None:
    loader = make_loader(name)
    first, first_labels = concatenate(loader.batches(0))
    assert equal(concatenate(make_loader(name).batches(0)), (first, first_labels))
    assert equal(concatenate(loader.batches(0)), (first, first_labels)), "the loader has state"
    for images, labels in (concatenate(loader.batches(1)), concatenate(make_loader(name, seed=1).batches(0))):
        assert not torch.equal(labels, first_labels)
        assert not torch.equal(images[labels.argsort()], first[first_labels.argsort()]), "the same augmentation"


def test_the_global_generator_is_not_used(name: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    concatenate(make_loader(name).batches(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_batch_larger_than_the_data_set(name: str) -> None:
    with pytest.raises(UsageError, match="--batch-size 51 is larger than the 50 training images; choose at most 50"):
        make_loader(name, 51)
