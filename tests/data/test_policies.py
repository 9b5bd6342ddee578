"""The policies' tables against torchvision's, their draws by counting, whole policies image by image, users' files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from test_image_ops import TEST_IMAGES, apply_torchvision
from torchvision.transforms import v2

from fastcifar.data import policies
from fastcifar.data.augment import AugmentOp, apply_augment, draw_epoch, format_augment, parse_augment
from fastcifar.data.image_ops import AFFINE_SCALE, AMOUNT_SCALE, OPERATION_CODES, encode_operation
from fastcifar.data.policies import (
    AUTOAUGMENT_CIFAR10,
    AUTOAUGMENT_SPACE,
    JITTER_OPERATIONS,
    STANDARD_SPACE,
    WIDE_SPACE,
    Policy,
    magnitude_levels,
)
from fastcifar.errors import UsageError

N = 50_000


def policy(spec: str) -> Policy:
    (op,) = parse_augment(spec)
    assert op.policy is not None
    return op.policy


@pytest.mark.parametrize(
    ("space", "count", "theirs"),
    [
        (AUTOAUGMENT_SPACE, 10, v2.AutoAugment),
        (STANDARD_SPACE, 31, v2.RandAugment),
        (WIDE_SPACE, 31, v2.TrivialAugmentWide),
    ],
)
def test_magnitudes_are_torchvisions(space: policies.OperationSpace, count: int, theirs: type) -> None:
    table = theirs._AUGMENTATION_SPACE
    assert space.keys() == table.keys() | {"Identity"}
    for name, (magnitudes, signed) in table.items():
        wanted = magnitudes(count, 32, 32)
        assert magnitude_levels(name, space, count) == ([0.0] * count if wanted is None else wanted.tolist()), name
        assert bool(space[name] and space[name][2]) == signed, name  # type: ignore[index]


def test_cifar10_is_torchvisions() -> None:
    assert list(AUTOAUGMENT_CIFAR10) == v2.AutoAugment()._get_policies(v2.AutoAugmentPolicy.CIFAR10)


def test_what_a_policy_may_do_can_be_asked() -> None:
    made = policy("autoaugment")
    assert set(made.operations()) == {name for row in AUTOAUGMENT_CIFAR10 for name, *_ in row}
    assert set(made.operations(0)) == {row[0][0] for row in AUTOAUGMENT_CIFAR10}
    assert made.magnitudes("Rotate") == tuple(
        sign * magnitude_levels("Rotate", AUTOAUGMENT_SPACE, 10)[2] for sign in (-1, 1)
    )
    assert made.magnitudes("Equalize") == (0.0,)
    assert policy("randaugment:9:3").num_steps == 3
    assert len(policy("trivialaugment").magnitudes("Posterize")) == 7


def counted(codes: np.ndarray) -> dict[int, float]:
    return {int(code): count / len(codes) for code, count in Counter(codes.tolist()).items()}


def expected(made: Policy, place: int) -> dict[int, float]:
    """code -> its probability at a place of the sub-policies, by the table."""
    chances: Counter[int] = Counter()
    for row in made.sub_policies:
        choice = row[place]
        chances[OPERATION_CODES[choice.operation]] += choice.probability / len(made.sub_policies)  # type: ignore[assignment]
        chances[0] += (1 - choice.probability) / len(made.sub_policies)  # type: ignore[assignment]
    return {code: chance for code, chance in chances.items() if chance > 1e-12}


@pytest.mark.parametrize("spec", ["autoaugment", "randaugment:9:2", "trivialaugment"])
def test_draws_come_as_often_as_the_table_says(spec: str) -> None:
    made, (drawn,) = policy(spec), draw_epoch(parse_augment(spec), N, 3, 1).op_params
    assert drawn.keys() == {f"{what}{step}" for what in ("code", "amount", "cosine") for step in range(made.num_steps)}
    for step in range(made.num_steps):
        code, amount, cosine = (drawn[f"{what}{step}"] for what in ("code", "amount", "cosine"))
        assert (code.dtype, amount.dtype, cosine.dtype) == (np.uint8, np.int32, np.int32)
        assert len(code) == len(amount) == len(cosine) == N
        chances, found = expected(made, step % len(made.sub_policies[0])), counted(code)
        assert found.keys() == chances.keys()
        for which, chance in chances.items():
            assert abs(found[which] - chance) < 5 * (chance / N) ** 0.5 + 1e-9, which
        for name in made.operations(step):
            if STANDARD_SPACE.get(name) and STANDARD_SPACE[name][2]:  # type: ignore[index]
                signed = amount[(code == OPERATION_CODES[name]) & (amount != 0)]
                assert abs((signed > 0).mean() - 0.5) < 2.5 / len(signed) ** 0.5, name
        # What each operation is drawn with is what the table's choices encode to, all of it.
        wanted = {encode_operation(name, m) for name in made.operations(step) for m in made.magnitudes(name)} | {
            encode_operation("Identity", 0)
        }
        triples = set(zip(code.tolist(), amount.tolist(), cosine.tolist(), strict=True))
        assert triples <= wanted
    if made.num_draws > 1:
        assert abs((drawn["code0"] == drawn["code1"]).mean() - 1 / 14) < 0.01


def test_the_two_steps_of_a_sub_policy_go_together() -> None:
    """TranslateX comes after Rotate and Color only, never after the first steps of other sub-policies."""
    (drawn,) = draw_epoch(parse_augment("autoaugment"), N, 0, 0).op_params
    before = drawn["code0"][drawn["code1"] == OPERATION_CODES["TranslateX"]]
    assert set(before.tolist()) == {OPERATION_CODES["Identity"], OPERATION_CODES["Rotate"], OPERATION_CODES["Color"]}


@pytest.mark.parametrize("spec", ["autoaugment", "randaugment:26:2", "trivialaugment", "randaugment:7:1,autoaugment"])
def test_a_policy_is_its_operations_in_turn(spec: str) -> None:
    """At levels whose shears never read from the very middle between two pixels."""
    ops = parse_augment(spec)
    images = TEST_IMAGES.repeat(8, 1, 1, 1)
    draws = draw_epoch(ops, len(images), 0, 5)
    wanted = images.clone()
    for op, drawn in zip(ops, draws.op_params, strict=True):
        assert op.policy is not None
        meaning = {
            encode_operation(name, m): (name, m) for name in op.policy.operations() for m in op.policy.magnitudes(name)
        }
        meaning[encode_operation("Identity", 0)] = ("Identity", 0.0)
        for step in range(op.policy.num_steps):
            triples = zip(*(drawn[f"{what}{step}"].tolist() for what in ("code", "amount", "cosine")), strict=True)
            wanted = torch.stack(
                [apply_torchvision(image, *meaning[t]) for image, t in zip(wanted, triples, strict=True)]
            )
    params = tuple({name: torch.from_numpy(array) for name, array in drawn.items()} for drawn in draws.op_params)
    assert torch.equal(apply_augment(ops, images, params, (0, 0, 0)), wanted)


def test_jitter_draws_all_four_in_every_order() -> None:
    (drawn,) = draw_epoch(parse_augment("jitter:0.4"), N, 0, 0).op_params
    codes = np.stack([drawn[f"code{step}"] for step in range(4)])
    amounts = np.stack([drawn[f"amount{step}"] for step in range(4)]) / AMOUNT_SCALE
    orders = Counter(map(bytes, codes.T))
    assert len(orders) == 24
    assert all(abs(count / N - 1 / 24) < 5 * (1 / 24 / N) ** 0.5 for count in orders.values())
    for name in JITTER_OPERATIONS:
        found, reach = amounts[codes == OPERATION_CODES[name]], 0.2 if name == "Hue" else 0.4
        assert len(found) == N
        assert -reach <= found.min() < -0.99 * reach
        assert 0.99 * reach < found.max() <= reach
        assert abs(found.mean()) < 0.01 * reach
        assert abs(found.std() - reach / 3**0.5) < 0.01 * reach


def test_jitter_is_torchvisions() -> None:
    ops, images = parse_augment("jitter:0.5"), TEST_IMAGES.repeat(6, 1, 1, 1)
    draws = draw_epoch(ops, len(images), 0, 0)
    (drawn,) = draws.op_params
    names = {OPERATION_CODES[name]: name for name in JITTER_OPERATIONS}
    wanted = images.clone()
    for step in range(4):
        what = zip(
            (names[code] for code in drawn[f"code{step}"].tolist()), drawn[f"amount{step}"] / AMOUNT_SCALE, strict=True
        )
        wanted = torch.stack(
            [apply_torchvision(image, n, float(m)) for image, (n, m) in zip(wanted, what, strict=True)]
        )
    params = ({name: torch.from_numpy(array) for name, array in drawn.items()},)
    off = (apply_augment(ops, images, params, (0, 0, 0)).int() - wanted.int()).abs()
    # A hue that falls to the other side of a whole number is one off; what follows can double that twice.
    assert int(off.max()) <= 4
    assert int((off > 0).sum()) <= 1e-4 * off.numel()


def test_rotations_are_uniform_angles_and_torchvisions() -> None:
    (drawn,) = draw_epoch(parse_augment("rotate:7"), N, 0, 0).op_params
    degrees = np.degrees(np.arctan2(drawn["sine"], drawn["cosine"]))
    assert np.allclose((drawn["sine"] / AFFINE_SCALE) ** 2 + (drawn["cosine"] / AFFINE_SCALE) ** 2, 1, atol=1e-6)
    assert -7 <= degrees.min() < -6.99
    assert 6.99 < degrees.max() <= 7
    assert np.abs(np.histogram(degrees, 14, (-7, 7))[0] - N / 14).max() < 5 * (N / 14) ** 0.5
    images = TEST_IMAGES[:8]
    params = ({name: torch.from_numpy(array[:8]) for name, array in drawn.items()},)
    wanted = [apply_torchvision(image, "Rotate", float(angle)) for image, angle in zip(images, degrees, strict=False)]
    assert torch.equal(apply_augment(parse_augment("rotate:7"), images, params, (0, 0, 0)), torch.stack(wanted))


def write(folder: Path, text: str) -> str:
    (folder / "mine.toml").write_text(text)
    return f"autoaugment:{folder / 'mine.toml'}"


def test_a_policy_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        [[step[0], step[1], *([] if step[2] is None else [step[2]])] for step in row] for row in AUTOAUGMENT_CIFAR10
    ]
    write(tmp_path, "policy = " + json.dumps(rows))
    (op,) = ops = parse_augment("autoaugment:mine.toml")
    assert format_augment(ops) == "autoaugment:mine.toml"
    assert op.policy == policy("autoaugment:cifar10")
    write(tmp_path, 'policy = [[["Rotate", 1, 9]], [["Invert", 1.0], ["Color", 0.5, 0], ["Equalize", 0.2]]]')
    (other,) = parse_augment("autoaugment:mine.toml")
    assert other != op, "a compiled kernel of the old file would be used for the new one"
    assert other.policy is not None
    assert other.policy.num_steps == 3
    (drawn,) = draw_epoch((other,), 1000, 0, 0).op_params
    assert set(drawn["code0"].tolist()) == {OPERATION_CODES["Rotate"], OPERATION_CODES["Invert"]}
    assert not drawn["code2"][drawn["code0"] == OPERATION_CODES["Rotate"]].any()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("policy = [[['Rotat', 0.5, 3]]]", r"sub-policy 1, step 1: unknown operation 'Rotat'; did you mean 'Rotate'\?"),
        ("policy = [[['Hue', 0.5, 3]]]", "unknown operation 'Hue'"),
        ("policy = [[['Invert', 1]], [['Rotate', 1.5, 3]]]", "sub-policy 2, step 1: probability 1.5 of Rotate is out"),
        ("policy = [[['Rotate', nan, 3]]]", "probability nan of Rotate is out of range; choose 0.0 to 1.0"),
        ("policy = [[['Rotate', true, 3]]]", "probability True of Rotate is out of range"),
        ("policy = [[['Rotate', 0.5, 10]]]", "level 10 of Rotate is out of range; choose 0 to 9"),
        ("policy = [[['Rotate', 0.5, -1]]]", "level -1 of Rotate is out of range"),
        ("policy = [[['Rotate', 0.5, 2.5]]]", "level 2.5 of Rotate is out of range"),
        ("policy = [[['Rotate', 0.5]]]", "level none of Rotate is out of range"),
        ("policy = [[['Invert', 0.5, 3]]]", "Invert has no magnitude, not 3"),
        ("policy = [['Rotate', 0.5, 3]]", "sub-policy 1, step 1: 'Rotate' is not a step"),
        ("policy = [[]]", "is not a list of 1 to 4 steps"),
        ("policy = []", "is not a policy"),
        ("polcy = 3", "is not a policy"),
        ("policy = [[", "is not a readable TOML file"),
    ],
)
def test_a_wrong_policy_says_where(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse_augment(write(tmp_path, text))
    assert (caught.value.exit_code, "\n" in str(caught.value)) == (2, False)


def test_wrong_names_of_policies() -> None:
    with pytest.raises(UsageError, match=r"no policy file nowhere\.toml; write a TOML file, or one of cifar10"):
        parse_augment("autoaugment:nowhere.toml")
    with pytest.raises(UsageError, match=r"write autoaugment:VARIANT, VARIANT one of cifar10 or a \.toml file"):
        parse_augment("autoaugment:imagenet")
    with pytest.raises(UsageError, match=r"unexpected 'x\.toml'"):
        parse_augment("crop:4:x.toml")
    with pytest.raises(UsageError, match="takes from 0 to 30"):
        parse_augment("randaugment:31")
    assert parse_augment("trivialaugment") == (
        AugmentOp("trivialaugment", None, "wide", policies.trivialaugment_policy()),
    )
