"""The two blocks of the model: the temporal block across frames, and SD3.5's joint image-text block within a frame.

    for each of `depth` layers:   z, history = temporal(z, history)         SVDP, "Full-video attention"
                                  text, image = joint(text, image)          each frame by itself
                                  text', history = joint(text', history)    the same weights, modulated as clean (t = 0)

`image` is [z, source, driving] or a prefix of it, [B, F, S z + S source + S driving, D].
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from svdp_jax.config import ModelConfig
from svdp_jax.models.attention import Backend
from svdp_jax.models.layers import MLP, QKV, Modulation, Output, layer_norm, modulate, score_bound
from svdp_jax.models.parallel import Heads, across_frames, within_frames
from svdp_jax.sharding import Layout

Kind = Literal["dual", "plain", "last"]
LAYER_INPUT = "layer_input"  # the name of a layer's input, for rematerialisation


class Streams(NamedTuple):
    """What a layer updates. History is None where a pass has none, text and image where only history is to be remembered."""

    text: Float[Array, "B F T D"] | None
    image: Float[Array, "B F _ D"] | None
    history_text: Float[Array, "B P T D"] | None
    history: Float[Array, "B P S D"] | None


class Shared(NamedTuple):
    """What all layers see alike."""

    c: Float[Array, "B D"] | None  # time and text, of the noisy frames
    c_history: Float[Array, "B D"] | None  # the same at t = 0
    frame_code: Float[Array, "F D"] | None
    history_code: Float[Array, "P D"] | None
    kept_tokens: Int[Array, "B"] | None  # image tokens of a frame that count; None: all
    kept_in_time: Int[Array, "B"] | None  # keys of [z, history] that count; None: all


class TemporalBlock(nn.Module):
    """Attention of z over the z tokens of all frames and the tokens of history; source and driving take no part.

    `full`: every token of every frame attends to every other. `factorized`: a token attends only to its own place in
    other frames (the paper's ablation).
    """

    config: ModelConfig
    backend: Backend
    update_history: bool  # whether history tokens ask, too
    layout: Layout | None = None

    @nn.compact
    def __call__(self, z: Float[Array, "B F S D"] | None, history: Float[Array, "B P S D"] | Heads | None, shared: Shared):
        """(z, history). Where history is its keys and values, it stays; without z, they are what comes in its place."""
        config = self.config
        modulation = Modulation(config, chunks=3, gate=(2, config.temporal_gate), layout=self.layout, name="modulation")
        qkv, output = QKV(config, name="qkv"), Output(config, name="out")

        def heads(x, c, code):
            shift, scale, gate = modulation(c)
            seen = modulate(layer_norm(x), shift, scale) + code[:, None]
            return Heads(*qkv(seen.astype(config.dtype))), gate

        past, past_gate = (history, None) if history is None or isinstance(history, Heads) else heads(history, shared.c_history, shared.history_code)
        if past and not self.update_history:
            past = past._replace(q=None)
        if z is None:
            return None, past
        asked, gate = heads(z, shared.c, shared.frame_code)
        factorized = config.temporal == "factorized"
        out, past_out = across_frames(self.layout, asked, past, shared.kept_in_time, score_bound(qkv), factorized=factorized, backend=self.backend)

        z = (z + gate * output(out)).astype(z.dtype)
        if past_out is not None:
            history = (history + past_gate * output(past_out)).astype(history.dtype)
        return z, history


class JointBlock(nn.Module):
    """SD3.5's MMDiT-X block on each frame by itself.

    `dual` has a second attention among the image tokens alone; in `last` the text only gives keys and values (its
    queries and their norm exist because the pretrained model has them; nothing depends on them).
    """

    config: ModelConfig
    kind: Kind
    backend: Backend
    layout: Layout | None = None

    @nn.compact
    def __call__(self, text: Float[Array, "B F T D"], image: Float[Array, "B F S D"], c: Float[Array, "B D"], kept: Int[Array, "B"] | None):
        config, last, words = self.config, self.kind == "last", text.shape[2]
        image_mod = Modulation(config, chunks=9 if self.kind == "dual" else 6, layout=self.layout, name="image_modulation")(c)
        text_mod = Modulation(config, chunks=2 if last else 6, layout=self.layout, name="text_modulation")(c)

        normed = layer_norm(image)
        image_qkv, text_qkv = QKV(config, name="image_qkv"), QKV(config, name="text_qkv")
        of_image = image_qkv(modulate(normed, *image_mod[:2]).astype(config.dtype))
        of_text = text_qkv(modulate(layer_norm(text), *text_mod[:2]).astype(config.dtype))
        q, k, v = (jnp.concatenate(pair, axis=2) for pair in zip(of_text, of_image, strict=True))  # [B, F, T+S, N, H]
        bound = score_bound(image_qkv, text_qkv)
        out = within_frames(self.layout, of_image[0] if last else q, k, v, None if kept is None else kept + words, bound, self.backend)
        image_out = out if last else out[:, :, words:]

        update = image_mod[2] * Output(config, name="image_out")(image_out)
        if self.kind == "dual":
            qkv = QKV(config, name="image_qkv2")
            q, k, v = qkv(modulate(normed, *image_mod[6:8]).astype(config.dtype))
            update += image_mod[8] * Output(config, name="image_out2")(within_frames(self.layout, q, k, v, kept, score_bound(qkv), self.backend))
        image = _feed_forward(config, (image + update).astype(image.dtype), *image_mod[3:6], name="image_mlp")
        if not last:
            text = (text + text_mod[2] * Output(config, name="text_out")(out[:, :, :words])).astype(text.dtype)
            text = _feed_forward(config, text, *text_mod[3:6], name="text_mlp")
        return text, image


def _feed_forward(config: ModelConfig, x: Float[Array, "B F S D"], shift, scale, gate, *, name: str) -> Float[Array, "B F S D"]:
    out = MLP(config, name=name)(modulate(layer_norm(x), shift, scale).astype(config.dtype))
    return (x + gate * out).astype(x.dtype)


class Layer(nn.Module):
    """A temporal block and the joint block behind it.

    Returns (streams, memory). `memory`, given, is keys and values of history, which is then not among the streams; it is returned where
    history alone is: without z, to be given later."""

    config: ModelConfig
    kind: Kind
    tokens: int  # per image, S
    backend: Backend
    layout: Layout | None = None

    @nn.compact
    def __call__(self, streams: Streams, shared: Shared, memory: Heads | None = None) -> tuple[Streams, Heads | None]:
        text, image, history_text, history = jax.tree.map(lambda x: checkpoint_name(x, LAYER_INPUT), streams)
        tokens, last = self.tokens, self.kind == "last"
        temporal = TemporalBlock(self.config, self.backend, self.config.history == "joint" and not last, self.layout, name="temporal")
        joint = JointBlock(self.config, self.kind, self.backend, self.layout, name="joint")
        if image is None:
            _, memory = temporal(None, history, shared)
        elif memory:
            z, _ = temporal(image[:, :, :tokens], memory, shared)
        else:
            z, history = temporal(image[:, :, :tokens], history, shared)
        if image is not None:
            image = jax.lax.dynamic_update_slice_in_dim(image, z, 0, axis=2)  # in place: the rest, two thirds, is not copied
            text, image = joint(text, image, shared.c, shared.kept_tokens)
            memory = None
        if history is not None and not last:
            history_text, history = joint(history_text, history, shared.c_history, None)
        return place(self.layout, Streams(text, image, history_text, history)), memory


def place(layout: Layout | None, streams: Streams) -> Streams:
    """Streams that lie as the layout wants them, so that nothing else is chosen for them."""
    if layout is None:
        return streams
    return Streams(*(None if x is None else layout.constrain(x, "batch", "frames", "tokens", "width") for x in streams))
