"""Frames to latents and back: frames [*lead, H, W, 3] in [-1, 1] <-> latents [*lead, h, w, C].

Two autoencoders behind one interface. `KLAutoencoder` is Stable Diffusion 3's; `LinearAutoencoder` is a PCA of square
patches, fitted in seconds, for small models trained from scratch. Both take any number of leading axes and any size that is
a multiple of `AutoencoderConfig.downsampling`, and put out float32; latents are (z - shift) * scale of the raw code z.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from svdp_jax.config import AutoencoderConfig, ConfigError
from svdp_jax.models.attention import attention

EPSILON = 1e-6


def make_autoencoder(config: AutoencoderConfig, *, dtype: DTypeLike = jnp.float32) -> nn.Module:
    """The autoencoder of `config.kind`; `dtype` is that of KL's convolutions (its norms and all of the linear one are float32).

    params = make_autoencoder(config).init(key, frames)["params"]
    latents = model.apply({"params": params}, frames, noise, method="encode")
    frames = model.apply({"params": params}, latents, method="decode")
    """
    return LinearAutoencoder(config) if config.kind == "linear" else KLAutoencoder(config, dtype)


def to_unit(frames: UInt8[Array | np.ndarray, "*lead H W 3"]) -> Float[Array, "*lead H W 3"]:
    """Bytes to float32 in [-1, 1]."""
    return jnp.asarray(frames, jnp.float32) / 127.5 - 1


def to_bytes(frames: Float[Array | np.ndarray, "*lead H W 3"]) -> UInt8[Array, "*lead H W 3"]:
    """[-1, 1] to bytes, rounded; what lies outside is clipped."""
    return jnp.clip(jnp.round((jnp.asarray(frames, jnp.float32) + 1) * 127.5), 0, 255).astype(jnp.uint8)


def by_parts(function: Callable[..., Array], *arrays: Array, at_once: int) -> Array:
    """`function` of arrays whose first axis is frames, at most `at_once` frames at a time: a loop, which holds the activations of one part, and
    whose body is compiled once. The parts are equal; behind the last frame they are filled up with zeros, which nobody sees."""
    count = len(arrays[0])
    parts = -(-count // at_once)
    if parts == 1:
        return function(*arrays)
    size = -(-count // parts)
    filled = [jnp.pad(x, ((0, parts * size - count), *[(0, 0)] * (x.ndim - 1))) for x in arrays]
    done = jax.lax.map(lambda part: function(*part), tuple(x.reshape(parts, size, *x.shape[1:]) for x in filled))
    return done.reshape(parts * size, *done.shape[2:])[:count]


class KLAutoencoder(nn.Module):
    """Stable Diffusion 3's autoencoder: a code with mean and variance, 8x smaller at the default widths."""

    config: AutoencoderConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)

    def __call__(self, frames: Float[Array, "*lead H W 3"]) -> Float[Array, "*lead H W 3"]:
        return self.decode(self.encode(frames))

    def encode(self, frames: Float[Array, "*lead H W 3"], noise: Float[Array, "*lead h w C"] | None = None) -> Float[Array, "*lead h w C"]:
        """Latents of frames: the mode of their distribution, or, with standard normal `noise`, a sample of it."""
        _check_size(self.config, frames.shape)
        moments = self.encoder(frames.reshape(-1, *frames.shape[-3:]).astype(self.dtype)).astype(jnp.float32)
        mean, log_variance = jnp.split(moments.reshape(*frames.shape[:-3], *moments.shape[1:]), 2, axis=-1)
        z = mean if noise is None else sample(mean, log_variance, noise)
        return (z - self.config.shift) * self.config.scale

    def decode(self, latents: Float[Array, "*lead h w C"]) -> Float[Array, "*lead H W 3"]:
        """Frames of latents, not clipped. All frames at once: a caller with many decodes them in chunks."""
        z = latents.astype(jnp.float32) / self.config.scale + self.config.shift
        frames = self.decoder(z.reshape(-1, *z.shape[-3:]).astype(self.dtype)).astype(jnp.float32)
        return frames.reshape(*latents.shape[:-3], *frames.shape[1:])


def sample(
    mean: Float[Array, "*lead h w C"], log_variance: Float[Array, "*lead h w C"], noise: Float[Array, "*lead h w C"]
) -> Float[Array, "*lead h w C"]:
    """mean + std * noise, with the log-variance clipped as in training of the released weights."""
    return mean + jnp.exp(0.5 * jnp.clip(log_variance, -30, 20)) * noise


