"""What a user has: a published file or folder, opened without reading it, recognised, and its sizes as a config.

    source = open_source(path)          names, shapes and types of all tensors; layout detected
    config = config_of(source)          sizes read from shapes
    dtype_of(source)                    in which its numbers are kept
    problems(source, config)            everything that does not fit, at once
    source.read(name)                   one tensor, from disk
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np
import safetensors

from convert_weights import rules
from svdp_jax import files
from svdp_jax.config import AutoencoderConfig, Config, ConfigError, ModelConfig, from_dict

CONFIG_KEY = "svdp_jax"  # in the metadata of a file that `convert_weights.export` wrote: the config as JSON
READABLE = ("F32", "F16", "BF16")


class ConversionError(Exception):
    """Something about the input or output that cannot work. `problems` has one line for each thing that is wrong."""

    def __init__(self, message: str, problems: list[str] | None = None, *, shown: int = 8):
        self.problems = problems or []
        rest = len(self.problems) - shown
        listed = "; ".join(self.problems[:shown]) + (f"; and {rest} more" if rest > 0 else "")
        super().__init__(message + (f", {len(self.problems)} problem{'s' * (len(self.problems) > 1)}: {listed}" if self.problems else ""))


def local(text: str) -> pathlib.Path:
    """The value of a flag that names a file or directory of this machine; an address is told to be none."""
    if files.is_remote(text):
        raise argparse.ArgumentTypeError(f"{text} is not on this machine, and a local path is needed: copy it")
    return pathlib.Path(text)


class Tensor(NamedTuple):
    """Where a tensor lies, and what it is."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors calls it: F32, F16, BF16, ...
    file: pathlib.Path
    name: str  # within the file


@dataclasses.dataclass
class Source:
    """Tensors by name, with the prefixes of `rules.PREFIXES`: those of a folder get their component's."""

    path: pathlib.Path
    layout: rules.Layout
    tensors: dict[str, Tensor]
    autoencoder: dict[str, Any]  # of vae/config.json, as far as our config has it; a single file says nothing of it
    config: Config | None  # of a file that `convert_weights.export` wrote
    handles: dict[pathlib.Path, Any] = dataclasses.field(default_factory=dict)

    def read(self, name: str) -> np.ndarray:
        """One tensor in its own type (bfloat16 is ml_dtypes')."""
        tensor = self.tensors[name]
        if tensor.file not in self.handles:
            self.handles[tensor.file] = _open(tensor.file)
        return self.handles[tensor.file].get_tensor(tensor.name)

    @property
    def has_new_parts(self) -> bool:
        return self.config is not None


