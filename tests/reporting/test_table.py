"""The table of a report compared with NumPy, its formats parsed back, and damaged folders."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fastcifar.errors import CheckpointError, UsageError
from fastcifar.reporting.aggregate import MeanStd, group_runs, student_t_975
from fastcifar.reporting.records import read_records
from fastcifar.reporting.runs import list_runs
from fastcifar.reporting.table import TABLE_FORMATS, ReportTable, build_report_table
from fastcifar.sweep.trial_log import TrialLog
from tests.reporting.run_folders import write_run, write_trials
from tests.training.summaries import summary_document

ACCURACIES = {"val_acc": 0.5, "test_acc": 0.5}
SPECIAL_CHARACTERS = r"50% & $x_1^2$ #{a}\b | *c* <script>alert(1)</script> [d] ~e"


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three seeds of one recipe, one run with another learning rate, and an unfinished run of the first recipe."""
    accuracies = {0: (0.5, 0.75, 0.7), 1: (0.25, 0.5, 0.65, 0.9), 2: (0.375, 0.875, 0.75)}
    tests = {0: 0.9151, 1: 0.9204, 2: 0.9302}
    paths = [
        write_run(tmp_path / f"s{seed}", vals, tests[seed], seed=seed, epochs=4, seconds=100 + 10 * seed)
        for seed, vals in accuracies.items()
    ]
    paths.append(write_run(tmp_path / "low", (0.1, 0.2), 0.3, seed=0, epochs=4, lr=0.01, seconds=7300))
    paths.append(write_run(tmp_path / "killed", (0.1,), seed=3, epochs=4, finished=False))
    return paths


def test_mean_std_matches_numpy() -> None:
    values = [0.9151, 0.9204, 0.9302, 0.9177]
    statistics, std = MeanStd.from_values(values), np.std(values, ddof=1)
    assert statistics
    assert (statistics.mean, statistics.std, statistics.n) == (pytest.approx(np.mean(values)), pytest.approx(std), 4)
    assert statistics.standard_error == pytest.approx(std / 2)
    half_width = 3.182 * std / 2  # t distribution with 3 degrees of freedom
    assert statistics.ci95 == pytest.approx((np.mean(values) - half_width, np.mean(values) + half_width), abs=1e-5)
    assert MeanStd.from_values([0.5]) == MeanStd(mean=0.5, std=None, n=1)
    assert MeanStd(mean=0.5, std=None, n=1).standard_error is None
    assert MeanStd.from_values([]) is MeanStd.from_values([0.5, None]) is None


def test_two_values_have_a_range_and_no_standard_deviation() -> None:
    two = MeanStd.from_values([0.941, 0.939])
    assert two is not None
    assert (two.std, two.standard_error, two.ci95) == (None, None, None)
    assert two.format(scale=100) == "94.00 (93.90-94.10)"


