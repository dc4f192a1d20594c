"""The temporal blocks and history learn from step 0, together with everything else: tasks that only other frames can solve.

A clip is one colour, drawn N(0, 1) per channel, in every place of every frame. After training, the network is asked for it
from pure noise (t = 1), where all it can know is what the conditions say. Who does not know the colour is wrong by 1.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from svdp_jax import flow, train_state
from svdp_jax.config import ModelConfig, TrainConfig
from svdp_jax.models import tokens
from svdp_jax.models.transformer import Transformer, abstract_inputs
from svdp_jax.types import Conditions, Constants

MODEL = ModelConfig(
    width=32, depth=3, heads=2, dual_blocks=1, latent_channels=3, text_tokens=1, text_width=4, pooled_width=4,
    table_size=6, position_step=1.0, frame_frequencies=8, prediction="x0", dtype="float32",
)  # fmt: skip
TRAIN = TrainConfig(steps=150, learning_rate=3e-3, learning_rate_new=3e-3, warmup=20, decay=0.3, beta2=0.99)
SIZE, FRAMES, PAST, CLIPS, TEST_CLIPS = 4, 4, 2, 16, 256
CONSTANTS = Constants(tokens.shifted_crops(tokens.position_table(MODEL), 2, 2), jnp.zeros((1, 4)), jnp.zeros(4))


@pytest.fixture(scope="module", autouse=True)
def optimised():
    """Unlike the other tests, these run what they compile for long."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def draw_clips(key, clips, level, in_driving):
    """(x0, Conditions, frames [B, F] whose driving latents do not show the colour).

    History shows it always; the driving latents of one frame, at random, show it where `in_driving` is 1. The rest is 0.
    """
    key_colour, key_frame = jax.random.split(key)
    colour = jax.random.normal(key_colour, (clips, 1, 1, 1, 3))
    x0, history = (jnp.broadcast_to(colour, (clips, frames, SIZE, SIZE, 3)) for frames in (FRAMES, PAST))
    shown = in_driving * jax.nn.one_hot(jax.random.randint(key_frame, (clips,), 0, FRAMES), FRAMES)
    driving = x0 * shown[:, :, None, None, None]
    return x0, Conditions(jnp.zeros_like(x0[:, 0]), driving, history, jnp.full((clips,), level)), shown == 0


def frame_by_frame(x0, conditions, hidden):
    """The same frames, each as a clip of its own, without history."""
    apart = lambda x: x.reshape(-1, 1, *x.shape[2:])
    source, level = (x.repeat(FRAMES, axis=0) for x in (conditions.source, conditions.level))
    return apart(x0), Conditions(source, apart(conditions.driving), None, level), apart(hidden)


@functools.partial(jax.jit, static_argnames="alone")
def error_after_training(level, in_driving, *, alone):
    """Mean square error at t = 1 in frames whose own driving latents do not show the colour."""
    model, optimizer = Transformer(MODEL), train_state.make_optimizer(TRAIN)

    def draw(key, clips):
        drawn = draw_clips(key, clips, level, in_driving)
        return frame_by_frame(*drawn) if alone else drawn

    def step(state, key):
        params, opt_state = state
        key_clips, key_t, key_noise = jax.random.split(key, 3)
        x0, conditions, _ = draw(key_clips, CLIPS)
        t = flow.draw_t(key_t, len(x0), shift=3.0)
        x_t = flow.interpolate(x0, jax.random.normal(key_noise, x0.shape), t)
        loss = lambda params: flow.loss_per_sample(model.apply({"params": params}, x_t, t, conditions, CONSTANTS), x0).mean()
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return (jax.tree.map(jnp.add, params, updates), opt_state), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract_inputs(MODEL, batch=1, frames=1, history=1, height=SIZE, width=SIZE))
    params = nn.meta.unbox(model.init(jax.random.key(0), *zeros)["params"])
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(jax.random.key(1), TRAIN.steps))

    x0, conditions, hidden = draw(jax.random.key(2), TEST_CLIPS)
    noise = jax.random.normal(jax.random.key(3), x0.shape)
    error = jnp.square(model.apply({"params": params}, noise, jnp.ones(len(x0)), conditions, CONSTANTS) - x0).mean(axis=(2, 3, 4))
    return (error * hidden).sum() / hidden.sum()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("learned", "level", "in_driving", "alone"),
    [
        pytest.param(True, tokens.DRIVING, 1.0, False, id="from another frame"),
        pytest.param(False, tokens.DRIVING, 1.0, True, id="each frame alone"),
        pytest.param(True, tokens.HISTORY, 0.0, False, id="from history"),
        pytest.param(False, tokens.DRIVING, 0.0, False, id="history dropped"),
    ],
)
def test_what_other_frames_show_is_learned_through_them_alone(learned, level, in_driving, alone):
    error = float(error_after_training(level, in_driving, alone=alone))
    print(f"mean square error {error:.3f}; who does not know the colour: 1")
    assert error < 0.15 if learned else error > 0.8
