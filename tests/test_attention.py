"""Attention: every backend that runs here equals softmax attention written out in numpy, forward and backward."""

from __future__ import annotations

import inspect
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention

from svdp_jax.models import attention as module
from svdp_jax.models.attention import attention, choose_backend

BACKENDS = ["plain", "chunked", "pallas"]
needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs an NVIDIA GPU")
on_gpu = [pytest.param("cudnn", lengths, marks=needs_gpu) for lengths in (None, (1, 20))]
needs_hopper = pytest.mark.skipif(getattr(jax.devices()[0], "compute_capability", "") != "9.0", reason="needs an H100 or H200")


@pytest.fixture(autouse=True)
def small_chunks_and_interpreted_kernels(monkeypatch):
    """Makes small shapes take many chunks of heads, of queries and of blocks, and runs the TPU kernel on other devices."""
    monkeypatch.setattr(module, "PLAIN_SCORES_CPU", 200)
    monkeypatch.setattr(module, "CHUNKS", 1000)
    monkeypatch.setattr(module, "TPU_BLOCK", 128)
    if jax.default_backend() != "tpu":
        monkeypatch.setattr(splash_attention, "make_splash_mha", partial(splash_attention.make_splash_mha, interpret=True))


def inputs(*, queries=17, keys=23, batch=2, groups=2, heads=3, head_size=8, dtype=jnp.float32):
    """q, k, v and a cotangent of the output."""
    shapes = [(batch, groups, length, heads, head_size) for length in (queries, keys, keys, queries)]
    return tuple(jnp.asarray(np.random.default_rng(i).normal(size=shape), dtype) for i, shape in enumerate(shapes))


@partial(jax.jit, static_argnames="backend")
def run(q, k, v, cotangent, lengths=None, *, backend):
    """The output and the gradients of q, k and v."""
    with jax.default_matmul_precision("highest"):
        out, backward = jax.vjp(lambda *qkv: attention(*qkv, lengths, backend=backend), q, k, v)
        return out, *backward(cotangent)


def expected(q, k, v, cotangent, lengths=None):
    """The same in float64, head by head on the keys that are kept, with the derivatives written out."""
    q, k, v, cotangent = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    for b, g, n in np.ndindex(q.shape[0], q.shape[1], q.shape[3]):
        at, kept = (b, g, slice(None), n), (b, g, slice(None if lengths is None else int(lengths[b])), n)
        scores = q[at] @ k[kept].T / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[at], dv[kept] = weights @ v[kept], weights.T @ cotangent[at]
        dweights = cotangent[at] @ v[kept].T
        dscores = weights * (dweights - (weights * dweights).sum(axis=-1, keepdims=True)) / np.sqrt(q.shape[-1])
        dq[at], dk[kept] = dscores @ k[kept], dscores.T @ q[at]
    return out, dq, dk, dv


