"""Images to label: every layout gives the same ones, and whatever could be misread is refused."""

from __future__ import annotations

import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastcifar.data import cifar
from fastcifar.data.predict_inputs import read_inputs
from fastcifar.errors import DataError

IMAGES = np.random.default_rng(3).integers(0, 256, (12, 3, 32, 32), np.uint8)
IDS = [7, 3, 11, 0, 2, 900, 5, 4, 1, 12, 13, 14]

LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "planar": lambda images: images.reshape(len(images), 3072),
    "channel last": lambda images: np.ascontiguousarray(images.transpose(0, 2, 3, 1)),
    "channel first": lambda images: images,
}


def pickled(path: Path, content: Any, protocol: int = 4) -> str:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return str(path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_fault12_every_layout_and_spelling_of_a_pickle_is_the_same(tmp_path: Path, layout: str, protocol: int) -> None:
    data = LAYOUTS[layout](IMAGES)
    for number, (name, ids) in enumerate((("ids", IDS), (b"ids", np.array(IDS)))):
        key: Any = "data" if number == 0 else b"data"
        found = read_inputs(pickled(tmp_path / f"{number}.pkl", {key: data, name: ids}, protocol))
        assert np.array_equal(found.images, IMAGES)
        assert (found.ids, found.labels) == (IDS, None)
        assert layout in found.layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_npy_is_read_by_its_shape_and_numbered_by_position(tmp_path: Path, layout: str) -> None:
    np.save(tmp_path / "a.npy", LAYOUTS[layout](IMAGES))
    found = read_inputs(str(tmp_path / "a.npy"))
    assert np.array_equal(found.images, IMAGES)
    assert found.ids == list(range(12))


MALFORMED: dict[str, Any] = {
    "float": {"data": IMAGES.astype(np.float32) / 255, "ids": IDS},
    "nan": {"data": np.full((12, 32, 32, 3), np.nan), "ids": IDS},
    "int64": {"data": IMAGES.astype(np.int64), "ids": IDS},
    "28x28": {"data": IMAGES[:, :, :28, :28], "ids": IDS},
    "gray": {"data": IMAGES[:, 0], "ids": IDS},
    "one image, which could be three gray ones": {"data": IMAGES[0], "ids": IDS[:1]},
    "columns for rows": {"data": IMAGES.reshape(12, 3072).T, "ids": IDS},
    "rows of three channels": {"data": IMAGES.transpose(0, 2, 1, 3), "ids": IDS},
    "no images": {"data": IMAGES[:0], "ids": []},
    "a list": {"data": IMAGES.tolist()[:1], "ids": [1]},
    "two of data": {"data": IMAGES, b"data": IMAGES[::-1], "ids": IDS},
    "two of ids": {"data": IMAGES, "ids": IDS, b"ids": IDS[::-1]},
    "no data": {"images": IMAGES, "ids": IDS},
    "no ids": {"data": IMAGES, "labels": IDS},
    "too few ids": {"data": IMAGES, "ids": IDS[1:]},
    "an id twice": {"data": IMAGES, "ids": [*IDS[1:], 12]},
    "ids of text": {"data": IMAGES, "ids": [str(value) for value in IDS]},
    "ids of floats": {"data": IMAGES, "ids": np.array(IDS) * 1.0},
    "ids of booleans": {"data": IMAGES[:2], "ids": [False, True]},
    "ids in columns": {"data": IMAGES, "ids": np.array(IDS)[:, None]},
    "no dict": [IMAGES, IDS],
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_fault12_a_malformed_pickle_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError) as caught:
        read_inputs(pickled(tmp_path / "a.pkl", MALFORMED[kind]))
    assert caught.value.exit_code == 3
    assert caught.value.remedy
    assert str(tmp_path / "a.pkl") in str(caught.value)
    assert "\n" not in str(caught.value)


class Evil:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


SENTINEL = "open('sentinel', 'w').close()"
NESTED = pickle.dumps(Evil(os.system, "touch sentinel"))


@pytest.mark.parametrize(
    "evil",
    [
        Evil(os.system, "touch sentinel"),
        Evil(eval, SENTINEL),
        Evil(pickle.loads, NESTED),
        np.array([Evil(exec, SENTINEL)], dtype=object),
    ],
    ids=["os.system", "eval", "nested load", "object array"],
)
def test_fault09_a_malicious_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evil: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for content in ({"data": evil, "ids": IDS}, {"data": IMAGES, "ids": evil}, {"data": IMAGES, "ids": [evil]}, evil):
        with pytest.raises(DataError):
            read_inputs(pickled(tmp_path / "a.pkl", content))
        assert not (tmp_path / "sentinel").exists()


def test_fault09_an_npy_of_objects_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "a.npy", np.array([Evil(os.system, "touch sentinel")], dtype=object), allow_pickle=True)
    with pytest.raises(DataError):
        read_inputs(str(tmp_path / "a.npy"))
    assert not (tmp_path / "sentinel").exists()