@pytest.mark.parametrize(  # a table of the t distribution in a textbook, two-sided 95 %
    ("degrees", "quantile"),
    [(2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (7, 2.365), (9, 2.262), (15, 2.131), (29, 2.045), (120, 1.980)],
)
def test_quantiles_of_the_t_distribution(degrees: int, quantile: float) -> None:
    assert student_t_975(degrees) == pytest.approx(quantile, abs=1e-3)


def table_of(*paths: Path, sort: str | None = None, validation: bool = False) -> ReportTable:
    return build_report_table(group_runs(read_records(paths)), sort, validation)


def test_mean_and_std_of_finished_runs_match_numpy(folders: list[Path]) -> None:
    table = table_of(*folders, folders[0] / ".." / "s0", validation=True)
    first, low = (table.row_values(row) for row in table.rows)
    tests, vals, times = [0.9151, 0.9204, 0.9302], [0.7, 0.9, 0.75], [100, 110, 120]
    assert (first["accuracy"], first["std"]) == pytest.approx((np.mean(tests), np.std(tests, ddof=1)), rel=1e-12)
    assert (first["validation"], first["validation std"]) == pytest.approx((np.mean(vals), np.std(vals, ddof=1)))
    assert (first["n"], first["time"]) == (3, pytest.approx(np.mean(times)))
    assert (first["split"], first["weights"]) == ("test", "last")
    assert first["notes"] == "1 unfinished"
    assert (low["accuracy"], low["std"], low["n"], low["lr"]) == (0.3, None, 1, 0.01)
    assert (first["arch"], first["batch_size"], first["clip_grad"]) == ("se68", 128, "value:0.1")
    assert first["params"] == 4_697_742
    first_row = {"name": "lr=0.1", "accuracy": "92.19 ± 0.77", "n": "3", "validation": "78.33 ± 10.41"}
    assert table.display_rows() == [
        first_row | {"lr": "0.1", "time": "0:01:50", "notes": "1 unfinished"},
        {"name": "low", "accuracy": "30.00", "n": "1", "validation": "20.00"}
        | {"lr": "0.01", "time": "2:01:40", "notes": ""},
    ]
    assert "mean ± sample standard deviation over n runs" in table.caption()
    pair = [write_run(folders[0].parent / f"pair{seed}", (0.2,), 0.3, seed=seed, lr=0.3) for seed in range(2)]
    assert "mean ± sample standard deviation (n = 2: range) over n runs" in table_of(*folders, *pair).caption()
    constants = {"arch": "se68", "epochs": "4", "batch_size": "128", "params": "4,697,742", "split": "test"}
    assert table.constants.items() >= constants.items()
    assert [(run["seed"], run["state"]) for run in table.describe_excluded_runs()] == [("3", "unfinished")]
    assert "after 1 of 4 epochs" in table.describe_excluded_runs()[0]["reason"]


def test_curves_are_means_over_the_common_epochs(folders: list[Path]) -> None:
    (row,) = group_runs(read_records(folders[:3]))
    values = np.array([(0.5, 0.75, 0.7), (0.25, 0.5, 0.65), (0.375, 0.875, 0.75)])
    curve = row.curve("val_acc")
    assert curve is not None
    assert curve.epochs == [1, 2, 3]
    assert curve.mean == pytest.approx(values.mean(0))
    assert curve.std == pytest.approx(values.std(0, ddof=1))
    assert row.best_epoch == 1 + values.mean(0).argmax()
    assert row.curve("ema_val_acc") is None
    assert row.class_accuracies == pytest.approx(dict.fromkeys(("cat", "dog"), np.mean([0.9151, 0.9204, 0.9302])))


def test_validation_accuracy_replaces_a_missing_test_accuracy(tmp_path: Path) -> None:
    tested = write_run(tmp_path / "a", (0.5, 0.4), 0.45, seed=0, eval_weights="best")
    untested = write_run(tmp_path / "b", (0.6, 0.3), None, seed=1, eval_weights="best")
    table = table_of(tested, untested)
    values = table.row_values(table.rows[0])
    assert (values["split"], values["weights"]) == ("validation", "best")
    assert table.caption().startswith("Validation accuracy in % with the best weights: mean (range) over n runs")
    assert (values["std"], table.display_rows()[0]["accuracy"]) == (None, "55.00 (50.00-60.00)")
    assert table.rows[0].curve("val_acc").std is None  # type: ignore[union-attr]
    assert table.row_values(table.rows[0])["accuracy"] == pytest.approx(0.55)


def test_split_and_weights_that_differ_are_shown_on_a_narrow_terminal(tmp_path: Path) -> None:
    """Otherwise a validation accuracy could be taken for a test accuracy."""
    write_run(tmp_path / "runs" / "tested", (0.5,), 0.45, steps=7, stop_reason="max_steps", lr=0.2)
    write_run(tmp_path / "runs" / "untested", (0.6,), None, eval_weights="best")
    console = Console(width=40, file=io.StringIO())
    console.print(TABLE_FORMATS["terminal"](table_of(tmp_path / "runs")), crop=False)
    lines = [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert ["name", "accuracy", "%", "n", "split", "weights", "notes"] in lines
    assert ["tested", "45.00", "1", "test", "last", "stopped", "at", "7"] in lines
    assert ["untested", "60.00", "1", "validation", "best"] in lines


def test_notes_name_obstacles_to_a_comparison(tmp_path: Path) -> None:
    options: dict[str, Any] = {"seed": 0, "max_steps": 7, "steps": 7, "stop_reason": "max_steps"}
    first = write_run(tmp_path / "a", (0.5,), **options)
    table = table_of(first, write_run(tmp_path / "b", (0.5,), device="another device", **options))
    values = table.row_values(table.rows[0])
    assert values["notes"] == "stopped at 7 steps, seed 0 more than once, 2 kinds of device"
    assert (values["n"], values["time"]) == (2, None)


def sweep(folder: Path, label: str = "fast") -> Path:
    """Write a sweep: two done trials, a failed and a pruned one with finished runs, a killed one, one without a run."""
    for seed in range(4):
        write_run(folder / "runs" / f"t{seed}", (0.5, 0.6), 0.6 + seed / 10, seed=seed, lr=0.2)
    write_run(folder / "runs" / "t4", (0.5,), seed=4, epochs=2, lr=0.2, finished=False)
    trials = [{"trial": f"t{seed}", "label": label, "seed": seed, "state": "running"} for seed in range(6)]
    trials += [{"trial": f"t{seed}", "label": label, "seed": seed, "state": "done"} for seed in (0, 1, 2)]
    trials.append({"trial": "t2", "label": label, "seed": 2, "state": "failed", "reason": "the loss is\nnot finite"})
    trials.append({"trial": "t3", "label": label, "seed": 3, "state": "pruned", "reason": "below the median"})
    return write_trials(folder, trials, tail='{"trial": "t0", "lab\n{"trial": "t0", "lab')


def test_last_entries_of_a_sweep_count_and_other_trials_are_listed(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "sweep", SPECIAL_CHARACTERS)
    with pytest.warns(UserWarning, match="invalid lines skipped: 1"):
        table = table_of(folder / "runs" / "t1", folder)
    (row,) = table.rows
    assert row.name == SPECIAL_CHARACTERS
    assert table.row_values(row)["accuracy"] == pytest.approx(0.65)
    assert table.row_values(row)["n"] == 2
    excluded = {(run["seed"], run["state"], run["reason"]) for run in table.describe_excluded_runs()}
    assert excluded == {
        ("2", "failed", "the loss is not finite"),
        ("3", "pruned", "below the median"),
        ("4", "unfinished", "after 1 of 2 epochs: still training or interrupted"),
        ("5", "unfinished", "still training or interrupted"),
    }


@pytest.mark.parametrize(
    ("runs", "names"),
    [
        ([{"arch": "se68"}, {"arch": "se55"}], ["se68", "se55"]),
        ([{"lr": 0.1}, {"lr": 0.05}], ["lr=0.1", "lr=0.05"]),
        (
            [{"arch": "se68"}, {"arch": "se55"}, {"arch": "se55", "lr": 0.2}],
            ["se68 lr=0.1", "se55 lr=0.1", "se55 lr=0.2"],
        ),
        ([{"augment": "flip", "lr": 0.1}, {"augment": "crop:4:zero,flip", "lr": 0.2}], ["lr=0.1", "lr=0.2"]),
        ([{"name": "quick"}, {"name": "custom", "lr": 0.2}], ["quick", ""]),
        ([{"name": "quick"}], ["quick"]),
        ([{"name": "custom"}], ["se68"]),
    ],
)
def test_groups_are_named_by_what_differs(tmp_path: Path, runs: list[dict[str, Any]], names: list[str]) -> None:
    options = [{**run, "seed": seed} for run in runs for seed in (0, 1)]
    folders = [write_run(tmp_path / f"run{index}", (0.5,), **run) for index, run in enumerate(options)]
    assert [group.name for group in group_runs(read_records(folders))] == [name or "se68" for name in names]


def test_paths_of_initial_weights_are_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inits = [str(tmp_path / "runs" / "cifar10"), "/w", "pretrained:speed94", "none"]
    folders = [
        write_run(tmp_path / f"{n}-{s}", (0.5,), init=init, seed=s) for n, init in enumerate(inits) for s in (0, 1)
    ]
    names = [group.name for group in group_runs(read_records(folders))]
    assert names == ["init=runs/cifar10", "init=/w", "init=pretrained:speed94", "init=none"]


def test_single_runs_have_the_names_of_their_folders(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, (0.5,), lr=lr) for name, lr in (("a/run", 0.1), ("b/run", 0.2), ("c", 0.3))]
    folders.append(write_run(tmp_path / "d", (0.5,), lr=0.3, seed=1))
    assert [group.name for group in group_runs(read_records(folders))] == ["run lr=0.1", "run lr=0.2", "lr=0.3"]


def test_folders_are_searched_for_runs_and_sweeps(tmp_path: Path) -> None:
    """Folders that are damaged or that another program wrote are reported as damaged."""
    write_run(tmp_path / "runs" / "2026" / "good", (0.5,), 0.9)
    write_run(tmp_path / "runs" / "broken", (0.5,), lr=0.2)
    (tmp_path / "runs" / "broken" / "summary.json").write_text("[" * 10_000)
    other = write_run(tmp_path / "runs" / "other", (0.5,))
    (other / "recipe.toml").write_text('[project]\nname = "other"\n')
    (tmp_path / "runs" / "photos").mkdir()
    for name, content in (("sweep", ""), ("empty", None)):
        folder = sweep(tmp_path / "runs" / name) if name == "sweep" else write_trials(tmp_path / "runs" / name, [])
        (folder / "sweep.toml").write_text(content or "")
    with pytest.warns(UserWarning, match="invalid lines skipped: 1"):
        table = table_of(tmp_path / "runs")
    assert {row.name for row in table.rows} == {"good", "broken", "other", "empty", "fast"}
    reasons = {Path(run["folder"]).name: run["reason"] for run in table.describe_excluded_runs()}
    assert reasons["broken"].startswith("summary.json: Invalid JSON")
    assert reasons["other"] == "recipe.toml contains no option of a run"
    assert reasons["empty"] == "trials.jsonl contains no valid trial"
    assert table.varying_options == ["epochs", "lr"]  # damaged runs have no options
    assert [row["Name"] for row in markdown_rows(table)] == ["good", "fast"]
    assert all(str(TABLE_FORMATS[name](table)) for name in TABLE_FORMATS)


def test_rows_with_equal_labels_and_options_are_numbered(tmp_path: Path) -> None:
    folders = [write_trials(tmp_path / name, [{"trial": "t", "label": "fast", "state": "done"}]) for name in "abc"]
    for folder, lr in zip(folders, (0.1, 0.1, 0.2), strict=True):
        write_run(folder / "runs" / "t", (0.5,), lr=lr)
    names = [row.name for row in group_runs(read_records(folders))]
    assert names == ["fast lr=0.1 (1)", "fast lr=0.1 (2)", "fast lr=0.2"]


def test_incomplete_last_line_is_ignored_by_every_reader(tmp_path: Path) -> None:
    """Its writer was terminated, even if the line looks complete; the sweep overwrites it."""
    line = {"trial": "t", "label": "fast", "seed": 0, "state": "failed", "reason": "it broke", "run": "runs/t"}
    folder = write_trials(tmp_path / "sweep", [line], tail=json.dumps({**line, "state": "done"}))
    write_run(folder / "runs" / "t", (0.5,))
    (record,) = read_records([folder])
    assert (record.state, record.reason) == ("failed", "it broke")
    (entry,) = list_runs(tmp_path)
    assert entry.get("trials") == {"failed": 1}
    assert TrialLog(folder).trial_state("t") == "failed"
    with (folder / "trials.jsonl").open("a") as file:
        file.write('\n[1]\n{"trial": "t"}\n')
    with pytest.warns(UserWarning, match="invalid lines skipped: 2"):
        (result,) = TrialLog(folder).results(["t"])
    assert result.model_dump() == {**line, "knobs": {}, "state": "done", "seconds": None} | ACCURACIES


@pytest.mark.filterwarnings("ignore:.*invalid lines skipped")
def test_formats_contain_all_values(tmp_path: Path, folders: list[Path]) -> None:
    table = table_of(*folders, sweep(tmp_path / "sweep", SPECIAL_CHARACTERS))
    csv_rows = list(csv.DictReader(io.StringIO(str(TABLE_FORMATS["csv"](table)))))
    for row, cells in zip(table.rows, csv_rows, strict=True):
        values = table.row_values(row)
        for name in ("accuracy", "std", "time", "lr"):
            assert cells[name] == ("" if values[name] is None else repr(values[name])), name
        assert cells["name"] == row.name
    assert csv_rows[2]["not in the means"].startswith("seed 2 failed: the loss is not finite; seed 3 pruned: below")

    assert [list(row.values()) for row in markdown_rows(table)] == [list(row.values()) for row in table.display_rows()]
    excluded = markdown_rows(table, "Not in the means:")
    assert [list(row.values()) for row in excluded] == [list(run.values()) for run in table.describe_excluded_runs()]

    text = str(TABLE_FORMATS["latex"](table))
    comments, body = text.split("\\begin{table}\n")
    assert all(line.startswith("% ") for line in comments.splitlines())
    assert "unfinished" in comments
    assert "unfinished" not in body
    heading, rows = body.split("\\toprule\n")[1].split("\\bottomrule")[0].split("\\midrule\n")
    assert heading == "Name & Accuracy (\\%) & $n$ & Epochs & Learning rate & Time \\\\\n"
    assert "architecture se68, batch size 128, optimizer lookahead:sgd" in body.split("\\caption{")[1].splitlines()[0]
    characters = {r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", r"$\pm$": "±",
             r"\textless{}": "<", r"\textgreater{}": ">", r"\textbar{}": "|"}  # fmt: skip
    escape = re.compile("|".join([*map(re.escape, characters), r"\\[&%$#_{}]"]))
    for line, row in zip(rows.splitlines(), table.display_rows(), strict=True):
        assert not re.search(r"[%$#_{}~^\\<>|]", escape.sub("", line.removesuffix(r" \\"))), "not escaped"
        cells = [escape.sub(lambda match: characters.get(match[0], match[0][-1]), cell)
                 for cell in re.split(r"(?<!\\) & ", line.removesuffix(r" \\"))]  # fmt: skip
        texts = [cell for name, cell in row.items() if name != "notes"]
        assert [cell.replace(", ", ",") for cell in cells] == [cell.replace(", ", ",") for cell in texts]


def markdown_rows(table: ReportTable, heading: str = "") -> list[dict[str, str]]:
    """Parse the first table below `heading` in the report in Markdown."""
    text = str(TABLE_FORMATS["markdown"](table))
    text = text[text.index(heading) :]
    lines = re.search(r"(^\|.*\n?)+", text, re.MULTILINE)
    assert lines
    header, _, *rows = [
        [re.sub(r"\\([\\|*_<`\[\]])", r"\1", cell) for cell in re.split(r"(?<!\\) \| ", line[2:-2])]
        for line in lines[0].splitlines()
    ]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_terminal_table_fits_80_columns(tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The options that differ have columns, or are listed below the results if they do not fit beside them."""

    def printed(*paths: Path, **options: Any) -> str:
        console = Console(width=80, file=io.StringIO())
        console.print(TABLE_FORMATS["terminal"](table_of(*paths, **options)), crop=False)
        return console.file.getvalue()  # type: ignore[attr-defined]

    monkeypatch.setenv("COLUMNS", "80")
    killed = folders[-1].rename(tmp_path / f"killed-{'x' * 100}")
    text = printed(*folders[:-1], killed, sort="accuracy")
    assert "\nname      accuracy %  n    lr     time  notes\n" in text
    assert "\nlr=0.1  92.19 ± 0.77  3   0.1  0:01:50  1 unfinished\nlow            30.00  1  0.01  2:01:40\n" in text
    assert "optimizer lookahead:sgd" in text
    assert f"\nlr=0.1, seed 3: unfinished, after 1 of 4 epochs: still training or interrupted\n  {killed}\n" in text
    assert all(len(line) <= 80 for line in text.splitlines() if str(killed) not in line)
    other = write_run(tmp_path / "other-run", (0.5,), augment="flip", ema_decay=0.5, label_smoothing=0.1, lr=0.2)
    text = printed(*folders[:4], other)
    assert re.search(r"\nother-run +50.00 +1 +0:01:00\n", text)
    assert re.search(r"\nname +options that differ\n", text)
    assert "lr=0.2; augment=flip; label_smoothing=0.1; ema_decay=0.5" in " ".join(text.split())
    assert all(len(line) <= 80 for line in text.splitlines())


def test_rows_are_sorted_by_a_column(folders: list[Path]) -> None:
    for sort, names in (("time", ["low", "lr=0.1"]), ("accuracy", ["lr=0.1", "low"]), ("name", ["low", "lr=0.1"])):
        for paths in (folders, folders[::-1]):
            assert [row.name for row in table_of(*paths, sort=sort).rows] == names
    with pytest.raises(UsageError, match="did you mean 'accuracy'"):
        table_of(*folders, sort="acuracy")


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("summary.json", '{"params": 3, "weig', "summary.json: Invalid JSON"),
        ("summary.json", "[]", "summary.json"),
        ("summary.json", json.dumps(summary_document(test_acc=93.1)), "test_acc"),
        ("recipe.toml", "lr = ", "TOML"),
        ("recipe.toml", "lr = -3", "--lr should be greater than 0"),
        ("recipe.toml", "\x00\xff", "TOML"),
    ],
)
def test_damaged_run_is_listed_with_the_reason(
    tmp_path: Path, folders: list[Path], file: str, content: str, reason: str
) -> None:
    (folders[1] / file).write_text(content, encoding="latin-1")
    table = table_of(*folders)
    damaged = [run for run in table.describe_excluded_runs() if run["state"] == "damaged"]
    assert [run["folder"] for run in damaged] == [str(folders[1])]
    assert reason in damaged[0]["reason"]
    assert all(str(TABLE_FORMATS[name](table)) for name in TABLE_FORMATS)
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        read_records([folders[1]])


def test_damaged_metrics_remove_only_the_curves(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", (0.5, 0.6), 0.9)
    content = (folder / "metrics.csv").read_text()
    (folder / "metrics.csv").write_text(content.replace("0.6,", "nan,", 1)[:-20])
    (row,) = group_runs(read_records([folder]))
    curve = row.curve("val_acc")
    assert curve is not None
    assert curve.epochs == [1]
    (folder / "metrics.csv").write_bytes(b"\x00\xff,\n")
    with pytest.warns(UserWarning, match="has no valid row"):
        table = table_of(folder)
    assert table.row_values(table.rows[0])["accuracy"] == 0.9
    assert table.rows[0].curve("val_acc") is None


def test_other_folders_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path, tmp_path / ("a" * 300)):
        with pytest.raises(CheckpointError, match=r"recipe\.toml or trials\.jsonl"):
            read_records([path])
    invalid = [{"trial": name, "label": "odd", "state": "done"} for name in ("a\0b", "a" * 300, "../../..", "")]
    for trials in ([], invalid):
        with (
            pytest.warns(UserWarning, match="invalid lines skipped: 2") if trials else contextlib.nullcontext(),
            pytest.raises(CheckpointError, match="nothing to report"),
        ):
            read_records([write_trials(tmp_path / "sweep", trials)])
