"""A published file or folder to a checkpoint that train.py and sample.py load as their own.

The trained part of Stable Diffusion 3.5 Medium goes over as it is. The temporal blocks and the frame encoding, which it
lacks, are initialised from a seed with closed gates, so that pass u of the converted model is SD3.5 frame by frame.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Key
from tqdm import tqdm

from convert_weights import rules
from convert_weights.source import ConversionError, Source, config_of, dtype_of, open_source, problems
from svdp_jax import checkpoint, files
from svdp_jax.config import Config
from svdp_jax.train_state import NEW_PARAMETERS, init_params
from svdp_jax.types import Frozen

Arrays = dict[tuple[str, ...], jax.Array]


def convert(
    path: pathlib.Path, output: pathlib.Path, *, text_encoders: pathlib.Path | None = None, prompt: str = "", dtype: str | None = None, seed: int = 0
) -> Config:
    """Writes the checkpoint `output` and returns its config. `dtype` is the network's (default: `dtype_of` the source); what is never trained stays float32.

    Raises ConversionError, with all that is wrong, before anything is written, and MediaError where that fails; whatever happens, `output` is either
    complete or not there.
    """
    check_new(output, "directory")
    if not 0 <= seed < 2**32:
        raise ConversionError(f"--seed {seed} must be 0 to 2**32 - 1")
    source = open_source(path)
    config = config_of(source)
    if wrong := problems(source, config):
        raise ConversionError(f"{path} does not fit the architecture of Stable Diffusion 3.5 Medium", wrong)
    dtype = dtype or dtype_of(source)
    needed = sum(leaf.size * (jnp.dtype(dtype).itemsize if path[0] == "params" else 4) for path, leaf in rules.target(config).items())
    with staged(output, needed) as partial:
        embedding = encode_prompt(config, text_encoders, prompt, source)
        with tqdm(total=len(source.tensors), unit="tensor", dynamic_ncols=True) as bar:
            checkpoint.write_config(partial, config)
            frozen = fill(source, config, "frozen", "float32", bar)
            with files.writing(output, ValueError):
                checkpoint.save_frozen(partial, Frozen(**{**unflatten_dict(frozen)["frozen"], **embedding}))
            del frozen
            params = fill(source, config, "params", dtype, bar)
            if not source.has_new_parts:
                params |= new_parameters(config, seed, dtype)
            bar.set_postfix_str("writing")
            with files.writing(output, ValueError):
                checkpoint.save_tree(partial / checkpoint.WEIGHTS, unflatten_dict(params)["params"])
    return config


def fill(source: Source, config: Config, branch: str, dtype: str, bar: tqdm) -> Arrays:
    """Every array of a branch ("params" or "frozen") that the source has, by its path. One at a time, so that memory holds little else."""
    slots: dict[tuple[str, ...], list[rules.Slot]] = {}
    for slot in rules.slots(config, source.layout):
        if slot.path[0] == branch and (source.has_new_parts or not slot.new):
            slots.setdefault(slot.path, []).append(slot)
    shapes, arrays = rules.target(config), {}
    for path, layers in slots.items():
        array = np.empty(shapes[path].shape, jnp.dtype(dtype))
        for slot in layers:
            place = array if slot.layer is None else array[slot.layer]
            place[...] = rules.from_source(config, slot, [source.read(name) for name in slot.tensors])
            bar.update(len(slot.tensors))
        arrays[path] = jnp.asarray(array)
    return arrays


def new_parameters(config: Config, seed: int, dtype: str) -> Arrays:
    """What the pretrained model lacks, initialised as train.py would."""
    return _draw_new(config, jax.random.key(seed), dtype)


@functools.partial(jax.jit, static_argnums=(0, 2))  # which drops the initialisation of all that is not returned
def _draw_new(config: Config, key: Key[Array, ""], dtype: str) -> Arrays:
    flat = flatten_dict({"params": nn.meta.unbox(init_params(config, key))})
    return {path: leaf.astype(dtype) for path, leaf in flat.items() if any(part in NEW_PARAMETERS for part in path)}


def encode_prompt(config: Config, text_encoders: pathlib.Path | None, prompt: str, source: Source) -> dict[str, Any]:
    """Fields `text` and `pooled` of `Frozen`, unless the source itself has them; zeros without text encoders, which is said."""
    if text_encoders is not None:
        from convert_weights.text import encode  # PyTorch and transformers, which nothing else here needs

        text, pooled = encode(text_encoders, prompt, config.model)
        return {"text": text, "pooled": pooled}
    if prompt:
        raise ConversionError(f"--prompt {prompt!r} needs --text-encoders, a diffusers folder with text_encoder/, tokenizer/ and so on")
    if source.has_new_parts:
        return {}
    print("no --text-encoders: the prompt's embedding is zeros")
    model = config.model
    return {"text": np.zeros((model.text_tokens, model.text_width), np.float32), "pooled": np.zeros(model.pooled_width, np.float32)}


def check_new(output: pathlib.Path, kind: str) -> None:
    """ConversionError where `output` is there already, MediaError where that cannot be told."""
    with files.writing(output):
        there = output.exists()
    if there:
        raise ConversionError(f"output {output} exists already: give a new {kind}, or remove it")


@contextlib.contextmanager
def staged(output: pathlib.Path, needed: int) -> Iterator[pathlib.Path]:
    """A path beside `output` to write a file or directory of `needed` bytes to. It becomes `output` at the end, and is gone if there is no such end.

    ConversionError where the disk has no room for it, MediaError where it cannot be written."""
    parent = output.absolute().parent
    with files.writing(output):
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
        scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=parent))
    try:
        if free < needed:
            raise ConversionError(f"output {output} needs up to {needed / 1e9:.2f} GB, but the disk has {free / 1e9:.2f} GB left: free some, or go elsewhere")
        with files.writing(output):
            yield scratch / output.name
            (scratch / output.name).rename(output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
