"""For tests of the network: the tiny config, parameters that hide nothing behind a zero, and inputs."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from svdp_jax import train_state
from svdp_jax.config import load_config
from svdp_jax.models import tokens
from svdp_jax.models.transformer import abstract_inputs, layer_groups

TINY = load_config(pathlib.Path(__file__).parents[1] / "configs" / "tiny.py")


@functools.cache
def fresh_params():
    """Parameters of the tiny network as training starts with them."""
    return nn.meta.unbox(jax.jit(functools.partial(train_state.init_params, TINY))(jax.random.key(0)))


def redrawn(params, *, seed=0, temporal=True):
    """`params` in which all that starts at zero (gates, biases, modulation and final kernels) is drawn from N(0, 0.2).

    At the start the gates of the temporal blocks are zero, so that a broken block would go unseen. `temporal=False` leaves
    these gates, and only these, as they are.
    """
    generator = np.random.default_rng(seed)
    drawn = {}
    for path, leaf in flatten_dict(nn.meta.unbox(params)).items():
        value = np.array(leaf)
        if not value.any():
            value = 0.2 * generator.normal(size=value.shape).astype(np.float32)
        if not temporal and "temporal" in path and "modulation" in path:
            value[..., 2, :] = leaf[..., 2, :]  # shift, scale, gate
        drawn[path] = jnp.asarray(value)
    return unflatten_dict(drawn)


def draw_inputs(config, *, batch=2, frames=3, history=2, height=4, width=4, seed=1):
    """Random arguments of the network: (z, t, Conditions, Constants); the positions are those of the sin-cos table."""
    generator = np.random.default_rng(seed)
    shapes = abstract_inputs(config, batch=batch, frames=frames, history=history, height=height, width=width)
    z, _, conditions, constants = jax.tree.map(lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), jnp.float32), shapes)
    crops = tokens.shifted_crops(tokens.position_table(config), height // config.patch, width // config.patch)
    return z, jnp.linspace(0.9, 0.3, batch), conditions, constants._replace(positions=crops)


def assert_close(ours, theirs, tolerance=1e-5):
    """Equal up to float32's rounding, by the largest entry of each array."""
    for (path, one), (_, other) in zip(*(jax.tree_util.tree_leaves_with_path(tree) for tree in (ours, theirs)), strict=True):
        limit = tolerance * max(1, np.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=0, atol=limit, err_msg=jax.tree_util.keystr(path))


def linear(params, x):
    return x @ params["kernel"] + params["bias"]


def each_layer(params):
    """(kind, parameters) of every layer of the tiny network, taken out of the scanned stacks."""
    for kind, layers in layer_groups(TINY.model):
        for index in range(layers):
            yield kind, params[kind] if kind == "last" else jax.tree.map(lambda leaf, index=index: leaf[index], params[kind])
