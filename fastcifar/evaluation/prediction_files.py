"""Write prediction files in CSV, JSON Lines or Parquet format, and compare two of them."""

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

PredictionColumns = Mapping[str, Sequence[Any]]  # column name -> values; all columns have the same length

KAGGLE_HEADER = ("ID", "Labels")  # header of a Kaggle submission
PROBABILITY_DIGITS = 6
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
    """Return the columns of a prediction file for images with class probabilities [n, classes].

    header              names of the columns of image ids and predicted labels
    use_class_names     write class names instead of class indices
    top_k               add the columns top_1, top_1_probability, ... of the `top_k` most probable classes
    with_probabilities  add a column of probabilities for every class

    Raises `UsageError` if `top_k` is out of range or two columns have the same name.
    """
    if not 0 <= top_k <= len(classes):
        raise UsageError(f"--top {top_k} is out of range for {len(classes)} classes", f"choose 0 to {len(classes)}")

    def format_labels(labels: np.ndarray) -> list[Any]:
        return [classes[label] for label in labels] if use_class_names else labels.tolist()

    ranking = np.argsort(-probabilities, axis=1, kind="stable")
    rounded = probabilities.round(PROBABILITY_DIGITS)
    columns: list[tuple[str, Sequence[Any]]] = [(header[0], ids), (header[1], format_labels(ranking[:, 0]))]
    for rank in range(top_k):
        rank_probabilities = np.take_along_axis(rounded, ranking[:, rank : rank + 1], 1)[:, 0].tolist()
        columns.append((f"top_{rank + 1}", format_labels(ranking[:, rank])))
        columns.append((f"top_{rank + 1}_probability", rank_probabilities))
    if with_probabilities:
        columns += [(name, rounded[:, label].tolist()) for label, name in enumerate(classes)]
    name, count = Counter(name for name, _ in columns).most_common(1)[0]
    if count > 1:
        raise UsageError(f"{count} columns would be named {name!r}", "choose other column names with --header ID,LABEL")
    return dict(columns)


def parse_header(header: str | None, out: Path) -> tuple[str, str]:
    """Return the names of the first two columns from the text "id,label"; None gives the names that Kaggle expects.

    Raises `UsageError` if `header` is not two different names, or `out` is not a CSV file.
    """
    if header is None:
        return KAGGLE_HEADER
    names = next(csv.reader([header]), [])
    if len(names) != 2 or not all(names) or names[0] == names[1]:
        raise UsageError(
            f"--header {header!r} does not name two different columns", "write two names, such as id,label"
        )
    if out.suffix.lower() != ".csv":
        raise UsageError(f"--header applies only to .csv files, but --out is {out}", "omit --header")
    return names[0], names[1]


def predictions_to_csv(columns: PredictionColumns) -> bytes:
    """Return the bytes of a CSV file with a header, in the format of a Kaggle submission."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue().encode()


def predictions_to_jsonl(columns: PredictionColumns) -> bytes:
    """Return the bytes of a JSON Lines file with one object per image."""
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def predictions_to_parquet(columns: PredictionColumns) -> bytes:
    """Return the bytes of a Parquet file. Raises `UsageError` if pyarrow is not installed."""
    pyarrow = import_optional("pyarrow", PYARROW_REMEDY)
    parquet = import_optional("pyarrow.parquet", PYARROW_REMEDY)
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({name: list(values) for name, values in columns.items()}), buffer)
    return buffer.getvalue()


PREDICTION_SERIALIZERS: dict[str, Callable[[PredictionColumns], bytes]] = {
    ".csv": predictions_to_csv,
    ".jsonl": predictions_to_jsonl,
    ".parquet": predictions_to_parquet,
}


def get_prediction_serializer(out: Path) -> Callable[[PredictionColumns], bytes]:
    """Return the function that serializes predictions in the format of the suffix of `out`.

    Raises `UsageError` for an unknown suffix or if pyarrow is required but not installed, and `DiskError` if the
    folder of `out` does not exist.
    """
    serializer = PREDICTION_SERIALIZERS.get(out.suffix.lower())
    if serializer is None:
        formats = ", ".join(PREDICTION_SERIALIZERS)
        raise UsageError(f"--out {out} has no known file suffix", f"choose a file name that ends in one of {formats}")
    if serializer is predictions_to_parquet:
        import_optional("pyarrow.parquet", PYARROW_REMEDY)
    if not out.parent.is_dir():
        raise DiskError(f"cannot write {out}: there is no folder {out.parent}", "choose an existing folder with --out")
    return serializer


def write_predictions(out: Path, content: bytes) -> None:
    """Write a prediction file atomically, replacing an existing file. Raises `DiskError` if it cannot be written."""
    try:
        write_atomically(out, content)
    except OSError as error:
        problem = f"cannot write {out} ({len(content):,} bytes): {error.strerror}"
        raise DiskError(problem, "free some space, or choose another folder with --out") from None


def read_predictions(path: Path) -> dict[str, str]:
    """Return the first two columns of a CSV file with a header as id -> label, both text, in the order of the file.

    Raises `DataError` if the file is not such a CSV file or an id occurs twice.
    """
    remedy = "give a CSV file with a header and rows of an id and a label, as `fastcifar predict` writes it"
    try:
        rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "check the path") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file ({error})", remedy) from None
    if len(rows) < 2:
        raise DataError(f"{path} contains no predictions", remedy)
    predictions: dict[str, str] = {}
    for number, row in enumerate(rows[1:], start=2):
        if len(row) < 2 or not row[0] or not row[1]:
            raise DataError(f"{path}, line {number} is {','.join(row)!r}, expected an id and a label", remedy)
        if row[0] in predictions:
            raise DataError(f"{path}, line {number}: the id {row[0]!r} occurs twice", "list every image once")
        predictions[row[0]] = row[1]
    return predictions


def compare_predictions(path_a: Path, path_b: Path) -> dict[str, Any]:
    """Compare two prediction files of the same images.

    Rows are matched by id, regardless of their order. Returns `a`, `b`, `total`, `differ` (the number of differing
    labels), `share` (the fraction of `total`) and `pairs`, the differing pairs of labels with their counts in
    decreasing order.
    Raises `DataError` if a file is invalid, the ids differ, or only one of the files uses class names.
    """
    a, b = read_predictions(path_a), read_predictions(path_b)
    if a.keys() != b.keys():
        only = f"{len(a.keys() - b.keys()):,} ids only in {path_a}, {len(b.keys() - a.keys()):,} only in {path_b}"
        raise DataError(f"the files predict different images: {only}", "compare predictions for the same input")
    a_is_numeric, b_is_numeric = (all(label.isdecimal() for label in labels.values()) for labels in (a, b))
    if a_is_numeric != b_is_numeric:
        problem = f"one of {path_a} and {path_b} contains class names and the other class indices"
        raise DataError(problem, "write both with --names")
    pairs = Counter((a[key], b[key]) for key in a if a[key] != b[key])
    differ = pairs.total()
    return {
        "a": str(path_a),
        "b": str(path_b),
        "total": len(a),
        "differ": differ,
        "share": differ / len(a),
        "pairs": [{"a": label_a, "b": label_b, "count": count} for (label_a, label_b), count in pairs.most_common()],
    }