@pytest.mark.parametrize(
    "backend, queries, keys, lengths",
    [
        (backend, *shape, lengths)
        for backend in ("plain", "chunked")
        for shape in [(17, 23), (40, 23), (1, 24)]
        for lengths in [None, (1, 20)]
    ]
    + [("pallas", 140, 130, (1, 130))],  # padded to two blocks each
)
def test_output_and_gradients_are_those_of_softmax_attention(backend, queries, keys, lengths):
    arrays = inputs(queries=queries, keys=keys)
    lengths = None if lengths is None else jnp.array(lengths)
    for got, want in zip(run(*arrays, lengths, backend=backend), expected(*arrays, lengths), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_beyond_the_length_change_no_bit_and_get_no_gradient(backend):
    q, k, v, cotangent = inputs()
    lengths = jnp.array([1, 20])
    clean = run(q, k, v, cotangent, lengths, backend=backend)
    beyond = (jnp.arange(23) >= lengths[:, None])[:, None, :, None, None]
    for garbage in (1e4, 3e38, np.nan):
        dirty = run(q, jnp.where(beyond, garbage, k), jnp.where(beyond, -garbage, v), cotangent, lengths, backend=backend)
        for got, want in zip(dirty, clean, strict=True):
            np.testing.assert_array_equal(got, want)
    for gradient in clean[2:]:
        assert not np.any(np.where(beyond, gradient, 0)) and np.any(gradient[:, :, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_do_not_see_each_other(backend):
    arrays = inputs()
    moved = [x.at[:, 1].add(1.0).at[:, 1, 0].mul(3.0) for x in arrays]
    lengths = jnp.array([1, 20])
    for before, after in zip(run(*arrays, lengths, backend=backend), run(*moved, lengths, backend=backend), strict=True):
        np.testing.assert_array_equal(before[:, 0], after[:, 0])
        assert not np.allclose(before[:, 1], after[:, 1])


@pytest.mark.parametrize("backend, lengths", [("plain", None), ("chunked", (1, 20)), ("pallas", None), *on_gpu])
def test_bfloat16_loses_no_more_than_its_roundings(backend, lengths):
    """Of the output: the weights' and its own, each at most 2^-8 of the sum of the terms' sizes; its own alone in the
    reference. Of the gradients: twice 2^-8 overall."""
    q, k, v, cotangent = inputs(head_size=64, dtype=jnp.bfloat16)  # 1/sqrt(64) rounds nothing
    q *= 4  # scores so large that rounding them, which nobody may, would show
    lengths = None if lengths is None else jnp.array(lengths)
    out, *gradients = run(q, k, v, cotangent, lengths, backend=backend)
    want, *exact = expected(q, k, v, cotangent, lengths)
    sizes = expected(q, k, np.abs(np.asarray(v, np.float64)), cotangent, lengths)[0]
    assert out.dtype == jnp.bfloat16
    limit = 2**-8 * np.abs(want) + 1e-5 if backend == "plain" else 2 * 2**-8 * sizes
    assert np.all(np.abs(np.asarray(out, np.float64) - want) <= limit)
    for got, want in zip(gradients, exact, strict=True):
        assert got.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(got, np.float64) - want) <= 2 * 2**-8 * np.linalg.norm(want)


@needs_hopper
@pytest.mark.parametrize("queries, keys, lengths", [(17, 23, None), (192, 128, None), (500, 1300, None), (193, 129, (1, 129)), (200, 515, (384, 130))])
@pytest.mark.parametrize("bound", [None, 59.0, 61.0])
def test_hopper_is_softmax_attention(queries, keys, lengths, bound):
    """To the roundings of weights, of the result, and of the queries, which it scales: 2^-9 each. Its gradients are cuDNN's."""
    q, k, v, cotangent = inputs(queries=queries, keys=keys, head_size=64, dtype=jnp.bfloat16)
    lengths = None if lengths is None else jnp.array(lengths)
    attend = lambda *qkv: attention(*qkv, lengths, bound=None if bound is None else jnp.float32(bound), backend="hopper")
    want, *gradients = expected(q, k, v, cotangent, lengths)
    got = np.asarray(jax.jit(attend)(q, k, v), np.float64)
    assert np.linalg.norm(got - want) <= 2**-8 * np.linalg.norm(want)
    for one, other in zip(jax.jit(lambda *qkv: jax.vjp(attend, *qkv)[1](cotangent))(q, k, v), gradients, strict=True):
        assert np.linalg.norm(np.asarray(one, np.float64) - other) <= 2 * 2**-8 * np.linalg.norm(other)


@needs_hopper
@pytest.mark.parametrize("mixed", [False, True])
def test_hopper_without_a_running_maximum_takes_scores_as_large_as_its_bound(mixed):
    """Rows whose scores are all near 60, and rows whose scores are all near -60; mixed, each has a key of the other sign."""
    spread = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 1, 300, 1, 64)), jnp.float32).at[..., 0].set(21.9)
    q = (spread[0] * jnp.array([1.0] + 63 * [0.2])).at[:, :, ::2].multiply(-1.0).astype(jnp.bfloat16)
    k = spread[1].at[:, :, :1].multiply(-1.0 if mixed else 1.0).astype(jnp.bfloat16)
    v = inputs(queries=1, keys=300, batch=1, groups=1, heads=1, head_size=64, dtype=jnp.bfloat16)[2]
    want = expected(q, k, v, jnp.zeros_like(q))[0]
    for bound in (60.0, None):
        got = np.asarray(attention(q, k, v, bound=None if bound is None else jnp.float32(bound), backend="hopper"), np.float64)
        assert np.linalg.norm(got - want) <= 0.05 * np.linalg.norm(want)  # a rounding of scores of 60 is a tenth


