"""The document of `bench --json`: its types, its tables and chart, and the comparison of two documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)
from rich.console import Group
from rich.table import Table

from fastcifar.format import format_decimal, format_option_value, format_percent, format_short_number
from fastcifar.plotting import BarPanel

# The settings that a table shows besides `what`, in order; `mode` combines `compiled` and `cuda_graph`.
SETTING_NAMES = (
    "arch", "batch_size", "mode", "precision", "loader", "workers", "augment", "data", "conv", "direction",
    "steps_per_replay",
)  # fmt: skip
SETTING_FORMATS: dict[str, Callable[[Any], str]] = {
    "batch_size": lambda size: f"batch {size}",
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
    """The settings of a benchmark. A setting that it does not depend on is None.

    Args:
        what: key of `BENCHMARKS`.
        conv: input shape, output shape and kernel size of a convolution.
        calls: number of times that the network runs this convolution.
        direction: "forward" or "forward_backward".
    """

    what: str
    arch: str | None = None
    loader: str | None = None
    augment: str | None = None
    batch_size: int | None = None
    workers: int | None = None
    precision: str | None = None
    compiled: bool | None = None
    cuda_graph: bool | None = None
    data: str | None = None
    conv: str | None = None
    calls: int | None = None
    direction: str | None = None
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
        values = {name: getattr(self, name) for name in SETTING_NAMES}
        return {
            name: SETTING_FORMATS.get(name, format_option_value)(value)
            for name, value in values.items()
            if value is not None
        }

    def describe(self) -> str:
        """Return the settings on one line: `step, se68, batch 128, compiled, bf16`."""
        return ", ".join([self.what, *self.setting_texts().values()])


class BenchRow(BenchSettings):
    """The result of a benchmark with certain settings. A value that was not measured is None.

    Args:
        images_per_s: the median of `trials`.
        cpu_us_per_image: CPU time per image of all threads and worker processes, in microseconds.
        trials: images per second of each trial.
        flop_per_image: floating-point operations per image.
        mfu: model FLOP utilization: `tflop_per_s` relative to the rate of a matrix product.
        mbu: memory bandwidth utilization: `gb_per_s` relative to the rate of a copy in device memory.
        setup_s: seconds to build the trainer.
        compile_s: seconds to compile and warm up.
        power_w: power in watts.
        temperature_c: temperature in degrees Celsius.
    """

    images_per_s: float
    cpu_us_per_image: float
    trials: list[float] = Field(min_length=1)
    latency_ms: float | None = None
    flop_per_image: float | None = None
    tflop_per_s: float | None = None
    mfu: float | None = None
    bytes_per_image: float | None = None
    gb_per_s: float | None = None
    mbu: float | None = None
    peak_memory_bytes: int | None = None
    setup_s: float | None = None
    compile_s: float | None = None
    clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None


class DeviceLimits(_Document):
    """Measured limits of a device in one precision."""

    matmul_tflop_per_s: float
    copy_gb_per_s: float


class BenchDocument(_Document):
    """The result of `bench`. `limits`: precision -> limits of the device."""

    schema_version: Literal[1] = 1
    device: str
    versions: dict[str, str] = {}
    limits: dict[str, DeviceLimits] | None = None
    results: list[BenchRow] = Field(min_length=1)

    @classmethod
    def read(cls, path: Path) -> BenchDocument | None:
        """Return the document in a file, which is its whole content or its last line; None for any other file."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None
        for candidate in (text, (text.strip().splitlines() or [""])[-1]):
            try:
                return cls.model_validate_json(candidate)
            except ValidationError:
                continue
        return None


def label_rows(rows: Sequence[BenchRow]) -> tuple[list[str], list[str]]:
    """Return a label for each row, and the settings that all rows share.

    A label lists the settings in which the row differs from other rows with the same `what`.
    """
    texts_of_rows = [row.setting_texts() for row in rows]
    labels = []
    for row, texts in zip(rows, texts_of_rows, strict=True):
        alike = [other for other, other_row in zip(texts_of_rows, rows, strict=True) if other_row.what == row.what]
        labels.append(
            ", ".join(text for name, text in texts.items() if any(other.get(name) != text for other in alike))
        )
    values = [{texts[name] for texts in texts_of_rows if name in texts} for name in SETTING_NAMES]
    return labels, [value for unique in values if len(unique) == 1 for value in unique]


