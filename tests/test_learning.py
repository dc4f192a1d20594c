"""The temporal blocks and history learn from step 0, together with everything else: tasks that only other frames can solve.

A clip is one colour, drawn N(0, 1) per channel, in every place of every frame. The network is asked for it from pure noise
(t = 1), where all it can know is what the conditions say. Whoever does not know the colour has a mean square error of 1.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svdp_jax import flow, train_state
from svdp_jax.config import ModelConfig, TrainConfig
from svdp_jax.models import tokens
from svdp_jax.models.transformer import Transformer, abstract_inputs
from svdp_jax.types import Conditions, Constants

MODEL = ModelConfig(
    width=32, depth=3, heads=2, dual_blocks=1, latent_channels=3, text_tokens=1, text_width=4, pooled_width=4,
    table_size=6, position_step=1.0, frame_frequencies=8, prediction="x0", dtype="float32",
)  # fmt: skip
TRAIN = TrainConfig(steps=300, learning_rate=3e-3, learning_rate_new=3e-3, warmup=20, decay=0.3, beta2=0.99)
SIZE, FRAMES, PAST, CLIPS = 4, 4, 2, 16
CONSTANTS = Constants(tokens.shifted_crops(tokens.position_table(MODEL), 2, 2), jnp.zeros((1, 4)), jnp.zeros(4))


def draw_clips(key, level, *, seen):
    """(x0, Conditions, hidden [B, F]): the colour is in the driving latents of one random frame if `seen`, and in history."""
    key_colour, key_frame = jax.random.split(key)
    colour = jax.random.normal(key_colour, (CLIPS, 1, 1, 1, 3))
    x0 = jnp.broadcast_to(colour, (CLIPS, FRAMES, SIZE, SIZE, 3))
    shown = seen * jax.nn.one_hot(jax.random.randint(key_frame, (CLIPS,), 0, FRAMES), FRAMES)
    driving = x0 * shown[:, :, None, None, None]
    history = jnp.broadcast_to(colour, (CLIPS, PAST, SIZE, SIZE, 3))
    return x0, Conditions(jnp.zeros_like(x0[:, 0]), driving, history, jnp.full((CLIPS,), level)), shown == 0


def frame_by_frame(x0, conditions, hidden):
    """The same frames, each as a clip of its own, without history."""
    apart = lambda x: x.reshape(-1, 1, *x.shape[2:])
    source, level = (x.repeat(FRAMES, axis=0) for x in (conditions.source, conditions.level))
    return apart(x0), Conditions(source, apart(conditions.driving), None, level), apart(hidden)


@functools.partial(jax.jit, static_argnames="alone")
def error_after_training(level, seen, *, alone):
    """Mean square error at t = 1 on frames whose driving latents do not show the colour, as the loss of every step."""
    model = Transformer(MODEL)
    optimizer = train_state.make_optimizer(TRAIN)

    def clips(key):
        drawn = draw_clips(key, level, seen=seen)
        return frame_by_frame(*drawn) if alone else drawn

    def output(params, x0, conditions, t, key):
        noise = jax.random.normal(key, x0.shape)
        return model.apply({"params": params}, flow.interpolate(x0, noise, t), t, conditions, CONSTANTS)

    def step(state, key):
        params, opt_state = state
        key_clips, key_t, key_noise, key_test = jax.random.split(key, 4)
        x0, conditions, hidden = clips(key_clips)
        t = flow.draw_t(key_t, len(x0), shift=3.0)
        loss = lambda params: flow.loss_per_sample(output(params, x0, conditions, t, key_noise), x0).mean()
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        params = jax.tree.map(jnp.add, params, updates)
        return (params, opt_state), None

    def test(params, key):
        x0, conditions, hidden = clips(key)
        error = jnp.square(output(params, x0, conditions, jnp.ones(len(x0)), key) - x0).mean(axis=(2, 3, 4))
        return (error * hidden).sum() / hidden.sum()

    shapes = abstract_inputs(MODEL, batch=1, frames=1, history=1, height=SIZE, width=SIZE)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    params = jax.tree.map(lambda leaf: leaf, __import__("flax").linen.meta.unbox(model.init(jax.random.key(0), *zeros)["params"]))

    def block(state, keys):
        state, _ = jax.lax.scan(step, state, keys)
        return state, jax.vmap(test, (None, 0))(state[0], jax.random.split(jax.random.key(9), 4)).mean()

    keys = jax.random.split(jax.random.key(1), TRAIN.steps).reshape(-1, 20)
    return jax.lax.scan(block, (params, optimizer.init(params)), keys)[1]
