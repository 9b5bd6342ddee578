"""Acceptance test on a machine with a GPU, in parts of at most ten minutes, each with its own result.

    scripts/gpu_acceptance [PART ...] --out DIR [--device cpu --quick] [--airbench CHECKOUT]

A part is an entry of PARTS: commands that run one after another, each in a separate process. DIR receives the output
and the files of every command, and PART.part.json with the exit codes and seconds; DIR.tar.gz is an archive of DIR.
Another call with other parts adds to both. A training run that was stopped by the time limit is resumed by the next
call. Without a GPU the exit code is 8, except with `--device cpu`. `--quick` uses tiny sizes, to check that every part
runs. The part `tests` needs pytest.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIMIT_S = 570.0  # time limit of a part
GRACE_S = 25.0  # time between SIGTERM and SIGKILL, for writing a checkpoint
NEEDS_CUDA, STOPPED = 8, 143  # exit codes
ROW_3 = ("--augment", "crop:4:zero,flip,rotate:5,autoaugment:cifar10")  # all other options have their defaults
TINY = ("--data", "synthetic:200", "--arch", "resnet", "--blocks", "1,1", "--channels", "8,16", "--batch-size", "32")


@dataclass(frozen=True)
class Settings:
    """Settings of all parts.

    out: folder of the results.
    device: "cuda" or "cpu".
    quick: whether tiny sizes are used.
    airbench: a checkout of cifar10-airbench.
    """

    out: Path
    device: str
    quick: bool
    airbench: Path | None = None


@dataclass(frozen=True)
class Command:
    """Arguments of the Python interpreter, and the name of the file for its standard output.

    accepted: exit code other than 0 that is no failure -> the reason.
    """

    name: str
    arguments: tuple[str, ...]
    accepted: dict[int, str] = field(default_factory=dict)


Part = Generator[Command]


def fastcifar(name: str, *arguments: str, accepted: dict[int, str] | None = None) -> Command:
    """Return a command of the package that prints a JSON document."""
    return Command(f"{name}.json", ("-m", "fastcifar", *arguments, "--json"), accepted or {})


def script(name: str, file: str, *arguments: str) -> Command:
    """Return a command that runs a script in bench/."""
    return Command(name, (str(ROOT / "bench" / file), *arguments))


def bench(settings: Settings, name: str, *arguments: str) -> Command:
    """Return a command that runs `fastcifar bench`, with three trials or with one of a tiny network."""
    sizes = (*TINY, "--trials", "1") if settings.quick else ("--trials", "3")
    return fastcifar(name, "bench", "--device", settings.device, *sizes, *arguments)


def tests(_: Settings) -> Part:
    """Run the tests that need a GPU. Other test files are not collected, since they may import missing packages."""
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text("utf-8"))
    yield Command("tests.txt", ("-m", "pytest", "-m", "gpu", "-rs", "--durations=10", *map(str, files)))


def capture(settings: Settings) -> Part:
    """Compare the eager, the compiled and the CUDA-graph training step."""
    steps = ("--quick", "--steps", "3") if settings.quick else ("--steps", "20")
    yield script("capture.json", "equality.py", "--device", settings.device, *steps)


def loaders(settings: Settings) -> Part:
    """Measure every data loader alone, and all of them in turn for several lists of augmentations."""
    for name in ("tensor", "dali", "torchvision"):
        compile_flag = ("--no-compile",) if settings.quick else ()
        command = bench(settings, f"loader-{name}", "--what", "loader", "--loader", name, *compile_flag)
        yield replace(command, accepted={NEEDS_CUDA: "the loader is not available on this machine"})
    if (ROOT / "bench" / "loaders.py").is_file() and not settings.quick:
        yield script("loaders.txt", "loaders.py", "--device", settings.device, "--rounds", "3")


def benches(settings: Settings) -> Part:
    """Measure loader, step and training for several batch sizes and modes, with one command for each batch size."""
    modes = ["eager", *(["compiled", "captured"] if not settings.quick else [])]
    for size in ("32", "64") if settings.quick else ("128", "512", "1024"):
        chart = ("--chart", str(settings.out / f"bench-{size}.png"))
        yield bench(settings, f"bench-{size}", "--batch-sizes", size, "--modes", ",".join(modes), *chart)


def kernels(settings: Settings) -> Part:
    """Measure inference and every convolution."""
    compile_flag = ("--no-compile",) if settings.quick else ()
    chart = ("--chart", str(settings.out / "kernels.png"))
    yield bench(settings, "kernels", "--what", "infer,conv", *chart, *compile_flag)


def peers(settings: Settings) -> Part:
    """Compare the training loops of other projects with that of fastcifar."""
    if settings.quick:
        sizes = ("--arch", "speednet", "--batch-size", "8", "--data", "synthetic:100", "--steps", "1", "--rounds", "1")
        yield script(
            "peers.txt", "peers/run.py", "--device", settings.device, *sizes, "--loops", "source_loop,eager_bf16"
        )
    else:
        yield script("peers.txt", "peers/run.py", "--device", settings.device, "--steps", "60", "--rounds", "2")


def airbench(settings: Settings) -> Part:
    """Run the scripts of cifar10-airbench, if a checkout of it is given."""
    if settings.airbench and settings.device == "cuda":
        yield script("airbench.txt", "peers/airbench.py", str(settings.airbench))
    else:
        print("airbench: skipped, because it needs a GPU and --airbench CHECKOUT", flush=True)


def train(settings: Settings) -> Part:
    """Train se68 with the recipe row3. A run that is stopped by the time limit is resumed by the next call."""
    run = settings.out / "train"
    sizes = (*TINY, "--val-size", "40", "--epochs", "1", "--no-compile") if settings.quick else ROW_3
    arguments = ("train", *sizes, "--device", settings.device, "--out", str(run), "--resume", "auto")
    yield fastcifar("train", *arguments, accepted={STOPPED: "stopped by the time limit; run the part again to resume"})


def speedruns(settings: Settings) -> Part:
    """Measure the time to each target accuracy over several seeds, with one command for each target."""
    for target, n in {"94": 10, "95": 5, "96": 3}.items():
        folder = settings.out / f"speed{target}"
        out = ("--append" if folder.exists() else "--out", str(folder))  # another call adds further seeds
        tiny = "--data synthetic:600 --width 0.05 --epochs 1 --image-size 32 --batch-size 100 --no-compile --n 2"
        sizes = tiny.split() if settings.quick else ("--n", str(n))
        yield fastcifar(f"speedrun-{target}", "speedrun", "--target", target, "--device", settings.device, *out, *sizes)


def profile(settings: Settings) -> Part:
    """Record a trace of the training step, and sum its time by kernel."""
    trace = settings.out / "step.trace.json"
    mode = ("--no-compile",) if settings.quick else ()
    yield bench(settings, "profile", "--what", "step", "--profile", str(trace), *mode)
    events = json.loads(trace.read_text("utf-8"))["traceEvents"]
    (settings.out / "profile.txt").write_text(
        format_kernel_times(events, "kernel" if settings.device == "cuda" else "cpu_op")
    )
    (settings.out / "step.trace.json.gz").write_bytes(gzip.compress(trace.read_bytes()))
    trace.unlink()


PARTS: dict[str, Callable[[Settings], Part]] = {
    "tests": tests,
    "capture": capture,
    "loaders": loaders,
    "bench": benches,
    "kernels": kernels,
    "peers": peers,
    "airbench": airbench,
    "train": train,
    "speedruns": speedruns,
    "profile": profile,
}


def format_kernel_times(events: list[dict[str, Any]], category: str, max_rows: int = 40) -> str:
    """Return a table of the events of one category of a Chrome trace by name: share, milliseconds and calls.

    The names with the most time are first.
    """
    durations: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == category and "dur" in event:
            durations[event["name"]] += event["dur"]
            calls[event["name"]] += 1
    total = sum(durations.values()) or 1
    lines = [
        f"{100 * us / total:6.1f} % {us / 1e3:10.3f} ms {calls[name]:6} {name[:160]}"
        for name, us in durations.most_common(max_rows)
    ]
    return "\n".join([f"{'share':>8} {'time':>13} {'calls':>6} {category}", *lines, ""])


def run_part(name: str, settings: Settings, limit_s: float = LIMIT_S) -> dict[str, Any]:
    """Run the commands of a part, write its result to NAME.part.json, and return it.

    A failed command does not end the part. No command is started in the last GRACE_S seconds of the time limit; a part
    whose commands have not all been run has failed.
    """
    started, results = time.perf_counter(), []
    problem = ""
    try:
        for command in PARTS[name](settings):
            left_s = limit_s - (time.perf_counter() - started)
            if left_s <= GRACE_S:
                problem = f"no time is left for {command.name}"
                break
            result = run_command(command, settings.out, left_s)
            results.append(result)
            print(f"{name}: {command.name}, exit code {result['exit_code']}, {result['seconds']:.1f} s", flush=True)
    except (OSError, ValueError, KeyError) as error:  # the part reads a file that a failed command has not written
        problem = f"{type(error).__name__}: {error}"
    passed = not problem and all(result["passed"] for result in results)
    document = {"part": name, "device": settings.device, "quick": settings.quick, "passed": passed, "commands": results}
    document |= {"seconds": round(time.perf_counter() - started, 1), **({"problem": problem} if problem else {})}
    (settings.out / f"{name}.part.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document


def run_command(command: Command, out: Path, limit_s: float) -> dict[str, Any]:
    """Run a command; its standard output goes to NAME, its standard error to NAME.log.

    It receives SIGTERM GRACE_S seconds before the time limit, and SIGKILL at the limit.
    """
    environment = {**os.environ, "FASTCIFAR_BENCH_RESULTS": str(out / "results")}
    paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    started = time.perf_counter()
    with (out / command.name).open("w") as output, (out / f"{command.name}.log").open("w") as messages:
        process = subprocess.Popen(
            [sys.executable, *command.arguments], cwd=ROOT, env=environment, stdout=output, stderr=messages,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit_s - GRACE_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            try:
                code = process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                code = -signal.SIGKILL
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with its worker processes
            process.wait()
    return {
        "command": " ".join(command.arguments),
        "out": command.name,
        "exit_code": code,
        "seconds": round(time.perf_counter() - started, 1),
        "passed": code == 0 or code in command.accepted,
        **({"note": command.accepted[code]} if code in command.accepted else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Acceptance test on a machine with a GPU.", prog="gpu_acceptance")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"parts to run, by default all: {', '.join(PARTS)}")
    parser.add_argument(
        "--out", type=Path, default=Path("acceptance"), help="folder of the results, by default acceptance"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="use tiny sizes, to check that every part runs")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_S, metavar="SECONDS", help="time limit of a part, by default 570"
    )
    parser.add_argument("--airbench", type=Path, metavar="CHECKOUT", help="checkout of KellerJordan/cifar10-airbench")
    arguments = parser.parse_args()
    for name in arguments.parts:
        if name not in PARTS:
            parser.error(f"no part {name!r}; choose from {', '.join(PARTS)}")
    if arguments.device == "cuda" and not has_cuda():
        print("gpu_acceptance: no CUDA device is visible; use --device cpu --quick to run without one", file=sys.stderr)
        sys.exit(NEEDS_CUDA)
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    settings = Settings(out, arguments.device, arguments.quick, arguments.airbench and arguments.airbench.absolute())
    results = [run_part(name, settings, arguments.limit) for name in arguments.parts or PARTS]
    with tarfile.open(f"{out}.tar.gz", "w:gz") as archive:
        archive.add(out, out.name)
    for part in results:
        print(f"{'passed' if part['passed'] else 'FAILED':7} {part['seconds']:7.1f} s  {part['part']}")
    print(f"{out}.tar.gz")
    sys.exit(not all(part["passed"] for part in results))


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
