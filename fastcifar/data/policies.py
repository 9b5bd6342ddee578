"""Augmentation policies as tables: which operations of `pixels`, how strong and how often.

AutoAugment's for CIFAR-10 (Cubuk et al., 2018), RandAugment (2019) and TrivialAugment Wide (Müller and Hutter, 2021) as
torchvision's v2 defines them, and a user's own from a TOML file. It draws for whole epochs in numpy; it must not touch
an image.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastcifar.data.image_ops import AFFINE_SCALE, AMOUNT_SCALE, CIFAR_IMAGE_SIZE, encode_operation
from fastcifar.errors import UsageError, lookup
from fastcifar.files import load_toml

# operation -> its magnitudes at the first and the last level, and whether its sign is a coin's; None: it has none
OperationSpace = Mapping[str, tuple[float, float, bool] | None]

STANDARD_SPACE: OperationSpace = {
    "Identity": None,
    "ShearX": (0.0, 0.3, True),
    "ShearY": (0.0, 0.3, True),
    "TranslateX": (0.0, 150 / 331 * CIFAR_IMAGE_SIZE, True),
    "TranslateY": (0.0, 150 / 331 * CIFAR_IMAGE_SIZE, True),
    "Rotate": (0.0, 30.0, True),
    "Brightness": (0.0, 0.9, True),
    "Color": (0.0, 0.9, True),
    "Contrast": (0.0, 0.9, True),
    "Sharpness": (0.0, 0.9, True),
    "Posterize": (8.0, 4.0, False),
    "Solarize": (1.0, 0.0, False),
    "AutoContrast": None,
    "Equalize": None,
}
WIDE_SPACE: OperationSpace = {
    **STANDARD_SPACE,
    "ShearX": (0.0, 0.99, True),
    "ShearY": (0.0, 0.99, True),
    "TranslateX": (0.0, 32.0, True),
    "TranslateY": (0.0, 32.0, True),
    "Rotate": (0.0, 135.0, True),
    "Brightness": (0.0, 0.99, True),
    "Color": (0.0, 0.99, True),
    "Contrast": (0.0, 0.99, True),
    "Sharpness": (0.0, 0.99, True),
    "Posterize": (8.0, 2.0, False),
}
AUTOAUGMENT_SPACE: OperationSpace = {**STANDARD_SPACE, "Invert": None}
NUM_LEVELS = 31  # of RandAugment and TrivialAugment
AUTOAUGMENT_NUM_LEVELS = 10  # of AutoAugment, and of a user's policy
MAX_SUBPOLICY_STEPS = 4  # of a user's sub-policy

# (operation, probability, level or None) of each step of each sub-policy
SubPolicies = tuple[tuple[tuple[str, float, int | None], ...], ...]

AUTOAUGMENT_CIFAR10: SubPolicies = (
    (("Invert", 0.1, None), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, None), ("Equalize", 0.9, None)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, None), ("Equalize", 0.5, None)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, None), ("AutoContrast", 0.4, None)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, None)),
    (("Equalize", 0.2, None), ("AutoContrast", 0.6, None)),
    (("Equalize", 0.2, None), ("Equalize", 0.6, None)),
    (("Color", 0.9, 9), ("Equalize", 0.6, None)),
    (("AutoContrast", 0.8, None), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, None)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, None), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, None), ("Invert", 0.1, None)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, None)),
)


@dataclass(frozen=True)
class PolicyOp:
    """One operation of a sub-policy: done with `probability`, its magnitude negated by a fair coin if `signed`."""

    operation: str
    probability: float
    magnitude: float
    signed: bool


@dataclass(frozen=True)
class Policy:
    """Sub-policies of equal chance and equal length, of which each image gets `times`, drawn independently."""

    sub_policies: tuple[tuple[PolicyOp, ...], ...]
    num_draws: int = 1

    @property
    def num_steps(self) -> int:
        """Operations that an image gets."""
        return self.num_draws * len(self.sub_policies[0])

    def operations(self, step: int | None = None) -> tuple[str, ...]:
        """The names of the operations that a step may do, or any step, in alphabetical order."""
        places = range(len(self.sub_policies[0])) if step is None else [step % len(self.sub_policies[0])]
        return tuple(sorted({row[place].operation for row in self.sub_policies for place in places}))

    def magnitudes(self, operation: str) -> tuple[float, ...]:
        """The magnitudes that an operation may have, in order; `pixels.single` applies one to a batch."""
        found = [choice for row in self.sub_policies for choice in row if choice.operation == operation]
        return tuple(sorted({c.magnitude for c in found} | {-c.magnitude for c in found if c.signed}))


IDENTITY_OP = PolicyOp("Identity", 1.0, 0.0, False)


def magnitude_levels(operation: str, space: OperationSpace, num_levels: int) -> list[float]:
    """The magnitudes of an operation at each of `count` levels; zeros if it has none.

    torch.linspace's arithmetic: a float32 rise, a fused multiply-add from the nearer end, rounded to float32.
    """
    span = lookup(space, operation, "operation")
    if span is None:
        return [0.0] * num_levels
    first, last = (float(np.float32(end)) for end in span[:2])
    rise = float(np.float32(last - first) / np.float32(num_levels - 1))
    near = [first + rise * i if i < num_levels // 2 else last - rise * (num_levels - 1 - i) for i in range(num_levels)]
    return np.rint(near).tolist() if operation == "Posterize" else np.array(near, np.float32).tolist()


def make_policy_op(
    operation: str, probability: float, level: int | None, space: OperationSpace, num_levels: int
) -> PolicyOp:
    """A row's entry by its level of `count`; a level of None is for an operation that has none."""
    span = space[operation]
    return PolicyOp(
        operation, probability, magnitude_levels(operation, space, num_levels)[level or 0], bool(span and span[2])
    )


