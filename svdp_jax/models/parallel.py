"""Attention over a mesh: what each device attends to, and what travels for it (SVDP, "Full-video attention").

    within frames    q, k, v [B,F,S,N,H], each frame by itself: nothing travels
    across frames    z [B,F,S,N,H] and history [B,P,S,N,H], joined here and nowhere else: frames are exchanged for heads, or, where
                     there are too few heads, keys and values are gathered

Frames lie on mesh axis `context`, heads on `tensor`. Merging samples and frames would make XLA gather them, so all of it happens
inside `shard_map`, where arrays are a device's own.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from svdp_jax.models.attention import ATTENTION, Backend, attention
from svdp_jax.sharding import Layout

HEADS = ("batch", "frames", "tokens", "heads", "head_size")


class Heads(NamedTuple):
    """Queries, keys and values of some frames. Queries are None where nothing is asked for."""

    q: Float[Array, "B F S N H"] | None
    k: Float[Array, "B F S N H"]
    v: Float[Array, "B F S N H"]


def within_frames(
    layout: Layout | None,
    q: Float[Array, "B F Q N H"],
    k: Float[Array, "B F K N H"],
    v: Float[Array, "B F K N H"],
    kept: Int[Array, "B"] | None,
    bound: Float[Array, ""],
    backend: Backend,
) -> Float[Array, "B F Q N H"]:
    """Each frame attends within itself; the first `kept` keys of each sample's frames count. No score exceeds `bound`."""

    def attend(q: Array, k: Array, v: Array, kept: Array | None, bound: Array):
        return attention(q, k, v, kept, bound=bound, backend=backend)

    return checkpoint_name(_on(layout, attend, (q, k, v), kept, bound), ATTENTION)


def across_frames(
    layout: Layout | None,
    z: Heads,
    history: Heads | None,
    kept: Int[Array, "B"] | None,
    bound: Float[Array, ""],
    *,
    factorized: bool,
    backend: Backend,
) -> tuple[Float[Array, "B F S N H"], Float[Array, "B P S N H"] | None]:
    """Frames attend to each other and to history: every token to every other, or, factorized, to its own place in other frames.

    The first `kept` keys of [z, history] count, frame after frame. No score exceeds `bound`. Returns what z and history asked for (None if history asks nothing).
    """
    exchange = layout is not None and layout.size("frames") > 1
    by_heads = exchange and z.k.shape[3] % (layout.size("heads") * layout.size("frames")) == 0
    axis = layout and layout.spec("frames")[0]

    def to_all_frames(x: Array, *, gather: bool) -> Array:
        if not exchange:
            return x
        if by_heads:
            return jax.lax.all_to_all(x, axis, split_axis=3, concat_axis=1, tiled=True)
        return jax.lax.all_gather(x, axis, axis=1, tiled=True) if gather else x

    def to_all_heads(x: Array) -> Array:
        return jax.lax.all_to_all(x, axis, split_axis=1, concat_axis=3, tiled=True) if by_heads else x

    def attend(z: Heads, history: Heads | None, kept: Array | None, bound: Array):
        both = [z] if history is None else [z, history]
        asking = [to_all_frames(part.q, gather=False) for part in both if part.q is not None]
        q = jnp.concatenate(asking, axis=1)
        k, v = (jnp.concatenate([to_all_frames(getattr(part, name), gather=True) for part in both], axis=1) for name in "kv")
        tokens = k.shape[2]
        if factorized:
            q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # [B, S, F+P, N, H]
            out = attention(q, k, v, None if kept is None else kept // tokens, bound=bound, backend=backend)
            out = jnp.swapaxes(out, 1, 2)
        else:
            shape = q.shape
            q, k, v = (x.reshape(x.shape[0], 1, -1, *x.shape[3:]) for x in (q, k, v))  # [B, 1, (F+P)*S, N, H]
            out = attention(q, k, v, kept, bound=bound, backend=backend).reshape(shape)
        frames = asking[0].shape[1]
        return tuple(to_all_heads(part) for part in ((out,) if len(asking) == 1 else (out[:, :frames], out[:, frames:])))

    out = checkpoint_name(_on(layout, attend, (z, history), kept, bound), ATTENTION)
    return out if len(out) == 2 else (*out, None)


def _on(layout: Layout | None, function, arrays, kept: Array | None, bound: Array):
    """`function` of a device's own part of arrays with frames and heads, of `kept` for its samples, and of `bound`."""
    if layout is None:
        return function(*arrays, kept, bound)
    heads = layout.spec(*HEADS)
    specs = (*jax.tree.map(lambda _: heads, arrays), None if kept is None else layout.spec("batch"), layout.spec())
    return jax.shard_map(function, mesh=layout.mesh, in_specs=specs, out_specs=heads, check_vma=False)(*arrays, kept, bound)


def padded(layout: Layout | None, frames: int) -> int:
    """The smallest number of frames, at least so many, that divides over the devices that share them."""
    return frames + (-frames % layout.size("frames") if layout else 0)
