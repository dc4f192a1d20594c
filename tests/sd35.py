"""For tests of the conversion: a small random member of Stable Diffusion 3.5's family, in the published layout.

Run by itself (extra `parity`), it writes `sd35_reference.npz`: what diffusers makes of that model.
"""

import pathlib
import tempfile
import zlib

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  numpy's bfloat16
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file
from tqdm import tqdm

from convert_weights import convert, rules, verify
from convert_weights.source import config_of, open_source
from svdp_jax.config import AutoencoderConfig, Config, DataConfig, ModelConfig
from svdp_jax.types import Frozen

CONFIG = Config(
    model=ModelConfig(width=128, depth=5, heads=2, dual_blocks=2, text_width=48, pooled_width=24, table_size=24),
    autoencoder=AutoencoderConfig(channels=(32, 32, 64, 64)),
    data=DataConfig(size=128),
)
HEIGHT, WIDTH = 96, 128  # pixels of the pictures: not square
REFERENCE = pathlib.Path(__file__).parent / "sd35_reference.npz"
STRIDE = 7  # every 7th value of a stage is kept: of every channel, some
EULER_STEPS = 8


def draw_source(dtype="float16") -> dict[str, np.ndarray]:
    """Every tensor of the single file, random: nothing stays at zero or one. Numbers that no version of numpy changes."""
    tensors = {}
    for name, (shape, _) in rules.expected(CONFIG, "original").items():
        noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        is_norm = ".ln_" in name or ("norm" in name and name.endswith(".weight"))
        scale = 1 if name.endswith("pos_embed") else np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.2
        value = is_norm + scale * noise
        if name.endswith("attn.qkv.weight"):
            value[: len(value) // 3] *= 1e-3  # queries so small that the epsilon of the norm behind them matters
        tensors[name] = value.astype(np.float16).astype(jnp.dtype(dtype))
    return tensors


def write_source(path: pathlib.Path, dtype="float16") -> pathlib.Path:
    """The single file."""
    save_file(draw_source(dtype), path)
    return path


def write_folder(path: pathlib.Path, source: pathlib.Path) -> pathlib.Path:
    """The same model as a diffusers folder, made by our own rules."""
    opened = open_source(source)
    arrays = {}
    for branch in "params", "frozen":
        arrays |= convert.fill(opened, CONFIG, branch, "float32", tqdm(disable=True))
    files = {"transformer.": {}, "vae.": {}}
    for slot in rules.slots(CONFIG, "diffusers"):
        if not slot.new:
            array = np.asarray(arrays[slot.path] if slot.layer is None else arrays[slot.path][slot.layer])
            for name, tensor in zip(slot.tensors, rules.to_source(CONFIG, slot, array), strict=True):
                prefix = next(prefix for prefix in files if name.startswith(prefix))
                files[prefix][name.removeprefix(prefix)] = np.ascontiguousarray(tensor)
    for prefix, tensors in files.items():
        (path / prefix[:-1]).mkdir(parents=True)
        save_file(tensors, path / prefix[:-1] / "diffusion_pytorch_model.safetensors")
    return path


def converted(path: pathlib.Path):
    """(params, frozen) of a source, in memory, without its check."""
    source = open_source(path)
    config, bar = config_of(source), tqdm(disable=True)
    params = convert.fill(source, config, "params", "float32", bar) | convert.new_parameters(config, 0, "float32")
    frozen = unflatten_dict(convert.fill(source, config, "frozen", "float32", bar))["frozen"]
    inputs = verify.draw_inputs(config, HEIGHT, WIDTH)
    return unflatten_dict(params)["params"], Frozen(**frozen, text=inputs["text"], pooled=inputs["pooled"])


def thin(array) -> np.ndarray:
    """What the reference file keeps of an array."""
    return np.asarray(array, np.float32).ravel()[::STRIDE]


def inputs() -> dict[str, np.ndarray]:
    """Two pictures at the same noise level, and their noise."""
    return verify.draw_inputs(CONFIG, HEIGHT, WIDTH, count=2)


def reference(path: pathlib.Path) -> dict[str, np.ndarray]:
    """What diffusers makes of the source: every stage, the scheduler's list, eight Euler steps, and how far bfloat16 takes it."""
    import diffusers
    import torch

    from convert_weights import reference as other

    source, given = open_source(path), inputs()
    values = other.stages(source, CONFIG, given, dtype="float32")
    read_transformer, read_autoencoder = other.states(source, CONFIG)
    transformer = other.load(other.make_transformer, CONFIG, read_transformer(), torch.float32)
    autoencoder = other.load(other.make_autoencoder, CONFIG, read_autoencoder(), torch.float32)
    embeddings = other.embeddings(given)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(EULER_STEPS)
    noise = torch.from_numpy(np.moveaxis(given["noise"], -1, 1).copy())
    noisy = torch.from_numpy(np.moveaxis(values["noisy"], -1, 1).copy())
    with torch.no_grad():
        z = noise
        for t in scheduler.timesteps:
            z = scheduler.step(transformer(z, *embeddings, t.expand(len(z)), return_dict=False)[0], t, z, return_dict=False)[0]
        frames = autoencoder.decode(z / CONFIG.autoencoder.scale + CONFIG.autoencoder.shift).sample
        half = transformer.to(torch.bfloat16)
        rounded = half(noisy.bfloat16(), *(x.bfloat16() for x in embeddings), 1000 * torch.from_numpy(given["t"]), return_dict=False)[0]
    error = np.moveaxis(rounded.float().numpy(), 1, -1) - values["velocity"]
    return values | {
        "noise levels": scheduler.sigmas.numpy(),
        "sampled latents": np.moveaxis(z.numpy(), 1, -1),
        "sampled frames": np.moveaxis(frames.numpy(), 1, -1),
        "bfloat16 error": np.sqrt(np.square(error).mean()),
    }


def kept(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What goes into the file: `noisy` whole, for it is an input, and of large arrays every STRIDE-th value."""
    return {name: value if name == "noisy" or np.size(value) < 100 else thin(value) for name, value in values.items()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch, jax.default_matmul_precision("highest"):
        np.savez_compressed(REFERENCE, **kept(reference(write_source(pathlib.Path(scratch, "source.safetensors")))))
    print(REFERENCE, REFERENCE.stat().st_size)
