"""The document of `bench --json`: its types, its tables and chart, and the comparison of two documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer
from rich.console import Group

from fastcifar.files import read_regular_file
from fastcifar.format import NumericTable, format_decimal, format_option_value, format_percent, format_short_number
from fastcifar.plotting import BarPanel

# The settings that a table shows besides `what`, in order; `mode` combines `compiled` and `cuda_graph`.
SETTING_NAMES = (
    "arch", "batch_size", "mode", "precision", "winograd", "loader", "workers", "augment", "data", "conv", "direction",
    "steps_per_replay",
)  # fmt: skip
# fields of an `Environment` that affect timing
MACHINE_FIELDS = ("device", "cpu_family", "cpu_model", "threads")
SETTING_FORMATS: dict[str, Callable[[Any], str]] = {
    "batch_size": lambda size: f"batch {size}",
    "winograd": lambda _: "Winograd",
    "direction": lambda direction: direction.replace("_", " + "),
    "steps_per_replay": lambda steps: f"{steps} steps per replay",
}


class _Document(BaseModel):
    """A document that is written without the values that are None."""

    model_config = ConfigDict(frozen=True)

    @model_serializer(mode="wrap")
    def _without_none(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in serialize(self).items() if value is not None}


class BenchSettings(_Document):
    """The settings of a benchmark. A setting that it does not depend on is None."""

    what: str  # key of `BENCHMARKS`
    arch: str | None = None
    loader: str | None = None
    augment: str | None = None
    batch_size: int | None = None
    workers: int | None = None
    precision: str | None = None
    compiled: bool | None = None
    cuda_graph: bool | None = None
    winograd: bool | None = None  # True or None
    data: str | None = None
    conv: str | None = None  # input shape, output shape and kernel size of a convolution
    calls: int | None = None  # number of times that the network runs this convolution
    direction: str | None = None  # "forward" or "forward_backward"
    steps_per_replay: int | None = None

    @property
    def mode(self) -> str | None:
        """The execution mode: "eager", "compiled" or "captured" (compiled, in a CUDA graph)."""
        if self.compiled is None:
            return None
        return "captured" if self.cuda_graph else "compiled" if self.compiled else "eager"

    @property
    def settings(self) -> BenchSettings:
        """The settings alone."""
        return BenchSettings(**{name: getattr(self, name) for name in BenchSettings.model_fields})

    def setting_texts(self) -> dict[str, str]:
        """Return the settings in `SETTING_NAMES` that are not None, as text."""
        values = {name: value for name in SETTING_NAMES if (value := getattr(self, name)) is not None}
        return {name: SETTING_FORMATS.get(name, format_option_value)(value) for name, value in values.items()}

    def describe(self) -> str:
        """Return the settings on one line: `step, se68, batch 128, compiled, bf16`."""
        return ", ".join([self.what, *self.setting_texts().values()])


class BenchRow(BenchSettings):
    """The result of a benchmark with certain settings. A value that was not measured is None."""

    images_per_s: float  # the median of `trials`
    cpu_us_per_image: float  # CPU time of all threads and worker processes, in microseconds
    trials: list[float] = Field(min_length=1)  # images per second
    latency_ms: float | None = None
    flop_per_image: float | None = None  # floating-point operations
    tflop_per_s: float | None = None
    mfu: float | None = None  # model FLOP utilization: `tflop_per_s` relative to the rate of a matrix product
    bytes_per_image: float | None = None
    gb_per_s: float | None = None
    mbu: float | None = None  # memory bandwidth utilization: `gb_per_s` relative to the rate of a memory copy
    peak_memory_bytes: int | None = None
    setup_s: float | None = None  # seconds to build the trainer
    compile_s: float | None = None  # seconds to compile and warm up
    clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None  # degrees Celsius


class DeviceLimits(_Document):
    """Measured limits of a device in one precision, and the published rate of matrix products if it is known."""

    matmul_tflop_per_s: float
    copy_gb_per_s: float
    published_tflop_per_s: float | None = None


class BenchDocument(_Document):
    """The result of `bench`. `limits`: precision -> limits of the device; see `Environment` for what both have.

    Documents of earlier versions do not have the fields of the CPU.
    """

    schema_version: Literal[1] = 1
    device: str
    cpu_family: int | None = None
    cpu_model: int | None = None
    threads: int | None = None
    matmul_tflop_per_s: dict[str, float] | None = None
    versions: dict[str, str] = {}
    limits: dict[str, DeviceLimits] | None = None
    results: list[BenchRow] = Field(min_length=1)

    @classmethod
    def read(cls, path: Path) -> BenchDocument | None:
        """Return the document in a file, which is its whole content or its last line; None for any other file."""
        try:
            text = read_regular_file(path).decode()
        except (OSError, UnicodeDecodeError):
            return None
        for candidate in (text, (text.strip().splitlines() or [""])[-1]):
            try:
                return cls.model_validate_json(candidate)
            except ValidationError:
                continue
        return None


def label_rows(rows: Sequence[BenchSettings]) -> tuple[list[str], list[str]]:
    """Return a label for each row, and the settings that all rows share.

    A label lists the settings in which the row differs from other rows with the same `what`.
    """
    texts_of_rows = [row.setting_texts() for row in rows]
    labels = []
    for row, texts in zip(rows, texts_of_rows, strict=True):
        alike = [other for other, other_row in zip(texts_of_rows, rows, strict=True) if other_row.what == row.what]
        differing = [text for name, text in texts.items() if any(other.get(name) != text for other in alike)]
        labels.append(", ".join(differing))
    values = [{texts[name] for texts in texts_of_rows if name in texts} for name in SETTING_NAMES]
    return labels, [value for unique in values if len(unique) == 1 for value in unique]


def bench_table(document: BenchDocument) -> Group:
    """Return the table of a document: images/s, the range of the trials, and the utilization of the device."""
    labels, shared = label_rows(document.results)
    headings = ("images/s", "range", "ms", "TFLOP/s", "of peak", "GB/s", "of copy", "CPU us/image")
    table = NumericTable(["what"], headings, num_required=1)
    for row, label in zip(document.results, labels, strict=True):
        table.add_row(
            " ".join(filter(None, (row.what, label))),
            format_short_number(row.images_per_s),
            "-".join(map(format_short_number, (min(row.trials), max(row.trials)))),
            *map(format_short_number, (row.latency_ms, row.tflop_per_s)),
            format_percent(row.mfu, 0),
            format_short_number(row.gb_per_s),
            format_percent(row.mbu, 0),
            format_decimal(row.cpu_us_per_image, 1),
        )
    return Group(*describe_setup(document, shared), "", table)


def describe_setup(document: BenchDocument, shared: Sequence[str]) -> list[str]:
    """Return lines on what all rows share: device, settings, peak throughput, number of trials, longest setup time."""
    rows = document.results
    setup_times = {"setup_s": [row.setup_s for row in rows], "compile_s": [row.compile_s for row in rows]}
    longest = {name: max(filter(None, values), default=None) for name, values in setup_times.items()}
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in longest.items() if value is not None)
    peaks = (
        f"{precision}: matrix product {format_short_number(peak.matmul_tflop_per_s)} TFLOP/s, "
        f"copy {format_short_number(peak.copy_gb_per_s)} GB/s"
        for precision, peak in (document.limits or {}).items()
    )
    settings = ", ".join((document.device, *shared))
    return [settings, *peaks, f"median of {len(rows[0].trials)} trials; longest {seconds}"]


def bench_panels(document: BenchDocument) -> tuple[str, list[BarPanel]]:
    """Return the chart title and a panel for each `what`, with a bar for each row in images/s (`conv`: TFLOP/s)."""
    labels, shared = label_rows(document.results)
    panels: dict[str, BarPanel] = {}
    for row, label in zip(document.results, labels, strict=True):
        is_conv = row.what == "conv"
        scale = (row.flop_per_image or 0) / 1e12 if is_conv else 1.0
        title = f"{row.what}: {'TFLOP/s' if is_conv else 'images/s'}"
        panel = panels.setdefault(row.what, BarPanel(title, groups=[], labels=[], medians=[], trials=[], notes=[]))
        panel.groups.append((row.direction if is_conv else row.mode) or "")
        panel.labels.append(label or row.arch or row.loader or "")
        panel.medians.append(row.images_per_s * scale)
        panel.trials.append([speed * scale for speed in row.trials])
        latency = "" if row.latency_ms is None else f"{row.latency_ms:.2f} ms"
        utilization = "" if row.mfu is None else f"{format_percent(row.mfu, 0)} of peak"
        panel.notes.append(", ".join(filter(None, (latency, utilization))))
    return "\n".join(describe_setup(document, shared)), list(panels.values())


class ComparedRow(BenchSettings):
    """A row of two documents: medians and trials in images/s."""

    a: float
    b: float
    ratio: float  # b / a
    overlap: bool  # whether the ranges of the trials overlap; the difference may then be noise
    a_trials: list[float]
    b_trials: list[float]


class BenchComparison(_Document):
    """The rows in both documents and those in only one of them, and the device and versions if they differ."""

    rows: list[ComparedRow]
    only_a: list[BenchSettings]
    only_b: list[BenchSettings]
    differ: dict[str, tuple[str | int | None, str | int | None]]


def compare_benchmarks(a: BenchDocument, b: BenchDocument) -> BenchComparison:
    """Compare the rows of two documents that have equal settings; the path of the data set may differ."""
    rows_a, rows_b = (
        {row.settings.model_copy(update={"data": None, "calls": None}): row for row in document.results}
        for document in (a, b)
    )
    rows = [
        ComparedRow(
            **dict(key),
            a=row_a.images_per_s,
            b=row_b.images_per_s,
            ratio=row_b.images_per_s / row_a.images_per_s,
            overlap=min(row_a.trials) <= max(row_b.trials) and min(row_b.trials) <= max(row_a.trials),
            a_trials=row_a.trials,
            b_trials=row_b.trials,
        )
        for key, row_a in rows_a.items()
        if (row_b := rows_b.get(key))
    ]
    machines = {name: (getattr(a, name), getattr(b, name)) for name in MACHINE_FIELDS}
    setups = {name: values for name, values in machines.items() if None not in values}  # unknown is no difference
    setups |= {name: (a.versions.get(name), b.versions.get(name)) for name in a.versions | b.versions}
    return BenchComparison(
        rows=rows,
        only_a=[key for key in rows_a if key not in rows_b],
        only_b=[key for key in rows_b if key not in rows_a],
        differ={name: (value_a, value_b) for name, (value_a, value_b) in setups.items() if value_a != value_b},
    )


def benchmark_comparison_table(comparison: BenchComparison) -> Group:
    """Return the table of a comparison, differences in device and versions, and the rows of only one document."""
    table = NumericTable(["what"], ("A", "B", "B / A", "trials"))
    labels, shared = label_rows(comparison.rows)
    for row, label in zip(comparison.rows, labels, strict=True):
        verdict = "overlap" if row.overlap else "B is faster" if row.ratio > 1 else "B is slower"
        speeds = map(format_short_number, (row.a, row.b))
        table.add_row(" ".join(filter(None, (row.what, label))), *speeds, f"{row.ratio:.3f}", verdict)
    differences = [
        "{}: {} in A, {} in B".format(name, *map(format_option_value, values))
        for name, values in comparison.differ.items()
    ]
    unpaired = [f"only in A: {settings.describe()}" for settings in comparison.only_a]
    unpaired += [f"only in B: {settings.describe()}" for settings in comparison.only_b]
    title = ", ".join(["median images/s", *shared])
    return Group(*differences, title, "", table, *unpaired)
