"""The sampler: which passes run, how they combine, and that neither chunks nor windows nor weights change what they should not.

Where the network itself does not matter, a formula stands in for it: quick to compile, and worked out by hand.
"""

import dataclasses
import itertools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from tiny_network import TINY, draw_inputs, fresh_params, redrawn

from svdp_jax import flow, pipeline, sampler
from svdp_jax.config import ModelConfig, SampleConfig
from svdp_jax.models import tokens
from svdp_jax.models.autoencoder import make_autoencoder
from svdp_jax.models.transformer import Transformer
from svdp_jax.types import Conditions, Constants, Frozen

SAMPLE = SampleConfig(steps=5, chunk=2)


@dataclasses.dataclass(frozen=True)
class Formula:
    """Stands in for the network: predicts a velocity that depends on z, t, and every signal that is there."""

    config: ModelConfig = ModelConfig(prediction="velocity")
    layout: None = None

    def apply(self, variables, z, t, conditions, constants):
        out = jnp.sin(3 * z) * t.reshape(-1, 1, 1, 1, 1) + variables["params"]
        out += 0 if conditions.source is None else 1 + jnp.cos(conditions.source)[:, None]
        out += 0 if conditions.driving is None else 2 + conditions.driving
        return out if conditions.history is None else out + 4 + conditions.history.mean(axis=1, keepdims=True) * z


CONSTANTS = Constants(jnp.zeros((3, 4, 8)), jnp.zeros((2, 8)), jnp.zeros(8))  # the formula asks for none


def signals(*, history=True, seed=0):
    normal = lambda shape, key: jax.random.normal(jax.random.fold_in(jax.random.key(seed), key), shape)
    return Conditions(normal((1, 2, 2, 3), 0), normal((1, 4, 2, 2, 3), 1), normal((1, 2, 2, 2, 3), 2) if history else None)


def window(conditions, *, model=Formula(), params=0.5, sample=SAMPLE, key=3, constants=CONSTANTS, history=2, **kwargs):
    return sampler.sample_window(model, params, constants, conditions, jax.random.key(key), sample=sample, history=history, **kwargs)


@pytest.mark.parametrize(
    ("guidance", "with_history", "expected"),
    [
        ((2.0, 2.5, 1.0), True, {0: -1.0, 1: -0.5, 2: 1.5, 3: 1.0}),  # the paper's
        ((2.0, 2.5, 1.0), False, {0: -1.0, 1: -0.5, 2: 2.5}),  # a first window: p is d
        ((1.0, 1.0, 1.0), True, {3: 1.0}),
        ((1.0, 1.0, 1.0), False, {2: 1.0}),
        ((1.0, 2.5, 1.0), True, {1: -1.5, 2: 1.5, 3: 1.0}),
        ((2.0, 2.0, 2.0), True, {0: -1.0, 3: 2.0}),
        ((0.0, 0.0, 0.0), True, {0: 1.0}),
    ],
)
def test_guided_passes(guidance, with_history, expected):
    assert sampler.guided_passes(guidance, with_history=with_history) == expected


@pytest.mark.parametrize("with_history", [True, False])
def test_passes_add_up_to_the_formula_of_the_paper(with_history):
    u, s, d, p = 3.0, -7.0, 11.0, 20.0 if with_history else 11.0
    ls, ld, lp = 1.7, 3.1, 0.6
    combined = sum(coefficient * (u, s, d, p)[level] for level, coefficient in sampler.guided_passes((ls, ld, lp), with_history=with_history).items())
    assert combined == pytest.approx(u + ls * (s - u) + ld * (d - s) + lp * (p - d))


