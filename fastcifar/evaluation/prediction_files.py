"""Write prediction files in CSV or JSON Lines format, and compare two CSV files."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from fastcifar.errors import DataError, DiskError, UsageError, disk_errors
from fastcifar.files import read_regular_file, write_atomically
from fastcifar.format import csv_cell

PredictionColumns = Mapping[str, Sequence[Any]]  # column name -> values; all columns have the same length

KAGGLE_HEADER = ("ID", "Labels")
PROBABILITY_DIGITS = 6


class PredictionComparison(TypedDict):
    """The comparison of two prediction files."""

    a: str
    b: str
    total: int
    differ: int
    share: float
    pairs: list[dict[str, Any]]  # the differing labels `a` and `b`, and the `count` of images, in decreasing order


def _to_csv(columns: PredictionColumns) -> str:
    text = io.StringIO()
    # with rows that end in "\n", the csv module does not quote a carriage return, which ends a row for its reader
    has_return = any("\r" in cell for values in columns.values() for cell in values if isinstance(cell, str))
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC if has_return else csv.QUOTE_MINIMAL)
    writer.writerow(map(csv_cell, columns))
    writer.writerows(map(csv_cell, row) for row in zip(*columns.values(), strict=True))
    return text.getvalue()


def _to_jsonl(columns: PredictionColumns) -> str:
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # JSON permits these characters in strings, but many readers end a line at them, `str.splitlines` too
    return re.sub("[\x85\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", text)


PREDICTION_SERIALIZERS: dict[str, Callable[[PredictionColumns], str]] = {".csv": _to_csv, ".jsonl": _to_jsonl}


@dataclass(frozen=True)
class PredictionFormat:
    """The columns of a prediction file."""

    header: str | None = None  # names of the first two columns, such as "id,label"; None: `KAGGLE_HEADER`
    use_class_names: bool = False  # instead of class indices
    top_k: int = 0  # add the columns top_1, top_1_probability, ... of the most probable classes
    with_probabilities: bool = False  # add a column of probabilities for every class
    is_calibrated: bool = False  # divide the logits by a temperature that is fitted on the validation split

    def check(self, out: Path, classes: Sequence[str]) -> None:
        """Raise `UsageError` or `DiskError` before prediction if `out` cannot be written with these columns."""
        suffix = out.suffix.lower()
        if suffix not in PREDICTION_SERIALIZERS:
            remedy = f"choose a file name that ends in one of {', '.join(PREDICTION_SERIALIZERS)}"
            raise UsageError(f"--out {out} has no known file suffix", remedy)
        if self.header is not None and suffix != ".csv":
            raise UsageError(f"--header applies only to .csv files, but --out is {out}", "omit --header")
        if self.is_calibrated and not (self.with_probabilities or self.top_k):
            problem = "--calibrated changes only probabilities, and the file would contain none"
            raise UsageError(problem, "add --probabilities or --top K, or omit --calibrated")
        if not out.parent.is_dir():
            raise DiskError(f"cannot write {out}: no folder {out.parent}", "choose an existing folder with --out")
        self.build_columns([], np.empty((0, len(classes))), classes)

    def build_columns(
        self, ids: Sequence[int] | Sequence[str], probabilities: np.ndarray, classes: Sequence[str]
    ) -> dict[str, Sequence[Any]]:
        """Return the columns for images with class probabilities [n, classes]."""
        names = KAGGLE_HEADER if self.header is None else next(csv.reader([self.header]), [])
        if len(names) != 2 or not all(names) or names[0] == names[1]:
            problem = f"--header {self.header!r} does not name two different columns"
            raise UsageError(problem, "write two names, such as id,label")
        if not 0 <= self.top_k <= len(classes):
            problem = f"--top {self.top_k} is out of range for {len(classes)} classes"
            raise UsageError(problem, f"choose 0 to {len(classes)}")
        ranking = np.argsort(-probabilities, axis=1, kind="stable")
        rounded = probabilities.round(PROBABILITY_DIGITS)

        def labels_at_rank(rank: int) -> list[Any]:
            labels = ranking[:, rank].tolist()
            return [classes[label] for label in labels] if self.use_class_names else labels

        columns: list[tuple[str, Sequence[Any]]] = [(names[0], ids), (names[1], labels_at_rank(0))]
        for rank in range(self.top_k):
            rank_probabilities = rounded[np.arange(len(rounded)), ranking[:, rank]].tolist()
            columns += [(f"top_{rank + 1}", labels_at_rank(rank)), (f"top_{rank + 1}_probability", rank_probabilities)]
        if self.with_probabilities:
            columns += [(name, rounded[:, label].tolist()) for label, name in enumerate(classes)]
        name, count = Counter(name for name, _ in columns).most_common(1)[0]
        if count > 1:
            remedy = "choose other column names with --header ID,LABEL"
            raise UsageError(f"{count} columns would be named {name!r}", remedy)
        return dict(columns)


KAGGLE_SUBMISSION = PredictionFormat()


def write_predictions(out: Path, columns: PredictionColumns) -> None:
    """Write a prediction file in the format of the suffix of `out`, atomically."""
    # names of files that are not UTF-8 contain characters that cannot be encoded
    content = PREDICTION_SERIALIZERS[out.suffix.lower()](columns).encode(errors="backslashreplace")
    with disk_errors(f"write {out} ({len(content):,} bytes)", "free some space, or choose another folder with --out"):
        write_atomically(out, content)


def read_predictions(path: Path) -> dict[str, str]:
    """Return the first two columns of a CSV file with a header as id -> label."""
    remedy = "give a CSV file with a header and rows of an id and a label, as `fastcifar predict` writes it"
    try:
        rows = list(csv.reader(io.StringIO(read_regular_file(path).decode("utf-8-sig"), newline="")))
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


def compare_predictions(path_a: Path, path_b: Path) -> PredictionComparison:
    """Compare the labels in two prediction files of the same images. Rows are matched by id, in any order."""
    a, b = read_predictions(path_a), read_predictions(path_b)
    if a.keys() != b.keys():
        only = f"{len(a.keys() - b.keys()):,} ids only in {path_a}, {len(b.keys() - a.keys()):,} only in {path_b}"
        raise DataError(f"the files predict different images: {only}", "compare predictions for the same input")
    if all(map(str.isdecimal, a.values())) != all(map(str.isdecimal, b.values())):
        problem = f"one of {path_a} and {path_b} contains class names and the other class indices"
        raise DataError(problem, "write both with --names")
    pairs = Counter((a[key], b[key]) for key in a if a[key] != b[key])
    return {
        "a": str(path_a),
        "b": str(path_b),
        "total": len(a),
        "differ": pairs.total(),
        "share": pairs.total() / len(a),
        "pairs": [{"a": label_a, "b": label_b, "count": count} for (label_a, label_b), count in pairs.most_common()],
    }
