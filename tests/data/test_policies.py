"""Tests of the augmentation policies: tables and results against torchvision, distributions, custom policy files."""

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
from fastcifar.data.augment import apply_augment, draw_epoch, format_augment, parse_augment
from fastcifar.data.image_ops import AFFINE_SCALE, AMOUNT_SCALE, OPERATION_CODES, encode_operation
from fastcifar.data.policies import (
    AUTOAUGMENT_SPACE,
    JITTER_OPERATIONS,
    POLICIES,
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
    ("space", "num_levels", "reference"),
    [
        (AUTOAUGMENT_SPACE, 10, v2.AutoAugment),
        (STANDARD_SPACE, 31, v2.RandAugment),
        (WIDE_SPACE, 31, v2.TrivialAugmentWide),
    ],
)
def test_magnitudes_equal_torchvision(space: policies.OperationSpace, num_levels: int, reference: type) -> None:
    table = reference._AUGMENTATION_SPACE
    assert space.keys() == table.keys() | {"Identity"}
    for name, (magnitudes, signed) in table.items():
        levels = magnitudes(num_levels, 32, 32)
        expected = [0.0] * num_levels if levels is None else levels.tolist()
        assert magnitude_levels(name, space, num_levels) == expected, name
        assert bool(space[name] and space[name][2]) == signed, name  # type: ignore[index]


def test_cifar10_policy_equals_torchvision() -> None:
    assert list(POLICIES["cifar10"]) == v2.AutoAugment()._get_policies(v2.AutoAugmentPolicy.CIFAR10)


def test_operations_and_magnitudes_of_a_policy() -> None:
    autoaugment = policy("autoaugment")
    assert set(autoaugment.operations()) == {name for steps in POLICIES["cifar10"] for name, *_ in steps}
    assert set(autoaugment.operations(0)) == {steps[0][0] for steps in POLICIES["cifar10"]}
    assert autoaugment.magnitudes("Rotate") == tuple(
        sign * magnitude_levels("Rotate", AUTOAUGMENT_SPACE, 10)[2] for sign in (-1, 1)
    )
    assert autoaugment.magnitudes("Equalize") == (0.0,)
    assert policy("randaugment:9:3").num_steps == 3
    assert policy("randaugment:0").magnitudes("Rotate") == (0.0,)
    assert policy("randaugment:30").magnitudes("Rotate") == (-30.0, 30.0)
    assert len(policy("trivialaugment").magnitudes("Posterize")) == 7


def code_frequencies(codes: np.ndarray) -> dict[int, float]:
    return {int(code): count / len(codes) for code, count in Counter(codes.tolist()).items()}


def code_probabilities(tested: Policy, index: int) -> dict[int, float]:
    """Return the probability of each operation code at an index of the sub-policies."""
    probabilities: Counter[int] = Counter()
    for sub_policy in tested.sub_policies:
        op = sub_policy[index]
        probabilities[OPERATION_CODES[op.operation]] += op.probability / len(tested.sub_policies)  # type: ignore[assignment]
        probabilities[0] += (1 - op.probability) / len(tested.sub_policies)  # type: ignore[assignment]
    return {code: probability for code, probability in probabilities.items() if probability > 1e-12}


@pytest.mark.parametrize("spec", ["autoaugment", "randaugment:9:2", "trivialaugment"])
def test_operations_are_drawn_with_the_probabilities_of_the_table(spec: str) -> None:
    tested, (params,) = policy(spec), draw_epoch(parse_augment(spec), N, 3, 1).op_params
    names = ("code", "amount", "cosine")
    assert params.keys() == {f"{name}{step}" for name in names for step in range(tested.num_steps)}
    for step in range(tested.num_steps):
        code, amount, cosine = (params[f"{name}{step}"] for name in names)
        assert (code.dtype, amount.dtype, cosine.dtype) == (np.uint8, np.int32, np.int32)
        assert len(code) == len(amount) == len(cosine) == N
        probabilities = code_probabilities(tested, step % len(tested.sub_policies[0]))
        frequencies = code_frequencies(code)
        assert frequencies.keys() == probabilities.keys()
        for drawn_code, probability in probabilities.items():
            assert abs(frequencies[drawn_code] - probability) < 5 * (probability / N) ** 0.5 + 1e-9, drawn_code
        for name in tested.operations(step):
            if STANDARD_SPACE.get(name) and STANDARD_SPACE[name][2]:  # type: ignore[index]
                signed = amount[(code == OPERATION_CODES[name]) & (amount != 0)]
                assert abs((signed > 0).mean() - 0.5) < 2.5 / len(signed) ** 0.5, name
        # Every drawn triple is the encoding of an entry of the table.
        allowed = {encode_operation(name, m) for name in tested.operations(step) for m in tested.magnitudes(name)} | {
            encode_operation("Identity", 0)
        }
        triples = set(zip(code.tolist(), amount.tolist(), cosine.tolist(), strict=True))
        assert triples <= allowed
    if tested.num_draws > 1:
        assert abs((params["code0"] == params["code1"]).mean() - 1 / 14) < 0.01


