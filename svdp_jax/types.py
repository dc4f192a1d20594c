"""The axis legend, and the structs that cross from one stage to the next.

Axis letters, everywhere: B batch, F frames, P history frames, h w latent grid, H W pixels, S tokens per image,
T text tokens, D width, N heads, C latent channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.struct
from jaxtyping import Array, Float, Int, UInt8


class Batch(NamedTuple):
    """What the loader hands to the train step: frames as bytes, RGB, 0..255."""

    target: UInt8[Array, "B F H W 3"]  # the real clip, what the model learns to make
    history: UInt8[Array, "B P H W 3"]  # the frames right before it
    source: UInt8[Array, "B H W 3"]  # one frame of the same clip, outside target and history
    driving: UInt8[Array, "B F H W 3"]  # the other person in the same motion, black but for eyes, nose and mouth


class Memory(flax.struct.PyTreeNode):
    """What a network with `history="cached"` keeps of the history of a window (`Transformer.remember`)."""

    layers: dict[str, Any]  # kind of layer -> keys and values of the temporal blocks, [layers, B, P, S, N, H]; those of the last, [B, P, S, N, H]
    frames: int = flax.struct.field(pytree_node=False)  # P, without padding


class Conditions(NamedTuple):
    """What the model sees beside the noise, as latents. A signal that is None is dropped and costs nothing.

    `level` drops signals sample by sample, under static shapes: 0 keeps nothing, 1 the source, 2 the driving frames
    as well, 3 history as well. None keeps all that is there.
    """

    source: Float[Array, "B h w C"] | None = None
    driving: Float[Array, "B F h w C"] | None = None
    history: Float[Array, "B P h w C"] | Memory | None = None
    level: Int[Array, "B"] | None = None


class Constants(NamedTuple):
    """Inputs of the model that no sample changes and no gradient reaches."""

    positions: Float[Array, "3 S D"]  # crops of the position table for z, source, driving
    text: Float[Array, "T E"]  # embedding of the constant prompt
    pooled: Float[Array, "Y"]  # its pooled embedding


class Frozen(NamedTuple):
    """What stands beside the trained parameters in a checkpoint and is never trained."""

    autoencoder: Any  # its parameters
    table: Float[Array, "R R D"]  # the whole position table
    text: Float[Array, "T E"]
    pooled: Float[Array, "Y"]
