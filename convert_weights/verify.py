"""Proof of a conversion: python -m convert_weights.verify --checkpoint DIR --source FILE_OR_DIR

One picture through diffusers' model of the source and through the checkpoint, in float32, stage by stage: autoencoder, embeddings,
first and last block of each kind, velocity. The gates of the temporal blocks, which diffusers lacks, are closed for it, so that a
trained checkpoint can be compared, too. The two run one after the other, in separate processes. Exit status 1 if a stage differs.
Needs the extra `parity` (PyTorch and diffusers).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from tqdm import tqdm

from convert_weights import rules
from convert_weights.source import ConversionError, Source, config_of, local, open_source
from svdp_jax import checkpoint, cli, files
from svdp_jax.config import Config, ConfigError, ModelConfig
from svdp_jax.models import tokens
from svdp_jax.models.autoencoder import make_autoencoder
from svdp_jax.models.blocks import Layer
from svdp_jax.models.transformer import Transformer, layer_groups
from svdp_jax.types import Conditions, Constants, Frozen

TOLERANCE = 5e-5  # of the largest value that the reference has in a stage


class Comparison(NamedTuple):
    """How far a stage is from its reference."""

    stage: str
    largest: float  # absolute difference
    relative: float  # the same, in the reference's largest value
    cosine: float
    passed: bool


def compare(stage: str, ours: np.ndarray, theirs: np.ndarray, *, tolerance: float = TOLERANCE) -> Comparison:
    """Two arrays of one shape. What is not finite, or has another shape, has not passed."""
    if ours.shape != theirs.shape:
        return Comparison(stage, np.inf, np.inf, 0.0, False)
    a, b = (np.asarray(x, np.float64).ravel() for x in (ours, theirs))
    largest, scale = np.abs(a - b).max(), np.abs(b).max()
    cosine = a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-300)
    return Comparison(stage, float(largest), float(largest / max(scale, 1e-300)), float(cosine), bool(largest <= tolerance * scale))


def table(rows: list[Comparison]) -> str:
    lines = [f"{'stage':<28}{'max abs':>10}{'relative':>10}{'cosine':>12}"]
    for stage, largest, relative, cosine, passed in rows:
        lines.append(f"{stage:<28}{largest:>10.1e}{relative:>10.1e}{cosine:>12.8f}  {'pass' if passed else 'FAIL'}")
    return "\n".join(lines)


def verify(directory: str | os.PathLike, path: pathlib.Path) -> list[Comparison]:
    """One row per stage. Raises ConfigError or ConversionError if either side cannot be read."""
    if not importlib.util.find_spec("torch") or not importlib.util.find_spec("diffusers"):
        raise ConversionError("verify compares with diffusers: pip install -e '.[parity]'")
    source = open_source(path)
    config, weights = checkpoint.find_weights(directory)
    if config.autoencoder.kind != "kl":
        raise ConversionError(f"checkpoint {directory} was not converted from Stable Diffusion 3.5: its autoencoder is {config.autoencoder.kind}")
    if rules.target(config_of(source)) != rules.target(config):
        raise ConversionError(f"checkpoint {directory} was not made of {path}: the two have different sizes")
    inputs = draw_inputs(config, config.data.size, config.data.size)
    with tqdm(total=4, desc="diffusers", dynamic_ncols=True) as bar:

        def next_is(what: str) -> None:
            bar.update()
            bar.set_description(what)

        theirs = run_reference(path, inputs, dtype=checkpoint.stored_dtype(weights))
        inputs["noisy"], inputs["latents"] = theirs.pop("noisy"), theirs["VAE encode"]
        next_is("autoencoder")
        ours = autoencoder_stages(config, checkpoint.load_frozen(files.place(directory)), inputs)
        next_is("loading")
        params, frozen = _load(directory)
        next_is("network")
        ours |= network_stages(config, params, frozen, inputs)
        next_is("done")
    return [compare_tables(config, frozen, source), *(compare(stage, ours[stage], theirs[stage]) for stage in ours)]


def run_reference(path: pathlib.Path, inputs: dict[str, np.ndarray], *, dtype: str) -> dict[str, np.ndarray]:
    """`reference.stages` in a process of its own, whose memory is free when it ends. `dtype`: what the checkpoint rounded to."""
    with tempfile.TemporaryDirectory() as scratch:
        given, made = pathlib.Path(scratch, "inputs.npz"), pathlib.Path(scratch, "outputs.npz")
        np.savez(given, **inputs)
        command = [sys.executable, "-m", "convert_weights.reference", "--source", path, "--inputs", given, "--outputs", made, "--dtype", dtype]
        result = subprocess.run(list(map(str, command)), stderr=subprocess.PIPE, text=True)
        if result.returncode:
            said = result.stderr.strip().splitlines() or ["it was killed: memory may have run out"]
            raise ConversionError(f"diffusers cannot run {path}: {said[-1]}")
        return dict(np.load(made))


def _load(directory: str | os.PathLike) -> tuple[Any, Frozen]:
    """(params, frozen), in float32 on the device; each array of the file is let go as its own is made."""
    _, params, frozen = checkpoint.load_stored(directory)
    flat = flatten_dict(params)
    del params
    return unflatten_dict({path: jnp.asarray(flat.pop(path), jnp.float32) for path in list(flat)}), frozen


def draw_inputs(config: Config, height: int, width: int, *, count: int = 1) -> dict[str, np.ndarray]:
    """Random pictures, and random noise, text and pooled embedding: zeros would hide what they meet."""
    generator = np.random.RandomState(0)  # whose numbers no version of numpy changes
    draw = lambda *shape: generator.standard_normal(shape).astype(np.float32)
    model, unit = config.model, config.autoencoder.downsampling
    rough = draw(count, height // unit, width // unit, 3).repeat(unit, axis=1).repeat(unit, axis=2)
    return {
        "frames": np.tanh(rough + 0.1 * draw(count, height, width, 3)),
        "noise": draw(count, height // unit, width // unit, model.latent_channels),
        "t": np.full(count, 0.6, np.float32),
        "text": draw(model.text_tokens, model.text_width),
        "pooled": draw(model.pooled_width),
    }


@functools.partial(jax.jit, static_argnums=0, static_argnames=("method", "capture_intermediates", "mutable"))
def _apply(model: nn.Module, *arguments: Any, **options: Any) -> Any:
    return model.apply(*arguments, **options)


def autoencoder_stages(config: Config, frozen: Frozen, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stage -> what our autoencoder puts out, as `reference.stages` has it. `inputs`: frames, and latents to decode."""
    model, weights = make_autoencoder(config.autoencoder), {"params": frozen.autoencoder}
    with jax.default_matmul_precision("highest"):
        encoded = _apply(model, weights, inputs["frames"], method="encode")
        decoded = _apply(model, weights, inputs["latents"], method="decode")
    return {"VAE encode": np.asarray(encoded), "VAE decode": np.asarray(decoded)}


