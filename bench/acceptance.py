"""What a machine with a GPU has to show, in parts of at most ten minutes, each with its result.

    scripts/gpu_acceptance [PART ...] --out DIR [--device cpu --quick] [--airbench CHECKOUT]

A part is a row of PARTS: commands one after another, each in a process of its own. DIR keeps what each printed and
wrote, PART.part.json with its exit codes and seconds, and DIR.tar.gz holds all of it; another call with other parts
adds to it. A part that was stopped by its limit goes on when called again where that is possible (train). Without a GPU
it exits 8, but for `--device cpu`; `--quick` takes tiny sizes, to see that every part runs. It needs what the package
needs, and pytest for `tests`.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIMIT_S = 570.0  # of a part, its start included
GRACE_S = 25.0  # to write a checkpoint in
NEEDS_CUDA, STOPPED = 8, 143  # exit codes
ROW_3 = ("--augment", "crop:4:zero,flip,rotate:5,autoaugment:cifar10")  # the rest of it are the defaults
TINY = ("--data", "synthetic:200", "--arch", "resnet", "--blocks", "1,1", "--channels", "8,16", "--batch-size", "32")


@dataclass(frozen=True)
class Setting:
    """What the parts share: `out` for results, "cuda" or "cpu", tiny sizes or not, a checkout of cifar10-airbench."""

    out: Path
    device: str
    quick: bool
    airbench: Path | None = None


@dataclass(frozen=True)
class Command:
    """`arguments` for this Python; what it prints goes to `name`. `fine`: exit codes that are no failure."""

    name: str
    arguments: tuple[str, ...]
    fine: dict[int, str] = field(default_factory=dict)


Part = Generator[Command]


def fastcifar(name: str, *arguments: str, fine: dict[int, str] | None = None) -> Command:
    """A command of the package that ends with a JSON document."""
    return Command(f"{name}.json", ("-m", "fastcifar", *arguments, "--json"), fine or {})


def script(name: str, file: str, *arguments: str) -> Command:
    """A script of bench/."""
    return Command(name, (str(ROOT / "bench" / file), *arguments))


def bench(setting: Setting, name: str, *arguments: str) -> Command:
    """`fastcifar bench` with three trials, or one of a tiny network."""
    sizes = (*TINY, "--trials", "1") if setting.quick else ("--trials", "3")
    return fastcifar(name, "bench", "--device", setting.device, *sizes, *arguments)


def tests(_: Setting) -> Part:
    """The tests that only a GPU can pass. Only their files: others may import what is not there."""
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text("utf-8"))
    yield Command("tests.txt", ("-m", "pytest", "-m", "gpu", "-rs", "--durations=10", *map(str, files)))


def capture(setting: Setting) -> Part:
    """Eager = compiled = captured."""
    steps = ("--quick", "--steps", "3") if setting.quick else ("--steps", "20")
    yield script("capture.json", "equality.py", "--device", setting.device, *steps)


def loaders(setting: Setting) -> Part:
    """Every loader alone, by the clock; and beside each other, for lists of augmentations."""
    for name in ("tensor", "dali", "torchvision"):
        made = bench(
            setting, f"loader-{name}", "--what", "loader", "--loader", name, *("--no-compile",) * setting.quick
        )
        yield Command(made.name, made.arguments, {NEEDS_CUDA: "the loader is not available here"})
    if (ROOT / "bench" / "loaders.py").is_file() and not setting.quick:
        yield script("loaders.txt", "loaders.py", "--device", setting.device, "--rounds", "3")


def benches(setting: Setting) -> Part:
    """Loader, step and training over batch sizes and modes; a size is a command, so that a limit costs one of them."""
    modes = ["eager", *(["compiled", "captured"] if not setting.quick else [])]
    for size in ("32", "64") if setting.quick else ("128", "512", "1024"):
        chart = ("--chart", str(setting.out / f"bench-{size}.png"))
        yield bench(setting, f"bench-{size}", "--batch-sizes", size, "--modes", ",".join(modes), *chart)


def kernels(setting: Setting) -> Part:
    """The forward pass, and every convolution alone."""
    how = ("--no-compile",) if setting.quick else ()
    yield bench(setting, "kernels", "--what", "infer,conv", "--chart", str(setting.out / "kernels.png"), *how)


def peers(setting: Setting) -> Part:
    """Other people's training loops beside ours."""
    if setting.quick:
        sizes = ("--arch", "speednet", "--batch-size", "8", "--data", "synthetic:100", "--steps", "1", "--rounds", "1")
        yield script(
            "peers.txt", "peers/run.py", "--device", setting.device, *sizes, "--loops", "source_loop,eager_bf16"
        )
    else:
        yield script("peers.txt", "peers/run.py", "--device", setting.device, "--steps", "60", "--rounds", "2")


def airbench(setting: Setting) -> Part:
    """cifar10-airbench's own scripts, where a checkout of it was given."""
    if setting.airbench and setting.device == "cuda":
        yield script("airbench.txt", "peers/airbench.py", str(setting.airbench))
    else:
        print("airbench: left out; it needs a GPU and --airbench CHECKOUT", flush=True)


def train(setting: Setting) -> Part:
    """A whole run of se68 by row 3 of the published recipes; stopped at the limit it goes on when called again."""
    run = setting.out / "train"
    sizes = (*TINY, "--val-size", "40", "--epochs", "1", "--no-compile") if setting.quick else ROW_3
    wanted = ("train", *sizes, "--device", setting.device, "--out", str(run), "--resume", "auto")
    yield fastcifar("train", *wanted, fine={STOPPED: "stopped by the limit; call the part again to go on"})


