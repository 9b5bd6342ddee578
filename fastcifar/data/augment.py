"""Augmentations: `AUGMENTS`, their one spelling, their draws and their application.

Randomness is data: `draw_epoch` makes it in numpy, for a whole epoch, from (seed, epoch) alone.
Application is pure: `apply` maps a batch and its slice of the draws to a batch, exactly, in uint8.
It must not hold state, draw while applying, loop over images in Python or wait for the device.
A new augmentation is one row of `AUGMENTS` and its two functions; the loaders need no change. Mixers, spelt in the same
list, have a room of their own: they are applied in the training step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastcifar.data import crop_flip_erase, image_ops, policies
from fastcifar.data.image_ops import CIFAR_IMAGE_SIZE
from fastcifar.data.mixers import MIXERS, MixerSpec
from fastcifar.data.policies import Policy
from fastcifar.errors import UsageError, lookup

Number = int | float
OpParams = Mapping[str, Tensor]
FillColor = tuple[int, int, int]

# The streams that must not change from epoch to epoch are keyed by an epoch that no run reaches.
FIXED_STREAM_EPOCH = 2**64 - 1


@dataclass(frozen=True)
class AugmentOp:
    """One parsed item of an augmentation list: a row of `AUGMENTS` or `MIXERS` with its number and word.

    `number` is None and `word` is "" for rows that take none; `policy` is what the rows that have one read from them.
    """

    name: str
    value: Number | None
    variant: str
    policy: Policy | None = None


@dataclass(frozen=True, eq=False)
class DrawContext:
    """What one op may draw from; every array it returns has the length of `order`.

    order   int64 [n], the sample at each position of the epoch
    epoch   the epoch's number, from 0
    random  the op's own stream of this epoch
    fixed   the op's own stream that is the same in every epoch
    """

    permutation: np.ndarray
    epoch: int
    rng: np.random.Generator
    fixed_rng: np.random.Generator


@dataclass(frozen=True)
class AugmentSpec:
    """One row of `AUGMENTS`.

    draw    (op, moment) -> parameters by name, arrays [n] over the epoch's positions
    apply   (op, rows, parameters [b], fill) -> rows; `rows` is int32 [b,32,96], a row's pixels with their channels
            side by side: column 3 * x + channel, values 0..255
    number  the default, None if the row takes no number; an int default admits whole numbers only
    words   the allowed words, each with the bounds (both included) of the number beside it; the first is the default,
            "" alone if the row takes no word
    help    one line
    policy  (number, word) -> the policy of the op, for the rows that have one
    files   a word may also be the name of a TOML file
    """

    draw: Callable[[AugmentOp, DrawContext], dict[str, np.ndarray]]
    apply: Callable[[AugmentOp, Tensor, OpParams, FillColor], Tensor]
    default_value: Number | None
    variants: Mapping[str, tuple[Number, Number]]
    help: str
    build_policy: Callable[[Number | None, str], Policy] | None = None
    accepts_file: bool = False


@dataclass(frozen=True, eq=False)
class AugmentParams:
    """All the randomness of one epoch; a batch, a rank's share or a DALI chunk is a slice of every array.

    order   int64 [n], the permutation: the sample at each position
    params  one dict for each op, in the order of the ops: arrays [n] over positions, of int32, uint8 or bool
    """

    permutation: np.ndarray
    op_params: tuple[dict[str, np.ndarray], ...]


def draw_crop(op: AugmentOp, context: DrawContext) -> dict[str, np.ndarray]:
    """The window's corner in the padded image, `y` and `x` uniform over 0..2*pad; pad is the centre."""
    offsets = context.rng.integers(0, 2 * _int_value(op) + 1, size=(2, len(context.permutation)), dtype=np.uint8)
    return {"y": offsets[0], "x": offsets[1]}


def apply_crop(op: AugmentOp, rows: Tensor, params: OpParams, fill_color: FillColor) -> Tensor:
    """The 32x32 window at (y, x) of the image padded by `op.value`, without building the padded image.

    `reflect` mirrors without repeating the edge, as numpy's and torch's "reflect".
    """
    return crop_flip_erase.crop_rows(
        rows, params["y"].int(), params["x"].int(), _int_value(op), op.variant == "reflect"
    )


def draw_flip(op: AugmentOp, context: DrawContext) -> dict[str, np.ndarray]:
    """`flip`, bool: an independent coin for each position, or the alternating one.

    Alternating (Keller Jordan, airbench94): each sample has one fair coin for the whole run, and is flipped in the even
    epochs or in the odd ones by it, so that any two successive epochs show both orientations of every image.
    """
    n = len(context.permutation)
    if op.variant == "alternating":
        coin = context.fixed_rng.integers(0, 2, size=n, dtype=np.uint8).astype(bool)
        return {"flip": coin[context.permutation] ^ bool(context.epoch & 1)}
    assert op.value is not None
    return {"flip": context.rng.random(n) < op.value}


