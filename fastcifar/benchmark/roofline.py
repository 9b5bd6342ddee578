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

MATMUL_SIZES = {"cuda": (4096, 8192, 16384), "cpu": (512, 1024, 2048)}  # sides of the squares
COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}  # bytes, far beyond the caches
PASSES_PER_REPEAT = {"cuda": 5, "cpu": 1}  # of a stretch
MIN_REPEATS, MIN_SECONDS = 3, 0.5  # the best of at least so many, and of what fits into so long
NVIDIA_SMI_QUERY = (
    "nvidia-smi",
    "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu",
    "--format=csv,noheader,nounits",
)
NVIDIA_SMI_FIELDS = ("clock_mhz", "memory_clock_mhz", "power_w", "temperature_c")


@functools.cache
def measure_roofline(device: torch.device, precision: str) -> dict[str, float]:
    """`matmul_tflop_per_s` in `precision`, of the best size, and `copy_gb_per_s`, which counts reads and writes."""
    sides = MATMUL_SIZES[device.type]
    return {
        "matmul_tflop_per_s": max(measure_matmul_flop_per_s(device, precision, side) for side in sides) / 1e12,
        "copy_gb_per_s": measure_copy_bytes_per_s(device, COPY_BYTES[device.type]) / 1e9,
    }


def measure_matmul_flop_per_s(device: torch.device, precision: str, size: int) -> float:
    """Operations a second of the product of two square matrices; float32 on CUDA through TF32, as convolutions are."""
    left, right = (torch.randn(size, size, device=device).to(DTYPES[precision]) for _ in range(2))
    result = torch.empty_like(left)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else before)
    try:
        return 2 * size**3 / best_pass_seconds(lambda: torch.mm(left, right, out=result), device)
    finally:
        torch.set_float32_matmul_precision(before)


def measure_copy_bytes_per_s(device: torch.device, num_bytes: int) -> float:
    """Bytes a second, read and written, of a copy of `size` bytes within the device's memory."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * num_bytes / best_pass_seconds(lambda: target.copy_(source), device)


def best_pass_seconds(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one pass of `work`, in the best of a few stretches after a warm-up."""
    function()
    passes, found = PASSES_PER_REPEAT[device.type], [math.inf]
    deadline = time.perf_counter() + MIN_SECONDS
    while len(found) <= MIN_REPEATS or time.perf_counter() < deadline:
        found.append(time_passes(function, passes, device))
    return min(found) / passes


def time_passes(function: Callable[[], object], passes: int, device: torch.device) -> float:
    """Seconds of so many passes of `work`, from an idle device to an idle device."""
    clock = DeviceTimer(device)
    for _ in range(passes):
        function()
    return clock.elapsed_s()


class DeviceTimer:
    """Runs from when it is made, on an idle device: CUDA events on a GPU, the processor's clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self.start_event, self.end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.start_event.record(torch.cuda.current_stream(device))
        else:
            self.start_time = time.perf_counter()

    def elapsed_s(self) -> float:
        """Seconds until the device has done what it was given."""
        if self.device.type != "cuda":
            return time.perf_counter() - self.start_time
        self.end_event.record(torch.cuda.current_stream(self.device))
        torch.cuda.synchronize(self.device)
        return self.start_event.elapsed_time(self.end_event) / 1e3


def read_device_state(device: torch.device, function: Callable[[], object]) -> dict[str, float]:
    """Clocks and power while `busy` runs again and again: what `nvidia-smi`, or /proc/cpuinfo, shows of SHOWN."""
    if device.type == "cpu":
        return read_cpu_clock(Path("/proc/cpuinfo"))
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = ("-i", f"GPU-{uuid}") if uuid else ()
    try:
        asked = subprocess.Popen(
            [*NVIDIA_SMI_QUERY, *which], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:
        return {}
    while asked.poll() is None:
        function()
    torch.cuda.synchronize(device)
    assert asked.stdout is not None
    return parse_nvidia_smi_line(asked.stdout.read())


def parse_nvidia_smi_line(output: str) -> dict[str, float]:
    """The numbers of a line of `nvidia-smi`, by name; a value that it does not know is left out."""
    cells = (output.splitlines() or [""])[0].split(",")
    numbers = zip(NVIDIA_SMI_FIELDS, (cell.strip() for cell in cells), strict=False)
    return {name: float(text) for name, text in numbers if re.fullmatch(r"\d+(\.\d+)?", text)}


def read_cpu_clock(cpuinfo: Path) -> dict[str, float]:
    """The mean clock of the cores, in MHz; empty where the file does not say."""
    try:
        clocks = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return {}
    return {"clock_mhz": sum(map(float, clocks)) / len(clocks)} if clocks else {}
