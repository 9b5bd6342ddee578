"""The measured limits of the device, and the parsing of its clocks, power and temperature."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastcifar.benchmark import roofline

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
