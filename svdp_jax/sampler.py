"""Four guided passes per step, one compiled program per window, and the roll-out over windows (SVDP, "Inference").

    v = u + ls (s - u) + ld (d - s) + lp (p - d),   collected per pass:  (1-ls) u + (ls-ld) s + (ld-lp) d + lp p

u sees nothing, s the source, d the driving frames as well, p history as well. A pass whose coefficient is zero is not
compiled in; its coefficient otherwise is traced, so that a new guidance weight costs no compilation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from svdp_jax import flow
from svdp_jax.config import ModelConfig, SampleConfig
from svdp_jax.models import tokens
from svdp_jax.models.layers import COMPILER
from svdp_jax.sharding import Layout
from svdp_jax.types import Conditions, Constants, Memory


@runtime_checkable
class Network(Protocol):
    """What is asked of a network, which must be hashable: `models.transformer.Transformer` is one."""

    config: ModelConfig
    layout: Layout | None

    def apply(self, variables: Any, *inputs: Any, **how: Any) -> Any: ...


def guided_passes(guidance: tuple[float, float, float], *, with_history: bool) -> dict[int, float]:
    """Level of conditioning -> coefficient, for the passes that matter. Without history, p = d."""
    source, driving, history = guidance
    weights = [source, driving, history if with_history else 0.0]
    coefficients = {level: above - below for level, (above, below) in enumerate(zip([1.0, *weights], [*weights, 0.0], strict=True))}
    return {level: coefficient for level, coefficient in coefficients.items() if coefficient != 0.0}


def signals_of(model: Network, params: Any, constants: Constants, conditions: Conditions, levels: Sequence[int]) -> tuple[Conditions, ...]:
    """What the pass of each level sees. Where the network only attends to history, this is its keys and values: once for all steps."""
    passes = {level: tokens.at_level(conditions, level, dropped=model.config.dropped) for level in levels}
    if model.config.history == "cached":
        given = {level >= tokens.HISTORY: signals.history for level, signals in passes.items() if signals.history is not None}  # it, or zeros
        memories = {kept: remember(model, params, history, constants) for kept, history in given.items()}
        passes = {level: signals._replace(history=memories.get(level >= tokens.HISTORY)) for level, signals in passes.items()}
    return tuple(passes.values())


@functools.partial(jax.jit, static_argnames=("model",))
def remember(model: Network, params: Any, history: Float[Array, "B P h w C"], constants: Constants) -> Memory:
    """`Transformer.remember`, compiled."""
    return model.apply({"params": params}, history, constants, method="remember")


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("z",), compiler_options=COMPILER)
def denoise(
    model: Network,
    params: Any,
    constants: Constants,
    z: Float[Array, "B F h w C"],
    passes: tuple[Conditions, ...],
    coefficients: Float[Array, "passes"],
    noise_levels: Float[Array, "levels"],
    first: Int[Array, ""],
    last: Int[Array, ""],
) -> tuple[Float[Array, "B F h w C"], Int[Array, ""]]:
    """Steps first..last-1 of a window. Returns the latents and `last`, whose arrival tells the host how far it is."""

    def step(i, z):
        t = jnp.full((len(z),), noise_levels[i])
        v = jnp.zeros_like(z)
        for signals, coefficient in zip(passes, coefficients, strict=True):
            output = model.apply({"params": params}, z, t, signals, constants)
            v += coefficient * flow.velocity(output, z, t, model.config.prediction)
        return flow.euler(z, v, noise_levels[i], noise_levels[i + 1])

    return jax.lax.fori_loop(first, last, step, z), last


def sample_window(
    model: Network,
    params: Any,
    constants: Constants,
    conditions: Conditions,
    key: Key[Array, ""],
    *,
    sample: SampleConfig,
    history: int,
    progress: Callable[[int], None] = lambda steps: None,
) -> Float[Array, "B F h w C"]:
    """Latents of one window from noise; `conditions` has source, driving and, but for a first window, `history` frames.

    The device runs the steps in chunks, one ahead of the host, which calls `progress` with the steps of each that is done.
    """
    passes = guided_passes(sample.guidance, with_history=conditions.history is not None)
    if history and model.config.dropped == "zero" and conditions.history is None:
        conditions = conditions._replace(history=jnp.zeros_like(conditions.driving[:, :history]))
    signals, coefficients = signals_of(model, params, constants, conditions, tuple(passes)), jnp.array(list(passes.values()), jnp.float32)
    noise_levels = jnp.array(flow.noise_levels(sample.steps, shift=sample.shift))
    z = jax.random.normal(key, conditions.driving.shape, jnp.float32)
    if model.layout:
        z = jax.device_put(z, model.layout.sharding("batch", "frames"))
    waiting: list[tuple[int, Array]] = []
    for first in range(0, sample.steps, sample.chunk):
        last = min(first + sample.chunk, sample.steps)
        z, done = denoise(model, params, constants, z, signals, coefficients, noise_levels, jnp.int32(first), jnp.int32(last))
        waiting.append((last - first, done))
        if len(waiting) > 1:
            _wait(waiting.pop(0), progress)
    _wait(waiting.pop(), progress)
    return z


def _wait(chunk: tuple[int, Array], progress: Callable[[int], None]) -> None:
    steps, done = chunk
    done.block_until_ready()
    progress(steps)


def roll_out(
    model: Network,
    params: Any,
    constants: Constants,
    source: Float[Array, "B h w C"],
    driving: Iterable[Float[Array, "B F h w C"]],
    key: Key[Array, ""],
    *,
    sample: SampleConfig,
    history: int,
    first: int = 0,
    past: Float[Array, "B P h w C"] | None = None,
    progress: Callable[[int], None] = lambda steps: None,
) -> Iterator[Float[Array, "B F h w C"]]:
    """The latents of one window after the other; each sees the last `history` frames of the one before it.

    To go on where an earlier roll-out ended, give the number of the `first` window to make, of which `driving` begins, and the
    `past`, the last `history` frames before it: the windows are then those of a roll-out that was not interrupted.
    """
    for window, frames in enumerate(driving, start=first):
        conditions = Conditions(source, frames, past)
        z = sample_window(model, params, constants, conditions, jax.random.fold_in(key, window), sample=sample, history=history, progress=progress)
        past = z[:, -history:] if history else None
        yield z
