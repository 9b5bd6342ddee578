"""Random parameters of augmentations, and policies: tables of operations with their probabilities and magnitudes."""

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastcifar.data.image_ops import AFFINE_SCALE, AMOUNT_SCALE, CIFAR_IMAGE_AREA, CIFAR_IMAGE_SIZE, encode_operation
from fastcifar.errors import UsageError, lookup
from fastcifar.files import load_toml

# Operation -> (magnitude at the first level, magnitude at the last level, whether the sign is random), or None for an
# operation without magnitude.
OperationSpace = Mapping[str, tuple[float, float, bool] | None]

STANDARD_SPACE: OperationSpace = {
    "Identity": None,
    **dict.fromkeys(("ShearX", "ShearY"), (0.0, 0.3, True)),
    **dict.fromkeys(("TranslateX", "TranslateY"), (0.0, 150 / 331 * CIFAR_IMAGE_SIZE, True)),
    "Rotate": (0.0, 30.0, True),
    **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), (0.0, 0.9, True)),
    "Posterize": (8.0, 4.0, False),
    "Solarize": (1.0, 0.0, False),
    "AutoContrast": None,
    "Equalize": None,
}
WIDE_SPACE: OperationSpace = {
    **STANDARD_SPACE,
    **dict.fromkeys(("ShearX", "ShearY", "Brightness", "Color", "Contrast", "Sharpness"), (0.0, 0.99, True)),
    **dict.fromkeys(("TranslateX", "TranslateY"), (0.0, 32.0, True)),
    "Rotate": (0.0, 135.0, True),
    "Posterize": (8.0, 2.0, False),
}
AUTOAUGMENT_SPACE: OperationSpace = {**STANDARD_SPACE, "Invert": None}
NUM_LEVELS = 31  # magnitude levels of RandAugment and TrivialAugment
AUTOAUGMENT_NUM_LEVELS = 10  # magnitude levels of AutoAugment and of custom policies
MAX_SUBPOLICY_STEPS = 4  # maximum length of a sub-policy in a custom policy

# (operation, probability, level or None) of each step of each sub-policy
SubPolicies = tuple[tuple[tuple[str, float, int | None], ...], ...]

