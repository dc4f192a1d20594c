"""The training state and one step of it: loss, gradient, AdamW, EMA (SVDP, "Training").

    (TrainState, Batch, Frozen, base key)  ->  (TrainState, metrics)

Randomness is a function of (base key, step), so a resumed run repeats nothing and skips nothing.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from svdp_jax import flow
from svdp_jax.config import Config, ModelConfig, TrainConfig
from svdp_jax.models import tokens
from svdp_jax.models.autoencoder import by_parts, make_autoencoder, to_unit
from svdp_jax.models.layers import COMPILER, COMPILER_TPU
from svdp_jax.models.transformer import Transformer, boxed_params, in_computing_types, smallest_inputs
from svdp_jax.sharding import Layout, abstract, shardings_of
from svdp_jax.types import Batch, Conditions, Constants, Frozen

NEW_PARAMETERS = ("temporal", "frame_encoding")  # absent from the pretrained model
PIXELS_AT_ONCE = 6 * 576**2  # of frames that go through the autoencoder together
NOISE_LEVELS = 5  # equal parts of t, 0 to 1, for which the loss is told apart

Metrics = dict[str, Array]


class TrainState(flax.struct.PyTreeNode):
    """All that a step changes. Parameters, moments and EMA are float32. A skipped step does not count for the learning rate's schedule."""

    step: Any  # int32 scalar, or what stands for it in an abstract state
    params: Any
    opt_state: Any
    ema: Any
    bad: Any  # int32 scalar: steps in a row, up to this one, whose gradient was not finite; they changed nothing


def make_optimizer(train: TrainConfig) -> optax.GradientTransformation:
    """AdamW behind a global-norm clip; weight decay on matrices only; learning rates by whether parameters are new."""

    def schedule(rate: float) -> optax.Schedule:
        falling = max(train.decay * train.steps, 1)
        return lambda step: rate * jnp.minimum((step + 1) / max(train.warmup, 1), 1) * jnp.clip((train.steps - step) / falling, 0, 1)

    def rates(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: "new" if is_new(path) else "pretrained", params)

    def matrices(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: getattr(path[-1], "key", None) == "kernel", params)

    return optax.chain(
        optax.clip_by_global_norm(train.clip),
        optax.scale_by_adam(b2=train.beta2),
        optax.add_decayed_weights(train.weight_decay, matrices),
        optax.partition(
            {
                "pretrained": optax.scale_by_learning_rate(schedule(train.learning_rate)),
                "new": optax.scale_by_learning_rate(schedule(train.learning_rate_new)),
            },
            rates,
        ),
    )


def is_new(path: tuple) -> bool:
    """Whether the parameter at this path of a tree is absent from the pretrained model."""
    return any(getattr(entry, "key", None) in NEW_PARAMETERS for entry in path)


def make_transformer(config: Config, *, training: bool = False, layout: Layout | None = None) -> Transformer:
    """The network of a config; `training` applies its rematerialisation, `layout` is that of the mesh."""
    return Transformer(config.model, remat=config.train.remat if training else "none", layout=layout)


def init_params(config: Config, key: Key[Array, ""]) -> Any:
    """Parameters of the network, boxed with the names of their axes (see `flax.linen.meta`)."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), smallest_inputs(config.model))
    return make_transformer(config).init(key, *zeros)["params"]


def abstract_params(config: Config) -> Any:
    """Shapes of the network's parameters."""
    return nn.meta.unbox(boxed_params(config.model))


def param_shardings(config: Config, layout: Layout) -> Any:
    """Where the parameters lie, and their gradients."""
    return shardings_of(boxed_params(config.model), layout)


def init_state(config: Config, params: Any) -> TrainState:
    """The state before the first step, of given parameters; where they are boxed with their names, so are moments and EMA."""
    zero = lambda: jnp.zeros((), jnp.int32)
    return TrainState(zero(), params, make_optimizer(config.train).init(params), jax.tree.map(jnp.copy, params), zero())


def new_state(config: Config, key: Key[Array, ""]) -> TrainState:
    """The state of a run from scratch, boxed with the names of its axes."""
    return init_state(config, init_params(config, key))


def abstract_state(config: Config, layout: Layout) -> TrainState:
    """Shapes of the state, each with where it lies on the mesh."""
    boxed = jax.eval_shape(lambda params: init_state(config, params), boxed_params(config.model))
    return abstract(boxed, shardings_of(boxed, layout))


