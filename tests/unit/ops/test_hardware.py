"""Peaks by device name and by preset."""

from __future__ import annotations

import pytest

from cellray.core.errors import ConfigError
from cellray.ops.hardware import PRESETS, hardware_of, peak_flops


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
    ],
)
def test_peaks_of_devices(name, teraflops):
    assert peak_flops(name, "bf16") == teraflops * 1e12


def test_float32_is_not_tensor_cores_and_v100_has_no_bfloat16():
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert peak_flops("Tesla V100-SXM2-32GB", "bf16") is None
    assert peak_flops("Tesla V100-SXM2-32GB", "fp32") == 15.7e12


@pytest.mark.parametrize("name", ["AMD EPYC 7763", "NVIDIA A1000 Laptop", "", "NVIDIA A10G"])
def test_unknown_devices_have_no_peak(name):
    assert peak_flops(name, "bf16") is None


def test_presets_agree_with_devices():
    for preset, device in (("a100", "A100"), ("h100", "H100"), ("h200", "H200"), ("l40s", "L40S")):
        assert PRESETS[preset].peak("bf16") == peak_flops(f"NVIDIA {device}", "bf16")
        assert PRESETS[preset].peak("fp32") == peak_flops(f"NVIDIA {device}", "fp32")


def test_hardware_by_name_and_by_numbers():
    assert hardware_of("H100") is PRESETS["h100"]
    own = hardware_of("mi300x:1307:192")
    assert (own.name, own.peak("bf16"), own.memory) == ("mi300x", 1307e12, 192e9)


@pytest.mark.parametrize("text", ["x:1", "x:a:3", ":3:4", "x:0:4", "x:1:2:3"])
def test_bad_numbers_are_refused(text):
    with pytest.raises(ConfigError, match="NAME:TFLOPS:GB"):
        hardware_of(text)


def test_a_wrong_name_gets_a_suggestion():
    with pytest.raises(ConfigError, match="Did you mean 'h200'"):
        hardware_of("h20O")
