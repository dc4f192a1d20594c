"""The network: noisy latents, conditions and noise level to the network's output (velocity or x0), and nothing else.

    z [B, F, h, w, C], t [B], Conditions, Constants  ->  [B, F, h, w, C]
    history [B, P, h, w, C], Constants               ->  Memory, in place of history, where `ModelConfig.history` is "cached"

Trunk: Stable Diffusion 3.5 Medium's MMDiT-X. New: a temporal block before each joint block and the frame encoding
(SVDP, "Method"). Layers of one kind are scanned; the only call outside a scan is the last one.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from svdp_jax.config import ModelConfig
from svdp_jax.models import tokens
from svdp_jax.models.attention import ATTENTION, Backend
from svdp_jax.models.blocks import LAYER_INPUT, Kind, Layer, Shared, Streams, place
from svdp_jax.models.layers import Modulation, dense, layer_norm, modulate, sinusoid
from svdp_jax.models.parallel import padded
from svdp_jax.sharding import Layout
from svdp_jax.types import Conditions, Constants, Memory

Remat = Literal["none", "full", "attention", "offload"]


def _saves_attention(primitive, *_, **parameters) -> bool:
    """What attention has put out, by its name, and of cuDNN, which has no names, all that its forward kernel has: else that runs again."""
    return primitive.name.startswith("dot_product_attention_fwd") or parameters.get("name") == ATTENTION


# What a layer's backward pass finds; the rest it computes again. With "none" it finds all.
REMAT = {
    "full": None,  # the layer's input
    "attention": _saves_attention,  # besides, what attention has put out: over half of a layer's work is not done again
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(  # both, kept in the host's memory
        names_which_can_be_saved=[], names_which_can_be_offloaded=[ATTENTION, LAYER_INPUT], offload_src="device", offload_dst="pinned_host"
    ),
}

FLOAT32_PARTS = ("time", "pooled", "frame_encoding", "q_norm", "k_norm")  # parameters that are computed with in float32, whatever the network's dtype
TIME_FREQUENCIES = 128
TIME_SCALE = 1000.0  # the network's clock, per unit of t


def layer_groups(config: ModelConfig) -> list[tuple[Kind, int]]:
    """Runs of equal layers, in order: (kind, how many)."""
    runs = [("dual", config.dual_blocks), ("plain", config.depth - config.dual_blocks - 1), ("last", 1)]
    return [(kind, count) for kind, count in runs if count]


class Embedding(nn.Module):
    """Linear, SiLU, Linear: the shape of the time, pooled-text and frame-number embeddings."""

    config: ModelConfig
    source: str  # name of the input's axis
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "*lead E"]) -> Float[Array, "*lead D"]:
        x = dense(self.config.width, (self.source, "hidden"), dtype=self.dtype, name="wide")(x)
        return dense(self.config.width, ("hidden", "embed"), dtype=self.dtype, name="out")(nn.silu(x))


class Transformer(nn.Module):
    """See the module's docstring. `remat` is what the backward pass of a layer computes again (REMAT)."""

    config: ModelConfig
    backend: Backend = "auto"
    remat: Remat = "none"
    layout: Layout | None = None  # of a mesh; None: one device
    unroll: bool = False  # layers one after the other instead of scanned: slow to compile, but XLA's cost analysis sees them all

    def remember(self, history: Float[Array, "B P h w C"], constants: Constants) -> Memory:
        """What `history="cached"` needs of a window's history, once for all of its steps: it takes its place in `Conditions`."""
        if self.config.history != "cached":
            raise ValueError('a network with history="joint" updates history together with z: nothing of it can be kept')
        return self(None, None, Conditions(history=history), constants)

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "B F h w C"] | None,
        t: Float[Array, "B"] | None,
        conditions: Conditions,
        constants: Constants,
        *,
        frame_numbers: Float[Array, "F"] | None = None,
    ) -> Float[Array, "B F h w C"] | Memory:
        """`t` in [0, 1], 1 is noise. Frames are numbered 0..F-1 unless told otherwise; history is -P..-1."""
        config = self.config
        if config.dropped == "zero":
            conditions = tokens.zero_dropped(conditions)
        source, driving, history, level = conditions
        if driving is not None and source is None:
            raise ValueError("driving frames without a source: the levels of conditioning are nested (nothing, source, driving, history)")
        memory, history = (history, None) if isinstance(history, Memory) else (None, history)
        past = memory.frames if memory else 0 if history is None else history.shape[1]
        positions = constants.positions.astype(config.dtype)
        count = positions.shape[1]  # S

        # Latents to tokens, told apart by their positions alone.
        patches = dense(config.width, ("patch", "embed"), dtype=config.dtype, name="patches")
        embed = lambda latents: patches(tokens.patchify(latents, config.patch))
        words = dense(config.width, ("text", "embed"), dtype=config.dtype, name="text")(constants.text)
        spread = lambda batch, frames: jnp.broadcast_to(words, (batch, frames, *words.shape))
        # Time, pooled text and frame numbers, in float32.
        embed_time = Embedding(config, "time", "float32", name="time")
        pooled = Embedding(config, "pooled", "float32", name="pooled")(constants.pooled)
        clock = lambda t: embed_time(sinusoid(TIME_SCALE * t, TIME_FREQUENCIES)) + pooled
        embed_frame = Embedding(config, "time", "float32", name="frame_encoding")
        number = lambda numbers: embed_frame(sinusoid(numbers, config.frame_frequencies))

        streams, shared = Streams(None, None, None, None), Shared(None, None, None, None, None, None)
        if z is not None:
            batch, frames, height, width, _ = z.shape
            image = [embed(z) + positions[0]]
            if source is not None:
                image.append(jnp.broadcast_to((embed(source) + positions[1])[:, None], image[0].shape))
            if driving is not None:
                image.append(embed(driving) + positions[2])
            streams = streams._replace(text=spread(batch, frames), image=jnp.concatenate(image, axis=2))  # [B, F, S | 2S | 3S, D]
            shared = shared._replace(c=clock(t), frame_code=number(jnp.arange(frames) if frame_numbers is None else frame_numbers))
            if level is not None:
                shared = shared._replace(kept_tokens=tokens.kept_tokens(level, count), kept_in_time=tokens.kept_in_time(level, frames, past, count))
            elif padded(self.layout, past) > past:  # by frames that nobody sees, behind [z, history]
                shared = shared._replace(kept_in_time=jnp.full((batch,), (frames + past) * count))
        if history is not None:
            batch, frames_of_it = len(history), padded(self.layout, past)
            history = jnp.pad(history, ((0, 0), (0, frames_of_it - past), (0, 0), (0, 0), (0, 0)))
            shared = shared._replace(c_history=clock(jnp.zeros(batch)), history_code=number(jnp.arange(-past, frames_of_it - past)))
            streams = streams._replace(history_text=spread(batch, frames_of_it), history=embed(history) + positions[0])
        streams = place(self.layout, streams)

        remembered = {}
        for kind, layers in layer_groups(config):
            layer = Layer
            if self.remat != "none" and self.layout and self.layout.mesh.shape["fsdp"] > 1 and not self.is_initializing():  # with "none", whole matrices would be kept
                layer = nn.map_variables(layer, "params", functools.partial(self.layout.in_use, names={"params": axis_names(config)[kind]}))
            if self.remat != "none" and kind != "last":  # whose backward pass comes at once
                layer = nn.remat(layer, prevent_cse=False, policy=REMAT[self.remat])
            if kind != "last":
                layer = nn.scan(
                    layer,
                    variable_axes={"params": 0, "intermediates": 0},  # the latter for whoever captures what layers put out
                    split_rngs={"params": True},
                    in_axes=(nn.broadcast, 0),
                    length=layers,
                    unroll=layers if self.unroll else 1,
                    metadata_params={nn.PARTITION_NAME: "layers"},
                )
            streams, remembered[kind] = layer(config, kind, count, self.backend, self.layout, name=kind)(streams, shared, memory and memory.layers[kind])
        if z is None:
            return Memory(remembered, past)

        out = layer_norm(streams.image[:, :, :count])
        shift, scale = Modulation(config, chunks=2, layout=self.layout, name="final_modulation")(shared.c)
        head = dense(config.patch**2 * config.latent_channels, ("embed", "patch"), dtype=config.dtype, zero=True, name="final")
        out = head(modulate(out, shift, scale).astype(config.dtype)).astype(jnp.float32)
        return tokens.unpatchify(out, config.patch, height, width)