def network_stages(config: Config, params: Any, frozen: Frozen, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stage -> what our network puts out, as `reference.stages` has it, in the order of the data, temporal gates closed. `inputs`: noisy, t, text, pooled."""
    noisy = inputs["noisy"]
    crops = tokens.shifted_crops(frozen.table, noisy.shape[1] // config.model.patch, noisy.shape[2] // config.model.patch)
    constants = Constants(crops, jnp.asarray(inputs["text"]), jnp.asarray(inputs["pooled"]))
    model = Transformer(in_float32(config))
    options = {"capture_intermediates": _is_a_stage, "mutable": "intermediates"}
    with jax.default_matmul_precision("highest"):
        velocity, captured = _apply(model, {"params": with_closed_gates(params)}, noisy[:, None], inputs["t"], Conditions(), constants, **options)
    captured = {path[:-1]: value for path, value in flatten_dict(captured["intermediates"]).items()}  # without "__call__"
    part = lambda *path: captured[path][0]
    outputs = {
        "patch embedding": part("patches")[:, 0] + crops[0],
        "text embedding": part("text"),
        "time embedding": part("time") + part("pooled"),
    }
    index = 0
    for kind, count in layer_groups(config.model):
        streams, _ = part(kind)
        for layer in sorted({0, count - 1}):
            text, image = ((x if kind == "last" else x[layer])[:, 0] for x in (streams.text, streams.image))
            outputs[f"block {index + layer}, image"] = image
            if kind != "last":
                outputs[f"block {index + layer}, text"] = text
        index += count
    outputs["velocity"] = velocity[:, 0]
    return {name: np.asarray(value) for name, value in outputs.items()}


def with_closed_gates(params: Any) -> Any:
    """Parameters whose temporal blocks change nothing, whatever they have learnt."""
    closed = lambda path, leaf: leaf.at[..., 2, :].set(0) if "temporal" in path and "modulation" in path else leaf  # shift, scale, gate
    return unflatten_dict({path: closed(path, leaf) for path, leaf in flatten_dict(params).items()})


def in_float32(config: Config) -> ModelConfig:
    return dataclasses.replace(config.model, dtype="float32")


def _is_a_stage(module: Any, method: str) -> bool:
    return method == "__call__" and (isinstance(module, Layer) or module.name in ("patches", "text", "time", "pooled"))


def compare_tables(config: Config, frozen: Frozen, source: Source) -> Comparison:
    """The whole position table, of which a picture sees but the middle: equal, or not."""
    theirs = source.read(rules.name("frozen/table", source.layout, "")).astype(np.float32)
    return compare("position table", np.asarray(frozen.table).reshape(1, -1, config.model.width), theirs, tolerance=0)


def main() -> None:
    description = "Compare a converted checkpoint, its temporal gates closed, with diffusers' model, stage by stage."
    parser = cli.ArgumentParser(prog="python -m convert_weights.verify", description=description)
    parser.add_argument("--checkpoint", required=True, help="what python -m convert_weights wrote")
    parser.add_argument("--source", type=local, required=True, help="the file or folder that it was made of")
    flags = parser.parse_args()
    cli.on_host()
    with cli.messages(ConversionError, ConfigError):
        rows = verify(flags.checkpoint, flags.source)
    print(table(rows))
    missed = [row.stage for row in rows if not row.passed]
    print(f"{len(missed)} of {len(rows)} stages differ: {', '.join(missed)}" if missed else f"all {len(rows)} stages agree")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
