"""Accelerators by name: dense peak rates and memory, for MFU and for estimates."""

from __future__ import annotations

__all__ = ["peak_flops"]

# Dense (not sparse) peaks of the matrix units in FLOP/s, by part of the device's name, the first
# that fits; from the vendor's data sheets.
_PEAKS: tuple[tuple[str, float, float], ...] = (
    # name, bf16, fp32 (TF32 where the card has it, which torch uses only when told: plain fp32)
    ("h200", 989e12, 67e12),
    ("h100 pcie", 756e12, 51e12),
    ("h100 nvl", 835e12, 60e12),
    ("h100", 989e12, 67e12),
    ("a100", 312e12, 19.5e12),
    ("l40s", 362e12, 91.6e12),
    ("a10", 125e12, 31.2e12),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak of a device in FLOP/s; None for a CPU and for cards that are not known."""
    name = device_name.lower()
    for part, bf16, fp32 in _PEAKS:
        if part in name:
            return bf16 if precision == "bf16" else fp32
    return None
