"""The PyTorch network that the benchmark runs beside ours is the same network."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from tiny_network import TINY, draw_inputs, fresh_params, redrawn

from svdp_jax import sampler
from svdp_jax.models.transformer import Transformer

torch = pytest.importorskip("torch")
sys.path.insert(0, str(ROOT / "benchmarks"))
import pytorch_reference as reference  # noqa: E402

COEFFICIENTS = [-1.0, -0.5, 1.5, 1.0]


def both(dtype):
    """One step of four passes, ours and PyTorch's, as numpy arrays."""
    config = dataclasses.replace(TINY.model, dtype=dtype)
    params = redrawn(fresh_params())
    z, _, conditions, constants = draw_inputs(config, batch=2)
    model = Transformer(config, "plain")
    signals = sampler.signals_of(model, params, constants, conditions, range(4))
    levels = jnp.array([0.75, 0.5])
    ours, _ = sampler.denoise(model, params, constants, z + 0, signals, jnp.array(COEFFICIENTS), levels, jnp.int32(0), jnp.int32(1))
    network = reference.Reference(config, *jax.tree.map(torch.from_dlpack, (params, constants)), dtype=getattr(torch, dtype), device="cpu")
    tensor = lambda x: None if x is None else torch.from_numpy(np.array(x))
    passes = [reference.Inputs(*map(tensor, one[:3])) for one in signals]
    with torch.inference_mode():
        theirs = reference.step(network, tensor(z), 0.75, 0.5, passes, COEFFICIENTS, prediction=config.prediction)
    return np.asarray(ours), theirs.numpy(), np.asarray(z)


def test_a_step_is_the_same_in_float32():
    ours, theirs, _ = both("float32")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.slow
def test_a_step_is_the_same_within_bfloat16():
    ours, theirs, z = both("bfloat16")
    exact, _, _ = both("float32")
    apart = lambda one, other: np.linalg.norm(one - other) / np.linalg.norm(exact - z)
    assert apart(ours, theirs) < 2 * max(apart(ours, exact), apart(theirs, exact)) < 0.1