# AutoAugment policies by name
POLICIES: dict[str, SubPolicies] = {
    "cifar10": (
        (("Invert", 0.1, None), ("Contrast", 0.2, 6)), (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
        (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)), (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
        (("AutoContrast", 0.5, None), ("Equalize", 0.9, None)), (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
        (("Color", 0.4, 3), ("Brightness", 0.6, 7)), (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
        (("Equalize", 0.6, None), ("Equalize", 0.5, None)), (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
        (("Color", 0.7, 7), ("TranslateX", 0.5, 8)), (("Equalize", 0.3, None), ("AutoContrast", 0.4, None)),
        (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)), (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
        (("Solarize", 0.5, 2), ("Invert", 0.0, None)), (("Equalize", 0.2, None), ("AutoContrast", 0.6, None)),
        (("Equalize", 0.2, None), ("Equalize", 0.6, None)), (("Color", 0.9, 9), ("Equalize", 0.6, None)),
        (("AutoContrast", 0.8, None), ("Solarize", 0.2, 8)), (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
        (("Solarize", 0.4, 5), ("AutoContrast", 0.9, None)), (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
        (("AutoContrast", 0.9, None), ("Solarize", 0.8, 3)), (("Equalize", 0.8, None), ("Invert", 0.1, None)),
        (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, None)),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class PolicyOp:
    """One operation of a sub-policy, applied with `probability`, at a magnitude drawn uniformly from `magnitudes`."""

    operation: str
    probability: float
    magnitudes: tuple[float, ...]


@dataclass(frozen=True)
class Policy:
    """Equally likely sub-policies of equal length, of which `num_draws` are drawn independently for each image."""

    sub_policies: tuple[tuple[PolicyOp, ...], ...]
    num_draws: int = 1

    @property
    def num_steps(self) -> int:
        return self.num_draws * len(self.sub_policies[0])

    def operations(self, step: int | None = None) -> tuple[str, ...]:
        """Return the names of the operations that can occur in `step`, or in any step, in alphabetical order."""
        length = len(self.sub_policies[0])
        indices = range(length) if step is None else [step % length]
        return tuple(sorted({sub_policy[index].operation for sub_policy in self.sub_policies for index in indices}))

    def magnitudes(self, operation: str) -> tuple[float, ...]:
        """Return the magnitudes that an operation can have, in ascending order, in the units of `encode_operation`."""
        ops = [op for sub_policy in self.sub_policies for op in sub_policy if op.operation == operation]
        return tuple(sorted({magnitude for op in ops for magnitude in op.magnitudes}))


def magnitude_levels(operation: str, space: OperationSpace, num_levels: int) -> list[float]:
    """Return the magnitude at each level with the arithmetic of torch.linspace; zeros if the operation has none."""
    magnitude_range = space[operation]
    if magnitude_range is None:
        return [0.0] * num_levels
    first, last = (float(np.float32(end)) for end in magnitude_range[:2])
    step = float(np.float32(last - first) / np.float32(num_levels - 1))
    exact = [first + step * i if i < num_levels // 2 else last - step * (num_levels - 1 - i) for i in range(num_levels)]
    return np.rint(exact).tolist() if operation == "Posterize" else np.array(exact, np.float32).tolist()


def policy_op(name: str, probability: float, level: int | None, space: OperationSpace, num_levels: int) -> PolicyOp:
    """Return the `PolicyOp` at one of `num_levels` levels; `level` is None for an operation without magnitude."""
    magnitude = magnitude_levels(name, space, num_levels)[level or 0]
    is_signed = (space[name] or (0.0, 0.0, False))[2]
    return PolicyOp(name, probability, (magnitude, -magnitude) if is_signed else (magnitude,))


def uniform_policy(space: OperationSpace, levels: Sequence[int], num_draws: int = 1) -> Policy:
    """Return the policy that draws an operation of `space` at one of `levels`, `num_draws` times for each image."""
    ops = [policy_op(name, 1.0, level, space, NUM_LEVELS) for name in space for level in levels]
    return Policy(tuple((op,) for op in ops), num_draws)


def load_policy(source: str) -> Policy:
    """Return a named AutoAugment policy, or that of a TOML file: `policy = [[["Invert", 0.1], ["Color", 0.2, 6]]]`."""
    if not source.endswith(".toml"):
        sub_policies = lookup(POLICIES, source, "policy")
    elif not os.path.isfile(source):
        raise UsageError(f"no policy file {source}", f"write a TOML file, or choose {' or '.join(POLICIES)}")
    else:
        content = load_toml(source)
        values = content.get("policy")
        if content.keys() != {"policy"} or not isinstance(values, list) or not values:
            problem = f"{source} is not a policy"
            raise UsageError(problem, "write one list: policy = [[['Rotate', 0.7, 2]], ...]")
        sub_policies = [_parse_sub_policy(f"{source}, sub-policy {i}", steps) for i, steps in enumerate(values, 1)]
    longest = max(len(steps) for steps in sub_policies)
    padded = []
    for steps in sub_policies:
        ops = [policy_op(*step, AUTOAUGMENT_SPACE, AUTOAUGMENT_NUM_LEVELS) for step in steps]
        padded.append((*ops, *[PolicyOp("Identity", 1.0, (0.0,))] * (longest - len(ops))))
    return Policy(tuple(padded))


def _parse_sub_policy(location: str, steps: Any) -> list[tuple[str, float, int | None]]:
    if not isinstance(steps, list) or not 1 <= len(steps) <= MAX_SUBPOLICY_STEPS:
        problem = f"{location}: {steps!r} is not a list of 1 to {MAX_SUBPOLICY_STEPS} steps"
        raise UsageError(problem, "write [['Rotate', 0.7, 2]]")
    return [_parse_step(f"{location}, step {i}", step) for i, step in enumerate(steps, 1)]


def _parse_step(location: str, value: Any) -> tuple[str, float, int | None]:
    if not isinstance(value, list) or len(value) not in (2, 3) or not isinstance(value[0], str):
        raise UsageError(f"{location}: {value!r} is not a step", "write [operation, probability, level]")
    name, probability, *levels = value
    level = levels[0] if levels else None
    try:
        has_magnitude = lookup(AUTOAUGMENT_SPACE, name, "operation") is not None
    except UsageError as error:
        raise UsageError(f"{location}: {error.problem}", error.remedy) from None
    if isinstance(probability, bool) or not isinstance(probability, int | float) or not 0 <= probability <= 1:
        raise UsageError(f"{location}: probability {probability!r} of {name} is out of range", "choose 0.0 to 1.0")
    if not has_magnitude and level is not None:
        problem = f"{location}: {name} has no magnitude, but the level is {level!r}"
        raise UsageError(problem, f"write ['{name}', {probability}]")
    if has_magnitude and not (type(level) is int and 0 <= level < AUTOAUGMENT_NUM_LEVELS):
        problem = f"{location}: level {'none' if level is None else repr(level)} of {name} is out of range"
        raise UsageError(problem, f"choose an integer from 0 to {AUTOAUGMENT_NUM_LEVELS - 1}")
    return name, float(probability), level


@functools.lru_cache(maxsize=64)
def _encode_policy(policy: Policy) -> tuple[np.ndarray, np.ndarray]:
    """Return the encoded operations int32 [sub-policies, steps, 2 signs, 3] and their probabilities."""
    encoded = [
        [[encode_operation(op.operation, op.magnitudes[sign]) for sign in (0, -1)] for op in steps]
        for steps in policy.sub_policies
    ]
    probabilities = [[op.probability for op in steps] for steps in policy.sub_policies]
    return np.array(encoded, np.int32), np.array(probabilities)


def draw_policy_params(policy: Policy, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw the operations of every step: arrays [n] code0 uint8, amount0 and cosine0 int32, code1, ..."""
    encoded, probability = _encode_policy(policy)
    params: dict[str, np.ndarray] = {}
    sub_policy = np.empty(n, np.int64)
    for step in range(policy.num_steps):
        index = step % encoded.shape[1]
        if index == 0:
            sub_policy = rng.integers(0, len(encoded), size=n)
        sign = rng.integers(0, 2, size=n, dtype=np.uint8)
        is_applied = rng.random(n) < probability[sub_policy, index]
        drawn = np.where(is_applied[:, None], encoded[sub_policy, index, sign], encode_operation("Identity", 0.0))
        params[f"code{step}"] = drawn[:, 0].astype(np.uint8)
        params[f"amount{step}"], params[f"cosine{step}"] = drawn[:, 1].astype(np.int32), drawn[:, 2].astype(np.int32)
    return params


# As in torchvision's RandomErasing; the area is a fraction of the image and the aspect ratio is height / width.
ERASE_PROBABILITY = 0.5
MIN_ERASE_AREA = 0.02
ERASE_ASPECT_RANGE = (0.3, 3.3)
MAX_ERASE_ATTEMPTS = 10
JITTER_OPERATIONS = ("Brightness", "Contrast", "Color", "Hue")


def draw_jitter_params(strength: float, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw the order and amounts of ColorJitter's operations, `code0`, ..., `amount3`; the hue has half the range."""
    codes = np.array([encode_operation(name, 0.0)[0] for name in JITTER_OPERATIONS], np.uint8)
    max_amount = strength * np.array([1, 1, 1, 0.5])
    order = rng.permuted(np.broadcast_to(np.arange(4), (n, 4)), axis=1)
    amounts = np.rint(rng.uniform(-AMOUNT_SCALE, AMOUNT_SCALE, (n, 4)) * max_amount[order]).astype(np.int32)
    params = {f"code{step}": codes[order[:, step]] for step in range(4)}
    return params | {f"amount{step}": np.ascontiguousarray(amounts[:, step]) for step in range(4)}


def draw_rotation_params(degrees: float, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw `sine` and `cosine`, int32 in units of 1 / AFFINE_SCALE, of an angle uniform over -degrees..degrees."""
    angle = rng.uniform(-degrees, degrees, n) * (math.pi / 180)
    values = {"sine": np.sin(angle), "cosine": np.cos(angle)}
    return {name: np.rint(value * AFFINE_SCALE).astype(np.int32) for name, value in values.items()}


def draw_erasing_params(max_area: float, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw the boxes `y`, `x`, `h`, `w`, uint8 [n], of torchvision's RandomErasing; about half have size 0."""
    low, high = np.log(ERASE_ASPECT_RANGE)
    heights, widths = np.zeros((2, n), np.uint8)
    pending = np.flatnonzero(rng.random(n) < ERASE_PROBABILITY)
    for _ in range(MAX_ERASE_ATTEMPTS):
        area = CIFAR_IMAGE_AREA * rng.uniform(MIN_ERASE_AREA, max_area, len(pending))
        aspect = np.exp(rng.uniform(low, high, len(pending)))
        height, width = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (height < CIFAR_IMAGE_SIZE) & (width < CIFAR_IMAGE_SIZE)
        heights[pending[fits]], widths[pending[fits]] = height[fits], width[fits]
        pending = pending[~fits]
    y, x = (rng.integers(0, CIFAR_IMAGE_SIZE - size, dtype=np.uint8, endpoint=True) for size in (heights, widths))
    return {"y": y, "x": x, "h": heights, "w": widths}
