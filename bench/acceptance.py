"""Acceptance test on a machine with a GPU, within a time budget.

    scripts/gpu_acceptance [PART ...] [--minutes 9] --out DIR [--device cpu --quick] [--airbench CHECKOUT]

Runs the parts in the order of PARTS, and each only if its expected duration fits what is left of the budget. A part is
a list of commands, each in a separate process. DIR receives the output and the files of every command. After each part
three files are written, so that they exist even if the machine is switched off during the next one: PART.part.json with
the exit codes and seconds, DIR/summary.md with the key figures of all parts, and DIR.tar.gz, an archive of DIR. Another
call with other parts adds to all of them.

Nothing is installed, and nothing needs a network connection. Parts that need a missing package are not run. Without a
GPU the exit code is 8, except with `--device cpu`. `--quick` uses tiny sizes, to check that every part runs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from acceptance_figures import format_summary, summarize_trace

ROOT = Path(__file__).parents[1]
GRACE_S = 20.0  # time between SIGTERM and SIGKILL, for writing a checkpoint
ARCHIVE_S = 5.0  # time for the summary and the archive after a part
LIMIT_FACTOR = 2.0  # a part is stopped after this many times its expected duration, unless it is the last one
NEEDS_CUDA, STOPPED = 8, 143  # exit codes
TINY = "--data synthetic:200 --arch resnet --blocks 1,1 --channels 8,16 --batch-size 32"
TINY_BENCH = f"{TINY} --trials 1 --no-compile"
TINY_SPEEDRUN = (
    "--data synthetic:600 --width 0.05 --epochs 1 --image-size 32 --batch-size 100 --no-compile --loader tensor --n 2"
)
TINY_PEERS = "--arch speednet --batch-size 8 --data synthetic:100 --steps 1 --rounds 1 --loops source_loop,eager"

# The expected seconds in PARTS are sums of the following. No GPU has run them: after the first run, replace them by the
# durations in PART.part.json.
START = 12.0  # imports, data set, cuDNN's choice of algorithms; on two CPU cores, a start with compiled code takes 8
COMPILE = 40.0  # compilation of se68 without a cache, as measured on two CPU cores (README, start-up time)
CACHED = 10.0  # the same from the cache, and the capture of the CUDA graph
TRIALS = 9.0  # warm-up and three trials of two seconds
LIMITS = 6.0  # the limits of the device in `bench`


@dataclass(frozen=True)
class Command:
    """A command: the file for its standard output, what is run, its options, and those that --quick uses instead.

    program: "fastcifar COMMAND", a file in bench/, or "pytest". {out}, {started}, {airbench} and {gpu_tests} in the
        options are replaced.
    accepted: exit code other than 0 that is no failure -> the reason.
    """

    file: str
    program: str
    options: str = ""
    quick: str | None = None  # None: the same options
    accepted: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """Commands that run one after another, their expected seconds on a GPU, and with --quick on two busy CPU cores.

    missing: function that returns why the part cannot run, or "".
    after: function of the output folder that is called after the commands.
    """

    expected_s: float
    quick_s: float
    commands: list[Command]
    missing: Callable[[argparse.Namespace], str] = lambda _: ""
    after: Callable[[Path], None] = lambda _: None


def bench(file: str, options: str, quick: str = "", accepted: dict[int, str] | None = None) -> Command:
    """Return a command that runs `fastcifar bench` with three trials."""
    quick_options = f"{quick or options} {TINY_BENCH}"
    return Command(f"{file}.json", "fastcifar bench", f"{options} --trials 3", quick_options, accepted or {})


def speedrun(target: str, runs: int) -> Command:
    """Return a command that measures the time to a target accuracy, in a new folder."""
    out = f"--target {target} --out {{out}}/speed{target}-{{started}}"
    return Command(f"speed{target}.json", "fastcifar speedrun", f"{out} --n {runs}", f"{out} {TINY_SPEEDRUN}")


def requires(module: str) -> Callable[[argparse.Namespace], str]:
    """Return a function for `Part.missing` of a part that needs an optional module."""
    return lambda _: "" if importlib.util.find_spec(module) else f"{module} is not installed"


def missing_airbench(arguments: argparse.Namespace) -> str:
    is_given = arguments.airbench and arguments.device == "cuda"
    return "" if is_given else "it needs a GPU and --airbench CHECKOUT"


NO_LOADER = {NEEDS_CUDA: "the loader is not available on this machine"}
TO_RESUME = {STOPPED: "stopped by the time limit; run the part again to resume"}

PARTS: dict[str, Part] = {
    # the training step, the loader and the execution that `train` chooses on this machine
    "doctor": Part(60, 60, [Command("doctor.json", "fastcifar doctor", "--check")]),
    # eager, compiled and captured steps, in fp32 and bf16, and host synchronizations
    "capture": Part(
        START + 2 * (COMPILE + CACHED) + 30,
        90,
        [Command("capture.json", "equality.py", "--steps 20", "--quick --steps 3")],
    ),
    "tests": Part(
        120,
        90,
        [Command("tests.txt", "pytest", "-o addopts= -m gpu -rs --durations=10 {gpu_tests}")],
        requires("pytest"),
    ),
    # images/s of the step, and end to end with the loader
    "bench-128": Part(
        START + COMPILE + CACHED + 2 * TRIALS + LIMITS,
        45,
        [bench("bench-128", "--what step,train --batch-size 128", "--what step,train")],
    ),
    "bench-1024": Part(
        START + COMPILE + CACHED + 2 * TRIALS + LIMITS,
        45,
        [bench("bench-1024", "--what step,train --batch-size 1024", "--what step,train")],
    ),
    "conv": Part(START + LIMITS + 30 * 1.5, 45, [bench("conv", "--what conv --batch-size 1024", "--what conv")]),
    "loaders": Part(
        3 * (START + CACHED + TRIALS),
        90,
        [
            bench(f"loader-{name}", f"--what loader --loader {name}", accepted=NO_LOADER)
            for name in ("tensor", "dali", "torchvision")
        ],
    ),
    "speed94": Part(START + 3 * COMPILE / 2 + 5 * 10, 90, [speedrun("94", 5)]),
    # training loops of other projects, each in a separate process
    "peers": Part(
        6 * (START + CACHED) + COMPILE,
        90,
        [Command("peers.txt", "peers/run.py", "--steps 60 --rounds 1", TINY_PEERS)],
        requires("torchvision"),
    ),
    "profile": Part(
        START + 2 * CACHED + TRIALS + LIMITS,
        45,
        [bench("profile", "--what step --profile {out}/step.trace.json")],
        after=summarize_trace,
    ),
    "modes": Part(
        START + 4 * CACHED + COMPILE + 12 * TRIALS + LIMITS,
        45,
        [
            bench(
                "modes",
                "--what step,train --batch-sizes 128,512 --modes eager,compiled,captured --chart {out}/modes.png",
                "--what step,train --batch-sizes 32,64 --modes eager --chart {out}/modes.png",
            )
        ],
    ),
    "infer": Part(START + COMPILE + 4 * TRIALS + LIMITS, 45, [bench("infer", "--what infer")]),
    "loader-lists": Part(
        5 * (2 * CACHED + 9 * 2),
        90,
        [Command("loader-lists.txt", "loaders.py", "--rounds 3", "--data synthetic:1000 --rounds 1 --augment flip")],
    ),
    "speed95": Part(START + 3 * COMPILE / 2 + 3 * 20, 90, [speedrun("95", 3)]),
    "speed96": Part(START + 3 * COMPILE / 2 + 3 * 45, 90, [speedrun("96", 3)]),
    "airbench": Part(240, 0, [Command("airbench.txt", "peers/airbench.py", "{airbench}")], missing_airbench),
    # se68 with the default recipe, which is row 3; as far as the budget allows
    "train": Part(
        120,
        60,
        [
            Command(
                "train.json",
                "fastcifar train",
                "--out {out}/train --resume auto",
                f"--out {{out}}/train --resume auto {TINY} --val-size 40 --epochs 1 --no-compile",
                TO_RESUME,
            )
        ],
    ),
}


def run_parts(names: list[str], arguments: argparse.Namespace, deadline: float) -> list[dict[str, Any]]:
    """Run the parts that fit before `deadline` (of `time.perf_counter`), and write the results after each one."""
    results = []
    for name in names:
        part = PARTS[name]
        expected_s = part.quick_s if arguments.quick else part.expected_s
        left_s = deadline - time.perf_counter() - ARCHIVE_S
        if reason := part.missing(arguments):
            result: dict[str, Any] = {"part": name, "not_run": reason}
        elif expected_s + GRACE_S > left_s:
            result = {"part": name, "not_run": f"it takes about {expected_s:.0f} s, and {left_s:.0f} s are left"}
        else:
            limit_s = left_s if name == names[-1] else min(left_s, LIMIT_FACTOR * expected_s + GRACE_S)
            print(f"{name}: about {expected_s:.0f} s, {left_s:.0f} s are left", flush=True)
            result = run_part(name, arguments, limit_s) | {"expected_s": expected_s}
        (arguments.out / f"{name}.part.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (arguments.out / "summary.md").write_text(format_summary(arguments.out, PARTS), encoding="utf-8")
        write_archive(arguments.out)
        results.append(result)
    return results


def run_part(name: str, arguments: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    """Run the commands of a part and return its result.

    A failed command does not end the part. No command is started in the last GRACE_S seconds of the time limit; a part
    whose commands have not all been run has failed.
    """
    started, results = time.perf_counter(), []
    problem = ""
    try:
        for command in PARTS[name].commands:
            left_s = limit_s - (time.perf_counter() - started)
            if left_s <= GRACE_S:
                problem = f"no time is left for {command.file}"
                break
            result = run_command(command, arguments, left_s)
            results.append(result)
            print(f"{name}: {command.file}, exit code {result['exit_code']}, {result['seconds']:.1f} s", flush=True)
        PARTS[name].after(arguments.out)
    except (OSError, ValueError, KeyError) as error:  # for example, a command that failed has not written its file
        problem = problem or f"{type(error).__name__}: {error}"
    passed = not problem and all(result["passed"] for result in results)
    document = {"part": name, "device": arguments.device, "quick": arguments.quick, "passed": passed}
    document |= {"seconds": round(time.perf_counter() - started, 1), **({"problem": problem} if problem else {})}
    return document | {"commands": results}


def interpreter_arguments(command: Command, arguments: argparse.Namespace) -> list[str]:
    """Return the arguments of the Python interpreter for a command."""
    options = command.quick if arguments.quick and command.quick is not None else command.options
    gpu_tests = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text("utf-8")]
    values = {"out": arguments.out, "airbench": arguments.airbench, "started": arguments.started}
    quoted = {name: shlex.quote(str(value)) for name, value in values.items()}
    words = shlex.split(options.format(**quoted, gpu_tests=shlex.join(map(str, gpu_tests))))
    program, *subcommand = command.program.split()
    if program == "pytest":
        return ["-m", "pytest", *words]
    if program == "fastcifar":
        return ["-m", "fastcifar", *subcommand, "--device", arguments.device, *words, "--json"]
    device = [] if program == "peers/airbench.py" else ["--device", arguments.device]
    return [str(ROOT / "bench" / program), *device, *words]


def command_environment(out: Path) -> dict[str, str]:
    """Return the environment variables of the commands; without a writable home folder, a temporary one is used."""
    environment = {**os.environ, "FASTCIFAR_BENCH_RESULTS": str(out / "results")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    if not os.access(environment.get("HOME", ""), os.W_OK):
        environment["HOME"] = tempfile.gettempdir()
        environment.pop("XDG_CACHE_HOME", None)
    return environment


def run_command(command: Command, arguments: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    """Run a command; its standard output goes to its file, its standard error to FILE.log.

    It receives SIGTERM GRACE_S seconds before the time limit, and SIGKILL at the limit.
    """
    started, words = time.perf_counter(), interpreter_arguments(command, arguments)
    log = arguments.out / f"{command.file}.log"
    with (arguments.out / command.file).open("w") as output, log.open("w") as messages:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=command_environment(arguments.out), stdout=output, stderr=messages,
            start_new_session=True,
        )  # fmt: skip
        ended = ""
        try:
            code = process.wait(limit_s - GRACE_S)
        except subprocess.TimeoutExpired:
            ended = "stopped by the time limit, "
            process.send_signal(signal.SIGTERM)
            try:
                code = process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                code = -signal.SIGKILL
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with its worker processes
            process.wait()
    passed = code == 0 or code in command.accepted
    lines = log.read_text("utf-8", errors="replace").splitlines()
    note = command.accepted.get(code, "") if passed else f"{ended}exit code {code}: {lines[-1][:200] if lines else ''}"
    return {
        "command": " ".join(words),
        "out": command.file,
        "exit_code": code,
        "seconds": round(time.perf_counter() - started, 1),
        "passed": passed,
        **({"note": note} if note else {}),
    }


def write_archive(out: Path) -> None:
    """Write an archive of the folder; a previous one is replaced when the new one is complete."""
    new = Path(f"{out}.tar.gz.new")
    with tarfile.open(new, "w:gz", compresslevel=1) as archive:
        archive.add(out, out.name)
    new.replace(f"{out}.tar.gz")


def main() -> None:
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description="Acceptance test on a machine with a GPU.", prog="gpu_acceptance")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"parts to run, by default all: {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="time budget of this call, by default 9")
    parser.add_argument("--out", type=Path, default=Path("acceptance"), help="folder of the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="use tiny sizes, to check that every part runs")
    parser.add_argument("--airbench", type=Path, metavar="CHECKOUT", help="checkout of KellerJordan/cifar10-airbench")
    arguments = parser.parse_args()
    for name in arguments.parts:
        if name not in PARTS:
            parser.error(f"no part {name!r}; choose from {', '.join(PARTS)}")
    if arguments.device == "cuda" and not has_cuda():
        print("gpu_acceptance: no CUDA device is visible; use --device cpu --quick to run without one", file=sys.stderr)
        sys.exit(NEEDS_CUDA)
    arguments.out = arguments.out.absolute()
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.airbench = arguments.airbench and arguments.airbench.absolute()
    arguments.started = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    results = run_parts(arguments.parts or list(PARTS), arguments, started + 60 * arguments.minutes)
    print(format_summary(arguments.out, PARTS))
    print(f"{arguments.out}.tar.gz")
    sys.exit(not all(part.get("passed", True) for part in results))


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
