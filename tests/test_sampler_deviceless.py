"""The sampler's programs at full size, by the compiler for an H100: what they hold, and which kernels they call. Run as a script, it compiles them."""

import dataclasses
import pathlib
import re
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deviceless import device_of, needs_cuda, run_for
from jax.sharding import SingleDeviceSharding

from svdp_jax import pipeline, sampler
from svdp_jax.config import Config
from svdp_jax.models import attention, tokens
from svdp_jax.models.autoencoder import make_autoencoder
from svdp_jax.models.transformer import Transformer, abstract_inputs

LIMIT_GB = 24  # of a device that is to sample at 576 x 576


@needs_cuda
@pytest.mark.slow
def test_a_window_of_576_pixels_fits_in_24_gb():
    result = run_for("cuda", pathlib.Path(__file__))
    held = {name: float(gb) for name, (gb, *_) in result.items() if name.endswith("_gb")}
    beside = held["weights_gb"] + held["autoencoder_gb"]  # on the device all the time
    assert 5 < beside < 6
    for program in "denoise", "encode", "decode":
        assert beside + held[f"{program}_gb"] < LIMIT_GB, (program, held)
    assert set(result["calls"]) == {"__cublas$lt$matmul", "mosaic_gpu_v2", "BIAS_GELU"}, "GELU inside the product before it"


def main(platform: str) -> None:
    device, config = device_of(platform), Config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
    on_device = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)), tree)
    array = lambda *shape, dtype=jnp.float32: on_device(jax.ShapeDtypeStruct(shape, dtype))
    gigabytes = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) / 1e9
    height, width, _ = config.latent_shape
    frames, size = config.data.frames, config.data.size

    def compile(name, traced) -> str:
        compiled = traced.lower(lowering_platforms=(platform,)).compile()
        memory = compiled.memory_analysis()
        print(f"{name}_gb", (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 1e9)
        return compiled.as_text()

    params = pipeline.abstract_weights(config, device)
    z, _, conditions, constants = on_device(abstract_inputs(config.model, batch=1, frames=frames, history=config.data.history, height=height, width=width))
    passes = sampler.guided_passes(config.sample.guidance, with_history=True)
    signals = tuple(tokens.at_level(conditions, level, dropped=config.model.dropped) for level in passes)
    levels, number = array(config.sample.steps + 1), array(dtype=jnp.int32)
    print("weights_gb", gigabytes(params))
    inputs = params, constants, z, signals, array(len(passes)), levels, number, number
    text = compile("denoise", sampler.denoise.trace(Transformer(config.model), *inputs))
    print("calls", *sorted(set(re.findall(r'custom_call_target="([^"]+)"', text)) | {"BIAS_GELU"} & set(re.findall(r'"epilogue":"(\w+)"', text))))

    coder, pictures = make_autoencoder(config.autoencoder), array(1, frames, size, size, 3, dtype=np.uint8)
    autoencoder = on_device(nn.meta.unbox(jax.eval_shape(coder.init, jax.random.key(0), array(1, size, size, 3))["params"]))
    print("autoencoder_gb", gigabytes(autoencoder))
    compile("encode", pipeline._coded.trace(coder, None, "encode", autoencoder, pictures))
    compile("decode", pipeline._coded.trace(coder, None, "decode", autoencoder, z))


if __name__ == "__main__":
    with attention.compiling_for("hopper"):
        main(*sys.argv[1:])
