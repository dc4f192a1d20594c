"""What every block is made of: formulas as plain functions, and modules that only own their parameters.

Every parameter carries the names of its axes; `svdp_jax.sharding` maps the names to a mesh. Matrix products run in
`config.dtype`, norms in float32.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from svdp_jax.config import ModelConfig
from svdp_jax.sharding import Layout

EPSILON = 1e-6

# Programs of the network are compiled with this. On GPUs, products by cuBLAS, which adds the bias and takes the GELU in passing; behind XLA's own
# products a kernel of its own does that, and reads and writes the MLPs' widest arrays once more.
COMPILER = {"xla_gpu_enable_triton_gemm": False}

# A training step on TPUs, besides: gradients are reduced behind their products. XLA would cut the products of z into small ones with a transfer behind each, and
# reduce those of history apart: 11.4 GB of transfers beside 1.3 GB reduced (`fsdp`, eight v5p, full size), where 3.4 GB are reduced.
COMPILER_TPU = {"xla_tpu_enable_windowed_einsum_for_reduce_scatter": False}


def layer_norm(x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
    """Layer norm without affine parameters, in float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + EPSILON)


def rms_norm(x: Float[Array, "*lead H"], scale: Float[Array, "H"]) -> Float[Array, "*lead H"]:
    """Root-mean-square norm in float32; the result has the type of `x`."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + EPSILON) * scale).astype(x.dtype)


def modulate(x: Float[Array, "B F S D"], shift: Float[Array, "B 1 1 D"], scale: Float[Array, "B 1 1 D"]) -> Float[Array, "B F S D"]:
    """The adaLN formula, in the type of `x`."""
    return x * (1 + scale.astype(x.dtype)) + shift


def sinusoid(numbers: Num[Array, "*lead"], frequencies: int) -> Float[Array, "*lead E"]:
    """[cosine | sine] of numbers at `frequencies` rates from 1 down to 1e-4 (E = 2 frequencies), in float32."""
    rate = jnp.exp(-jnp.log(1e4) * jnp.arange(frequencies, dtype=jnp.float32) / frequencies)
    angle = jnp.asarray(numbers, jnp.float32)[..., None] * rate
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def dense(features: int | tuple[int, ...], names: tuple[str, ...], *, dtype: str, name: str, contract: int = 1, zero: bool = False, bias=nn.initializers.zeros):
    """A linear map of the last `contract` axes to `features`; `names` are its kernel's axes, `zero` starts the kernel at 0."""
    start = nn.initializers.zeros if zero else nn.initializers.xavier_uniform()
    return nn.DenseGeneral(
        features,
        axis=tuple(range(-contract, 0)),
        dtype=dtype,
        precision="highest" if dtype == "float32" else None,  # which accelerators would else round to bfloat16 or TF32
        kernel_init=nn.with_logical_partitioning(start, names),
        bias_init=nn.with_logical_partitioning(bias, names[contract:]),
        name=name,
    )


class QKV(nn.Module):
    """Queries, keys and values of all heads; queries and keys RMS-normed."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B F S D"]) -> tuple[Float[Array, "B F S N H"], ...]:
        config = self.config
        features = (3, config.heads, config.head_size)
        q, k, v = jnp.moveaxis(dense(features, ("embed", "qkv", "heads", "head_size"), dtype=config.dtype, name="linear")(x), -3, 0)
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("head_size",))
        return (
            rms_norm(q, self.param("q_norm", ones, (config.head_size,))),
            rms_norm(k, self.param("k_norm", ones, (config.head_size,))),
            v,
        )

    def scales(self) -> tuple[Float[Array, "H"], Float[Array, "H"]]:
        """Of the norms of queries and keys; once there are parameters."""
        return tuple(nn.meta.unbox(self.get_variable("params", name)) for name in ("q_norm", "k_norm"))


def score_bound(*together: QKV) -> Float[Array, ""]:
    """What no score q k / sqrt(H) exceeds in magnitude, where queries and keys of all these attend to each other: normed, both are sqrt(H) long at most."""
    of_queries, of_keys = (jnp.stack(scales).astype(jnp.float32) for scales in zip(*(qkv.scales() for qkv in together), strict=True))
    return jnp.abs(of_queries[:, None] * of_keys).max() * together[0].config.head_size ** 0.5


class Output(nn.Module):
    """Heads back to the width."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B F S N H"]) -> Float[Array, "B F S D"]:
        return dense(self.config.width, ("heads", "head_size", "embed"), dtype=self.config.dtype, contract=2, name="linear")(x)


class MLP(nn.Module):
    """Two linear maps with a GELU (tanh) between."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B F S D"]) -> Float[Array, "B F S D"]:
        config = self.config
        x = dense(config.mlp_ratio * config.width, ("embed", "mlp"), dtype=config.dtype, name="wide")(x)
        return dense(config.width, ("mlp", "embed"), dtype=config.dtype, name="narrow")(nn.gelu(x, approximate=True))


class Modulation(nn.Module):
    """`chunks` modulations of the width from the conditioning vector, each [B, 1, 1, D], zero at the start.

    `gate` is the starting value of the chunk of that index, as (index, value).
    """

    config: ModelConfig
    chunks: int
    gate: tuple[int, float] | None = None
    layout: Layout | None = None

    @nn.compact
    def __call__(self, c: Float[Array, "B D"]) -> tuple[Float[Array, "B 1 1 D"], ...]:
        def bias(key, shape, dtype=jnp.float32):
            value = jnp.zeros(shape, dtype)
            return value if self.gate is None else value.reshape(self.chunks, -1).at[self.gate[0]].set(self.gate[1]).reshape(shape)

        names = ("embed", "chunks", "modulation")
        layer = dense((self.chunks, self.config.width), names, dtype=self.config.dtype, zero=True, bias=bias, name="linear")
        chunks = layer(nn.silu(c))  # [B, chunks, D]
        if self.layout:  # where devices have columns of the matrix, they have these here, and the whole from here on: it meets tokens of the whole width
            chunks = self.layout.constrain(chunks, "batch", "chunks", "modulation")
            chunks = self.layout.constrain(chunks, "batch", "chunks", "width")
        return tuple(chunks[:, i, None, None] for i in range(self.chunks))
