"""Autoencoders: shapes, parameter counts, the properties that a wrong port would break, and the fit of the linear one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from svdp_jax.config import AutoencoderConfig, ConfigError
from svdp_jax.models import autoencoder
from svdp_jax.models.autoencoder import fit_linear, make_autoencoder, to_bytes, to_unit

KL = AutoencoderConfig(channels=(8, 16), blocks=1, groups=4, latent_channels=4, scale=2.0, shift=0.25)  # exact in binary
LINEAR = AutoencoderConfig(kind="linear", latent_channels=12, patch=4, scale=0.7, shift=0.3)


FRAMES = (2, 3, 8, 12, 3)  # of most tests, so that they share compiled programs


@pytest.fixture(scope="module")
def kl():
    """A small KL autoencoder with every parameter random: norms and biases at their start would hide a mistake in them."""
    model = make_autoencoder(KL)
    generator = np.random.default_rng(0)

    def draw(path, leaf):
        noise = generator.normal(size=leaf.shape).astype(np.float32)
        return {"kernel": noise / np.sqrt(np.prod(leaf.shape[:-1])), "scale": 1 + 0.2 * noise, "bias": 0.2 * noise}[path[-1]]

    shapes = flatten_dict(nn.meta.unbox(abstract_params(KL)))
    return model, unflatten_dict({path: jnp.asarray(draw(path, leaf), jnp.float32) for path, leaf in shapes.items()})


def abstract_params(config):
    return jax.eval_shape(make_autoencoder(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32))["params"]


def pictures(count, height=16, width=24, seed=0):
    """Bytes [count, height, width, 3] whose neighbours are alike, as in pictures."""
    noise = np.random.default_rng(seed).normal(size=(count, height, width, 3)).cumsum(1).cumsum(2)
    return (128 + 100 * noise / np.abs(noise).max(axis=(1, 2, 3), keepdims=True)).astype(np.uint8)


@functools.partial(jax.jit, static_argnums=0)
def encode(model, params, frames, noise=None):
    return model.apply({"params": params}, frames, noise, method="encode")


@functools.partial(jax.jit, static_argnums=0)
def decode(model, params, latents):
    return model.apply({"params": params}, latents, method="decode")


def rms(x):
    return float(jnp.sqrt(jnp.mean(jnp.square(x))))


def test_bytes_survive_the_unit_interval_and_what_lies_outside_is_clipped():
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    np.testing.assert_array_equal(to_bytes(to_unit(every)), every)
    assert (float(to_unit(every).min()), float(to_unit(every).max())) == (-1, 1)
    np.testing.assert_array_equal(to_bytes(jnp.full((1, 1, 3), 1.7)), 255)
    np.testing.assert_array_equal(to_bytes(jnp.full((1, 1, 3), -1.7)), 0)
    np.testing.assert_array_equal(to_bytes(jnp.full((1, 1, 3), 99.6 / 127.5 - 1)), 100)


def test_sd3_sizes():
    config = AutoencoderConfig()
    params = abstract_params(config)
    count = {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in params.items()}
    assert count == {"encoder": 34_274_208, "decoder": 49_545_475}
    assert len(jax.tree.leaves(params)) == 244
    frames = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    latents = jax.eval_shape(functools.partial(encode, make_autoencoder(config)), params, frames)
    assert latents.shape == (2, 8, 12, 16)


@pytest.mark.parametrize("config", [AutoencoderConfig(), LINEAR], ids=["kl", "linear"])
def test_every_parameter_names_its_axes(config):
    boxes = jax.tree.leaves(abstract_params(config), is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert all(isinstance(box, nn.LogicallyPartitioned) and len(box.names) == box.value.ndim for box in boxes)
    assert {name for box in boxes for name in box.names} <= {"conv_height", "conv_width", "conv_in", "conv_out", "channels"}


def test_kl_shapes_follow_frames_that_are_not_square(kl):
    latents = encode(*kl, to_unit(pictures(6, 8, 12)).reshape(FRAMES))
    assert latents.shape == (2, 3, 4, 6, 4) and latents.dtype == jnp.float32
    assert decode(*kl, latents).shape == FRAMES


def test_leading_axes_hold_independent_frames(kl):
    frames = to_unit(pictures(6, 8, 12)).reshape(FRAMES)
    latents = encode(*kl, frames)
    alone = encode(*kl, frames[1, 2])
    assert alone.shape == (4, 6, 4)
    np.testing.assert_allclose(latents[1, 2], alone, atol=1e-5)  # another batch size sums in another order
    np.testing.assert_allclose(decode(*kl, latents)[1, 2], decode(*kl, alone), atol=1e-5)
    # Within one batch size there is no rounding to allow for: another frame changes nothing at all.
    others = encode(*kl, frames.at[0, 1].set(-frames[0, 1])) - latents
    assert float(jnp.abs(others[0, 1]).max()) > 0.1
    np.testing.assert_array_equal(others.at[0, 1].set(0), 0)


def test_downsampling_pads_only_right_and_bottom():
    layer = autoencoder.conv(1, stride=2, dtype=jnp.float32, name="down")
    ones = {"params": {"kernel": jnp.ones((3, 3, 1, 1)), "bias": jnp.zeros(1)}}
    out = layer.apply(ones, jnp.ones((1, 4, 4, 1)))[0, :, :, 0]
    np.testing.assert_array_equal(out, [[9, 6], [6, 4]])


def test_scale_and_shift_map_the_raw_code(kl):
    model, params = kl
    raw = make_autoencoder(dataclasses.replace(KL, scale=1.0, shift=0.0))
    frames = to_unit(pictures(6, 8, 12)).reshape(FRAMES)
    latents = encode(model, params, frames)
    np.testing.assert_array_equal(latents, (encode(raw, params, frames) - 0.25) * 2)
    np.testing.assert_array_equal(decode(model, params, latents), decode(raw, params, latents / 2 + 0.25))


def test_samples_have_the_predicted_mean_and_spread():
    shape = 200, 10, 10, 3
    mean = jnp.broadcast_to(jnp.array([1.0, -2.0, 0.0]), shape)
    log_variance = jnp.broadcast_to(jnp.array([0.8, -3.0, 40.0]), shape)  # the last is clipped to 20
    noise = jax.random.normal(jax.random.key(0), shape)
    found = (autoencoder.sample(mean, log_variance, noise) - mean) / jnp.exp(jnp.array([0.4, -1.5, 10.0]))
    np.testing.assert_allclose(found, noise, atol=1e-4)


def test_noise_makes_encode_sample_around_the_mode(kl):
    model, params = kl
    # A head that ignores its input: mean 1, 2, 3, 4 and variance 4 everywhere.
    head = {"kernel": jnp.zeros_like(params["encoder"]["conv_out"]["kernel"]), "bias": jnp.array([1.0, 2.0, 3.0, 4.0] + 4 * [np.log(4.0)])}
    params = {**params, "encoder": {**params["encoder"], "conv_out": head}}
    frames = to_unit(pictures(6, 8, 12)).reshape(FRAMES)
    mode = encode(model, params, frames)
    np.testing.assert_allclose(mode, jnp.broadcast_to((jnp.array([1.0, 2.0, 3.0, 4.0]) - 0.25) * 2, mode.shape), rtol=1e-6)
    noise = jax.random.normal(jax.random.key(2), mode.shape)
    np.testing.assert_allclose(encode(model, params, frames, noise) - mode, 2 * 2 * noise, atol=1e-5)  # the spread is scaled with the latents


def test_middle_attention_is_the_formula(kl):
    params = kl[1]["encoder"]["middle"]
    still = {name: {**params[name], "conv_1": jax.tree.map(jnp.zeros_like, params[name]["conv_1"])} for name in ("block_0", "block_1")}
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 16)).astype(np.float32)
    out = jax.jit(autoencoder.Middle(KL.groups, jnp.float32).apply)({"params": {**params, **still}}, x)

    # Both residual blocks are now the identity; what is left, with one head, over the 24 places of each frame:
    grouped = np.asarray(x, np.float64).reshape(2, 24, KL.groups, 4)
    normed = (grouped - grouped.mean((1, 3), keepdims=True)) / np.sqrt(grouped.var((1, 3), keepdims=True) + 1e-6)
    normed = normed.reshape(2, 24, 16) * params["norm"]["scale"] + params["norm"]["bias"]
    q, k, v = (normed @ params[name]["kernel"][0, 0] + params[name]["bias"] for name in ("query", "key", "value"))
    weights = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(16))
    attended = weights / weights.sum(-1, keepdims=True) @ v
    expected = x.reshape(2, 24, 16) + attended @ params["out"]["kernel"][0, 0] + params["out"]["bias"]
    np.testing.assert_allclose(out.reshape(2, 24, 16), expected, atol=1e-5)


def test_bfloat16_is_close(kl):
    model, params = kl
    low = make_autoencoder(KL, dtype=jnp.bfloat16)
    frames = to_unit(pictures(6, 8, 12)).reshape(FRAMES)
    exact, latents = encode(model, params, frames), encode(low, params, frames)
    assert latents.dtype == jnp.float32 and 0 < rms(latents - exact) < 0.02 * rms(exact)
    exact, back = decode(model, params, latents), decode(low, params, latents)
    assert back.dtype == jnp.float32 and 0 < rms(back - exact) < 0.02 * rms(exact)


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        (jnp.bfloat16, 1000, 1004),  # neighbours in bfloat16, which has no 1002 for their mean
        (jnp.float32, 9999, 10001),  # a mean of squares minus a squared mean would lose their variance
    ],
)
def test_norms_keep_the_digits_of_float32(dtype, low, high):
    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x):
            return autoencoder.norm(x, 2, dtype, name="norm")

    sign = (-1.0) ** np.arange(64).reshape(1, 4, 4, 4)
    affine = {"norm": {"scale": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)}}
    y = jax.jit(Norm().apply)({"params": affine}, jnp.asarray(np.where(sign > 0, high, low), dtype))
    assert y.dtype == dtype
    np.testing.assert_allclose(y.astype(jnp.float32), sign, atol=1e-4)


def test_linear_reproduces_frames_in_its_span():
    frames = pictures(20)
    model, params = make_autoencoder(LINEAR), fit_linear(LINEAR, frames)
    np.testing.assert_allclose(params["components"].T @ params["components"], jnp.eye(12), atol=1e-5)
    codes = np.random.default_rng(0).normal(size=(2, 3, 4, 6, 12)).astype(np.float32)
    inside = decode(model, params, codes)
    assert inside.shape == (2, 3, 16, 24, 3)
    np.testing.assert_allclose(encode(model, params, inside), codes, atol=1e-5)
    np.testing.assert_allclose(encode(model, params, inside, jnp.ones(codes.shape)), codes, atol=1e-5)


def test_linear_code_has_the_rms_that_scale_and_shift_ask_for():
    frames = pictures(20)
    raw = AutoencoderConfig(kind="linear", latent_channels=12, patch=4, scale=1.0, shift=0.0)
    params = fit_linear(raw, frames)
    z = encode(make_autoencoder(raw), params, to_unit(frames))
    np.testing.assert_allclose(z.mean((0, 1, 2)), 0, atol=1e-4)  # centred on the frames it was fitted to
    np.testing.assert_allclose(encode(make_autoencoder(LINEAR), params, to_unit(frames)), (z - 0.3) * 0.7, atol=1e-5)


def test_linear_improves_with_channels_and_is_the_best_projection():
    frames = pictures(40) // 4  # dark: a fit that forgot to subtract the mean would spend a direction on it
    errors = []
    for channels in (1, 3, 12, 48):
        config = dataclasses.replace(LINEAR, latent_channels=channels)
        model, params = make_autoencoder(config), fit_linear(config, frames)
        errors.append(rms(decode(model, params, encode(model, params, to_unit(frames))) - to_unit(frames)))
    assert all(more < 0.9 * fewer for fewer, more in zip(errors, errors[1:], strict=False)), errors
    assert errors[-1] < 1e-5, "as many channels as numbers in a patch lose nothing"
    # Eckart-Young: what is lost is exactly the variance along the directions left out.
    x = np.asarray(autoencoder.patches(to_unit(frames), 4), np.float64).reshape(-1, 48)
    variances = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2 / len(x)
    np.testing.assert_allclose(errors[2], np.sqrt(variances[12:].sum() / 48), rtol=1e-4)


@pytest.mark.parametrize(("count", "at_once", "seen"), [(7, 3, 3), (7, 4, 4), (6, 3, 3), (3, 4, 3), (1, 1, 1)])
def test_frames_go_through_in_equal_parts(count, at_once, seen):
    sizes = []

    def function(x, y):
        sizes.append(len(x))
        return jnp.stack([2 * x, x + y], axis=-1)

    x, y = jnp.arange(1.0, count + 1), jnp.full(count, 0.5)
    np.testing.assert_array_equal(autoencoder.by_parts(function, x, y, at_once=at_once), jnp.stack([2 * x, x + y], axis=-1))
    assert set(sizes) == {seen}


def test_linear_fit_is_deterministic():
    frames = pictures(40)
    one, other = (np.asarray(fit_linear(LINEAR, order)["components"]) for order in (frames, frames[::-1]))
    np.testing.assert_allclose(one, other, atol=1e-5)
    largest = one[np.abs(one).argmax(0), np.arange(12)]
    assert (largest > 0).all(), "an eigenvector's sign, free by itself, is fixed by its largest entry"


@pytest.mark.parametrize("config", [KL, LINEAR], ids=["kl", "linear"])
def test_sizes_that_do_not_fit_are_refused(config):
    with pytest.raises(ConfigError, match=rf"\(1, 16, 21, 3\).*multiples of {config.downsampling} "):
        jax.eval_shape(make_autoencoder(config).init, jax.random.key(0), jnp.zeros((1, 16, 21, 3)))


def test_more_channels_than_a_patch_has_numbers_are_refused():
    with pytest.raises(ConfigError, match="latent_channels=49 must be at most 48"):
        fit_linear(dataclasses.replace(LINEAR, latent_channels=49), pictures(2))
