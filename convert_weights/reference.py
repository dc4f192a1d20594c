"""What diffusers' own classes make of a source: the other side of `convert_weights.verify`, in a process of its own.

Names of the single file go through diffusers' converters, not through our rules, so that a mistake in these cannot cancel
out. Needs the extra `parity` (PyTorch and diffusers).
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable

import diffusers
import numpy as np
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint, convert_sd3_transformer_checkpoint_to_diffusers
from safetensors import safe_open

from convert_weights import rules
from convert_weights.source import Source, config_of, open_source
from svdp_jax.config import Config

State = dict[str, torch.Tensor]


def make_transformer(config: Config) -> diffusers.SD3Transformer2DModel:
    """diffusers' transformer of our sizes."""
    model = config.model
    return diffusers.SD3Transformer2DModel(
        sample_size=config.latent_shape[0],
        patch_size=model.patch,
        in_channels=model.latent_channels,
        out_channels=model.latent_channels,
        num_layers=model.depth,
        attention_head_dim=model.head_size,
        num_attention_heads=model.heads,
        joint_attention_dim=model.text_width,
        caption_projection_dim=model.width,
        pooled_projection_dim=model.pooled_width,
        pos_embed_max_size=model.table_size,
        dual_attention_layers=tuple(range(model.dual_blocks)),
        qk_norm="rms_norm",
    ).eval()


def make_autoencoder(config: Config) -> diffusers.AutoencoderKL:
    """diffusers' autoencoder of our sizes."""
    autoencoder = config.autoencoder
    levels = len(autoencoder.channels)
    return diffusers.AutoencoderKL(
        block_out_channels=autoencoder.channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=autoencoder.blocks,
        latent_channels=autoencoder.latent_channels,
        norm_num_groups=autoencoder.groups,
        scaling_factor=autoencoder.scale,
        shift_factor=autoencoder.shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def states(source: Source, config: Config) -> tuple[Callable[[], State], Callable[[], State]]:
    """Functions that read the state of the transformer and of the autoencoder, by diffusers' names."""

    def read(prefix: str, *, keep: bool = False) -> State:
        handles, state = {}, {}
        for name, tensor in source.tensors.items():
            if name.startswith(prefix):
                handle = handles.setdefault(tensor.file, None) or safe_open(tensor.file, "pt")
                handles[tensor.file] = handle
                state[name if keep else name.removeprefix(prefix)] = handle.get_tensor(tensor.name)
        return state

    trunk, vae = rules.PREFIXES[source.layout]
    if source.layout == "original":
        settings = {"down_block_types": config.autoencoder.channels, "up_block_types": config.autoencoder.channels}
        return (
            lambda: convert_sd3_transformer_checkpoint_to_diffusers(read(trunk, keep=True)),
            lambda: convert_ldm_vae_checkpoint(read(vae, keep=True), settings),
        )
    new = tuple(tensor.removeprefix(trunk) for slot in rules.slots(config, source.layout) if slot.new for tensor in slot.tensors)
    return lambda: {name: tensor for name, tensor in read(trunk).items() if name not in new}, lambda: read(vae)


def load(make: Callable[[Config], torch.nn.Module], config: Config, state: State, dtype: torch.dtype) -> torch.nn.Module:
    """A float32 model with these weights, rounded to `dtype` first."""
    with torch.device("meta"):
        model = make(config)
    rounded = {name: state.pop(name) for name in list(state)}
    for name, tensor in rounded.items():
        rounded[name] = (tensor if name == "pos_embed.pos_embed" else tensor.to(dtype)).to(torch.float32)
    model.load_state_dict(rounded, strict=True, assign=True)
    return model


def stages(source: Source, config: Config, inputs: dict[str, np.ndarray], *, dtype: str) -> dict[str, np.ndarray]:
    """Stage -> what it puts out, channels last. `inputs`: frames [N, H, W, 3], noise [N, h, w, C], t [N], text [T, E], pooled [Y]."""
    read_transformer, read_autoencoder = states(source, config)
    settings, outputs = config.autoencoder, {}
    to_torch = lambda array: torch.from_numpy(np.ascontiguousarray(array))
    last = lambda tensor: np.ascontiguousarray(np.moveaxis(tensor.detach().numpy(), 1, -1))
    with torch.no_grad():
        autoencoder = load(make_autoencoder, config, read_autoencoder(), torch.float32)
        z = autoencoder.encode(to_torch(np.moveaxis(inputs["frames"], -1, 1))).latent_dist.mode()
        latents = (z - settings.shift) * settings.scale
        outputs["VAE encode"] = last(latents)
        outputs["VAE decode"] = last(autoencoder.decode(z).sample)
        del autoencoder

        transformer = load(make_transformer, config, read_transformer(), getattr(torch, dtype))
        capture(transformer, outputs)
        t = to_torch(inputs["t"])
        level = t[:, None, None, None]
        noisy = (1 - level) * latents + level * to_torch(np.moveaxis(inputs["noise"], -1, 1))
        outputs["noisy"] = last(noisy)
        outputs["velocity"] = last(transformer(noisy, *embeddings(inputs), 1000 * t, return_dict=False)[0])
    return outputs


def embeddings(inputs: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Text and pooled embedding of every picture: the same for all."""
    return tuple(torch.from_numpy(inputs[name])[None].repeat_interleave(len(inputs["t"]), 0) for name in ("text", "pooled"))


def capture(transformer: diffusers.SD3Transformer2DModel, outputs: dict[str, np.ndarray]) -> None:
    """Hooks that put what the parts of the network return into `outputs`."""

    def keep(name: str) -> Callable:
        def hook(module, arguments, output):
            if isinstance(output, tuple):  # a block's
                text, image = output
                outputs[f"{name}, image"] = image.detach().numpy()
                if text is not None:
                    outputs[f"{name}, text"] = text.detach().numpy()
            else:
                outputs[name] = output.detach().numpy()
                if name == "text embedding":
                    outputs[name] = outputs[name][0]  # of the one prompt

        return hook

    transformer.pos_embed.register_forward_hook(keep("patch embedding"))
    transformer.context_embedder.register_forward_hook(keep("text embedding"))
    transformer.time_text_embed.register_forward_hook(keep("time embedding"))
    for index, block in enumerate(transformer.transformer_blocks):
        block.register_forward_hook(keep(f"block {index}"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m convert_weights.reference", description=__doc__)
    parser.add_argument("--source", type=pathlib.Path, required=True)
    parser.add_argument("--inputs", type=pathlib.Path, required=True, help=".npz")
    parser.add_argument("--outputs", type=pathlib.Path, required=True, help=".npz")
    parser.add_argument("--dtype", default="float32", help="to which the transformer's weights are rounded first")
    flags = parser.parse_args()
    source = open_source(flags.source)
    np.savez(flags.outputs, **stages(source, config_of(source), dict(np.load(flags.inputs)), dtype=flags.dtype))


if __name__ == "__main__":
    main()
