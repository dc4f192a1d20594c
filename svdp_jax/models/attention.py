"""Scaled dot-product attention over groups: one function, a backend per device.

In:  q [B, G, Q, N, H], k and v [B, G, K, N, H] and, optionally, lengths [B]. Each of the G groups (frames in an
     image-text block, places in factorized attention, 1 in full-video attention) attends within itself.
Out: [B, G, Q, N, H], softmax(q k / sqrt(H)) v, with the softmax in float32 and the result in q's dtype.

Only the first lengths[b] keys of sample b take part, in all of its groups; what lies beyond has no influence and gets
a gradient of exactly zero. Everything is local and pure: callers that shard wrap it in `shard_map`.

    plain     all scores at once, in float32: the reference, and the fastest where scores are few
    chunked   XLA alone, any device and length; a few scores at a time, recomputed in the backward pass
    cudnn     NVIDIA GPUs, 16-bit: cuDNN's flash attention
    hopper    NVIDIA's H100 and H200, bfloat16, heads of 64: a kernel of our own (`svdp_jax.models.hopper`); where gradients are asked for, cuDNN's
    pallas    TPUs: the splash attention kernel that comes with JAX
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

ATTENTION = "attention"  # the name of what attention puts out and its backward pass looks at, for rematerialisation
OVERRIDE = "SVDP_KERNELS"  # an environment variable: "auto" is what suits this platform, whatever the device
PLATFORMS = "cpu", "gpu", "cuda", "hopper", "tpu"
Backend = Literal["auto", "plain", "chunked", "cudnn", "hopper", "pallas"]

# Scores (B G N Q K) up to which they stand in memory all at once. A CPU's cache holds 4 MB of float32, and a loop over
# chunks of that size is twice as fast as one large matrix; accelerators have room for 256 MB and pay for each step.
PLAIN_SCORES_CPU = 1 << 20
PLAIN_SCORES = 1 << 26
CHUNKS = 256  # "chunked" holds about one part in so many of the scores at a time, but no less than may stand in memory all at once
SHORT_KEYS = 128  # one tile of a flash kernel: below it, padding costs more than the kernel saves
TPU_BLOCK = 512
TPU_LANES = 128

_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def attention(
    q: Float[Array, "B G Q N H"],
    k: Float[Array, "B G K N H"],
    v: Float[Array, "B G K N H"],
    lengths: Int[Array, " B"] | None = None,
    *,
    bound: Float[Array, ""] | None = None,
    backend: Backend = "auto",
) -> Float[Array, "B G Q N H"]:
    """Attend within each group.

    Args:
        q: queries. Every row comes out finite, also those that the caller regards as dropped.
        k, v: keys and values; K may differ from Q.
        lengths: how many leading keys of each sample take part, each >= 1; None is all of them.
        bound: what no score q k / sqrt(H) exceeds in magnitude, if that is known: "hopper" is faster where it is small. It changes no result.
        backend: "auto" asks `choose_backend` for the device JAX runs on, or that of `compiling_for` or of `SVDP_KERNELS`.

    Raises:
        ValueError: shapes that do not fit together, a backend that does not exist or that cannot take these inputs.
    """
    if q.ndim != 5 or k.shape != v.shape or q.shape[:2] + q.shape[3:] != k.shape[:2] + k.shape[3:]:
        raise ValueError(f"attention wants q [B,G,Q,N,H] and k, v [B,G,K,N,H]; got q {q.shape}, k {k.shape}, v {v.shape}")
    if backend == "auto":
        backend = choose_backend(_current_platform(), q.shape, k.shape, q.dtype)
    if backend not in get_args(Backend):
        raise ValueError(f"unknown attention backend {backend!r}; choose one of {', '.join(get_args(Backend))}")
    if backend == "cudnn" and not _fits_cudnn(q.shape[-1], q.dtype):
        raise ValueError(f"cuDNN attention wants bfloat16 or float16 and a head size of 8, 16, .. 128; got {q.dtype} and {q.shape[-1]}")
    if backend == "hopper" and not _fits_hopper(q.shape[-1], q.dtype):
        raise ValueError(f"Hopper's attention wants bfloat16 and a head size of 64; got {q.dtype} and {q.shape[-1]}")

    if lengths is not None:
        # Weights of dropped keys are zero, but zero times whatever stands there need not be: select, so that it is.
        kept = _kept(k.shape[2], lengths)[:, None, :, None, None]
        k, v = jnp.where(kept, k, 0), jnp.where(kept, v, 0)
    if backend == "hopper":
        return _hopper(q, k, v, lengths, bound)
    attend = {"plain": _plain, "chunked": _chunked, "cudnn": _cudnn, "pallas": _pallas}[backend]
    return attend(q, k, v, lengths)


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Inside, "auto" is what suits this platform, which need not be there: "cpu", "cuda", "hopper", "tpu"."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def choose_backend(platform: str, q_shape: Sequence[int], k_shape: Sequence[int], dtype: DTypeLike) -> Backend:
    """The backend for q [B, G, Q, N, H] and k [B, G, K, N, H] on a platform: "cpu", "cuda" (NVIDIA's since Ampere), "hopper" (its H100 and H200), "tpu",
    or "gpu", one for which there is no kernel here."""
    batch, groups, queries, heads, head_size = q_shape
    keys = k_shape[2]
    if keys >= SHORT_KEYS:
        if platform == "hopper" and _fits_hopper(head_size, dtype):
            return "hopper"
        if platform in ("cuda", "hopper") and _fits_cudnn(head_size, dtype):
            return "cudnn"
        if platform == "tpu":
            return "pallas"
    return "plain" if batch * groups * heads * queries * keys <= _at_once(platform) else "chunked"


def _current_platform() -> str:
    """The platform of `compiling_for`, of the environment, or of the device JAX runs on."""
    if platform := _platform.get():
        return platform
    if platform := os.environ.get(OVERRIDE):
        if platform not in PLATFORMS:
            raise ValueError(f"{OVERRIDE}={platform}: choose one of {', '.join(PLATFORMS)}")
        return platform
    device = jax.devices()[0]
    capability = re.fullmatch(r"(\d+)\.\d+", getattr(device, "compute_capability", ""))  # of AMD's: gfx90a and the like
    if capability and int(capability[1]) >= 8:
        return "hopper" if int(capability[1]) == 9 else "cuda"
    return device.platform


def _at_once(platform: str) -> int:
    """Scores up to which they stand in memory all at once."""
    return PLAIN_SCORES_CPU if platform == "cpu" else PLAIN_SCORES


def _fits_cudnn(head_size: int, dtype: DTypeLike) -> bool:
    # Up to 256 on Hopper, but JAX looks for a GPU to know it and there is none when compiling without the device.
    return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and head_size <= 128 and head_size % 8 == 0


def _fits_hopper(head_size: int, dtype: DTypeLike) -> bool:
    return jnp.dtype(dtype) == jnp.bfloat16 and head_size == 64


def _kept(keys: int, lengths: Int[Array, " B"]) -> Bool[Array, "B K"]:
    return jnp.arange(keys) < lengths[:, None]


def _attend(q: Float[Array, "R Q H"], k: Float[Array, "R K H"], v: Float[Array, "R K H"], lengths: Int[Array, " R"] | None) -> Array:
    """Rows R are heads of groups. Products in the inputs' dtype add up in float32, and those of float32 are not rounded before; the result is float32."""
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision="highest" if q.dtype == jnp.float32 else None)
    scores = product("rqh,rkh->rqk", q, k) * q.shape[-1] ** -0.5
    if lengths is not None:
        scores = jnp.where(_kept(k.shape[1], lengths)[:, None], scores, -jnp.inf)
    return product("rqk,rkh->rqh", jax.nn.softmax(scores).astype(v.dtype), v)


