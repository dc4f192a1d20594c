"""On an NVIDIA GPU, in bfloat16, with its attention kernels: a window and a training step's gradient are as near to float32 as bfloat16 on a CPU is.

Needs nothing of the other tests' setup, so that a machine with jax, flax, optax, einops and pytest alone can run it:

    python -m pytest --noconftest -o addopts= tests/test_on_gpu.py tests/test_attention.py
"""

import contextlib
import dataclasses
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1])]
from tiny_network import TINY, draw_inputs, redrawn  # noqa: E402

from svdp_jax import sampler, train_state  # noqa: E402
from svdp_jax.config import LevelConfig, SampleConfig  # noqa: E402
from svdp_jax.models import attention  # noqa: E402
from svdp_jax.models.autoencoder import make_autoencoder  # noqa: E402
from svdp_jax.models.layers import COMPILER  # noqa: E402
from svdp_jax.models.tokens import position_table  # noqa: E402
from svdp_jax.models.transformer import Transformer  # noqa: E402
from svdp_jax.types import Batch, Frozen  # noqa: E402

needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")

# 64 tokens a frame, so that keys are 384 and 195 (which is odd, and padded) and a kernel is chosen; heads of 64, as the paper's.
CONFIG = dataclasses.replace(
    TINY,
    model=dataclasses.replace(TINY.model, width=128, table_size=24),
    data=dataclasses.replace(TINY.data, size=64),
    train=dataclasses.replace(TINY.train, remat="attention", stage2=LevelConfig(nothing=0.1, source=0.1, driving=0.3, history=0.5)),
)
NEAR = 1.5  # times as far from float32 as bfloat16 on a CPU; that one attention forgets one key of its hundreds is for test_attention.py to see
FLOAT32, BFLOAT16 = CONFIG, dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, dtype="bfloat16"))


def cpu():
    return jax.devices("cpu")[0]


@contextlib.contextmanager
def on(device):
    """Arrays and programs go to this device. For a CPU, by a quick compiler: what it compiles runs once."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", device.platform == "cpu")
    try:
        with jax.default_device(device), attention.compiling_for("cpu") if device.platform == "cpu" else contextlib.nullcontext():
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@functools.cache
def params():
    """Of which none is zero, in float32, on the host."""
    with on(cpu()):
        fresh = jax.jit(functools.partial(train_state.init_params, CONFIG))(jax.random.key(0))
        return jax.device_get(redrawn(nn.meta.unbox(fresh)))


def window(config, device, backend):
    """Latents [B, F, h, w, C] of a window with history, four passes a step."""
    with on(device):
        _, _, conditions, constants = jax.device_get(draw_inputs(config.model, batch=1, frames=4, history=2, height=16, width=16))
        model, sample = Transformer(config.model, backend), SampleConfig(steps=3, chunk=2)
        return np.asarray(sampler.sample_window(model, params(), constants, conditions, jax.random.key(3), sample=sample, history=2))


def gradient(config, device):
    """The gradient [parameters] of the second stage's loss on four samples, one of each level of conditioning; and the program."""
    data, model = config.data, config.model
    with on(device):
        autoencoder = nn.meta.unbox(make_autoencoder(config.autoencoder).init(jax.random.key(0), jnp.zeros((1, data.size, data.size, 3)))["params"])
        text, pooled = np.ones((model.text_tokens, model.text_width), np.float32), np.ones(model.pooled_width, np.float32)
        constants = train_state.constants_of(config, Frozen(autoencoder, position_table(model), text, pooled))
        frames = lambda *lead: np.random.default_rng(0).integers(0, 256, (4, *lead, data.size, data.size, 3), np.uint8)
        batch = Batch(target=frames(data.frames), history=frames(data.history), source=frames(), driving=frames(data.frames))
        draws = train_state.draw(config, 4, jax.random.key(1), with_history=True)._replace(level=jnp.arange(4))
        compute = jax.jit(functools.partial(train_state.gradient, config, with_history=True), compiler_options=COMPILER)
        program = compute.lower(params(), batch, draws, autoencoder, constants).compile()
        found, _ = program(params(), batch, draws, autoencoder, constants)
        return jax.device_get(found), program.as_text()


def apart(one, other):
    """The norm of the difference, over the norm of `other`."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    off, whole = np.sum([[np.square(a - b).sum(dtype=np.float64), np.square(b).sum(dtype=np.float64)] for a, b in pairs], axis=0)
    return float(np.sqrt(off / whole))


@needs_gpu
def test_a_window_is_as_near_to_float32_as_bfloat16_is():
    exact, rounded = window(FLOAT32, cpu(), "plain"), window(BFLOAT16, cpu(), "plain")
    ours = window(BFLOAT16, jax.devices()[0], "auto")
    print(f"from float32: bfloat16 on the CPU {apart(rounded, exact):.2e}, on the GPU {apart(ours, exact):.2e}")
    assert 1e-4 < apart(rounded, exact) < 0.05
    assert apart(ours, exact) < NEAR * apart(rounded, exact)


@needs_gpu
def test_a_gradient_is_as_near_to_float32_as_bfloat16_is():
    """Of all parameters together, and of those that make queries, keys and values, on which nothing but attention's backward pass acts."""
    (exact, _), (rounded, _), (ours, program) = gradient(FLOAT32, cpu()), gradient(BFLOAT16, cpu()), gradient(BFLOAT16, jax.devices()[0])
    assert "fmhaSoftmaxBackward" in program
    of_qkv = lambda tree: [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if "qkv" in jax.tree_util.keystr(path)]
    for part in (lambda tree: tree), of_qkv:
        bound = NEAR * apart(part(rounded), part(exact))
        print(f"from float32: bfloat16 on the CPU {bound / NEAR:.2e}, on the GPU {apart(part(ours), part(exact)):.2e}")
        assert 1e-4 < bound < 0.05
        assert apart(part(ours), part(exact)) < bound


@needs_gpu
def test_float32_on_the_gpu_is_that_of_the_cpu():
    """Products in full precision, and XLA's attention: no TF32 anywhere."""
    assert apart(window(FLOAT32, jax.devices()[0], "auto"), window(FLOAT32, cpu(), "plain")) < 1e-4
