"""The measured limits of the device, and the parsing of its clocks, power and temperature."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastcifar.benchmark import roofline
from fastcifar.device import Environment

CPU = torch.device("cpu")


def test_rates_from_operations_bytes_and_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "fastest_run_s", lambda function: (function(), 0.5)[1])
    assert roofline.measure_matmul_flop_per_s(CPU, "fp32", 8) == 2 * 8**3 / 0.5
    monkeypatch.setitem(roofline.MATMUL_SIZES, "cpu", (8, 16))
    monkeypatch.setitem(roofline.COPY_BYTES, "cpu", 2**12)
    roofline.measure_roofline.cache_clear()
    limits = roofline.measure_roofline(CPU, "bf16")
    assert (limits.matmul_tflop_per_s, limits.copy_gb_per_s) == (2 * 16**3 / 0.5e12, 2 * 2**12 / 0.5e9)
    roofline.measure_roofline.cache_clear()


@pytest.mark.parametrize(
    ("device_name", "precision", "rate"),
    [
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H200", "tf32", 494.7),
        ("NVIDIA H200", "fp32", None),
        ("NVIDIA H100 80GB HBM3", "fp16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("Tesla T4", "fp16", None),
    ],
)
def test_published_rates_are_found_by_the_name_of_the_gpu(device_name: str, precision: str, rate: float | None) -> None:
    assert roofline.find_published_rate(device_name, precision) == rate


def test_the_brief_measurement_of_the_cpu_adapts_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of two matrices of 512 rows takes 20 ms in fp32; bf16 is 50 times slower. The time limit is 0.1 s."""
    now, sizes = 0.0, {"bf16": [], "fp32": []}

    def multiply(left: torch.Tensor, right: torch.Tensor) -> None:
        nonlocal now
        precision = "bf16" if left.dtype == torch.bfloat16 else "fp32"
        sizes[precision].append(len(left))
        now += (50 if precision == "bf16" else 1) * 0.02 * (len(left) / 512) ** 3

    monkeypatch.setattr(roofline.time, "perf_counter", lambda: now)
    monkeypatch.setattr(roofline.torch, "mm", multiply)
    rates = roofline.measure_cpu_matmul.__wrapped__()
    fp32 = 2 * 512**3 / 0.02 / 1e12
    assert rates == {"bf16": pytest.approx(fp32 / 50), "fp32": pytest.approx(fp32)}
    assert sizes == {"bf16": [256], "fp32": [256, 512, 512, 512, 512]}
    assert now < 0.3


def test_the_rates_are_measured_only_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "measure_cpu_matmul", lambda: {"fp32": 1.0})
    cuda = {"cpu": None, "cuda": "13"}
    monkeypatch.setattr(roofline, "collect_environment", lambda device: Environment(cuda=cuda[device]))
    rates = [roofline.measure_environment(device).matmul_tflop_per_s for device in ("cpu", "cuda")]
    assert rates == [{"fp32": 1.0}, None]


def test_matmul_rate_is_plausible() -> None:
    assert 1e7 < roofline.measure_matmul_flop_per_s(CPU, "fp32", 128) < 1e14


def test_unavailable_device_state_is_omitted(tmp_path: Path) -> None:
    assert roofline.parse_nvidia_smi_line("1980, 2619, 512.33, 45\n") == {
        "clock_mhz": 1980, "memory_clock_mhz": 2619, "power_w": 512.33, "temperature_c": 45
    }  # fmt: skip
    partly = roofline.parse_nvidia_smi_line("1980, [N/A], [Not Supported], 45")
    assert partly == {"clock_mhz": 1980, "temperature_c": 45}
    assert roofline.parse_nvidia_smi_line("") == roofline.parse_nvidia_smi_line("No devices were found") == {}
    (tmp_path / "cpuinfo").write_text("cpu MHz\t\t: 2000.0\nflags: a\ncpu MHz\t\t: 3000.0\n")
    assert roofline.read_cpu_clock(tmp_path / "cpuinfo") == {"clock_mhz": 2500}
    assert roofline.read_cpu_clock(tmp_path / "none") == {}
