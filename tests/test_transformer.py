"""The network's properties, on parameters of which none is zero (see `redrawn`), except for those at initialisation."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.ad_checkpoint import checkpoint_name
from tiny_network import TINY, assert_close, draw_inputs, each_layer, fresh_params, linear, redrawn

from svdp_jax import train_state
from svdp_jax.config import Config, ModelConfig
from svdp_jax.models import parallel, tokens
from svdp_jax.models.blocks import JointBlock, Shared, TemporalBlock
from svdp_jax.models.layers import Modulation, layer_norm, sinusoid
from svdp_jax.models.transformer import Transformer, in_computing_types, layer_groups
from svdp_jax.types import Conditions

MODEL, CONFIG = Transformer(TINY.model), TINY.model
BATCH, FRAMES, PAST, SIDE = 4, 3, 2, 4  # of the inputs; 2 x 2 tokens
LEVELS = range(4)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, z, t, conditions, constants, frame_numbers=None):
    return model.apply({"params": params}, z, t, conditions, constants, frame_numbers=frame_numbers)


@functools.partial(jax.jit, static_argnums=0)
def output_and_gradient(model, params, z, t, conditions, constants, weights):
    """The output, and the gradient of its product with `weights` by parameters, z and signals."""

    def product(params, z, signals):
        output = model.apply({"params": params}, z, t, Conditions(*signals, conditions.level), constants)
        return (output * weights).sum(), output

    (_, output), gradient = jax.value_and_grad(product, argnums=(0, 1, 2), has_aux=True)(params, z, tuple(conditions[:3]))
    return output, gradient


class Network(NamedTuple):
    params: Any
    z: jax.Array
    t: jax.Array
    conditions: Conditions
    constants: Any
    weights: jax.Array
    passes: list  # per level, (output, gradient) where signals above it are left out


def run_pass(model, params, inputs, level, weights):
    z, t, conditions, constants = inputs
    return output_and_gradient(model, params, z, t, tokens.at_level(conditions, level, dropped="omit"), constants, weights)


@pytest.fixture(scope="module")
def network():
    """Inputs, and each level's pass over all of them. Sample b's gradient is that of level b."""
    params = redrawn(fresh_params())
    inputs = draw_inputs(CONFIG, batch=BATCH, frames=FRAMES, history=PAST, height=SIDE, width=SIDE)
    weights = jnp.asarray(np.random.default_rng(3).normal(size=inputs[0].shape), jnp.float32)
    passes = [run_pass(MODEL, params, inputs, level, weights * only(level)) for level in LEVELS]
    for level in LEVELS[1:]:
        assert np.abs(passes[level][0] - passes[level - 1][0]).max() > 1e-2, f"level {level} does nothing: all below would prove nothing"
    return Network(params, *inputs, weights, passes)


def only(sample):
    return (jnp.arange(BATCH) == sample)[:, None, None, None, None]


# ------------------------------------------------------------------------------------------------- by hand, without scans


def mlp_of(params, x):
    return linear(params["out"], nn.silu(linear(params["wide"], x)))


def clock(params, t, constants):
    return mlp_of(params["time"], sinusoid(1000 * t, 128)) + mlp_of(params["pooled"], constants.pooled)


def embed(params, latents):
    return linear(params["patches"], tokens.patchify(latents, CONFIG.patch))


def head(params, image, c):
    shift, scale = Modulation(CONFIG, chunks=2).apply({"params": params["final_modulation"]}, c)
    return tokens.unpatchify(linear(params["final"], layer_norm(image) * (1 + scale) + shift), CONFIG.patch, SIDE, SIDE)


@jax.jit
def trunk_alone(params, z, t, source, driving, constants):
    """SD3.5 on [z, source, driving] of single frames, in a loop; positions are taken from the table itself."""
    table = tokens.position_table(CONFIG)
    positions = [table[first : first + 2, first : first + 2].reshape(4, -1) for first in (5, 7, 3)]  # 2 x 2 of 12 x 12
    image = jnp.concatenate([embed(params, x) + p for x, p in zip((z, source, driving), positions, strict=True)], axis=1)[:, None]
    text = jnp.broadcast_to(linear(params["text"], constants.text), (len(z), 1, CONFIG.text_tokens, CONFIG.width))
    c = clock(params, t, constants)
    for kind, layer in each_layer(params):
        text, image = JointBlock(CONFIG, kind, "plain").apply({"params": layer["joint"]}, text, image, c, None)
    return head(params, image[:, :, :4], c)[:, 0]


@jax.jit
def in_a_loop(params, z, t, conditions, constants):
    """The whole network, layer by layer."""
    source, driving, history, _ = conditions
    positions = constants.positions
    still = jnp.broadcast_to((embed(params, source) + positions[1])[:, None], (BATCH, FRAMES, 4, CONFIG.width))
    image = jnp.concatenate([embed(params, z) + positions[0], still, embed(params, driving) + positions[2]], axis=2)
    words = linear(params["text"], constants.text)
    text, history_text = (jnp.broadcast_to(words, (BATCH, frames, *words.shape)) for frames in (FRAMES, PAST))
    code = lambda numbers: mlp_of(params["frame_encoding"], sinusoid(jnp.array(numbers), CONFIG.frame_frequencies))
    c, c_history = clock(params, t, constants), clock(params, jnp.zeros(BATCH), constants)
    shared = Shared(c, c_history, code([0, 1, 2]), code([-2, -1]), None, None)
    history = embed(params, history) + positions[0]
    for kind, layer in each_layer(params):
        joint = functools.partial(JointBlock(CONFIG, kind, "plain").apply, {"params": layer["joint"]})
        temporal = TemporalBlock(CONFIG, "plain", update_history=kind != "last")
        z, history = temporal.apply({"params": layer["temporal"]}, image[:, :, :4], history, shared)
        text, image = joint(text, jnp.concatenate([z, image[:, :, 4:]], axis=2), c, None)
        if kind != "last":
            history_text, history = joint(history_text, history, c_history, None)
    return head(params, image[:, :, :4], c)


def test_scanned_layers_equal_a_loop(network):
    assert_close(network.passes[tokens.HISTORY][0], in_a_loop(*network[:5]))


# --------------------------------------------------------------------------------------------------------- initialisation


@pytest.mark.parametrize("level", [tokens.NOTHING, tokens.DRIVING])
def test_at_initialisation_frames_do_not_see_each_other(network, level):
    params = redrawn(fresh_params(), temporal=False)
    apart = lambda x: x.reshape(-1, *x.shape[2:])
    z, t, (source, driving, history, _), constants = network[1:5]
    if level == tokens.NOTHING:
        ours = apply(MODEL, params, z, t, Conditions(), constants)
        alone = apply(MODEL, params, apart(z)[:, None], t.repeat(FRAMES), Conditions(), constants)[:, 0]
    else:
        ours = apply(MODEL, params, z, t, Conditions(source, driving), constants)
        alone = trunk_alone(params, apart(z), t.repeat(FRAMES), source.repeat(FRAMES, axis=0), apart(driving), constants)
    assert np.abs(alone).std() > 0.1
    assert_close(apart(ours), alone)


def abstract_params(config):
    return flatten_dict(jax.eval_shape(functools.partial(train_state.init_params, config), jax.random.key(0)), is_leaf=lambda _, x: not isinstance(x, dict))


def test_parameter_count_of_the_full_model():
    params = abstract_params(Config())
    count = lambda paths: sum(params[path].value.size for path in paths)
    assert {path[0] for path in params} == {
        "patches", "text", "time", "pooled", "frame_encoding", "dual", "plain", "last", "final_modulation", "final",
    }  # fmt: skip
    new = {path for path in params if path[0] == "frame_encoding" or path[1] == "temporal"}
    assert count(params.keys() - new) == 2_243_171_520  # SD3.5 Medium, without its position table
    assert count(new) == 399_378_432


def test_every_axis_of_every_parameter_has_a_name():
    for path, leaf in abstract_params(TINY).items():
        assert isinstance(leaf, nn.LogicallyPartitioned), path
        assert len(leaf.names) == leaf.value.ndim and all(leaf.names), (path, leaf.names, leaf.value.shape)
        assert ("layers" in leaf.names) == (path[0] in ("dual", "plain")) and "layers" not in leaf.names[1:], (path, leaf.names)


# ------------------------------------------------------------------------------------------------------- dropped signals


@pytest.mark.parametrize("past", [True, False], ids=["history", "no history"])
def test_masking_equals_leaving_out(network, past):
    """Sample b keeps level b, and finds garbage in what it drops. Outputs and gradients are those of the truncated pass."""
    params, z, t, conditions, constants, weights, passes = network
    kept = jnp.arange(BATCH)
    garbage = [jnp.where((kept >= first).reshape(-1, *[1] * (x.ndim - 1)), x, 1e3 * x + 7) for first, x in enumerate(conditions[:3], start=1)]
    masked = Conditions(*garbage[:2], garbage[2] if past else None, kept)
    for level in LEVELS:
        expected, (params_gradient, z_gradient, signal_gradients) = passes[level if past else min(level, tokens.DRIVING)]
        if not past and level == tokens.HISTORY:  # without history it is the level below; its gradient was taken for that sample
            _, (params_gradient, z_gradient, signal_gradients) = run_pass(MODEL, params, network[1:5], tokens.DRIVING, weights * only(level))
        output, gradients = output_and_gradient(MODEL, params, z, t, masked, constants, weights * only(level))
        assert_close(output[level], expected[level])
        assert_close(gradients[0], params_gradient, 2e-5)
        assert_close(gradients[1], z_gradient, 2e-5)
        for first, (gradient, reference) in enumerate(zip(gradients[2], signal_gradients, strict=True), start=1):
            if gradient is None:
                continue
            if level < first:
                np.testing.assert_array_equal(gradient, 0, err_msg=f"signal {first} is dropped at level {level}")
            else:
                assert np.abs(gradient[level]).max() > 1e-3
                assert_close(gradient, reference, 2e-5)


def test_zeroed_signals_stay_in_the_sequence(network):
    """`dropped="zero"`: dropping is the same as giving zeros, and zeros are attended to like anything else."""
    params, z, t, conditions, constants, _, passes = network
    zeroing = Transformer(dataclasses.replace(CONFIG, dropped="zero"))
    output = apply(zeroing, params, z, t, conditions._replace(level=jnp.arange(BATCH)), constants)
    for level in LEVELS:
        given = apply(MODEL, params, z, t, tokens.at_level(conditions, level, dropped="zero"), constants)
        assert_close(output[level], given[level])
    for level in LEVELS[:3]:
        assert np.abs(output[level] - passes[level][0][level]).max() > 1e-2


def test_driving_without_source_is_an_error(network):
    params, z, t, conditions, constants = network[:5]
    with pytest.raises(ValueError, match="nested"):
        apply(MODEL, params, z, t, Conditions(driving=conditions.driving), constants)


# ------------------------------------------------------------------------------------------------------------------ time


def test_only_its_number_tells_a_frame_its_place(network):
    params, z, t, conditions, constants = network[:5]
    order = jnp.array([2, 0, 1])
    mixed, mixed_conditions = z[:, order], conditions._replace(driving=conditions.driving[:, order])
    straight = network.passes[tokens.HISTORY][0]
    with_numbers = apply(MODEL, params, mixed, t, mixed_conditions, constants, order.astype(jnp.float32))
    without = apply(MODEL, params, mixed, t, mixed_conditions, constants, jnp.arange(FRAMES, dtype=jnp.float32))
    assert_close(with_numbers, straight[:, order])
    assert np.abs(without - straight[:, order]).max() > 1e-2


# ------------------------------------------------------------------------------------------------- memory and precision


@pytest.mark.parametrize("remat", ["full", pytest.param("attention", marks=pytest.mark.slow), pytest.param("offload", marks=pytest.mark.slow)])
def test_rematerialisation_changes_nothing(network, remat):
    level = tokens.HISTORY
    ours = run_pass(dataclasses.replace(MODEL, remat=remat), network.params, network[1:5], level, network.weights * only(level))
    assert_close(ours, network.passes[level], 2e-5)


@pytest.mark.slow
def test_attention_is_not_done_again_where_it_is_kept(network, monkeypatch):
    """Of a kernel that has a backward pass of its own, which looks at what the forward pass has put out."""

    @jax.custom_vjp
    def kernel(q, k, v):
        return forward(q, k, v)[0]

    def forward(q, k, v):
        out = jax.lax.erf_inv(q + k.mean() + v.mean())  # stands for it: nothing else in the network does this
        out = checkpoint_name(out, "attention")
        return out, (out, k, v)

    def backward(kept, gradient):
        out, k, v = kept
        return gradient * out, k * gradient.mean(), v * gradient.mean()

    kernel.defvjp(forward, backward)
    monkeypatch.setattr(parallel, "attention", lambda q, k, v, lengths=None, *, backend: kernel(q, k, v))

    def kernels(remat):
        model = dataclasses.replace(MODEL, remat=remat)
        return str(jax.make_jaxpr(jax.grad(lambda params: model.apply({"params": params}, *network[1:5]).sum()))(network.params)).count(" erf_inv ")

    assert kernels("none") > 4
    assert kernels("full") == 2 * kernels("none") and kernels("attention") == kernels("none")


def relative(got, exact):
    """Root mean square of the error over all arrays, by that of the exact ones."""
    square = lambda tree: sum(float(jnp.sum(jnp.square(leaf))) for leaf in jax.tree.leaves(tree))
    return (square(jax.tree.map(jnp.subtract, got, exact)) / square(exact)) ** 0.5


def test_bfloat16_is_close_to_float32(network):
    output = apply(Transformer(dataclasses.replace(CONFIG, dtype="bfloat16")), *network[:5])
    assert output.dtype == jnp.float32
    assert 1e-4 < relative(output, network.passes[tokens.HISTORY][0]) < 3e-2


@pytest.mark.slow
def test_parameters_rounded_once_for_all_give_the_same_output_and_as_good_a_gradient():
    half = dataclasses.replace(CONFIG, depth=2, dual_blocks=1, dtype="bfloat16")
    inputs = draw_inputs(half, batch=1, frames=2)
    params = redrawn(jax.jit(Transformer(half).init)(jax.random.key(0), *inputs)["params"])

    def found(config, round=lambda config, params: params):
        def loss(params):
            output = Transformer(config).apply({"params": round(config, params)}, *inputs)
            return jnp.square(output).mean(), output

        (_, output), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return output, gradient

    _, exact = found(dataclasses.replace(half, dtype="float32"))
    output, gradient = found(half)
    output_at_once, gradient_at_once = found(half, in_computing_types)
    assert (output_at_once == output).all()
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient_at_once))
    assert 1e-4 < relative(gradient_at_once, exact) < 1.1 * relative(gradient, exact) < 3e-2


def test_the_defaults_are_those_of_sd35_medium():
    assert layer_groups(ModelConfig()) == [("dual", 13), ("plain", 10), ("last", 1)]
