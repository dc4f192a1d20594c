"""Floating-point operations of the network, counted by hand: two for a multiplication with its addition, matrix products only.

    ModelConfig + shapes       ->  Flops of one forward pass of one sample; a training step does three times as many
    AutoencoderConfig + size   ->  Flops of encoding one frame, which MFU leaves out

Norms, softmax, activations and what rematerialisation does again are not in it: this is the work that the model asks for, as in MFU.
"""

from __future__ import annotations

from typing import NamedTuple

from svdp_jax.config import AutoencoderConfig, Config, ModelConfig
from svdp_jax.models.tokens import DRIVING, HISTORY, NOTHING, SOURCE
from svdp_jax.models.transformer import TIME_FREQUENCIES, layer_groups


class Flops(NamedTuple):
    """Operations of the products with parameters, and of those of attention."""

    matmul: float = 0
    attention: float = 0

    @property
    def total(self) -> float:
        return self.matmul + self.attention

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.matmul + other.matmul, self.attention + other.attention)

    def __mul__(self, times: float) -> Flops:
        return Flops(self.matmul * times, self.attention * times)


def train_step(config: Config, *, with_history: bool) -> Flops:
    """A step of the whole batch: forward and backward. Dropped signals are masked, not left out, so that they cost as the others do."""
    level = HISTORY if with_history else DRIVING
    return forward(config.model, frames=config.data.frames, history=config.data.history, tokens=config.grid**2, level=level) * (3 * config.train.batch)


def forward(model: ModelConfig, *, frames: int, history: int, tokens: int, level: int, remembered: bool = False) -> Flops:
    """One sample at a level of conditioning (`models.tokens`): `frames` and `history` frames of `tokens` each. `remembered`: with the keys and
    values of history at hand, as in the steps of a window where `ModelConfig.history` is "cached"."""
    if model.dropped == "zero":
        level = HISTORY
    past = history if level == HISTORY else 0
    image = tokens * {NOTHING: 1, SOURCE: 2}.get(level, 3)
    done = 0 if remembered else past  # frames of history that are worked on
    total = _ends(model, frames=frames, past=done, tokens=tokens, level=level)
    for kind, layers in layer_groups(model):
        asking = frames + done * (kind != "last" and model.history == "joint")
        layer = _temporal(model, asking=asking, made=frames + done, seen=frames + past, tokens=tokens)
        layer += _joint(model, kind, image) * frames
        if kind != "last":
            layer += _joint(model, kind, tokens) * done
        total += (layer + _modulations(model, kind, done)) * layers
    return total


def encode(autoencoder: AutoencoderConfig, size: int) -> Flops:
    """One frame of size x size pixels to latents. Products with padding are none."""
    latents = autoencoder.latent_channels
    if autoencoder.kind == "linear":
        return Flops(2 * (size // autoencoder.patch) ** 2 * 3 * autoencoder.patch**2 * latents)
    total, inputs, side = _convolution(3, autoencoder.channels[0], size), autoencoder.channels[0], size
    for level, channels in enumerate(autoencoder.channels):
        for _ in range(autoencoder.blocks):
            total, inputs = total + _residual(inputs, channels, side), channels
        if level < len(autoencoder.channels) - 1:
            total += 2 * (3 * side // 2 - 1) ** 2 * channels**2  # every other place, padded at one end
            side //= 2
    total += 2 * _residual(inputs, inputs, side) + 4 * 2 * side**2 * inputs**2 + _convolution(inputs, 2 * latents, side)
    return Flops(total, 4 * side**4 * inputs)


def _residual(inputs: int, channels: int, side: int) -> float:
    skip = 0 if inputs == channels else 2 * side**2 * inputs * channels
    return _convolution(inputs, channels, side) + _convolution(channels, channels, side) + skip


def _convolution(inputs: int, channels: int, side: int) -> float:
    """3x3, of which the outermost places have neighbours on one side only."""
    return 2 * (3 * side - 2) ** 2 * inputs * channels


def _temporal(model: ModelConfig, *, asking: int, made: int, seen: int, tokens: int) -> Flops:
    """Frames that ask, whose keys and values are made here, and that are seen."""
    keys = seen if model.temporal == "factorized" else seen * tokens
    matmul = 4 * made * tokens * model.width**2 + 4 * asking * tokens * model.width**2  # keys and values; queries and output
    return Flops(matmul, 4 * asking * tokens * keys * model.width)


def _joint(model: ModelConfig, kind: str, image: int) -> Flops:
    """One frame of so many image tokens."""
    text, square = model.text_tokens, model.width**2
    per_token = (8 + 4 * model.mlp_ratio) * square  # queries, keys, values, output; both matrices of the MLP
    matmul = image * per_token + text * (4 * square if kind == "last" else per_token)
    asking = image + text * (kind != "last")
    attention = 4 * asking * (image + text) * model.width
    if kind == "dual":
        matmul += 8 * image * square
        attention += 4 * image**2 * model.width
    return Flops(matmul, attention)


def _modulations(model: ModelConfig, kind: str, past: int) -> Flops:
    chunks = 3 + (9 if kind == "dual" else 6) + (2 if kind == "last" else 6)
    return Flops(2 * chunks * model.width**2 * (2 if past else 1))


def _ends(model: ModelConfig, *, frames: int, past: int, tokens: int, level: int) -> Flops:
    """What stands before and behind the layers."""
    width, latents = model.width, model.patch**2 * model.latent_channels
    embedded = frames * tokens * (2 if level >= DRIVING else 1) + tokens * (level >= SOURCE) + past * tokens
    patches = 2 * (embedded + frames * tokens) * latents * width
    embedding = lambda inputs: 2 * (inputs + width) * width
    clocks = (2 if past else 1) * embedding(2 * TIME_FREQUENCIES) + embedding(model.pooled_width) + (frames + past) * embedding(2 * model.frame_frequencies)
    return Flops(patches + 2 * model.text_tokens * model.text_width * width + clocks + 4 * width**2)
