"""What the device could do at most, measured: its matrix product and its copy; and how it is doing just now.

The shares that a benchmark reaches are of these figures, not of a data sheet's. Clocks and power are read where the
machine shows them, and left out where it does not.
"""

from __future__ import annotations

import functools
import math
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastcifar.training.step import DTYPES

MATRICES = {"cuda": (4096, 8192, 16384), "cpu": (512, 1024, 2048)}  # sides of the squares
COPIED = {"cuda": 2**30, "cpu": 2**28}  # bytes, far beyond the caches
PASSES = {"cuda": 5, "cpu": 1}  # of a stretch
STRETCHES, SECONDS = 3, 0.5  # the best of at least so many, and of what fits into so long
QUERY = ("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu", "--format=csv,noheader,nounits")
SHOWN = ("clock_mhz", "memory_clock_mhz", "power_w", "temperature_c")


@functools.cache
def limits(device: torch.device, precision: str) -> dict[str, float]:
    """`matmul_tflop_per_s` in `precision`, of the best size, and `copy_gb_per_s`, which counts reads and writes."""
    sides = MATRICES[device.type]
    return {
        "matmul_tflop_per_s": max(matmul_flop_per_s(device, precision, side) for side in sides) / 1e12,
        "copy_gb_per_s": copy_bytes_per_s(device, COPIED[device.type]) / 1e9,
    }


def matmul_flop_per_s(device: torch.device, precision: str, side: int) -> float:
    """Operations a second of the product of two square matrices; float32 on CUDA through TF32, as convolutions are."""
    left, right = (torch.randn(side, side, device=device).to(DTYPES[precision]) for _ in range(2))
    result = torch.empty_like(left)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else before)
    try:
        return 2 * side**3 / shortest(lambda: torch.mm(left, right, out=result), device)
    finally:
        torch.set_float32_matmul_precision(before)


def copy_bytes_per_s(device: torch.device, size: int) -> float:
    """Bytes a second, read and written, of a copy of `size` bytes within the device's memory."""
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * size / shortest(lambda: target.copy_(source), device)


def shortest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one pass of `work`, in the best of a few stretches after a warm-up."""
    work()
    passes, found = PASSES[device.type], [math.inf]
    deadline = time.perf_counter() + SECONDS
    while len(found) <= STRETCHES or time.perf_counter() < deadline:
        found.append(stretch(work, passes, device))
    return min(found) / passes


def stretch(work: Callable[[], object], passes: int, device: torch.device) -> float:
    """Seconds of so many passes of `work`, from an idle device to an idle device."""
    clock = Stopwatch(device)
    for _ in range(passes):
        work()
    return clock.seconds()


class Stopwatch:
    """Runs from when it is made, on an idle device: CUDA events on a GPU, the processor's clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.start.record(torch.cuda.current_stream(device))
        else:
            self.started = time.perf_counter()

    def seconds(self) -> float:
        """Seconds until the device has done what it was given."""
        if self.device.type != "cuda":
            return time.perf_counter() - self.started
        self.end.record(torch.cuda.current_stream(self.device))
        torch.cuda.synchronize(self.device)
        return self.start.elapsed_time(self.end) / 1e3


def state(device: torch.device, busy: Callable[[], object]) -> dict[str, float]:
    """Clocks and power while `busy` runs again and again: what `nvidia-smi`, or /proc/cpuinfo, shows of SHOWN."""
    if device.type == "cpu":
        return cpu_state(Path("/proc/cpuinfo"))
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = ("-i", f"GPU-{uuid}") if uuid else ()
    try:
        asked = subprocess.Popen([*QUERY, *which], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return {}
    while asked.poll() is None:
        busy()
    torch.cuda.synchronize(device)
    assert asked.stdout is not None
    return gpu_state(asked.stdout.read())


def gpu_state(answer: str) -> dict[str, float]:
    """The numbers of a line of `nvidia-smi`, by name; a value that it does not know is left out."""
    cells = (answer.splitlines() or [""])[0].split(",")
    numbers = zip(SHOWN, (cell.strip() for cell in cells), strict=False)
    return {name: float(text) for name, text in numbers if re.fullmatch(r"\d+(\.\d+)?", text)}


def cpu_state(cpuinfo: Path) -> dict[str, float]:
    """The mean clock of the cores, in MHz; empty where the file does not say."""
    try:
        clocks = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return {}
    return {"clock_mhz": sum(map(float, clocks)) / len(clocks)} if clocks else {}
