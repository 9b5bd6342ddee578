"""Augmentations: the table `AUGMENTS`, parsing of lists, random parameters of an epoch, and functions to apply them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastcifar.data import image_ops, policies
from fastcifar.data.image_ops import CIFAR_IMAGE_SIZE, FILL_COLORS, FillColor, crop_rows, fill_box, flip_rows
from fastcifar.data.mixers import MIXERS, MixerSpec
from fastcifar.data.policies import MIN_ERASE_AREA, NUM_LEVELS, STANDARD_SPACE, WIDE_SPACE, Policy, uniform_policy
from fastcifar.errors import UsageError, lookup
from fastcifar.python_objects import active_objects, object_name

Number = int | float
ParamArrays = dict[str, np.ndarray]
OpParams = Mapping[str, Tensor]

# Random streams that stay the same in every epoch use this epoch number, which no run reaches.
FIXED_STREAM_EPOCH = 2**64 - 1


@dataclass(frozen=True)
class AugmentOp:
    """One parsed item of an augmentation list; `value` is None and `variant` is "" for entries that take none."""

    name: str
    value: Number | None
    variant: str
    policy: Policy | None = None
    function: Callable[[Any], Any] | None = None  # of `transform` and `batch_transform`, which are given from Python

    @property
    def number(self) -> Number:
        """The value of an entry that takes one."""
        assert self.value is not None, self
        return self.value

    def __str__(self) -> str:
        return ":".join(filter(None, (self.name, "" if self.value is None else repr(self.value), self.variant)))


AugmentOps = tuple[AugmentOp, ...]  # a parsed augmentation list
PYTHON_OPS = ("transform", "batch_transform")  # fields of `PythonObjects`; the variant is the name of the object


class DrawContext(NamedTuple):
    """The inputs of a draw function; every array that the draw function returns has the length of `permutation`."""

    permutation: np.ndarray  # int64 [n], the sample at each position of the epoch
    epoch: int
    rng: np.random.Generator
    fixed_rng: np.random.Generator  # starts from the same state in every epoch


@dataclass(frozen=True)
class AugmentSpec:
    """One entry of `AUGMENTS`; `apply` works on rows as described in `image_ops`."""

    draw: Callable[[AugmentOp, DrawContext], ParamArrays]  # arrays [n] over the positions of the epoch, by name
    apply: Callable[[AugmentOp, Tensor, OpParams, FillColor], Tensor]  # the parameters are tensors [b]
    default_value: Number | None  # None if the entry takes no value; an int default admits integers only
    variants: Mapping[str, tuple[Number, Number]]  # variant ("" for none) -> bounds of the value; the default is first
    help: str
    build_policy: Callable[[Number | None, str], Policy] | None = None  # (value, variant) -> policy
    accepts_file: bool = False  # whether a variant may also be the path of a TOML file


class AugmentParams(NamedTuple):
    """All random numbers of one epoch; slices of the arrays belong to one batch, one rank or one DALI chunk."""

    permutation: np.ndarray  # int64 [n], the sample at each position
    op_params: tuple[ParamArrays, ...]  # for each augmentation: bool, uint8 or fixed-point int32 arrays [n]


def _draw_corner(context: DrawContext, num_positions: int) -> ParamArrays:
    y, x = context.rng.integers(0, num_positions, size=(2, len(context.permutation)), dtype=np.uint8)
    return {"y": y, "x": x}


def draw_flip(op: AugmentOp, context: DrawContext) -> ParamArrays:
    """Draw `flip`, bool: with probability `op.value`, or alternating between epochs (Keller Jordan, airbench94)."""
    n = len(context.permutation)
    if op.variant == "alternating":
        is_odd = context.fixed_rng.integers(0, 2, size=n, dtype=np.uint8).astype(bool)
        return {"flip": is_odd[context.permutation] ^ bool(context.epoch & 1)}
    return {"flip": context.rng.random(n) < op.number}


def apply_box(op: AugmentOp, rows: Tensor, params: OpParams, fill_color: FillColor) -> Tensor:
    """Fill a square of side `op.value` around a center (cutout, DeVries and Taylor, 2017), or a box of random size."""
    top, left = params["y"].int(), params["x"].int()
    height = width = int(op.number)
    if "h" in params:  # random erasing (Zhong et al., 2017)
        height, width = params["h"].int(), params["w"].int()
    else:
        top, left = top - height // 2, left - width // 2
    return fill_box(rows, top, left, height, width, FILL_COLORS.get(op.variant, fill_color))


def _apply_steps(rows: Tensor, params: OpParams, operations: list[tuple[str, ...]]) -> Tensor:
    steps = [(params[f"code{i}"], params[f"amount{i}"], params.get(f"cosine{i}")) for i in range(len(operations))]
    return image_ops.apply_operations(rows, steps, operations)


def _draw_policy(op: AugmentOp, context: DrawContext) -> ParamArrays:
    assert op.policy is not None, op
    return policies.draw_policy_params(op.policy, len(context.permutation), context.rng)


def _apply_policy(op: AugmentOp, rows: Tensor, params: OpParams, fill_color: FillColor) -> Tensor:
    assert op.policy is not None, op
    return _apply_steps(rows, params, [op.policy.operations(step) for step in range(op.policy.num_steps)])


_policy_spec = partial(AugmentSpec, _draw_policy, _apply_policy)


AUGMENTS: dict[str, AugmentSpec] = {
    "crop": AugmentSpec(
        draw=lambda op, context: _draw_corner(context, 2 * int(op.number) + 1),
        apply=lambda op, rows, params, fill_color: crop_rows(
            rows, params["y"].int(), params["x"].int(), int(op.number), op.variant == "reflect"
        ),
        default_value=4,
        variants={"zero": (1, 16), "reflect": (1, 16)},
        help="pad by VALUE pixels (black or reflected), then crop a random 32x32 window",
    ),
    "flip": AugmentSpec(
        draw=draw_flip,
        apply=lambda op, rows, params, fill_color: flip_rows(rows, params["flip"]),
        default_value=0.5,
        variants={"random": (0.0, 1.0), "alternating": (0.5, 0.5)},
        help="flip horizontally with probability VALUE, or, if `alternating`, flip each image in every second epoch",
    ),
    "cutout": AugmentSpec(
        # The center of the square, uniform over the pixels; near the border, part of the square falls outside.
        draw=lambda op, context: _draw_corner(context, CIFAR_IMAGE_SIZE),
        apply=apply_box,
        default_value=8,
        variants={"mean": (1, CIFAR_IMAGE_SIZE), "zero": (1, CIFAR_IMAGE_SIZE)},
        help="fill a square of VALUE x VALUE pixels at a random center with the mean color or black",
    ),
    "erase": AugmentSpec(
        draw=lambda op, context: policies.draw_erasing_params(op.number, len(context.permutation), context.rng),
        apply=apply_box,
        default_value=0.33,
        variants=dict.fromkeys(("gray", "mean", "zero"), (MIN_ERASE_AREA, 1.0)),
        help="in half of the images, fill a box of 0.02 to VALUE of the area with mid-gray, the mean color or black",
    ),
    "rotate": AugmentSpec(
        draw=lambda op, context: policies.draw_rotation_params(op.number, len(context.permutation), context.rng),
        apply=lambda op, rows, params, fill_color: image_ops.rotate_rows(rows, params["sine"], params["cosine"]),
        default_value=5,
        variants={"": (1, 180)},
        help="rotate by a random angle of at most VALUE degrees, black outside",
    ),
    "jitter": AugmentSpec(
        draw=lambda op, context: policies.draw_jitter_params(op.number, len(context.permutation), context.rng),
        apply=lambda op, rows, params, fill_color: _apply_steps(rows, params, [policies.JITTER_OPERATIONS] * 4),
        default_value=0.2,
        variants={"": (0.0, 1.0)},
        help="multiply brightness, contrast and saturation by a factor from 1 - VALUE to 1 + VALUE, "
        "shift the hue by at most VALUE / 2 of a full turn",
    ),
    "autoaugment": _policy_spec(
        default_value=None,
        variants={"cifar10": (0, 0)},
        help="AutoAugment policy for CIFAR-10, or your own policy: autoaugment:FILE.toml",
        build_policy=lambda value, variant: policies.load_policy(variant),
        accepts_file=True,
    ),
    "randaugment": _policy_spec(
        default_value=9,
        variants={"2": (0, 30), "1": (0, 30), "3": (0, 30)},
        help="RandAugment: VARIANT of fourteen operations per image, at magnitude level VALUE (0 to 30)",
        build_policy=lambda value, variant: uniform_policy(STANDARD_SPACE, [int(value or 0)], int(variant)),
    ),
    "trivialaugment": _policy_spec(
        default_value=None,
        variants={"wide": (0, 0)},
        help="TrivialAugment Wide: one of fourteen operations per image, at a random magnitude level",
        build_policy=lambda value, variant: uniform_policy(WIDE_SPACE, range(NUM_LEVELS)),
    ),
}


def parse_augment(spec: str) -> AugmentOps:
    """Parse a list of `name[:value][:variant]`, such as "crop:4:zero,flip", or "none"; a mixer may be the last item."""
    if spec.strip() in ("", "none"):
        return ()
    ops = tuple(_parse_item(item.strip()) for item in spec.split(","))
    for op in ops[:-1]:
        if op.name in MIXERS:
            raise UsageError(f"augmentation {op.name!r} is a mixer", "write at most one mixer, at the end")
    return ops


def split_mixer(ops: AugmentOps) -> tuple[AugmentOps, AugmentOp | None]:
    """Return the augmentations that the loaders apply, and the mixer that the training step applies, or None."""
    return (ops[:-1], ops[-1]) if ops and ops[-1].name in MIXERS else (ops, None)


def format_augment(ops: AugmentOps) -> str:
    """Return the canonical text of a list with all values, the inverse of `parse_augment`; "none" if it is empty."""
    return ",".join(map(str, ops)) or "none"


def _parse_item(item: str) -> AugmentOp:
    name, *fields = item.split(":")
    if not name:
        raise UsageError("an empty item in the augmentation list", "separate items by single commas: crop:4:zero,flip")
    if name in PYTHON_OPS:
        function, expected = getattr(active_objects(), name), ":".join(fields)
        if function is None or object_name(function) != expected:
            other = "" if function is None else f", not {object_name(function)}"
            raise UsageError(f"augmentation {item!r} is given from Python", f"give {expected} as {name}={other}")
        return AugmentOp(name, None, expected, function=function)
    if name == "none":
        raise UsageError("'none' together with other augmentations", "write 'none' alone, or remove it")
    spec: AugmentSpec | MixerSpec = lookup({**AUGMENTS, **MIXERS}, name, "augmentation")
    default_variant = next(iter(spec.variants))
    value = spec.default_value
    if value is not None and fields:
        value = _parse_value(item, fields.pop(0), spec)
    variant = fields.pop(0) if fields else default_variant
    is_file = spec.accepts_file and variant.endswith(".toml")
    if fields or (variant not in spec.variants and not is_file):
        syntax = name + (":VALUE" if value is not None else "")
        if default_variant:
            syntax += f":VARIANT, VARIANT one of {', '.join(spec.variants)}"
        syntax += " or a .toml file" if spec.accepts_file else ""
        unexpected = fields[0] if fields else variant
        raise UsageError(f"augmentation {item!r}: unexpected {unexpected!r}", f"write {syntax} ({spec.help})")
    low, high = spec.variants[default_variant if is_file else variant]
    if value is not None and not low <= value <= high:
        bounds = f"{low}" if low == high else f"from {low} to {high}"
        syntax = f"{name}:VALUE:{variant}".rstrip(":")
        raise UsageError(f"augmentation {item!r}: {value} is out of bounds", f"VALUE in {syntax} must be {bounds}")
    return AugmentOp(name, value, variant, spec.build_policy(value, variant) if spec.build_policy else None)


def _parse_value(item: str, text: str, spec: AugmentSpec | MixerSpec) -> Number:
    is_int = isinstance(spec.default_value, int)
    try:
        if "_" in text or not text.isascii():  # int() and float() accept 1_6 and the digits of other scripts
            raise ValueError
        return int(text) if is_int else float(text)
    except ValueError:
        expected = "an integer" if is_int else "a number"
        example = f"{item.split(':')[0]}:{spec.default_value}"
        raise UsageError(f"augmentation {item!r}: {text!r} is not {expected}", f"for example {example}") from None


def draw_epoch(ops: AugmentOps, n: int, epoch: int, seed: int) -> AugmentParams:
    """Draw the permutation of `n` samples and the parameters of every augmentation for one epoch.

    Stream 0 of the Philox generator with key [seed, epoch] gives the permutation; stream 1 + i gives the parameters of
    `ops[i]`. Streams are 2**128 draws apart. The result does not depend on anything else, such as the batch size.
    """
    permutation = _rng_stream(seed, epoch, 0).permutation(n)
    op_params = []
    for jumps, op in enumerate(ops, 1):
        rngs = _rng_stream(seed, epoch, jumps), _rng_stream(seed, FIXED_STREAM_EPOCH, jumps)
        op_params.append(AUGMENTS[op.name].draw(op, DrawContext(permutation, epoch, *rngs)))
    return AugmentParams(permutation, tuple(op_params))


def draw_mixer_params(ops: AugmentOps, n: int, epoch: int, seed: int) -> np.ndarray:
    """Draw the parameters of the mixer at the end of `ops` for the `n` positions of an epoch: [n] or [n,k]."""
    return MIXERS[ops[-1].name].draw(ops[-1].number, n, _rng_stream(seed, epoch, len(ops)))


def apply_augment(ops: AugmentOps, images: Tensor, params: tuple[OpParams, ...], fill_color: FillColor) -> Tensor:
    """Apply augmentations to a batch, uint8 channels_last [b,3,32,32] in and out, with their `params` [b]."""
    return apply_augment_rows(ops, images.permute(0, 2, 3, 1).flatten(2), params, fill_color)


def apply_augment_rows(ops: AugmentOps, rows: Tensor, params: tuple[OpParams, ...], fill_color: FillColor) -> Tensor:
    """Return the same images as `apply_augment` from the same bytes viewed as rows, uint8 [b,32,96].

    A fused CPU kernel is vectorized well only if its innermost loop is long (rows of 96 adjacent bytes) and if values,
    masks and indices have the same width (int32). The int32 values are kept in registers, not in memory.
    """
    assert rows.dtype == torch.uint8, rows.dtype
    rows = rows.int()
    for op, op_params in zip(ops, params, strict=True):
        rows = AUGMENTS[op.name].apply(op, rows, op_params, fill_color)
    return rows.to(torch.uint8).unflatten(2, (CIFAR_IMAGE_SIZE, 3)).permute(0, 3, 1, 2)


def _rng_stream(seed: int, epoch: int, jumps: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).jumped(jumps))
