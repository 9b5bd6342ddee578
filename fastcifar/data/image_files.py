"""Image files: the files of a folder that are read, and the one decoder of training, `predict` and `data verify`."""

import os
import struct
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastcifar.errors import DataError

IMAGE_SIZE = (32, 32)
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".webp"})
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP")  # of these suffixes; Pillow reads other formats by other programs
RESIZE_REMEDY = "give --resize 32, which resizes the largest centered square of each image to 32x32"
MAX_DECODED_BYTES = 2**28  # of an image; checked in its header, before decoding
MAX_FILE_BYTES = 2**27
BACKGROUND = (255, 255, 255)  # color behind transparent pixels
HIDDEN_NAMES = frozenset({"__MACOSX"})  # besides names that start with a dot
MAX_SUFFIXES = 8  # in a line about the files that are left out
# What Pillow raises for damaged files, and for files that are too large
_DECODING_ERRORS = (OSError, SyntaxError, EOFError, struct.error, ValueError, TypeError, LookupError, OverflowError)
_SIZE_ERRORS = (Image.DecompressionBombError, Image.DecompressionBombWarning)

LeftOut = Counter[tuple[str, str]]  # number of files by suffix, or of folders, and reason


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is never read, such as `.ipynb_checkpoints` or `__MACOSX`."""
    return name.startswith(".") or name in HIDDEN_NAMES


def list_images(folder: Path, left_out: LeftOut) -> list[Path]:
    """Return the image files in `folder` and its subfolders, sorted by path, and count all others in `left_out`.

    Linked files are read, linked folders are not. Raises `OSError` if a folder cannot be read.
    """

    def raise_error(error: OSError) -> None:
        raise error

    images = []
    for parent, folders, names in os.walk(folder, onerror=raise_error):
        for name in [*folders]:
            is_link = os.path.islink(os.path.join(parent, name))
            if reason := "hidden" if is_hidden(name) else "linked folder" if is_link else "":
                folders.remove(name)  # not entered
                left_out["folder", reason] += 1
        for path in (Path(parent, name) for name in names):
            if reason := reason_to_leave_out(path):
                count_file(path, reason, left_out)
            else:
                images.append(path)
    return sorted(images)


def reason_to_leave_out(path: Path) -> str:
    """Return why a file in a folder of images is not read; "" for an image."""
    if is_hidden(path.name):
        return "hidden"
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        return "format not supported"
    return "" if path.is_file() else "not a regular file"


def count_file(path: Path, reason: str, left_out: LeftOut) -> None:
    """Count a file or folder that is left out for `reason`."""
    left_out["folder" if path.is_dir() else path.suffix.lower() or "without suffix", reason] += 1


def describe_left_out(folder: Path, left_out: LeftOut) -> str:
    """Return a line such as `PATH: left out 2 .gif, 1 .txt (format not supported)`, or "" if nothing is left out."""
    counts_by_reason: dict[str, Counter[str]] = {}
    for (suffix, reason), count in left_out.items():
        counts_by_reason.setdefault(reason, Counter())[suffix] += count
    groups = []
    for reason, counts in sorted(counts_by_reason.items()):
        shown = sorted(counts, key=lambda suffix: (-counts[suffix], suffix))[:MAX_SUFFIXES]
        others = counts.total() - sum(counts[suffix] for suffix in shown)
        texts = [f"{counts[suffix]:,} {suffix}{'s' * (suffix == 'folder' and counts[suffix] > 1)}" for suffix in shown]
        texts += [f"{others:,} others"] if others else []
        groups.append(f"{', '.join(texts)} ({reason})")
    return f"{folder}: left out {'; '.join(groups)}" if groups else ""


def decode_image(file: Path, resize: bool = False) -> np.ndarray:
    """Return an image file as uint8 [3, 32, 32] RGB, the first frame if it has several.

    16-bit values are divided by 256 and rounded down, transparent pixels are blended onto `BACKGROUND`, and the image
    is rotated by its EXIF tag. With `resize`, the central square is resized (bicubic); otherwise `DataError` is raised
    for an image of another size than 32x32, as for one that is too large or cannot be read without loss of its meaning.
    """
    try:
        if (size := file.stat().st_size) > MAX_FILE_BYTES:
            raise DataError(f"{file} has {size:,} bytes, expected at most {MAX_FILE_BYTES:,}", "make it smaller")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                _check_header(image, file, resize)
                image.load()
                return _to_rgb_array(image)
    except _SIZE_ERRORS:
        raise DataError(f"{file} has more than {Image.MAX_IMAGE_PIXELS:,} pixels", "make it smaller") from None
    except _DECODING_ERRORS as error:
        formats = f"its content is not {', '.join(IMAGE_FORMATS[:-1])} or {IMAGE_FORMATS[-1]}"
        reason = formats if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{file} is not a readable image ({reason})", "replace or remove it") from None


def _check_header(image: Image.Image, file: Path, resize: bool) -> None:
    """Raise `DataError` or `ValueError` if the image must not be decoded."""
    size = f"{image.width}x{image.height}"
    if not resize and image.size != IMAGE_SIZE:
        raise DataError(f"{file} is {size}, expected 32x32", RESIZE_REMEDY)
    has_color_key = "transparency" in image.info
    # Pillow decodes WebP in several buffers, and copies an image to change its mode or to resize it with transparency.
    bytes_per_pixel = 16 if image.format == "WEBP" else 4 if image.mode == "RGB" and not has_color_key else 12
    if image.width * image.height > (max_pixels := MAX_DECODED_BYTES // bytes_per_pixel):
        raise DataError(f"{file} has {size} pixels, expected at most {max_pixels:,}", "make it smaller")
    if has_color_key and ";16" in str(getattr(image, "tile", "")):
        raise ValueError("a transparent color of 16 bits cannot be compared with pixels of 8 bits")


def _to_rgb_array(image: Image.Image) -> np.ndarray:
    """Return the central square of a loaded image, upright, as uint8 [3, 32, 32]. Raises `ValueError`."""
    square = resize_square(_to_eight_bits(image))
    upright = ImageOps.exif_transpose(square)  # after resizing, because it copies the image
    return np.asarray(to_rgb(upright)).transpose(2, 0, 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return `image` in mode RGB: 16-bit values divided by 256, and transparent pixels blended onto `BACKGROUND`.

    Raises `ValueError` if its mode is not supported.
    """
    image = _to_eight_bits(image)
    if image.mode == "RGB":
        return image
    background = Image.new("RGBA", image.size, BACKGROUND)
    return Image.alpha_composite(background, image.convert("RGBA")).convert("RGB")


def resize_square(image: Image.Image) -> Image.Image:
    """Return the largest centered square of `image`, resized to 32x32 with antialiasing if it has another size."""
    if image.size == IMAGE_SIZE:
        return image
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize(IMAGE_SIZE, Image.Resampling.BICUBIC, box=box)  # with premultiplied alpha


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Return `image` in mode RGB, or LA or RGBA if it has transparency, with its EXIF tags. Raises `ValueError`."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its values are not in the range 0 to 65,535")
        gray = Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
        gray.info = dict(image.info)
        return gray
    if image.mode in ("RGB", "LA", "RGBA") and "transparency" not in image.info:
        return image  # a conversion would copy it
    if image.has_transparency_data:
        return image.convert("RGBA")
    if image.mode not in ("1", "L", "P", "CMYK"):
        raise ValueError(f"images of mode {image.mode} are not supported")
    return image.convert("RGB")