def test_fault10_an_npy_bomb_costs_no_memory(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", IMAGES[:1])
    small = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(small.replace(b"(1, 3, 32, 32), }      ", b"(9999999, 3, 32, 32), }"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"a\.npy"):
        read_inputs(str(tmp_path / "a.npy"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_an_image_of_any_size_is_its_largest_centred_square(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 128 * 64 * 3).reshape(64, 128, 3).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "wide.png")
    found = read_inputs(str(tmp_path / "wide.png"))
    assert (found.images.shape, found.ids) == ((1, 3, 32, 32), ["wide"])
    whole = np.asarray(Image.fromarray(ramp).resize((64, 32), Image.Resampling.BICUBIC))[:, 16:48]
    difference = np.abs(found.images[0].transpose(1, 2, 0).astype(int) - whole)
    assert difference.max() <= 2
    assert np.array_equal(difference[:, 2:-2], np.zeros_like(difference[:, 2:-2]))


def test_a_folder_of_images_is_in_the_order_of_its_paths(tmp_path: Path) -> None:
    for name, image in (("b/2.png", IMAGES[1]), ("a.bmp", IMAGES[0]), ("b/10.PNG", IMAGES[2])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_bytes(b"no image")
    found = read_inputs(str(tmp_path))
    assert found.ids == ["a", "b/10", "b/2"]
    assert np.array_equal(found.images, IMAGES[[0, 2, 1]])  # 32x32: not resampled
    (tmp_path / "a.png").write_bytes((tmp_path / "b" / "2.png").read_bytes())
    with pytest.raises(DataError, match="the id 'a' is there twice"):
        read_inputs(str(tmp_path))


def test_a_photograph_stands_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the top of the picture is at the right
    Image.fromarray(IMAGES[0].transpose(1, 2, 0)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_inputs(str(tmp_path / "a.png")).images[0], np.rot90(IMAGES[0], k=-1, axes=(1, 2)))


def test_the_data_sets_own_images_come_with_their_labels() -> None:
    data = cifar.load_dataset("synthetic:100")
    for name, split in (("data:test", data.test), ("data:train", data.train)):
        found = read_inputs(name, "synthetic:100")
        assert np.array_equal(found.images, split.images)
        assert found.labels is not None
        assert np.array_equal(found.labels, split.labels)
        assert found.ids == list(range(len(split.labels)))


@pytest.mark.parametrize("source", ["data:val", "nowhere", "a.txt", "broken.png", "empty", "half.npy", "half.pkl"])
def test_fault12_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    np.save(tmp_path / "half.npy", IMAGES)
    (tmp_path / "half.npy").write_bytes((tmp_path / "half.npy").read_bytes()[:2000])
    (tmp_path / "half.pkl").write_bytes(pickle.dumps({"data": IMAGES, "ids": IDS})[:2000])
    with pytest.raises(DataError) as caught:
        read_inputs(source)
    assert source in str(caught.value)
    assert caught.value.remedy
