"""The training state and one step of it: loss, gradient, AdamW, EMA (SVDP, "Training").

    (TrainState, Batch, Frozen, base key)  ->  (TrainState, metrics)

Randomness is a function of (base key, step), so a resumed run repeats nothing and skips nothing.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from svdp_jax import flow
from svdp_jax.config import Config, TrainConfig
from svdp_jax.models import tokens
from svdp_jax.models.autoencoder import make_autoencoder, to_unit
from svdp_jax.models.transformer import Transformer, abstract_inputs
from svdp_jax.types import Batch, Conditions, Constants, Frozen

NEW_PARAMETERS = ("temporal", "frame_encoding")  # absent from the pretrained model


class TrainState(flax.struct.PyTreeNode):
    """All that a step changes. Parameters, moments and EMA are float32."""

    step: Any  # int32 scalar, or what stands for it in an abstract state
    params: Any
    opt_state: Any
    ema: Any


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


def make_transformer(config: Config, *, training: bool = False) -> Transformer:
    """The network of a config; `training` applies its rematerialisation."""
    return Transformer(config.model, remat=config.train.remat if training else "none")


def init_params(config: Config, key: Key[Array, ""]) -> Any:
    """Parameters of the network, boxed with the names of their axes (see `flax.linen.meta`)."""
    side = config.model.patch  # of the smallest latents there are: no parameter depends on their size
    shapes = abstract_inputs(config.model, batch=1, frames=1, history=1, height=side, width=side)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return make_transformer(config).init(key, *zeros)["params"]


def abstract_params(config: Config) -> Any:
    """Shapes of the network's parameters."""
    return nn.meta.unbox(jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0)))


def init_state(config: Config, params: Any) -> TrainState:
    """The state before the first step, of given parameters; where they are boxed with their names, so are moments and EMA."""
    return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(config.train).init(params), jax.tree.map(jnp.copy, params))


def constants_of(config: Config, frozen: Frozen) -> Constants:
    """The network's constant inputs at the run's frame size: only three crops of the position table reach the device."""
    return Constants(tokens.shifted_crops(frozen.table, config.grid, config.grid), jnp.asarray(frozen.text), jnp.asarray(frozen.pooled))


def loss_fn(config: Config, params: Any, batch: Batch, autoencoder: Any, constants: Constants, key: Key[Array, ""], *, with_history: bool):
    """Mean square error of the network on one batch, and metrics (SVDP, "Training"; DESIGN of levels: `LevelConfig`).

    `with_history`: the second stage. The first compiles without history, at less cost.
    """
    key_latents, key_t, key_noise, key_level = jax.random.split(key, 4)
    encoder = make_autoencoder(config.autoencoder)

    def encode(frames, key=None):
        return encoder.apply({"params": autoencoder}, to_unit(frames), key, method="encode")

    x0 = encode(batch.target, key_latents)
    t = flow.draw_t(key_t, len(x0), shift=config.train.time_shift)
    noise = jax.random.normal(key_noise, x0.shape)
    levels = (config.train.stage2 if with_history else config.train.stage1).probabilities
    conditions = Conditions(
        source=encode(batch.source),
        driving=encode(batch.driving),
        history=encode(batch.history) if with_history else None,
        level=jax.random.categorical(key_level, jnp.log(jnp.array(levels)), shape=(len(x0),)),
    )
    output = make_transformer(config, training=True).apply({"params": params}, flow.interpolate(x0, noise, t), t, conditions, constants)
    loss = flow.loss_per_sample(output, flow.target(x0, noise, config.model.prediction))
    return loss.mean(), {"loss": loss.mean()}


def train_step(config: Config, state: TrainState, batch: Batch, autoencoder: Any, constants: Constants, key: Key[Array, ""], *, with_history: bool):
    """One optimizer step and one tick of the EMA. Returns (TrainState, metrics)."""
    key = jax.random.fold_in(key, state.step)
    gradient_of = jax.value_and_grad(loss_fn, argnums=1, has_aux=True)
    (_, metrics), gradient = gradient_of(config, state.params, batch, autoencoder, constants, key, with_history=with_history)
    updates, opt_state = make_optimizer(config.train).update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = jax.tree.map(lambda old, new: old + (1 - ema_decay(config.train, state.step)) * (new - old), state.ema, params)
    return TrainState(state.step + 1, params, opt_state, ema), metrics | {"grad_norm": optax.tree.norm(gradient)}


def ema_decay(train: TrainConfig, step: Array) -> Float[Array, ""]:
    """The EMA's decay at a step: it forgets the start quickly, then settles at `train.ema`."""
    return jnp.minimum(train.ema, (1 + step) / (10 + step))
