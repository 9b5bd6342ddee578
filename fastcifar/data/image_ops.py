"""Operations on a batch of images, int32 rows [b,32,96] with values 0..255: column 3 * x + channel belongs to pixel x.

The operations of policies reproduce torchvision's v2 operations; geometric ones use nearest-neighbor sampling and fill
with black. The CPU computes amounts as integers and all rounding is explicit, so all devices give the same bytes.
"""

import math
from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

CIFAR_IMAGE_SIZE = 32  # height and width in pixels
CIFAR_IMAGE_AREA = CIFAR_IMAGE_SIZE * CIFAR_IMAGE_SIZE
LAST_COLUMN = 3 * CIFAR_IMAGE_SIZE - 1
# Pixels added before and after a flat plane, so that the neighbors of all pixels are shifted views of the plane.
PLANE_PADDING = 2 * CIFAR_IMAGE_SIZE
# Fixed-point scale of affine coefficients. The sums in `_sample_nearest` are at most 127 half-pixels: int32 is enough.
AFFINE_SCALE = 1 << 23
# Fixed-point scale of blend and hue amounts. It represents float32 magnitudes of at least 1/64 exactly.
AMOUNT_SCALE = 1 << 29

FillColor = tuple[int, int, int]  # 0..255 for each channel
# The fill color of a variant; "mean" is the color of the data set. Mid-gray is 127.5, which rounds to 128.
FILL_COLORS: dict[str, FillColor] = {"zero": (0, 0, 0), "gray": (128, 128, 128)}

# Invert is Solarize with threshold 0, so both have the same code.
OPERATION_CODES = {"Identity": 0, "ShearX": 1, "ShearY": 2, "TranslateX": 3, "TranslateY": 4, "Rotate": 5}
OPERATION_CODES |= {"Brightness": 6, "Contrast": 7, "Color": 8, "Hue": 9, "Sharpness": 10, "Posterize": 11}
OPERATION_CODES |= {"Solarize": 12, "Invert": 12, "AutoContrast": 13, "Equalize": 14}
GEOMETRIC_OPS = {"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"}
BLEND_OPS = {"Brightness", "Contrast", "Color"}
LOOKUP_OPS = {"Posterize", "Solarize", "Invert", "AutoContrast", "Equalize"}
RED_WEIGHT, GREEN_WEIGHT, BLUE_WEIGHT, INV_255 = np.array([0.2989, 0.587, 0.114, 1 / 255], np.float32).tolist()

# (code uint8, amount int32, cosine int32), each [b]: the operation of each image as encoded by `encode_operation`; the
# cosine is None if no operation is geometric.
OperationStep = tuple[Tensor, Tensor, Tensor | None]


def crop_rows(rows: Tensor, top: Tensor, left: Tensor, pad: int, reflect: bool) -> Tensor:
    """Crop the 32x32 window at (top, left) int32 [b] of the image padded by `pad` pixels, black or reflected."""
    row, column = _grid_indices(rows)
    y = row + (top[:, None] - pad)
    source = column + 3 * (left[:, None] - pad)
    if reflect:
        y = (CIFAR_IMAGE_SIZE - 1) - ((CIFAR_IMAGE_SIZE - 1) - y.abs()).abs()
        channel = column - 3 * _column_to_x(column)
        source = torch.where(source < 0, 2 * channel - source, source)
        mirrored = 2 * (LAST_COLUMN - 2 + channel) - source
        return _gather_at(rows, y, torch.where(source > LAST_COLUMN, mirrored, source))
    # The clamps keep reads inside the image; the mask discards the values that were read outside of the window.
    inside = ((y >= 0) & (y < CIFAR_IMAGE_SIZE))[:, :, None] & ((source >= 0) & (source <= LAST_COLUMN))[:, None, :]
    return torch.where(inside, _gather_at(rows, y.clamp(0, CIFAR_IMAGE_SIZE - 1), source.clamp(0, LAST_COLUMN)), 0)


def flip_rows(rows: Tensor, flip: Tensor) -> Tensor:
    """Flip horizontally where `flip`, bool [b], is set."""
    row, column = _grid_indices(rows)
    mirrored = (LAST_COLUMN - 2) + column - 6 * _column_to_x(column)  # 3 * (31 - x) + channel
    # Select the column and read once: selecting between two reads would compute a fused chain of operations twice.
    return _gather_at(rows, row[None, :], torch.where(flip[:, None], mirrored, column))


