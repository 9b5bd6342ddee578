"""The image corruptions of CIFAR-10-C (Hendrycks and Dietterich, 2019), computed in batches: `CORRUPTIONS`.

Each takes float images [n,3,32,32] in [0, 1], a severity from 1 to 5 and a generator on the same device, and returns
images of the same shape, range and dtype. The severities use the authors' parameters. Docstrings state differences
from the originals, except random numbers. Glass blur, elastic transform, snow, frost and spatter are not implemented.
"""

import io
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

Corruption = Callable[[Tensor, int, Generator], Tensor]

SEVERITIES = (1, 2, 3, 4, 5)
IMAGE_SIZE = 32


def gaussian_noise(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Add independent Gaussian noise to every value."""
    std = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    return (images + std * _normal_noise(images, generator)).clamp(0, 1)


def shot_noise(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Replace every value by a Poisson-distributed photon count whose mean is proportional to the value."""
    photons = (500, 250, 100, 75, 50)[severity - 1]
    return (torch.poisson(images * photons, generator=generator) / photons).clamp(0, 1)


def impulse_noise(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Set a fraction of the values, independently for each channel, to 0 or 1 with equal probability."""
    fraction = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    uniform = torch.rand(images.shape, generator=generator, device=images.device)
    return torch.where(uniform < fraction, (uniform < fraction / 2).to(images.dtype), images)


def speckle_noise(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Add Gaussian noise whose standard deviation is proportional to the value."""
    std = (0.06, 0.10, 0.12, 0.16, 0.20)[severity - 1]
    return (images + std * images * _normal_noise(images, generator)).clamp(0, 1)


def gaussian_blur(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Blur with a Gaussian truncated at four standard deviations, replicating the edge pixels."""
    std = (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1]
    column = _gaussian_kernel(std, int(4 * std + 0.5)).sum(1, keepdim=True)
    return _filter_images(_filter_images(images, column, "replicate"), column.T, "replicate")


def defocus_blur(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Blur with a disk that is smoothed by a 3x3 Gaussian, reflecting the image at its edges."""
    radius, smoothing_std = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))[severity - 1]
    offsets = torch.arange(-2, 3)
    disk = (offsets[:, None] ** 2 + offsets**2 <= radius**2).double()
    gaussian = _gaussian_kernel(smoothing_std, 1)
    kernel = F.conv2d((disk / disk.sum())[None, None], gaussian[None, None], padding=1)[0, 0]
    return _filter_images(images, kernel, "reflect")


def motion_blur(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Blur in one direction, at a random angle of up to 45 degrees for each image, like ImageMagick."""
    radius, std = ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))[severity - 1]
    weights = [math.exp(-(step**2) / (2 * std**2)) for step in range(2 * radius + 1)]
    uniform = torch.rand(len(images), 1, generator=generator, device=images.device, dtype=images.dtype)
    angles = (uniform - 0.5) * math.pi / 2
    pixels = torch.arange(IMAGE_SIZE, device=images.device)
    image_indices = torch.arange(len(images), device=images.device)[:, None, None]
    blurred = torch.zeros_like(images).permute(0, 2, 3, 1)
    for step, weight in enumerate(weights):
        rows = (pixels + (step * angles.sin() - 0.5).ceil().long()).clamp(0, IMAGE_SIZE - 1)
        columns = (pixels + (step * angles.cos() - 0.5).ceil().long()).clamp(0, IMAGE_SIZE - 1)
        blurred = blurred + weight / sum(weights) * images[image_indices, :, rows[:, :, None], columns[:, None, :]]
    return blurred.permute(0, 3, 1, 2).clamp(0, 1)


def zoom_blur(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Average the image and bilinear enlargements of it, whose factors increase in steps of 0.01."""
    factors = np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[severity - 1], 0.01)
    total = images.clone()
    for factor in factors:
        crop_size = math.ceil(IMAGE_SIZE / factor)
        start, zoomed_size = (IMAGE_SIZE - crop_size) // 2, round(crop_size * factor)
        center = images[:, :, start : start + crop_size, start : start + crop_size]
        zoomed = F.interpolate(center, size=(zoomed_size, zoomed_size), mode="bilinear", align_corners=True)
        trim = (zoomed_size - IMAGE_SIZE) // 2
        total += zoomed[:, :, trim : trim + IMAGE_SIZE, trim : trim + IMAGE_SIZE]
    return (total / (len(factors) + 1)).clamp(0, 1)


def fog(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Add a different random cloud to each image and scale the result so that no value exceeds the image's maximum."""
    amount, decay = ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))[severity - 1]
    maximum = images.amax((1, 2, 3), keepdim=True)
    foggy = images + amount * _plasma_fractal(len(images), decay, generator)[:, None].to(images)
    return (foggy * maximum / (maximum + amount)).clamp(0, 1)


