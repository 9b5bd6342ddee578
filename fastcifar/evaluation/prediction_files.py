"""Predictions as files: CSV, JSON lines or Parquet by the suffix; and how two submissions differ.

A table is columns of equal length by name. It knows nothing of networks; what it cannot write it refuses by name.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastcifar.device import optional
from fastcifar.errors import DataError, DiskError, UsageError
from fastcifar.training.checkpoint import write_atomically

Columns = Mapping[str, Sequence[Any]]

HEADER = ("ID", "Labels")  # of the submissions that Kaggle takes
DIGITS = 6  # of a probability
PYARROW = "pip install 'pyarrow>=17'"


def columns(
    ids: Sequence[int] | Sequence[str],
    likely: np.ndarray,
    classes: Sequence[str],
    first_two: tuple[str, str] = HEADER,
    *,
    names: bool = False,
    top: int = 0,
    probabilities: bool = False,
) -> dict[str, Sequence[Any]]:
    """Ids and labels, and then what else was asked for, of images with the class probabilities `likely` [n, classes].

    `first_two`: the names of these columns. `names`: class names instead of numbers. `top`: top_1, top_1_probability,
    ... of so many best classes. `probabilities`: a column for every class. Errors: `UsageError` for a name twice.
    """

    def spelt(labels: np.ndarray) -> list[Any]:
        return [classes[label] for label in labels] if names else labels.tolist()

    best = np.argsort(-likely, axis=1, kind="stable")
    rounded = likely.round(DIGITS)
    found: list[tuple[str, Sequence[Any]]] = [(first_two[0], ids), (first_two[1], spelt(best[:, 0]))]
    for rank in range(top):
        of_rank = np.take_along_axis(rounded, best[:, rank : rank + 1], 1)[:, 0].tolist()
        found += [(f"top_{rank + 1}", spelt(best[:, rank])), (f"top_{rank + 1}_probability", of_rank)]
    if probabilities:
        found += [(name, rounded[:, label].tolist()) for label, name in enumerate(classes)]
    name, count = Counter(name for name, _ in found).most_common(1)[0]
    if count > 1:
        raise UsageError(f"{count} columns would be called {name!r}", "give another --header ID,LABEL")
    return dict(found)


def first_two(header: str | None, out: Path) -> tuple[str, str]:
    """The names of the first two columns: of `header`, "id,label", or Kaggle's. Errors: `UsageError`."""
    if header is None:
        return HEADER
    found = next(csv.reader([header]), [])
    if len(found) != 2 or not all(found) or found[0] == found[1]:
        raise UsageError(f"--header {header!r} does not name two columns", "write it as id,label")
    if out.suffix.lower() != ".csv":
        raise UsageError(f"--header is for a .csv, and --out is {out}", "leave it out")
    return found[0], found[1]


def as_csv(columns: Columns) -> bytes:
    """A header and a row for each image, as Kaggle reads it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue().encode()


def as_jsonl(columns: Columns) -> bytes:
    """One JSON object a line for each image."""
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_parquet(columns: Columns) -> bytes:
    """A Parquet file by pyarrow. Errors: `UsageError` without it."""
    optional("pyarrow", PYARROW)
    parquet, arrow = optional("pyarrow.parquet", PYARROW), optional("pyarrow", PYARROW)
    buffer = io.BytesIO()
    parquet.write_table(arrow.table({name: list(values) for name, values in columns.items()}), buffer)
    return buffer.getvalue()


WRITERS: dict[str, Callable[[Columns], bytes]] = {".csv": as_csv, ".jsonl": as_jsonl, ".parquet": as_parquet}


def writer_for(out: Path) -> Callable[[Columns], bytes]:
    """The writer of `out`'s suffix, before there is anything to write.

    Errors: `UsageError` for another suffix and for a library that is missing, `DiskError` without the folder.
    """
    writer = WRITERS.get(out.suffix.lower())
    if writer is None:
        raise UsageError(f"--out {out} has no suffix that says its format", f"end it in {', '.join(WRITERS)}")
    if writer is as_parquet:
        optional("pyarrow.parquet", PYARROW)
    if not out.parent.is_dir():
        raise DiskError(f"cannot write {out}: no folder {out.parent}", "give --out in a folder that is there")
    return writer


def write(out: Path, content: bytes) -> None:
    """`content` as `out`, whole or not at all; what was there is replaced. Errors: `DiskError`."""
    try:
        write_atomically(out, content)
    except OSError as error:
        problem = f"cannot write {out} ({len(content):,} bytes): {error.strerror}"
        raise DiskError(problem, "free some space, or give --out in another folder") from None


def read(path: Path) -> dict[str, str]:
    """id -> label, as text, of a submission: the first two columns of a CSV with a header, in its order.

    Errors: `DataError` for what is no such file, and for an id that is there twice.
    """
    remedy = "give a CSV of a header and ID,Labels rows, as `fastcifar predict` writes it"
    try:
        rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "check the path") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV ({error})", remedy) from None
    if len(rows) < 2:
        raise DataError(f"{path} holds no predictions", remedy)
    found: dict[str, str] = {}
    for number, row in enumerate(rows[1:], start=2):
        if len(row) < 2 or not row[0] or not row[1]:
            raise DataError(f"{path}, line {number} is {','.join(row)!r}, expected an id and a label", remedy)
        if row[0] in found:
            raise DataError(f"{path}, line {number}: the id {row[0]!r} is there twice", "submit every image once")
        found[row[0]] = row[1]
    return found


def compare(one: Path, other: Path) -> dict[str, Any]:
    """How two submissions of the same images differ: in how many labels, their share, and by pair of labels.

    Returns `a`, `b`, `total`, `differ`, `share` (a fraction of total) and `pairs`, the most frequent first, each with
    the label in `a`, that in `b` and the count. Rows are paired by id, whatever their order.
    Errors: `DataError`, also where the ids are not the same, or one holds class names and the other numbers.
    """
    a, b = read(one), read(other)
    if a.keys() != b.keys():
        only = f"{len(a.keys() - b.keys()):,} ids only in {one}, {len(b.keys() - a.keys()):,} only in {other}"
        raise DataError(f"these are not submissions of the same images: {only}", "compare two of the same input")
    kinds = [all(label.isdecimal() for label in labels.values()) for labels in (a, b)]
    if kinds[0] != kinds[1]:
        raise DataError(f"one of {one} and {other} holds class names, the other numbers", "write both with --names")
    pairs = Counter((a[key], b[key]) for key in a if a[key] != b[key])
    differ = pairs.total()
    listed = [{"a": mine, "b": theirs, "count": count} for (mine, theirs), count in pairs.most_common()]
    return {
        "a": str(one),
        "b": str(other),
        "total": len(a),
        "differ": differ,
        "share": differ / len(a),
        "pairs": listed,
    }