def test_both_steps_are_drawn_from_the_same_sub_policy() -> None:
    """TranslateX only follows Rotate and Color, never the first steps of other sub-policies."""
    (params,) = draw_epoch(parse_augment("autoaugment"), N, 0, 0).op_params
    before = params["code0"][params["code1"] == OPERATION_CODES["TranslateX"]]
    assert set(before.tolist()) == {OPERATION_CODES["Identity"], OPERATION_CODES["Rotate"], OPERATION_CODES["Color"]}


@pytest.mark.parametrize("spec", ["autoaugment", "randaugment:26:2", "trivialaugment", "randaugment:7:1,autoaugment"])
def test_a_policy_applies_its_operations_in_order(spec: str) -> None:
    """The levels are chosen such that no shear reads from the exact midpoint between two pixels."""
    ops = parse_augment(spec)
    images = TEST_IMAGES.repeat(8, 1, 1, 1)
    op_params = draw_epoch(ops, len(images), 0, 5).op_params
    expected = images.clone()
    for op, params in zip(ops, op_params, strict=True):
        assert op.policy is not None
        decoded = {
            encode_operation(name, m): (name, m) for name in op.policy.operations() for m in op.policy.magnitudes(name)
        }
        decoded[encode_operation("Identity", 0)] = ("Identity", 0.0)
        for step in range(op.policy.num_steps):
            triples = zip(*(params[f"{name}{step}"].tolist() for name in ("code", "amount", "cosine")), strict=True)
            pairs = zip(expected, triples, strict=True)
            expected = torch.stack([apply_torchvision(image, *decoded[triple]) for image, triple in pairs])
    tensors = tuple({name: torch.from_numpy(array) for name, array in params.items()} for params in op_params)
    assert torch.equal(apply_augment(ops, images, tensors, (0, 0, 0)), expected)


def test_jitter_draws_the_four_operations_in_every_order() -> None:
    (params,) = draw_epoch(parse_augment("jitter:0.4"), N, 0, 0).op_params
    codes = np.stack([params[f"code{step}"] for step in range(4)])
    amounts = np.stack([params[f"amount{step}"] for step in range(4)]) / AMOUNT_SCALE
    orders = Counter(map(bytes, codes.T))
    assert len(orders) == 24
    assert all(abs(count / N - 1 / 24) < 5 * (1 / 24 / N) ** 0.5 for count in orders.values())
    for name in JITTER_OPERATIONS:
        drawn, limit = amounts[codes == OPERATION_CODES[name]], 0.2 if name == "Hue" else 0.4
        assert len(drawn) == N
        assert -limit <= drawn.min() < -0.99 * limit
        assert 0.99 * limit < drawn.max() <= limit
        assert abs(drawn.mean()) < 0.01 * limit
        assert abs(drawn.std() - limit / 3**0.5) < 0.01 * limit


def test_jitter_equals_torchvision() -> None:
    ops, images = parse_augment("jitter:0.5"), TEST_IMAGES.repeat(6, 1, 1, 1)
    (params,) = draw_epoch(ops, len(images), 0, 0).op_params
    names = {OPERATION_CODES[name]: name for name in JITTER_OPERATIONS}
    expected = images.clone()
    for step in range(4):
        codes, amounts = params[f"code{step}"].tolist(), (params[f"amount{step}"] / AMOUNT_SCALE).tolist()
        operations = zip(expected, codes, amounts, strict=True)
        expected = torch.stack([apply_torchvision(image, names[code], amount) for image, code, amount in operations])
    tensors = ({name: torch.from_numpy(array) for name, array in params.items()},)
    difference = (apply_augment(ops, images, tensors, (0, 0, 0)).int() - expected.int()).abs()
    # A hue on the other side of an integer differs by one; later operations can double the difference twice.
    assert int(difference.max()) <= 4
    assert int((difference > 0).sum()) <= 1e-4 * difference.numel()


def test_rotation_angles_are_uniform_and_rotations_equal_torchvision() -> None:
    (params,) = draw_epoch(parse_augment("rotate:7"), N, 0, 0).op_params
    degrees = np.degrees(np.arctan2(params["sine"], params["cosine"]))
    assert np.allclose((params["sine"] / AFFINE_SCALE) ** 2 + (params["cosine"] / AFFINE_SCALE) ** 2, 1, atol=1e-6)
    assert -7 <= degrees.min() < -6.99
    assert 6.99 < degrees.max() <= 7
    assert np.abs(np.histogram(degrees, 14, (-7, 7))[0] - N / 14).max() < 5 * (N / 14) ** 0.5
    images = TEST_IMAGES[:8]
    tensors = ({name: torch.from_numpy(array[:8]) for name, array in params.items()},)
    expected = [apply_torchvision(image, "Rotate", float(angle)) for image, angle in zip(images, degrees, strict=False)]
    assert torch.equal(apply_augment(parse_augment("rotate:7"), images, tensors, (0, 0, 0)), torch.stack(expected))