def constants_of(config: Config, frozen: Frozen) -> Constants:
    """The network's constant inputs at the run's frame size: only three crops of the position table reach the device."""
    return Constants(tokens.shifted_crops(frozen.table, config.grid, config.grid), jnp.asarray(frozen.text), jnp.asarray(frozen.pooled))


class Draws(NamedTuple):
    """All that is random in a step, sample by sample, so that it is the same however the batch is divided."""

    t: Float[Array, "B"]
    noise: Float[Array, "B F h w C"]  # on the target
    latent: Float[Array, "B F h w C"]  # of the autoencoder's distribution
    level: Int[Array, "B"]
    history: Float[Array, "B P h w C"] | None  # noise on history; None in the first stage, or without


def draw(config: Config, samples: int, key: Key[Array, ""], *, with_history: bool) -> Draws:
    """What a step of so many samples draws."""
    train, data = config.train, config.data
    key_latents, key_t, key_noise, key_level, key_history, key_strength = jax.random.split(key, 6)
    levels = (train.stage2 if with_history else train.stage1).probabilities
    past = None
    if with_history and train.history_noise:
        strength = jax.random.uniform(key_strength, (samples,), maxval=train.history_noise)
        past = flow.per_sample(strength, 5) * jax.random.normal(key_history, (samples, data.history, *config.latent_shape))
    return Draws(
        t=flow.draw_t(key_t, samples, shift=train.time_shift),
        noise=jax.random.normal(key_noise, (samples, data.frames, *config.latent_shape)),
        latent=jax.random.normal(key_latents, (samples, data.frames, *config.latent_shape)),
        level=jax.random.categorical(key_level, jnp.log(jnp.array(levels)), shape=(samples,)),
        history=past,
    )


