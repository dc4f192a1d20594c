"""One temporal block, and one layer: who sees whom in time, by which modulation, and what is left alone."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiny_network import TINY, assert_close, each_layer, fresh_params, linear, redrawn

from svdp_jax.models import tokens
from svdp_jax.models.blocks import Layer, Shared, Streams, TemporalBlock
from svdp_jax.models.layers import QKV, layer_norm, rms_norm, score_bound

CONFIG = TINY.model
BATCH, FRAMES, PAST = 4, 3, 2  # of the inputs; 2 x 2 tokens


@pytest.fixture(scope="module")
def params():
    """Of the tiny network, none of them zero."""
    return redrawn(fresh_params())


class Moment(NamedTuple):
    """One temporal block and its inputs."""

    params: Any
    z: jax.Array  # [B, F, S, D]
    history: jax.Array  # [B, P, S, D]
    shared: Shared


@pytest.fixture
def moment(params):
    generator = np.random.default_rng(5)
    normal = lambda *shape: jnp.asarray(generator.normal(size=shape), jnp.float32)
    width = CONFIG.width
    block = dict(each_layer(params))["plain"]["temporal"]
    shared = Shared(normal(BATCH, width), normal(BATCH, width), normal(FRAMES, width), normal(PAST, width), None, None)
    return Moment(block, normal(BATCH, FRAMES, 4, width), normal(BATCH, PAST, 4, width), shared)


@functools.partial(jax.jit, static_argnames=("temporal", "updates"))
def temporal_block(params, z, history, shared, *, temporal="full", updates=True):
    return TemporalBlock(dataclasses.replace(CONFIG, temporal=temporal), "plain", updates).apply({"params": params}, z, history, shared)


def test_temporal_block_by_hand(moment):
    """Every frame by its own modulation, all of them together in attention: frame numbers, gates and t = 0 for history."""
    params, z, history, shared = moment
    sizes = (CONFIG.heads, CONFIG.head_size)

    def modulated(x, c, code):
        shift, scale, gate = jnp.moveaxis(jnp.tensordot(nn.silu(c), params["modulation"]["linear"]["kernel"], 1) + params["modulation"]["linear"]["bias"], 1, 0)
        return layer_norm(x) * (1 + scale[:, None, None]) + shift[:, None, None] + code[:, None], gate[:, None, None]

    clean, gate = modulated(z, shared.c, shared.frame_code)
    past, past_gate = modulated(history, shared.c_history, shared.history_code)
    x = jnp.concatenate([clean, past], axis=1).reshape(BATCH, -1, CONFIG.width)
    q, k, v = (linear(jax.tree.map(lambda leaf, i=i: leaf[..., i, :, :].reshape(*leaf.shape[:-3], -1), params["qkv"]["linear"]), x) for i in range(3))
    q, k, v = (a.reshape(*a.shape[:2], *sizes) for a in (q, k, v))
    q, k = rms_norm(q, params["qkv"]["q_norm"]), rms_norm(k, params["qkv"]["k_norm"])
    weights = jax.nn.softmax(jnp.einsum("bqnh,bknh->bnqk", q, k) / CONFIG.head_size**0.5)
    out = jnp.einsum("bnqk,bknh,nhd->bqd", weights, v, params["out"]["linear"]["kernel"]) + params["out"]["linear"]["bias"]
    out = out.reshape(BATCH, FRAMES + PAST, 4, CONFIG.width)

    new_z, new_history = temporal_block(*moment)
    assert_close(new_z, z + gate * out[:, :FRAMES])
    assert_close(new_history, history + past_gate * out[:, FRAMES:])


@pytest.mark.parametrize("temporal", ["full", "factorized"])
def test_history_that_is_masked_in_time_is_no_history(moment, temporal):
    params, z, history, shared = moment
    kept = tokens.kept_in_time(jnp.array([2, 3, 0, 3]), FRAMES, PAST, 4)
    masked, _ = temporal_block(params, z, 1e3 * history, shared._replace(kept_in_time=kept), temporal=temporal)
    without, _ = temporal_block(params, z, None, shared._replace(c_history=None, history_code=None), temporal=temporal)
    present, _ = temporal_block(params, z, 1e3 * history, shared, temporal=temporal)
    assert_close(masked[::2], without[::2])
    assert_close(masked[1::2], present[1::2])
    assert np.abs(present - without).max() > 1e-2


def test_full_and_factorized_agree_where_a_frame_is_one_token(moment):
    params, z, history, shared = moment
    for kept in (None, tokens.kept_in_time(jnp.arange(4), FRAMES, PAST, 1)):
        masked = shared._replace(kept_in_time=kept)
        one = [temporal_block(params, z[:, :, :1], history[:, :, :1], masked, temporal=temporal) for temporal in ("full", "factorized")]
        assert_close(*one)
    many = [temporal_block(params, z, history, shared, temporal=temporal)[0] for temporal in ("full", "factorized")]
    assert np.abs(many[0] - many[1]).max() > 1e-2


def test_reach_of_full_and_of_factorized_attention(moment):
    """Which tokens [frame, place] of z and history the output of frame 1, place 2 depends on."""
    params, z, history, shared = moment
    for temporal, reached in (("full", np.ones(4, bool)), ("factorized", np.arange(4) == 2)):
        token = lambda z, history, temporal=temporal: jnp.sin(temporal_block(params, z, history, shared, temporal=temporal)[0][0, 1, 2]).sum()
        for gradient, frames in zip(jax.grad(token, argnums=(0, 1))(z, history), (FRAMES, PAST), strict=True):
            depends = np.abs(gradient[0]).max(axis=-1) > 0
            np.testing.assert_array_equal(depends, np.broadcast_to(reached, (frames, 4)))
            np.testing.assert_array_equal(gradient[1:], 0)


def one_layer(params, kind, image, history, c, c_history):
    """Streams after one layer; `params` has the layer's. Text and frame codes are fixed."""
    generator = np.random.default_rng(7)
    normal = lambda *shape: jnp.asarray(generator.normal(size=shape), jnp.float32)
    text, history_text = (normal(BATCH, frames, CONFIG.text_tokens, CONFIG.width) for frames in (FRAMES, PAST))
    shared = Shared(c, c_history, normal(FRAMES, CONFIG.width), normal(PAST, CONFIG.width), None, None)
    streams = Streams(text, image, history_text, history)
    return streams, jax.jit(Layer(CONFIG, kind, 4, "plain").apply)({"params": params}, streams, shared)[0]


