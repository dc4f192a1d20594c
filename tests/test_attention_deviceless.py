"""Kernels for GPUs and TPUs, forward and backward at full size, by their own compilers. Run as a script, it compiles one."""

import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import pytest
from deviceless import device_of, needs_cuda, needs_tpu, run_for
from jax.sharding import SingleDeviceSharding

from svdp_jax.models.attention import attention, choose_backend

# groups, length, heads, head size: text + three images of 36 x 36 per frame; the same, odd; 19 frames together
FULL_SIZE = [(16, 4042, 24, 64), (16, 4041, 24, 64), (1, 24624, 24, 64)]
AUTOENCODER = (4, 5184, 1, 512)  # its attention, 72 x 72 latents


@needs_cuda
@pytest.mark.parametrize("shape", FULL_SIZE)
def test_compiles_for_h100(shape):
    result = run_for("cuda", pathlib.Path(__file__), "hopper", *shape)
    assert result["backend"] == ["hopper"]
    assert result["forward"] == ["mosaic_gpu_v2"]
    assert result["calls"] == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"], "where gradients are asked for"
    assert int(result["temp_bytes"][0]) < 2e9  # all scores in 16 bits: 12 GB and 29 GB


@needs_tpu
@pytest.mark.parametrize("shape", [*FULL_SIZE, AUTOENCODER])
def test_compiles_for_tpu_v5p(shape):
    result = run_for("tpu", pathlib.Path(__file__), "tpu", *shape)
    assert result["backend"] == ["pallas"]
    assert result["calls"] == ["splash_mha_dkv", "splash_mha_dq", "splash_mha_fwd"]
    assert int(result["temp_bytes"][0]) < 4e9


def main(platform: str, kernels: str, *shape: str) -> None:
    groups, length, heads, head_size = map(int, shape)
    on_device = SingleDeviceSharding(device_of(platform))
    x = jax.ShapeDtypeStruct((1, groups, length, heads, head_size), jnp.bfloat16, sharding=on_device)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=on_device)
    backend = choose_backend(kernels, x.shape, x.shape, x.dtype)
    attend = lambda q, k, v, lengths: attention(q, k, v, lengths, bound=jnp.float32(8), backend=backend)
    step = jax.jit(jax.value_and_grad(lambda *inputs: attend(*inputs).astype(jnp.float32).sum(), (0, 1, 2)))
    compile = lambda function: function.trace(x, x, x, lengths).lower(lowering_platforms=(platform,)).compile()
    calls = lambda compiled: sorted(set(re.findall(r"__cudnn[$]\w+|splash_mha_[a-z]+|mosaic_gpu_v2", compiled.as_text())))
    compiled = compile(step)
    print("backend", backend)
    print("forward", *calls(compile(jax.jit(attend))))
    print("calls", *calls(compiled))
    print("temp_bytes", compiled.memory_analysis().temp_size_in_bytes)


if __name__ == "__main__":
    main(*sys.argv[1:])
