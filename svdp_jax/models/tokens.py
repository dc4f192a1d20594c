"""Latents to tokens, where each token sits, and which of them a pass sees (SVDP, "Shifted positions" and "Signals").

A frame is one sequence, [text, z, source, driving], so that each level of conditioning is a prefix of it: training masks
the rest by length, sampling leaves it out. History frames are [text, history] and meet z only in the temporal blocks.
"""

from __future__ import annotations

import einops
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from svdp_jax.config import ConfigError, ModelConfig
from svdp_jax.types import Conditions

NOTHING, SOURCE, DRIVING, HISTORY = range(4)  # levels of conditioning, each containing the one before


def patchify(latents: Num[Array | np.ndarray, "*lead h w C"], patch: int) -> Num[Array | np.ndarray, "*lead S E"]:
    """Latents as rows of tokens, row-major; within a token E = (row, column, channel), channel fastest."""
    return einops.rearrange(latents, "... (h p) (w q) c -> ... (h w) (p q c)", p=patch, q=patch)


def unpatchify(tokens: Num[Array | np.ndarray, "*lead S E"], patch: int, height: int, width: int) -> Num[Array | np.ndarray, "*lead h w C"]:
    """The inverse of `patchify`, for latents of `height` x `width`."""
    return einops.rearrange(tokens, "... (h w) (p q c) -> ... (h p) (w q) c", h=height // patch, w=width // patch, p=patch, q=patch)


def position_table(config: ModelConfig) -> Float[np.ndarray, "R R D"]:
    """The sin-cos table [row, column, D] of a model from scratch; a converted model has its own.

    The first half of the channels encodes the column, the second the row, each as [sine | cosine].
    """
    quarter = config.width // 4
    frequency = 1e4 ** (-np.arange(quarter) / quarter)
    angle = np.arange(config.table_size)[:, None] * config.position_step * frequency  # [R, D/4]
    axis = np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)  # [R, D/2]
    shape = (config.table_size, config.table_size, config.width // 2)
    return np.concatenate([np.broadcast_to(axis[None], shape), np.broadcast_to(axis[:, None], shape)], axis=-1).astype(np.float32)


def shifted_crops(table: Num[Array | np.ndarray, "R R D"], rows: int, columns: int) -> Num[Array, "3 S D"]:
    """The crops of the table for z (its centre), source (shifted towards +) and driving (towards -), by max(rows, columns).

    Raises ConfigError if a grid of rows x columns tokens would leave the table.
    """
    side, shift = table.shape[0], max(rows, columns)
    top, left = (side - rows) // 2, (side - columns) // 2
    if min(top, left) - shift < 0 or max(top + rows, left + columns) + shift > side:
        raise ConfigError(f"a grid of {rows}x{columns} tokens, shifted by {shift} either way, leaves the position table of {side}x{side}; use a smaller size")
    crops = [table[top + d : top + d + rows, left + d : left + d + columns] for d in (0, shift, -shift)]
    return jnp.stack([jnp.asarray(crop).reshape(rows * columns, -1) for crop in crops])


def kept_tokens(level: Int[Array, "B"], tokens: int) -> Int[Array, "B"]:
    """How many of a frame's image tokens [z, source, driving], `tokens` each, a sample of this level keeps."""
    return tokens * (1 + jnp.minimum(level, DRIVING))


def kept_in_time(level: Int[Array, "B"], frames: int, history: int, tokens: int) -> Int[Array, "B"]:
    """How many keys of [z, history] (frames and history frames of `tokens` each) a sample of this level keeps."""
    return tokens * (frames + jnp.where(level >= HISTORY, history, 0))


def at_level(conditions: Conditions, level: int, *, dropped: str) -> Conditions:
    """The conditions of one pass: signals above `level` are left out (`omit`) or replaced by zeros (`zero`)."""

    def keep(signal, first: int):
        if signal is None or first <= level:
            return signal
        return jnp.zeros_like(signal) if dropped == "zero" else None

    return Conditions(keep(conditions.source, SOURCE), keep(conditions.driving, DRIVING), keep(conditions.history, HISTORY))


def zero_dropped(conditions: Conditions) -> Conditions:
    """The conditions with each dropped signal multiplied by zero in place; none is left to be masked."""
    if conditions.level is None:
        return conditions

    def keep(signal, first: int):
        return None if signal is None else jnp.where((conditions.level >= first).reshape(-1, *[1] * (signal.ndim - 1)), signal, 0)

    return Conditions(keep(conditions.source, SOURCE), keep(conditions.driving, DRIVING), keep(conditions.history, HISTORY))
