"""The command line, run in a separate process."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastcifar.format import option_flag
from fastcifar.recipe import Recipe
from tests.faults.children import run_fastcifar as fastcifar

TINY = ("--data", "synthetic:200", "--val-size", "40", "--arch", "resnet", "--blocks", "1,1", "--channels", "8,16",
        "--batch-size", "32", "--epochs", "1", "--no-compile", "--precision", "fp32", "--device", "cpu")  # fmt: skip


@pytest.mark.medium
@pytest.mark.parametrize(
    "arguments",
    ["--help", "train --help", "models --help", "data show --help", "sweep --help", "--version", "-V", "train --lrr"],
)
def test_fault25_help_version_and_unknown_options_import_no_heavy_module(arguments: str) -> None:
    code = (
        "import sys\nfrom fastcifar.cli.app import main\n"
        f"sys.argv = ['fastcifar', *{arguments.split()!r}]\n"
        "try:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'nvidia.dali', 'matplotlib', 'torchvision', 'pytorch_optimizer'} & sys.modules.keys()\n"
        "    assert not heavy, heavy\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "Assertion" not in run.stderr, run.stderr
    assert run.returncode == (2 if "--lrr" in arguments else 0), run.stderr


@pytest.mark.medium
def test_train_help_lists_every_option() -> None:
    text = fastcifar("train", "--help", COLUMNS="200").stdout
    for flag in (*map(option_flag, Recipe.model_fields), "--no-compile", "--no-cuda-graph"):
        assert flag in text, flag


@pytest.mark.medium
def test_help_shows_the_defaults_of_each_command() -> None:
    evaluate, speedrun, bench = (
        " ".join(re.sub("[│─╭╮╰╯]", " ", fastcifar(name, "--help", COLUMNS="200").stdout).split())
        for name in ("eval", "speedrun", "bench")
    )
    assert "ema (moving average) [default: that of the run]" in evaluate
    assert "compile with torch.compile [default: for 100,000 images or more" in evaluate
    assert "6view or 10crop [default: none]" in evaluate
    assert "6view or 10crop [default: 6view]" in speedrun
    assert not re.search("--(patience|resume|track|on-nan|save-every-epochs)", speedrun)
    assert "(N generated images) [default: CIFAR if it is on this machine, otherwise synthetic images]" in bench


@pytest.mark.medium
def test_print_config_prints_a_recipe_file(tmp_path: Path) -> None:
    options = ("--recipe", "quick", "--epochs", "6", "--lr", "0.1")
    text = fastcifar("train", *options, "--print-config", cwd=tmp_path).stdout
    (tmp_path / "mine.toml").write_text(text)
    assert Recipe.make(str(tmp_path / "mine.toml")) == Recipe.make("quick", epochs=6, lr=0.1)
    assert list(tmp_path.iterdir()) == [tmp_path / "mine.toml"]


@pytest.mark.slow
def test_train_eval_predict_and_compare(tmp_path: Path) -> None:
    run = fastcifar("train", *TINY, "--json", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    summary = json.loads(run.stdout.strip().splitlines()[-1])
    assert run.stdout.count("\n") == 1
    assert summary["steps"] == 5
    assert (tmp_path / summary["run"] / "summary.json").is_file()
    assert re.search(r"^epoch train_loss .*\n +1/1 ", run.stderr, re.MULTILINE)
    scores = json.loads(fastcifar("eval", summary["run"], "--json", cwd=tmp_path).stdout)
    assert scores["test_acc"] == summary["test_acc"]
    assert scores["correct"] == round(scores["test_acc"] * scores["total"])
    assert scores["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-5)
    run = fastcifar("predict", summary["run"], "data:test", "--out", "a.csv", "--tta", "flip", "--json", cwd=tmp_path)
    assert (run.returncode, run.stdout.count("\n")) == (0, 1), run.stderr
    result = json.loads(run.stdout)
    assert (result["images"], result["tta"], result["out"]) == (40, "flip", "a.csv")
    assert "0 of 40 labels" in fastcifar("compare", "a.csv", "a.csv", cwd=tmp_path).stdout
    (tmp_path / "in.pkl").write_bytes(b"<html>")
    invalid = fastcifar("predict", summary["run"], "in.pkl", "--out", "b.csv", cwd=tmp_path)
    assert (invalid.returncode, invalid.stdout, invalid.stderr.count("\n")) == (3, "", 1)
    assert not (tmp_path / "b.csv").exists()


@pytest.mark.slow
def test_train_prints_a_table_and_progress_lines(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("lr = 0.05\nclip_grad = 'none'\n")
    tracked = ("--track", "tensorboard") if importlib.util.find_spec("tensorboard") else ()
    run = fastcifar("train", *TINY, "--recipe", str(tmp_path / "recipe.toml"), "--lr", "0.02", *tracked, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert not tracked or run.stdout.splitlines()[-1] == "tensorboard --logdir runs"
    for words in (
        "lr=0.02",
        "clip_grad=none",
        "parameters",
        "test accuracy",
        "epoch train_loss train_acc",
        "device: cpu",
    ):
        assert words in run.stdout, words
    assert "\r" not in run.stdout


@pytest.mark.slow
def test_fault22_models_lists_networks_and_layers_and_fits_the_width_to_a_budget() -> None:
    networks = {network["name"]: network for network in json.loads(fastcifar("models", "--json").stdout)}
    assert (networks["se68"]["params"], networks["coconut_se"]["params"]) == (4_697_742, 4_973_226)
    assert networks["se68"]["macs"] == pytest.approx(798.69e6, rel=1e-5)
    layers = fastcifar("models", "se68", COLUMNS="120").stdout
    assert "4,697,742" in layers
    assert "seblock.conv1" in layers
    fitted = json.loads(fastcifar("models", "--budget", "5e6", "--arch", "se68", "--json").stdout)
    assert 4_697_742 < fitted["params"] <= 5_000_000
    assert json.loads(fastcifar("models", "--json", "--arch", "resnet", "--se", "block").stdout)["params"] == 4733610


@pytest.mark.slow
def test_doctor_reports_the_execution_that_train_chooses() -> None:
    result = json.loads(fastcifar("doctor", "--device", "cpu", "--json").stdout)
    assert result["imports"].keys() == {"torchvision", "nvidia.dali", "pytorch_optimizer", "matplotlib"}
    assert "device: cpu (requested)" in result["chosen"]


@pytest.mark.slow
def test_bench_prints_one_json_document(tmp_path: Path) -> None:
    tiny = [argument for argument in TINY if argument not in ("--val-size", "40", "--epochs", "1")]
    chart = ("--chart", "a.png")
    trace = ("--profile", "t.json")
    run = fastcifar("bench", *tiny, "--what", "loader", "--trials", "1", "--json", *chart, *trace, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("\n") == 1
    (result,) = json.loads(run.stdout)["results"]
    assert (result["what"], result["data"]) == ("loader", "synthetic:200")
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "t.json"}
    size = (tmp_path / "t.json").stat().st_size
    viewers = "open it at https://ui.perfetto.dev or in chrome://tracing"
    assert run.stderr.splitlines()[-2:] == [f"wrote t.json, a trace of {size:,} bytes; {viewers}", "wrote a.png"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "a.json").write_text(run.stdout)
    comparison = json.loads(fastcifar("compare", "a.json", "a.json", "--json", cwd=tmp_path).stdout)
    assert [(row["what"], row["ratio"], row["overlap"]) for row in comparison["rows"]] == [("loader", 1.0, True)]


@pytest.mark.medium
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--lr", "-1"), 2, "--lr should be greater than 0"),
        (("--batch-size", "100000"), 2, "--batch-size 100000 is larger"),
        (("--batchsize", "3"), 2, "--batch-size"),
        (("--recipe", "quik"), 2, "did you mean 'quick'?"),
        (("quick",), 2, "did you mean --recipe quick?"),
        (("--data", "no/such/place"), 3, "no/such/place"),
        (("--cuda-graph",), 8, "--cuda-graph needs CUDA"),
        (("--blocks", "1,1,1"), 2, "--channels"),
        (("--max-params", "1000"), 2, "over the budget of 1,000"),
        (("--device", "cuda"), 8, "use --device cpu"),
    ],
)
def test_fault15_fault17_invalid_options_are_refused_in_one_line_and_nothing_is_written(
    tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    run = fastcifar("train", *TINY, *arguments, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert (run.returncode, run.stdout) == (code, "")
    assert run.stderr.count("\n") == 1, run.stderr
    assert words in run.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.medium
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("eval", "no-run"), 4),
        (("eval", "damaged"), 4),
        (("predict", "no-run", "damaged", "--out", "a.csv"), 4),
        (("data", "verify", "--data", "no/such/place"), 3),
        (("data", "show", "--out", "a.png", "--data", "synthetic:100", "--augment", "flop"), 2),
        (("bench", "--data", "synthetic:100", "--what", "loader,trian"), 2),
        (("models", "--width", "0.5"), 2),
        (("models", "se68", "--arch", "speednet"), 2),
    ],
)
def test_other_commands_refuse_invalid_input_in_one_line(tmp_path: Path, arguments: tuple[str, ...], code: int) -> None:
    (tmp_path / "damaged").write_text("<html>")
    run = fastcifar(*arguments, cwd=tmp_path)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (code, "", 1), run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.medium
def test_data_verify_and_show(tmp_path: Path) -> None:
    result = json.loads(fastcifar("data", "verify", "--data", "synthetic:100", "--json", cwd=tmp_path).stdout)
    assert (result["kind"], result["splits"]["train"]["shape"]) == ("synthetic images", [100, 3, 32, 32])
    table = fastcifar("data", "verify", "--data", "synthetic:100", cwd=tmp_path, COLUMNS="120").stdout
    for words in ("synthetic:100", "100 x 3 x 32 x 32, uint8", "airplane", "mean of training"):
        assert words in table, words
    plot = fastcifar("data", "show", "--out", "a.png", "--data", "synthetic:100", "--augment", "flip:1", cwd=tmp_path)
    assert (plot.returncode, plot.stdout) == (0, "wrote a.png\n"), plot.stderr


@pytest.mark.medium
@pytest.mark.parametrize(("name", "exit_code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_outside_of_training_is_reported_in_one_line(name: str, exit_code: int) -> None:
    code = (
        "import os, signal, sys, time, fastcifar.device as device, fastcifar.cli.app as cli\n"
        f"def interrupted(*_): os.kill(os.getpid(), signal.{name}); time.sleep(60)\n"
        "device.collect_diagnostics = interrupted\nsys.argv = ['fastcifar', 'doctor']\ncli.main()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (exit_code, "", f"fastcifar: stopped by {name}\n")


@pytest.mark.medium
def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    run = fastcifar("train", *TINY, "--arch", "se86", "--debug", cwd=tmp_path)
    assert (run.returncode, "Traceback" in run.stderr, "did you mean 'se68'?" in run.stderr) == (1, True, True)
