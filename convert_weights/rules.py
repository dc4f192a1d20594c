"""Which tensor of Stable Diffusion 3.5 becomes which parameter of ours, in both published layouts. Read it as a table.

A `Row` names a module: ours | the original single file | the diffusers folder | form. A form says how the module's tensors are
laid out: einops patterns from the original's tensor to our array, which run backwards for the export. Where diffusers
stores the same numbers otherwise, the form says how. Rows without an original name are our own parts, which only files that
`convert_weights.export` wrote contain.

Letters: o i outputs and inputs, d width, n heads, h head size, k chunks of a modulation, p q rows and columns within a patch, c latent
channels.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict

from svdp_jax.config import Config
from svdp_jax.models.autoencoder import make_autoencoder
from svdp_jax.models.transformer import layer_groups
from svdp_jax.train_state import NEW_PARAMETERS, abstract_params
from svdp_jax.types import Frozen

Layout = Literal["original", "diffusers"]

# ------------------------------------------------------------------------------------------------------------------ forms


class Form(NamedTuple):
    """Tensor name -> (our name, pattern from the original's tensor to our array), and what diffusers does differently."""

    tensors: dict[str, tuple[str, str]]
    swapped: bool = False  # diffusers has scale before shift, where the original and we have shift before scale
    flat: bool = False  # diffusers has a linear map, where the original has a 1x1 convolution


def _affine(weight: str, bias: str = "d -> d", *, name: str = "kernel", **differences: bool) -> Form:
    return Form({"weight": (name, weight), "bias": ("bias", bias)}, **differences)


LINEAR = _affine("o i -> i o")
QKV = _affine("(qkv n h) d -> d qkv n h", "(qkv n h) -> qkv n h")  # diffusers: three tensors, which joined are the original's one
HEADS = _affine("d (n h) -> n h d")
MODULATION = _affine("(k d) i -> i k d", "(k d) -> k d")
SHIFT_SCALE = MODULATION._replace(swapped=True)
PATCHES = _affine("d c p q -> (p q c) d")
CONV = _affine("o i h w -> h w i o")
POINTWISE = CONV._replace(flat=True)
NORM = _affine("d -> d", name="scale")
RMS_NORM = Form({"weight": ("", "h -> h")})  # the module is one vector
TABLE = Form({"": ("", "1 (row column) d -> row column d")})
AS_IT_IS = Form({"": ("", "... -> ...")})

# ------------------------------------------------------------------------------------------------------------------- rows


class Row(NamedTuple):
    """One module; {i} is a block's number. `[qkv]` stands for three modules, joined in that order."""

    ours: str
    original: str | None
    diffusers: str
    form: Form


TRUNK = [
    Row("params/patches", "x_embedder.proj", "pos_embed.proj", PATCHES),
    Row("params/text", "context_embedder", "context_embedder", LINEAR),
    Row("params/time/wide", "t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1", LINEAR),
    Row("params/time/out", "t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2", LINEAR),
    Row("params/pooled/wide", "y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1", LINEAR),
    Row("params/pooled/out", "y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2", LINEAR),
    Row("params/final_modulation/linear", "final_layer.adaLN_modulation.1", "norm_out.linear", SHIFT_SCALE),
    Row("params/final", "final_layer.linear", "proj_out", LINEAR),
    Row("params/frame_encoding/wide", None, "frame_embed.linear_1", LINEAR),
    Row("params/frame_encoding/out", None, "frame_embed.linear_2", LINEAR),
    Row("frozen/table", "pos_embed", "pos_embed.pos_embed", TABLE),
]

EVERY_BLOCK = [
    Row("joint/image_modulation/linear", "x_block.adaLN_modulation.1", "norm1.linear", MODULATION),
    Row("joint/image_qkv/linear", "x_block.attn.qkv", "attn.to_[qkv]", QKV),
    Row("joint/image_qkv/q_norm", "x_block.attn.ln_q", "attn.norm_q", RMS_NORM),
    Row("joint/image_qkv/k_norm", "x_block.attn.ln_k", "attn.norm_k", RMS_NORM),
    Row("joint/image_out/linear", "x_block.attn.proj", "attn.to_out.0", HEADS),
    Row("joint/image_mlp/wide", "x_block.mlp.fc1", "ff.net.0.proj", LINEAR),
    Row("joint/image_mlp/narrow", "x_block.mlp.fc2", "ff.net.2", LINEAR),
    Row("joint/text_qkv/linear", "context_block.attn.qkv", "attn.add_[qkv]_proj", QKV),
    Row("joint/text_qkv/q_norm", "context_block.attn.ln_q", "attn.norm_added_q", RMS_NORM),
    Row("joint/text_qkv/k_norm", "context_block.attn.ln_k", "attn.norm_added_k", RMS_NORM),
]
DUAL_BLOCKS = [  # the second attention, among image tokens alone
    Row("joint/image_qkv2/linear", "x_block.attn2.qkv", "attn2.to_[qkv]", QKV),
    Row("joint/image_qkv2/q_norm", "x_block.attn2.ln_q", "attn2.norm_q", RMS_NORM),
    Row("joint/image_qkv2/k_norm", "x_block.attn2.ln_k", "attn2.norm_k", RMS_NORM),
    Row("joint/image_out2/linear", "x_block.attn2.proj", "attn2.to_out.0", HEADS),
]
ALL_BUT_THE_LAST = [
    Row("joint/text_modulation/linear", "context_block.adaLN_modulation.1", "norm1_context.linear", MODULATION),
    Row("joint/text_out/linear", "context_block.attn.proj", "attn.to_add_out", HEADS),
    Row("joint/text_mlp/wide", "context_block.mlp.fc1", "ff_context.net.0.proj", LINEAR),
    Row("joint/text_mlp/narrow", "context_block.mlp.fc2", "ff_context.net.2", LINEAR),
]
LAST_BLOCK = [  # its text gives keys and values only: two modulations where the others have six
    Row("joint/text_modulation/linear", "context_block.adaLN_modulation.1", "norm1_context.linear", SHIFT_SCALE),
]
TEMPORAL_BLOCKS = [
    Row("temporal/modulation/linear", None, "norm1.linear", MODULATION),
    Row("temporal/qkv/linear", None, "attn.to_[qkv]", QKV),
    Row("temporal/qkv/q_norm", None, "attn.norm_q", RMS_NORM),
    Row("temporal/qkv/k_norm", None, "attn.norm_k", RMS_NORM),
    Row("temporal/out/linear", None, "attn.to_out.0", HEADS),
]
BLOCKS = {"dual": EVERY_BLOCK + DUAL_BLOCKS + ALL_BUT_THE_LAST, "plain": EVERY_BLOCK + ALL_BUT_THE_LAST, "last": EVERY_BLOCK + LAST_BLOCK}

PROMPT = [Row("frozen/text", None, "text", AS_IT_IS), Row("frozen/pooled", None, "pooled", AS_IT_IS)]
LINEAR_AUTOENCODER = [
    Row("frozen/autoencoder/mean", None, "mean", AS_IT_IS),
    Row("frozen/autoencoder/components", None, "components", AS_IT_IS),
]

RESIDUAL = [
    Row("norm_0", "norm1", "norm1", NORM),
    Row("conv_0", "conv1", "conv1", CONV),
    Row("norm_1", "norm2", "norm2", NORM),
    Row("conv_1", "conv2", "conv2", CONV),
]
SKIP = Row("skip", "nin_shortcut", "conv_shortcut", CONV)  # where a block changes the width
MIDDLE = [
    *(Row(f"block_0/{ours}", f"block_1.{original}", f"resnets.0.{diffusers}", form) for ours, original, diffusers, form in RESIDUAL),
    Row("norm", "attn_1.norm", "attentions.0.group_norm", NORM),
    Row("query", "attn_1.q", "attentions.0.to_q", POINTWISE),
    Row("key", "attn_1.k", "attentions.0.to_k", POINTWISE),
    Row("value", "attn_1.v", "attentions.0.to_v", POINTWISE),
    Row("out", "attn_1.proj_out", "attentions.0.to_out.0", POINTWISE),
    *(Row(f"block_1/{ours}", f"block_2.{original}", f"resnets.1.{diffusers}", form) for ours, original, diffusers, form in RESIDUAL),
]
ENDS = [
    Row("conv_in", "conv_in", "conv_in", CONV),
    *(Row(f"middle/{ours}", f"mid.{original}", f"mid_block.{diffusers}", form) for ours, original, diffusers, form in MIDDLE),
    Row("norm_out", "norm_out", "conv_norm_out", NORM),
    Row("conv_out", "conv_out", "conv_out", CONV),
]


def autoencoder_rows(channels: tuple[int, ...], blocks: int) -> Iterator[Row]:
    """Rows of SD3's autoencoder. Level 0 is full resolution with us and in the original; diffusers counts the decoder's from the lowest."""
    top = len(channels) - 1
    for side, per_level in ("encoder", blocks), ("decoder", blocks + 1):
        down = side == "encoder"
        for ours, original, diffusers, form in ENDS:
            yield Row(f"{side}/{ours}", f"{side}.{original}", f"{side}.{diffusers}", form)
        for level, width in enumerate(channels):
            theirs = f"encoder.down.{level}" if down else f"decoder.up.{level}"
            numbered = f"encoder.down_blocks.{level}" if down else f"decoder.up_blocks.{top - level}"
            before = channels[max(level - 1, 0)] if down else channels[min(level + 1, top)]
            for block in range(per_level):
                for ours, original, diffusers, form in [*RESIDUAL, SKIP] if block == 0 and before != width else RESIDUAL:
                    yield Row(f"{side}/level_{level}_block_{block}/{ours}", f"{theirs}.block.{block}.{original}", f"{numbered}.resnets.{block}.{diffusers}", form)
            if down and level < top:
                yield Row(f"encoder/level_{level}_down", f"{theirs}.downsample.conv", f"{numbered}.downsamplers.0.conv", CONV)
            if not down and level > 0:
                yield Row(f"decoder/level_{level}_up", f"{theirs}.upsample.conv", f"{numbered}.upsamplers.0.conv", CONV)


PREFIXES = {  # of the two components' tensors
    "original": ("model.diffusion_model.", "first_stage_model."),
    "diffusers": ("transformer.", "vae."),  # a folder's name, or the beginning of a name in a file of `convert_weights.export`
}
BLOCK_PREFIXES = {"original": "joint_blocks.{}.", "diffusers": "transformer_blocks.{}."}
TEMPORAL_PREFIX = "temporal_blocks.{}."
PROMPT_PREFIX = "prompt."
IGNORED = {  # tensors that may stand in a file and have no place in ours
    "text_encoders.": "some published files hold the text encoders, too; the one prompt is encoded from --text-encoders",
}

# ------------------------------------------------------------------------------------------------------------------ tables


class Slot(NamedTuple):
    """One array of ours, or one layer of a stacked one, and the tensors it is made of."""

    path: tuple[str, ...]  # in {"params": ..., "frozen": ...}
    layer: int | None  # along the leading axis of a scanned group; None: the whole array
    tensors: tuple[str, ...]  # names in the source, joined along their first axis
    pattern: str
    swapped: bool  # the source has the halves of the first axis the other way round
    flat: bool  # the source lacks the two last axes, which are 1
    new: bool  # absent from the pretrained model


def slots(config: Config, layout: Layout) -> list[Slot]:
    """Where every array of a checkpoint comes from. The new parts have names in the diffusers layout only."""
    trunk, vae = PREFIXES[layout]
    result: list[Slot] = []

    def add(rows: Iterable[Row], path: str, prefix: str, layer: int | None = None) -> None:
        for row in rows:
            if getattr(row, layout) is not None:
                result.extend(_slots_of(row, layout, path, prefix, layer))

    add(TRUNK, "", trunk)
    index = 0
    for kind, count in layer_groups(config.model):
        for layer in range(count):
            place = None if kind == "last" else layer
            add(BLOCKS[kind], f"params/{kind}/", trunk + BLOCK_PREFIXES[layout].format(index), place)
            add(TEMPORAL_BLOCKS, f"params/{kind}/", trunk + TEMPORAL_PREFIX.format(index), place)
            index += 1
    if config.autoencoder.kind == "kl":
        add(autoencoder_rows(config.autoencoder.channels, config.autoencoder.blocks), "frozen/autoencoder/", vae)
    else:
        add(LINEAR_AUTOENCODER, "", vae)
    add(PROMPT, "", PROMPT_PREFIX)
    return result


def name(ours: str, layout: Layout, tensor: str, *, block: int = 0) -> str:
    """The name in a source of one tensor of the trunk; `ours` as in the rows."""
    prefix = PREFIXES[layout][0]
    for rows, within in (TRUNK, ""), (EVERY_BLOCK + DUAL_BLOCKS, BLOCK_PREFIXES[layout].format(block)):
        for row in rows:
            if row.ours == ours:
                return ".".join(filter(None, (prefix + within + getattr(row, layout), tensor)))
    raise KeyError(ours)


def gaps(config: Config, layout: Layout, *, new: bool) -> list[str]:
    """Arrays that the rules fill not at all or more than once, and tensors they use twice. `new`: whether the source has the new parts."""
    wanted = {(path, layer) for path, leaf in target(config).items() if new or not _is_new(path) for layer in _layers(path, leaf)}
    filled = Counter((slot.path, slot.layer) for slot in slots(config, layout) if new or not slot.new)
    used = Counter(tensor for slot in slots(config, layout) for tensor in slot.tensors)
    wrong = [place for place in sorted(wanted | filled.keys(), key=str) if filled[place] != (place in wanted)]
    lines = [f"{'/'.join(path)}{'' if layer is None else f' of layer {layer}'} is filled {filled[path, layer]} times" for path, layer in wrong]
    return lines + [f"{tensor} is used {times} times" for tensor, times in used.items() if times > 1]


def _layers(path: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> Iterable[int | None]:
    return range(leaf.shape[0]) if path[:2] in (("params", "dual"), ("params", "plain")) else [None]


def _is_new(path: tuple[str, ...]) -> bool:
    return any(part in NEW_PARAMETERS for part in path) or path in (("frozen", "text"), ("frozen", "pooled"))


def _slots_of(row: Row, layout: Layout, path: str, prefix: str, layer: int | None) -> Iterator[Slot]:
    name, theirs = prefix + getattr(row, layout), layout == "diffusers"
    group = re.search(r"\[(\w+)\]", name)
    modules = [name.replace(group[0], letter) for letter in group[1]] if group else [name]
    for tensor, (ours, pattern) in row.form.tensors.items():
        yield Slot(
            path=tuple(filter(None, (*f"{path}{row.ours}".split("/"), ours))),
            layer=layer,
            tensors=tuple(".".join(filter(None, (module, tensor))) for module in modules),
            pattern=pattern,
            swapped=theirs and row.form.swapped,
            flat=theirs and row.form.flat and tensor == "weight",
            new=row.original is None,
        )


# ----------------------------------------------------------------------------------------------------------------- arrays


def from_source(config: Config, slot: Slot, tensors: list[np.ndarray]) -> np.ndarray:
    """The slot's array, of its tensors: a view of them where there is but one."""
    array = tensors[0] if len(tensors) == 1 else np.concatenate(tensors)
    if slot.swapped:
        array = np.concatenate(np.split(array, 2)[::-1])
    if slot.flat:
        array = array[:, :, None, None]
    return rearrange(array, slot.pattern, **_sizes(config, slot))


def to_source(config: Config, slot: Slot, array: np.ndarray) -> list[np.ndarray]:
    """The slot's tensors, of its array: `from_source` backwards."""
    ours, theirs = slot.pattern.split("->")[::-1]
    array = rearrange(array, f"{ours} -> {theirs}", **_sizes(config, slot))
    if slot.flat:
        array = array[:, :, 0, 0]
    if slot.swapped:
        array = np.concatenate(np.split(array, 2)[::-1])
    return np.split(array, len(slot.tensors))


def _sizes(config: Config, slot: Slot) -> dict[str, int]:
    """Sizes of the axes that a pattern joins or takes apart."""
    model = config.model
    known = {"qkv": 3, "n": model.heads, "h": model.head_size, "d": model.width, "p": model.patch, "q": model.patch, "c": model.latent_channels}
    known |= {"row": model.table_size, "column": model.table_size}
    joined = " ".join(re.findall(r"\(([^)]*)\)", slot.pattern)).split()
    return {axis: size for axis, size in known.items() if axis in joined}


@functools.cache
def target(config: Config) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Path -> shape of every array of a checkpoint, in {"params": ..., "frozen": ...}."""
    model, side = config.model, config.autoencoder.downsampling
    frame = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    autoencoder = jax.eval_shape(make_autoencoder(config.autoencoder).init, jax.random.key(0), frame)["params"]
    array = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)
    frozen = Frozen(autoencoder, array(model.table_size, model.table_size, model.width), array(model.text_tokens, model.text_width), array(model.pooled_width))
    return flatten_dict({"params": abstract_params(config), "frozen": nn.meta.unbox(frozen._asdict())})


def expected(config: Config, layout: Layout) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Name -> (shape, whether it is new) of every tensor that a source of this layout has."""
    shapes, tensors = target(config), {}
    for slot in slots(config, layout):
        shape = shapes[slot.path].shape[0 if slot.layer is None else 1 :]
        empty = np.broadcast_to(np.int8(0), shape)  # takes no memory
        for name, tensor in zip(slot.tensors, to_source(config, slot, empty), strict=True):
            tensors[name] = tensor.shape, slot.new
    return tensors
