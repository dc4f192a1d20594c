"""Run by the tests in a process with eight virtual devices: prints what they check, as one JSON object.

    python eight_devices.py DIRECTORY CASE...       DIRECTORY takes checkpoints; a case is STRATEGY or STRATEGY/ACCUMULATION

One case alone is looked at more briefly: its gradient, and what travels in the blocks.
"""

import dataclasses
import json
import pathlib
import re
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from svdp_jax import sharding, steps, train_state
from svdp_jax.config import AutoencoderConfig, Config, DataConfig, LevelConfig, MeshConfig, ModelConfig, TrainConfig
from svdp_jax.models import blocks, parallel
from svdp_jax.models.autoencoder import make_autoencoder
from svdp_jax.models.tokens import position_table
from svdp_jax.types import Batch, Frozen

SAMPLES, FRAMES, PAST = 16, 4, 3
MODEL = ModelConfig(
    width=32, depth=3, heads=4, dual_blocks=1, latent_channels=4, text_tokens=2, text_width=8, pooled_width=8,
    table_size=6, position_step=1.0, frame_frequencies=8, dtype="float32",
)  # fmt: skip
CONFIG = Config(
    model=MODEL,
    autoencoder=AutoencoderConfig(kind="linear", latent_channels=4, patch=4, scale=1.0, shift=0.0),
    data=DataConfig(size=16, frames=FRAMES, history=PAST),
    train=TrainConfig(
        batch=SAMPLES, steps=10, warmup=1, learning_rate=1e-3, learning_rate_new=1e-3, remat="full", history_noise=0.1,
        stage2=LevelConfig(nothing=0.1, source=0.1, driving=0.3, history=0.5),
    ),
)  # fmt: skip
MESHES = {
    "dp": MeshConfig(data=8, strategy="dp"),
    "fsdp": MeshConfig(data=2, fsdp=4, strategy="fsdp"),
    "fsdp_tensor": MeshConfig(data=2, fsdp=2, tensor=2, strategy="fsdp_tensor"),
    "fsdp_context": MeshConfig(data=2, fsdp=2, context=2, strategy="fsdp_context"),
    "fsdp_context_tensor": MeshConfig(data=1, fsdp=2, context=2, tensor=2, strategy="fsdp_context_tensor"),
    "gather": MeshConfig(data=1, fsdp=1, context=4, tensor=2, strategy="fsdp_context_tensor"),  # four heads do not divide by eight
}
ONE = MeshConfig(strategy="dp")


def new_state(key):
    """A state whose every parameter matters: a new network's output is zero, and so are most of its gradients."""
    boxed = train_state.init_params(CONFIG, key)
    leaves, structure = jax.tree.flatten(boxed)
    keys = jax.random.split(key, len(leaves))
    drawn = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return train_state.init_state(CONFIG, structure.unflatten(drawn))


BOXED = jax.eval_shape(new_state, jax.random.key(0))


def accumulating(parts: str) -> Config:
    """CONFIG with so many parts of a batch."""
    return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, accumulation=int(parts or 1)))


def layout_of(mesh: MeshConfig):
    return sharding.make_layout(mesh, jax.devices()[:1] if mesh is ONE else None)


def born(layout):
    """The state and its shardings, as train.py makes them."""
    shardings = sharding.shardings_of(BOXED, layout)
    return jax.jit(lambda key: nn.meta.unbox(new_state(key)), out_shardings=shardings)(jax.random.key(0)), shardings