def closed(params, *names):
    """`params` in which the modulation of these blocks, and so their gates, are zero."""
    shut = lambda path, leaf: jnp.zeros_like(leaf) if any(entry.key in names for entry in path) else leaf
    return jax.tree_util.tree_map_with_path(shut, params)


def test_source_and_driving_take_no_part_in_the_temporal_block(params, moment):
    layer = closed(dict(each_layer(params))["plain"], "image_modulation", "text_modulation")  # the joint block does nothing
    rest = jnp.asarray(np.random.default_rng(8).normal(size=(2, BATCH, FRAMES, 8, CONFIG.width)), jnp.float32)
    image, other = (jnp.concatenate([moment.z, x], axis=2) for x in rest)
    (_, out), (_, out_other) = (one_layer(layer, "plain", x, moment.history, moment.shared.c, moment.shared.c_history) for x in (image, other))
    assert np.abs(out.image[:, :, :4] - moment.z).max() > 1e-2
    np.testing.assert_array_equal(out.image[:, :, :4], out_other.image[:, :, :4])
    np.testing.assert_array_equal(out.history, out_other.history)
    np.testing.assert_array_equal(out.image[:, :, 4:], image[:, :, 4:])


def test_history_is_modulated_as_clean(params, moment):
    """With the temporal gate closed, the noise level c leaves history as it is; what stands for t = 0 changes it."""
    layer = dict(each_layer(params))["plain"]
    shut = {"temporal": closed(layer["temporal"], "modulation"), "joint": layer["joint"]}
    c, c_history = moment.shared.c, moment.shared.c_history
    (_, out), (_, other_t), (_, other_clean) = (one_layer(shut, "plain", moment.z, moment.history, *cs) for cs in ((c, c_history), (2 * c, c_history), (c, 2 * c_history)))
    np.testing.assert_array_equal(out.history, other_t.history)
    np.testing.assert_array_equal(out.history_text, other_t.history_text)
    np.testing.assert_array_equal(out.image, other_clean.image)
    assert np.abs(out.history - other_clean.history).max() > 1e-2 and np.abs(out.history_text - other_clean.history_text).max() > 1e-2


def test_only_the_last_layer_leaves_history_and_text_alone(params, moment):
    for kind, layer in each_layer(params):
        before, after = one_layer(layer, kind, moment.z, moment.history, moment.shared.c, moment.shared.c_history)
        assert np.abs(after.image - before.image).max() > 1e-2
        for name in ("text", "history", "history_text"):
            changed = np.abs(getattr(after, name) - getattr(before, name)).max() > 1e-2
            assert changed == (kind != "last"), (kind, name)


def test_no_score_exceeds_its_bound_and_one_comes_near():
    """Of the queries and keys of two streams that attend to each other, whatever the norms' scales."""
    size = TINY.model.head_size
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    scales = [{name: draw(number, size) * 2 for number, name in enumerate(("q_norm", "k_norm"), start=10 * stream)} for stream in range(2)]
    bound = float(score_bound(*(QKV(TINY.model).bind({"params": own}) for own in scales)))
    vectors = jnp.concatenate([draw(99, 500, size), 100 * jnp.eye(size)])  # whose norms have one entry alone, sqrt(H)
    q, k = (jnp.concatenate([rms_norm(vectors, own[name]) for own in scales]) for name in ("q_norm", "k_norm"))
    largest = float(jnp.abs(q @ k.T).max()) / size**0.5
    assert largest <= bound and largest > 0.99 * bound
