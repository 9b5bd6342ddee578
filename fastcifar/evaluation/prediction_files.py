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

from fastcifar.device import import_optional
from fastcifar.errors import DataError, DiskError, UsageError
from fastcifar.files import write_atomically

PredictionColumns = Mapping[str, Sequence[Any]]

KAGGLE_HEADER = ("ID", "Labels")  # of the submissions that Kaggle takes
PROBABILITY_DIGITS = 6  # of a probability
PYARROW_REMEDY = "pip install 'pyarrow>=17'"


def prediction_columns(
    ids: Sequence[int] | Sequence[str],
    probabilities: np.ndarray,
    classes: Sequence[str],
    header: tuple[str, str] = KAGGLE_HEADER,
    *,
    use_class_names: bool = False,
    top_k: int = 0,
    with_probabilities: bool = False,
) -> dict[str, Sequence[Any]]:
    """Ids and labels, and then what else was asked for, of images with the class probabilities `likely` [n, classes].

    `first_two`: the names of these columns. `names`: class names instead of numbers. `top`: top_1, top_1_probability,
    ... of so many best classes. `probabilities`: a column for every class. Errors: `UsageError` for a name twice.
    """

    def spelt(labels: np.ndarray) -> list[Any]:
        return [classes[label] for label in labels] if use_class_names else labels.tolist()

    best = np.argsort(-probabilities, axis=1, kind="stable")
    rounded = probabilities.round(PROBABILITY_DIGITS)
    found: list[tuple[str, Sequence[Any]]] = [(header[0], ids), (header[1], spelt(best[:, 0]))]
    for rank in range(top_k):
        of_rank = np.take_along_axis(rounded, best[:, rank : rank + 1], 1)[:, 0].tolist()
        found += [(f"top_{rank + 1}", spelt(best[:, rank])), (f"top_{rank + 1}_probability", of_rank)]
    if with_probabilities:
        found += [(name, rounded[:, label].tolist()) for label, name in enumerate(classes)]
    name, count = Counter(name for name, _ in found).most_common(1)[0]
    if count > 1:
        raise UsageError(f"{count} columns would be called {name!r}", "give another --header ID,LABEL")
    return dict(found)


def parse_header(header: str | None, out: Path) -> tuple[str, str]:
    """The names of the first two columns: of `header`, "id,label", or Kaggle's. Errors: `UsageError`."""
    if header is None:
        return KAGGLE_HEADER
    found = next(csv.reader([header]), [])
    if len(found) != 2 or not all(found) or found[0] == found[1]:
        raise UsageError(f"--header {header!r} does not name two columns", "write it as id,label")
    if out.suffix.lower() != ".csv":
        raise UsageError(f"--header is for a .csv, and --out is {out}", "leave it out")
    return found[0], found[1]


def predictions_to_csv(columns: PredictionColumns) -> bytes:
    """A header and a row for each image, as Kaggle reads it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue().encode()


def predictions_to_jsonl(columns: PredictionColumns) -> bytes:
    """One JSON object a line for each image."""
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def predictions_to_parquet(columns: PredictionColumns) -> bytes:
    """A Parquet file by pyarrow. Errors: `UsageError` without it."""
    import_optional("pyarrow", PYARROW_REMEDY)
    parquet, arrow = import_optional("pyarrow.parquet", PYARROW_REMEDY), import_optional("pyarrow", PYARROW_REMEDY)
    buffer = io.BytesIO()
    parquet.write_table(arrow.table({name: list(values) for name, values in columns.items()}), buffer)
    return buffer.getvalue()


PREDICTION_SERIALIZERS: dict[str, Callable[[PredictionColumns], bytes]] = {
    ".csv": predictions_to_csv,
    ".jsonl": predictions_to_jsonl,
    ".parquet": predictions_to_parquet,
}


def get_prediction_serializer(out: Path) -> Callable[[PredictionColumns], bytes]:
    """The writer of `out`'s suffix, before there is anything to write.

    Errors: `UsageError` for another suffix and for a library that is missing, `DiskError` without the folder.
    """
    writer = PREDICTION_SERIALIZERS.get(out.suffix.lower())
    if writer is None:
        raise UsageError(
            f"--out {out} has no suffix that says its format", f"end it in {', '.join(PREDICTION_SERIALIZERS)}"
        )
    if writer is predictions_to_parquet:
        import_optional("pyarrow.parquet", PYARROW_REMEDY)
    if not out.parent.is_dir():
        raise DiskError(f"cannot write {out}: no folder {out.parent}", "give --out in a folder that is there")
    return writer


def write_predictions(out: Path, content: bytes) -> None:
    """`content` as `out`, whole or not at all; what was there is replaced. Errors: `DiskError`."""
    try:
        write_atomically(out, content)
    except OSError as error:
        problem = f"cannot write {out} ({len(content):,} bytes): {error.strerror}"
        raise DiskError(problem, "free some space, or give --out in another folder") from None


def read_predictions(path: Path) -> dict[str, str]:
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


def compare_predictions(path_a: Path, path_b: Path) -> dict[str, Any]:
    """How two submissions of the same images differ: in how many labels, their share, and by pair of labels.

    Returns `a`, `b`, `total`, `differ`, `share` (a fraction of total) and `pairs`, the most frequent first, each with
    the label in `a`, that in `b` and the count. Rows are paired by id, whatever their order.
    Errors: `DataError`, also where the ids are not the same, or one holds class names and the other numbers.
    """
    a, b = read_predictions(path_a), read_predictions(path_b)
    if a.keys() != b.keys():
        only = f"{len(a.keys() - b.keys()):,} ids only in {path_a}, {len(b.keys() - a.keys()):,} only in {path_b}"
        raise DataError(f"these are not submissions of the same images: {only}", "compare two of the same input")
    kinds = [all(label.isdecimal() for label in labels.values()) for labels in (a, b)]
    if kinds[0] != kinds[1]:
        raise DataError(f"one of {path_a} and {path_b} holds class names, the other numbers", "write both with --names")
    pairs = Counter((a[key], b[key]) for key in a if a[key] != b[key])
    differ = pairs.total()
    listed = [{"a": mine, "b": theirs, "count": count} for (mine, theirs), count in pairs.most_common()]
    return {
        "a": str(path_a),
        "b": str(path_b),
        "total": len(a),
        "differ": differ,
        "share": differ / len(a),
        "pairs": listed,
    }