def inputs(layout):
    """Batch, autoencoder, constants and key, where they belong."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.integers(0, 256, (SAMPLES, *shape, 16, 16, 3), dtype=np.uint8)
    autoencoder = nn.meta.unbox(make_autoencoder(CONFIG.autoencoder).init(jax.random.key(1), jnp.zeros((1, 16, 16, 3)))["params"])
    frozen = Frozen(autoencoder, position_table(MODEL), np.ones((2, 8), np.float32), np.ones(8, np.float32))
    batch = jax.device_put(Batch(draw(FRAMES), draw(PAST), draw(), draw(FRAMES)), layout.batch)
    return batch, *jax.device_put((autoencoder, train_state.constants_of(CONFIG, frozen), jax.random.key(2)), layout.whole)


def gradients(config, layout, state):
    """(gradient, loss) of the first step."""
    batch, autoencoder, constants, key = inputs(layout)

    @jax.jit
    def of(params, batch, autoencoder, constants, key):
        draws = train_state.draw(config, SAMPLES, key, with_history=True)
        return train_state.gradient(config, params, batch, draws, autoencoder, constants, with_history=True, layout=layout)

    found, metrics = of(state.params, batch, autoencoder, constants, key)
    return jax.device_get(found), float(metrics["loss"])


def three_steps(config, layout, state, shardings):
    """(state, losses)."""
    batch, *rest = inputs(layout)
    step = train_state.make_step(config, layout, shardings, with_history=True)
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch, *rest, layout.votes(False))
        losses.append(float(metrics["loss"]))
    return state, losses


def norm(x):
    return float(np.linalg.norm(np.asarray(x, np.float64)))


def worst(function, *trees):
    """The largest value of a function of leaves, and which leaf has it."""
    found = {jax.tree_util.keystr(path): function(*leaves) for (path, *leaves) in zip_leaves(*trees)}
    name = max(found, key=found.get)
    return [found[name], name]


def zip_leaves(*trees):
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(trees[0])]
    return zip(paths, *map(jax.tree.leaves, trees), strict=True)


def relative(one, other):
    """Relative L2 distance; that of two zeros is 0."""
    size = norm(other)
    return norm(np.asarray(one, np.float64) - np.asarray(other)) / size if size else norm(one)


def misplaced(state, layout):
    """Leaves that do not lie as the rules table says, worked out here from the names once more."""
    table, found = sharding.STRATEGIES[layout.strategy], []
    boxed = jax.tree.leaves(BOXED, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    for (path, leaf), box in zip(jax.tree_util.tree_leaves_with_path(state), boxed, strict=True):
        names = box.names if isinstance(box, nn.LogicallyPartitioned) else ()
        sizes = [layout.mesh.shape[table[name]] if table[name] else 1 for name in names]
        expected = tuple(size // share for size, share in zip(leaf.shape, sizes, strict=True))
        if any(shard.data.shape != expected for shard in leaf.addressable_shards) or len(leaf.addressable_shards) != layout.mesh.size:
            found.append(f"{jax.tree_util.keystr(path)}: {leaf.addressable_shards[0].data.shape}, not {expected}")
    return found


COLLECTIVE = re.compile(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def collectives_of(module, layout, arguments, names):
    """Kinds of collectives in the compiled forward pass of a module, with whole parameters, and arguments laid out by their axes' names."""
    params = jax.jit(module.init)(jax.random.key(0), *jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), arguments))
    places = jax.tree.map(lambda x, axes: layout.sharding(*axes), arguments, names, is_leaf=lambda x: isinstance(x, jax.ShapeDtypeStruct))
    program = jax.jit(module.apply, in_shardings=(layout.whole, *places)).lower(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params), *arguments)
    return sorted(set(COLLECTIVE.findall(program.compile({"xla_backend_optimization_level": 1}).as_text())))


def block_collectives(heads, kinds):
    """What travels in joint blocks of these kinds, and in a temporal block, under `context`, at four samples, two on each part of `data`."""
    model = dataclasses.replace(MODEL, heads=heads)
    layout = sharding.make_layout(MeshConfig(data=2, context=4, strategy="fsdp_context"))
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    frames = lambda count, tokens: array(4, count, tokens, 32)
    per_frame = ("batch", "frames", "tokens", "width")
    kept = jax.ShapeDtypeStruct((4,), jnp.int32)
    facts = {}
    for kind in kinds:
        arguments, names = (frames(4, 2), frames(4, 12), array(4, 32), kept), (per_frame, per_frame, ("batch", None), ("batch",))
        facts[kind] = collectives_of(blocks.JointBlock(model, kind, "plain", layout), layout, arguments, names)
        facts[f"{kind}, without shard_map"] = collectives_of(blocks.JointBlock(model, kind, "plain"), layout, arguments, names)
    shared = blocks.Shared(array(4, 32), array(4, 32), array(4, 32), array(4, 32), kept, kept)
    shared_names = blocks.Shared(("batch", None), ("batch", None), (None, None), (None, None), ("batch",), ("batch",))
    block = blocks.TemporalBlock(model, "plain", True, layout)
    facts["temporal"] = collectives_of(block, layout, (frames(4, 4), frames(4, 4), shared), (per_frame, per_frame, shared_names))
    return facts


