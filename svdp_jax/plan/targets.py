"""What can be compiled for: names of targets, and the compilers of their devices.

    v5p:2x2x2, v5e:8x8, v6e:4x4    a TPU slice by its topology; 2xv5e:8x8 is two slices
    h100x8, h200x16                GPUs, in hosts of 8
    cpu:8                          virtual devices of this machine: no compiler to install, but another backend's memory
"""

from __future__ import annotations

import importlib.util
import math
import re
from typing import Any, Literal, NamedTuple

from svdp_jax.config import ConfigError
from svdp_jax.peaks import DEVICES, Device

GPUS_PER_HOST = 8


PLANNED = {name: device for name, device in DEVICES.items() if device.memory}

_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory} shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{name}"
"""
_GPUS = {  # what XLA asks a GPU for, which is not there
    "h100": _GPU.format(bandwidth=3_352_320_000_000, memory=84_978_434_048, name="NVIDIA H100 80GB HBM3"),
    "h200": _GPU.format(bandwidth=4_800_000_000_000, memory=150_754_820_096, name="NVIDIA H200"),
}


class Target(NamedTuple):
    """Devices, and how they are wired."""

    name: str
    platform: Literal["tpu", "cuda", "cpu"]
    kind: str  # of device: a name in peaks.DEVICES; "cpu"
    count: int  # devices, in all
    groups: int  # TPU slices or hosts of GPUs, between which the network is slow
    topology: str  # of one group, for the compiler

    @property
    def device(self) -> Device | None:
        """What a device can do; None for virtual ones."""
        return PLANNED.get(self.kind)


def parse(name: str) -> Target:
    """The target of this name; ConfigError, with what there is, for one that does not exist."""
    if match := re.fullmatch(r"(?:(\d+)x)?(v\d[ep]):(\d+(?:x\d+)+)", name):
        slices, kind, topology = int(match[1] or 1), match[2], match[3]
        if kind in PLANNED and slices > 0 and (chips := math.prod(map(int, topology.split("x")))):
            return Target(name, "tpu", kind, slices * chips, slices, f"{kind}:{topology}")
    if match := re.fullmatch(r"(h\d00)x(\d+)", name):
        kind, count = match[1], int(match[2])
        if kind in PLANNED and count and (count <= GPUS_PER_HOST or count % GPUS_PER_HOST == 0):
            hosts = max(count // GPUS_PER_HOST, 1)
            return Target(name, "cuda", kind, count, hosts, f"{hosts}x1x{count // hosts}")
    if (match := re.fullmatch(r"cpu:(\d+)", name)) and int(match[1]):
        return Target(name, "cpu", "cpu", int(match[1]), 1, match[1])
    raise ConfigError(
        f"--target {name}: there is v5p:2x2x2, v5e:8x8, v6e:4x4 and the like (2xv5e:8x8 is two slices), h100xN and h200xN (up to {GPUS_PER_HOST}, or whole "
        f"hosts of {GPUS_PER_HOST}), and cpu:N"
    )


def check_installed(target: Target) -> None:
    """ConfigError, with what to install, where the target's compiler is not there."""
    module, extra = {"tpu": ("libtpu", "tpu"), "cuda": ("jax_cuda13_plugin", "cuda"), "cpu": ("jax", "")}[target.platform]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"--target {target.name} needs its compiler, which needs no such device: pip install -e '.[{extra}]'")


def environment(target: Target) -> dict[str, str]:
    """What a process that compiles for the target has to have in its environment before JAX is imported."""
    own = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "1"}  # warnings of the compiler are read (`rows.spilled`)
    if target.platform != "cpu":
        own["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0"  # as on the devices
    if target.platform == "tpu":
        own |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # several at once
    if target.platform == "cpu":
        own["JAX_NUM_CPU_DEVICES"] = str(target.count)
    return own


def devices(target: Target) -> list[Any]:
    """The target's devices, in a process that has its environment. RuntimeError, by the compiler, for a topology that does not exist."""
    import jax
    from jax.experimental import topologies

    if target.platform == "cpu":
        return jax.devices()
    if target.platform == "cuda":
        return topologies.get_topology_desc(platform="cuda", topology=target.topology, target_config=_GPUS[target.kind]).devices
    return topologies.get_topology_desc(platform="tpu", topology_name=target.topology, num_slices=target.groups).devices