def open_source(path: pathlib.Path) -> Source:
    """A published single file, a diffusers folder, or a file of `convert_weights.export`. Reads headers alone.

    Raises ConversionError, saying what is there, if it is none of these or another model.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        source = _open_folder(path)
    else:
        tensors, metadata = _header(path)
        if CONFIG_KEY in metadata:
            source = Source(path, "diffusers", tensors, {}, from_dict(Config, json.loads(metadata[CONFIG_KEY])))
        else:
            source = Source(path, "original", tensors, {}, None)
    _refuse_other_models(source)
    return source


def _open_folder(folder: pathlib.Path) -> Source:
    tensors: dict[str, Tensor] = {}
    for prefix in rules.PREFIXES["diffusers"]:
        part = folder / prefix.removesuffix(".")
        if not part.is_dir():
            single = sorted(folder.glob("*.safetensors"))
            hint = f"; to convert the single file, give {single[0]}" if single else ""
            raise ConversionError(f"{folder} has no {part.name}/: a diffusers folder holds transformer/ and vae/{hint}")
        for file in _weight_files(part):
            found, _ = _header(file)
            tensors |= {prefix + name: tensor for name, tensor in found.items()}
        _check_index(part, {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)})
    return Source(folder, "diffusers", tensors, _autoencoder_settings(folder / "vae" / "config.json"), None)


def _chosen(part: pathlib.Path) -> pathlib.Path | None:
    """The one file of a component, or the index of its shards; of several variants the one without a suffix such as `.fp16`."""

    def rank(file: pathlib.Path) -> tuple[bool, bool, int, str]:
        suffixed = "." in re.sub(r"\.safetensors|\.index|\.json", "", file.name)
        return suffixed, file.suffix == ".json", len(file.name), file.name

    whole = [file for file in part.glob("*.safetensors") if not re.search(r"-\d+-of-\d+", file.name)]
    return min([*whole, *part.glob("*.safetensors.index*.json")], key=rank, default=None)


def _weight_files(part: pathlib.Path) -> list[pathlib.Path]:
    """The files of one component: those of its index, or its one file."""
    chosen = _chosen(part)
    if chosen is None:
        others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.ckpt") for file in part.glob(pattern))
        if others:
            _refuse_pickle(part / others[0])
        shards = sorted(part.glob("*.safetensors"))
        raise ConversionError(f"{part} holds {'shards but no *.safetensors.index.json' if shards else 'no *.safetensors file'}")
    if chosen.suffix == ".safetensors":
        return [chosen]
    shards = sorted({part / name for name in _json(chosen).get("weight_map", {}).values()})
    missing = [file.name for file in shards if not file.is_file()]
    if missing or not shards:
        raise ConversionError(f"{part} lacks {', '.join(missing) or 'every shard'}, which {chosen.name} lists: download the rest")
    return shards


def _check_index(part: pathlib.Path, found: set[str]) -> None:
    """Every tensor that the index lists stands in its shards."""
    chosen = _chosen(part)
    if chosen.suffix == ".json" and (lost := set(_json(chosen)["weight_map"]) - found):
        raise ConversionError(f"{part}: its shards lack tensors that {chosen.name} lists", sorted(lost))


def _json(file: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ConversionError(f"{file} is not JSON: {error}") from error


def _autoencoder_settings(file: pathlib.Path) -> dict[str, Any]:
    names = {"scaling_factor": "scale", "shift_factor": "shift", "norm_num_groups": "groups"}
    values = _json(file) if file.is_file() else {}
    return {ours: values[theirs] for theirs, ours in names.items() if values.get(theirs) is not None}


def _header(file: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; what else it may be is told apart."""
    if not file.exists():
        raise ConversionError(f"{file} does not exist: give sd3.5_medium.safetensors or a diffusers folder")
    try:
        with file.open("rb") as stream:
            start = stream.read(64)
    except OSError as error:
        raise ConversionError(f"{file} cannot be read: {error.strerror}") from error
    zipped_or_plain = start[:4] == b"PK\x03\x04" or start[:1] == b"\x80" and start[8:9] != b"{"  # a header's length may begin with any byte
    if file.suffix in (".ckpt", ".pt", ".pth", ".bin") or zipped_or_plain:
        _refuse_pickle(file)
    if start.startswith(b"GGUF"):
        raise ConversionError(f"{file} is a GGUF file, which holds quantised weights: give the published .safetensors")
    if start.startswith(b"version https://git-lfs"):
        raise ConversionError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` in its repository")
    handle = _open(file)
    tensors = {}
    for name in handle.keys():
        part = handle.get_slice(name)
        tensors[name] = Tensor(tuple(part.get_shape()), part.get_dtype(), file, name)
    return tensors, handle.metadata() or {}


def _open(file: pathlib.Path) -> Any:
    try:
        return safetensors.safe_open(file, "np")
    except (safetensors.SafetensorError, OSError) as error:
        raise ConversionError(f"{file} is no safetensors file, or was cut short ({error}); download it again") from error


def _refuse_pickle(file: pathlib.Path) -> None:
    raise ConversionError(f"{file} is a pickle, and opening one runs whatever code it carries: give the .safetensors that is published beside it")


# ------------------------------------------------------------------------------------------------------------- recognition

FOREIGN = [  # a name that only this model's files have, and the model
    (r"lora_(A|B|up|down|unet|te)|\.lora\.", "a LoRA, which changes another model's weights"),
    (r"double_blocks\.\d|single_transformer_blocks\.\d", "a model of the FLUX family"),
    (r"control_model\.|controlnet_blocks\.", "a ControlNet"),
    (r"(input|output)_blocks\.\d|^transformer\.down_blocks", "a U-Net, as Stable Diffusion 1, 2 and XL have"),
    (r"caption_projection|adaln_single", "a model of the PixArt family"),
]


def _refuse_other_models(source: Source) -> None:
    """ConversionError, naming the model, for anything but Stable Diffusion 3.5 Medium and what has its architecture."""
    tensors, layout = source.tensors, source.layout
    for pattern, model in FOREIGN:
        if any(re.search(pattern, name) for name in tensors):
            raise ConversionError(f"{source.path} is {model}; svdp_jax starts from Stable Diffusion 3.5 Medium")
    if source.config is not None:
        return
    trunk, vae = (any(name.startswith(prefix) for name in tensors) for prefix in rules.PREFIXES[layout])
    if any(name.startswith("transformer_blocks.") for name in tensors):
        raise ConversionError(f"{source.path} is one part of a diffusers folder: give the folder, which holds transformer/ and vae/")
    if not trunk:
        what = "an autoencoder without a transformer" if vae else "no model known here"
        example = next(iter(sorted(tensors)), "no tensor at all")
        raise ConversionError(f"{source.path} is {what} (it has {example}); svdp_jax starts from Stable Diffusion 3.5 Medium")
    depth, patches = len(_blocks(source)), tensors.get(rules.name("params/patches", layout, "weight"))
    if not any(name in tensors for name in _every_block(source, "joint/image_qkv/q_norm", "weight")):
        name = "Stable Diffusion 3 Medium" if depth == 24 else "a model like Stable Diffusion 3"
        raise ConversionError(f"{source.path} is {name} (its queries and keys are not normed); svdp_jax starts from Stable Diffusion 3.5 Medium")
    if not any(name in tensors for name in _every_block(source, "joint/image_qkv2/q_norm", "weight")):
        name = "Stable Diffusion 3.5 Large" if depth == 38 else "a model like Stable Diffusion 3.5 Large"
        raise ConversionError(
            f"{source.path} is {name} ({depth} blocks{f' of width {patches.shape[0]}' if patches else ''}, none with a second attention); svdp_jax starts from Stable Diffusion 3.5 Medium"
        )


def _blocks(source: Source) -> list[int]:
    prefix = re.escape(rules.PREFIXES[source.layout][0] + rules.BLOCK_PREFIXES[source.layout]).replace(r"\{\}", r"(\d+)")
    return sorted({int(match[1]) for name in source.tensors if (match := re.match(prefix, name))})


def _every_block(source: Source, ours: str, tensor: str) -> list[str]:
    return [rules.name(ours, source.layout, tensor, block=block) for block in _blocks(source)]


# ------------------------------------------------------------------------------------------------------------------- sizes


def config_of(source: Source) -> Config:
    """Sizes of the model and its autoencoder, read from shapes; all else as in `Config`'s defaults.

    Raises ConversionError naming the tensors that it would have needed, or what cannot be.
    """
    if source.config is not None:
        return source.config
    tensors, layout, missing = source.tensors, source.layout, []

    def shape(ours: str, tensor: str = "weight", axes: int = 2) -> tuple[int, ...]:
        name = rules.name(ours, layout, tensor, block=0)
        if name not in tensors or len(tensors[name].shape) != axes:
            missing.append(f"{name} is {list(tensors[name].shape)}, must have {axes} axes" if name in tensors else f"missing {name}")
            return (1,) * axes
        return tensors[name].shape

    width, channels, patch, _ = shape("params/patches", axes=4)
    (head_size,) = shape("joint/image_qkv/q_norm", axes=1)
    _, text_width = shape("params/text")
    _, pooled_width = shape("params/pooled/wide")
    hidden, _ = shape("joint/image_mlp/wide")
    _, places, _ = shape("frozen/table", "", axes=3)
    levels, blocks = _autoencoder_sizes(source)
    if not levels:
        missing.append("no autoencoder: give the file or the folder that holds both")
    if missing:
        raise ConversionError(f"{source.path} does not say its sizes", missing)
    dual = [name in tensors for name in _every_block(source, "joint/image_qkv2/q_norm", "weight")]
    default = Config()
    try:
        autoencoder = AutoencoderConfig(**({"latent_channels": channels, "channels": levels, "blocks": blocks} | source.autoencoder))
        model = ModelConfig(
            width=width,
            depth=len(dual),
            heads=max(width // head_size, 1),
            dual_blocks=sum(dual),
            mlp_ratio=max(hidden // width, 1),
            patch=patch,
            latent_channels=channels,
            text_width=text_width,
            pooled_width=pooled_width,
            table_size=math.isqrt(places),
        )
        unit = autoencoder.downsampling * patch
        data = dataclasses.replace(default.data, size=min(default.data.size, model.table_size // 3 * unit))
        return dataclasses.replace(default, model=model, autoencoder=autoencoder, data=data)
    except ConfigError as error:
        raise ConversionError(f"{source.path} has sizes that no model of this family has: {error}") from error


def dtype_of(source: Source) -> str:
    """The type that the network's parameters get unless another is asked for: an export's own, so that it comes back to the bit; else float32."""
    stored = source.tensors[rules.name("params/patches", source.layout, "weight")].dtype
    return "bfloat16" if source.has_new_parts and stored == "BF16" else "float32"


def _autoencoder_sizes(source: Source) -> tuple[tuple[int, ...], int]:
    """Width of each level, and residual blocks per level, of the encoder."""
    theirs = "down.{}.block.{}" if source.layout == "original" else "down_blocks.{}.resnets.{}"
    name = rules.PREFIXES[source.layout][1] + f"encoder.{theirs}.conv1.weight"
    levels = []
    while tensor := source.tensors.get(name.format(len(levels), 0)):
        levels.append(tensor.shape[0])
    blocks = 0
    while name.format(0, blocks) in source.tensors:
        blocks += 1
    return tuple(levels), blocks


# ---------------------------------------------------------------------------------------------------------------- coverage


def problems(source: Source, config: Config) -> list[str]:
    """All that keeps a source from filling every array of a checkpoint exactly once, tensor by tensor; empty if nothing does."""
    wanted = {name: shape for name, (shape, new) in rules.expected(config, source.layout).items() if source.has_new_parts or not new}
    found = source.tensors
    lines = [f"missing {name} {list(wanted[name])}" for name in sorted(wanted.keys() - found.keys())]
    extra = sorted(name for name in found.keys() - wanted.keys() if not name.startswith(tuple(rules.IGNORED)))
    lines += [f"no place for {name} {list(found[name].shape)}" for name in extra]
    for name in sorted(wanted.keys() & found.keys()):
        if found[name].shape != wanted[name]:
            lines.append(f"{name} is {list(found[name].shape)}, must be {list(wanted[name])}")
        if found[name].dtype not in READABLE:
            lines.append(f"{name} is {found[name].dtype}, must be one of {', '.join(READABLE)} (quantised weights do not convert)")
    return lines + rules.gaps(config, source.layout, new=source.has_new_parts)