def fill_box(
    rows: Tensor, top: Tensor, left: Tensor, height: Tensor | int, width: Tensor | int, color: FillColor
) -> Tensor:
    """Fill the part of a box that is inside the image with one color; `height` and `width` are int32 [b] or int."""
    row, column = _grid_indices(rows)
    box_y, box_column = row - top[:, None], column - 3 * left[:, None]
    height, width = (size if isinstance(size, int) else size[:, None] for size in (height, width))
    inside_rows, inside_columns = (box_y >= 0) & (box_y < height), (box_column >= 0) & (box_column < 3 * width)
    inside = inside_rows[:, :, None] & inside_columns[:, None, :]
    # The channels are packed into one integer, a byte each: torch.tensor(color) would be a synchronous copy.
    packed = color[0] | color[1] << 8 | color[2] << 16
    return torch.where(inside, (packed >> (8 * (column - 3 * _column_to_x(column)))) & 255, rows)


def _grid_indices(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row indices int32 [32] and the column indices int32 [96]."""
    row = torch.arange(CIFAR_IMAGE_SIZE, dtype=torch.int32, device=rows.device)
    column = torch.arange(3 * CIFAR_IMAGE_SIZE, dtype=torch.int32, device=rows.device)
    return row, column


def _column_to_x(column: Tensor) -> Tensor:
    return (column * 171) >> 9  # column // 3: CPUs have no vectorized division


def _gather_at(rows: Tensor, y: Tensor, columns: Tensor) -> Tensor:
    """Return rows[i, y[i, r], columns[i, c]] for all i, r and c; y int32 [b or 1, 32], columns int32 [b or 1, 96]."""
    sample = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
    return rows[sample[:, None, None], y[:, :, None], columns[:, None, :]]


def encode_operation(name: str, magnitude: float) -> tuple[int, int, int]:
    """Encode an operation for one image as the integers (code, amount, cosine).

    magnitude  ShearX, ShearY: pixels of shift per pixel; TranslateX, TranslateY: whole pixels; Rotate: degrees,
               counterclockwise; Brightness, Contrast, Color, Sharpness: the factor minus 1, from -1 to 1; Hue: turns,
               from -0.5 to 0.5; Posterize: bits, 0 to 8; Solarize: threshold as a fraction of 255; unused otherwise
    """
    code = OPERATION_CODES[name]
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
    """Apply one operation per step to each image; `operations` lists the candidates by step. int32 rows in and out."""
    image = rows
    for (code, amount, cosine), names in zip(steps, operations, strict=True):
        cosine = None if cosine is None else cosine[:, None, None]
        image = _apply_step(image, code.int()[:, None, None], amount[:, None, None], cosine, {*names})
    return image.int().transpose(1, 2).reshape(rows.shape)


def apply_operation(images: Tensor, name: str, magnitude: float) -> Tensor:
    """Apply the same operation to every image; uint8 [b,3,32,32] in and out."""
    rows = images.permute(0, 2, 3, 1).reshape(-1, CIFAR_IMAGE_SIZE, 3 * CIFAR_IMAGE_SIZE).int()
    encoded = torch.tensor(encode_operation(name, magnitude), dtype=torch.int32, device=images.device)
    code, amount, cosine = encoded[:, None].expand(3, len(rows)).contiguous()
    result = apply_operations(rows, [(code, amount, cosine)], [(name,)]).to(torch.uint8)
    return result.unflatten(2, (CIFAR_IMAGE_SIZE, 3)).permute(0, 3, 1, 2)


def rotate_rows(rows: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
    """Rotate each image counterclockwise; sine and cosine are int32 [b] in units of 1 / AFFINE_SCALE."""
    sine, cosine = sine[:, None, None], cosine[:, None, None]
    row, column = _grid_indices(rows)
    x = _column_to_x(column)
    return _sample_nearest(rows, row[:, None], x, column - 3 * x, (cosine, -sine, 0), (sine, cosine, 0))


def _apply_step(image: Tensor, code: Tensor, amount: Tensor, cosine: Tensor | None, names: set[str]) -> Tensor:
    """Apply one step to rows int32 [b,32,96] or planes uint8 [b,3,1024]; returns planes uint8 [b,3,1024]."""
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
        first, last = OPERATION_CODES["Brightness"], OPERATION_CODES["Color"]
        result = torch.where((code >= first) & (code <= last), _blend(planes, code, amount, names), result)
    if "Hue" in names:
        result = torch.where(code == OPERATION_CODES["Hue"], _adjust_hue(values, amount), result)
    if "Sharpness" in names:
        result = torch.where(code == OPERATION_CODES["Sharpness"], _adjust_sharpness(padded, amount), result)
    return _materialize(result)


def _materialize(values: Tensor) -> Tensor:
    """Convert `values` (0..255) to uint8 and force the compiler to store them instead of recomputing every use."""
    # `as_strided` is defined on memory, so its input has to be stored.
    values = values.to(torch.uint8).contiguous()
    return values.as_strided(values.shape, values.stride())


def _apply_geometric(image: Tensor, code: Tensor, amount: Tensor, cosine: Tensor | None, names: set[str]) -> Tensor:
    """Apply the geometric operations of a step; returns padded planes int32 [b,3,PLANE_PADDING+1024+PLANE_PADDING]."""
    index = torch.arange(-PLANE_PADDING, CIFAR_IMAGE_AREA + PLANE_PADDING, dtype=torch.int32, device=image.device)
    y, x = (index >> 5).clamp(0, CIFAR_IMAGE_SIZE - 1), index & (CIFAR_IMAGE_SIZE - 1)
    channel = torch.arange(3, dtype=torch.int32, device=image.device)[:, None]
    if not names & GEOMETRIC_OPS:
        return _gather_pixels(image, y, x, channel)
    assert cosine is not None
    zero = torch.zeros_like(amount)
    rotate = code == OPERATION_CODES["Rotate"]
    shear_x, shear_y = code == OPERATION_CODES["ShearX"], code == OPERATION_CODES["ShearY"]
    to_x = (cosine, torch.where(rotate, -amount, torch.where(shear_x, amount, zero)))
    to_y = (torch.where(rotate | shear_y, amount, zero), cosine)
    # A shear leaves the top or left edge in place, not the center; `encode_operation` scales translations to match.
    shift_x = torch.where(shear_x | (code == OPERATION_CODES["TranslateX"]), CIFAR_IMAGE_SIZE * amount, zero)
    shift_y = torch.where(shear_y | (code == OPERATION_CODES["TranslateY"]), CIFAR_IMAGE_SIZE * amount, zero)
    return _sample_nearest(image, y, x, channel, (*to_x, shift_x), (*to_y, shift_y))


def _sample_nearest(image: Tensor, y: Tensor, x: Tensor, channel: Tensor, to_x: Sequence, to_y: Sequence) -> Tensor:
    """Sample at an affine map of (x, y); `to_x`, `to_y`: factors of x and y, and a constant in half-pixels."""
    centered_x, centered_y = 2 * x - (CIFAR_IMAGE_SIZE - 1), 2 * y - (CIFAR_IMAGE_SIZE - 1)
    source_x, source_y = (
        (of_x * centered_x + of_y * centered_y + shift + CIFAR_IMAGE_SIZE * AFFINE_SCALE) >> 24
        for of_x, of_y, shift in (to_x, to_y)
    )
    inside = (source_x >= 0) & (source_x < CIFAR_IMAGE_SIZE) & (source_y >= 0) & (source_y < CIFAR_IMAGE_SIZE)
    source_x, source_y = (source.clamp(0, CIFAR_IMAGE_SIZE - 1) for source in (source_x, source_y))
    return torch.where(inside, _gather_pixels(image, source_y, source_x, channel), 0)


def _gather_pixels(image: Tensor, y: Tensor, x: Tensor, channel: Tensor) -> Tensor:
    """Return the pixels at (y, x) of a channel, int32, from rows [b,32,96] or planes [b,3,1024]."""
    sample = torch.arange(len(image), dtype=torch.int32, device=image.device)[:, None, None]
    if image.shape[1] == 3:
        return image[sample, channel, CIFAR_IMAGE_SIZE * y + x].int()
    return image[sample, y, 3 * x + channel]


def _lookup_table(planes: Tensor, code: Tensor, amount: Tensor, names: set[str]) -> Tensor:
    """Return a lookup table for the values of each channel, int32 [b,3,256], from the statistics of the image."""
    value = torch.arange(256, dtype=torch.int32, device=planes.device)
    table = torch.where(code == OPERATION_CODES["Posterize"], value & amount, value)
    table = torch.where((code == OPERATION_CODES["Solarize"]) & (value >= amount), 255 - value, table)
    high = planes.int().amax(2, keepdim=True)
    if "AutoContrast" in names:
        low = planes.int().amin(2, keepdim=True)
        is_constant = low == high
        low = torch.where(is_constant, 0, low)
        scale = torch.where(is_constant, 1.0, ((high - low).double() * INV_255).float()).double()
        stretched = ((value - low).double() / scale).float().clamp(0, 255).int()
        table = torch.where(code == OPERATION_CODES["AutoContrast"], stretched, table)
    if "Equalize" in names:
        # Histogram equalization as Pillow defines it
        counts = torch.zeros(len(planes), 3, 256, dtype=torch.int32, device=planes.device)
        one = torch.ones(1, dtype=torch.int32, device=planes.device)
        # Not scatter_add, which the compiler turns into one atomic addition per pixel on a multicore CPU.
        counts = counts.scatter_reduce(2, planes.long(), one.expand(planes.shape), "sum")
        smaller = counts.cumsum(2, dtype=torch.int32) - counts  # number of pixels with smaller values
        step = smaller.gather(2, high.long()) // 255
        # x // step for x <= 1026 and step <= 4 without a division, which is not vectorized.
        reciprocal = (65535 + step) // step.clamp(min=1)
        equalized = torch.where(step > 0, (((smaller + step // 2) * reciprocal) >> 16).clamp(0, 255), value)
        table = torch.where(code == OPERATION_CODES["Equalize"], equalized, table)
    return table.expand(len(planes), 3, 256)


def _blend(planes: Tensor, code: Tensor, amount: Tensor, names: set[str]) -> Tensor:
    """Blend with black, the mean gray value or the grayscale image, rounded like torchvision: int32 [b,3,1024]."""
    # In float64 these products and sums are exact, so fused multiply-adds give the same result on every device.
    target: Tensor | float = 0.0
    if names & {"Contrast", "Color"}:
        red, green, blue = (planes[:, channel : channel + 1].double() for channel in range(3))
        partial_sum = ((red * RED_WEIGHT).float().double() + green * GREEN_WEIGHT).float().double()
        gray = _materialize((partial_sum + blue * BLUE_WEIGHT).float().floor())
        if "Contrast" in names:
            mean = gray.int().sum(2, keepdim=True, dtype=torch.int32).double() / CIFAR_IMAGE_AREA
            target = torch.where(code == OPERATION_CODES["Contrast"], mean, target)
        if "Color" in names:
            target = torch.where(code == OPERATION_CODES["Color"], gray.double(), target)
    factor = amount.double() / AMOUNT_SCALE
    scaled = (planes.double() * (1 + factor).float().double()).float().double()
    return (scaled - target * factor.float().double()).float().clamp(0, 255).int()


def _adjust_sharpness(padded: Tensor, amount: Tensor) -> Tensor:
    """Blend with a 3x3 blur whose center has weight 5, leaving the border pixels unchanged: int32 [b,3,1024]."""
    shifts = [PLANE_PADDING + CIFAR_IMAGE_SIZE * y + x for y in (-1, 0, 1) for x in (-1, 0, 1)]
    values = padded[:, :, PLANE_PADDING : PLANE_PADDING + CIFAR_IMAGE_AREA].int()
    total = 4 * values
    for shift in shifts:
        total = total + padded[:, :, shift : shift + CIFAR_IMAGE_AREA].int()
    blur = ((2 * total + 13) * 20165) >> 19  # (2 * total + 13) // 26, which is total / 13, rounded
    factor = (amount.double() / AMOUNT_SCALE).float().double()
    sharp = (values.double() - (blur - values).double() * factor).float().clamp(0, 255).int()
    index = torch.arange(CIFAR_IMAGE_AREA, dtype=torch.int32, device=padded.device)
    y, x = index >> 5, index & (CIFAR_IMAGE_SIZE - 1)
    return torch.where((y > 0) & (y < CIFAR_IMAGE_SIZE - 1) & (x > 0) & (x < CIFAR_IMAGE_SIZE - 1), sharp, values)


def _adjust_hue(values: Tensor, amount: Tensor) -> Tensor:
    """Shift the hue by `amount`, in units of 1 / AMOUNT_SCALE turns; values 0..255, int32 [b,3,1024] in and out."""
    # The hue (0 to 6 in the HSV hexagon) is multiplied by the largest minus the smallest channel, to avoid a division.
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
    # A channel has its largest value on a third of the hue circle, its smallest on another, and is linear between.
    channel = torch.arange(3, dtype=torch.int32, device=values.device)[:, None]
    distance = (hue - torch.where(channel == 0, 3, 2 * channel) * unit).abs()
    offset = torch.where(channel == 0, distance - unit, 2 * unit - distance)
    result = (low << 19) + torch.minimum(offset.clamp(min=0), unit)
    return (result + (((result >> 8) * 1027) >> 10)) >> 19  # torchvision multiplies by 255.999 / 255 to round