@needs_hopper
@pytest.mark.parametrize("bound", [None, 59.0])
@pytest.mark.parametrize("lengths", [None, (1, 300), (129, 256)])
def test_hopper_has_blocks_take_many_tiles(bound, lengths):
    """960 of them, of two lengths: seven or eight for each of 132 blocks."""
    q, k, v, cotangent = inputs(queries=200, keys=300, groups=8, heads=30, head_size=64, dtype=jnp.bfloat16)
    want = expected(q, k, v, cotangent, lengths)[0]
    got = attention(q, k, v, lengths and jnp.array(lengths), bound=None if bound is None else jnp.float32(bound), backend="hopper")
    apart = np.linalg.norm(np.asarray(got, np.float64) - want, axis=(2, 4)) / np.linalg.norm(want, axis=(2, 4))  # of each group and head
    assert apart.max() <= 2**-7


@needs_hopper
def test_hopper_takes_scores_beyond_all_bounds():
    q, k, v, _ = inputs(queries=200, keys=300, head_size=64, dtype=jnp.bfloat16)
    assert np.all(np.isfinite(attention(1e4 * q, 1e4 * k, v, bound=jnp.float32(np.inf), backend="hopper")))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_stay_finite(backend):
    q, k, v, cotangent = inputs()
    for result in run(1e4 * q, 1e4 * k, v, cotangent, jnp.array([1, 20]), backend=backend):
        assert np.all(np.isfinite(result))


@pytest.mark.parametrize("groups, length", [(1, 24624), (16, 4042)], ids=["full-video", "joint"])
def test_chunked_never_holds_all_scores_at_full_size(monkeypatch, groups, length):
    monkeypatch.undo()  # the real chunk sizes
    x = jax.ShapeDtypeStruct((1, groups, length, 24, 64), jnp.float32)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    run = lambda q, k, v, lengths: attention(q, k, v, lengths, backend="chunked").sum()
    compiled = jax.jit(jax.value_and_grad(run, (0, 1, 2))).lower(x, x, x, lengths).compile()
    scores_bytes = 4 * groups * 24 * length**2
    assert compiled.memory_analysis().temp_size_in_bytes < scores_bytes / 8


def test_chunked_sums_gradients_over_query_chunks_in_float32(monkeypatch):
    """With one key every query adds its cotangent, 1, to v's gradient: bfloat16 would stop counting at 256."""
    monkeypatch.setattr(module, "PLAIN_SCORES_CPU", 1)  # a query per chunk
    monkeypatch.setattr(module, "CHUNKS", 1024)
    q, k, v, cotangent = inputs(queries=1024, keys=1, batch=1, groups=1, heads=1, dtype=jnp.bfloat16)
    dv = run(q, k, v, jnp.ones_like(cotangent), backend="chunked")[3]
    np.testing.assert_array_equal(dv.astype(jnp.float32), 1024)


