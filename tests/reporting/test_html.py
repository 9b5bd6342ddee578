"""The HTML report checked by an HTML parser, the schema of plotly and a browser."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastcifar.errors import DiskError, NonFiniteError, UsageError
from fastcifar.evaluation.load_run import load_model
from fastcifar.recipe import Recipe
from fastcifar.reporting.aggregate import group_runs
from fastcifar.reporting.misclassified import find_misclassified
from fastcifar.reporting.records import read_records
from fastcifar.reporting.report import MAX_PLOTTED_ROWS, build_report
from fastcifar.reporting.table import build_report_table
from fastcifar.training.train import train
from tests.reporting.run_folders import write_run, write_trials

INJECTION = "</script><script>window.injected = 1</script><img src=x onerror='window.injected = 1'>"
VOID_TAGS = {"meta", "img", "br", "link", "input"}
CHROMIUM_ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
           "--disable-component-update", "--disable-sync"]  # fmt: skip
URL_ATTRIBUTES = ("src", "href", "srcset", "data", "action", "poster", "background", "xlink:href")

pytestmark = pytest.mark.filterwarnings("ignore:.*invalid lines skipped")


class Page(HTMLParser):
    """Parses a page, checks that its tags are balanced, and collects attributes, table cells, scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.code: list[str] = []
        self._table: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag == "table":
            self._table = self.tables[str(dict(attrs)["id"])] = []
        elif tag == "tr":
            self._table.append([])
        elif tag in ("th", "td"):
            self._table[-1].append("")
        elif tag in ("script", "style"):
            self.code.append("")
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.code[-1] += data
        elif {"td", "th"} & set(self.open):
            self._table[-1][-1] += data


