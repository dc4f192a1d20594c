"""Programs compiled for devices that are not there, by the devices' own compilers (jax[cuda13], jax[tpu]).

Each in a process of its own: the compilers read environment variables when they load.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from jax.experimental import topologies

needs_cuda = pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax[cuda13], no GPU")
needs_tpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs jax[tpu], no TPU")

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
TPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"}


def run_for(platform: str, script: pathlib.Path, *arguments: object) -> dict[str, list[str]]:
    """What a script that compiles for "cuda" (an H100) or "tpu" (v5p) prints: the first word of each line -> the others."""
    root = str(pathlib.Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"} | (TPU if platform == "tpu" else {})
    done = subprocess.run([sys.executable, str(script), platform, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}


def device_of(platform: str) -> jax.Device:
    """In such a script: the device."""
    if platform == "cuda":
        return topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H100).devices[0]
    return topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices[0]
