"""What devices can do at most, and what they hold."""

from __future__ import annotations

import jax

# Dense bfloat16 products, in TFLOP/s, from the makers' data sheets, by the beginning of what JAX calls the device.
PEAK_TFLOPS = {
    "NVIDIA A100": 312,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100": 989,
    "NVIDIA H200": 989,
    "NVIDIA B200": 2250,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5": 459,  # v5p
    "TPU v6 lite": 918,
}


def peak_tflops(device_kind: str) -> float | None:
    """A device's peak in bfloat16; None for one that is not known, as a CPU."""
    names = [name for name in PEAK_TFLOPS if device_kind.startswith(name)]
    return PEAK_TFLOPS[max(names, key=len)] if names else None


def peak_memory() -> float | None:
    """GB that the fullest of this process's devices has held at most; None where devices do not tell."""
    peaks = [stats.get("peak_bytes_in_use") for device in jax.local_devices() if (stats := device.memory_stats())]
    return max(peaks) / 1e9 if peaks and None not in peaks else None
