"""The augmentations against a slow, independent reference, one image at a time in numpy.

Parametrised over the rows of `AUGMENTS`: a new row fails here until it has a reference and ranges.
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
    AugmentSpec,
    apply_augment,
    draw_epoch,
    format_augment,
    parse_augment,
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


def crop_image(op: AugmentOp, image: np.ndarray, drawn: dict[str, int]) -> np.ndarray:
    assert isinstance(op.value, int)
    edges = ((0, 0), (op.value, op.value), (op.value, op.value))
    padded = np.pad(image, edges, mode="reflect" if op.variant == "reflect" else "constant")
    return padded[:, drawn["y"] : drawn["y"] + 32, drawn["x"] : drawn["x"] + 32]


def flip_image(op: AugmentOp, image: np.ndarray, drawn: dict[str, int]) -> np.ndarray:
    return image[:, :, ::-1] if drawn["flip"] else image


def cutout_image(op: AugmentOp, image: np.ndarray, drawn: dict[str, int]) -> np.ndarray:
    assert isinstance(op.value, int)
    top, left = (drawn[axis] - op.value // 2 for axis in "yx")
    colour = FILL if op.variant == "mean" else (0, 0, 0)
    image = image.copy()
    for y in range(max(top, 0), min(top + op.value, 32)):
        for x in range(max(left, 0), min(left + op.value, 32)):
            image[:, y, x] = colour
    return image


def erase_image(op: AugmentOp, image: np.ndarray, drawn: dict[str, int]) -> np.ndarray:
    """torchvision's own erasing of the box."""
    top, left, height, width = (drawn[name] for name in "yxhw")
    colour = torch.tensor({"mean": FILL, "gray": (128, 128, 128), "zero": (0, 0, 0)}[op.variant])[:, None, None]
    return erase(torch.from_numpy(image), top, left, height, width, colour).numpy()


ELSEWHERE = {"rotate", "jitter", "autoaugment", "randaugment", "trivialaugment"}  # test_policies.py
REFERENCE = {"crop": crop_image, "flip": flip_image, "cutout": cutout_image, "erase": erase_image}
RANGES = {
    "crop": lambda op: {"y": (0, 2 * op.value), "x": (0, 2 * op.value)},
    "flip": lambda op: {"flip": (0, 1)},
    "cutout": lambda op: {"y": (0, 31), "x": (0, 31)},
    "erase": lambda op: {"y": (0, 32), "x": (0, 32), "h": (0, 31), "w": (0, 31)},
}


def expected(ops: tuple[AugmentOp, ...], images: np.ndarray, params: tuple[dict[str, np.ndarray], ...]) -> np.ndarray:
    """[b,3,32,32]: every image by itself through the reference of every op."""
    images = images.copy()
    for i in range(len(images)):
        for op, drawn in zip(ops, params, strict=True):
            images[i] = REFERENCE[op.name](op, images[i], {name: int(array[i]) for name, array in drawn.items()})
    return images


def noise(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)


def test_every_row_and_word_is_tested_here() -> None:
    assert {(op.name, op.variant) for op in parse_augment(ALL_SPECS)} == {
        (n, word) for n, r in AUGMENTS.items() for word in r.variants if n not in ELSEWHERE
    }
    assert REFERENCE.keys() == RANGES.keys() == AUGMENTS.keys() - ELSEWHERE


@pytest.mark.parametrize("name", AUGMENTS)
def test_rows_are_complete(name: str) -> None:
    row = AUGMENTS[name]
    with pytest.raises(UsageError) as error:
        parse_augment(f"{name}:{'' if row.default_value is None else f'{row.default_value}:'}nonsense")
    assert str(error.value).endswith(f" ({row.help})")
    assert "\n" not in str(error.value)
    (op,) = parse_augment(name)
    assert (op.name, op.value, op.variant) == (name, row.default_value, next(iter(row.variants)))
    for low, high in row.variants.values():
        assert row.default_value is None or low <= row.default_value <= high