def speedruns(setting: Setting) -> Part:
    """Time to each accuracy: seeds in one process; a target is a command, so that a limit costs one of them."""
    for target, n in {"94": 10, "95": 5, "96": 3}.items():
        folder = setting.out / f"speed{target}"
        out = ("--append" if folder.exists() else "--out", str(folder))  # called again, it adds the next seeds
        tiny = "--data synthetic:600 --width 0.05 --epochs 1 --image-size 32 --batch-size 100 --no-compile --n 2"
        sizes = tiny.split() if setting.quick else ("--n", str(n))
        yield fastcifar(f"speedrun-{target}", "speedrun", "--target", target, "--device", setting.device, *out, *sizes)


def profile(setting: Setting) -> Part:
    """A trace of the step as it runs fastest, and what it spent its time on."""
    trace = setting.out / "step.trace.json"
    mode = ("--no-compile",) if setting.quick else ()
    yield bench(setting, "profile", "--what", "step", "--profile", str(trace), *mode)
    events = json.loads(trace.read_text("utf-8"))["traceEvents"]
    (setting.out / "profile.txt").write_text(by_kernel(events, "kernel" if setting.device == "cuda" else "cpu_op"))
    (setting.out / "step.trace.json.gz").write_bytes(gzip.compress(trace.read_bytes()))
    trace.unlink()


PARTS: dict[str, Callable[[Setting], Part]] = {
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


def by_kernel(events: list[dict[str, Any]], category: str, most: int = 40) -> str:
    """The events of a chrome trace in one category, by name: share, milliseconds, calls; the longest first."""
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == category and "dur" in event:
            spent[event["name"]] += event["dur"]
            calls[event["name"]] += 1
    whole = sum(spent.values()) or 1
    lines = [
        f"{100 * us / whole:6.1f} % {us / 1e3:10.3f} ms {calls[name]:6} {name[:160]}"
        for name, us in spent.most_common(most)
    ]
    return "\n".join([f"{'share':>8} {'time':>13} {'calls':>6} {category}", *lines, ""])


def run_part(name: str, setting: Setting, limit_s: float = LIMIT_S) -> dict[str, Any]:
    """The part's commands, also after one that failed, until less than GRACE_S is left of the limit, in which none
    could be ended in peace; the result is written to NAME.part.json. A part that was cut short has not passed."""
    started, done = time.perf_counter(), []
    problem = ""
    try:
        for command in PARTS[name](setting):
            left_s = limit_s - (time.perf_counter() - started)
            if left_s <= GRACE_S:
                problem = f"no time was left for {command.name}"
                break
            done.append(run_command(command, setting.out, left_s))
            print(f"{name}: {command.name}, exit code {done[-1]['exit_code']}, {done[-1]['seconds']:.1f} s", flush=True)
    except (OSError, ValueError, KeyError) as error:  # what a failed command has not written
        problem = f"{type(error).__name__}: {error}"
    passed = not problem and all(command["passed"] for command in done)
    found = {"part": name, "device": setting.device, "quick": setting.quick, "passed": passed, "commands": done}
    found |= {"seconds": round(time.perf_counter() - started, 1), **({"problem": problem} if problem else {})}
    (setting.out / f"{name}.part.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def run_command(command: Command, out: Path, limit_s: float) -> dict[str, Any]:
    """Runs it, its output to NAME and its messages to NAME.log; at the limit SIGTERM, then SIGKILL."""
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
                os.killpg(process.pid, signal.SIGKILL)  # its workers too
            process.wait()
    shown = {"command": " ".join(command.arguments), "out": command.name, "exit_code": code}
    noted = {"note": command.fine[code]} if code in command.fine else {}
    seconds = round(time.perf_counter() - started, 1)
    return {**shown, "seconds": seconds, "passed": code == 0 or code in command.fine, **noted}


def main() -> None:
    parser = argparse.ArgumentParser(description="What a machine with a GPU has to show.", prog="gpu_acceptance")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; default: all")
    parser.add_argument("--out", type=Path, default=Path("acceptance"), help="folder of the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that the parts run")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="SECONDS", help="of a part")
    parser.add_argument("--airbench", type=Path, metavar="CHECKOUT", help="of KellerJordan/cifar10-airbench")
    arguments = parser.parse_args()
    for name in arguments.parts:
        if name not in PARTS:
            parser.error(f"no part {name!r}; choose from {', '.join(PARTS)}")
    if arguments.device == "cuda" and not has_cuda():
        print(
            "gpu_acceptance: no CUDA device is visible; `--device cpu --quick` tries the parts without", file=sys.stderr
        )
        sys.exit(NEEDS_CUDA)
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    setting = Setting(out, arguments.device, arguments.quick, arguments.airbench and arguments.airbench.absolute())
    found = [run_part(name, setting, arguments.limit) for name in arguments.parts or PARTS]
    with tarfile.open(f"{out}.tar.gz", "w:gz") as archive:
        archive.add(out, out.name)
    for part in found:
        print(f"{'passed' if part['passed'] else 'FAILED':7} {part['seconds']:7.1f} s  {part['part']}")
    print(f"{out}.tar.gz")
    sys.exit(not all(part["passed"] for part in found))


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