@pytest.mark.parametrize("prediction", ["x0", pytest.param("velocity", marks=pytest.mark.slow)])
def test_one_step_is_four_passes_combined(prediction):
    model = Transformer(dataclasses.replace(TINY.model, prediction=prediction))
    params = redrawn(fresh_params())
    z, _, conditions, constants = draw_inputs(TINY.model, batch=1, frames=3, history=2)
    t, t_next, (ls, ld, lp) = 0.75, 0.5, (2.0, 2.5, 1.0)
    passes = sampler.guided_passes((ls, ld, lp), with_history=True)
    levels, coefficients = jnp.array([1.0, t, t_next, 0.0]), jnp.array(list(passes.values()))
    signals = sampler.signals_of(model, params, constants, conditions, tuple(passes))
    apply = jax.jit(lambda signals: model.apply({"params": params}, z, jnp.array([t]), signals, constants))
    u, s, d, p = (apply(tokens.at_level(conditions, level, dropped="omit")) for level in range(4))
    v = u + ls * (s - u) + ld * (d - s) + lp * (p - d)
    v = (z - v) / t if prediction == "x0" else v
    expected = z + (t_next - t) * v
    assert min(np.abs(np.asarray(one - other)).max() for one, other in itertools.pairwise((u, s, d, p))) > 1e-2
    out, done = sampler.denoise(model, params, constants, z + 0, signals, coefficients, levels, jnp.int32(1), jnp.int32(2))
    assert done == 2
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_a_window_starts_from_noise_and_visits_every_level():
    class Zero(Formula):
        def apply(self, variables, z, t, conditions, constants):
            return jnp.broadcast_to(variables["params"], z.shape)

    noise = jax.random.normal(jax.random.key(3), (1, 4, 2, 2, 3))
    np.testing.assert_allclose(window(signals(), model=Zero(), params=0.25), noise - 0.25, atol=1e-6)  # from t = 1 to t = 0


def test_chunks_change_nothing():
    whole = window(signals(), sample=dataclasses.replace(SAMPLE, chunk=5))
    for chunk in (1, 2, 3, 8):
        np.testing.assert_array_equal(window(signals(), sample=dataclasses.replace(SAMPLE, chunk=chunk)), whole)


def test_progress_comes_with_every_chunk():
    seen = []
    window(signals(), progress=seen.append)
    assert seen == [2, 2, 1]


def test_a_new_weight_compiles_nothing():
    sampler.denoise.clear_cache()
    first = window(signals(), sample=dataclasses.replace(SAMPLE, guidance=(2.0, 2.5, 1.0)))
    assert sampler.denoise._cache_size() == 1
    second = window(signals(), sample=dataclasses.replace(SAMPLE, guidance=(3.0, 2.1, 1.3)))
    assert sampler.denoise._cache_size() == 1
    assert np.abs(first - second).max() > 1e-2
    window(signals(), sample=dataclasses.replace(SAMPLE, guidance=(1.0, 1.0, 1.0)))  # one pass: another program
    assert sampler.denoise._cache_size() == 2


def test_the_program_never_calls_the_host():
    model, params = Transformer(TINY.model), fresh_params()
    z, _, conditions, constants = draw_inputs(TINY.model, batch=1)
    signals = sampler.signals_of(model, params, constants, conditions, range(4))
    text = sampler.denoise.lower(model, params, constants, z, signals, jnp.ones(4), jnp.ones(5), jnp.int32(0), jnp.int32(2)).as_text()
    assert "stablehlo.while" in text, "this is the loop over steps"
    for word in ("callback", "infeed", "outfeed", "stablehlo.send", "stablehlo.recv"):
        assert word not in text


def test_zero_mode_gives_a_first_window_zeros_for_history():
    model = Formula(ModelConfig(prediction="velocity", dropped="zero"))
    first = signals(history=False)
    zeros = first._replace(history=jnp.zeros((1, 2, 2, 2, 3)))
    passes = sampler.guided_passes(SAMPLE.guidance, with_history=False)
    z = jax.random.normal(jax.random.key(3), (1, 4, 2, 2, 3))
    levels, weights = jnp.array(flow.noise_levels(5, shift=3.0)), jnp.array(list(passes.values()), jnp.float32)
    seen = sampler.signals_of(model, 0.5, CONSTANTS, zeros, tuple(passes))
    expected, _ = sampler.denoise(model, 0.5, CONSTANTS, z, seen, weights, levels, jnp.int32(0), jnp.int32(5))
    np.testing.assert_array_equal(window(first, model=model), expected)
    assert np.abs(window(first) - expected).max() > 0.1, "zeros of history are seen, and not left out"


def test_a_model_without_history_is_given_none_in_zero_mode_either():
    models = Formula(ModelConfig(dropped="zero")), Formula()
    one_pass = dataclasses.replace(SAMPLE, guidance=(1.0, 1.0, 1.0))  # in which nothing is dropped
    zero, omit = (window(signals(history=False), model=model, sample=one_pass, history=0) for model in models)
    np.testing.assert_array_equal(zero, omit)


