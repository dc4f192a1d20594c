"""How fast attention is on the shapes that matter, with each kernel at hand: ms, TFLOP/s, and how far it is from float32. And matrix products beside it.

    python benchmarks/attention.py                  a GPU; PyTorch's kernels too where torch is installed
    python benchmarks/attention.py --size small     a CPU can do this one, and says of each GPU kernel that it cannot

    hopper            what `svdp_jax.models.attention` takes on an H100 or H200 for sampling, where scores are known to be bounded; "unbounded": where they are not
    cudnn             what it takes for training, and on other GPUs of NVIDIA's
    mosaic QxKxS      JAX's Pallas kernel for Hopper (`pallas.ops.gpu.attention_mgpu`), in blocks of Q and K with S steps in flight. It wants whole blocks
                      and has no mask: sequences are padded with zeros, whose share of the softmax's denominator, exp(0) each, is taken out again behind it
    triton QxKxW      JAX's Pallas kernel through Triton (`pallas.ops.gpu.attention`), with W warps; padding is masked by segment
    chunked           XLA alone

Everything is in bfloat16. Shapes are those of a step at 576 x 576, 16 + 3 frames: groups, queries, keys, 24 heads of 64. One case after the other: medians over rounds of three calls in a
row, of PyTorch's over single calls. The error is the norm of the difference from softmax attention in float32, on some queries, over the norm of that. Prints tables and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import sys
import time
import types
from collections.abc import Callable
from typing import NamedTuple

os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.5")  # PyTorch takes its share

import jax
import jax.numpy as jnp
import numpy as np
from progress import progress

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from svdp_jax.models.attention import attention  # noqa: E402
from svdp_jax.models.layers import COMPILER  # noqa: E402

FULL = {"temporal": (1, 24624, 24624), "joint": (16, 4042, 4042), "joint of u": (16, 1450, 1450), "dual": (16, 3888, 3888)}  # groups, queries, keys
SMALL = {"temporal": (1, 300, 300), "joint": (2, 130, 130)}
MOSAIC = (64, 128, 2), (64, 256, 2), (128, 128, 2), (64, 128, 4)  # block_q, block_kv, max_concurrent_steps
TRITON = (128, 64, 8), (64, 64, 4)  # block_q, block_k, num_warps
CHECKED = 64  # queries of a group that are compared
BACKWARD = ("temporal", "joint")  # forward and backward, of cudnn
TOKENS, WIDTH = 16 * 4042, 1536


class Case(NamedTuple):
    """A kernel on a shape: q, k, v [G, S, N, H] to what q asked for; `work` in floating-point operations."""

    shape: str
    kernel: str
    function: Callable
    inputs: tuple[jax.Array, ...]
    work: float


def ours(q, k, v, *, backend: str, bound: float | None = None):
    return attention(q[None], k[None], v[None], bound=None if bound is None else jnp.float32(bound), backend=backend)[0]


def mosaic(q, k, v, *, block_q: int, block_k: int, steps: int):
    attention_mgpu = _mosaic_kernels()
    queries, beyond = q.shape[1], -k.shape[1] % block_k
    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)  # the kernel does not scale
    tuning = attention_mgpu.TuningConfig(block_q=block_q, block_kv=block_k, max_concurrent_steps=steps)
    q, k, v = _padded(q, 2 * block_q), _padded(k, block_k), _padded(v, block_k)
    if not beyond:
        return attention_mgpu.attention(q, k, v, tuning)[:, :queries]
    out, (log2_sum,) = attention_mgpu.attention(q, k, v, tuning, save_residuals=True)
    ours = 1 - beyond * jnp.exp2(-jnp.swapaxes(log2_sum, 1, 2))[..., None]  # [G, S, N, 1], the share of the sum that is not exp(0) of a key beyond
    return (out / ours).astype(q.dtype)[:, :queries]


@functools.cache
def _mosaic_kernels():
    """The module of the kernel, whose buffers are float16 whatever comes in: here, bfloat16 where it says float16."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    class Bfloat16(types.ModuleType):
        float16 = jnp.bfloat16

        def __getattr__(self, name: str):
            return getattr(jnp, name)

    attention_mgpu.jnp = Bfloat16("jnp")
    return attention_mgpu