def bench_table(document: BenchDocument) -> Group:
    """Return the table of a document: images/s, the range of the trials, and the utilization of the device."""
    labels, shared = label_rows(document.results)
    table = Table("what", box=None, title_justify="left")
    for heading in ("images/s", "lowest", "highest", "CPU us/image", "ms", "TFLOP/s", "of peak", "GB/s", "of copy"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row, label in zip(document.results, labels, strict=True):
        table.add_row(
            " ".join(filter(None, (row.what, label))),
            *map(format_short_number, (row.images_per_s, min(row.trials), max(row.trials))),
            format_decimal(row.cpu_us_per_image, 1),
            *map(format_short_number, (row.latency_ms, row.tflop_per_s)),
            format_percent(row.mfu, 0),
            format_short_number(row.gb_per_s),
            format_percent(row.mbu, 0),
        )
    return Group(*describe_setup(document, shared), "", table)


def describe_setup(document: BenchDocument, shared: Sequence[str]) -> list[str]:
    """Return lines on what all rows share: device, settings, peak throughput, number of trials, longest setup time."""
    rows = document.results
    setup_times = {"setup_s": [row.setup_s for row in rows], "compile_s": [row.compile_s for row in rows]}
    measured = {name: [value for value in values if value is not None] for name, values in setup_times.items()}
    seconds = ", ".join(f"{name} {max(values):.1f}" for name, values in measured.items() if values)
    peaks = (
        f"{precision}: matrix product {format_short_number(peak.matmul_tflop_per_s)} TFLOP/s, "
        f"copy {format_short_number(peak.copy_gb_per_s)} GB/s"
        for precision, peak in (document.limits or {}).items()
    )
    settings = ", ".join((document.device, *shared))
    return [settings, *peaks, f"median of {len(rows[0].trials)} trials; longest {seconds}"]


def bench_panels(document: BenchDocument) -> tuple[str, list[BarPanel]]:
    """Return the chart title and a panel for each `what` with a bar for each row: images/s, for `conv` TFLOP/s."""
    labels, shared = label_rows(document.results)
    panels = []
    for what in dict.fromkeys(row.what for row in document.results):
        is_conv = what == "conv"
        rows = [row for row in document.results if row.what == what]
        scales = [(row.flop_per_image or 0) / 1e12 if is_conv else 1.0 for row in rows]
        panel_labels = [label for row, label in zip(document.results, labels, strict=True) if row.what == what]
        panels.append(
            BarPanel(
                title=f"{what}: {'TFLOP/s' if is_conv else 'images/s'}",
                groups=[(row.direction if is_conv else row.mode) or "" for row in rows],
                labels=[label or row.arch or row.loader or "" for row, label in zip(rows, panel_labels, strict=True)],
                medians=[row.images_per_s * scale for row, scale in zip(rows, scales, strict=True)],
                trials=[[speed * scale for speed in row.trials] for row, scale in zip(rows, scales, strict=True)],
                notes=[_bar_note(row) for row in rows],
            )
        )
    return "\n".join(describe_setup(document, shared)), panels


def _bar_note(row: BenchRow) -> str:
    latency = "" if row.latency_ms is None else f"{row.latency_ms:.2f} ms"
    utilization = "" if row.mfu is None else f"{format_percent(row.mfu, 0)} of peak"
    return ", ".join(filter(None, (latency, utilization)))


class ComparedRow(BenchSettings):
    """A row of two documents: medians and trials in images/s.

    Args:
        ratio: `b` / `a`.
        overlap: whether the ranges of the trials overlap; if they do, the trials do not show a difference.
    """

    a: float
    b: float
    ratio: float
    overlap: bool
    a_trials: list[float]
    b_trials: list[float]


class BenchComparison(_Document):
    """A comparison of two documents: rows of both and of only one, and the differing device and versions."""

    rows: list[ComparedRow]
    only_a: list[BenchSettings]
    only_b: list[BenchSettings]
    differ: dict[str, tuple[str | None, str | None]]


def compare_benchmarks(a: BenchDocument, b: BenchDocument) -> BenchComparison:
    """Compare the rows of two documents that have equal settings; the path of the data set may differ."""
    rows_a, rows_b = ({_comparison_key(row): row for row in document.results} for document in (a, b))
    rows = []
    for key, row_a in rows_a.items():
        if row_b := rows_b.get(key):
            trials_a, trials_b = row_a.trials, row_b.trials
            rows.append(
                ComparedRow(
                    **dict(key),
                    a=row_a.images_per_s,
                    b=row_b.images_per_s,
                    ratio=row_b.images_per_s / row_a.images_per_s,
                    overlap=min(trials_a) <= max(trials_b) and min(trials_b) <= max(trials_a),
                    a_trials=trials_a,
                    b_trials=trials_b,
                )
            )
    setup_a, setup_b = ({"device": document.device, **document.versions} for document in (a, b))
    return BenchComparison(
        rows=rows,
        only_a=[key for key in rows_a if key not in rows_b],
        only_b=[key for key in rows_b if key not in rows_a],
        differ={
            name: (setup_a.get(name), setup_b.get(name))
            for name in setup_a | setup_b
            if setup_a.get(name) != setup_b.get(name)
        },
    )


def _comparison_key(row: BenchRow) -> BenchSettings:
    return row.settings.model_copy(update={"data": None, "calls": None})


def benchmark_comparison_table(comparison: BenchComparison) -> Group:
    """Return the table of a comparison.

    The lines above it list differences in device and versions, those below it the rows of only one document.
    """
    table = Table("what", box=None, title_justify="left")
    for heading in ("A", "B", "B / A", "trials"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in comparison.rows:
        verdict = "overlap" if row.overlap else "B is faster" if row.ratio > 1 else "B is slower"
        speeds = map(format_short_number, (row.a, row.b))
        table.add_row(row.describe(), *speeds, f"{row.ratio:.3f}", verdict)
    differences = [
        "{}: {} in A, {} in B".format(name, *map(format_option_value, values))
        for name, values in comparison.differ.items()
    ]
    unpaired = [f"only in A: {settings.describe()}" for settings in comparison.only_a]
    unpaired += [f"only in B: {settings.describe()}" for settings in comparison.only_b]
    return Group(*differences, "median images/s", table, *unpaired)