def smallest_inputs(config: ModelConfig):
    """Shapes of arguments to initialise the network with: no parameter depends on how many or how large frames are."""
    return abstract_inputs(config, batch=1, frames=1, history=1, height=config.patch, width=config.patch)


@functools.cache
def boxed_params(config: ModelConfig) -> Any:
    """Shapes of all parameters, boxed with the names of their axes (see `flax.linen.meta`)."""
    return jax.eval_shape(Transformer(config, parent=None).init, jax.random.key(0), *smallest_inputs(config))["params"]


def axis_names(config: ModelConfig) -> Any:
    """The names of the axes of every parameter; of scanned layers, of one layer."""
    names = lambda leaf: tuple(name for name in leaf.names if name != "layers")
    return jax.tree.map(names, boxed_params(config), is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def computing_type(config: ModelConfig, path: tuple) -> str:
    """The type that the network computes in with the parameter at this path of its tree."""
    return "float32" if {getattr(entry, "key", None) for entry in path} & set(FLOAT32_PARTS) else config.dtype


def in_computing_types(config: ModelConfig, params: Any) -> Any:
    """Parameters in the types that the network computes in. The result is the same to the bit; but what is gathered over a mesh is gathered in these
    types, and of a layer that z and history both go through, once, and its gradient is reduced once."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf.astype(computing_type(config, path)), params)


def abstract_inputs(config: ModelConfig, *, batch: int, frames: int, history: int, height: int, width: int):
    """Shapes of every argument of the network, for initialising and for lowering: (z, t, Conditions, Constants)."""
    array = jax.ShapeDtypeStruct
    latents = lambda *lead: array((*lead, height, width, config.latent_channels), jnp.float32)
    positions = (3, (height // config.patch) * (width // config.patch), config.width)
    return (
        latents(batch, frames),
        array((batch,), jnp.float32),
        Conditions(latents(batch), latents(batch, frames), latents(batch, history) if history else None),
        Constants(array(positions, jnp.float32), array((config.text_tokens, config.text_width), jnp.float32), array((config.pooled_width,), jnp.float32)),
    )