def autoaugment_policy(rows: SubPolicies) -> Policy:
    """A policy in AutoAugment's terms: sub-policies of (operation, probability, level 0 to 9)."""
    longest = max(len(row) for row in rows)
    made = [[make_policy_op(*step, AUTOAUGMENT_SPACE, AUTOAUGMENT_NUM_LEVELS) for step in row] for row in rows]
    return Policy(tuple((*row, *[IDENTITY_OP] * (longest - len(row))) for row in made))


def randaugment_policy(level: int, num_draws: int) -> Policy:
    """RandAugment: `times` operations of fourteen, all at `level` of 0 to 30."""
    return Policy(
        tuple((make_policy_op(name, 1.0, level, STANDARD_SPACE, NUM_LEVELS),) for name in STANDARD_SPACE), num_draws
    )


def trivialaugment_policy() -> Policy:
    """TrivialAugment Wide: one operation of fourteen at one level of 31."""
    return Policy(
        tuple(
            (make_policy_op(name, 1.0, level, WIDE_SPACE, NUM_LEVELS),)
            for name in WIDE_SPACE
            for level in range(NUM_LEVELS)
        )
    )


POLICIES: dict[str, SubPolicies] = {"cifar10": AUTOAUGMENT_CIFAR10}  # AutoAugment's by name


def load_policy(name_or_path: str) -> Policy:
    """AutoAugment's policy of that name, or a user's own from a TOML file, whose name ends in .toml.

    The file holds one list `policy` of sub-policies, each a list of [operation, probability, level], such as
    `policy = [[["Invert", 0.1], ["Contrast", 0.2, 6]], [["Rotate", 0.7, 2]]]`; operations without a magnitude take no
    level. Errors: `UsageError` that names the place.
    """
    if not name_or_path.endswith(".toml"):
        return autoaugment_policy(lookup(POLICIES, name_or_path, "policy"))
    if not Path(name_or_path).is_file():
        raise UsageError(f"no policy file {name_or_path}", f"write a TOML file, or one of {', '.join(POLICIES)}")
    held = load_toml(name_or_path)
    rows = held.get("policy")
    if held.keys() != {"policy"} or not isinstance(rows, list) or not rows:
        raise UsageError(f"{name_or_path} is not a policy", "write one list: policy = [[['Rotate', 0.7, 2]], ...]")
    return autoaugment_policy(
        tuple(_parse_sub_policy(f"{name_or_path}, sub-policy {number}", row) for number, row in enumerate(rows, 1))
    )


def _parse_sub_policy(where: str, row: Any) -> tuple[tuple[str, float, int | None], ...]:
    if not isinstance(row, list) or not 1 <= len(row) <= MAX_SUBPOLICY_STEPS:
        raise UsageError(
            f"{where}: {row!r} is not a list of 1 to {MAX_SUBPOLICY_STEPS} steps", "write [['Rotate', 0.7, 2]]"
        )
    return tuple(_parse_step(f"{where}, step {number}", entry) for number, entry in enumerate(row, 1))