def triton(q, k, v, *, block_q: int, block_k: int, warps: int):
    from jax.experimental.pallas.ops.gpu import attention as pallas

    queries, scale = q.shape[1], q.shape[-1] ** -0.5
    whole = math.lcm(block_q, block_k)
    segments = (jnp.arange(-(-queries // whole) * whole) >= queries).astype(jnp.int32)[None].repeat(len(q), 0)
    q, k, v = (_padded(x, whole) for x in (q, k, v))
    blocks = pallas.BlockSizes(block_q=block_q, block_k=block_k)
    return pallas.mha(q, k, v, segments, sm_scale=scale, block_sizes=blocks, num_warps=warps)[:, :queries]


def _padded(x, multiple: int):
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0)))


CUDNN, CHUNKED = functools.partial(ours, backend="cudnn"), functools.partial(ours, backend="chunked")
KERNELS = {
    "cudnn": CUDNN,
    "hopper": functools.partial(ours, backend="hopper", bound=8.0),
    "hopper, unbounded": functools.partial(ours, backend="hopper"),
    **{f"mosaic {q}x{k}x{steps}": functools.partial(mosaic, block_q=q, block_k=k, steps=steps) for q, k, steps in MOSAIC},
    **{f"triton {q}x{k}x{warps}": functools.partial(triton, block_q=q, block_k=k, warps=warps) for q, k, warps in TRITON},
}


def expected(q, k, v):
    """Softmax attention in float32, of the first queries of the first and last group."""
    q, k, v = (x[jnp.array([0, -1])].astype(jnp.float32) for x in (q[:, :CHECKED], k, v))
    scores = jnp.einsum("gqnh,gknh->gnqk", q, k, precision="highest") * q.shape[-1] ** -0.5
    return jnp.einsum("gnqk,gknh->gqnh", jax.nn.softmax(scores), v, precision="highest")


def backward(q, k, v):
    """Output and gradients."""
    out, gradients = jax.vjp(CUDNN, q, k, v)
    return out, gradients(q)


def cases(shapes: dict[str, tuple[int, int, int]], heads: int, size: int) -> list[Case]:
    found = []
    for shape, (groups, queries, keys) in shapes.items():
        draw = lambda seed, length, groups=groups: jax.random.normal(jax.random.key(seed), (groups, length, heads, size), jnp.bfloat16)
        inputs, work = (draw(0, queries), draw(1, keys), draw(2, keys)), 4.0 * groups * queries * keys * heads * size
        found += [Case(shape, name, function, inputs, work) for name, function in KERNELS.items()]
        if jax.default_backend() == "cpu":
            found.append(Case(shape, "chunked", CHUNKED, inputs, work))
        if shape in BACKWARD:
            found.append(Case(shape, "cudnn, and back", backward, inputs, 3.5 * work))
    return found


def products(tokens: int, width: int, side: int) -> list[Case]:
    """Matrix products of pass p, and a large square one."""
    draw = lambda *shape: jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    product = lambda x, kernel, bias: x @ kernel + bias
    wide = lambda x, kernel, bias: jax.nn.gelu(x @ kernel + bias)
    parts = [
        ("q, k, v", product, width, 3 * width),
        ("out", product, width, width),
        ("MLP, wide", product, width, 4 * width),
        ("with GELU", wide, width, 4 * width),
        ("MLP, narrow", product, 4 * width, width),
    ]
    found = [Case(name, f"{tokens} x {a} x {b}", function, (draw(tokens, a), draw(a, b), draw(b)), 2.0 * tokens * a * b) for name, function, a, b in parts]
    square = draw(side, side)
    return [*found, Case("square", f"{side} x {side} x {side}", jnp.matmul, (square, square), 2.0 * side**3)]


def compiled(case: Case) -> Callable | str:
    """What runs a case, or why nothing does."""
    try:
        return jax.jit(case.function, compiler_options=COMPILER).lower(*case.inputs).compile()
    except Exception as problem:  # any compiler's, in its own words
        return _first_line(problem)