@pytest.fixture
def plotly() -> Any:
    return pytest.importorskip("plotly", reason="plotly is not installed")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep with two labels of two seeds and a failed trial; one label and the failure reason contain HTML code."""
    folder, trials = tmp_path / "sweep", []
    for label, lr in (("plain", 0.1), (INJECTION, 0.2)):
        for seed in (0, 1):
            name = f"{lr}-{seed}"
            write_run(folder / "runs" / name, (0.4, 0.9 - lr, 0.5 + seed / 10), 0.7 + lr + seed / 20, seed=seed, lr=lr)
            trials.append({"trial": name, "label": label, "seed": seed, "state": "done"})
    trials.append({"trial": "x", "label": "plain", "seed": 2, "state": "failed", "reason": INJECTION})
    return write_trials(folder, trials)


@pytest.mark.medium
def test_page_is_complete_escaped_and_self_contained(tmp_path: Path, sweep: Path, plotly: Any) -> None:
    path = tmp_path / "page.html"
    document, _ = build_report([sweep], html=path)
    assert document["written"] == [str(path)]
    text = path.read_text(encoding="utf-8")
    assert len(text) < 6e6
    page = Page(text)
    table = build_report_table(group_runs(read_records([sweep])))
    headings = ["name", "accuracy %", "n", "lr", "time", "notes"]
    expected = [headings, *(list(row.values()) for row in table.display_rows())]
    assert json.dumps(page.tables["results"]).replace(", ", ",") == json.dumps(expected).replace(", ", ",")
    assert page.tables["excluded"][1][3] == INJECTION
    assert page.tables["classes"] == [
        ["name", "cat", "dog"], ["plain", "82.5", "82.5"], [INJECTION, "92.5", "92.5"]
    ]  # fmt: skip
    assert page.tables["environments"][1] == ["a device", "torch 2.11.0, fastcifar 0.1", "4"]

    assert "<script>window.injected" not in text
    assert not [name for name, _ in page.attributes if name in URL_ATTRIBUTES or name.startswith("on")]
    (policy,) = re.findall('<meta http-equiv="Content-Security-Policy" content="(.*)">', text)
    assert policy.startswith("default-src 'none'; script-src 'unsafe-inline';")
    own_code = [code for code in page.code if len(code) < 1e6]  # all but plotly.js
    assert len(own_code) == len(page.code) - 1 == 3
    for code in own_code:
        assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttpRequest|import\(|WebSocket", code)

    figures = json.loads(page.code[2])
    assert list(figures) == ["accuracy", "loss", "throughput"]
    for figure in figures.values():
        plotly.graph_objects.Figure(figure)  # raises for properties that plotly.js would ignore
    lines = [trace for trace in figures["accuracy"]["data"] if trace["mode"] == "lines" and "fill" not in trace]
    assert lines[0]["x"] == [1, 2, 3]
    assert lines[0]["y"] == pytest.approx([40, 80, 55])
    (best,) = (trace for trace in figures["loss"]["data"] if trace["mode"] == "markers" and trace["name"] == "plain")
    assert best["x"] == [2]
    assert not any("<" in trace["name"] for trace in figures["accuracy"]["data"])


def test_page_of_many_classes_and_long_names_is_narrow(tmp_path: Path, plotly: Any) -> None:
    """Of 100 classes, the page names the lowest ones; options that differ share a column; legends are short."""
    for index in range(25):
        options: dict[str, Any] = {"epochs": 1 + index, "lr": 0.1 + index, "weight_decay": index / 1e4}
        options |= {"width": 1 + index / 2, "label_smoothing": index / 100}
        folder = write_run(tmp_path / "runs" / f"{index}-{'x' * 100}", (0.5,), **options)
        summary = json.loads((folder / "summary.json").read_text())
        summary["per_class"] = {f"class {number}": number / 100 for number in range(100)}
        (folder / "summary.json").write_text(json.dumps(summary))
    build_report([tmp_path / "runs"], html=tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.tables["results"][0] == ["name", "accuracy %", "n", "time", "options"]
    assert page.tables["results"][1][-1] == "epochs=1; lr=0.1; weight_decay=0; width=1; label_smoothing=0"
    assert page.tables["classes"][0] == ["name", "classes with the lowest accuracies"]
    assert page.tables["classes"][1][1].startswith("class 0 0.0, class 1 1.0, class 2 2.0")
    traces = json.loads(page.code[2])["accuracy"]["data"]
    assert max(len(trace["name"]) for trace in traces) == 40
    assert len({trace["legendgroup"] for trace in traces}) == MAX_PLOTTED_ROWS == 20


@pytest.mark.medium
def test_misclassified_images_agree_with_the_summaries(
    tmp_path: Path, tiny: Callable[..., Recipe], plotly: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    summaries = [train(tiny(seed=seed, out=str(tmp_path / f"s{seed}"))) for seed in (0, 1)]
    folders = [Path(summary.run) for summary in summaries]
    (group,) = group_runs(read_records(folders))
    misclassified = find_misclassified(group, 4)
    assert misclassified.num_models == 2
    assert misclassified.confusion_matrix.sum() == summaries[0].total
    assert misclassified.confusion_matrix.trace() == np.mean([summary.correct or 0 for summary in summaries])
    assert all(misclassified.predictions != misclassified.labels)
    assert list(misclassified.confidences) == sorted(misclassified.confidences, reverse=True)

    document, _ = build_report(folders, html=tmp_path / "a.html", plots=tmp_path / "plots", num_misclassified=4)
    names = {Path(file).name for file in document["written"]}
    assert {"confusion-1-resnet.png", "mistakes-1-resnet.png"} <= names
    page = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    loaded = [str(value) for name, value in page.attributes if name in URL_ATTRIBUTES]
    assert [uri[:22] for uri in loaded] == ["data:image/png;base64,"] * len(misclassified.images)
    figures = json.loads(page.code[2])
    plotly.graph_objects.Figure(figures["confusion-0"])

    labels = load_model(str(folders[0])).load_dataset().test.labels
    (wrong,) = labels.nonzero()
    logits = torch.zeros(len(labels), len(misclassified.classes))
    logits[:, 0], logits[wrong[3], 0] = 1, 5  # every image is predicted as class 0, one with more confidence
    monkeypatch.setattr("fastcifar.training.evaluate.predict_logits", lambda *_: logits)
    misclassified = find_misclassified(group, 3)
    assert misclassified.labels.tolist() == labels[wrong[[3, 0, 1]]].tolist()
    assert not misclassified.predictions.any()
    assert misclassified.confusion_matrix[:, 0].sum() == len(labels)
    logits[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=f"{folders[0]}.*NaN"):
        find_misclassified(group, 3)


def test_unwritable_page_is_refused(tmp_path: Path, sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"\.html"):
        build_report([sweep], html=tmp_path / "page.txt")
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(UsageError, match=r"install .\.\[html\]"):
        build_report([sweep], html=tmp_path / "page.html")
    monkeypatch.undo()
    pytest.importorskip("plotly", reason="plotly is not installed")
    with pytest.raises(DiskError, match="no folder"):
        build_report([sweep], html=tmp_path / "none" / "page.html")


def test_browser_sorts_tables_and_zooms_charts(tmp_path: Path, sweep: Path, plotly: Any) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("chromium is not installed")
    build_report([sweep], html=tmp_path / "page.html")
    requests, errors = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGS)
        page = browser.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((tmp_path / "page.html").as_uri())
        page.wait_for_selector("#accuracy .nsewdrag")
        first_cell = "document.querySelector('#results tbody td').textContent"
        assert page.evaluate(first_cell) == "plain"
        page.click("#results th:has-text('accuracy')")
        assert page.evaluate(first_cell) == "plain"
        page.click("#results th:has-text('accuracy')")
        assert page.evaluate(first_cell) == INJECTION.replace(",", ", ")
        assert page.get_attribute("#results th:has-text('accuracy')", "aria-sort") == "descending"

        axis_range = "document.getElementById('accuracy').layout.xaxis.range"
        before = page.evaluate(axis_range)
        page.locator("#accuracy").scroll_into_view_if_needed()
        box = page.locator("#accuracy .nsewdrag").first.bounding_box()
        assert box
        for fraction, action in ((0.3, page.mouse.down), (0.6, page.mouse.up)):
            page.mouse.move(box["x"] + fraction * box["width"], box["y"] + fraction * box["height"], steps=5)
            action()
        page.wait_for_function(f"JSON.stringify({axis_range}) !== '{json.dumps(before, separators=(',', ':'))}'")
        after = page.evaluate(axis_range)
        assert before[0] < after[0] < after[1] < before[1]
        assert page.evaluate("window.injected") is None
        browser.close()
    assert requests == [(tmp_path / "page.html").as_uri()]
    assert errors == []
