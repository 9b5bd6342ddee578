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
from fastcifar.data.image_ops import SIDE
from fastcifar.data.mixers import MIXERS, Mixer
from fastcifar.data.policies import Policy
from fastcifar.errors import UsageError, pick

Number = int | float
Params = Mapping[str, Tensor]
Fill = tuple[int, int, int]

# The streams that must not change from epoch to epoch are keyed by an epoch that no run reaches.
EVERY_EPOCH = 2**64 - 1


@dataclass(frozen=True)
class Op:
    """One parsed item of an augmentation list: a row of `AUGMENTS` or `MIXERS` with its number and word.

    `number` is None and `word` is "" for rows that take none; `policy` is what the rows that have one read from them.
    """

    name: str
    number: Number | None
    word: str
    policy: Policy | None = None


@dataclass(frozen=True, eq=False)
class Moment:
    """What one op may draw from; every array it returns has the length of `order`.

    order   int64 [n], the sample at each position of the epoch
    epoch   the epoch's number, from 0
    random  the op's own stream of this epoch
    fixed   the op's own stream that is the same in every epoch
    """

    order: np.ndarray
    epoch: int
    random: np.random.Generator
    fixed: np.random.Generator


@dataclass(frozen=True)
class Augment:
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

    draw: Callable[[Op, Moment], dict[str, np.ndarray]]
    apply: Callable[[Op, Tensor, Params, Fill], Tensor]
    number: Number | None
    words: Mapping[str, tuple[Number, Number]]
    help: str
    policy: Callable[[Number | None, str], Policy] | None = None
    files: bool = False


@dataclass(frozen=True, eq=False)
class Draws:
    """All the randomness of one epoch; a batch, a rank's share or a DALI chunk is a slice of every array.

    order   int64 [n], the permutation: the sample at each position
    params  one dict for each op, in the order of the ops: arrays [n] over positions, of int32, uint8 or bool
    """

    order: np.ndarray
    params: tuple[dict[str, np.ndarray], ...]


def draw_crop(op: Op, moment: Moment) -> dict[str, np.ndarray]:
    """The window's corner in the padded image, `y` and `x` uniform over 0..2*pad; pad is the centre."""
    offsets = moment.random.integers(0, 2 * _whole(op) + 1, size=(2, len(moment.order)), dtype=np.uint8)
    return {"y": offsets[0], "x": offsets[1]}


def apply_crop(op: Op, rows: Tensor, params: Params, fill: Fill) -> Tensor:
    """The 32x32 window at (y, x) of the image padded by `op.number`, without building the padded image.

    `reflect` mirrors without repeating the edge, as numpy's and torch's "reflect".
    """
    return crop_flip_erase.cut(rows, params["y"].int(), params["x"].int(), _whole(op), op.word == "reflect")


def draw_flip(op: Op, moment: Moment) -> dict[str, np.ndarray]:
    """`flip`, bool: an independent coin for each position, or the alternating one.

    Alternating (Keller Jordan, airbench94): each sample has one fair coin for the whole run, and is flipped in the even
    epochs or in the odd ones by it, so that any two successive epochs show both orientations of every image.
    """
    n = len(moment.order)
    if op.word == "alternating":
        coin = moment.fixed.integers(0, 2, size=n, dtype=np.uint8).astype(bool)
        return {"flip": coin[moment.order] ^ bool(moment.epoch & 1)}
    assert op.number is not None
    return {"flip": moment.random.random(n) < op.number}


def apply_flip(op: Op, rows: Tensor, params: Params, fill: Fill) -> Tensor:
    """Mirror left and right where `flip` is set."""
    return crop_flip_erase.mirror(rows, params["flip"])


def draw_cutout(op: Op, moment: Moment) -> dict[str, np.ndarray]:
    """The square's centre `y`, `x`, uniform over the image's pixels: near the border a part of it falls outside."""
    centres = moment.random.integers(0, SIDE, size=(2, len(moment.order)), dtype=np.uint8)
    return {"y": centres[0], "x": centres[1]}