def brightness(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Increase the value of HSV. Hue and saturation are unchanged, and black becomes gray."""
    increase = (0.05, 0.10, 0.15, 0.20, 0.30)[severity - 1]
    value = images.amax(1, keepdim=True)
    new_value = (value + increase).clamp(0, 1)
    return torch.where(value > 0, images * new_value / value.clamp(min=1e-6), new_value)


def contrast(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Reduce the contrast by moving every value toward the mean of its channel in the image."""
    scale = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    means = images.mean((2, 3), keepdim=True)
    return ((images - means) * scale + means).clamp(0, 1)


def saturate(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Decrease the HSV saturation at severities 1 and 2, and increase it from 3 on. Grays become reddish from 4 on."""
    scale, shift = ((0.3, 0.0), (0.1, 0.0), (1.5, 0.0), (2.0, 0.1), (2.5, 0.2))[severity - 1]
    value = images.amax(1, keepdim=True)
    saturation = (value - images.amin(1, keepdim=True)) / value.clamp(min=1e-6)
    # The difference between the value of HSV and each channel if the saturation were 1.
    reduction = (value - images) / saturation.clamp(min=1e-6)
    gray_reduction = value * images.new_tensor([0, 1, 1])[:, None, None]
    new_saturation = (saturation * scale + shift).clamp(0, 1)
    return (value - torch.where(saturation > 0, reduction, gray_reduction) * new_saturation).clamp(0, 1)


def pixelate(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Downsample and upsample with Pillow's box filter, on the CPU."""
    size = int(IMAGE_SIZE * (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1])

    def resize(image: Image.Image) -> Image.Image:
        small = image.resize((size, size), Image.Resampling.BOX)
        return small.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)

    return _apply_to_pil_images(images, resize)


def jpeg_compression(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Compress as JPEG with Pillow, on the CPU."""
    quality = (80, 65, 58, 50, 40)[severity - 1]

    def compress(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer)

    return _apply_to_pil_images(images, compress)


CORRUPTIONS: dict[str, Corruption] = {
    corruption.__name__: corruption
    for corruption in (
        gaussian_noise, shot_noise, impulse_noise, speckle_noise, gaussian_blur, defocus_blur, motion_blur, zoom_blur,
        fog, brightness, contrast, saturate, pixelate, jpeg_compression,
    )
}  # fmt: skip


def _apply_to_pil_images(images: Tensor, function: Callable[[Image.Image], Image.Image]) -> Tensor:
    pixels = (images * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    results = np.stack([np.asarray(function(Image.fromarray(image))) for image in pixels])
    return torch.from_numpy(results).permute(0, 3, 1, 2).to(images) / 255


def _normal_noise(images: Tensor, generator: Generator) -> Tensor:
    return torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)


def _gaussian_kernel(std: float, radius: int) -> Tensor:
    """Return a normalized Gaussian kernel, float64 [2 * radius + 1, 2 * radius + 1]."""
    weights = torch.exp(-(torch.arange(-radius, radius + 1).double() ** 2) / (2 * std**2))
    return weights[:, None] * weights / weights.sum() ** 2


def _filter_images(images: Tensor, kernel: Tensor, padding_mode: str) -> Tensor:
    """Filter each channel with a symmetric `kernel` of odd size: faster on a CPU than a float64 convolution."""
    pad_height, pad_width = (size // 2 for size in kernel.shape)
    padded = F.pad(images, (pad_width, pad_width, pad_height, pad_height), mode=padding_mode)
    total = torch.zeros_like(images)
    for row, column in kernel.nonzero().tolist():
        shifted = padded[:, :, row : row + IMAGE_SIZE, column : column + IMAGE_SIZE]
        total.add_(shifted, alpha=kernel[row, column].item())
    return total.clamp(0, 1)


def _plasma_fractal(n: int, decay: float, generator: Generator) -> Tensor:
    """Return fractal height maps [n,32,32] in [0, 1] by periodic diamond-square; a larger `decay` is smoother."""
    device = generator.device
    heights, step, roughness = torch.zeros(n, IMAGE_SIZE, IMAGE_SIZE, device=device), IMAGE_SIZE, 100.0

    def midpoint(*neighbors: Tensor) -> Tensor:
        noise = 2 * torch.rand(neighbors[0].shape, generator=generator, device=device) - 1
        return sum(neighbors, torch.zeros_like(noise)) / 4 + roughness**2 * noise

    while step >= 2:
        half = step // 2
        corners = heights[:, ::step, ::step]
        right = corners.roll(-1, 2)
        centers = midpoint(corners, right, corners.roll(-1, 1), right.roll(-1, 1))
        heights[:, half::step, half::step] = centers
        heights[:, ::step, half::step] = midpoint(corners, right, centers, centers.roll(1, 1))
        heights[:, half::step, ::step] = midpoint(corners, corners.roll(-1, 1), centers, centers.roll(1, 2))
        step, roughness = half, roughness / decay
    heights -= heights.amin((1, 2), keepdim=True)
    return heights / heights.amax((1, 2), keepdim=True)
