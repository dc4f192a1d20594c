"""What devices can do at most, and what they hold: one table, from the makers' public data sheets."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Device(NamedTuple):
    """What one device can do at most."""

    kind: str  # how its name begins in JAX
    tflops: float  # dense bfloat16 products, TFLOP/s
    memory: float | None = None  # GB a program may fill
    bandwidth: float | None = None  # of its memory, GB/s
    link: float | None = None  # GB/s that one device sends along one mesh axis within a slice or host
    network: float | None = None  # GB/s that one device sends between slices or hosts


# TPUs: cloud.google.com/tpu/docs, one page per version. `link` is two of a torus's links, one each way, of the four (v5e, v6e) or six (v5p) that
# share the chip's interconnect: what a mesh axis has that lies on one axis of the torus. `memory` as XLA's compiler limits it.
# GPUs: NVIDIA's data sheets, SXM unless it says PCIe. `link` is NVLink 4 in one direction, `network` one 400 Gb/s adapter per GPU; `memory` leaves 5% to
# the runtime. Those without memory are not planned for (`svdp_jax.plan`).
DEVICES = {
    "a100": Device("NVIDIA A100", 312),
    "h100-pcie": Device("NVIDIA H100 PCIe", 756),
    "h100": Device("NVIDIA H100", 989, memory=80.7, bandwidth=3352, link=450, network=50),
    "h200": Device("NVIDIA H200", 989, memory=143.2, bandwidth=4800, link=450, network=50),
    "b200": Device("NVIDIA B200", 2250),
    "v4": Device("TPU v4", 275),
    "v5e": Device("TPU v5 lite", 197, memory=16.9, bandwidth=819, link=100, network=3.1),
    "v5p": Device("TPU v5", 459, memory=102.8, bandwidth=2765, link=200, network=6.25),
    "v6e": Device("TPU v6 lite", 918, memory=33.5, bandwidth=1640, link=200, network=12.5),
}


def named(device_kind: str) -> Device | None:
    """The device that JAX calls so; None for one that is not known, as a CPU."""
    return max((device for device in DEVICES.values() if device_kind.startswith(device.kind)), key=lambda device: len(device.kind), default=None)


def peak_tflops(device_kind: str) -> float | None:
    """A device's peak in bfloat16; None for one that is not known."""
    device = named(device_kind)
    return device.tflops if device else None


def peak_memory() -> float | None:
    """GB that the fullest of this process's devices has held at most; None where devices do not tell."""
    peaks = [stats.get("peak_bytes_in_use") for device in jax.local_devices() if (stats := device.memory_stats())]
    return max(peaks) / 1e9 if peaks and None not in peaks else None