def apply_cutout(op: Op, rows: Tensor, params: Params, fill: Fill) -> Tensor:
    """Fill the square of `op.number` pixels whose corner is centre - size // 2 (DeVries and Taylor, 2017)."""
    size = _whole(op)
    top, left = (params[axis].int() - size // 2 for axis in "yx")
    return crop_flip_erase.fill_box(rows, top, left, size, size, crop_flip_erase.COLOURS.get(op.word, fill))


def draw_erase(op: Op, moment: Moment) -> dict[str, np.ndarray]:
    """The box's corner `y`, `x` and size `h`, `w`; no size in half of the images."""
    assert op.number is not None
    return crop_flip_erase.draw_erasing(op.number, len(moment.order), moment.random)


def apply_erase(op: Op, rows: Tensor, params: Params, fill: Fill) -> Tensor:
    """Fill the box (Zhong et al., 2017)."""
    top, left, height, width = (params[name].int() for name in "yxhw")
    return crop_flip_erase.fill_box(rows, top, left, height, width, crop_flip_erase.COLOURS.get(op.word, fill))


def draw_rotate(op: Op, moment: Moment) -> dict[str, np.ndarray]:
    """`sine` and `cosine` of an angle uniform over -op.number..op.number degrees."""
    return policies.draw_rotation(_whole(op), len(moment.order), moment.random)


def apply_rotate(op: Op, rows: Tensor, params: Params, fill: Fill) -> Tensor:
    """Turned around the centre, the nearest pixel, black outside."""
    return image_ops.rotate(rows, params["sine"], params["cosine"])


def draw_jitter(op: Op, moment: Moment) -> dict[str, np.ndarray]:
    """The four operations in an order of their own for each position, and their amounts."""
    assert op.number is not None
    return policies.draw_jitter(op.number, len(moment.order), moment.random)


def apply_jitter(op: Op, rows: Tensor, params: Params, fill: Fill) -> Tensor:
    """Brightness, contrast, saturation and hue, each once."""
    steps = [(params[f"code{step}"], params[f"amount{step}"], None) for step in range(4)]
    return image_ops.operate(rows, steps, [policies.JITTER] * 4)


def draw_policy(op: Op, moment: Moment) -> dict[str, np.ndarray]:
    """Every step's operation and amount, as `policies.draw` names them."""
    assert op.policy is not None, op
    return policies.draw(op.policy, len(moment.order), moment.random)


def apply_policy(op: Op, rows: Tensor, params: Params, fill: Fill) -> Tensor:
    """The policy's steps in turn, one operation of each for each image."""
    assert op.policy is not None, op
    count = range(op.policy.steps)
    steps = [(params[f"code{step}"], params[f"amount{step}"], params[f"cosine{step}"]) for step in count]
    return image_ops.operate(rows, steps, [op.policy.operations(step) for step in count])


AUGMENTS: dict[str, Augment] = {
    "crop": Augment(
        draw=draw_crop,
        apply=apply_crop,
        number=4,
        words={"zero": (1, 16), "reflect": (1, 16)},
        help="pad by NUMBER pixels of black or of reflection, then cut a random 32x32 window",
    ),
    "flip": Augment(
        draw=draw_flip,
        apply=apply_flip,
        number=0.5,
        words={"random": (0.0, 1.0), "alternating": (0.5, 0.5)},
        help="mirror left and right with probability NUMBER, or each image in every other epoch",
    ),
    "cutout": Augment(
        draw=draw_cutout,
        apply=apply_cutout,
        number=8,
        words={"mean": (1, SIDE), "zero": (1, SIDE)},
        help="fill a square of NUMBER pixels around a random centre with the mean colour or black",
    ),
    "erase": Augment(
        draw=draw_erase,
        apply=apply_erase,
        number=0.33,
        words=dict.fromkeys(("grey", "mean", "zero"), (crop_flip_erase.SMALLEST, 1.0)),
        help="in half of the images fill a box of 0.02 to NUMBER of the area with mid-grey, mean colour or black",
    ),
    "rotate": Augment(
        draw=draw_rotate,
        apply=apply_rotate,
        number=5,
        words={"": (1, 180)},
        help="turn by an angle of at most NUMBER degrees, black outside",
    ),
    "jitter": Augment(
        draw=draw_jitter,
        apply=apply_jitter,
        number=0.2,
        words={"": (0.0, 1.0)},
        help="change brightness, contrast and saturation by a share of at most NUMBER, the hue by half of it",
    ),
    "autoaugment": Augment(
        draw=draw_policy,
        apply=apply_policy,
        number=None,
        words={"cifar10": (0, 0)},
        help="AutoAugment's policy for CIFAR-10, or your own: autoaugment:FILE.toml",
        policy=lambda number, word: policies.read(word),
        files=True,
    ),
    "randaugment": Augment(
        draw=draw_policy,
        apply=apply_policy,
        number=9,
        words={"2": (0, 30), "1": (0, 30), "3": (0, 30)},
        help="RandAugment: WORD operations of fourteen, at level NUMBER of 30",
        policy=lambda number, word: policies.rand(int(number or 0), int(word)),
    ),
    "trivialaugment": Augment(
        draw=draw_policy,
        apply=apply_policy,
        number=None,
        words={"wide": (0, 0)},
        help="TrivialAugment Wide: one operation of fourteen, at a level of its own",
        policy=lambda number, word: policies.trivial(),
    ),
}


def parse(spec: str) -> tuple[Op, ...]:
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


def split_mixer(ops: tuple[Op, ...]) -> tuple[tuple[Op, ...], Op | None]:
    """The ops that the loaders apply, and the mixer of the training step, if the list has one."""
    return (ops[:-1], ops[-1]) if ops and ops[-1].name in MIXERS else (ops, None)


def spell(ops: tuple[Op, ...]) -> str:
    """The canonical spelling: every number and word written, "none" for no op; `parse(spell(ops)) == ops`.

    Defaults are written too, so that a saved recipe keeps its meaning when a default changes.
    """
    items = (
        ":".join([op.name, *([] if op.number is None else [repr(op.number)]), *filter(None, [op.word])]) for op in ops
    )
    return ",".join(items) or "none"


def _parse_item(item: str) -> Op:
    name, *rest = item.split(":")
    if not name:
        raise UsageError("an empty item in the augmentation list", "separate items by single commas: crop:4:zero,flip")
    if name == "none":
        raise UsageError("'none' beside other augmentations", "write 'none' alone, or leave it out")
    row: Augment | Mixer = pick({**AUGMENTS, **MIXERS}, name, "augmentation")
    number = row.number
    if number is not None and rest:
        number = _parse_number(item, rest.pop(0), row)
    word = rest.pop(0) if rest else next(iter(row.words))
    file = row.files and word.endswith(".toml")
    if rest or (word not in row.words and not file):
        grammar = name + (":NUMBER" if row.number is not None else "") + (":WORD" if "" not in row.words else "")
        allowed = f", WORD one of {', '.join(row.words)}" if "" not in row.words else ""
        allowed += " or a .toml file" if row.files else ""
        raise UsageError(
            f"augmentation {item!r}: unexpected {(rest or [word])[0]!r}", f"write {grammar}{allowed} ({row.help})"
        )
    low, high = row.words[next(iter(row.words)) if file else word]
    if number is not None and not low <= number <= high:
        bounds = f"{low}" if low == high else f"from {low} to {high}"
        grammar = f"{name}:NUMBER:{word}".rstrip(":")
        raise UsageError(f"augmentation {item!r}: {number} is out of bounds", f"{grammar} takes {bounds}")
    return Op(name, number, word, row.policy(number, word) if row.policy else None)


def _parse_number(item: str, text: str, row: Augment | Mixer) -> Number:
    kind = type(row.number)
    try:
        if "_" in text or not text.isascii():  # int() and float() take 1_6 and other scripts' digits
            raise ValueError
        return int(text) if kind is int else float(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        example = f"{item.split(':')[0]}:{row.number}"
        raise UsageError(f"augmentation {item!r}: {text!r} is not {what}", f"for example {example}") from None


def draw_epoch(ops: tuple[Op, ...], n: int, epoch: int, seed: int) -> Draws:
    """The permutation of `n` samples and the draws of every op for one epoch, from (seed, epoch) alone.

    The key of the counter-based Philox generator is [seed, epoch]; its stream jumped by 0 gives the permutation, that
    jumped by 1 + i the op at place i (a jump is 2**128 draws: streams never meet). Adding an op therefore changes no
    draw of those before it, and batch size, ranks, loader and device change nothing at all.
    """
    assert n > 0, n
    assert seed >= 0, seed
    assert 0 <= epoch < EVERY_EPOCH, epoch
    order = _stream(seed, epoch, 0).permutation(n)
    params = []
    for place, op in enumerate(ops):
        moment = Moment(order, epoch, _stream(seed, epoch, 1 + place), _stream(seed, EVERY_EPOCH, 1 + place))
        params.append(AUGMENTS[op.name].draw(op, moment))
    return Draws(order, tuple(params))


def draw_mix(ops: tuple[Op, ...], n: int, epoch: int, seed: int) -> np.ndarray:
    """What the mixer at the end of `ops` draws for the `n` positions of an epoch: [n] or [n,k], by the same rule."""
    mixer = ops[-1]
    assert mixer.number is not None, mixer
    return MIXERS[mixer.name].draw(mixer.number, n, _stream(seed, epoch, len(ops)))


def apply(ops: tuple[Op, ...], images: Tensor, params: tuple[Params, ...], fill: Fill) -> Tensor:
    """The batch after every op in turn; uint8 channels_last [b,3,32,32] in and out, the input left as it is.

    `params` holds one dict for each op, tensors [b] on the images' device: a slice of `Draws.params`.
    `fill` is the mean colour, 0..255 for each channel. Compiles as a full graph.
    """
    rows = apply_rows(ops, images.permute(0, 2, 3, 1).flatten(2), params, fill)
    return rows.unflatten(2, (SIDE, 3)).permute(0, 3, 1, 2)


def apply_rows(ops: tuple[Op, ...], rows: Tensor, params: tuple[Params, ...], fill: Fill) -> Tensor:
    """`apply` on the same bytes seen as rows, uint8 [b,32,96]: what a loader compiles together with its gather.

    Rows of 96 adjacent bytes give the compiler a long innermost loop, and int32 one width for values, masks and
    indices: a CPU's fused kernel is vectorised well only with both. In it the integers are registers, not memory.
    """
    assert len(ops) == len(params), (len(ops), len(params))
    assert rows.dtype == torch.uint8, rows.dtype
    rows = rows.int()
    for op, drawn in zip(ops, params, strict=True):
        rows = AUGMENTS[op.name].apply(op, rows, drawn, fill)
    return rows.to(torch.uint8)


def _stream(seed: int, epoch: int, jumps: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).jumped(jumps))


def _whole(op: Op) -> int:
    assert isinstance(op.number, int), op
    return op.number
