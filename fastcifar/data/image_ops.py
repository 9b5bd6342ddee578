"""Image operations on a whole batch: each image by an operation and an amount of its own, exact in uint8.

They are torchvision's v2 operations on uint8 tensors; what moves pixels takes the nearest one, and black from outside.
Amounts are integers made on the host and every rounding is spelt out, so that all devices give the same bytes.
It must not draw, loop over images in Python, or know a policy: `policies` chooses, here it is done.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from fastcifar.errors import lookup

CIFAR_IMAGE_SIZE = 32  # pixels of an image's edge
CIFAR_IMAGE_AREA = CIFAR_IMAGE_SIZE * CIFAR_IMAGE_SIZE
PLANE_PADDING = (
    2 * CIFAR_IMAGE_SIZE
)  # pixels before and after a plane: a pixel's neighbours are then shifts of the flat plane
AFFINE_SCALE = 1 << 23  # 1 in the coefficients of an affine map: 125 half-pixels of it stay within int32
AMOUNT_SCALE = (
    1 << 29
)  # 1 in the amount of a blend or of a hue: float32 magnitudes from 1/64 on are whole numbers of it

# An image that is inverted is solarized from 0 on.
OPERATION_CODES = {
    "Identity": 0,
    "ShearX": 1,
    "ShearY": 2,
    "TranslateX": 3,
    "TranslateY": 4,
    "Rotate": 5,
    "Brightness": 6,
    "Contrast": 7,
    "Color": 8,
    "Hue": 9,
    "Sharpness": 10,
    "Posterize": 11,
    "Solarize": 12,
    "Invert": 12,
    "AutoContrast": 13,
    "Equalize": 14,
}
GEOMETRIC_OPS = {"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"}
BLEND_OPS = {"Brightness", "Contrast", "Color"}
LOOKUP_OPS = {"Posterize", "Solarize", "Invert", "AutoContrast", "Equalize"}
RED_WEIGHT, GREEN_WEIGHT, BLUE_WEIGHT, INV_255 = (
    float(np.float32(weight)) for weight in (0.2989, 0.587, 0.114, 1 / 255)
)

# (code uint8, amount int32, cosine int32), each [b]: what is done to each image, in the integers of `encode`; the
# cosine is None where nothing moves
OperationStep = tuple[Tensor, Tensor, Tensor | None]


def encode_operation(name: str, magnitude: float) -> tuple[int, int, int]:
    """The integers (code, amount, cosine) of an operation for one image.

    magnitude  ShearX, ShearY: pixels sideways for each pixel; TranslateX, TranslateY: whole pixels; Rotate: degrees,
               counter-clockwise; Brightness, Contrast, Color, Sharpness: the factor less 1, from -1 to 1; Hue: turns,
               from -0.5 to 0.5; Posterize: bits, 0 to 8; Solarize: threshold as a share of 255; none for the others

    Errors: `UsageError` for an unknown name.
    """
    code = lookup(OPERATION_CODES, name, "operation")
    if name == "Rotate":
        angle = math.radians(magnitude)
        return code, round(math.sin(angle) * AFFINE_SCALE), round(math.cos(angle) * AFFINE_SCALE)
    amount = 0
    if name in ("ShearX", "ShearY"):
        amount = round(magnitude * AFFINE_SCALE)
    elif name in ("TranslateX", "TranslateY"):
        amount = int(magnitude) * (-2 * AFFINE_SCALE // CIFAR_IMAGE_SIZE)
    elif name in ("Brightness", "Contrast", "Color", "Sharpness", "Hue"):
        amount = round(magnitude * AMOUNT_SCALE)
    elif name == "Posterize":
        amount = 256 - (1 << (8 - int(magnitude)))
    elif name == "Solarize":
        amount = math.ceil(np.float32(255 * magnitude))  # torch compares in float32
    return code, amount, AFFINE_SCALE


def apply_operations(rows: Tensor, steps: Sequence[OperationStep], operations: Sequence[Collection[str]]) -> Tensor:
    """Each image after its operations, one of each step; int32 rows [b,32,96] in and out (column 3 * x + channel).

    names   for each step the operations that it may hold: what only others need is not computed
    """
    image = rows
    for (code, amount, cosine), may in zip(steps, operations, strict=True):
        cosine = None if cosine is None else cosine[:, None, None]
        image = _apply_step(image, code.int()[:, None, None], amount[:, None, None], cosine, {*may})
    return image.int().transpose(1, 2).reshape(rows.shape)


def apply_operation(images: Tensor, name: str, magnitude: float) -> Tensor:
    """The batch after one operation, the same for every image; uint8 [b,3,32,32] in and out. Errors: `encode`'s."""
    rows = images.permute(0, 2, 3, 1).reshape(-1, CIFAR_IMAGE_SIZE, 3 * CIFAR_IMAGE_SIZE).int()
    integers = torch.tensor(encode_operation(name, magnitude), dtype=torch.int32, device=images.device)
    code, amount, cosine = integers[:, None].expand(3, len(rows)).contiguous()
    changed = apply_operations(rows, [(code, amount, cosine)], [(name,)]).to(torch.uint8)
    return changed.unflatten(2, (CIFAR_IMAGE_SIZE, 3)).permute(0, 3, 1, 2)


