"""Run by the tests in a process with eight virtual devices: prints what they check, as one JSON object.

    python eight_devices.py DIRECTORY       DIRECTORY takes checkpoints
"""

import json
import pathlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from svdp_jax import checkpoint, sharding, train_state
from svdp_jax.config import AutoencoderConfig, Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from svdp_jax.models.autoencoder import make_autoencoder
from svdp_jax.models.tokens import position_table
from svdp_jax.types import Batch, Frozen

MODEL = ModelConfig(
    width=32, depth=2, heads=2, dual_blocks=1, latent_channels=4, text_tokens=2, text_width=8, pooled_width=8,
    table_size=6, position_step=1.0, frame_frequencies=8, dtype="float32",
)  # fmt: skip
CONFIG = Config(
    model=MODEL,
    autoencoder=AutoencoderConfig(kind="linear", latent_channels=4, patch=4, scale=1.0, shift=0.0),
    data=DataConfig(size=16, frames=2, history=1),
    train=TrainConfig(batch=8, steps=10, warmup=1, learning_rate=1e-3, learning_rate_new=1e-3, remat="none"),
)
ONE = MeshConfig()
FSDP = MeshConfig(data=2, fsdp=4, strategy="fsdp")
FSDP_TENSOR = MeshConfig(data=2, fsdp=2, tensor=2, strategy="fsdp_tensor")


def new_state(key):
    """A state whose every parameter matters: a new network's output is zero, and so are most of its gradients."""
    boxed = train_state.init_params(CONFIG, key)
    leaves, structure = jax.tree.flatten(boxed)
    keys = jax.random.split(key, len(leaves))
    drawn = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return train_state.init_state(CONFIG, structure.unflatten(drawn))


def born(mesh, strategy):
    """The state and its shardings, as train.py makes them."""
    shardings = sharding.shardings_of(jax.eval_shape(new_state, jax.random.key(0)), mesh, strategy)
    return jax.jit(lambda key: nn.meta.unbox(new_state(key)), out_shardings=shardings)(jax.random.key(0)), shardings


def after_one_step(mesh, strategy):
    """(born state, state after a step, its loss)."""
    state, shardings = born(mesh, strategy)
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.integers(0, 256, (8, *shape, 16, 16, 3), dtype=np.uint8)
    batch = jax.device_put(Batch(draw(2), draw(1), draw(), draw(2)), sharding.batch_sharding(mesh, 8))
    autoencoder = make_autoencoder(CONFIG.autoencoder).init(jax.random.key(1), jnp.zeros((1, 16, 16, 3)))["params"]
    frozen = Frozen(autoencoder, position_table(MODEL), np.ones((2, 8), np.float32), np.ones(8, np.float32))
    whole = sharding.replicated(mesh)
    constants, autoencoder, key = jax.device_put((train_state.constants_of(CONFIG, frozen), autoencoder, jax.random.key(2)), whole)
    step = jax.jit(train_state.train_step, static_argnums=0, static_argnames="with_history", out_shardings=(shardings, whole))
    after, metrics = step(CONFIG, state, batch, autoencoder, constants, key, with_history=True)
    return state, after, {name: float(value) for name, value in metrics.items()}


def apart(tree, other):
    """The largest difference of two trees."""
    return max(float(np.max(np.abs(np.asarray(a) - np.asarray(b)), initial=0)) for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True))


def share(tree):
    """Of the tree's bytes, the share that the fullest device holds."""
    held = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
    return max(held.values()) / sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def main(directory: pathlib.Path) -> None:
    facts = {"devices": jax.device_count()}
    _, single, metrics = after_one_step(sharding.make_mesh(ONE, jax.devices()[:1]), "dp")
    facts["single"] = metrics
    moments = jax.tree.map(jnp.abs, single.opt_state[1].mu)
    for config in FSDP, FSDP_TENSOR:
        before, after, metrics = after_one_step(sharding.make_mesh(config), config.strategy)
        paths = jax.tree_util.tree_leaves_with_path(before.params["last"])
        kernel = next(leaf for path, leaf in paths if "wide" in jax.tree_util.keystr(path) and leaf.ndim == 2)
        # Where a gradient is nearly zero, Adam's first step is the sign of its rounding error: those entries say nothing.
        difference = lambda new, old, mu: np.where(np.asarray(mu) > 1e-5, np.asarray(new) - np.asarray(old), 0)
        certain = jax.tree.map(difference, after.params, single.params, moments)
        facts[config.strategy] = metrics | {
            "gradient_apart": apart(after.opt_state[1].mu, single.opt_state[1].mu),
            "params_apart": max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(certain)),
            "share_born": share(before.params),
            "share_after": share((after.params, after.ema, after.opt_state[1])),
            "kernel": [list(kernel.shape), list(kernel.addressable_shards[0].data.shape)],
        }
        if config is FSDP:
            checkpoints = checkpoint.manager(directory, keep=1)
            checkpoint.save(checkpoints, after)
            checkpoints.wait_until_finished()
            for target in FSDP, FSDP_TENSOR, ONE:
                other, shardings = born(sharding.make_mesh(target), target.strategy)
                restored = checkpoint.restore(checkpoints, other)
                fits = jax.tree.map(lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim), restored, shardings)
                placed = all(jax.tree.leaves(fits))
                facts[f"restored {target.strategy}"] = {"apart": apart(restored, after), "step": int(restored.step), "placed": placed}
            checkpoints.close()
    print(json.dumps(facts))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