def write_policy(folder: Path, text: str) -> str:
    (folder / "custom.toml").write_text(text)
    return f"autoaugment:{folder / 'custom.toml'}"


def test_level_0_of_a_policy_file_is_the_smallest_magnitude(tmp_path: Path) -> None:
    write_policy(tmp_path, 'policy = [[["Color", 1, 0]], [["Rotate", 1, 0]]]')
    (op,) = parse_augment(f"autoaugment:{tmp_path / 'custom.toml'}")
    assert op.policy is not None
    assert (op.policy.magnitudes("Color"), set(op.policy.magnitudes("Rotate"))) == ((0.0,), {0.0})


def test_custom_policy_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sub_policies = [
        [[name, probability, *([] if level is None else [level])] for name, probability, level in steps]
        for steps in POLICIES["cifar10"]
    ]
    write_policy(tmp_path, "policy = " + json.dumps(sub_policies))
    (op,) = ops = parse_augment("autoaugment:custom.toml")
    assert format_augment(ops) == "autoaugment:custom.toml"
    assert op.policy == policy("autoaugment:cifar10")
    write_policy(tmp_path, 'policy = [[["Rotate", 1, 9]], [["Invert", 1.0], ["Color", 0.5, 0], ["Equalize", 0.2]]]')
    (other,) = parse_augment("autoaugment:custom.toml")
    assert other != op, "a kernel compiled for the old file would be used for the new one"
    assert other.policy is not None
    assert other.policy.num_steps == 3
    (params,) = draw_epoch((other,), 1000, 0, 0).op_params
    assert set(params["code0"].tolist()) == {OPERATION_CODES["Rotate"], OPERATION_CODES["Invert"]}
    assert not params["code2"][params["code0"] == OPERATION_CODES["Rotate"]].any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("policy = [[['Rotat', 0.5, 3]]]", r"sub-policy 1, step 1: unknown operation 'Rotat'; did you mean 'Rotate'\?"),
        ("policy = [[['Hue', 0.5, 3]]]", "unknown operation 'Hue'"),
        ("policy = [[['Invert', 1]], [['Rotate', 1.5, 3]]]", "sub-policy 2, step 1: probability 1.5 of Rotate is out"),
        ("policy = [[['Rotate', nan, 3]]]", "probability nan of Rotate is out of range; choose 0.0 to 1.0"),
        ("policy = [[['Rotate', true, 3]]]", "probability True of Rotate is out of range"),
        ("policy = [[['Rotate', 0.5, 10]]]", "level 10 of Rotate is out of range; choose an integer from 0 to 9"),
        ("policy = [[['Rotate', 0.5, -1]]]", "level -1 of Rotate is out of range"),
        ("policy = [[['Rotate', 0.5, 2.5]]]", "level 2.5 of Rotate is out of range"),
        ("policy = [[['Rotate', 0.5]]]", "level none of Rotate is out of range"),
        ("policy = [[['Invert', 0.5, 3]]]", "Invert has no magnitude, but the level is 3"),
        ("policy = [['Rotate', 0.5, 3]]", "sub-policy 1, step 1: 'Rotate' is not a step"),
        ("policy = [[5]]", "sub-policy 1, step 1: 5 is not a step"),
        ("policy = [[['Rotate']]]", r"sub-policy 1, step 1: \['Rotate'\] is not a step"),
        ("policy = [[['Rotate', 0.5, 3, 1]]]", r"sub-policy 1, step 1: \['Rotate', 0.5, 3, 1\] is not a step"),
        ("policy = [[]]", "is not a list of 1 to 4 steps"),
        ("policy = []", "is not a policy"),
        ("polcy = 3", "is not a policy"),
        ("policy = [[", "is not a readable TOML file"),
    ],
)
def test_errors_of_policy_files_name_the_location(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_augment(write_policy(tmp_path, text))
    assert (caught.value.exit_code, "\n" in str(caught.value)) == (2, False)


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(UsageError, match=r"no policy file nowhere\.toml; write a TOML file, or choose cifar10"):
        parse_augment("autoaugment:nowhere.toml")
    with pytest.raises(UsageError, match=r"write autoaugment:VARIANT, VARIANT one of cifar10 or a \.toml file"):
        parse_augment("autoaugment:imagenet")
    with pytest.raises(UsageError, match=r"unexpected 'x\.toml'"):
        parse_augment("crop:4:x.toml")
    with pytest.raises(UsageError, match="VALUE in randaugment:VALUE:2 must be from 0 to 30"):
        parse_augment("randaugment:31")
