"""Tests of the decoder of image files and of the list of the files in a folder (faults 28, 29 and 33)."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastcifar.data import cifar
from fastcifar.data.image_files import LeftOut, decode_image, describe_left_out, list_images
from fastcifar.data.predict_inputs import read_inputs
from fastcifar.errors import DataError
from tests.data.image_folders import write_flat

RGB = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
RAMP = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
WHITE = [255, 255, 255]  # the documented color behind transparent pixels


def png_bytes(color_type: int, bits: int, rows: bytes, transparency: bytes = b"", size: int = 32) -> bytes:
    """Return a PNG file with these raw rows, each with its filter byte."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, bits, color_type, 0, 0, 0))
    chunks = header + (chunk(b"tRNS", transparency) if transparency else b"")
    return b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def exif_rotation() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the image is at its right side
    return exif


def decoded(path: Path, write: Callable[[Path], object]) -> np.ndarray:
    """Return the image as the three users of the decoder see it, which must agree, as [32, 32, 3]."""
    write(path)
    image = decode_image(path)
    assert np.array_equal(read_inputs(str(path)).images[0], image)
    return image.transpose(1, 2, 0)


def test_fault28_gray_of_16_bits_is_the_value_divided_by_256(tmp_path: Path) -> None:
    png = decoded(tmp_path / "a.png", Image.fromarray(RAMP).save)
    assert np.array_equal(png, np.repeat((RAMP // 256)[..., None], 3, 2))
    gray8 = decoded(tmp_path / "b.png", Image.fromarray((RAMP // 256).astype(np.uint8)).save)
    assert np.array_equal(png, gray8)
    pgm = b"P5 32 32 65535\n" + RAMP.astype(">u2").tobytes()
    assert np.array_equal(decoded(tmp_path / "c.ppm", lambda path: path.write_bytes(pgm)), png)
    color = np.repeat(RAMP[..., None], 3, 2).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in color)
    assert np.array_equal(decoded(tmp_path / "d.png", lambda path: path.write_bytes(png_bytes(2, 16, rows))), png)


# Images whose right half is transparent over a hidden color, and whose left half is (200, 30, 30) or the gray 90
LEFT = np.arange(32) < 16
RGBA = np.where(LEFT[None, :, None], np.array([200, 30, 30, 255]), [1, 2, 3, 0]).repeat(32, 0).astype(np.uint8)
LA = np.where(LEFT[None, :, None], np.array([90, 255]), [1, 0]).repeat(32, 0).astype(np.uint8)
PALETTE = Image.fromarray(np.where(LEFT[None], 0, 1).repeat(32, 0).astype(np.uint8), "P")
PALETTE.putpalette([200, 30, 30, 1, 2, 3])
TRANSPARENT: dict[str, tuple[Callable[[Path], object], str, list[int]]] = {
    "RGBA": (Image.fromarray(RGBA).save, "png", [200, 30, 30]),
    "RGBA WebP": (lambda path: Image.fromarray(RGBA).save(path, lossless=True, exact=True), "webp", [200, 30, 30]),
    "LA": (Image.fromarray(LA).save, "png", [90, 90, 90]),
    "palette": (lambda path: PALETTE.save(path, transparency=1), "png", [200, 30, 30]),
    "palette with alpha": (lambda path: PALETTE.save(path, transparency=b"\xff\x00"), "png", [200, 30, 30]),
    "RGB with a transparent color": (
        lambda path: Image.fromarray(RGBA[..., :3]).save(path, transparency=(1, 2, 3)), "png", [200, 30, 30]),
    "gray with a transparent color": (
        lambda path: Image.fromarray(LA[..., 0]).save(path, transparency=1), "png", [90, 90, 90]),
}  # fmt: skip


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_fault28_transparent_pixels_are_white_whatever_color_they_hide(tmp_path: Path, kind: str) -> None:
    write, suffix, color = TRANSPARENT[kind]
    image = decoded(tmp_path / f"a.{suffix}", write)
    assert image[:, :16].reshape(-1, 3).tolist() == [color] * 512
    assert image[:, 16:].reshape(-1, 3).tolist() == [WHITE] * 512


def test_fault28_half_transparent_pixels_are_blended(tmp_path: Path) -> None:
    half = np.full((32, 32, 4), (100, 0, 200, 51), np.uint8)  # a fifth of the color, four fifths of white
    image = decoded(tmp_path / "a.png", Image.fromarray(half).save)
    assert image[0, 0].tolist() == [224, 204, 244]
    large = Image.new("RGBA", (64, 64), (100, 0, 200, 51))
    large.save(tmp_path / "b.png")
    assert read_inputs(str(tmp_path / "b.png")).images[0, :, 5, 5].tolist() == [224, 204, 244]


def test_fault28_cmyk_and_1_bit_and_palette_images(tmp_path: Path) -> None:
    cyan = decoded(tmp_path / "a.jpg", lambda path: Image.new("CMYK", (32, 32), (255, 0, 0, 0)).save(path, quality=100))
    assert cyan[0, 0].tolist() == [0, 255, 255]
    bits = Image.fromarray(RGB[..., 0] > 128)
    assert bits.mode == "1"
    assert np.array_equal(decoded(tmp_path / "b.png", bits.save)[..., 1], np.where(RGB[..., 0] > 128, 255, 0))
    palette = Image.fromarray(RGB).quantize(8)
    expected = np.asarray(palette.convert("RGB"))
    assert np.array_equal(decoded(tmp_path / "c.png", palette.save), expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "CMYK", "I;16"])
def test_fault28_exif_rotation_is_applied_to_every_mode(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(RAMP) if mode == "I;16" else Image.fromarray(RGB).convert(mode)
    suffix = "jpg" if mode == "CMYK" else "png"
    upright = decoded(tmp_path / f"a.{suffix}", image.save)
    rotated = decoded(tmp_path / f"b.{suffix}", lambda path: image.save(path, exif=exif_rotation()))
    assert np.array_equal(rotated, np.rot90(upright, k=-1))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_fault28_class_folders_predict_and_verify_see_one_array(tmp_path: Path, suffix: str) -> None:
    root = tmp_path / "folders"
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            write_flat(root / split / name / "a.png", 9)
    file = root / "train" / "cat" / f"a.{suffix}"
    (root / "train" / "cat" / "a.png").unlink()
    Image.fromarray(RGB).save(file, exif=exif_rotation(), quality=95)
    trained_on = cifar.load_dataset(str(root), cache_dir=tmp_path / "cache").train.images[0]
    verified = cifar.load_dataset(str(root), cache_dir=tmp_path / "cache", refresh_cache=True).train.images[0]
    assert np.array_equal(trained_on, read_inputs(str(file)).images[0])
    assert np.array_equal(trained_on, verified)
    assert not np.array_equal(trained_on, np.rot90(trained_on, axes=(1, 2)))


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_fault28_the_first_frame_of_an_animation_is_read(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (32, 32), color) for color in ((10, 20, 30), (200, 0, 0), (0, 99, 0))]
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    image = decoded(
        tmp_path / f"a.{suffix}",
        lambda path: frames[0].save(path, save_all=True, append_images=frames[1:], **options),
    )
    with Image.open(tmp_path / f"a.{suffix}") as file:
        assert getattr(file, "n_frames", 1) == 3
    assert image[7, 7].tolist() == [10, 20, 30]


NOT_FAITHFUL = {
    "float PPM": (b"Pf 32 32 -1.0\n" + np.full(1024, 0.5, np.float32).tobytes(), "mode F"),
    "transparent gray of 16 bits": (png_bytes(0, 16, (b"\0" + bytes(64)) * 32, bytes(2)), "transparent color of 16"),
    "transparent RGB of 16 bits": (png_bytes(2, 16, (b"\0" + bytes(192)) * 32, bytes(6)), "transparent color of 16"),
    "EPS": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n",
        "content is not PNG, JPEG",
    ),
    "WMF": (b"\xd7\xcd\xc6\x9a\0\0" + bytes(200), "content is not PNG, JPEG"),
    "GIF": (b"GIF89a\x20\0\x20\0\0\0\0;", "content is not PNG, JPEG"),
    "TIFF": (b"II*\0\x08\0\0\0\0\0", "content is not PNG, JPEG"),
    "truncated PNG": (png_bytes(2, 8, b"".join(b"\0" + row.tobytes() for row in RGB))[:2000], "not a readable image"),
}


@pytest.mark.parametrize("kind", NOT_FAITHFUL)
def test_fault28_fault33_other_content_is_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_programs(*arguments: object, **_: object) -> None:
        raise AssertionError(f"started {arguments}")

    for name in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, refuse_programs)
    monkeypatch.setattr(os, "system", refuse_programs)
    Image.init()  # Pillow knows all of its formats, as in a process that has read others
    content, message = NOT_FAITHFUL[kind]
    (tmp_path / "a.png").write_bytes(content)
    for read in (decode_image, lambda path: read_inputs(str(path))):
        with pytest.raises(DataError, match=message) as caught:
            read(tmp_path / "a.png")
        assert caught.value.exit_code == 3
        assert str(tmp_path / "a.png") in str(caught.value)
        assert "\n" not in str(caught.value)


MEASURE_MEMORY = """
import resource, sys
from pathlib import Path
from typing import Any
from fastcifar.data.image_files import decode_image
from fastcifar.errors import DataError
from PIL import Image
Image.init()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode_image(Path(sys.argv[1]), resize=True)
    print("read", end=" ")
except DataError as error:
    print("refused", end=" ")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def write_hundred_megapixels(path: Path) -> None:
    Image.new("1", (9990, 9990)).save(path)


TOO_LARGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "100 megapixels": ("a.png", write_hundred_megapixels, "refused"),
    "100 megapixels of JPEG": ("a.jpg", lambda path: Image.new("L", (9990, 9990)).save(path), "refused"),
    "a declared size of 4 gigapixels": (
        "a.png", lambda path: path.write_bytes(png_bytes(0, 8, b"\0", size=65535)), "refused"),
    "a declared size of 90 gigapixels": ("a.ppm", lambda path: path.write_bytes(b"P6 300000 300000 255\n"), "refused"),
    "a file of 10 gigabytes": (
        "a.bmp", lambda path: (Image.new("L", (32, 32)).save(path), os.truncate(path, 10**10)), "refused"),
    "24 megapixels with alpha": ("a.png", lambda path: Image.new("RGBA", (6000, 4000)).save(path), "refused"),
    "21 megapixels with alpha": ("a.png", lambda path: Image.new("RGBA", (6000, 3500)).save(path), "read"),
    "21 megapixels with a transparent color": (
        "a.png", lambda path: Image.new("RGB", (6000, 3500)).save(path, transparency=(1, 2, 3)), "read"),
    "21 megapixels of 16 bits": ("a.png", lambda path: Image.new("I;16", (6000, 3500)).save(path), "read"),
    "24 megapixels of WebP": ("a.webp", lambda path: Image.new("RGB", (6000, 4000)).save(path, method=0), "refused"),
    "16 megapixels of WebP": ("a.webp", lambda path: Image.new("RGB", (4000, 4000)).save(path, method=0), "read"),
    "60 megapixels of JPEG": ("a.jpg", lambda path: Image.new("RGB", (10000, 6000)).save(path), "read"),
}  # fmt: skip


@pytest.mark.medium
@pytest.mark.parametrize("kind", TOO_LARGE)
def test_fault33_large_images_are_refused_before_they_are_decoded(tmp_path: Path, kind: str) -> None:
    name, write, outcome = TOO_LARGE[kind]
    write(tmp_path / name)
    command = [sys.executable, "-c", MEASURE_MEMORY, str(tmp_path / name)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    word, kilobytes = result.stdout.split()
    assert word == outcome
    assert not result.stderr
    assert int(kilobytes) < (300_000 if outcome == "read" else 30_000)


def mixed_folder(root: Path) -> Path:
    """Create a folder with two readable images and with everything that is left out."""
    for name in ("read.png", "sub/nested.PNG", "lost.gif", "lost.tif", ".ipynb_checkpoints/a.png", "__MACOSX/b.png"):
        write_flat(root / name, 90)
    write_flat(root / "sub" / "._nested.png", 90)
    (root / "note.txt").write_text("text")
    (root / "sub" / "README").write_text("text")
    write_flat(root.parent / "elsewhere" / "c.png", 90)
    (root / "link").symlink_to(root.parent / "elsewhere")
    (root / "linked.png").symlink_to(root.parent / "elsewhere" / "c.png")
    (root / "broken.png").symlink_to(root / "nowhere")
    os.mkfifo(root / "fifo.png")
    return root


def test_fault29_everything_that_is_left_out_of_a_folder_is_counted(tmp_path: Path) -> None:
    root, left_out = mixed_folder(tmp_path / "mixed"), LeftOut()
    files = list_images(root, left_out)
    assert [str(file.relative_to(root)) for file in files] == ["linked.png", "read.png", "sub/nested.PNG"]
    assert left_out == {
        ("folder", "hidden"): 2,
        (".png", "hidden"): 1,
        ("folder", "linked folder"): 1,
        (".gif", "format not supported"): 1,
        (".tif", "format not supported"): 1,
        (".txt", "format not supported"): 1,
        ("without suffix", "format not supported"): 1,
        (".png", "not a regular file"): 2,
    }
    with pytest.warns(UserWarning, match="left out") as caught:
        inputs = read_inputs(str(root))
    assert inputs.ids == ["linked", "read", "sub/nested"]
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message == describe_left_out(root, left_out)
    assert "1 .gif, 1 .tif, 1 .txt, 1 without suffix (format not supported)" in message
    assert "2 folders, 1 .png (hidden)" in message
    assert "\n" not in message


def test_fault29_a_line_about_many_suffixes_stays_short(tmp_path: Path) -> None:
    left_out = LeftOut({(f".{number:04d}", "format not supported"): 1 for number in range(5000)})
    left_out[".gif", "format not supported"] = 3
    line = describe_left_out(tmp_path, left_out)
    assert "left out 3 .gif, 1 .0000" in line
    assert "4,993 others (format not supported)" in line
    assert len(line) < 300
    assert describe_left_out(tmp_path, LeftOut()) == ""


def test_fault29_a_subfolder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_flat(tmp_path / "images" / "sub" / "a.png", 9)
    scandir = os.scandir

    def fail(path: str | Path) -> object:  # permissions do not restrict root, as which tests may run
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(DataError, match=r"cannot read .*sub: Permission denied"):
        read_inputs(str(tmp_path / "images"))