def milliseconds(call: Callable, inputs: tuple, rounds: int, in_a_row: int = 3) -> float:
    taken = []
    for _ in range(1 + rounds):
        begun = time.perf_counter()
        results = [call(*inputs) for _ in range(in_a_row)]
        jax.block_until_ready(results)
        taken.append((time.perf_counter() - begun) / in_a_row * 1e3)
    return float(np.median(taken[1:]))


def measure(case: Case, call: Callable | str, want: np.ndarray | None, rounds: int) -> dict:
    """A row of the table."""
    row = {"shape": case.shape, "kernel": case.kernel}
    if isinstance(call, str):
        return row | {"problem": call}
    try:
        row["error"] = None
        if want is not None:
            got = np.asarray(jax.tree.leaves(call(*case.inputs))[0][jnp.array([0, -1]), :CHECKED].astype(jnp.float32))
            row["error"] = float(np.linalg.norm(got - want) / np.linalg.norm(want))
        row["ms"] = milliseconds(call, case.inputs, rounds)
        return row | {"tflops": case.work / row["ms"] / 1e9}
    except Exception as problem:
        return row | {"problem": _first_line(problem)}


def pytorch_rows(shapes: dict[str, tuple[int, int, int]], heads: int, size: int) -> list[dict]:
    """PyTorch's kernels, as `benchmarks/pytorch_reference.py` calls them."""
    try:
        import pytorch_reference as reference
        import torch
    except ImportError as problem:
        return [{"shape": "all", "kernel": "pytorch", "problem": str(problem)}]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for shape, (groups, queries, keys) in shapes.items():
        lengths = [(1, groups, length, heads, size) for length in (queries, keys)]
        work, found = 4.0 * groups * queries * keys * heads * size, reference.attention_seconds(*lengths, dtype=torch.bfloat16, device=device)
        for kernel in reference.KERNELS:
            row = {"shape": shape, "kernel": f"pytorch {kernel}"}
            taken = {"error": None, "ms": found[kernel] * 1e3, "tflops": work / found[kernel] / 1e12} if kernel in found else {"problem": "PyTorch does not take it"}
            rows.append(row | taken)
    return rows


def shown(row: dict) -> str:
    name = f"{row['shape']:<12} {row['kernel']:<22}"
    if "problem" in row:
        return f"{name} {row['problem']}"
    return f"{name} {row['ms']:9.3f} ms {row['tflops']:8.2f} TFLOP/s" + ("" if row["error"] is None else f"   error {row['error']:.1e}")


def _first_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {str(problem).strip()}".split("\n", 1)[0][:160]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", choices=["full", "small"], default="full")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kernels", default="", help="only kernels with one of these, parted by commas, in their names; no products")
    flags = parser.parse_args()
    full = flags.size == "full"
    shapes, (heads, size) = (FULL, (24, 64)) if full else (SMALL, (2, 64))
    attend = cases(shapes, heads, size)
    everything = attend + (products(TOKENS, WIDTH, 8192) if full else products(300, 64, 256))
    if asked := [part for part in flags.kernels.split(",") if part]:
        everything = [case for case in attend if any(part in case.kernel for part in asked)]
    everything.sort(key=lambda case: case.kernel.startswith(("hopper", "mosaic", "triton")))  # last: should one of them hang, the rest is there
    wanted = {case.shape: np.asarray(jax.jit(expected)(*case.inputs)) for case in attend if case.kernel == "cudnn"}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        calls = list(pool.map(compiled, everything))
    progress("compiled")
    rows = pytorch_rows(shapes, heads, size)
    print("\n".join(map(shown, rows)), flush=True)
    for case, call in zip(everything, calls, strict=True):
        rows.append(measure(case, call, wanted.get(case.shape), flags.rounds))
        print(shown(rows[-1]), flush=True)
    progress("measured")
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    about = {"device": jax.devices()[0].device_kind, "size": flags.size, "versions": versions, "date": datetime.date.today().isoformat()}
    print(json.dumps({"rows": rows} | about))


if __name__ == "__main__":
    main()
