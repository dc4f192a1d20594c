"""The train step: who learns how fast, what the EMA keeps, and what a step's randomness depends on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from tiny_network import TINY, assert_close, fresh_params, redrawn

from svdp_jax import train_state
from svdp_jax.config import AutoencoderConfig, Config, LevelConfig, TrainConfig
from svdp_jax.models.autoencoder import make_autoencoder, to_unit
from svdp_jax.models.tokens import position_table
from svdp_jax.models.transformer import abstract_inputs
from svdp_jax.types import Batch, Frozen

PLAIN = TrainConfig(steps=8, warmup=0, weight_decay=0.0, learning_rate=1e-3, learning_rate_new=1e-2, clip=1e9)


def updates(train, params, gradients):
    """What the optimizer adds to `params` for one gradient after the other."""
    optimizer = train_state.make_optimizer(train)
    state, out = optimizer.init(params), []
    for gradient in gradients:
        update, state = optimizer.update(gradient, state, params)
        out.append(update)
    return out


def like(params, value):
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, value), params)


# -------------------------------------------------------------------------------------------------------------- optimizer


def test_new_parameters_have_a_learning_rate_of_their_own():
    params = fresh_params()
    (update,) = updates(PLAIN, params, [like(params, 1.0)])  # the first step of Adam is as long as the learning rate
    for path, change in flatten_dict(update).items():
        new = path[0] == "frame_encoding" or path[1] == "temporal"
        np.testing.assert_allclose(change, -1e-2 if new else -1e-3, rtol=1e-5, err_msg=str(path))


def test_weight_decay_is_for_kernels_only():
    params = redrawn(fresh_params())
    (update,) = updates(dataclasses.replace(PLAIN, weight_decay=0.1), params, [like(params, 0.0)])
    weights = flatten_dict(params)
    kinds = set()
    for path, change in flatten_dict(update).items():
        rate = 1e-2 if path[0] == "frame_encoding" or path[1] == "temporal" else 1e-3
        expected = -rate * 0.1 * weights[path] if path[-1] == "kernel" else np.zeros(weights[path].shape)
        np.testing.assert_allclose(change, expected, rtol=1e-5, atol=1e-9, err_msg=str(path))
        kinds.add(path[-1])
    assert kinds == {"kernel", "bias", "q_norm", "k_norm"}


def test_learning_rate_warms_up_and_decays():
    train = dataclasses.replace(PLAIN, warmup=4, decay=0.25)
    params = {"kernel": jnp.zeros(3), "temporal": {"kernel": jnp.zeros(3)}}
    steps = updates(train, params, [like(params, 1.0)] * 9)  # Adam's steps for a constant gradient are the learning rate
    shares = [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.5, 0]
    np.testing.assert_allclose([step["kernel"][0] for step in steps], np.multiply(shares, -1e-3), rtol=1e-4)
    np.testing.assert_allclose([step["temporal"]["kernel"][0] for step in steps], np.multiply(shares, -1e-2), rtol=1e-4)


def test_without_decay_the_learning_rate_stays():
    params = {"kernel": jnp.zeros(3)}
    steps = updates(dataclasses.replace(PLAIN, decay=0.0), params, [like(params, 1.0)] * 8)
    np.testing.assert_allclose([step["kernel"][0] for step in steps], -1e-3, rtol=1e-4)


def test_large_gradients_are_clipped_to_the_norm_and_small_ones_are_not():
    params = {"kernel": jnp.zeros(4)}
    run = lambda first, second: updates(dataclasses.replace(PLAIN, clip=1.0), params, [like(params, first), like(params, second)])[1]["kernel"]
    np.testing.assert_allclose(run(0.5, 100.0), run(0.5, 0.5), rtol=1e-5)  # four times 0.5 has norm 1
    assert np.abs(run(0.05, 0.5) / run(0.05, 0.05) - 1).min() > 0.1


# -------------------------------------------------------------------------------------------------------------- train step


@pytest.fixture(scope="module")
def setting():
    """(state, batch, autoencoder, constants): random frames, and parameters of which none is zero."""
    autoencoder = nn.meta.unbox(make_autoencoder(TINY.autoencoder).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"])
    model = TINY.model
    frozen = Frozen(autoencoder, position_table(model), np.ones((model.text_tokens, model.text_width), np.float32), np.ones(model.pooled_width, np.float32))
    generator = np.random.default_rng(0)
    frames = lambda *lead: generator.integers(0, 256, (2, *lead, 32, 32, 3), np.uint8)
    batch = Batch(target=frames(4), history=frames(2), source=frames(), driving=frames(4))
    state = train_state.init_state(TINY, redrawn(fresh_params()))
    return state, batch, autoencoder, train_state.constants_of(TINY, frozen)


@functools.partial(jax.jit, static_argnames=("config", "with_history"))
def step_of(config, state, batch, autoencoder, constants, key, *, with_history):
    return train_state.train_step(config, state, batch, autoencoder, constants, key, with_history=with_history)


RUN = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, steps=100, learning_rate=3e-3, stage2=LevelConfig(0, 0, 0, 1)))  # history always


def take_step(setting, *, state=None, batch=None, seed=0, with_history=True):
    first, whole, autoencoder, constants = setting
    return step_of(RUN, state or first, batch or whole, autoencoder, constants, jax.random.key(seed), with_history=with_history)


def equal(one, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_a_step_is_a_function_of_key_and_step(setting):
    state, metrics = take_step(setting)
    again, metrics_again = take_step(setting)
    assert equal((state, metrics), (again, metrics_again))
    assert state.step == 1
    later = take_step(setting, state=setting[0].replace(step=jnp.int32(1)))[1]["loss"]
    other_key = take_step(setting, seed=1)[1]["loss"]
    assert len({float(metrics["loss"]), float(later), float(other_key)}) == 3


@pytest.mark.parametrize("with_history", [False, True])
def test_the_first_stage_ignores_history_and_the_second_does_not(setting, with_history):
    batch = setting[1]
    inverted = batch._replace(history=255 - batch.history)
    same = equal(take_step(setting, with_history=with_history), take_step(setting, batch=inverted, with_history=with_history))
    assert same != with_history


@pytest.mark.parametrize("signal", ["source", "driving"])
def test_source_and_driver_are_seen(setting, signal):
    batch = setting[1]
    inverted = batch._replace(**{signal: 255 - getattr(batch, signal)})
    assert take_step(setting)[1]["loss"] != take_step(setting, batch=inverted)[1]["loss"]


def test_the_ema_ticks_once_per_step(setting):
    state = setting[0]
    expected = jax.tree.map(np.asarray, state.params)
    for step in range(3):
        state, _ = take_step(setting, state=state)
        decay = min(TINY.train.ema, (1 + step) / (10 + step))
        expected = jax.tree.map(lambda old, new, decay=decay: decay * old + (1 - decay) * np.asarray(new), expected, state.params)
        assert state.step == step + 1
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6), state.ema, expected)
    assert not equal(state.ema, state.params)


def test_the_decay_of_the_ema_settles():
    train = TrainConfig(ema=0.99)
    np.testing.assert_allclose([train_state.ema_decay(train, jnp.int32(step)) for step in (0, 8, 100_000)], [0.1, 0.5, 0.99], rtol=1e-6)


def with_train(**changes):
    return dataclasses.replace(RUN, train=dataclasses.replace(RUN.train, **changes))


@pytest.mark.slow
def test_the_parts_of_a_batch_add_up_to_the_whole(setting):
    state, batch, autoencoder, constants = setting

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(config, state):
        draws = train_state.draw(config, 2, jax.random.key(0), with_history=True)
        return train_state.gradient(config, state.params, batch, draws, autoencoder, constants, with_history=True)

    (whole, metrics), (parts, metrics_of_parts) = (gradient(with_train(accumulation=count), state) for count in (1, 2))
    for ours, theirs in zip(jax.tree.leaves((parts, metrics_of_parts)), jax.tree.leaves((whole, metrics)), strict=True):
        assert jnp.linalg.norm(ours - theirs) <= 1e-5 * jnp.linalg.norm(theirs)
    after, _ = step_of(with_train(accumulation=2), state, batch, autoencoder, constants, jax.random.key(0), with_history=True)
    once, _ = take_step(setting)
    assert after.step == 1 and after.opt_state[1].count == 1
    for ours, theirs, start in zip(*(jax.tree.leaves(tree.ema) for tree in (after, once, state)), strict=True):
        assert jnp.linalg.norm(ours - theirs) <= 1e-2 * jnp.linalg.norm(theirs - start) + 1e-7, "the EMA ticks once"


def test_a_step_that_is_not_finite_changes_nothing_but_its_count(setting):
    state, batch, autoencoder, constants = setting
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), autoencoder)
    for count in 1, 2:
        state, metrics = step_of(RUN, state, batch, broken, constants, jax.random.key(0), with_history=True)
        assert not np.isfinite(metrics["loss"]) and state.step == state.bad == metrics["bad"] == count
        assert equal(state.replace(step=0, bad=0), setting[0].replace(step=0, bad=0))
    state, metrics = take_step(setting, state=state)
    assert state.bad == metrics["bad"] == 0 and np.isfinite(metrics["loss"]) and not equal(state.params, setting[0].params)


def test_a_gradient_that_is_not_finite_is_one_too(setting, monkeypatch):
    state, batch, autoencoder, constants = setting
    infinite = lambda *_, **__: (like(state.params, jnp.inf), {"loss": jnp.float32(1)})
    monkeypatch.setattr(train_state, "gradient", infinite)
    after, _ = train_state.train_step(RUN, state, batch, autoencoder, constants, jax.random.key(0), with_history=True)
    assert after.bad == 1 and equal(after.params, state.params)


@pytest.mark.slow
def test_noise_on_history_is_of_the_second_stage_alone(setting):
    draw = lambda noise, stage: train_state.draw(with_train(history_noise=noise), 2, jax.random.key(0), with_history=stage)
    assert draw(0.0, True).history is None and draw(0.5, False).history is None
    assert equal(draw(0.5, True)._replace(history=None), draw(0.0, True)), "nothing else is drawn otherwise"
    state, batch, autoencoder, constants = setting
    noisy, _ = step_of(with_train(history_noise=0.5), state, batch, autoencoder, constants, jax.random.key(0), with_history=True)
    assert not equal(noisy.params, take_step(setting)[0].params)


def test_noise_on_history_is_up_to_as_strong_as_asked():
    spread = train_state.draw(with_train(history_noise=0.5), 64, jax.random.key(0), with_history=True).history.std(axis=(1, 2, 3, 4))
    assert 0 <= spread.min() < 0.05 and 0.45 < spread.max() < 0.52 and abs(spread.mean() - 0.25) < 0.06


KL = AutoencoderConfig(channels=(4, 4, 8), blocks=1, groups=2, latent_channels=6, scale=2.0, shift=0.25)


@pytest.mark.parametrize("with_history", [pytest.param(False, marks=pytest.mark.slow), True])
def test_all_frames_go_through_the_autoencoder_in_one_loop_and_come_out_apart(setting, with_history, monkeypatch):
    monkeypatch.setattr(train_state, "PIXELS_AT_ONCE", 5 * 32**2)  # of 2 x (4 + 1 + 4 [+ 2]) frames
    config = dataclasses.replace(RUN, autoencoder=KL, train=dataclasses.replace(RUN.train, history_noise=0.5))
    model, batch = make_autoencoder(KL, dtype=config.model.dtype), setting[1]
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 32, 32, 3)))["params"])
    draws = train_state.draw(config, 2, jax.random.key(0), with_history=with_history)
    one = jax.jit(lambda frames, noise=None: model.apply({"params": params}, to_unit(frames), noise, method="encode"))
    x0, conditions = jax.jit(functools.partial(train_state.encode, config, with_history=with_history))(params, batch, draws)
    history = one(batch.history) + draws.history if with_history else None
    expected = one(batch.target, draws.latent), one(batch.source), one(batch.driving), history
    assert_close((x0, *conditions[:3]), expected)
    assert (conditions.history is not None) == with_history and (conditions.level == draws.level).all()


def test_levels_are_drawn_as_often_as_asked():
    shares = LevelConfig(nothing=0.1, source=0.2, driving=0.3, history=0.4)
    config = dataclasses.replace(RUN, train=dataclasses.replace(RUN.train, stage2=shares), data=dataclasses.replace(RUN.data, size=8, frames=1, history=0))
    levels = jax.jit(lambda key: train_state.draw(config, 20_000, key, with_history=True).level)(jax.random.key(0))
    found = np.bincount(levels, minlength=4) / len(levels)
    np.testing.assert_allclose(found, shares.probabilities, atol=5 * np.sqrt(0.25 / len(levels)))


def test_the_loss_is_told_apart_by_noise(setting):
    state, batch, autoencoder, constants = setting
    draws = train_state.draw(RUN, 2, jax.random.key(0), with_history=True)._replace(t=jnp.array([0.05, 0.999]))
    loss = jax.jit(functools.partial(train_state.loss_fn, RUN, with_history=True))
    _, metrics = loss(state.params, batch, draws, autoencoder, constants)
    np.testing.assert_array_equal(metrics["samples"], [1, 0, 0, 0, 1])
    np.testing.assert_allclose(metrics["loss_sums"].sum() / 2, metrics["loss"], rtol=1e-6)
    assert metrics["loss_sums"][0] > 0 and metrics["loss_sums"][4] > 0


def test_loss_falls_on_a_repeated_batch(setting):
    state, losses = train_state.init_state(TINY, fresh_params()), []
    for _ in range(40):
        state, metrics = take_step(setting, state=state)
        losses.append(float(metrics["loss"]))
        state = state.replace(step=jnp.int32(0))  # the same noise, too
    assert losses[-1] < 0.7 * losses[0]


def test_what_counts_as_new():
    new = jax.tree_util.tree_map_with_path(lambda path, _: train_state.is_new(path), fresh_params())
    tops = {path[:2] for path, is_new in flatten_dict(new).items() if is_new}
    assert tops == {("dual", "temporal"), ("plain", "temporal"), ("last", "temporal"), ("frame_encoding", "wide"), ("frame_encoding", "out")}


@pytest.mark.parametrize("with_history", [False, True])
def test_a_step_of_the_full_model_keeps_shapes_and_types(with_history):
    """Traced at 576x576 and 16 + 3 frames, not run."""
    config = Config()
    frames, history, size = config.data.frames, config.data.history, config.data.size
    pictures = lambda *lead: jax.ShapeDtypeStruct((2, *lead, size, size, 3), np.uint8)
    batch = Batch(target=pictures(frames), history=pictures(history), source=pictures(), driving=pictures(frames))
    constants = abstract_inputs(config.model, batch=2, frames=frames, history=history, height=size // 8, width=size // 8)[3]
    empty = jnp.zeros((1, 64, 64, 3))
    autoencoder = jax.eval_shape(lambda key: nn.meta.unbox(make_autoencoder(config.autoencoder).init(key, empty)["params"]), jax.random.key(0))
    state = jax.eval_shape(lambda key: nn.meta.unbox(train_state.new_state(config, key)), jax.random.key(0))

    step = functools.partial(train_state.train_step, config, with_history=with_history)
    after, metrics = jax.eval_shape(step, state, batch, autoencoder, constants, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves((after.params, after.ema, after.opt_state[1].mu, after.opt_state[1].nu))} == {np.dtype(np.float32)}
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    assert metrics["loss"].shape == ()
