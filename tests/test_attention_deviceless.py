"""cuDNN and the TPU kernel, forward and backward at full size, by their own compilers on a machine without either device.

Each runs in a process of its own: the compilers read environment variables when they load. Skipped where `jax[cuda13]`
or `jax[tpu]` is not installed.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

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

COMPILE = """
import os, re, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from svdp_jax.models.attention import attention, choose_backend

platform = sys.argv[1]
groups, length, heads, head_size = map(int, sys.argv[2:])
if platform == "cuda":
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=os.environ["TARGET"])
else:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=os.environ["TARGET"])
on_device = SingleDeviceSharding(topology.devices[0])
x = jax.ShapeDtypeStruct((1, groups, length, heads, head_size), jnp.bfloat16, sharding=on_device)
lengths = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=on_device)
backend = choose_backend(platform, x.shape, x.shape, x.dtype)
run = lambda q, k, v, lengths: attention(q, k, v, lengths, backend=backend).astype(jnp.float32).sum()
step = jax.jit(jax.value_and_grad(run, (0, 1, 2)))
compiled = step.trace(x, x, x, lengths).lower(lowering_platforms=(platform,)).compile()
print("backend", backend)
print("calls", *sorted(set(re.findall(r"__cudnn[$]\\w+|splash_mha_[a-z]+", compiled.as_text()))))
print("temp_bytes", compiled.memory_analysis().temp_size_in_bytes)
"""

# groups, length, heads, head size: text + three images of 36 x 36 per frame; the same, odd; 19 frames together
FULL_SIZE = [(16, 4042, 24, 64), (16, 4041, 24, 64), (1, 24624, 24, 64)]
AUTOENCODER = (4, 5184, 1, 512)  # its attention, 72 x 72 latents


def compile_for(platform: str, target: str, *shape: int) -> dict[str, list[str]]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TARGET": target}
    if platform == "tpu":
        environment |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    command = [sys.executable, "-c", COMPILE, platform, *map(str, shape)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax[cuda13], no GPU")
@pytest.mark.parametrize("shape", FULL_SIZE)
def test_compiles_for_h100(shape):
    result = compile_for("cuda", H100, *shape)
    assert result["backend"] == ["cudnn"]
    assert result["calls"] == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    assert int(result["temp_bytes"][0]) < 2e9  # all scores in 16 bits: 12 GB and 29 GB


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs jax[tpu], no TPU")
@pytest.mark.parametrize("shape", [*FULL_SIZE, AUTOENCODER])
def test_compiles_for_tpu_v5p(shape):
    result = compile_for("tpu", "v5p:2x2x1", *shape)
    assert result["backend"] == ["pallas"]
    assert result["calls"] == ["splash_mha_dkv", "splash_mha_dq", "splash_mha_fwd"]
    assert int(result["temp_bytes"][0]) < 4e9