def encode(config: Config, autoencoder: Any, batch: Batch, draws: Draws, *, with_history: bool, layout: Layout | None = None) -> tuple[Float[Array, "B F h w C"], Conditions]:
    """Latents of the target, drawn from their distribution, and the conditions; all frames go through one loop over the autoencoder."""
    encoder = make_autoencoder(config.autoencoder, dtype=config.model.dtype)
    zeroed = config.model.dropped == "zero" and config.data.history > 0  # it stays, zeroed by its level, where it is not used yet
    streams = [batch.target, batch.source[:, None], batch.driving, *[batch.history] * (with_history or zeroed)]
    frames = jnp.concatenate(streams, axis=1)
    noise = jnp.pad(draws.latent, ((0, 0), (0, frames.shape[1] - draws.latent.shape[1]), *[(0, 0)] * 3))  # conditions are the mode

    def some(frames, noise):
        apply = lambda frames, noise: encoder.apply({"params": autoencoder}, to_unit(frames), noise, method="encode")
        flat = by_parts(apply, *(x.reshape(-1, *x.shape[2:]) for x in (frames, noise)), at_once=max(PIXELS_AT_ONCE // config.data.size**2, 1))
        return flat.reshape(*frames.shape[:2], *flat.shape[1:])

    latents = (layout.per_frame(some) if layout else some)(frames, noise)
    x0, source, driving, *history = jnp.split(latents, np.cumsum([stream.shape[1] for stream in streams])[:-1], axis=1)
    past = history[0] if history else None
    return x0, Conditions(source[:, 0], driving, past if draws.history is None else past + draws.history, draws.level)


def loss_fn(
    config: Config, params: Any, batch: Batch, draws: Draws, autoencoder: Any, constants: Constants, *, with_history: bool, layout: Layout | None = None
) -> tuple[Float[Array, ""], Metrics]:
    """Mean square error of the network on a batch, and metrics (SVDP, "Training"; levels: `LevelConfig`).

    `with_history`: the second stage. The first compiles without history, at less cost (but for `dropped="zero"`). `layout`: of the mesh; None is one device.
    """
    x0, conditions = encode(config, autoencoder, batch, draws, with_history=with_history, layout=layout)
    output = make_transformer(config, training=True, layout=layout).apply(
        {"params": in_computing_types(config.model, params)}, flow.interpolate(x0, draws.noise, draws.t), draws.t, conditions, constants
    )
    losses = flow.loss_per_sample(output, flow.target(x0, draws.noise, config.model.prediction))
    by_noise = jax.nn.one_hot((draws.t * NOISE_LEVELS).astype(jnp.int32).clip(max=NOISE_LEVELS - 1), NOISE_LEVELS)
    return losses.mean(), {"loss": losses.mean(), "loss_sums": losses @ by_noise, "samples": by_noise.sum(axis=0)}


def gradient(
    config: Config, params: Any, batch: Batch, draws: Draws, autoencoder: Any, constants: Constants, *, with_history: bool, layout: Layout | None = None
) -> tuple[Any, Metrics]:
    """The gradient of `loss_fn` on a batch, done in `train.accumulation` parts one after the other, and its metrics."""
    parts = config.train.accumulation
    value_and_grad = jax.value_and_grad(loss_fn, argnums=1, has_aux=True)

    def of(batch: Batch, draws: Draws) -> tuple[Any, Metrics]:
        (_, metrics), found = value_and_grad(config, params, batch, draws, autoencoder, constants, with_history=with_history, layout=layout)
        return (jax.lax.with_sharding_constraint(found, param_shardings(config, layout)) if layout else found), metrics

    if parts == 1:
        return of(batch, draws)

    split = lambda x: jnp.swapaxes(x.reshape(len(x) // parts, parts, *x.shape[1:]), 0, 1)  # each device divides its own samples

    def add(total, part):
        return jax.tree.map(jnp.add, total, of(*part)), None

    batch_parts = jax.tree.map(split, (batch, draws))
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(of, *jax.tree.map(lambda x: x[0], batch_parts)))
    if layout:
        nothing = jax.lax.with_sharding_constraint(nothing[0], param_shardings(config, layout)), nothing[1]
    (total, metrics), _ = jax.lax.scan(add, nothing, batch_parts)
    return jax.tree.map(lambda leaf: leaf / parts, total), metrics | {"loss": metrics["loss"] / parts}


def train_step(
    config: Config,
    state: TrainState,
    batch: Batch,
    autoencoder: Any,
    constants: Constants,
    key: Key[Array, ""],
    *,
    with_history: bool,
    layout: Layout | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimizer step and one tick of the EMA. Returns (TrainState, metrics).

    Where the loss or the gradient is not finite nothing changes but the step and `bad`, the number of such steps in a row."""
    draws = draw(config, len(batch.target), jax.random.fold_in(key, state.step), with_history=with_history)
    found, metrics = gradient(config, state.params, batch, draws, autoencoder, constants, with_history=with_history, layout=layout)
    norm = optax.tree.norm(found)
    updates, opt_state = make_optimizer(config.train).update(found, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = jax.tree.map(lambda old, new: old + (1 - ema_decay(config.train, state.step)) * (new - old), state.ema, params)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    keep = lambda new, old: jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
    bad = jnp.where(finite, 0, state.bad + 1)
    after = TrainState(state.step + 1, keep(params, state.params), keep(opt_state, state.opt_state), keep(ema, state.ema), bad)
    return after, metrics | {"grad_norm": norm, "bad": bad}


def gathered(config: ModelConfig, params: Any, layout: Layout) -> Any:
    """Parameters as `sample.py` has them, in the types that the network computes in, whole on one device of this process. All processes take part."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), _gather(config, layout)(params))


@functools.cache
def _gather(config: ModelConfig, layout: Layout) -> Any:
    return jax.jit(functools.partial(in_computing_types, config), out_shardings=layout.whole)


def ema_decay(train: TrainConfig, step: Array) -> Float[Array, ""]:
    """The EMA's decay at a step: it forgets the start quickly, then settles at `train.ema`."""
    return jnp.minimum(train.ema, (1 + step) / (10 + step))


def make_step(config: Config, layout: Layout, shardings: TrainState, *, with_history: bool) -> Any:
    """`train_step` compiled for a mesh: (state, batch, autoencoder, constants, key, votes) -> (state, metrics). The state is given away.

    `votes` (`Layout.votes`) are to stop behind this step; metrics say in `stop` whether there was one, the same to every process."""

    def step(state, batch, autoencoder, constants, key, votes):
        after, metrics = train_step(config, state, batch, autoencoder, constants, key, with_history=with_history, layout=layout)
        return after, metrics | {"stop": votes.max()}

    # Unused are the autoencoder's decoder and, in the first stage, history: the device holds them, so the program's memory counts them.
    options = COMPILER | (COMPILER_TPU if layout.mesh.devices.flat[0].platform == "tpu" else {})
    return jax.jit(step, out_shardings=(shardings, layout.whole), donate_argnums=0, keep_unused=True, compiler_options=options)
