"""Measure the limits of the device (matrix product, memory copy), and read its clocks, power and temperature."""

from __future__ import annotations

import functools
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastcifar.device import Environment, collect_environment
from fastcifar.reporting.benchmark_tables import DeviceLimits
from fastcifar.training.step import DTYPES

MATMUL_SIZES = {"cuda": (4096, 8192, 16384), "cpu": (512, 1024, 2048)}  # rows and columns of the square matrices
COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}  # larger than any cache
CPU_MATMUL_S = 0.1  # approximate duration of the measurement in each precision that every timed result records
MIN_SECONDS = 0.5  # minimum duration of a measurement; the result is its fastest block of runs
# part of the name of a GPU -> published TFLOP/s of dense matrix products in bf16 and fp16, and in TF32 (data sheets of
# NVIDIA, for SXM modules unless the name says PCIe)
PUBLISHED_TFLOP_PER_S = {
    "H200": (989.4, 494.7), "H100 PCIe": (756.0, 378.0), "H100": (989.4, 494.7), "A100": (312.0, 156.0),
}  # fmt: skip
# field of `nvidia-smi` -> key in the results
NVIDIA_SMI_FIELDS = {
    "clocks.sm": "clock_mhz", "clocks.mem": "memory_clock_mhz", "power.draw": "power_w",
    "temperature.gpu": "temperature_c",
}  # fmt: skip


@functools.cache
def measure_roofline(device: torch.device, precision: str) -> DeviceLimits:
    """Return the highest rate of a matrix product in `precision`, and the rate of a copy (bytes read and written)."""
    flop_per_s = max(measure_matmul_flop_per_s(device, precision, side) for side in MATMUL_SIZES[device.type])
    num_bytes = COPY_BYTES[device.type]
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.zeros_like(source)
    bytes_per_s = 2 * num_bytes / fastest_run_s(lambda: target.copy_(source))
    return DeviceLimits(
        matmul_tflop_per_s=flop_per_s / 1e12,
        copy_gb_per_s=bytes_per_s / 1e9,
        published_tflop_per_s=find_published_rate(torch.cuda.get_device_name(device), precision)
        if device.type == "cuda"
        else None,
    )


@functools.cache
def measure_cpu_matmul() -> dict[str, float]:
    """Return the highest rates of matrix products on the CPU in TFLOP/s, in "bf16" and "fp32", measured briefly.

    The size of the matrices grows as long as the time allows: bf16 can be 50 times slower without its instructions.
    """
    rates: dict[str, float] = {}
    for precision in ("bf16", "fp32"):
        size, seconds, deadline = 128, 0.0, time.perf_counter() + CPU_MATMUL_S
        while (left_s := deadline - time.perf_counter()) > seconds:
            size *= 2 if left_s > 12 * seconds else 1  # twice the size takes eight times as long
            matrix = torch.ones(size, size, dtype=DTYPES[precision])
            started = time.perf_counter()
            torch.mm(matrix, matrix)
            seconds = time.perf_counter() - started
            rates[precision] = max(rates.get(precision, 0.0), 2 * size**3 / seconds / 1e12)
    return rates


def measure_environment(device: str) -> Environment:
    """Return the environment of this process with, if `device` is a CPU, the measured rates of matrix products."""
    environment = collect_environment(device)
    changes = {} if environment.cuda else {"matmul_tflop_per_s": measure_cpu_matmul()}
    return environment.model_copy(update=changes)


def find_published_rate(device_name: str, precision: str) -> float | None:
    """Return the published TFLOP/s of dense matrix products, or None if they are not known."""
    column = {"bf16": 0, "fp16": 0, "tf32": 1}.get(precision)
    rates = next((rates for part, rates in PUBLISHED_TFLOP_PER_S.items() if part in device_name), None)
    return None if column is None or rates is None else rates[column]


def measure_matmul_flop_per_s(device: torch.device, precision: str, size: int) -> float:
    """Return the rate of a product of two matrices [size,size]."""
    left, right = (torch.randn(size, size, device=device).to(DTYPES[precision]) for _ in range(2))
    result = torch.empty_like(left)
    previous_precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        return 2 * size**3 / fastest_run_s(lambda: torch.mm(left, right, out=result))
    finally:
        torch.set_float32_matmul_precision(previous_precision)


def fastest_run_s(function: Callable[[], object]) -> float:
    """Return the seconds of one call of `function`, in the fastest block of calls after a warm-up."""
    from torch.utils.benchmark import Timer  # prints a warning where a CUDA toolkit but no GPU is found

    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=MIN_SECONDS).times)


def read_device_state(device: torch.device, function: Callable[[], object]) -> dict[str, float]:
    """Return clocks, power and temperature while `function` runs repeatedly; unavailable values are omitted."""
    if device.type == "cpu":
        return read_cpu_clock(Path("/proc/cpuinfo"))
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    command = ["nvidia-smi", f"--query-gpu={','.join(NVIDIA_SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    command += ["-i", f"GPU-{uuid}"] if uuid else []
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return {}
    while process.poll() is None:
        function()
    torch.cuda.synchronize(device)
    assert process.stdout is not None
    return parse_nvidia_smi_line(process.stdout.read())


def parse_nvidia_smi_line(output: str) -> dict[str, float]:
    """Parse the numbers in the output of `nvidia-smi`; unavailable values are omitted."""
    cells = (output.splitlines() or [""])[0].split(",")
    numbers = zip(NVIDIA_SMI_FIELDS.values(), (cell.strip() for cell in cells), strict=False)
    return {name: float(text) for name, text in numbers if re.fullmatch(r"\d+(\.\d+)?", text)}


def read_cpu_clock(cpuinfo: Path) -> dict[str, float]:
    """Return the mean clock frequency of the CPU cores in MHz, or an empty dictionary if it is not available."""
    try:
        clocks = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return {}
    return {"clock_mhz": sum(map(float, clocks)) / len(clocks)} if clocks else {}
