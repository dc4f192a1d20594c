"""The rectified flow: the one place where the sign convention stands (SVDP, "Preliminaries"; SD3, "Rectified flow").

    x_t = (1 - t) x0 + t eps,   v = eps - x0,   dx/dt = v:   t = 1 is noise, t = 0 is data, sampling walks t downwards.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

Scalar = Float[Array, ""] | np.floating | float

TRAINING_STEPS = 1000  # of the grid on which SD3's schedule is defined


def interpolate(x0: Float[Array, "B *latents"], eps: Float[Array, "B *latents"], t: Float[Array, "B"]) -> Float[Array, "B *latents"]:
    """x_t."""
    t = per_sample(t, x0.ndim)
    return (1 - t) * x0 + t * eps


def target(x0: Float[Array, "B *latents"], eps: Float[Array, "B *latents"], prediction: str) -> Float[Array, "B *latents"]:
    """What the network is trained to put out."""
    return x0 if prediction == "x0" else eps - x0


def velocity(output: Float[Array, "B *latents"], x_t: Float[Array, "B *latents"], t: Float[Array, "B"], prediction: str) -> Float[Array, "B *latents"]:
    """The velocity that the network's output stands for; t > 0."""
    return (x_t - output) / per_sample(t, x_t.ndim) if prediction == "x0" else output


def euler(x: Float[Array, "*latents"], v: Float[Array, "*latents"], t: Scalar, t_next: Scalar) -> Float[Array, "*latents"]:
    """One step from t to t_next."""
    return x + (t_next - t) * v


def loss_per_sample(output: Float[Array, "B *latents"], wanted: Float[Array, "B *latents"]) -> Float[Array, "B"]:
    """Mean square error, in float32."""
    error = output.astype(jnp.float32) - wanted.astype(jnp.float32)
    return jnp.square(error).mean(axis=tuple(range(1, error.ndim)))


def shifted(t: Float[Array | np.ndarray, "*n"] | float, shift: float) -> Float[Array | np.ndarray, "*n"] | float:
    """SD3's time shift: more noise for a larger `shift`, 0 and 1 stay."""
    return shift * t / (1 + (shift - 1) * t)


def draw_t(key: Key[Array, ""], samples: int, *, shift: float) -> Float[Array, "B"]:
    """Training noise levels: logit-normal(0, 1), then shifted."""
    return shifted(jax.nn.sigmoid(jax.random.normal(key, (samples,))), shift)


def noise_levels(steps: int, *, shift: float) -> Float[np.ndarray, "{steps+1}"]:
    """The levels t that the sampler visits, from 1 to 0: SD3's list, in which the low end is shifted twice."""
    lowest = shifted(1 / TRAINING_STEPS, shift)
    return np.append(shifted(np.linspace(1, lowest, steps), shift), 0).astype(np.float32)


def per_sample(t: Float[Array, "B"], ndim: int) -> Float[Array, "B *ones"]:
    """`t` with trailing axes, to be combined with an array of `ndim` axes."""
    return jnp.reshape(t, (-1, *[1] * (ndim - 1)))
