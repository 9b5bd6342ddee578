"""The end of a command: signals, closed and full outputs, and control characters in what is printed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.text import Text

from fastcifar.errors import escape
from fastcifar.format import DataConsole, KeyValueTable, NumericTable, one_line
from tests.faults import children
from tests.faults.children import TINY, wait_for, wait_for_exit
from tests.faults.runs import assert_equal_runs, last, rows
from tests.reporting.run_folders import write_run, write_trials

FASTCIFAR = f"{sys.executable} -m fastcifar"


def run_shell(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of bash in which `fastcifar` is the command line; the exit code is that of the first of a pipe."""
    script = f'set -o pipefail; fastcifar() {{ {FASTCIFAR} "$@"; }}\n{command}'
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        ["bash", "-c", script], cwd=cwd, env=environment, capture_output=True, text=True, timeout=200, check=False
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("fastcifar report run | true", 141, ""),
        ("fastcifar report run | head -1", 141, ""),
        ("fastcifar runs ls . | true", 141, ""),
        ("fastcifar models --json | true", 141, ""),
        ("fastcifar --help | true", 141, ""),
        (
            "fastcifar report run > /dev/full",
            7,
            "fastcifar: cannot write to stdout: No space left on device; free disk",
        ),
        ("fastcifar report run >&-", 0, ""),
        ("fastcifar report none 2>&-", 4, ""),
        ("fastcifar report none 2> /dev/full", 4, ""),
    ],
)
def test_fault40_commands_that_print_end_with_141_or_7(tmp_path: Path, command: str, code: int, message: str) -> None:
    write_run(tmp_path / "run", [0.5] * 3)
    # the reader ends before the command prints
    result = run_shell(command, tmp_path)
    allowed = {code, 0} if "head" in command else {code}
    assert result.returncode in allowed, result
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == bool(message)


