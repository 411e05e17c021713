"""What accelerators can do: dense matrix peaks and memory, by preset and by device name.

Peaks are those of the vendor's data sheets for dense products on tensor cores, without sparsity
(where a sheet prints the sparse number only, half of it); fp32 is the plain float32 rate, because
torch does not use TF32 for products unless asked.
"""

from __future__ import annotations

from dataclasses import dataclass

from cellray.core.errors import ConfigError, did_you_mean

__all__ = ["PRESETS", "Hardware", "hardware_of", "peak_flops"]

GIB = 1 << 30


@dataclass(frozen=True)
class Hardware:
    """One accelerator, or a CPU worker.

    Attributes:
        name: what it is called.
        bf16: dense peak in FLOP/s, None where it has no bfloat16 tensor cores.
        fp32: peak in FLOP/s.
        memory: bytes a process can use, 0 where that is not the question.
        is_gpu: False for a CPU worker, whose utilisation is never quoted.
    """

    name: str
    bf16: float | None
    fp32: float
    memory: float
    is_gpu: bool = True

    def peak(self, precision: str) -> float | None:
        """Peak in FLOP/s of ``bf16`` or ``fp32``."""
        return self.bf16 if precision == "bf16" else self.fp32


# A CPU worker is no accelerator: the rate is what a core sustains in float32 products, no peak.
_CPU = Hardware("cpu", None, 2e10, 0.0, is_gpu=False)

# Data sheets: A100 (nvidia.com/a100), H100 (nvidia.com/h100: SXM, PCIe, NVL), H200, HGX B200, L40S,
# L40, L4, A10, V100, GH200. The card's memory is what the sheet says; about 2 % of it is taken by
# error correction, the driver and the context before a process gets any.
PRESETS = {
    "a100": Hardware("a100", 312e12, 19.5e12, 80 * GIB),
    "a100-40gb": Hardware("a100-40gb", 312e12, 19.5e12, 40 * GIB),
    "h100": Hardware("h100", 989e12, 67e12, 80 * GIB),
    "h100-pcie": Hardware("h100-pcie", 756e12, 51e12, 80 * GIB),
    "h100-nvl": Hardware("h100-nvl", 835e12, 60e12, 94 * GIB),
    "h200": Hardware("h200", 989e12, 67e12, 141e9),
    "b200": Hardware("b200", 2250e12, 75e12, 180e9),
    "l40s": Hardware("l40s", 362e12, 91.6e12, 48 * GIB),
    "v100": Hardware("v100", None, 15.7e12, 32 * GIB),
    "cpu": _CPU,
}

# Words of a device's name, as torch gives it, to (bf16, fp32); the first row whose words are all
# there counts, so special forms stand before plain ones.
_DEVICES: tuple[tuple[tuple[str, ...], float | None, float], ...] = (
    (("gh200",), 989e12, 67e12),
    (("h200", "nvl"), 835e12, 60e12),
    (("h200",), 989e12, 67e12),
    (("h100", "pcie"), 756e12, 51e12),
    (("h100", "nvl"), 835e12, 60e12),
    (("h100",), 989e12, 67e12),
    (("b200",), 2250e12, 75e12),
    (("a100",), 312e12, 19.5e12),
    (("l40s",), 362e12, 91.6e12),
    (("l40",), 181e12, 90.5e12),
    (("l4",), 121e12, 30.3e12),
    (("a10",), 125e12, 31.2e12),
    (("v100", "pcie"), None, 14.0e12),
    (("v100",), None, 15.7e12),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak of a device in FLOP/s, None where none is known.

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it.
        precision: ``bf16`` or ``fp32``.
    """
    words = device_name.lower().replace("-", " ").replace("_", " ").split()
    for wanted, bf16, fp32 in _DEVICES:
        if all(word in words for word in wanted):
            return bf16 if precision == "bf16" else fp32
    return None


def hardware_of(text: str) -> Hardware:
    """A preset by name, or ``NAME:TFLOPS:GB`` for hardware of one's own.

    Raises:
        ConfigError: no such preset, or the three parts are not a name and two positive numbers.
    """
    if ":" in text:
        return _own(text)
    found = PRESETS.get(text.lower())
    if found is None:
        raise ConfigError(
            f"no hardware preset '{text}'.{did_you_mean(text.lower(), PRESETS)} There are "
            f"{', '.join(PRESETS)}; for other hardware give NAME:TFLOPS:GB, e.g. mi300x:1307:192"
        )
    return found


def _own(text: str) -> Hardware:
    parts = text.split(":")
    try:
        name, tflops, gigabytes = parts[0], float(parts[1]), float(parts[2])
        fits = len(parts) == 3 and name != "" and tflops > 0 and gigabytes > 0
    except (IndexError, ValueError):
        fits = False
    if not fits:
        raise ConfigError(
            f"hardware '{text}' is not NAME:TFLOPS:GB (dense peak of the run's precision in "
            "TFLOP/s, memory in GB), e.g. mi300x:1307:192"
        )
    return Hardware(name, tflops * 1e12, tflops * 1e12, gigabytes * 1e9)