def without_exchange(x, axis_name, *, split_axis, concat_axis, tiled):
    """all_to_all that keeps a device's own part instead of fetching the others': the mutant."""
    size = jax.lax.axis_size(axis_name)
    return jnp.concatenate([jnp.split(x, size, split_axis)[0]] * size, concat_axis)


def restored_elsewhere(state, directory):
    """What comes back of a saved state on every mesh: how far it is apart, its step, and whether it lies as that mesh has it."""
    checkpoints = steps.manager(directory, keep=1)
    steps.save(checkpoints, state, steps.Run(samples=0, key=[0, 0], pending=[], config={}))
    steps.finish(checkpoints)
    facts, here = {}, jax.device_get(state)
    for name, target in {"one": ONE, **MESHES}.items():
        shardings = sharding.shardings_of(BOXED, layout_of(target))
        there = steps.restore(checkpoints, sharding.abstract(BOXED, shardings))
        fits = jax.tree.map(lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim), there, shardings)
        apart = worst(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max(initial=0)), jax.device_get(there), here)
        facts[name] = {"apart": apart, "step": int(there.step), "placed": all(jax.tree.leaves(fits))}
    checkpoints.close()
    return facts


def main(directory: pathlib.Path, cases: list[str]) -> None:
    facts = {"devices": jax.device_count()}
    one = layout_of(ONE)
    start, shardings = born(one)
    begun = jax.device_get(start)
    expected, loss = gradients(CONFIG, one, start)
    if len(cases) == 1:
        name, _, parts = cases[0].partition("/")
        layout = layout_of(MESHES[name])
        state, _ = born(layout)
        found, found_loss = gradients(accumulating(parts), layout, state)
        facts[cases[0]] = {"losses": relative([found_loss], [loss]), "gradient": worst(relative, found, expected), "misplaced": misplaced(state, layout)}
        facts["collectives"] = {"4 heads": block_collectives(4, ["dual"]), "2 heads": block_collectives(2, [])["temporal"]}
        print(json.dumps(facts))
        return
    straight, losses = three_steps(CONFIG, one, start, shardings)
    straight = jax.device_get(straight)
    moved = lambda ours, theirs, start: norm(np.asarray(ours) - theirs) / norm(theirs - start) if norm(theirs - start) else norm(np.asarray(ours) - theirs)
    for case in cases:
        name, _, parts = case.partition("/")
        config = accumulating(parts)
        layout = layout_of(MESHES[name])
        state, shardings = born(layout)
        found, found_loss = gradients(config, layout, state)
        after, found_losses = three_steps(config, layout, state, shardings)
        facts[case] = {
            "losses": relative([found_loss, *found_losses], [loss, *losses]),
            "gradient": worst(relative, found, expected),
            "params": worst(moved, jax.device_get(after.params), straight.params, begun.params),
            "ema": worst(moved, jax.device_get(after.ema), straight.ema, begun.ema),
            "misplaced": misplaced(after, layout),
        }
        if name == "fsdp_context_tensor" and not parts:
            exchange, parallel.jax.lax.all_to_all = jax.lax.all_to_all, without_exchange
            facts["mutant"] = worst(relative, gradients(config, layout, born(layout)[0])[0], expected)
            parallel.jax.lax.all_to_all = exchange
        if not parts:
            facts[case]["restored"] = restored_elsewhere(after, directory / name)
    facts["collectives"] = {"4 heads": block_collectives(4, ["dual", "plain", "last"]), "2 heads": block_collectives(2, [])["temporal"]}
    print(json.dumps(facts))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2:])
