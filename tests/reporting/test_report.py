"""The report command and its plots, and reports of many runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest

from fastcifar import plotting
from fastcifar.errors import UsageError
from fastcifar.plotting import LineSeries
from fastcifar.reporting.report import build_report
from fastcifar.reporting.runs import select_for_removal
from tests.faults.children import run_fastcifar
from tests.reporting.run_folders import write_run


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three seeds of one recipe, one run with another learning rate, and an unfinished run of the first recipe."""
    paths = [write_run(tmp_path / f"s{seed}", (0.5, 0.7), 0.9, seed=seed, epochs=4) for seed in range(3)]
    paths.append(write_run(tmp_path / "low", (0.1, 0.2), 0.3, epochs=4, lr=0.01))
    return [*paths, write_run(tmp_path / "killed", (0.1,), seed=3, epochs=4, finished=False)]


@pytest.mark.medium
def test_report_command_prints_a_document_or_an_error(tmp_path: Path, folders: list[Path]) -> None:
    (folders[1] / "summary.json").write_text("{")
    process = run_fastcifar("report", *(folder.name for folder in folders), "--json", "--sort", "n", cwd=tmp_path)
    assert (process.returncode, process.stdout.count("\n")) == (0, 1), process.stderr
    document = json.loads(process.stdout)
    assert [(row["name"], row["n"]) for row in document["rows"]] == [("lr=0.1", 2), ("low", 1)]
    assert {run["state"] for run in document["rows"][0]["runs"]} == {"done", "damaged", "unfinished"}
    for arguments, code, words in (
        (("s1",), 4, "nothing to report: s1: summary.json: Invalid JSON"),
        (("s0", "--format", "markdwon"), 2, "did you mean 'markdown'?"),
    ):
        process = run_fastcifar("report", *arguments, cwd=tmp_path)
        assert (process.returncode, process.stdout, process.stderr.count("\n")) == (code, "", 1), process.stderr
        assert words in process.stderr


@pytest.mark.medium
def test_fault46_reports_of_many_runs_take_little_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls grow with the number of runs, charts show 20 rows, and neither torch nor matplotlib is imported."""
    for index in range(40):
        write_run(tmp_path / "runs" / f"run{index}", (0.5, 0.6), lr=0.01 * (1 + index))

    def count_calls(num_runs: int) -> int:
        calls = 0

        def count(_frame: Any, event: str, _argument: Any) -> None:
            nonlocal calls
            calls += event == "call"

        folders = sorted((tmp_path / "runs").iterdir())[:num_runs]
        sys.setprofile(count)
        try:
            build_report(folders, "latex")
            select_for_removal(folders, keep_best=num_runs // 2)
        finally:
            sys.setprofile(None)
        return calls

    count_calls(2)  # imports and caches
    assert count_calls(40) < 2.1 * count_calls(20)

    drawn: dict[str, int] = {}
    monkeypatch.setattr(plotting, "plot_line_chart", lambda path, *_: drawn.update({path.name: len(_[-1])}))
    monkeypatch.setattr(plotting, "plot_fraction_heatmap", lambda path, *_: drawn.update({path.name: len(_[-1])}))
    build_report([tmp_path / "runs"], plots=tmp_path / "plots")
    assert drawn == {"accuracy.png": 40, "loss.png": 40, "throughput.png": 20, "classes.png": 20}  # two lines for a row

    for command in (["report", "runs"], ["runs", "ls"]):
        code = f"import sys; sys.argv = ['fastcifar', *{command}]\nfrom fastcifar.cli.app import main\n"
        code += "try:\n    main()\nfinally:\n    assert not {'torch', 'matplotlib'} & {*sys.modules}"
        process = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert process.returncode == 0, process.stderr
        assert "run39" in process.stdout


@pytest.mark.parametrize("name", ["a" * 200, "$x_1$ " * 30, "two words"])
def test_legend_has_one_short_line_for_each_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    figures: list[Any] = []

    def savefig(figure: Any, *_: Any, **__: Any) -> None:
        figure.draw_without_rendering()  # applies the layout
        figures.append(figure)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    lines = [LineSeries(label, "", "#000000", False, [1, 2], [0.1, 0.2], None, None) for label in (name, "other")]
    plotting.plot_line_chart(tmp_path / "chart.png", "title", "", lines)
    texts = figures[0].legends[0].get_texts()
    assert all("\n" not in text.get_text() and len(text.get_text().replace("\\", "")) <= 40 for text in texts)
    width = figures[0].axes[0].get_window_extent().width / figures[0].bbox.width
    assert width > 0.5  # the legend leaves half of the width to the chart


@pytest.mark.medium
def test_plots_and_json_document(tmp_path: Path, folders: list[Path]) -> None:
    document, _ = build_report(folders, "csv", plots=tmp_path / "plots")
    names = ("accuracy.png", "loss.png", "throughput.png", "classes.png")
    assert document["written"] == [str(tmp_path / "plots" / name) for name in names]
    assert all(Path(file).read_bytes().startswith(b"\x89PNG") for file in document["written"])
    assert [run["seed"] for run in json.loads(json.dumps(document))["rows"][0]["runs"]] == [0, 1, 2, 3]
    with pytest.raises(UsageError, match="--html FILE or --plots DIR"):
        build_report(folders, num_misclassified=3)
    with pytest.raises(UsageError, match="--precision applies only to the evaluation for --mistakes; add"):
        build_report(folders, precision="fp32")