def apply_flip(op: AugmentOp, rows: Tensor, params: OpParams, fill_color: FillColor) -> Tensor:
    """Mirror left and right where `flip` is set."""
    return crop_flip_erase.flip_rows(rows, params["flip"])


def draw_cutout(op: AugmentOp, context: DrawContext) -> dict[str, np.ndarray]:
    """The square's centre `y`, `x`, uniform over the image's pixels: near the border a part of it falls outside."""
    centres = context.rng.integers(0, CIFAR_IMAGE_SIZE, size=(2, len(context.permutation)), dtype=np.uint8)
    return {"y": centres[0], "x": centres[1]}


def apply_cutout(op: AugmentOp, rows: Tensor, params: OpParams, fill_color: FillColor) -> Tensor:
    """Fill the square of `op.value` pixels whose corner is centre - size // 2 (DeVries and Taylor, 2017)."""
    size = _int_value(op)
    top, left = (params[axis].int() - size // 2 for axis in "yx")
    return crop_flip_erase.fill_box(
        rows, top, left, size, size, crop_flip_erase.FILL_COLORS.get(op.variant, fill_color)
    )


def draw_erase(op: AugmentOp, context: DrawContext) -> dict[str, np.ndarray]:
    """The box's corner `y`, `x` and size `h`, `w`; no size in half of the images."""
    assert op.value is not None
    return crop_flip_erase.draw_erasing_params(op.value, len(context.permutation), context.rng)


def apply_erase(op: AugmentOp, rows: Tensor, params: OpParams, fill_color: FillColor) -> Tensor:
    """Fill the box (Zhong et al., 2017)."""
    top, left, height, width = (params[name].int() for name in "yxhw")
    return crop_flip_erase.fill_box(
        rows, top, left, height, width, crop_flip_erase.FILL_COLORS.get(op.variant, fill_color)
    )


def draw_rotate(op: AugmentOp, context: DrawContext) -> dict[str, np.ndarray]:
    """`sine` and `cosine` of an angle uniform over -op.value..op.value degrees."""
    return policies.draw_rotation_params(_int_value(op), len(context.permutation), context.rng)


def apply_rotate(op: AugmentOp, rows: Tensor, params: OpParams, fill_color: FillColor) -> Tensor:
    """Turned around the centre, the nearest pixel, black outside."""
    return image_ops.rotate_rows(rows, params["sine"], params["cosine"])


def draw_jitter(op: AugmentOp, context: DrawContext) -> dict[str, np.ndarray]:
    """The four operations in an order of their own for each position, and their amounts."""
    assert op.value is not None
    return policies.draw_jitter_params(op.value, len(context.permutation), context.rng)


def apply_jitter(op: AugmentOp, rows: Tensor, params: OpParams, fill_color: FillColor) -> Tensor:
    """Brightness, contrast, saturation and hue, each once."""
    steps = [(params[f"code{step}"], params[f"amount{step}"], None) for step in range(4)]
    return image_ops.apply_operations(rows, steps, [policies.JITTER_OPERATIONS] * 4)


def draw_policy(op: AugmentOp, context: DrawContext) -> dict[str, np.ndarray]:
    """Every step's operation and amount, as `policies.draw` names them."""
    assert op.policy is not None, op
    return policies.draw_policy_params(op.policy, len(context.permutation), context.rng)


def apply_policy(op: AugmentOp, rows: Tensor, params: OpParams, fill_color: FillColor) -> Tensor:
    """The policy's steps in turn, one operation of each for each image."""
    assert op.policy is not None, op
    count = range(op.policy.num_steps)
    steps = [(params[f"code{step}"], params[f"amount{step}"], params[f"cosine{step}"]) for step in count]
    return image_ops.apply_operations(rows, steps, [op.policy.operations(step) for step in count])


AUGMENTS: dict[str, AugmentSpec] = {
    "crop": AugmentSpec(
        draw=draw_crop,
        apply=apply_crop,
        default_value=4,
        variants={"zero": (1, 16), "reflect": (1, 16)},
        help="pad by VALUE pixels of black or of reflection, then cut a random 32x32 window",
    ),
    "flip": AugmentSpec(
        draw=draw_flip,
        apply=apply_flip,
        default_value=0.5,
        variants={"random": (0.0, 1.0), "alternating": (0.5, 0.5)},
        help="mirror left and right with probability VALUE, or each image in every other epoch",
    ),
    "cutout": AugmentSpec(
        draw=draw_cutout,
        apply=apply_cutout,
        default_value=8,
        variants={"mean": (1, CIFAR_IMAGE_SIZE), "zero": (1, CIFAR_IMAGE_SIZE)},
        help="fill a square of VALUE pixels around a random centre with the mean colour or black",
    ),
    "erase": AugmentSpec(
        draw=draw_erase,
        apply=apply_erase,
        default_value=0.33,
        variants=dict.fromkeys(("gray", "mean", "zero"), (crop_flip_erase.MIN_ERASE_AREA, 1.0)),
        help="in half of the images fill a box of 0.02 to VALUE of the area with mid-gray, mean colour or black",
    ),
    "rotate": AugmentSpec(
        draw=draw_rotate,
        apply=apply_rotate,
        default_value=5,
        variants={"": (1, 180)},
        help="turn by an angle of at most VALUE degrees, black outside",
    ),
    "jitter": AugmentSpec(
        draw=draw_jitter,
        apply=apply_jitter,
        default_value=0.2,
        variants={"": (0.0, 1.0)},
        help="change brightness, contrast and saturation by a share of at most VALUE, the hue by half of it",
    ),
    "autoaugment": AugmentSpec(
        draw=draw_policy,
        apply=apply_policy,
        default_value=None,
        variants={"cifar10": (0, 0)},
        help="AutoAugment's policy for CIFAR-10, or your own: autoaugment:FILE.toml",
        build_policy=lambda number, word: policies.load_policy(word),
        accepts_file=True,
    ),
    "randaugment": AugmentSpec(
        draw=draw_policy,
        apply=apply_policy,
        default_value=9,
        variants={"2": (0, 30), "1": (0, 30), "3": (0, 30)},
        help="RandAugment: VARIANT operations of fourteen, at level VALUE of 30",
        build_policy=lambda number, word: policies.randaugment_policy(int(number or 0), int(word)),
    ),
    "trivialaugment": AugmentSpec(
        draw=draw_policy,
        apply=apply_policy,
        default_value=None,
        variants={"wide": (0, 0)},
        help="TrivialAugment Wide: one operation of fourteen, at a level of its own",
        build_policy=lambda number, word: policies.trivialaugment_policy(),
    ),
}


def parse_augment(spec: str) -> tuple[AugmentOp, ...]:
    """The ops of a spelling such as "crop:4:zero,flip,cutout:8"; "none" or "" is no op.

    An item is `name[:number[:word]]` (`name[:word]` for a row that takes no number); what is left out is the row's
    default. One mixer may stand at the end. Raises `UsageError` with the nearest name, the allowed words or the bounds.
    """
    if spec.strip() in ("", "none"):
        return ()
    ops = tuple(_parse_item(item.strip()) for item in spec.split(","))
    before, _ = split_mixer(ops)
    for op in before:
        if op.name in MIXERS:
            raise UsageError(f"augmentation {op.name!r} mixes whole batches", "write one mixer, at the list's end")
    return ops


def split_mixer(ops: tuple[AugmentOp, ...]) -> tuple[tuple[AugmentOp, ...], AugmentOp | None]:
    """The ops that the loaders apply, and the mixer of the training step, if the list has one."""
    return (ops[:-1], ops[-1]) if ops and ops[-1].name in MIXERS else (ops, None)


def format_augment(ops: tuple[AugmentOp, ...]) -> str:
    """The canonical spelling: every number and word written, "none" for no op; `parse(spell(ops)) == ops`.

    Defaults are written too, so that a saved recipe keeps its meaning when a default changes.
    """
    items = (
        ":".join([op.name, *([] if op.value is None else [repr(op.value)]), *filter(None, [op.variant])]) for op in ops
    )
    return ",".join(items) or "none"


def _parse_item(item: str) -> AugmentOp:
    name, *rest = item.split(":")
    if not name:
        raise UsageError("an empty item in the augmentation list", "separate items by single commas: crop:4:zero,flip")
    if name == "none":
        raise UsageError("'none' beside other augmentations", "write 'none' alone, or leave it out")
    row: AugmentSpec | MixerSpec = lookup({**AUGMENTS, **MIXERS}, name, "augmentation")
    number = row.default_value
    if number is not None and rest:
        number = _parse_value(item, rest.pop(0), row)
    word = rest.pop(0) if rest else next(iter(row.variants))
    file = row.accepts_file and word.endswith(".toml")
    if rest or (word not in row.variants and not file):
        grammar = (
            name + (":VALUE" if row.default_value is not None else "") + (":VARIANT" if "" not in row.variants else "")
        )
        allowed = f", VARIANT one of {', '.join(row.variants)}" if "" not in row.variants else ""
        allowed += " or a .toml file" if row.accepts_file else ""
        raise UsageError(
            f"augmentation {item!r}: unexpected {(rest or [word])[0]!r}", f"write {grammar}{allowed} ({row.help})"
        )
    low, high = row.variants[next(iter(row.variants)) if file else word]
    if number is not None and not low <= number <= high:
        bounds = f"{low}" if low == high else f"from {low} to {high}"
        grammar = f"{name}:VALUE:{word}".rstrip(":")
        raise UsageError(f"augmentation {item!r}: {number} is out of bounds", f"{grammar} takes {bounds}")
    return AugmentOp(name, number, word, row.build_policy(number, word) if row.build_policy else None)


def _parse_value(item: str, text: str, spec: AugmentSpec | MixerSpec) -> Number:
    kind = type(spec.default_value)
    try:
        if "_" in text or not text.isascii():  # int() and float() take 1_6 and other scripts' digits
            raise ValueError
        return int(text) if kind is int else float(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        example = f"{item.split(':')[0]}:{spec.default_value}"
        raise UsageError(f"augmentation {item!r}: {text!r} is not {what}", f"for example {example}") from None


def draw_epoch(ops: tuple[AugmentOp, ...], n: int, epoch: int, seed: int) -> AugmentParams:
    """The permutation of `n` samples and the draws of every op for one epoch, from (seed, epoch) alone.

    The key of the counter-based Philox generator is [seed, epoch]; its stream jumped by 0 gives the permutation, that
    jumped by 1 + i the op at place i (a jump is 2**128 draws: streams never meet). Adding an op therefore changes no
    draw of those before it, and batch size, ranks, loader and device change nothing at all.
    """
    assert n > 0, n
    assert seed >= 0, seed
    assert 0 <= epoch < FIXED_STREAM_EPOCH, epoch
    order = _rng_stream(seed, epoch, 0).permutation(n)
    params = []
    for place, op in enumerate(ops):
        moment = DrawContext(
            order, epoch, _rng_stream(seed, epoch, 1 + place), _rng_stream(seed, FIXED_STREAM_EPOCH, 1 + place)
        )
        params.append(AUGMENTS[op.name].draw(op, moment))
    return AugmentParams(order, tuple(params))


def draw_mixer_params(ops: tuple[AugmentOp, ...], n: int, epoch: int, seed: int) -> np.ndarray:
    """What the mixer at the end of `ops` draws for the `n` positions of an epoch: [n] or [n,k], by the same rule."""
    mixer = ops[-1]
    assert mixer.value is not None, mixer
    return MIXERS[mixer.name].draw(mixer.value, n, _rng_stream(seed, epoch, len(ops)))


def apply_augment(
    ops: tuple[AugmentOp, ...], images: Tensor, params: tuple[OpParams, ...], fill_color: FillColor
) -> Tensor:
    """The batch after every op in turn; uint8 channels_last [b,3,32,32] in and out, the input left as it is.

    `params` holds one dict for each op, tensors [b] on the images' device: a slice of `Draws.params`.
    `fill` is the mean colour, 0..255 for each channel. Compiles as a full graph.
    """
    rows = apply_augment_rows(ops, images.permute(0, 2, 3, 1).flatten(2), params, fill_color)
    return rows.unflatten(2, (CIFAR_IMAGE_SIZE, 3)).permute(0, 3, 1, 2)


def apply_augment_rows(
    ops: tuple[AugmentOp, ...], rows: Tensor, params: tuple[OpParams, ...], fill_color: FillColor
) -> Tensor:
    """`apply` on the same bytes seen as rows, uint8 [b,32,96]: what a loader compiles together with its gather.

    Rows of 96 adjacent bytes give the compiler a long innermost loop, and int32 one width for values, masks and
    indices: a CPU's fused kernel is vectorised well only with both. In it the integers are registers, not memory.
    """
    assert len(ops) == len(params), (len(ops), len(params))
    assert rows.dtype == torch.uint8, rows.dtype
    rows = rows.int()
    for op, drawn in zip(ops, params, strict=True):
        rows = AUGMENTS[op.name].apply(op, rows, drawn, fill_color)
    return rows.to(torch.uint8)


def _rng_stream(seed: int, epoch: int, jumps: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).jumped(jumps))


def _int_value(op: AugmentOp) -> int:
    assert isinstance(op.value, int), op
    return op.value