def _heads_first(x: Float[Array, "B G S N H"]) -> Float[Array, "R S H"]:
    return jnp.swapaxes(x, 2, 3).reshape(-1, x.shape[2], x.shape[4])


def _heads_last(out: Float[Array, "*R_S H"], q: Float[Array, "B G Q N H"]) -> Float[Array, "B G S N H"]:
    return jnp.swapaxes(out.reshape(*q.shape[:2], q.shape[3], -1, q.shape[4]), 2, 3)


def _per_head(q: Float[Array, "B G Q N H"], lengths: Int[Array, " B"] | None) -> Int[Array, " R"] | None:
    return None if lengths is None else jnp.repeat(lengths, q.shape[1] * q.shape[3])


def _plain(q: Array, k: Array, v: Array, lengths: Array | None) -> Array:
    out = _attend(*(_heads_first(x.astype(jnp.float32)) for x in (q, k, v)), _per_head(q, lengths))
    return _heads_last(out, q).astype(q.dtype)


def _chunked(q: Array, k: Array, v: Array, lengths: Array | None) -> Array:
    """A few heads at a time and, where one head alone has too many scores, a few of its queries at a time.

    Only one step's scores ever exist; `jax.checkpoint` makes the backward pass compute them again. A head's keys and
    values enter the loop over its queries in float32, so that their gradients add up in float32.
    """
    batch, groups, queries, heads, head_size = q.shape
    keys, rows = k.shape[2], batch * groups * heads
    budget = max(_at_once(_current_platform()), rows * queries * keys // CHUNKS)
    together = max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * queries * keys <= budget))
    parts = math.ceil(queries / max(1, budget // (together * keys)))
    chunk = math.ceil(queries / parts)

    def some_heads(step: tuple[Array, Array, Array, Array | None]) -> Array:
        q, k, v, lengths = step
        k32, v32 = k.astype(jnp.float32), v.astype(jnp.float32)

        def some_queries(q: Array) -> Array:
            return _attend(q, k32.astype(q.dtype), v32.astype(q.dtype), lengths).astype(q.dtype)

        q = jnp.swapaxes(q.reshape(together, parts, chunk, head_size), 0, 1)
        out = jax.lax.map(jax.checkpoint(some_queries), q)
        return jnp.swapaxes(out, 0, 1).reshape(together, parts * chunk, head_size)

    steps = (_heads_first(_pad_sequence(q, parts * chunk)), _heads_first(k), _heads_first(v), _per_head(q, lengths))
    steps = jax.tree.map(lambda x: x.reshape(rows // together, together, *x.shape[1:]), steps)
    return _heads_last(jax.lax.map(some_heads, steps), q)[:, :, :queries]


def _cudnn(q: Array, k: Array, v: Array, lengths: Array | None) -> Array:
    """Groups become batch. cuDNN's backward pass wants even sequences: odd ones get one row more, which is masked."""
    batch, groups, queries, _, _ = q.shape
    keys = k.shape[2]
    if lengths is None and keys % 2:
        lengths = jnp.full((batch,), keys)
    q, k, v = (_pad_sequence(x, x.shape[2] + x.shape[2] % 2) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        *(x.reshape(batch * groups, *x.shape[2:]) for x in (q, k, v)),
        key_value_seq_lengths=None if lengths is None else jnp.repeat(lengths.astype(jnp.int32), groups),
        implementation="cudnn",
    )
    return out.reshape(q.shape)[:, :, :queries]


@jax.custom_vjp
def _hopper(q: Array, k: Array, v: Array, lengths: Array | None, bound: Array | None) -> Array:
    """Groups become batch. The kernel would wait for ever for the keys of a sample without any."""
    from svdp_jax.models import hopper  # imports fail where Pallas has no GPU support

    batch, groups = q.shape[:2]
    lengths = None if lengths is None else jnp.repeat(jnp.clip(lengths.astype(jnp.int32), 1, k.shape[2]), groups)
    return hopper.attention(*(x.reshape(batch * groups, *x.shape[2:]) for x in (q, k, v)), lengths, bound).reshape(q.shape)


def _hopper_forward(q: Array, k: Array, v: Array, lengths: Array | None, bound: Array | None):
    return jax.vjp(lambda q, k, v: _cudnn(q, k, v, lengths), q, k, v)


def _hopper_backward(pull, cotangent: Array):
    return *pull(cotangent), None, None


_hopper.defvjp(_hopper_forward, _hopper_backward)


def _pallas(q: Array, k: Array, v: Array, lengths: Array | None) -> Array:
    """Splash attention. Sequences are padded to whole blocks; keys beyond the length go to a segment nobody asks for."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # imports fail where Pallas has no TPU support

    batch, _, queries, heads, head_size = q.shape
    keys = k.shape[2]
    block_q, block_k = (min(TPU_BLOCK, _round_up(length, TPU_LANES)) for length in (queries, keys))
    q = (q.astype(jnp.float32) * head_size**-0.5).astype(q.dtype)  # the kernel does not scale
    q, k, v = (_pad_sequence(x, _round_up(x.shape[2], block)) for x, block in ((q, block_q), (k, block_k), (v, block_k)))
    kept = _kept(k.shape[2], jnp.full((batch,), keys) if lengths is None else lengths)
    segments = splash.SegmentIds(q=jnp.zeros((batch, q.shape[2]), jnp.int32), kv=1 - kept.astype(jnp.int32))
    kernel = splash.make_splash_mha(
        mask=splash.MultiHeadMask([splash.FullMask((q.shape[2], k.shape[2]))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_k,
            block_q_dkv=block_q,
            block_kv_dkv=block_k,
            block_q_dq=block_q,
            block_kv_dq=block_k,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENTION,
    )
    by_group = jax.vmap(kernel, in_axes=(0, 0, 0, None))  # the groups of a sample share its segments
    out = jax.vmap(by_group)(*(jnp.swapaxes(x, 2, 3) for x in (q, k, v)), segments)  # [B, G, N, S, H]
    return jnp.swapaxes(out, 2, 3)[:, :, :queries]


def _round_up(length: int, multiple: int) -> int:
    return math.ceil(length / multiple) * multiple


def _pad_sequence(x: Float[Array, "B G S N H"], length: int) -> Float[Array, "B G length N H"]:
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0), (0, 0)))