@pytest.mark.parametrize(
    "platform, q_shape, keys, dtype, backend",
    [
        ("cuda", (1, 16, 4042, 24, 64), 4042, jnp.bfloat16, "cudnn"),
        ("hopper", (1, 16, 4042, 24, 64), 4042, jnp.bfloat16, "hopper"),
        ("hopper", (1, 16, 4042, 24, 64), 4042, jnp.float16, "cudnn"),  # whose exponents are too few
        ("hopper", (1, 16, 4042, 12, 128), 4042, jnp.bfloat16, "cudnn"),
        ("hopper", (1, 16, 4042, 24, 64), 4042, jnp.float32, "chunked"),
        ("hopper", (1, 1296, 19, 24, 64), 19, jnp.bfloat16, "plain"),
        ("gpu", (1, 16, 4042, 24, 64), 4042, jnp.bfloat16, "chunked"),  # one without cuDNN's attention
        ("cuda", (1, 1, 24624, 24, 64), 24624, jnp.float16, "cudnn"),
        ("cuda", (1, 16, 4041, 24, 64), 4041, jnp.bfloat16, "cudnn"),  # odd: padded by the backend
        ("cuda", (1, 16, 4042, 24, 64), 4042, jnp.float32, "chunked"),  # cuDNN has no float32
        ("cuda", (1, 16, 4042, 24, 160), 4042, jnp.bfloat16, "chunked"),  # nor such heads
        ("cuda", (1, 16, 4042, 24, 60), 4042, jnp.bfloat16, "chunked"),
        ("cuda", (1, 1296, 19, 24, 64), 19, jnp.bfloat16, "plain"),  # factorized: far below a kernel's tile
        ("tpu", (1, 16, 4042, 24, 64), 4042, jnp.bfloat16, "pallas"),
        ("tpu", (1, 16, 4042, 24, 64), 4042, jnp.float32, "pallas"),
        ("tpu", (1, 1296, 19, 24, 64), 19, jnp.bfloat16, "plain"),
        ("cpu", (1, 1, 24624, 24, 64), 24624, jnp.bfloat16, "chunked"),
        ("cpu", (2, 1, 704, 6, 32), 704, jnp.float32, "chunked"),
        ("cpu", (2, 64, 11, 6, 32), 11, jnp.float32, "plain"),
    ],
)
def test_choose_backend(monkeypatch, platform, q_shape, keys, dtype, backend):
    monkeypatch.undo()  # the real limits
    assert choose_backend(platform, q_shape, (*q_shape[:2], keys, *q_shape[3:]), dtype) == backend


@pytest.mark.parametrize(("capability", "platform"), [("8.6", "cuda"), ("9.0", "hopper"), ("10.0", "cuda"), ("7.5", "gpu"), ("gfx90a", "gpu")])
def test_a_gpu_is_told_by_the_kernels_it_has(monkeypatch, capability, platform):
    monkeypatch.setattr(module.jax, "devices", lambda: [types.SimpleNamespace(platform="gpu", compute_capability=capability)])
    assert module._current_platform() == platform


def test_the_environment_takes_other_kernels(monkeypatch):
    monkeypatch.setenv("SVDP_KERNELS", "cuda")
    assert module._current_platform() == "cuda"
    with module.compiling_for("tpu"):
        assert module._current_platform() == "tpu"
    monkeypatch.setenv("SVDP_KERNELS", "rocm")
    with pytest.raises(ValueError, match="SVDP_KERNELS=rocm: choose one of cpu, gpu, cuda, hopper, tpu"):
        attention(*inputs()[:3])


def test_auto_is_the_chosen_backend(monkeypatch):
    program = lambda backend: str(jax.make_jaxpr(partial(attention, backend=backend))(*inputs()[:3]))
    for backend in ("plain", "chunked"):
        monkeypatch.setattr(module, "choose_backend", lambda *_, backend=backend: backend)
        assert program("auto") == program(backend)
    assert program("plain") != program("chunked")


def test_refusals():
    q, k, v, _ = inputs(queries=4, keys=6)
    attend = inspect.unwrap(attention)  # the check of types, which only the tests have, would come first
    with pytest.raises(ValueError, match=r"k \(2, 2, 6, 3, 8\), v \(2, 2, 5, 3, 8\)"):
        attend(q, k, v[:, :, :5])
    with pytest.raises(ValueError, match=r"q \(2, 1, 4, 3, 8\)"):
        attend(q[:, :1], k, v)
    with pytest.raises(ValueError, match="unknown attention backend 'flash'; choose one of auto, plain, chunked, cudnn, hopper, pallas"):
        attend(q, k, v, backend="flash")
    with pytest.raises(ValueError, match="cuDNN attention wants bfloat16 or float16.*got float32 and 8"):
        attend(q, k, v, backend="cudnn")
    with pytest.raises(ValueError, match="Hopper's attention wants bfloat16 and a head size of 64; got float32 and 8"):
        attend(q, k, v, backend="hopper")
