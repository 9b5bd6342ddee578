"""Tests of the input images for prediction: every layout gives the same images, and ambiguous input is refused."""

from __future__ import annotations

import os
import pickle
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastcifar.data import cifar
from fastcifar.data.cifar import Split
from fastcifar.data.predict_inputs import read_inputs
from fastcifar.errors import DataError

IMAGES = np.random.default_rng(3).integers(0, 256, (12, 3, 32, 32), np.uint8)
IDS = [7, 3, 11, 0, 2, 900, 5, 4, 1, 12, 13, 14]

LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "planar": lambda images: images.reshape(len(images), 3072),
    "channel last": lambda images: np.ascontiguousarray(images.transpose(0, 2, 3, 1)),
    "channel first": lambda images: images,
}


def write_pickle(path: Path, content: Any, protocol: int = 4) -> str:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return str(path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_fault12_every_layout_and_key_type_of_a_pickle_gives_the_same_images(
    tmp_path: Path, layout: str, protocol: int
) -> None:
    data = LAYOUTS[layout](IMAGES)
    for number, (name, ids) in enumerate((("ids", IDS), (b"ids", np.array(IDS)))):
        key: Any = "data" if number == 0 else b"data"
        inputs = read_inputs(write_pickle(tmp_path / f"{number}.pkl", {key: data, name: ids}, protocol))
        assert np.array_equal(inputs.images, IMAGES)
        assert (inputs.ids, inputs.labels) == (IDS, None)
        assert layout in inputs.layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_npy_files_are_read_by_shape_and_ids_are_indices(tmp_path: Path, layout: str) -> None:
    np.save(tmp_path / "a.npy", LAYOUTS[layout](IMAGES))
    inputs = read_inputs(str(tmp_path / "a.npy"))
    assert np.array_equal(inputs.images, IMAGES)
    assert inputs.ids == list(range(12))


MALFORMED: dict[str, Any] = {
    "float": {"data": IMAGES.astype(np.float32) / 255, "ids": IDS},
    "nan": {"data": np.full((12, 32, 32, 3), np.nan), "ids": IDS},
    "int64": {"data": IMAGES.astype(np.int64), "ids": IDS},
    "28x28": {"data": IMAGES[:, :, :28, :28], "ids": IDS},
    "gray": {"data": IMAGES[:, 0], "ids": IDS},
    "one image without batch dimension": {"data": IMAGES[0], "ids": IDS[:1]},
    "transposed": {"data": IMAGES.reshape(12, 3072).T, "ids": IDS},
    "channels in the third dimension": {"data": IMAGES.transpose(0, 2, 1, 3), "ids": IDS},
    "no images": {"data": IMAGES[:0], "ids": []},
    "a list": {"data": IMAGES.tolist()[:1], "ids": [1]},
    "data key twice": {"data": IMAGES, b"data": IMAGES[::-1], "ids": IDS},
    "ids key twice": {"data": IMAGES, "ids": IDS, b"ids": IDS[::-1]},
    "no data": {"images": IMAGES, "ids": IDS},
    "no ids": {"data": IMAGES, "labels": IDS},
    "too few ids": {"data": IMAGES, "ids": IDS[1:]},
    "duplicate id": {"data": IMAGES, "ids": [*IDS[1:], 12]},
    "ids of text": {"data": IMAGES, "ids": [str(value) for value in IDS]},
    "ids of floats": {"data": IMAGES, "ids": np.array(IDS) * 1.0},
    "ids of booleans": {"data": IMAGES[:2], "ids": [False, True]},
    "ids in columns": {"data": IMAGES, "ids": np.array(IDS)[:, None]},
    "not a dict": [IMAGES, IDS],
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_fault12_a_malformed_pickle_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError) as caught:
        read_inputs(write_pickle(tmp_path / "a.pkl", MALFORMED[kind]))
    assert caught.value.exit_code == 3
    assert caught.value.remedy
    assert str(tmp_path / "a.pkl") in str(caught.value)
    assert "\n" not in str(caught.value)


class MaliciousCall:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


NESTED = pickle.dumps(MaliciousCall(os.system, "touch sentinel"))


@pytest.mark.parametrize(
    "content",
    [
        {"data": MaliciousCall(os.system, "touch sentinel"), "ids": IDS},
        {"data": IMAGES, "ids": MaliciousCall(eval, "open('sentinel', 'w').close()")},
        {"data": IMAGES, "ids": [MaliciousCall(pickle.loads, NESTED)]},
        np.array([MaliciousCall(os.system, "touch sentinel")], dtype=object),
    ],
    ids=["os.system", "eval", "nested load", "object array"],
)
def test_fault09_a_malicious_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError):
        read_inputs(write_pickle(tmp_path / "a.pkl", content))
    assert not (tmp_path / "sentinel").exists()


def test_fault09_an_npy_of_objects_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "a.npy", np.array([MaliciousCall(os.system, "touch sentinel")], dtype=object), allow_pickle=True)
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


def test_images_are_cropped_to_the_largest_centered_square(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 128 * 64 * 3).reshape(64, 128, 3).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "wide.png")
    inputs = read_inputs(str(tmp_path / "wide.png"))
    assert (inputs.images.shape, inputs.ids) == ((1, 3, 32, 32), ["wide"])
    expected = np.asarray(Image.fromarray(ramp).resize((64, 32), Image.Resampling.BICUBIC))[:, 16:48]
    difference = np.abs(inputs.images[0].transpose(1, 2, 0).astype(int) - expected)
    assert difference.max() <= 2
    assert np.array_equal(difference[:, 2:-2], np.zeros_like(difference[:, 2:-2]))


def test_images_of_a_folder_are_sorted_by_path(tmp_path: Path) -> None:
    for name, image in (("b/2.png", IMAGES[1]), ("a.bmp", IMAGES[0]), ("b/10.PNG", IMAGES[2])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_bytes(b"not an image")
    with pytest.warns(UserWarning, match=r"left out 1 .txt \(format not supported\); 1 .png \(hidden\)"):
        inputs = read_inputs(str(tmp_path))
    assert inputs.ids == ["a", "b/10", "b/2"]
    assert np.array_equal(inputs.images, IMAGES[[0, 2, 1]])  # 32x32: not resampled
    (tmp_path / "notes.txt").unlink()
    (tmp_path / ".hidden.png").unlink()
    (tmp_path / "a.png").write_bytes((tmp_path / "b" / "2.png").read_bytes())
    with pytest.raises(DataError, match="duplicate id 'a'"):
        read_inputs(str(tmp_path))


def test_photographs_are_rotated_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the image is at its right side
    Image.fromarray(IMAGES[0].transpose(1, 2, 0)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_inputs(str(tmp_path / "a.png")).images[0], np.rot90(IMAGES[0], k=-1, axes=(1, 2)))


def test_images_of_the_data_set_have_labels() -> None:
    data = cifar.load_dataset("synthetic:100")
    for name, split in (("data:test", data.test), ("data:train", data.train)):
        inputs = read_inputs(name, load_dataset=lambda: data)
        assert np.array_equal(inputs.images, split.images)
        assert inputs.labels is not None
        assert np.array_equal(inputs.labels, split.labels)
        assert inputs.ids == list(range(len(split.labels)))
    only_test = replace(data, train=Split(data.train.images[:0], data.train.labels[:0]))
    with pytest.raises(DataError, match="has no training images; give data:test"):
        read_inputs("data:train", load_dataset=lambda: only_test)


@pytest.mark.parametrize("source", ["data:val", "nowhere", "a.txt", "broken.png", "empty", "half.npy", "half.pkl"])
def test_fault12_errors_name_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
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