@pytest.mark.parametrize("dropped", ["omit", pytest.param("zero", marks=pytest.mark.slow)])
def test_history_that_is_cached_is_history_that_is_seen_at_every_step(dropped):
    """Keys and values once per window, against the network on the latents of history at each step."""
    model = Transformer(dataclasses.replace(TINY.model, history="cached", dropped=dropped))
    params = redrawn(fresh_params())
    _, _, conditions, constants = draw_inputs(TINY.model, batch=1, frames=3, history=2)
    how = {"params": params, "constants": constants, "sample": dataclasses.replace(SAMPLE, guidance=(1.0, 1.0, 2.0))}  # passes d and p
    ours = window(conditions, model=model, **how)

    class Recomputed(Formula):
        def apply(self, variables, *inputs):
            return model.apply(variables, *inputs)

    joint_config = dataclasses.replace(TINY.model, dropped=dropped)  # by which it is given latents
    theirs = window(conditions, model=Recomputed(joint_config), **how)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())
    joint = window(conditions, model=Transformer(joint_config), **how)
    assert np.abs(ours - joint).max() > 1e-2, "it is another network"


def test_guidance_of_one_is_pass_p_alone():
    alone = sampler.signals_of(Formula(), 0.5, CONSTANTS, signals(), (tokens.HISTORY,))
    z, levels = jax.random.normal(jax.random.key(3), (1, 4, 2, 2, 3)), jnp.array(flow.noise_levels(5, shift=3.0))
    expected, _ = sampler.denoise(Formula(), 0.5, CONSTANTS, z, alone, jnp.ones(1), levels, jnp.int32(0), jnp.int32(5))
    np.testing.assert_array_equal(window(signals(), sample=dataclasses.replace(SAMPLE, guidance=(1.0, 1.0, 1.0))), expected)


def test_a_batch_is_its_samples_one_after_the_other():
    model, params = Transformer(TINY.model), redrawn(fresh_params())
    z, _, conditions, constants = draw_inputs(TINY.model, batch=2, frames=3, history=2)
    levels, weights = jnp.array(flow.noise_levels(3, shift=3.0)), jnp.array([-0.5, 1.5])

    def denoised(*samples):
        some = jax.tree.map(lambda x: x[jnp.array(samples)], (z, conditions))
        seen = sampler.signals_of(model, params, constants, some[1], (tokens.NOTHING, tokens.HISTORY))
        return sampler.denoise(model, params, constants, some[0] + 0, seen, weights, levels, jnp.int32(0), jnp.int32(3))[0]

    together, apart = denoised(0, 1), jnp.concatenate([denoised(0), denoised(1)])
    np.testing.assert_allclose(together, apart, rtol=0, atol=2e-5 * np.abs(apart).max())


SPREAD = """
import dataclasses, json
import jax, numpy as np
from tiny_network import TINY, draw_inputs, fresh_params, redrawn
from svdp_jax import sampler, sharding
from svdp_jax.config import MeshConfig, SampleConfig
from svdp_jax.models.transformer import Transformer

def window(history, layout):
    params = redrawn(fresh_params())
    _, _, conditions, constants = draw_inputs(TINY.model, batch=1, frames=4, history=3)
    model = Transformer(dataclasses.replace(TINY.model, history=history), layout=layout)
    if layout:
        params = jax.device_put(params, layout.whole)
    key, sample = jax.random.key(0), SampleConfig(steps=3, chunk=2)
    z = sampler.sample_window(model, params, constants, conditions, key, sample=sample, history=3)
    return np.asarray(z), z.sharding.num_devices

layout = sharding.make_layout(MeshConfig(data=1, context=4, strategy="fsdp_context"))
for history in "joint", "cached":
    (one, _), (several, devices) = window(history, None), window(history, layout)
    print(json.dumps([devices, float(np.abs(one - several).max() / np.abs(one).max())]))
"""


@pytest.mark.slow
def test_a_window_over_several_devices_is_that_of_one(python):
    done = python("-c", SPREAD, JAX_NUM_CPU_DEVICES="4", PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        devices, apart = json.loads(line)
        assert devices == 4 and apart < 2e-5


def test_parameters_in_the_types_they_are_used_in_change_nothing():
    config = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, dtype="bfloat16"))
    params = redrawn(fresh_params())
    like = pipeline.abstract_weights(config, jax.devices()[0])
    kept = jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), params, like)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(kept)} == {"bfloat16", "float32"}
    z, t, conditions, constants = draw_inputs(config.model, batch=1)
    apply = jax.jit(Transformer(config.model).apply)
    np.testing.assert_array_equal(*(apply({"params": tree}, z, t, conditions, constants) for tree in (params, kept)))


# ------------------------------------------------------------------------------------------------------------ the roll-out


