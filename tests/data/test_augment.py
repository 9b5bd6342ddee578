"""Tests of the augmentations against a slow, independent reference that processes one image at a time with NumPy.

They are parametrized over the entries of `AUGMENTS`: a new entry fails until it has a reference and ranges.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torchvision.transforms.v2.functional import erase

from fastcifar.data.augment import (
    AUGMENTS,
    AugmentOp,
    apply_augment,
    draw_epoch,
    format_augment,
    parse_augment,
    split_mixer,
)
from fastcifar.errors import UsageError

FILL = (125, 7, 255)
SPECS = [
    *("crop:1:zero", "crop:4:zero", "crop:16:zero", "crop:1:reflect", "crop:4:reflect", "crop:16:reflect"),
    *("flip:0.0:random", "flip:0.25:random", "flip:0.5:random", "flip:1.0:random", "flip:0.5:alternating"),
    *("cutout:1:mean", "cutout:7:mean", "cutout:8:mean", "cutout:32:mean", "cutout:8:zero", "cutout:31:zero"),
    *("erase:0.1:gray", "erase:0.33:mean", "erase:1.0:zero"),
]
ALL_SPECS = ",".join(SPECS)


def crop_image(op: AugmentOp, image: np.ndarray, params: dict[str, int]) -> np.ndarray:
    assert isinstance(op.value, int)
    edges = ((0, 0), (op.value, op.value), (op.value, op.value))
    padded = np.pad(image, edges, mode="reflect" if op.variant == "reflect" else "constant")
    return padded[:, params["y"] : params["y"] + 32, params["x"] : params["x"] + 32]


def flip_image(op: AugmentOp, image: np.ndarray, params: dict[str, int]) -> np.ndarray:
    return image[:, :, ::-1] if params["flip"] else image


def cutout_image(op: AugmentOp, image: np.ndarray, params: dict[str, int]) -> np.ndarray:
    assert isinstance(op.value, int)
    top, left = (params[axis] - op.value // 2 for axis in "yx")
    color = FILL if op.variant == "mean" else (0, 0, 0)
    image = image.copy()
    for y in range(max(top, 0), min(top + op.value, 32)):
        for x in range(max(left, 0), min(left + op.value, 32)):
            image[:, y, x] = color
    return image


def erase_image(op: AugmentOp, image: np.ndarray, params: dict[str, int]) -> np.ndarray:
    """Erase the box with torchvision."""
    top, left, height, width = (params[name] for name in "yxhw")
    color = torch.tensor({"mean": FILL, "gray": (128, 128, 128), "zero": (0, 0, 0)}[op.variant])[:, None, None]
    return erase(torch.from_numpy(image), top, left, height, width, color).numpy()


TESTED_ELSEWHERE = {"rotate", "jitter", "autoaugment", "randaugment", "trivialaugment"}  # in test_policies.py
REFERENCE = {"crop": crop_image, "flip": flip_image, "cutout": cutout_image, "erase": erase_image}
RANGES = {
    "crop": lambda op: {"y": (0, 2 * op.value), "x": (0, 2 * op.value)},
    "flip": lambda op: {"flip": (0, 1)},
    "cutout": lambda op: {"y": (0, 31), "x": (0, 31)},
    "erase": lambda op: {"y": (0, 32), "x": (0, 32), "h": (0, 31), "w": (0, 31)},
}


def apply_reference(
    ops: tuple[AugmentOp, ...], images: np.ndarray, op_params: tuple[dict[str, np.ndarray], ...]
) -> np.ndarray:
    """Apply the reference of every op to each image; returns [b,3,32,32]."""
    images = images.copy()
    for i in range(len(images)):
        for op, params in zip(ops, op_params, strict=True):
            images[i] = REFERENCE[op.name](op, images[i], {name: int(array[i]) for name, array in params.items()})
    return images


def as_tensors(op_params: tuple[dict[str, np.ndarray], ...]) -> tuple[dict[str, torch.Tensor], ...]:
    return tuple({name: torch.from_numpy(array) for name, array in params.items()} for params in op_params)


def noise(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)


def test_every_augmentation_and_variant_is_tested() -> None:
    assert {(op.name, op.variant) for op in parse_augment(ALL_SPECS)} == {
        (name, variant) for name, spec in AUGMENTS.items() for variant in spec.variants if name not in TESTED_ELSEWHERE
    }
    assert REFERENCE.keys() == RANGES.keys() == AUGMENTS.keys() - TESTED_ELSEWHERE


@pytest.mark.parametrize("name", AUGMENTS)
def test_augmentation_specs_are_complete(name: str) -> None:
    spec = AUGMENTS[name]
    with pytest.raises(UsageError) as error:
        parse_augment(f"{name}:{'' if spec.default_value is None else f'{spec.default_value}:'}nonsense")
    assert str(error.value).endswith(f" ({spec.help})")
    assert "\n" not in str(error.value)
    (op,) = parse_augment(name)
    assert (op.name, op.value, op.variant) == (name, spec.default_value, next(iter(spec.variants)))
    for low, high in spec.variants.values():
        assert spec.default_value is None or low <= spec.default_value <= high


@pytest.mark.parametrize("spec", [*SPECS, ALL_SPECS, "none"])
def test_canonical_text_is_parsed_and_formatted_unchanged(spec: str) -> None:
    assert format_augment(parse_augment(spec)) == spec
    assert parse_augment(format_augment(parse_augment(spec))) == parse_augment(spec)


@pytest.mark.parametrize(
    ("short", "canonical"),
    [
        ("", "none"),
        (" none ", "none"),
        ("crop", "crop:4:zero"),
        ("crop:2", "crop:2:zero"),
        ("crop:4:zero,flip,cutout:8", "crop:4:zero,flip:0.5:random,cutout:8:mean"),
        ("flip, flip:1", "flip:0.5:random,flip:1.0:random"),
        ("flip:.25", "flip:0.25:random"),
        ("rotate,jitter", "rotate:5,jitter:0.2"),
        ("flip,erase:0.1,cutmix", "flip:0.5:random,erase:0.1:gray,cutmix:1.0"),
        ("autoaugment,randaugment:7,trivialaugment", "autoaugment:cifar10,randaugment:7:2,trivialaugment:wide"),
    ],
)
def test_defaults_are_filled_in(short: str, canonical: str) -> None:
    assert format_augment(parse_augment(short)) == canonical


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("flipp", "did you mean 'flip'?"),
        ("Crop", "did you mean 'crop'?"),
        ("xyzzy:4", "choose from autoaugment, crop, cutmix, cutout, erase, flip"),
        ("crop,,flip", "empty item"),
        ("crop,", "empty item"),
        (":4", "empty item"),
        ("crop,none", "write 'none' alone"),
        ("crop:x", "not an integer"),
        ("crop:4.0", "not an integer"),
        ("crop:", "not an integer"),
        ("crop:1_6", "not an integer"),
        ("crop:٣", "not an integer"),
        ("crop:zero", "not an integer"),
        ("crop:0", "from 1 to 16"),
        ("crop:17:reflect", "from 1 to 16"),
        ("crop:-4", "from 1 to 16"),
        ("flip:half", "not a number"),
        ("flip:1.5", "from 0.0 to 1.0"),
        ("flip:nan", "from 0.0 to 1.0"),
        ("flip:0.3:alternating", "VALUE in flip:VALUE:alternating must be 0.5"),
        ("cutout:33", "from 1 to 32"),
        ("erase:0.01", "VALUE in erase:VALUE:gray must be from 0.02 to 1.0"),
        ("erase:0.1:grey", "VARIANT one of gray, mean, zero"),
        ("crop:4:mirror", "VARIANT one of zero, reflect"),
        ("crop:4:", "VARIANT one of zero, reflect"),
        ("flip:0.5:random:3", "unexpected '3'"),
        ("rotate:5:zero", "write rotate:VALUE (rotate by"),
        ("trivialaugment:3", "write trivialaugment:VARIANT, VARIANT one of wide (TrivialAugment"),
        ("cutmx", "did you mean 'cutmix'?"),
        ("cutmix:0", "VALUE in cutmix:VALUE must be from 0.01 to 100.0"),
        ("mixup:nan", "VALUE in mixup:VALUE must be from 0.01 to 100.0"),
        ("ricap:0.3:zero", "write ricap:VALUE"),
        ("cutmix,flip", "write at most one mixer, at the end"),
        ("flip,mixup:0.2,cutmix", "write at most one mixer, at the end"),
    ],
)
def test_invalid_lists_raise_errors_with_a_remedy(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match="augmentation") as error:
        parse_augment(spec)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "low", "high", "step"),
    [
        *[(f"crop:{{}}:{variant}", 1, 16, 1) for variant in ("zero", "reflect")],
        *[(f"cutout:{{}}:{variant}", 1, 32, 1) for variant in ("mean", "zero")],
        *[(f"erase:{{}}:{variant}", 0.02, 1, 0.001) for variant in ("gray", "mean", "zero")],
        *[(f"randaugment:{{}}:{variant}", 0, 30, 1) for variant in (1, 2, 3)],
        ("flip:{}:random", 0, 1, 0.001),
        ("rotate:{}", 1, 180, 1),
        ("jitter:{}", 0, 1, 0.001),
        *[(f"{mixer}:{{}}", 0.01, 100, 0.001) for mixer in ("mixup", "cutmix", "ricap")],
    ],
)
def test_smallest_and_largest_values(name: str, low: float, high: float, step: float) -> None:
    assert len(parse_augment(name.format(low))) == len(parse_augment(name.format(high))) == 1
    for value in (low - step, high + step):
        with pytest.raises(UsageError, match="augmentation"):
            parse_augment(name.format(value))


def test_a_mixer_is_split_from_the_list() -> None:
    assert split_mixer(()) == ((), None)
    ops = parse_augment("crop:4:zero,flip,mixup:0.2")
    assert split_mixer(ops) == (ops[:2], ops[2])
    assert split_mixer(ops[:2]) == (ops[:2], None)


@pytest.mark.parametrize("spec", SPECS)
def test_parameters_have_the_right_type_and_range(spec: str) -> None:
    (op,) = ops = parse_augment(spec)
    (params,) = draw_epoch(ops, 20_000, epoch=3, seed=1).op_params
    ranges = RANGES[op.name](op)
    assert params.keys() == ranges.keys()
    for name, array in params.items():
        assert array.shape == (20_000,)
        assert array.dtype in (np.int32, np.uint8, np.bool_)
        low, high = ranges[name]
        if op.name == "flip" and op.variant == "random":
            low, high = int(op.value == 1), int(op.value != 0)
        if op.name == "erase":  # the exact range depends on the value: see test_random_erasing.py
            assert low <= array.min() < array.max() <= high
        else:
            assert (int(array.min()), int(array.max())) == (low, high)  # 20,000 draws include both bounds


def test_parameters_depend_on_seed_and_epoch_only() -> None:
    ops = parse_augment(ALL_SPECS)

    def flat(epoch: int, seed: int) -> list[np.ndarray]:
        epoch_params = draw_epoch(ops, 1000, epoch, seed)
        return [epoch_params.permutation, *(array for params in epoch_params.op_params for array in params.values())]

    first = flat(epoch=5, seed=7)
    assert first[0].dtype == np.int64
    assert np.array_equal(np.sort(first[0]), np.arange(1000))
    np.random.default_rng().random()
    assert all(np.array_equal(a, b) for a, b in zip(first, flat(epoch=5, seed=7), strict=True))
    for other in (flat(epoch=6, seed=7), flat(epoch=5, seed=8), flat(epoch=7, seed=5)):
        is_equal = [np.array_equal(a, b) for a, b in zip(first, other, strict=True)]
        assert sum(is_equal) == 2, "only flip:0.0 and flip:1.0 may be equal"


def test_appending_an_augmentation_keeps_the_parameters_before_it() -> None:
    ops = parse_augment(ALL_SPECS)
    complete = draw_epoch(ops, 500, epoch=2, seed=3)
    for k in range(len(ops)):
        shorter = draw_epoch(ops[:k], 500, epoch=2, seed=3)
        assert np.array_equal(shorter.permutation, complete.permutation)
        for actual, expected in zip(shorter.op_params, complete.op_params[:k], strict=True):
            assert all(np.array_equal(actual[name], expected[name]) for name in expected)


def test_streams_of_equal_augmentations_are_independent() -> None:
    ops = parse_augment("cutout,cutout,flip:0.5:alternating,flip:0.5:alternating")
    params = draw_epoch(ops, 50_000, epoch=0, seed=0).op_params
    assert abs(np.mean(params[0]["y"] == params[1]["y"]) - 1 / 32) < 0.005
    assert abs(np.mean(params[0]["y"] == params[0]["x"]) - 1 / 32) < 0.005
    assert abs(np.mean(params[2]["flip"] == params[3]["flip"]) - 1 / 2) < 0.01


@pytest.mark.parametrize(("spec", "bins"), [("crop:4:zero", 9), ("crop:16:reflect", 33), ("cutout:8:mean", 32)])
def test_positions_are_uniform(spec: str, bins: int) -> None:
    n = 50_000
    (params,) = draw_epoch(parse_augment(spec), n, epoch=1, seed=0).op_params
    joint = np.bincount(params["y"].astype(int) * bins + params["x"], minlength=bins * bins)
    cells = bins * bins
    chi_square = float(((joint - n / cells) ** 2 / (n / cells)).sum())
    assert abs(chi_square - (cells - 1)) < 5 * (2 * (cells - 1)) ** 0.5  # five standard deviations


@pytest.mark.parametrize(("spec", "probability"), [("flip:0.25", 0.25), ("flip", 0.5), ("flip:0.5:alternating", 0.5)])
def test_fraction_of_flipped_images(spec: str, probability: float) -> None:
    (params,) = draw_epoch(parse_augment(spec), 50_000, epoch=1, seed=0).op_params
    assert abs(params["flip"].mean() - probability) < 0.01


def test_permutations_are_uncorrelated() -> None:
    permutation = draw_epoch((), 50_000, epoch=0, seed=0).permutation
    next_permutation = draw_epoch((), 50_000, epoch=1, seed=0).permutation
    assert abs(np.corrcoef(permutation, np.arange(50_000))[0, 1]) < 0.02
    assert abs(np.corrcoef(permutation, next_permutation)[0, 1]) < 0.02


def test_alternating_flip_shows_both_orientations_in_any_two_epochs() -> None:
    ops = parse_augment("crop,flip:0.5:alternating")
    by_sample = []
    for epoch in range(4):
        epoch_params = draw_epoch(ops, 2000, epoch, seed=0)
        flipped = np.empty(2000, dtype=bool)
        flipped[epoch_params.permutation] = epoch_params.op_params[1]["flip"]
        by_sample.append(flipped)
    for before, after in pairwise(by_sample):
        assert np.array_equal(before, ~after)
    assert 900 < by_sample[0].sum() < 1100


@pytest.mark.parametrize("spec", [*SPECS, "crop:4:reflect,flip,cutout:9:mean,crop:2:zero,flip,cutout:5:zero"])
def test_apply_equals_the_reference(spec: str) -> None:
    ops, n = parse_augment(spec), 48
    op_params = draw_epoch(ops, n, epoch=0, seed=0).op_params
    for params, op in zip(op_params, ops, strict=True):  # include the bounds, which 48 draws may miss
        for name, (low, high) in RANGES[op.name](op).items():
            params[name][:2] = low, high
    pixels = noise(n)
    images = torch.from_numpy(pixels.copy()).contiguous(memory_format=torch.channels_last)
    out = apply_augment(ops, images, as_tensors(op_params), FILL)
    assert out.shape == (n, 3, 32, 32)
    assert out.dtype == torch.uint8
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert int((out.numpy() != apply_reference(ops, pixels, op_params)).sum()) == 0
    assert np.array_equal(images.numpy(), pixels), "the input was changed"


def test_apply_works_on_any_strides_and_slices_of_a_batch() -> None:
    ops = parse_augment("crop:4:reflect,flip,cutout")
    op_params = as_tensors(draw_epoch(ops, 8, epoch=0, seed=0).op_params)
    planar = torch.from_numpy(noise(8))
    augmented = apply_augment(ops, planar, op_params, FILL)
    sliced = tuple({name: array[3:5] for name, array in params.items()} for params in op_params)
    assert torch.equal(apply_augment(ops, planar[3:5], sliced, FILL), augmented[3:5])
