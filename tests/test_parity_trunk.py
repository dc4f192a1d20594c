"""Without its new parts the network is Stable Diffusion 3.5's: equal to diffusers' on random weights, in float32.

Runs where torch and diffusers are installed (the extra `parity`). The pass is u: frames of noise and text, no other signal.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from svdp_jax import flow
from svdp_jax.config import ModelConfig
from svdp_jax.models import tokens
from svdp_jax.models.transformer import Transformer, abstract_inputs
from svdp_jax.types import Conditions, Constants

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

CONFIG = ModelConfig(
    width=256, depth=4, heads=4, dual_blocks=2, text_tokens=7, text_width=32, pooled_width=24, table_size=24, dtype="float32"
)
BATCH, FRAMES, HEIGHT, WIDTH = 2, 2, 12, 10  # latents; 6 x 5 tokens: neither square nor centred on an even number
T = np.array([0.37, 0.92], np.float32)


@pytest.fixture(scope="module")
def reference():
    """diffusers' transformer, every parameter and the position table random: nothing stays at zero or one."""
    model = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=CONFIG.patch,
        in_channels=CONFIG.latent_channels,
        out_channels=CONFIG.latent_channels,
        num_layers=CONFIG.depth,
        attention_head_dim=CONFIG.head_size,
        num_attention_heads=CONFIG.heads,
        joint_attention_dim=CONFIG.text_width,
        caption_projection_dim=CONFIG.width,
        pooled_projection_dim=CONFIG.pooled_width,
        pos_embed_max_size=CONFIG.table_size,
        dual_attention_layers=tuple(range(CONFIG.dual_blocks)),
        qk_norm="rms_norm",
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            noise = torch.randn(value.shape, generator=generator)
            matrix = value.ndim > 1 and name != "pos_embed.pos_embed"
            norm = name.split(".")[-2].startswith("norm_") and value.shape == (CONFIG.head_size,)
            value.copy_(noise / value[0].numel() ** 0.5 if matrix else 1 + 0.2 * noise if norm else 0.2 * noise)
            if ".to_q." in name or ".add_q_proj." in name:
                value.mul_(1e-3)  # so small that the epsilon of the norm behind it matters
    return model


def to_params(state):
    """Parameters of our trunk, {path: array}, from diffusers' names and layouts. Every key must be used."""
    width, heads, size = CONFIG.width, CONFIG.heads, CONFIG.head_size
    state = {key: value.numpy() for key, value in state.items() if key != "pos_embed.pos_embed"}
    params = {}

    def put(path, kernel, bias):
        params.update({(*path, "kernel"): kernel, (*path, "bias"): bias})

    def take(key):
        return state.pop(f"{key}.weight").T, state.pop(f"{key}.bias")

    def linear(path, key):
        put(path, *take(key))

    def modulation(path, key, *, swap=False):
        kernel, bias = take(key)
        kernel, bias = kernel.reshape(width, -1, width), bias.reshape(-1, width)
        order = [1, 0] if swap else slice(None)  # diffusers stores scale, shift where the original has shift, scale
        put((*path, "linear"), kernel[:, order], bias[order])

    def qkv(path, keys, norms):
        kernels, biases = zip(*[take(key) for key in keys], strict=True)
        kernel = np.stack([kernel.reshape(width, heads, size) for kernel in kernels], axis=1)
        put((*path, "linear"), kernel, np.stack([bias.reshape(heads, size) for bias in biases]))
        for name, key in zip(("q_norm", "k_norm"), norms, strict=True):
            params[(*path, name)] = state.pop(f"{key}.weight")

    def output(path, key):
        kernel, bias = take(key)
        put((*path, "linear"), kernel.reshape(heads, size, width), bias)

    def mlp(path, key):
        linear((*path, "wide"), f"{key}.net.0.proj")
        linear((*path, "narrow"), f"{key}.net.2")

    patch = state.pop("pos_embed.proj.weight")  # [D, C, p, q]
    put(("patches",), patch.transpose(2, 3, 1, 0).reshape(-1, width), state.pop("pos_embed.proj.bias"))
    linear(("text",), "context_embedder")
    for ours, theirs in (("time", "timestep_embedder"), ("pooled", "text_embedder")):
        for layer, number in (("wide", 1), ("out", 2)):
            linear((ours, layer), f"time_text_embed.{theirs}.linear_{number}")
    modulation(("final_modulation",), "norm_out.linear", swap=True)
    linear(("final",), "proj_out")

    for index in range(CONFIG.depth):
        key, block, last = f"transformer_blocks.{index}", ("block", index), index == CONFIG.depth - 1
        modulation((*block, "image_modulation"), f"{key}.norm1.linear")
        modulation((*block, "text_modulation"), f"{key}.norm1_context.linear", swap=last)
        qkv((*block, "image_qkv"), [f"{key}.attn.to_{x}" for x in "qkv"], [f"{key}.attn.norm_{x}" for x in "qk"])
        qkv((*block, "text_qkv"), [f"{key}.attn.add_{x}_proj" for x in "qkv"], [f"{key}.attn.norm_added_{x}" for x in "qk"])
        output((*block, "image_out"), f"{key}.attn.to_out.0")
        mlp((*block, "image_mlp"), f"{key}.ff")
        if index < CONFIG.dual_blocks:
            qkv((*block, "image_qkv2"), [f"{key}.attn2.to_{x}" for x in "qkv"], [f"{key}.attn2.norm_{x}" for x in "qk"])
            output((*block, "image_out2"), f"{key}.attn2.to_out.0")
        if not last:
            output((*block, "text_out"), f"{key}.attn.to_add_out")
            mlp((*block, "text_mlp"), f"{key}.ff_context")
    assert not state, f"diffusers' parameters without a place in ours: {sorted(state)}"
    return stack_blocks(params)