def rotate_rows(rows: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
    """Each image turned counter-clockwise around its centre; int32 rows [b,32,96], sine and cosine [b] in `ONE`s."""
    sine, cosine = sine[:, None, None], cosine[:, None, None]
    return _sample_nearest(rows, *_pixel_grid(rows), (cosine, -sine, 0), (sine, cosine, 0))


def _pixel_grid(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(y [32,1], x [96], channel [96]) of rows."""
    row = torch.arange(CIFAR_IMAGE_SIZE, dtype=torch.int32, device=rows.device)
    column = torch.arange(3 * CIFAR_IMAGE_SIZE, dtype=torch.int32, device=rows.device)
    x = (column * 171) >> 9  # column // 3: a CPU has no division of vectors
    return row[:, None], x, column - 3 * x


def _apply_step(image: Tensor, code: Tensor, amount: Tensor, cosine: Tensor | None, names: set[str]) -> Tensor:
    """One step: rows int32 [b,32,96] or planes uint8 [b,3,1024] -> planes uint8 [b,3,1024]."""
    padded = planes = image
    if image.shape[1] != 3 or names & GEOMETRIC_OPS or "Sharpness" in names:
        padded = _materialize(_apply_geometric(image, code, amount, cosine, names))
        planes = padded[:, :, PLANE_PADDING : PLANE_PADDING + CIFAR_IMAGE_AREA]
    values = planes.int()
    result = values
    if names & LOOKUP_OPS:
        table = _materialize(_lookup_table(planes, code, amount, names))
        sample = torch.arange(len(table), dtype=torch.int32, device=table.device)[:, None, None]
        channel = torch.arange(3, dtype=torch.int32, device=table.device)[:, None]
        result = table[sample, channel, values].int()
    if names & BLEND_OPS:
        other = _blend_target(planes, code, names)
        low, high = OPERATION_CODES["Brightness"], OPERATION_CODES["Color"]
        result = torch.where((code >= low) & (code <= high), _blend(values, other, amount), result)
    if "Hue" in names:
        result = torch.where(code == OPERATION_CODES["Hue"], _adjust_hue(values, amount), result)
    if "Sharpness" in names:
        result = torch.where(code == OPERATION_CODES["Sharpness"], _adjust_sharpness(padded, amount), result)
    return _materialize(result)


def _materialize(values: Tensor) -> Tensor:
    """`values`, 0..255, as uint8 in memory: the compiler, which would compute them anew for every reader, stops here.

    `as_strided` speaks of memory, so what it is applied to has to be there.
    """
    values = values.to(torch.uint8).contiguous()
    return values.as_strided(values.shape, values.stride())


def _apply_geometric(image: Tensor, code: Tensor, amount: Tensor, cosine: Tensor | None, names: set[str]) -> Tensor:
    """The image after its shear, translation or rotation, if that is its operation: int32 [b,3,ABOVE+1024+ABOVE]."""
    at = torch.arange(-PLANE_PADDING, CIFAR_IMAGE_AREA + PLANE_PADDING, dtype=torch.int32, device=image.device)
    y, x = (at >> 5).clamp(0, CIFAR_IMAGE_SIZE - 1), at & (CIFAR_IMAGE_SIZE - 1)
    channel = torch.arange(3, dtype=torch.int32, device=image.device)[:, None]
    if not names & GEOMETRIC_OPS:
        return _gather_pixels(image, y, x, channel)
    assert cosine is not None
    zero = torch.zeros_like(amount)
    turned = code == OPERATION_CODES["Rotate"]
    sideways, down = code == OPERATION_CODES["ShearX"], code == OPERATION_CODES["ShearY"]
    to_x = (cosine, torch.where(turned, -amount, torch.where(sideways, amount, zero)))
    to_y = (torch.where(turned | down, amount, zero), cosine)
    # A shear keeps the upper or left edge, not the centre; a translation is so many sixteenths of that shift.
    shift_x = torch.where(sideways | (code == OPERATION_CODES["TranslateX"]), CIFAR_IMAGE_SIZE * amount, zero)
    shift_y = torch.where(down | (code == OPERATION_CODES["TranslateY"]), CIFAR_IMAGE_SIZE * amount, zero)
    return _sample_nearest(image, y, x, channel, (*to_x, shift_x), (*to_y, shift_y))


def _sample_nearest(image: Tensor, y: Tensor, x: Tensor, channel: Tensor, to_x: Sequence, to_y: Sequence) -> Tensor:
    """The pixels at an affine map of (x, y), black outside; the map is of half-pixels from the image's centre."""
    across, down = 2 * x - (CIFAR_IMAGE_SIZE - 1), 2 * y - (CIFAR_IMAGE_SIZE - 1)
    source_x, source_y = (
        (by_x * across + by_y * down + shift + CIFAR_IMAGE_SIZE * AFFINE_SCALE) >> 24
        for by_x, by_y, shift in (to_x, to_y)
    )
    inside = (source_x >= 0) & (source_x < CIFAR_IMAGE_SIZE) & (source_y >= 0) & (source_y < CIFAR_IMAGE_SIZE)
    found = _gather_pixels(
        image, source_y.clamp(0, CIFAR_IMAGE_SIZE - 1), source_x.clamp(0, CIFAR_IMAGE_SIZE - 1), channel
    )
    return torch.where(inside, found, 0)


def _gather_pixels(image: Tensor, y: Tensor, x: Tensor, channel: Tensor) -> Tensor:
    """The pixels at (y, x) of a channel, int32, from rows [b,32,96] or planes [b,3,1024]."""
    sample = torch.arange(len(image), dtype=torch.int32, device=image.device)[:, None, None]
    if image.shape[1] == 3:
        return image[sample, channel, CIFAR_IMAGE_SIZE * y + x].int()
    return image[sample, y, 3 * x + channel]


def _lookup_table(planes: Tensor, code: Tensor, amount: Tensor, names: set[str]) -> Tensor:
    """What each value of each channel becomes, by the image's own statistics: int32 [b,3,256]."""
    value = torch.arange(256, dtype=torch.int32, device=planes.device)
    table = torch.where(code == OPERATION_CODES["Posterize"], value & amount, value)
    table = torch.where((code == OPERATION_CODES["Solarize"]) & (value >= amount), 255 - value, table)
    high = planes.int().amax(2, keepdim=True)
    if "AutoContrast" in names:
        low = planes.int().amin(2, keepdim=True)
        flat = low == high
        low = torch.where(flat, 0, low)
        scale = torch.where(flat, 1.0, ((high - low).double() * INV_255).float()).double()
        stretched = ((value - low).double() / scale).float().clamp(0, 255).int()
        table = torch.where(code == OPERATION_CODES["AutoContrast"], stretched, table)
    if "Equalize" in names:
        table = torch.where(code == OPERATION_CODES["Equalize"], _equalize_table(planes, value, high), table)
    return table.expand(len(planes), 3, 256)


def _equalize_table(planes: Tensor, value: Tensor, high: Tensor) -> Tensor:
    """The table that makes a channel's values equally frequent, as Pillow defines it: int32 [b,3,256]."""
    counts = torch.zeros(len(planes), 3, 256, dtype=torch.int32, device=planes.device)
    one = torch.ones(1, dtype=torch.int32, device=planes.device)
    # Not scatter_add, which the compiler makes atomic, one locked addition a pixel, on a CPU of several cores.
    counts = counts.scatter_reduce(2, planes.long(), one.expand(planes.shape), "sum")
    before = counts.cumsum(2, dtype=torch.int32) - counts  # pixels of smaller values
    step = before.gather(2, high.long()) // 255
    # x // step for x <= 1026 and step <= 4 without a division, which is not vectorised
    divisor = (65535 + step) // step.clamp(min=1)
    return torch.where(step > 0, (((before + step // 2) * divisor) >> 16).clamp(0, 255), value)


def _to_grayscale(planes: Tensor) -> Tensor:
    """torchvision's gray, floor of a float32 sum of three products: uint8 [b,1,1024]."""
    red, green, blue = (planes[:, channel : channel + 1].double() for channel in range(3))
    gray = (red * RED_WEIGHT).float().double() + green * GREEN_WEIGHT
    return _materialize((gray.float().double() + blue * BLUE_WEIGHT).float().floor())


def _blend_target(planes: Tensor, code: Tensor, names: set[str]) -> Tensor | float:
    """What an image is blended with: black, its mean gray, or its own gray; float64, broadcast to [b,3,1024]."""
    other: Tensor | float = 0.0
    if names & {"Contrast", "Color"}:
        gray = _to_grayscale(planes)
        if "Contrast" in names:
            mean = gray.int().sum(2, keepdim=True, dtype=torch.int32).double() / CIFAR_IMAGE_AREA
            other = torch.where(code == OPERATION_CODES["Contrast"], mean, other)
        if "Color" in names:
            other = torch.where(code == OPERATION_CODES["Color"], gray.double(), other)
    return other


def _blend(values: Tensor, other: Tensor | float, amount: Tensor) -> Tensor:
    """values * (1 + amount) - other * amount as float32 with one fused multiply-add, as torch computes it.

    In float64 these products and sums are exact, so no device can fuse or round them in a way of its own.
    """
    more = amount.double() / AMOUNT_SCALE
    scaled = (values.double() * (1 + more).float().double()).float().double()
    return (scaled - other * more.float().double()).float().clamp(0, 255).int()


def _adjust_sharpness(padded: Tensor, amount: Tensor) -> Tensor:
    """Blended with a blur of 3x3 (the pixel counts five times) but for the outermost pixels: int32 [b,3,1024]."""
    shifts = [PLANE_PADDING + CIFAR_IMAGE_SIZE * y + x for y in (-1, 0, 1) for x in (-1, 0, 1)]
    values = padded[:, :, PLANE_PADDING : PLANE_PADDING + CIFAR_IMAGE_AREA].int()
    total = 4 * values
    for shift in shifts:
        total = total + padded[:, :, shift : shift + CIFAR_IMAGE_AREA].int()
    blur = ((2 * total + 13) * 20165) >> 19  # (2 * total + 13) // 26: total / 13, rounded
    more = (amount.double() / AMOUNT_SCALE).float().double()
    sharp = (values.double() - (blur - values).double() * more).float().clamp(0, 255).int()
    at = torch.arange(CIFAR_IMAGE_AREA, dtype=torch.int32, device=padded.device)
    y, x = at >> 5, at & (CIFAR_IMAGE_SIZE - 1)
    return torch.where((y > 0) & (y < CIFAR_IMAGE_SIZE - 1) & (x > 0) & (x < CIFAR_IMAGE_SIZE - 1), sharp, values)


def _adjust_hue(values: Tensor, amount: Tensor) -> Tensor:
    """The colours turned by `amount` on the hexagon of hues; int32 [b,3,1024].

    In units of 2**-19: a hue is its place on the hexagon times the colour's range, so that nothing is divided.
    """
    red, green, blue = (values[:, channel : channel + 1] for channel in range(3))
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    span = high - low
    hue = torch.where(high == green, 2 * span + blue - red, 4 * span + red - green)
    hue = torch.where(high == red, green - blue, hue)
    hue = (hue << 19) + span * ((6 * amount + 512) >> 10)
    unit = span << 19
    hue = torch.where(hue < 0, hue + 6 * unit, hue)
    hue = torch.where(hue >= 6 * unit, hue - 6 * unit, hue)
    # A channel is high for a third of the circle, low for a third, and between them on a slope.
    channel = torch.arange(3, dtype=torch.int32, device=values.device)[:, None]
    distance = (hue - torch.where(channel == 0, 3, 2 * channel) * unit).abs()
    share = torch.where(channel == 0, distance - unit, 2 * unit - distance)
    result = (low << 19) + torch.minimum(share.clamp(min=0), unit)
    return (result + (((result >> 8) * 1027) >> 10)) >> 19  # times 255.999 / 255, torchvision's way of rounding