@pytest.mark.parametrize("spec", [*SPECS, ALL_SPECS, "none"])
def test_canonical_spellings_come_back(spec: str) -> None:
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
def test_short_spellings_become_canonical(short: str, canonical: str) -> None:
    assert format_augment(parse_augment(short)) == canonical


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("flipp", "did you mean 'flip'?"),
        ("Crop", "did you mean 'crop'?"),
        ("xyzzy:4", "choose from autoaugment, crop, cutmix, cutout, erase, flip"),
        ("crop,,flip", "empty item"),
        ("crop,", "empty item"),
        (":4", "empty item"),
        ("crop,none", "write 'none' alone"),
        ("crop:x", "not a whole number"),
        ("crop:4.0", "not a whole number"),
        ("crop:", "not a whole number"),
        ("crop:1_6", "not a whole number"),
        ("crop:٣", "not a whole number"),
        ("crop:zero", "not a whole number"),
        ("crop:0", "from 1 to 16"),
        ("crop:17:reflect", "from 1 to 16"),
        ("crop:-4", "from 1 to 16"),
        ("flip:half", "not a number"),
        ("flip:1.5", "from 0.0 to 1.0"),
        ("flip:nan", "from 0.0 to 1.0"),
        ("flip:0.3:alternating", "flip:VALUE:alternating takes 0.5"),
        ("cutout:33", "from 1 to 32"),
        ("erase:0.01", "erase:VALUE:gray takes from 0.02 to 1.0"),
        ("erase:0.1:grey", "VARIANT one of gray, mean, zero"),
        ("crop:4:mirror", "VARIANT one of zero, reflect"),
        ("crop:4:", "VARIANT one of zero, reflect"),
        ("flip:0.5:random:3", "unexpected '3'"),
        ("cutmx", "did you mean 'cutmix'?"),
        ("cutmix:0", "cutmix:VALUE takes from 0.01 to 100.0"),
        ("mixup:nan", "mixup:VALUE takes from 0.01 to 100.0"),
        ("ricap:0.3:zero", "write ricap:VALUE"),
        ("cutmix,flip", "write one mixer, at the list's end"),
        ("flip,mixup:0.2,cutmix", "write one mixer, at the list's end"),
    ],
)
def test_bad_spellings_say_what_to_do(spec: str, said: str) -> None:
    with pytest.raises(UsageError, match="augmentation") as error:
        parse_augment(spec)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_rows_without_a_number_or_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    row = AUGMENTS["flip"]
    policy = AugmentSpec(
        row.draw, row.apply, default_value=None, variants={"cifar10": (0, 0), "imagenet": (0, 0)}, help="a policy"
    )
    monkeypatch.setitem(AUGMENTS, "policy", policy)
    monkeypatch.setitem(
        AUGMENTS, "rotate", AugmentSpec(row.draw, row.apply, default_value=5, variants={"": (0, 30)}, help="rotate")
    )
    assert parse_augment("policy,policy:imagenet") == (
        AugmentOp("policy", None, "cifar10"),
        AugmentOp("policy", None, "imagenet"),
    )
    assert (
        format_augment(parse_augment("policy,policy:imagenet,rotate,rotate:9"))
        == "policy:cifar10,policy:imagenet,rotate:5,rotate:9"
    )
    with pytest.raises(UsageError, match="write policy:VARIANT, VARIANT one of cifar10, imagenet"):
        parse_augment("policy:3")
    with pytest.raises(UsageError, match=r"write rotate:VALUE \(rotate\)$"):
        parse_augment("rotate:5:zero")


@pytest.mark.parametrize("spec", SPECS)
def test_draws_are_of_their_type_and_within_bounds(spec: str) -> None:
    (op,) = ops = parse_augment(spec)
    (drawn,) = draw_epoch(ops, 20_000, epoch=3, seed=1).op_params
    ranges = RANGES[op.name](op)
    assert drawn.keys() == ranges.keys()
    for name, array in drawn.items():
        assert array.shape == (20_000,)
        assert array.dtype in (np.int32, np.uint8, np.bool_)
        low, high = ranges[name]
        if op.name == "flip" and op.variant == "random":
            low, high = int(op.value == 1), int(op.value != 0)
        if op.name == "erase":  # how far it reaches follows from its number: test_windows.py
            assert low <= array.min() < array.max() <= high
        else:
            assert (int(array.min()), int(array.max())) == (low, high)  # 20,000 draws reach both ends


def test_draws_are_a_function_of_seed_and_epoch_alone() -> None:
    ops = parse_augment(ALL_SPECS)

    def flat(epoch: int, seed: int) -> list[np.ndarray]:
        draws = draw_epoch(ops, 1000, epoch, seed)
        return [draws.permutation, *(array for drawn in draws.op_params for array in drawn.values())]

    first = flat(epoch=5, seed=7)
    assert first[0].dtype == np.int64
    assert np.array_equal(np.sort(first[0]), np.arange(1000))
    np.random.default_rng().random()
    assert all(np.array_equal(a, b) for a, b in zip(first, flat(epoch=5, seed=7), strict=True))
    for other in (flat(epoch=6, seed=7), flat(epoch=5, seed=8), flat(epoch=7, seed=5)):
        same = [np.array_equal(a, b) for a, b in zip(first, other, strict=True)]
        assert sum(same) == 2, "only flip:0.0 and flip:1.0 may be the same"


def test_adding_an_op_changes_no_draw_before_it() -> None:
    ops = parse_augment(ALL_SPECS)
    whole = draw_epoch(ops, 500, epoch=2, seed=3)
    for k in range(len(ops)):
        part = draw_epoch(ops[:k], 500, epoch=2, seed=3)
        assert np.array_equal(part.permutation, whole.permutation)
        for mine, theirs in zip(part.op_params, whole.op_params[:k], strict=True):
            assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)


