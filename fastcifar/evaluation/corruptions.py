"""CORRUPTIONS: damaged images by the recipe of CIFAR-10-C (Hendrycks and Dietterich, 2019), batched, on the device.

Every row takes images float [n,3,32,32] in [0, 1], a severity 1 to 5 and a generator on their device, and returns the
same shape, range and type; the same generator state gives the same images on the same device. The severities are those
of the authors' CIFAR-10-C. Where a row differs from theirs beyond the random numbers, its docstring says so. Of their
19 it leaves out glass blur, elastic transform, snow, frost and spatter. It knows nothing of networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Corruption = Callable[[Tensor, int, Generator], Tensor]

SEVERITIES = (1, 2, 3, 4, 5)
IMAGE_SIZE = 32
JPEG_BLOCK_SIZE = 8  # pixels of a side of JPEG's blocks

# JPEG's example tables at quality 50, by rows (ITU-T T.81, tables K.1 and K.2).
# fmt: off
LUMINANCE_QUANTIZATION = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE_QUANTIZATION = (
    (17, 18, 24, 47, 99, 99, 99, 99), (18, 21, 26, 66, 99, 99, 99, 99), (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99), *((99,) * 8,) * 4,
)
# fmt: on


def gaussian_noise(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Normal noise on every value."""
    std = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    return (images + std * _normal_noise(images, generator)).clamp(0, 1)