def stack_blocks(params):
    """Blocks of one kind along a leading axis, as the scan wants them: ("block", i, ...) to (kind, "joint", ...)."""
    kinds = {"dual": range(CONFIG.dual_blocks), "plain": range(CONFIG.dual_blocks, CONFIG.depth - 1)}
    stacked = {path: value for path, value in params.items() if path[0] != "block"}
    for kind, indices in kinds.items():
        for path in [path[2:] for path in params if path[:2] == ("block", indices[0])]:
            stacked[(kind, "joint", *path)] = np.stack([params[("block", index, *path)] for index in indices])
    stacked |= {("last", "joint", *path[2:]): value for path, value in params.items() if path[:2] == ("block", CONFIG.depth - 1)}
    return stacked


def with_closed_temporal_blocks(trunk, shapes):
    """`trunk` and the parts SD3.5 lacks: random, too, but for the gates of the temporal blocks, which are zero."""
    generator = np.random.default_rng(1)
    new = {path: leaf for path, leaf in shapes.items() if "temporal" in path or path[0] == "frame_encoding"}
    assert {path: leaf.shape for path, leaf in shapes.items() if path not in new} == {path: leaf.shape for path, leaf in trunk.items()}
    params = dict(trunk)
    for path, leaf in new.items():
        value = 0.2 * generator.normal(size=leaf.shape).astype(np.float32)
        if "modulation" in path:
            value[..., 2, :] = 0  # shift, scale, gate
        params[path] = value
    return unflatten_dict(params)


def both(reference, latents):
    """(ours, theirs) for latents [B, F, h, w, C]: what each network puts out."""
    generator = np.random.default_rng(2)
    text = generator.normal(size=(CONFIG.text_tokens, CONFIG.text_width)).astype(np.float32)
    pooled = generator.normal(size=CONFIG.pooled_width).astype(np.float32)
    count = BATCH * FRAMES
    with torch.no_grad():
        theirs = reference(
            hidden_states=torch.from_numpy(latents.reshape(count, *latents.shape[2:]).transpose(0, 3, 1, 2).copy()),
            encoder_hidden_states=torch.from_numpy(np.broadcast_to(text, (count, *text.shape)).copy()),
            pooled_projections=torch.from_numpy(np.broadcast_to(pooled, (count, *pooled.shape)).copy()),
            timestep=torch.from_numpy(1000 * T.repeat(FRAMES)),
            return_dict=False,
        )[0]
    theirs = theirs.numpy().transpose(0, 2, 3, 1).reshape(latents.shape)

    model = Transformer(CONFIG)
    inputs = abstract_inputs(CONFIG, batch=BATCH, frames=FRAMES, history=1, height=HEIGHT, width=WIDTH)
    shapes = flatten_dict(nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]))
    params = with_closed_temporal_blocks(to_params(reference.state_dict()), shapes)
    table = reference.pos_embed.pos_embed.numpy().reshape(CONFIG.table_size, CONFIG.table_size, CONFIG.width)
    crops = tokens.shifted_crops(table, HEIGHT // CONFIG.patch, WIDTH // CONFIG.patch)
    constants = Constants(crops, jnp.asarray(text), jnp.asarray(pooled))
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(model.apply)({"params": params}, jnp.asarray(latents), jnp.asarray(T), Conditions(), constants)
    return np.asarray(ours), theirs


def test_the_trunk_is_sd35(reference):
    latents = np.random.default_rng(3).normal(size=(BATCH, FRAMES, HEIGHT, WIDTH, CONFIG.latent_channels)).astype(np.float32)
    ours, theirs = both(reference, latents)
    print(f"max abs difference {np.abs(ours - theirs).max():.3g} of {np.abs(theirs).max():.3g}")
    assert np.abs(theirs).std() > 0.1, "an output near zero would prove nothing"
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("steps", [1, 4, 28, 40, 50])
def test_noise_levels_are_those_of_the_scheduler(steps):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    np.testing.assert_allclose(flow.noise_levels(steps, shift=3.0), scheduler.sigmas.numpy(), rtol=0, atol=1e-6)
