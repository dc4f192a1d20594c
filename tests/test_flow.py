"""The rectified flow, by numbers worked out by hand: a wrong sign or a swapped end shows here first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svdp_jax import flow

X0, EPS, T = jnp.array([[2.0, -4.0], [1.0, 3.0]]), jnp.array([[10.0, 0.0], [-1.0, 5.0]]), jnp.array([0.25, 1.0])


def test_signs_by_hand():
    x_t = flow.interpolate(X0, EPS, T)
    np.testing.assert_array_equal(x_t, [[4, -3], [-1, 5]])  # a quarter of the way from data to noise; noise
    np.testing.assert_array_equal(flow.target(X0, EPS, "velocity"), [[8, 4], [-2, 2]])
    np.testing.assert_array_equal(flow.target(X0, EPS, "x0"), X0)
    np.testing.assert_array_equal(flow.euler(jnp.array([4.0, -3.0]), jnp.array([8.0, 4.0]), 0.25, 0.125), [3, -3.5])


@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_a_perfect_network_walks_back_to_the_data(prediction):
    x_t = flow.interpolate(X0, EPS, T)
    v = flow.velocity(flow.target(X0, EPS, prediction), x_t, T, prediction)
    np.testing.assert_allclose(v, EPS - X0, rtol=1e-6)
    for sample in range(2):
        np.testing.assert_allclose(flow.euler(x_t[sample], v[sample], T[sample], 0.0), X0[sample], atol=1e-6)


def test_velocity_is_the_direction_in_which_x_t_moves():
    x_t, v = jax.jvp(lambda t: flow.interpolate(X0, EPS, t), (T,), (jnp.ones(2),))
    np.testing.assert_allclose(v, flow.target(X0, EPS, "velocity"), rtol=1e-6)


def test_euler_is_exact_where_the_velocity_is_constant():
    x, v = EPS, EPS - X0
    levels = flow.noise_levels(7, shift=3.0)
    for t, t_next in zip(levels[:-1], levels[1:], strict=True):
        x = flow.euler(x, v, t, t_next)
    np.testing.assert_allclose(x, X0, atol=2e-6)


def test_the_shift_keeps_both_ends_and_adds_noise_between():
    np.testing.assert_allclose(flow.shifted(jnp.array([0.0, 0.25, 0.5, 1.0]), 3.0), [0, 0.5, 0.75, 1], rtol=1e-6)
    np.testing.assert_allclose(flow.shifted(jnp.array([0.0, 0.3, 1.0]), 1.0), [0, 0.3, 1], rtol=1e-6)


@pytest.mark.parametrize("steps", [4, 28, 40, 50])
def test_noise_levels(steps):
    levels = flow.noise_levels(steps, shift=3.0)
    assert levels.shape == (steps + 1,) and levels.dtype == np.float32
    assert levels[0] == 1 and levels[-1] == 0
    assert levels[-2] == pytest.approx(0.00892857, abs=1e-8)  # 0.001, shifted twice
    assert (np.diff(levels) < 0).all()


def test_loss_is_taken_in_float32_per_sample():
    output = jnp.full((2, 64, 64), 1.0, jnp.bfloat16).at[1].set(2.0)
    wanted = jnp.full((2, 64, 64), 1.0078125, jnp.bfloat16).at[1].set(0.0)  # the neighbour of 1 in bfloat16
    loss = flow.loss_per_sample(output, wanted)
    assert loss.dtype == jnp.float32
    np.testing.assert_array_equal(loss, [0.0078125**2, 4])
    odd = flow.loss_per_sample(jnp.array([[1.0, 0.0, 0.0]], jnp.bfloat16), jnp.zeros((1, 3), jnp.bfloat16))
    np.testing.assert_allclose(odd, [1 / 3], rtol=1e-6)  # the mean, too: bfloat16 has 0.334


def test_training_sees_more_noise_than_not():
    t = flow.draw_t(jax.random.key(0), 20_000, shift=3.0)
    assert t.shape == (20_000,) and 0 < t.min() and t.max() < 1
    np.testing.assert_allclose(jnp.quantile(t, jnp.array([0.5])), [0.75], atol=0.01)
    # One standard deviation either way: sigmoid(-1) = 0.2689 and sigmoid(1) = 0.7311, shifted.
    np.testing.assert_allclose(jnp.quantile(t, jnp.array([0.1587, 0.8413])), [0.5246, 0.8908], atol=0.01)