def _parse_step(where: str, entry: Any) -> tuple[str, float, int | None]:
    if not isinstance(entry, list) or len(entry) not in (2, 3) or not isinstance(entry[0], str):
        raise UsageError(f"{where}: {entry!r} is not a step", "write [operation, probability, level]")
    name, probability, *level = entry
    try:
        span = lookup(AUTOAUGMENT_SPACE, name, "operation")
    except UsageError as error:
        raise UsageError(f"{where}: {error.problem}", error.remedy) from None
    if isinstance(probability, bool) or not isinstance(probability, int | float) or not 0 <= probability <= 1:
        raise UsageError(f"{where}: probability {probability!r} of {name} is out of range", "choose 0.0 to 1.0")
    if span is None and level:
        raise UsageError(f"{where}: {name} has no magnitude, not {level[0]!r}", f"write ['{name}', {probability}]")
    if span and not (level and type(level[0]) is int and 0 <= level[0] < AUTOAUGMENT_NUM_LEVELS):
        given = repr(level[0]) if level else "none"
        raise UsageError(
            f"{where}: level {given} of {name} is out of range", f"choose 0 to {AUTOAUGMENT_NUM_LEVELS - 1}, whole"
        )
    return name, float(probability), level[0] if span else None


@functools.lru_cache(maxsize=64)
def _encode_policy(policy: Policy) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [rows, places, 2, 3], probability [rows, places]): the integers of each choice, as it is and negated."""
    codes = [[[encode_operation(c.operation, m) for m in (c.magnitude, -c.magnitude if c.signed else c.magnitude)] for c in row]
             for row in policy.sub_policies]  # fmt: skip
    return np.array(codes, np.int32), np.array([[c.probability for c in row] for row in policy.sub_policies])


def draw_policy_params(policy: Policy, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """`code` uint8, `amount` and `cosine` int32 of every step, arrays [n] named by it: code0, amount0, ..."""
    codes, probability = _encode_policy(policy)
    drawn: dict[str, np.ndarray] = {}
    row = np.empty(n, np.int64)
    for step in range(policy.num_steps):
        place = step % codes.shape[1]
        if place == 0:
            row = rng.integers(0, len(codes), size=n)
        sign = rng.integers(0, 2, size=n, dtype=np.uint8)
        done = rng.random(n) < probability[row, place]
        found = np.where(done[:, None], codes[row, place, sign], encode_operation("Identity", 0.0))
        drawn[f"code{step}"] = found[:, 0].astype(np.uint8)
        drawn[f"amount{step}"], drawn[f"cosine{step}"] = found[:, 1].astype(np.int32), found[:, 2].astype(np.int32)
    return drawn


JITTER_OPERATIONS = ("Brightness", "Contrast", "Color", "Hue")


def draw_jitter_params(strength: float, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The four operations of a jitter in an order of its own for each position: `code0`, `amount0`, ... `amount3`.

    Uniform from -strength to strength, the hue from half of that (torchvision's ColorJitter).
    """
    codes = np.array([encode_operation(name, 0.0)[0] for name in JITTER_OPERATIONS], np.uint8)
    reach = strength * np.array([1, 1, 1, 0.5])
    order = rng.permuted(np.broadcast_to(np.arange(4), (n, 4)), axis=1)
    amounts = np.rint(rng.uniform(-AMOUNT_SCALE, AMOUNT_SCALE, (n, 4)) * reach[order]).astype(np.int32)
    drawn = {f"code{step}": codes[order[:, step]] for step in range(4)}
    return drawn | {f"amount{step}": np.ascontiguousarray(amounts[:, step]) for step in range(4)}


def draw_rotation_params(degrees: float, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """`sine` and `cosine`, int32 in `pixels.ONE`s, of an angle uniform from -degrees to degrees."""
    angle = rng.uniform(-degrees, degrees, n) * (math.pi / 180)
    return {
        name: np.rint(f(angle) * AFFINE_SCALE).astype(np.int32) for name, f in (("sine", np.sin), ("cosine", np.cos))
    }
