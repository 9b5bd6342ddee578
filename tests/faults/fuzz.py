"""Damaged inputs for every reader of files, and what must come of them: a `UserError`, in time, or a value.

    scripts/fuzz_readers [--seconds 60] [--seed 0]

tries each reader of READERS for its share of the time and writes bench/results/<UTC>_<device>_fuzz-readers/. The tests
try a few hundred inputs of each.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import pickle
import random
import resource
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastcifar.data import archive, cifar_files, class_folders
from fastcifar.data.cifar_files import DATASETS, DatasetSpec, FileLayout
from fastcifar.data.safe_pickle import loads_pickle
from fastcifar.errors import UserError
from fastcifar.recipe import Recipe
from fastcifar.reporting import aggregate, records
from fastcifar.reporting.table import build_report_table
from fastcifar.reporting.table_formats import TABLE_FORMATS
from fastcifar.training import checkpoint, run_dir

ROWS = 20  # of a batch, in stand-ins for the official files
SLOWEST_S = 5.0
MOST_BYTES = 200 * 2**20
# what damage likes to hit: sizes, signs, ends, opcodes of a pickle
WORDS = [b"\x00", b"\xff", b"\x7f", b"\x80", b".", b"R", b"b", b"(", b"t", b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff",
         b"cos\nsystem\n", b"\x8e" + b"\xff" * 7, b"999999999999", b"-1", b"\n", b"PK\x05\x06"]  # fmt: skip


def mutated(draw: random.Random, seeds: list[bytes]) -> bytes:
    """A seed with one to six changes: bits flipped, bytes cut out, put in, repeated, from another seed; or its head."""
    blob = draw.choice(seeds)
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(blob) + 1) if draw.random() < 0.5 else draw.randrange(min(len(blob), 400) + 1)
        size = draw.choice([1, 1, 2, 4, 16, 300])
        kind = draw.randrange(6)
        if kind == 0 and at < len(blob):
            blob = blob[:at] + bytes([blob[at] ^ 1 << draw.randrange(8)]) + blob[at + 1 :]
        elif kind == 1:
            blob = blob[:at] + draw.choice(WORDS) + blob[at:]
        elif kind == 2:
            blob = blob[:at] + blob[at + size :]
        elif kind == 3:
            blob = blob[:at] + blob[at : at + size] * draw.choice([2, 3, 50]) + blob[at + size :]
        elif kind == 4:
            other = draw.choice(seeds)
            start = draw.randrange(len(other) + 1)
            blob = blob[:at] + other[start : start + size] + blob[at + size :]
        else:
            blob = blob[:at] + draw.randbytes(min(size, 16)) + blob[at + size :]
    return blob[: draw.randrange(len(blob) + 1)] if draw.random() < 0.1 else blob


def small_row() -> DatasetSpec:
    """CIFAR-10 as published, but of ROWS images a file and without MD5s."""
    row = DATASETS["cifar10"]

    def small(packing: FileLayout) -> FileLayout:
        batches = tuple(dataclasses.replace(batch, num_images=ROWS, md5="") for batch in packing.batches)
        return dataclasses.replace(packing, batches=batches, meta_md5="")

    return dataclasses.replace(
        row, python=small(row.python), binary=small(row.binary), split_digests={}, reordered_md5s={}
    )


ROW = small_row()


def batch(protocol: int) -> bytes:
    images = np.arange(ROWS * 3072, dtype=np.uint32).astype(np.uint8).reshape(ROWS, 3072)
    content = {b"batch_label": b"training batch 1 of 5", b"labels": [n % 10 for n in range(ROWS)], b"data": images}
    return pickle.dumps(content, protocol)


def packed(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as tar:
        for name, blob in members.items():
            info = tarfile.TarInfo(f"{ROW.python.folder}/{name}")
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))
    return file.getvalue()


def saved(*values: Any) -> list[bytes]:
    files = []
    for value in values:
        file = io.BytesIO()
        torch.save(value, file)
        files.append(file.getvalue())
    return files


def read_batch(folder: Path, blob: bytes) -> Any:
    images, labels = np.empty((ROWS, 3072), np.uint8), np.empty(ROWS, np.int64)
    cifar_files._read_python_batch(ROW, ROW.python.batches[0], blob, "batch", images, labels, is_official=False)
    return labels


def read_binary(folder: Path, blob: bytes) -> Any:
    images, labels = np.empty((ROWS, 3072), np.uint8), np.empty(ROWS, np.int64)
    cifar_files._read_binary_batch(ROW, ROW.binary.batches[0], blob, "batch", images, labels)
    return labels


def in_a_file(name: str, read: Callable[[Path], Any]) -> Callable[[Path, bytes], Any]:
    def reader(folder: Path, blob: bytes) -> Any:
        (folder / name).write_bytes(blob)
        return read(folder / name)

    return reader


def image(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (1, 2, 3)).save(file, kind)
    return file.getvalue()


def in_a_report(name: str) -> Callable[[Path, bytes], Any]:
    """The file `name` of a run in a sweep, or of the sweep, read and written in every format of a report."""

    def reader(folder: Path, blob: bytes) -> Any:
        within = folder / "runs" / "t0"
        within.mkdir(parents=True, exist_ok=True)
        for file, content in REPORTED.items():
            place = folder if file == "trials.jsonl" else within
            (place / file).write_bytes(blob if file == name else content)
        table = build_report_table(aggregate.group_runs(records.read_records([folder])))
        return [write(table) for write in TABLE_FORMATS.values()]

    return reader


STATE = {"recipe": {"arch": "x"}, "model": {"weight": torch.arange(6.0)}, "step": 3, "more": [None, True, (1, "a")]}
CSV = (
    ",".join(run_dir.METRICS_COLUMNS)
    + "\n"
    + "".join(f"{epoch},5,0.1,2.3,0.1,2.3,0.1,,1000,1.5\n" for epoch in range(3))
)
SUMMARY = {"params": 5266, "steps": 270, "eval_weights": "last", "val_acc": 0.5, "test_acc": 0.4, "per_class": {"cat": 0.4},
           "seconds": {"total": 61.5}, "stop_reason": "epochs", "complete": True}  # fmt: skip
TRIAL = {"trial": "t0", "label": "lr=0.1", "knobs": {"lr": 0.1}, "seed": 3, "state": "done", "run": "runs/t0"}
REPORTED = {
    "recipe.toml": b"lr = 0.1\nblocks = [4, 4, 3]\nepochs = 3\n",
    "metrics.csv": CSV.encode(),
    "summary.json": json.dumps(SUMMARY).encode(),
    "trials.jsonl": json.dumps(TRIAL).encode() + b"\n",
}
# reader -> honest inputs, and what reads one (given a folder of its own)
READERS: dict[str, tuple[list[bytes], Callable[[Path, bytes], Any]]] = {
    "pickle": ([pickle.dumps({b"a": np.arange(9), "b": [1, (2.5, None, "x")]}, p) for p in range(6)],
               lambda _, blob: loads_pickle(blob)),
    "Python batch": ([batch(protocol) for protocol in (0, 2, 4, 5)], read_batch),
    "binary batch": ([bytes([3, *([7] * 3072)]) * ROWS, bytes(3073 * ROWS)], read_binary),
    "archive": ([packed({"data_batch_1": batch(2), "batches.meta": pickle.dumps({b"label_names": [b"x"]}, 2)})],
                in_a_file("a.tar.gz", lambda path: list(archive.iter_tar_files(path, ROW)))),
    "image": ([image(kind) for kind in ("PNG", "BMP", "JPEG", "GIF", "TIFF")], in_a_file("a.png", class_folders.decode_image)),
    "checkpoint": (saved(STATE, {"net": STATE["model"], "acc": np.float64(91.2), "epoch": 7}),
                   in_a_file("a.pt", lambda path: checkpoint.read_checkpoint(path, allow_foreign=True))),
    "manifest": ([json.dumps({"last.pt": {"bytes": 3, "sha256": "ab"}}).encode()],
                 in_a_file("manifest.json", lambda path: checkpoint.read_manifest(path.parent))),
    "env.json": ([b'{"recipe": "quick", "resumed": []}'],
                 in_a_file("env.json", lambda path: run_dir.read_environment(path.parent))),
    "metrics.csv": ([CSV.encode()], in_a_file("metrics.csv", lambda path: run_dir.read_metrics_csv(path, 2))),
    "events.jsonl": ([b'{"time": 1.5, "epoch": 0, "step": 5, "seconds": 1.5}\n' * 3],
                     in_a_file("events.jsonl", lambda path: run_dir.read_event_lines(path, 2))),
    **{f"{name} of a report": ([content], in_a_report(name)) for name, content in REPORTED.items()},
    "recipe file": ([b"lr = 0.1\nblocks = [4, 4, 3]\noptimizer_arg = {nesterov = true}\n", b"augment = 'crop:4'\nepochs = 3\n"],
                    in_a_file("a.toml", lambda path: Recipe.make(str(path)))),
}  # fmt: skip


def tried(name: str, inputs: Iterator[bytes]) -> dict[str, Any]:
    """Counts of `inputs` that reader `name` refused and read, with its slowest time.

    Raises what the reader raises beside a `UserError`, with the input in a note; `AssertionError` if it was slow or
    took memory.
    """
    read = READERS[name][1]
    counts: dict[str, Any] = {"reader": name, "inputs": 0, "refused": 0, "read": 0, "slowest_s": 0.0}
    lines = 1
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for blob in inputs:
            started = time.perf_counter()
            try:
                read(Path(folder), blob)
                counts["read"] += 1
            except UserError as error:
                counts["refused"] += 1
                lines = max(lines, str(error).count("\n") + 1)
            except BaseException as error:
                error.add_note(f"reader {name}, input {blob!r}")
                raise
            counts["inputs"] += 1
            counts["slowest_s"] = max(counts["slowest_s"], round(time.perf_counter() - started, 4))
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory)
    assert counts["slowest_s"] < SLOWEST_S, counts
    assert lines == 1, f"reader {name} explains itself in {lines} lines"
    assert grown < MOST_BYTES, (counts, grown)
    return {**counts, "memory_grown_bytes": grown}


def main() -> None:
    """Tries every reader and keeps the counts."""
    parser = argparse.ArgumentParser(description="Damaged inputs for every reader of files.")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all readers together")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    import results_folder  # pyright: ignore[reportMissingImports]  # of bench/

    from fastcifar.device import collect_environment

    draw = random.Random(arguments.seed)

    def inputs(name: str) -> Iterator[bytes]:
        until = time.monotonic() + arguments.seconds / len(READERS)
        while time.monotonic() < until:
            yield mutated(draw, READERS[name][0])

    trials = []
    for name in READERS:
        trials.append(tried(name, inputs(name)))
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