@pytest.mark.slow
@pytest.mark.parametrize(
    "redirection", ["| true", "> /dev/full", "2> /dev/full > /dev/full", ">&- 2>&-", "--json 2>&- | true"]
)
def test_fault40_training_goes_on_without_output(tmp_path: Path, redirection: str) -> None:
    result = run_shell(f"fastcifar train {' '.join(TINY)} --plots --epochs 2 --out run {redirection}", tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(rows(tmp_path / "run")) == 2
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["complete"]
    checkpoint = (tmp_path / "run" / "checkpoints" / "last.pt").read_bytes()
    assert checkpoint.startswith(b"PK")


def hang_up(output: Path, ignored: bool, *arguments: str) -> None:
    """Run `fastcifar train`, slowly, with SIGHUP ignored as under nohup or with its default action."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    children.fastcifar(output, 0.05, "train", *TINY, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True])
def test_fault40_sighup_saves_a_checkpoint_unless_it_is_ignored(tmp_path: Path, ignored: bool) -> None:
    log, out = tmp_path / "log", tmp_path / "run"
    process = children.start(hang_up, log, ignored, "--epochs", "3", "--out", str(out))
    wait_for(lambda: (out / "metrics.csv").exists() and len(rows(out)) == 1)
    os.kill(process.pid, signal.SIGHUP)
    assert wait_for_exit(process, 60) == (0 if ignored else 129)
    assert ("stopped by SIGHUP after step" in log.read_text()) != ignored
    if not ignored:
        assert 5 <= last(out)["step"] < 15
        assert wait_for_exit(children.train(log, "--resume", str(out))) == 0
    assert wait_for_exit(children.train(log, "--epochs", "3", "--out", str(tmp_path / "full"))) == 0
    assert_equal_runs(out, tmp_path / "full")


@pytest.mark.medium
@pytest.mark.parametrize("ignored", [False, True])
def test_fault40_sighup_outside_of_training(tmp_path: Path, ignored: bool) -> None:
    code = (
        "import os, signal, sys, time; from fastcifar.cli import app, exit; exit.handle_signals();"
        "os.kill(os.getpid(), signal.SIGHUP); time.sleep(0.1); sys.exit(5)"
    )
    command = f"trap {chr(39) * 2} HUP; " if ignored else ""
    result = subprocess.run(
        ["bash", "-c", f"{command}exec {sys.executable} -c '{code}'"], capture_output=True, text=True, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # nohup, under which tests may run, ignores it
    )  # fmt: skip
    assert (result.returncode, result.stderr) == ((5, "") if ignored else (129, "fastcifar: stopped by SIGHUP\n"))


# text in a name or document -> how it is shown
SHOWN = {
    "[/x]": "[/x]",
    "[red]b": "[red]b",
    ":cat:": ":cat:",
    "new\nline": "new\\nline",
    "a\x1b[31mb": "a\\x1b[31mb",
    "\x9b2J": "\\x9b2J",
    "carriage\rreturn": "carriage\\rreturn",
    "\x1b]0;title\x07": "\\x1b]0;title\\x07",
    "caf\udce9": "caf\\udce9",
    "right\u202eleft": "right\\u202eleft",
    "~": "~",
    "%41?": "%41?",
    "caf\u00e9 \u732b\u3000": "caf\u00e9 \u732b\u3000",
}  # fmt: skip


@pytest.mark.parametrize("text", SHOWN)
def test_fault39_fault31_text_is_shown_escaped(text: str) -> None:
    assert escape(text) == SHOWN[text]
    console = DataConsole(width=60, force_terminal=True, color_system=None, legacy_windows=False)
    table = NumericTable([text], ["n"], title=text)
    table.add_row(text, "1")
    for value in (text, Text(text), table, KeyValueTable({"name": text})):
        with console.capture() as capture:
            console.print(value)
        shown = capture.get()
        assert shown.isprintable() or set(shown) - {"\n"} == {c for c in shown if escape(c) == c}
        assert "\x1b" not in shown
    with console.capture() as capture:
        console.print(table)
    assert SHOWN[text].strip() in capture.get()


def test_fault39_one_line_has_single_spaces() -> None:
    assert one_line("  a\n\tb\x00 \x1b[1m ") == "a b\\x00 \\x1b[1m"


@pytest.mark.medium
@pytest.mark.parametrize("text", [text for text in SHOWN if text not in ("~",)])
def test_fault31_fault39_names_in_run_folders_are_shown_by_every_command(
    text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs" / text.replace("/", "")
    write_run(folder, [0.5], name=text if text.isprintable() or "\udce9" not in text else "x", device="d\x1b[1m")
    write_trials(
        tmp_path / "sweep", [{"trial": "t0", "label": "x\x1b[31m", "state": "failed", "reason": "r\x1b[31m[/x]"}]
    )
    (tmp_path / "sweep" / "sweep.toml").touch()
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["runs", "ls", "."], ["runs", "ls", ".", "--json"], ["report", str(folder), "sweep"],
        ["compare", str(folder), str(folder)],
        *(["report", str(folder), "--format", name] for name in ("markdown", "csv", "latex")),
        ["eval", str(folder)], ["train", "--resume", str(folder / "x")],
        ["predict", str(folder), text, "--out", "a.csv"],
        ["data", "verify", "--data", text],
    ):  # fmt: skip
        code = run_main(arguments, monkeypatch)
        output = capfd.readouterr()
        assert "Traceback" not in output.err, output.err
        is_read = arguments[0] in ("runs", "report", "compare") and "\udce9" not in text  # JSON has no such character
        is_refused = arguments[0] in ("train", "data") and "\udce9" in text  # a recipe file is UTF-8
        assert code in ((0,) if is_read else (2,) if is_refused else (0, 3, 4)), (arguments, output)
        for shown in output:
            assert "\x1b" not in shown
            assert all(char == "\n" or escape(char) == char for char in shown), shown


def run_main(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the exit code of the command line in this process, whose signal handlers stay as they are."""
    from fastcifar.cli import app

    monkeypatch.setattr(app, "handle_signals", lambda: None)
    monkeypatch.setattr(app, "prepare_streams", lambda: None)
    monkeypatch.setattr(sys, "argv", ["fastcifar", *arguments])
    with pytest.raises(SystemExit) as caught:
        app.main()
    return int(caught.value.code or 0)


LONG = "x" * 500


@pytest.mark.medium
@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", LONG], ["predict", "run", LONG, "--out", "p.csv"], ["predict", LONG, LONG, "--out", f"{LONG}.csv"],
        ["report", LONG], ["runs", "ls", LONG], ["compare", LONG, LONG], ["train", "--resume", LONG],
        ["train", "--recipe", LONG],
        ["data", "verify", "--data", LONG], ["sweep", LONG], ["runs", "rm", LONG, "--yes"], ["export", LONG],
        ["train", *TINY, "--out", LONG, "--max-steps", "1"], ["train", *TINY, "--out", LONG, "--resume", "auto"],
    ],
)  # fmt: skip
def test_fault31_names_of_500_characters_are_errors_in_one_line(
    arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = run_main(arguments, monkeypatch)
    error = capfd.readouterr().err
    assert code in (2, 3, 4, 7), error
    assert error.startswith("fastcifar: ")
    assert error.count("\n") == 1