def test_streams_of_equal_ops_are_independent() -> None:
    draws = draw_epoch(
        parse_augment("cutout,cutout,flip:0.5:alternating,flip:0.5:alternating"), 50_000, epoch=0, seed=0
    )
    assert abs(np.mean(draws.op_params[0]["y"] == draws.op_params[1]["y"]) - 1 / 32) < 0.005
    assert abs(np.mean(draws.op_params[0]["y"] == draws.op_params[0]["x"]) - 1 / 32) < 0.005
    assert abs(np.mean(draws.op_params[2]["flip"] == draws.op_params[3]["flip"]) - 1 / 2) < 0.01


@pytest.mark.parametrize(("spec", "bins"), [("crop:4:zero", 9), ("crop:16:reflect", 33), ("cutout:8:mean", 32)])
def test_positions_are_uniform(spec: str, bins: int) -> None:
    n = 50_000
    (drawn,) = draw_epoch(parse_augment(spec), n, epoch=1, seed=0).op_params
    joint = np.bincount(drawn["y"].astype(int) * bins + drawn["x"], minlength=bins * bins)
    cells = bins * bins
    chi_square = float(((joint - n / cells) ** 2 / (n / cells)).sum())
    assert abs(chi_square - (cells - 1)) < 5 * (2 * (cells - 1)) ** 0.5  # five standard deviations


@pytest.mark.parametrize(("spec", "share"), [("flip:0.25", 0.25), ("flip", 0.5), ("flip:0.5:alternating", 0.5)])
def test_share_of_flips(spec: str, share: float) -> None:
    (drawn,) = draw_epoch(parse_augment(spec), 50_000, epoch=1, seed=0).op_params
    assert abs(drawn["flip"].mean() - share) < 0.01


def test_order_is_well_mixed() -> None:
    order = draw_epoch((), 50_000, epoch=0, seed=0).permutation
    next_order = draw_epoch((), 50_000, epoch=1, seed=0).permutation
    assert abs(np.corrcoef(order, np.arange(50_000))[0, 1]) < 0.02
    assert abs(np.corrcoef(order, next_order)[0, 1]) < 0.02


def test_alternating_flip_shows_both_sides_in_any_two_epochs() -> None:
    ops = parse_augment("crop,flip:0.5:alternating")
    by_sample = []
    for epoch in range(4):
        draws = draw_epoch(ops, 2000, epoch, seed=0)
        flipped = np.empty(2000, dtype=bool)
        flipped[draws.permutation] = draws.op_params[1]["flip"]
        by_sample.append(flipped)
    for before, after in pairwise(by_sample):
        assert np.array_equal(before, ~after)
    assert 900 < by_sample[0].sum() < 1100


@pytest.mark.parametrize("spec", [*SPECS, "crop:4:reflect,flip,cutout:9:mean,crop:2:zero,flip,cutout:5:zero"])
def test_apply_equals_the_reference(spec: str) -> None:
    ops, n = parse_augment(spec), 48
    draws = draw_epoch(ops, n, epoch=0, seed=0)
    for drawn, op in zip(draws.op_params, ops, strict=True):  # the extremes too, which 48 draws may miss
        for name, (low, high) in RANGES[op.name](op).items():
            drawn[name][:2] = low, high
    pixels = noise(n)
    images = torch.from_numpy(pixels.copy()).contiguous(memory_format=torch.channels_last)
    params = tuple({name: torch.from_numpy(array) for name, array in drawn.items()} for drawn in draws.op_params)
    out = apply_augment(ops, images, params, FILL)
    assert out.shape == (n, 3, 32, 32)
    assert out.dtype == torch.uint8
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert int((out.numpy() != expected(ops, pixels, draws.op_params)).sum()) == 0
    assert np.array_equal(images.numpy(), pixels), "the input was changed"


def test_apply_works_on_any_strides_and_part_of_a_batch() -> None:
    ops = parse_augment("crop:4:reflect,flip,cutout")
    draws = draw_epoch(ops, 8, epoch=0, seed=0)
    params = tuple({name: torch.from_numpy(array) for name, array in drawn.items()} for drawn in draws.op_params)
    planar = torch.from_numpy(noise(8))
    whole = apply_augment(ops, planar, params, FILL)
    part = tuple({name: array[3:5] for name, array in drawn.items()} for drawn in params)
    assert torch.equal(apply_augment(ops, planar[3:5], part, FILL), whole[3:5])


def test_no_op_is_the_same_images() -> None:
    images = torch.from_numpy(noise(4)).contiguous(memory_format=torch.channels_last)
    assert torch.equal(apply_augment((), images, (), FILL), images)
