"""Fuzzing of every file reader: damaged input must give a value or a `UserError` within limits of time and memory.

    scripts/fuzz_readers [--seconds 60] [--seed 0]

runs each reader of READERS for an equal part of the time and writes bench/results/<UTC>_<device>_fuzz-readers/. The
tests run each reader on a few hundred inputs.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import io
import json
import math
import pickle
import random
import resource
import sys
import tarfile
import tempfile
import time
import tomllib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastcifar.data import archives, arrays, cifar_files, image_files
from fastcifar.data.cifar_files import DATASETS, DatasetSpec, FileLayout
from fastcifar.data.safe_pickle import load_pickle
from fastcifar.errors import UserError
from fastcifar.format import format_toml_value
from fastcifar.recipe import Recipe
from fastcifar.reporting import aggregate, records, runs
from fastcifar.reporting.table import TABLE_FORMATS, build_report_table
from fastcifar.training import checkpoint, metrics_file
from fastcifar.training.environment import read_environment
from tests.training.summaries import summary_document

NUM_IMAGES = 20  # of each batch in replacements of the official files
MAX_READ_S = 5.0
MAX_MEMORY_BYTES = 200 * 2**20
# Sizes, signs, terminators and pickle opcodes that are likely to trigger errors
TOKENS = [b"\x00", b"\xff", b"\x7f", b"\x80", b".", b"R", b"b", b"(", b"t", b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff",
         b"cos\nsystem\n", b"\x8e" + b"\xff" * 7, b"999999999999", b"-1", b"\n", b"PK\x05\x06"]  # fmt: skip


def mutate(rng: random.Random, seeds: list[bytes]) -> bytes:
    """Return a random seed with one to six random changes, possibly truncated.

    A change flips a bit, inserts a token or random bytes, removes or repeats bytes, or copies bytes of another seed.
    """
    blob = rng.choice(seeds)
    for _ in range(rng.randint(1, 6)):
        position = rng.randrange(len(blob) + 1) if rng.random() < 0.5 else rng.randrange(min(len(blob), 400) + 1)
        size = rng.choice([1, 1, 2, 4, 16, 300])
        mutation = rng.randrange(6)
        if mutation == 0 and position < len(blob):
            blob = blob[:position] + bytes([blob[position] ^ 1 << rng.randrange(8)]) + blob[position + 1 :]
        elif mutation == 1:
            blob = blob[:position] + rng.choice(TOKENS) + blob[position:]
        elif mutation == 2:
            blob = blob[:position] + blob[position + size :]
        elif mutation == 3:
            blob = blob[:position] + blob[position : position + size] * rng.choice([2, 3, 50]) + blob[position + size :]
        elif mutation == 4:
            other = rng.choice(seeds)
            start = rng.randrange(len(other) + 1)
            blob = blob[:position] + other[start : start + size] + blob[position + size :]
        else:
            blob = blob[:position] + rng.randbytes(min(size, 16)) + blob[position + size :]
    return blob[: rng.randrange(len(blob) + 1)] if rng.random() < 0.1 else blob


# Values of other types than a document should have, and those that cannot be written again
ODD_VALUES = [math.nan, math.inf, 10**400, -1, 2.5, 1e308, True, None, "", "\ud800", "[/x]", "\x1b[1m", "a\nb", [], {},
              [{}], {"a": [1, "b"]}, "\x00", "x" * 500, "=1+1", "../..", [[1, 2], 3]]  # fmt: skip
MAX_NESTING = 20_000


def parse_json_line(blob: bytes) -> tuple[Any, Callable[[Any], bytes]]:
    nested = random.Random(len(blob)).choice(["[", '{"a":']) * MAX_NESTING
    return json.loads(blob.splitlines()[0]), (
        lambda document: json.dumps(document).replace('"NESTED"', nested).encode() + b"\n"
    )


def parse_toml(blob: bytes) -> tuple[Any, Callable[[Any], bytes]]:
    def to_toml(document: Any) -> bytes:
        values = document.items() if isinstance(document, dict) else [("values", document)]
        text = "".join(f"{name} = {format_toml_value(value)}\n" for name, value in values)
        text = text.replace("NaN", "nan").replace("Infinity", "inf").replace('"NESTED"', "[" * MAX_NESTING)
        return text.encode(errors="surrogatepass")

    return tomllib.loads(blob.decode()), to_toml


def parse_csv(blob: bytes) -> tuple[Any, Callable[[Any], bytes]]:
    def to_csv(document: Any) -> bytes:
        rows = [row if isinstance(row, list) else [row] for row in document] if isinstance(document, list) else []
        return "".join(",".join(map(str, row)) + "\n" for row in rows).encode(errors="surrogatepass")

    return [row.split(",") for row in blob.decode().splitlines()], to_csv


def parse_checkpoint(blob: bytes) -> tuple[Any, Callable[[Any], bytes]]:
    def to_checkpoint(document: Any) -> bytes:
        file = io.BytesIO()
        torch.save(document, file)
        return file.getvalue()

    return torch.load(io.BytesIO(blob), weights_only=False), to_checkpoint


# readers of valid documents; each returns the document and the function that writes it
DOCUMENT_PARSERS = (parse_json_line, parse_toml, parse_checkpoint, parse_csv)


def mutate_types(rng: random.Random, seeds: list[bytes]) -> bytes:
    """Return a random seed that is a document, with up to three values removed or of other types; else `mutate`."""
    blob = rng.choice(seeds)
    for parse in DOCUMENT_PARSERS:
        try:
            document, write = parse(blob)
            break
        except Exception:
            continue
    else:
        return mutate(rng, seeds)
    for _ in range(rng.randint(1, 3)):
        container = document
        while isinstance(container, dict | list) and container:
            key = rng.choice(list(container)) if isinstance(container, dict) else rng.randrange(len(container))
            child = container[key]
            if not (isinstance(child, dict | list) and child) or rng.random() < 0.3:
                if rng.random() < 0.2:
                    del container[key]
                else:
                    container[key] = copy.deepcopy(rng.choice([*ODD_VALUES, "NESTED"]))
                break
            container = child
    return write(rng.choice([document] * 8 + [[document], 3, None]))


def small_dataset_spec() -> DatasetSpec:
    """Return the specification of CIFAR-10 with NUM_IMAGES images per file and without MD5 checksums."""
    spec = DATASETS["cifar10"]

    def shrink(layout: FileLayout) -> FileLayout:
        batches = tuple(dataclasses.replace(batch, num_images=NUM_IMAGES, md5="") for batch in layout.batches)
        return dataclasses.replace(layout, batches=batches, meta_md5="")

    return dataclasses.replace(spec, python=shrink(spec.python), binary=shrink(spec.binary), split_digests={})


SPEC = small_dataset_spec()


def pickled_batch(protocol: int) -> bytes:
    images = np.arange(NUM_IMAGES * 3072, dtype=np.uint32).astype(np.uint8).reshape(NUM_IMAGES, 3072)
    content = {
        b"batch_label": b"training batch 1 of 5",
        b"labels": [index % 10 for index in range(NUM_IMAGES)],
        b"data": images,
    }
    return pickle.dumps(content, protocol)


def tar_archive(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as tar:
        for name, blob in members.items():
            info = tarfile.TarInfo(f"{SPEC.python.folder}/{name}")
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))
    return file.getvalue()


def torch_files(*values: Any) -> list[bytes]:
    files = []
    for value in values:
        file = io.BytesIO()
        torch.save(value, file)
        files.append(file.getvalue())
    return files


def batch_reader(layout: FileLayout) -> Callable[[Path, bytes], Any]:
    return lambda _, blob: cifar_files.parse_batch(SPEC, layout, layout.batches[0], blob, "batch")


def file_reader(name: str, read: Callable[[Path], Any]) -> Callable[[Path, bytes], Any]:
    def reader(folder: Path, blob: bytes) -> Any:
        (folder / name).write_bytes(blob)
        return read(folder / name)

    return reader


def encoded_image(image_format: str, mode: str) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((32, 32)).convert(mode).save(file, image_format)
    return file.getvalue()


def numpy_file(save: Callable[..., None], *args: Any, **arrays: Any) -> bytes:
    file = io.BytesIO()
    save(file, *args, **arrays)
    return file.getvalue()


# format -> the modes in which Pillow writes it
IMAGE_MODES = {
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
    "BMP": ("RGB", "L", "P", "1"),
    "JPEG": ("RGB", "L", "CMYK"),
    "PPM": ("RGB", "L", "1"),
    "WEBP": ("RGB", "RGBA"),
}


def report_reader(name: str) -> Callable[[Path, bytes], Any]:
    """Return a reader of the file `name` of a sweep or one of its runs, which writes a report in every format."""

    def reader(folder: Path, blob: bytes) -> Any:
        run_folder = folder / "runs" / "t0"
        run_folder.mkdir(parents=True, exist_ok=True)
        for file, content in REPORT_FILES.items():
            parent = folder if file == "trials.jsonl" else run_folder
            (parent / file).write_bytes(blob if file == name else content)
        json.dumps([runs.list_runs(folder), runs.list_runs(folder / "runs")])
        table = build_report_table(aggregate.group_runs(records.read_records([folder])))
        return [write(table) for write in TABLE_FORMATS.values()]

    return reader


PIXELS = np.arange(6 * 3072, dtype=np.uint32).astype(np.uint8).reshape(6, 32, 32, 3)
STATE = {"recipe": {"arch": "x"}, "model": {"weight": torch.arange(6.0)}, "step": 3, "more": [None, True, (1, "a")]}
CSV = (
    ",".join(metrics_file.METRICS_COLUMNS)
    + "\n"
    + "".join(f"{epoch},5,0.1,2.3,0.1,2.3,0.1,,1000,1.5\n" for epoch in range(3))
)
TRIAL = {"trial": "t0", "label": "lr=0.1", "knobs": {"lr": 0.1}, "seed": 3, "state": "done", "run": "runs/t0"}
REPORT_FILES = {
    "recipe.toml": b"lr = 0.1\nblocks = [4, 4, 3]\nepochs = 3\n",
    "metrics.csv": CSV.encode(),
    "summary.json": json.dumps(summary_document()).encode(),
    "trials.jsonl": json.dumps(TRIAL).encode() + b"\n",
}
# Reader name -> valid inputs, and a function that reads an input, given a temporary folder
READERS: dict[str, tuple[list[bytes], Callable[[Path, bytes], Any]]] = {
    "pickle": ([pickle.dumps({b"a": np.arange(9), "b": [1, (2.5, None, "x")]}, p) for p in range(6)],
               lambda _, blob: load_pickle(blob, "pickle")),
    "Python batch": ([pickled_batch(protocol) for protocol in (0, 2, 4, 5)], batch_reader(SPEC.python)),
    "binary batch": ([bytes([3, *([7] * 3072)]) * NUM_IMAGES, bytes(3073 * NUM_IMAGES)], batch_reader(SPEC.binary)),
    "archive": ([tar_archive({"data_batch_1": pickled_batch(2),
                               "batches.meta": pickle.dumps({b"label_names": [b"x"]}, 2)})],
                file_reader("a.tar.gz", lambda path: list(archives.iter_tar_files(path, SPEC)))),
    "image": ([encoded_image(name, mode) for name, modes in IMAGE_MODES.items() for mode in modes],
              file_reader("a.png", image_files.decode_image)),
    ".npz": ([numpy_file(save, train_images=PIXELS, train_labels=np.arange(6) % 2, classes=["cat", "dog"])
              for save in (np.savez, np.savez_compressed)]
             + [numpy_file(np.savez, images=PIXELS[:, :20, :24], labels=np.arange(6) % 2)],
             file_reader("a.npz", lambda path: arrays.read_npz(path, 32, 0))),
    ".npy": ([numpy_file(np.save, PIXELS), numpy_file(np.save, PIXELS.reshape(6, 3072))],
             file_reader("a.npy", lambda path: arrays.to_planar(arrays.open_npy(path, ""), "a.npy", ""))),
    "checkpoint": (torch_files(STATE, {"net": STATE["model"], "acc": np.float64(91.2), "epoch": 7}),
                   file_reader("a.pt", lambda path: checkpoint.read_checkpoint(path, allow_foreign=True))),
    "manifest": ([json.dumps({"last.pt": {"bytes": 3, "sha256": "ab"}}).encode()],
                 file_reader("manifest.json", lambda path: checkpoint.read_manifest(path.parent))),
    "env.json": ([b'{"recipe": "quick", "resumed": []}'],
                 file_reader("env.json", lambda path: read_environment(path.parent))),
    "metrics.csv": ([CSV.encode()], file_reader("metrics.csv", lambda path: metrics_file.read_metrics_csv(path, 2))),
    "events.jsonl": ([b'{"time": 1.5, "epoch": 0, "step": 5, "seconds": 1.5}\n' * 3],
                     file_reader("events.jsonl", lambda path: metrics_file.read_event_lines(path, 2))),
    **{f"{name} of a report": ([content], report_reader(name)) for name, content in REPORT_FILES.items()},
    "recipe file": ([b"lr = 0.1\nblocks = [4, 4, 3]\noptimizer_arg = {nesterov = true}\n",
                     b"augment = 'crop:4'\nepochs = 3\n"],
                    file_reader("a.toml", lambda path: Recipe.make(str(path)))),
}  # fmt: skip


def fuzz_reader(name: str, inputs: Iterator[bytes]) -> dict[str, Any]:
    """Run reader `name` on `inputs` and return the numbers of rejected and accepted inputs and the longest time.

    Raises any exception of the reader except `UserError`, with the input in a note, and `AssertionError` if the reader
    was too slow, used too much memory, or gave a message of several lines.
    """
    read = READERS[name][1]
    counts: dict[str, Any] = {"reader": name, "inputs": 0, "refused": 0, "read": 0, "slowest_s": 0.0}
    max_lines = 1
    memory_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for blob in inputs:
            start = time.perf_counter()
            try:
                read(Path(folder), blob)
                counts["read"] += 1
            except UserError as error:
                counts["refused"] += 1
                max_lines = max(max_lines, str(error).count("\n") + 1)
            except BaseException as error:
                error.add_note(f"reader {name}, input {blob!r}")
                raise
            counts["inputs"] += 1
            counts["slowest_s"] = max(counts["slowest_s"], round(time.perf_counter() - start, 4))
    memory_growth = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_before)
    assert counts["slowest_s"] < MAX_READ_S, counts
    assert max_lines == 1, f"reader {name} has a message of {max_lines} lines"
    assert memory_growth < MAX_MEMORY_BYTES, (counts, memory_growth)
    return {**counts, "memory_grown_bytes": memory_growth}


def main() -> None:
    """Fuzz every reader and write the counts."""
    parser = argparse.ArgumentParser(description="Fuzz every file reader with damaged input.")
    parser.add_argument("--seconds", type=float, default=60.0, help="total for all readers")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    import results_folder  # pyright: ignore[reportMissingImports]  # of bench/

    from fastcifar.device import collect_environment

    rng = random.Random(arguments.seed)

    def inputs(name: str) -> Iterator[bytes]:
        deadline = time.monotonic() + arguments.seconds / len(READERS)
        while time.monotonic() < deadline:
            yield rng.choice([mutate, mutate_types])(rng, READERS[name][0])

    trials = []
    for name in READERS:
        trials.append(fuzz_reader(name, inputs(name)))
        print(json.dumps(trials[-1]), file=sys.stderr)
    total = {key: sum(trial[key] for trial in trials) for key in ("inputs", "refused", "read")}
    summary = {
        "what": "fuzz-readers",
        "seed": arguments.seed,
        "seconds": arguments.seconds,
        "readers": len(READERS),
        **total,
    }
    print(results_folder.write("fuzz-readers", collect_environment("cpu"), summary, trials))


if __name__ == "__main__":
    main()