def test_each_window_sees_the_end_of_the_one_before(monkeypatch):
    calls = []

    def spy(model, params, constants, conditions, key, *, sample, history, progress):
        calls.append((conditions, tuple(jax.random.key_data(key).tolist())))
        return 100.0 * len(calls) + jnp.arange(4.0).reshape(1, 4, 1, 1, 1)

    monkeypatch.setattr(sampler, "sample_window", spy)
    source, driving = jnp.ones((1, 1, 1, 1)), [jnp.full((1, 4, 1, 1, 1), i) for i in range(3)]
    out = list(sampler.roll_out(Formula(), None, CONSTANTS, source, iter(driving), jax.random.key(0), sample=SAMPLE, history=3))
    assert [float(z[0, 0, 0, 0, 0]) for z in out] == [100, 200, 300]
    assert calls[0][0].history is None
    np.testing.assert_array_equal(calls[1][0].history.ravel(), [101, 102, 103])
    np.testing.assert_array_equal(calls[2][0].history.ravel(), [201, 202, 203])
    assert all(conditions.driving is frames and conditions.source is source for (conditions, _), frames in zip(calls, driving, strict=True))
    assert len({key for _, key in calls}) == 3, "each window has its own noise"


def test_windows_are_made_as_they_are_asked_for():
    pulled = []

    def driving():
        for i in range(3):
            pulled.append(i)
            yield signals(seed=i).driving

    windows = sampler.roll_out(Formula(), 0.5, CONSTANTS, signals().source, driving(), jax.random.key(0), sample=SAMPLE, history=2)
    next(windows)
    assert pulled == [0]
    next(windows)
    assert pulled == [0, 1]


@pytest.fixture(scope="module")
def animate():
    """animate(frames, seed=0, after=None) -> (list of windows, steps reported): the tiny network on noise, through the pipeline."""
    params, model = redrawn(fresh_params()), TINY.model
    autoencoder = make_autoencoder(TINY.autoencoder).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    frozen = Frozen(
        jax.tree.map(lambda leaf: leaf.value, autoencoder, is_leaf=lambda leaf: hasattr(leaf, "names")),
        tokens.position_table(model),
        np.zeros((model.text_tokens, model.text_width), np.float32),
        np.zeros(model.pooled_width, np.float32),
    )
    generator = np.random.default_rng(0)
    source, driving = generator.integers(0, 256, (32, 32, 3), np.uint8), generator.integers(0, 256, (6, 32, 32, 3), np.uint8)
    sample = SampleConfig(steps=3, chunk=2, guidance=(1.0, 1.0, 1.0))

    def call(*order, seed=0, after=None):
        steps = []
        frames = (driving[i] for i in order)
        return list(pipeline.animate(TINY, params, frozen, source, frames, jax.random.key(seed), sample=sample, after=after, progress=steps.append)), steps

    return call


def shown(windows):
    return np.concatenate([window.frames for window in windows])


def test_a_partial_window_gives_exactly_the_frames_of_the_driver(animate):
    windows, steps = animate(0, 1, 2, 3, 4, 5)
    assert [window.frames.shape for window in windows] == [(4, 32, 32, 3), (2, 32, 32, 3)]
    assert all(window.frames.dtype == np.uint8 for window in windows)
    assert sum(steps) == 2 * 3
    assert min(window.frames.std() for window in windows) > 5, "pictures of one colour would prove nothing"
    padded, _ = animate(0, 1, 2, 3, 4, 5, 5, 5)  # a partial window repeats its last frame
    np.testing.assert_array_equal(shown(windows), shown(padded)[:6])


def test_the_seed_decides_and_nothing_else(animate):
    one, again, other = (shown(animate(0, 1, 2, 3, 4, seed=seed)[0]) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one.astype(int) - other).mean() > 1


def test_going_on_after_a_window_is_as_if_nothing_had_happened(animate):
    straight, _ = animate(0, 1, 2, 3, 4, 5, 1, 2, 0, 4)
    rest, steps = animate(4, 5, 1, 2, 0, 4, after=straight[0])
    assert [window.number for window in rest] == [1, 2] and sum(steps) == 2 * 3
    for one, other in zip(straight[1:], rest, strict=True):
        np.testing.assert_array_equal(one.frames, other.frames)
        np.testing.assert_array_equal(one.history, other.history)
    forgetful, _ = animate(4, 5, 1, 2, 0, 4, after=straight[0]._replace(history=straight[1].history))
    assert (shown(forgetful) != shown(rest)).any(), "the history counts"


def test_no_frames_make_no_windows(animate):
    assert animate() == ([], [])
