"""A converted model gives diffusers' numbers, stage by stage, kept in a file; each likely mistake in the rules would show."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sd35
from flax.traverse_util import flatten_dict, unflatten_dict
from sd35 import CONFIG

from convert_weights import rules, source, verify
from svdp_jax import flow, sampler
from svdp_jax.models import tokens
from svdp_jax.models.autoencoder import make_autoencoder
from svdp_jax.models.transformer import Transformer
from svdp_jax.types import Conditions, Constants

DIT, VAE, EULER, LEVELS = 2e-5, 2e-4, 1e-4, 1e-6  # largest absolute difference; within the DiT, in a stage's largest value


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    return dict(np.load(sd35.REFERENCE))


@pytest.fixture(scope="module")
def model(sd35_file):
    return sd35.converted(sd35_file)


@functools.cache
def float32_model():
    return Transformer(verify.in_float32(CONFIG))


def stages(model, reference):
    """Every stage that diffusers shares, thinned out as the file is. The decoder gets our own latents: the file has not all of theirs."""
    params, frozen = model
    values = sd35.inputs() | {"noisy": reference["noisy"]}
    encode = jax.jit(functools.partial(make_autoencoder(CONFIG.autoencoder).apply, method="encode"))
    values["latents"] = np.asarray(encode({"params": frozen.autoencoder}, values["frames"]))
    ours = verify.autoencoder_stages(CONFIG, frozen, values) | verify.network_stages(CONFIG, params, frozen, values)
    return {name: sd35.thin(value) for name, value in ours.items()}


def constants_of(frozen) -> Constants:
    unit = CONFIG.autoencoder.downsampling * CONFIG.model.patch
    positions = tokens.shifted_crops(frozen.table, sd35.HEIGHT // unit, sd35.WIDTH // unit)
    values = sd35.inputs()
    return Constants(positions, jnp.asarray(values["text"]), jnp.asarray(values["pooled"]))


def missed(ours, theirs) -> list[str]:
    """The stages that differ, in the order of the data."""
    differences = {name: float(np.abs(ours[name] - theirs[name]).max()) for name in ours}
    print("\n".join(f"{name:<20}{difference:.1e} of {np.abs(theirs[name]).max():.1f}" for name, difference in differences.items()))
    allowed = lambda name: VAE if "VAE" in name else DIT if name == "velocity" else DIT * np.abs(theirs[name]).max()
    return [name for name, difference in differences.items() if difference > allowed(name)]


# ------------------------------------------------------------------------------------------------------- numbers


def test_every_stage_is_diffusers(model, reference):
    ours = stages(model, reference)
    assert len(ours) == 4 + 9 + 2  # of embeddings and encoder; blocks 0 to 4, the last without text; velocity and decoder
    assert np.abs(reference["velocity"]).std() > 0.1, "an output near zero would prove nothing"
    assert missed(ours, reference) == []


def test_stages_are_diffusers_whatever_temporal_blocks_have_learnt(model, reference):
    params, frozen = model
    opened = {path: leaf + 0.2 if "temporal" in path and "modulation" in path else leaf for path, leaf in flatten_dict(params).items()}
    assert missed(stages((unflatten_dict(opened), frozen), reference), reference) == []


def test_frames_are_independent_of_each_other_behind_closed_gates(model, reference):
    """Pass u of a converted model is SD3.5 frame by frame, whatever the new parts hold behind their gates."""
    params, frozen = model
    generator, drawn = np.random.default_rng(1), {}
    for path, leaf in flatten_dict(params).items():
        if "temporal" in path or path[0] == "frame_encoding":
            assert "modulation" not in path or not np.any(leaf), "gates of a converted model are closed"
            value = 0.2 * generator.normal(size=leaf.shape).astype(np.float32)
            if "modulation" in path:
                value[..., 2, :] = 0  # shift, scale, gate
            leaf = value
        drawn[path] = leaf
    values = sd35.inputs()
    run = jax.jit(float32_model().apply)
    constants = constants_of(frozen)
    with jax.default_matmul_precision("highest"):
        for weights in params, unflatten_dict(drawn):
            velocity = run({"params": weights}, reference["noisy"][None], values["t"][:1], Conditions(), constants)
            np.testing.assert_allclose(sd35.thin(velocity), reference["velocity"], rtol=0, atol=DIT)


def test_eight_euler_steps_end_where_diffusers_do(model, reference):
    params, frozen = model
    values = sd35.inputs()
    levels = flow.noise_levels(sd35.EULER_STEPS, shift=3.0)
    np.testing.assert_allclose(levels, reference["noise levels"], rtol=0, atol=LEVELS)
    constants = constants_of(frozen)
    steps = jnp.int32(0), jnp.int32(sd35.EULER_STEPS)
    with jax.default_matmul_precision("highest"):
        noise = jnp.asarray(values["noise"])[:, None]
        z, _ = sampler.denoise(float32_model(), params, constants, noise, (Conditions(),), jnp.ones(1), jnp.asarray(levels), *steps)
        decode = jax.jit(functools.partial(make_autoencoder(CONFIG.autoencoder).apply, method="decode"))
        frames = decode({"params": frozen.autoencoder}, z[:, 0])
    np.testing.assert_allclose(sd35.thin(z), reference["sampled latents"], rtol=0, atol=EULER)
    np.testing.assert_allclose(sd35.thin(frames), reference["sampled frames"], rtol=0, atol=EULER)


def test_bfloat16_strays_no_farther_than_diffusers(model, reference):
    params, frozen = model
    values = sd35.inputs()
    constants = constants_of(frozen)
    rounded = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16).astype(jnp.float32), params)
    half = jax.jit(Transformer(CONFIG.model).apply)({"params": rounded}, reference["noisy"][:, None], values["t"], Conditions(), constants)
    error = float(np.sqrt(np.square(sd35.thin(half) - reference["velocity"]).mean()))
    print(f"root mean square error: ours {error:.4f}, diffusers' {reference['bfloat16 error']:.4f}")
    assert 1e-4 < error <= reference["bfloat16 error"]


# ------------------------------------------------------------------------------------------------------ mutations


def rewritten(rows, change):
    return [row._replace(**change(row)) for row in rows]


def every_block(patch, change):
    for kind, rows in rules.BLOCKS.items():
        patch.setitem(rules.BLOCKS, kind, rewritten(rows, change))


def last_text_modulation_not_swapped(patch):
    change = lambda row: {"form": rules.MODULATION} if row.ours == "joint/text_modulation/linear" else {}
    patch.setitem(rules.BLOCKS, "last", rewritten(rules.BLOCKS["last"], change))


def final_modulation_not_swapped(patch):
    patch.setattr(rules, "TRUNK", rewritten(rules.TRUNK, lambda row: {"form": rules.MODULATION} if row.form == rules.SHIFT_SCALE else {}))


def queries_and_keys_exchanged(patch):
    every_block(patch, lambda row: {"diffusers": row.diffusers.replace("[qkv]", "[kqv]")} if row.ours == "joint/image_qkv/linear" else {})


def queries_and_keys_of_text_exchanged(patch):
    every_block(patch, lambda row: {"diffusers": row.diffusers.replace("[qkv]", "[kqv]")} if row.ours == "joint/text_qkv/linear" else {})


def table_transposed(patch):
    wrong = rules.Form({"": ("", "1 (column row) d -> row column d")})
    patch.setattr(rules, "TRUNK", rewritten(rules.TRUNK, lambda row: {"form": wrong} if row.ours == "frozen/table" else {}))


def patch_order_as_the_output_has_not(patch):
    wrong = rules.PATCHES._replace(tensors={**rules.PATCHES.tensors, "weight": ("kernel", "d c p q -> (c p q) d")})
    patch.setattr(rules, "TRUNK", rewritten(rules.TRUNK, lambda row: {"form": wrong} if row.ours == "params/patches" else {}))


def second_norm_of_the_first_attention(patch):
    every_block(patch, lambda row: {"diffusers": row.diffusers.replace("attn2.norm", "attn.norm")} if "qkv2" in row.ours else {})


def decoder_levels_not_reversed(patch):
    right, top = rules.autoencoder_rows, len(CONFIG.autoencoder.channels) - 1

    def wrong(*sizes):
        for row in right(*sizes):
            if row.diffusers.startswith("decoder.up_blocks."):
                level = int(row.diffusers.split(".")[2])
                row = row._replace(diffusers=row.diffusers.replace(f"up_blocks.{level}", f"up_blocks.{top - level}"))
            yield row

    patch.setattr(rules, "autoencoder_rows", wrong)


@pytest.mark.parametrize(
    "mutation, stage",
    [
        (last_text_modulation_not_swapped, "block 4, image"),
        (final_modulation_not_swapped, "velocity"),
        (queries_and_keys_exchanged, "block 0, image"),
        (queries_and_keys_of_text_exchanged, "block 0, image"),
        (table_transposed, "patch embedding"),
        (patch_order_as_the_output_has_not, "patch embedding"),
        (second_norm_of_the_first_attention, "block 0, image"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_mistake_in_the_rules_shows_in_its_stage(mutation, stage, sd35_folder, reference, monkeypatch):
    mutation(monkeypatch)
    assert missed(stages(sd35.converted(sd35_folder), reference), reference)[0] == stage


def test_mistaken_names_are_gaps_in_the_coverage(sd35_folder, monkeypatch):
    opened = source.open_source(sd35_folder)
    assert source.problems(opened, source.config_of(opened)) == []
    for mutation, word in (second_norm_of_the_first_attention, "is used 2 times"), (decoder_levels_not_reversed, "missing vae.decoder.up_blocks.3.upsamplers"):
        with monkeypatch.context() as patch:
            mutation(patch)
            assert any(word in line for line in source.problems(opened, CONFIG)), mutation
    with monkeypatch.context() as patch:
        patch.setattr(rules, "TRUNK", rules.TRUNK[:-2] + rules.TRUNK[-1:])
        patch.setitem(rules.BLOCKS, "last", [*rules.BLOCKS["last"], rules.EVERY_BLOCK[0]])
        lines = rules.gaps(CONFIG, "diffusers", new=True)
        assert any("frame_encoding/out/kernel is filled 0 times" in line for line in lines)
        assert any("last/joint/image_modulation/linear/kernel is filled 2 times" in line for line in lines)