class Encoder(nn.Module):
    """Frames [N, H, W, 3] to moments [N, h, w, 2C], mean then log-variance. Level 0 is full resolution."""

    config: AutoencoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "N H W 3"]) -> Float[Array, "N h w two_C"]:
        config = self.config
        x = conv(config.channels[0], dtype=self.dtype, name="conv_in")(x)
        for level, channels in enumerate(config.channels):
            for block in range(config.blocks):
                x = ResidualBlock(channels, config.groups, self.dtype, name=f"level_{level}_block_{block}")(x)
            if level < len(config.channels) - 1:
                x = conv(channels, stride=2, dtype=self.dtype, name=f"level_{level}_down")(x)
        x = Middle(config.groups, self.dtype, name="middle")(x)
        x = nn.silu(norm(x, config.groups, self.dtype, name="norm_out"))
        return conv(2 * config.latent_channels, dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Codes [N, h, w, C] to frames [N, H, W, 3]. Levels are numbered by resolution, as in the encoder."""

    config: AutoencoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, z: Float[Array, "N h w C"]) -> Float[Array, "N H W 3"]:
        config = self.config
        x = conv(config.channels[-1], dtype=self.dtype, name="conv_in")(z)
        x = Middle(config.groups, self.dtype, name="middle")(x)
        for level, channels in reversed(list(enumerate(config.channels))):
            for block in range(config.blocks + 1):  # one more than the encoder has
                x = ResidualBlock(channels, config.groups, self.dtype, name=f"level_{level}_block_{block}")(x)
            if level > 0:
                x = repeat(x, "n h w c -> n (h 2) (w 2) c")
                x = conv(channels, dtype=self.dtype, name=f"level_{level}_up")(x)
        x = nn.silu(norm(x, config.groups, self.dtype, name="norm_out"))
        return conv(3, dtype=self.dtype, name="conv_out")(x)


class ResidualBlock(nn.Module):
    """Twice norm, SiLU, convolution, around them a skip: 1x1 where the width changes."""

    channels: int
    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "N h w D"]) -> Float[Array, "N h w E"]:
        y = nn.silu(norm(x, self.groups, self.dtype, name="norm_0"))
        y = conv(self.channels, dtype=self.dtype, name="conv_0")(y)
        y = nn.silu(norm(y, self.groups, self.dtype, name="norm_1"))
        y = conv(self.channels, dtype=self.dtype, name="conv_1")(y)
        skip = x if x.shape[-1] == self.channels else conv(self.channels, size=1, dtype=self.dtype, name="skip")(x)
        return skip + y


class Middle(nn.Module):
    """The lowest resolution: residual block, attention of every place to every other (one head), residual block."""

    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "N h w D"]) -> Float[Array, "N h w D"]:
        height, width, channels = x.shape[1:]
        x = ResidualBlock(channels, self.groups, self.dtype, name="block_0")(x)
        y = norm(x, self.groups, self.dtype, name="norm")
        q, k, v = (conv(channels, size=1, dtype=self.dtype, name=name)(y) for name in ("query", "key", "value"))
        q, k, v = (rearrange(y, "n h w d -> n 1 (h w) 1 d") for y in (q, k, v))
        y = rearrange(attention(q, k, v), "n 1 (h w) 1 d -> n h w d", h=height, w=width)
        x = x + conv(channels, size=1, dtype=self.dtype, name="out")(y)
        return ResidualBlock(channels, self.groups, self.dtype, name="block_1")(x)


def conv(channels: int, *, size: int = 3, stride: int = 1, dtype: DTypeLike, name: str) -> nn.Conv:
    """A convolution that keeps the resolution, or halves it; halving pads only on the right and at the bottom."""
    padding = (size // 2, size // 2) if stride == 1 else (0, 1)
    names = ("conv_height", "conv_width", "conv_in", "conv_out")
    return nn.Conv(
        channels,
        (size, size),
        strides=stride,
        padding=(padding, padding),
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), names),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("conv_out",)),
        name=name,
    )


def norm(x: Float[Array, "N h w D"], groups: int, dtype: DTypeLike, *, name: str) -> Float[Array, "N h w D"]:
    """Group norm in float32, called within a module; the result has type `dtype`."""
    layer = nn.GroupNorm(
        groups,
        epsilon=EPSILON,
        dtype=jnp.float32,
        use_fast_variance=False,  # E[x^2] - E[x]^2 loses the digits that parity needs
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("channels",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("channels",)),
        name=name,
    )
    return layer(x).astype(dtype)


class LinearAutoencoder(nn.Module):
    """Orthonormal projection of patches: z = (patch - mean) @ components. Always in float32: it costs next to nothing."""

    config: AutoencoderConfig

    def setup(self):
        pixels = self.config.patch**2 * 3
        self.mean = self.param("mean", nn.with_logical_partitioning(nn.initializers.zeros_init(), ("conv_in",)), (pixels,))
        orthogonal = nn.with_logical_partitioning(nn.initializers.orthogonal(), ("conv_in", "conv_out"))
        self.components = self.param("components", orthogonal, (pixels, self.config.latent_channels))

    def __call__(self, frames: Float[Array, "*lead H W 3"]) -> Float[Array, "*lead H W 3"]:
        return self.decode(self.encode(frames))

    def encode(self, frames: Float[Array, "*lead H W 3"], noise: Float[Array, "*lead h w C"] | None = None) -> Float[Array, "*lead h w C"]:
        """Latents of frames. `noise` is there for the interface: this code has no variance, so a sample is the mode."""
        del noise
        _check_size(self.config, frames.shape)
        z = jnp.matmul(patches(frames.astype(jnp.float32), self.config.patch) - self.mean, self.components, precision="highest")
        return (z - self.config.shift) * self.config.scale

    def decode(self, latents: Float[Array, "*lead h w C"]) -> Float[Array, "*lead H W 3"]:
        """Frames of latents, not clipped."""
        z = latents.astype(jnp.float32) / self.config.scale + self.config.shift
        p = self.config.patch
        pixels = jnp.matmul(z, self.components.T, precision="highest") + self.mean
        return rearrange(pixels, "... h w (p q c) -> ... (h p) (w q) c", p=p, q=p)


def fit_linear(config: AutoencoderConfig, frames: UInt8[np.ndarray, "N H W 3"]) -> dict[str, Any]:
    """Parameters of `LinearAutoencoder`: the `latent_channels` directions in which the patches of `frames` vary most.

    Deterministic, seconds for a few hundred frames. Raises ConfigError if a patch has fewer numbers than a latent.
    """
    _check_size(config, frames.shape)
    pixels = config.patch**2 * 3
    if config.latent_channels > pixels:
        problem = f"must be at most {pixels}, the numbers in a patch of autoencoder.patch={config.patch}"
        raise ConfigError(f"autoencoder.latent_channels={config.latent_channels} {problem}")
    count, total, moment = 0, np.zeros(pixels), np.zeros((pixels, pixels))
    for start in range(0, len(frames), 32):  # in float64, a few frames at a time, so that a whole dataset fits in memory
        x = patches(frames[start : start + 32] / 127.5 - 1, config.patch).reshape(-1, pixels)
        count, total, moment = count + len(x), total + x.sum(0), moment + x.T @ x
    mean = total / count
    components = np.linalg.eigh(moment / count - np.outer(mean, mean)).eigenvectors[:, ::-1][:, : config.latent_channels]
    # An eigenvector's sign is arbitrary; fix it, so that every machine fits the same parameters.
    components = components * np.sign(components[np.abs(components).argmax(0), np.arange(config.latent_channels)])
    return {"mean": jnp.asarray(mean, jnp.float32), "components": jnp.asarray(components, jnp.float32)}


def patches(frames: Float[Array | np.ndarray, "*lead H W 3"], size: int) -> Float[Array | np.ndarray, "*lead h w {size*size*3}"]:
    """Square patches, each flattened: rows, then columns, then colours."""
    return rearrange(frames, "... (h p) (w q) c -> ... h w (p q c)", p=size, q=size)


def _check_size(config: AutoencoderConfig, shape: tuple[int, ...]) -> None:
    unit = config.downsampling
    if len(shape) < 3 or shape[-1] != 3 or shape[-3] % unit or shape[-2] % unit:
        raise ConfigError(f"frames of shape {shape} must be [..., H, W, 3] with H and W multiples of {unit} (autoencoder.downsampling)")