def shot_noise(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Every value as a count of photons, Poisson."""
    photons = (500, 250, 100, 75, 50)[severity - 1]
    return (torch.poisson(images * photons, generator=generator) / photons).clamp(0, 1)


def impulse_noise(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Salt and pepper: a share of the values, of each channel for itself, becomes 0 or 1, each as often."""
    share = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    draw = torch.rand(images.shape, generator=generator, device=images.device)
    return torch.where(draw < share, (draw < share / 2).to(images.dtype), images)


def speckle_noise(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Normal noise in proportion to the value."""
    std = (0.06, 0.10, 0.12, 0.16, 0.20)[severity - 1]
    return (images + std * images * _normal_noise(images, generator)).clamp(0, 1)


def gaussian_blur(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """A sampled Gaussian cut at four deviations, the edge repeated."""
    std = (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1]
    line = _gaussian_kernel(std, int(4 * std + 0.5)).sum(1, keepdim=True)
    return _filter_images(_filter_images(images, line, "replicate"), line.T, "replicate")


def defocus_blur(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """A disk whose rim is softened by a 3x3 Gaussian, mirrored at the edge."""
    radius, soft = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))[severity - 1]
    steps = torch.arange(-2, 3)
    disk = (steps[:, None] ** 2 + steps**2 <= radius**2).double()
    softened = F.conv2d((disk / disk.sum())[None, None], _gaussian_kernel(soft, 1)[None, None], padding=1)[0, 0]
    return _filter_images(images, softened, "reflect")


def motion_blur(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """A trail to one side, at an angle of up to 45 degrees for each image, by whole pixels, the edge repeated.

    Weights and offsets are meant to be those of ImageMagick, which the authors call; no test compares them with it.
    """
    radius, std = ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))[severity - 1]
    weights = [math.exp(-(step**2) / (2 * std**2)) for step in range(2 * radius + 1)]
    turn = torch.rand(len(images), 1, generator=generator, device=images.device, dtype=images.dtype)
    angles, places = (turn - 0.5) * math.pi / 2, torch.arange(IMAGE_SIZE, device=images.device)
    which = torch.arange(len(images), device=images.device)[:, None, None]
    blurred = torch.zeros_like(images).permute(0, 2, 3, 1)
    for step, weight in enumerate(weights):
        rows = (places + (step * angles.sin() - 0.5).ceil().long()).clamp(0, IMAGE_SIZE - 1)
        columns = (places + (step * angles.cos() - 0.5).ceil().long()).clamp(0, IMAGE_SIZE - 1)
        blurred = blurred + weight / sum(weights) * images[which, :, rows[:, :, None], columns[:, None, :]]
    return blurred.permute(0, 3, 1, 2).clamp(0, 1)


def zoom_blur(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """The mean of the image and of it enlarged by steps of 1 %, bilinearly."""
    factors = np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[severity - 1], 0.01)
    total = images.clone()
    for factor in factors:
        inner = math.ceil(IMAGE_SIZE / factor)
        start, size = (IMAGE_SIZE - inner) // 2, round(inner * factor)
        middle = images[:, :, start : start + inner, start : start + inner]
        zoomed = F.interpolate(middle, size=(size, size), mode="bilinear", align_corners=True)
        cut = (size - IMAGE_SIZE) // 2
        total += zoomed[:, :, cut : cut + IMAGE_SIZE, cut : cut + IMAGE_SIZE]
    return (total / (len(factors) + 1)).clamp(0, 1)


def fog(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """A cloud of its own over each image, dimmed so that its brightest value could stay."""
    amount, decay = ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))[severity - 1]
    brightest = images.amax((1, 2, 3), keepdim=True)
    foggy = images + amount * _plasma_fractal(len(images), decay, generator)[:, None].to(images)
    return (foggy * brightest / (brightest + amount)).clamp(0, 1)


def brightness(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """More of HSV's value; hue and saturation stay, and black becomes gray."""
    more = (0.05, 0.10, 0.15, 0.20, 0.30)[severity - 1]
    value = images.amax(1, keepdim=True)
    brighter = (value + more).clamp(0, 1)
    return torch.where(value > 0, images * brighter / value.clamp(min=1e-6), brighter)


def contrast(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Towards the mean of each channel of the image."""
    kept = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    means = images.mean((2, 3), keepdim=True)
    return ((images - means) * kept + means).clamp(0, 1)


def saturate(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Less of HSV's saturation at severities 1 and 2, more from 3 on; grays then turn red, as hue 0 is."""
    scale, more = ((0.3, 0.0), (0.1, 0.0), (1.5, 0.0), (2.0, 0.1), (2.5, 0.2))[severity - 1]
    value = images.amax(1, keepdim=True)
    saturation = (value - images.amin(1, keepdim=True)) / value.clamp(min=1e-6)
    away = (value - images) / saturation.clamp(min=1e-6)  # what full saturation would take from each channel
    red = value * images.new_tensor([0, 1, 1])[:, None, None]
    return (value - torch.where(saturation > 0, away, red) * (saturation * scale + more).clamp(0, 1)).clamp(0, 1)


def pixelate(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Made smaller and larger again by Pillow's box filter: whole pixels, whole levels after each of four passes."""
    small = int(IMAGE_SIZE * (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1])
    levels = (images * 255).round()
    for source, target in ((IMAGE_SIZE, small), (small, IMAGE_SIZE)):
        box = _box_filter_weights(source, target).to(images)
        levels = (levels @ box.T + 0.5).floor()  # across, then down, halves up: as Pillow
        levels = (box @ levels + 0.5).floor()
    return levels / 255


def jpeg_compression(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Coded and decoded as JPEG with 4:2:0 chrominance, Pillow's default: see `jpeg`."""
    return apply_jpeg(images, (80, 65, 58, 50, 40)[severity - 1])


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "speckle_noise": speckle_noise,
    "gaussian_blur": gaussian_blur,
    "defocus_blur": defocus_blur,
    "motion_blur": motion_blur,
    "zoom_blur": zoom_blur,
    "fog": fog,
    "brightness": brightness,
    "contrast": contrast,
    "saturate": saturate,
    "pixelate": pixelate,
    "jpeg_compression": jpeg_compression,
}


def apply_jpeg(images: Tensor, quality: int) -> Tensor:
    """What JPEG of `quality` 1 to 100 leaves of images float [n,3,32,32] in [0, 1]: whole levels / 255.

    JFIF's YCbCr, chrominance halved by the mean of 2x2 and doubled again linearly, 8x8 DCT, the standard tables scaled
    by libjpeg's rule, and its way of rounding. Only the DCT is exact where libjpeg's is in integers, which moves a few
    coefficients across a rounding.
    """
    red, green, blue = (images * 255).round().unbind(1)
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue
    chrominance = torch.stack([(blue - luminance) / 1.772, (red - luminance) / 1.402], 1) + 128
    bias = images.new_tensor([0.25, 0.5]).repeat(IMAGE_SIZE // 4)  # in turn by column, as libjpeg's: no drift
    halved = (F.avg_pool2d(chrominance.round(), 2) + bias).floor()
    luminance = _quantize_dct(luminance.round()[:, None], LUMINANCE_QUANTIZATION, quality)[:, 0]
    coarse = _quantize_dct(halved, CHROMINANCE_QUANTIZATION, quality)
    doubled = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
    doubled = (doubled + images.new_tensor([8 / 16, 7 / 16]).repeat(IMAGE_SIZE // 2)).floor() - 128
    blueness, redness = doubled.unbind(1)
    green = luminance - (0.114 * 1.772 * blueness + 0.299 * 1.402 * redness) / 0.587
    decoded = torch.stack([luminance + 1.402 * redness, green, luminance + 1.772 * blueness], 1)
    return decoded.round().clamp(0, 255) / 255


def _quantize_dct(planes: Tensor, table: tuple[tuple[int, ...], ...], quality: int) -> Tensor:
    """Planes [n,c,h,w] of levels 0..255 through the DCT of their blocks, rounded by the table's steps, and back."""
    n, c, h, w = planes.shape
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    steps = ((planes.new_tensor(table) * scale + 50) / 100).floor().clamp(1, 255)
    places = torch.arange(JPEG_BLOCK_SIZE, dtype=torch.float64)
    cosines = (places[:, None] * (2 * places + 1) * math.pi / (2 * JPEG_BLOCK_SIZE)).cos() * math.sqrt(
        2 / JPEG_BLOCK_SIZE
    )
    cosines[0] /= math.sqrt(2)
    dct = cosines.to(planes)
    blocks = (
        planes.reshape(n, c, h // JPEG_BLOCK_SIZE, JPEG_BLOCK_SIZE, w // JPEG_BLOCK_SIZE, JPEG_BLOCK_SIZE).transpose(
            3, 4
        )
        - 128
    )
    eighths = (8 * (dct @ blocks @ dct.T)).round()
    coefficients = eighths.sign() * (eighths.abs() / (8 * steps) + 0.5).floor() * steps
    restored = (dct.T @ coefficients @ dct + 128).round().clamp(0, 255)
    return restored.transpose(3, 4).reshape(n, c, h, w)


def _normal_noise(images: Tensor, generator: Generator) -> Tensor:
    return torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)


def _gaussian_kernel(std: float, radius: int) -> Tensor:
    """float64 [2 radius + 1] squared, of sum 1."""
    line = torch.exp(-(torch.arange(-radius, radius + 1).double() ** 2) / (2 * std**2))
    return line[:, None] * line / line.sum() ** 2


def _filter_images(images: Tensor, kernel: Tensor, padding_mode: str) -> Tensor:
    """Each channel through a symmetric `kernel` of odd sides; `edge`: a padding mode.

    A sum of moved images: a convolution of three channels in float64 takes eight times as long on a CPU (LOG.md).
    """
    down, right = (side // 2 for side in kernel.shape)
    padded = F.pad(images, (right, right, down, down), mode=padding_mode)
    total = torch.zeros_like(images)
    for row, column in kernel.nonzero().tolist():
        moved = padded[:, :, row : row + IMAGE_SIZE, column : column + IMAGE_SIZE]
        total.add_(moved, alpha=kernel[row, column].item())
    return total.clamp(0, 1)


def _box_filter_weights(source: int, target: int) -> Tensor:
    """float64 [target, source]: the weights of Pillow's box filter along one side, whole pixels alone."""
    scale = source / target
    reach = max(scale, 1) / 2
    centres, pixels = (torch.arange(target).double()[:, None] + 0.5) * scale, torch.arange(source) + 0.5
    weights = ((pixels - centres > -reach) & (pixels - centres <= reach)).double()
    return weights / weights.sum(1, keepdim=True)


def _plasma_fractal(n: int, decay: float, generator: Generator) -> Tensor:
    """Heights [n,32,32] from 0 to 1 by the diamond-square algorithm on a torus; roughness falls by `decay` a level."""
    device = generator.device
    heights, step, roughness = torch.zeros(n, IMAGE_SIZE, IMAGE_SIZE, device=device), IMAGE_SIZE, 100.0

    def midpoint(*four: Tensor) -> Tensor:
        noise = 2 * torch.rand(four[0].shape, generator=generator, device=device) - 1
        return sum(four, torch.zeros_like(noise)) / 4 + roughness**2 * noise

    while step >= 2:
        half = step // 2
        corners = heights[:, ::step, ::step]
        right = corners.roll(-1, 2)
        centres = midpoint(corners, right, corners.roll(-1, 1), right.roll(-1, 1))
        heights[:, half::step, half::step] = centres
        heights[:, ::step, half::step] = midpoint(corners, right, centres, centres.roll(1, 1))
        heights[:, half::step, ::step] = midpoint(corners, corners.roll(-1, 1), centres, centres.roll(1, 2))
        step, roughness = half, roughness / decay
    heights -= heights.amin((1, 2), keepdim=True)
    return heights / heights.amax((1, 2), keepdim=True)
