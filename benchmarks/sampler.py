"""How fast a denoising step is: seconds in all, by pass and by component, share of the measured matrix peak, memory. Random weights.

    python benchmarks/sampler.py --size full [--against-pytorch]        an accelerator: 576 x 576, 16 + 3 frames, Stable Diffusion 3.5 Medium
    python benchmarks/sampler.py --size small [--against-pytorch]       a CPU can do this one
    python benchmarks/sampler.py --size full --attention cudnn --against-float32        with that kernel, and how far from float32

Needs jax, flax, optax and einops (and torch, for --against-pytorch). TFLOP are of the model (`models/flops.py`). Components are timed by themselves, on the
shapes that pass p gives them; "rest" is what the pass takes beyond their sum: norms, modulation, and what XLA does between. All programs are compiled
first, several at a time, while nothing runs on the device but the compiler's own trials. Then everything is timed in turn, round after round and there and back, so that
a machine whose speed drifts is as fast for all of it; figures are medians over the rounds. Prints tables and, last, one line of JSON; with --trace also
before it. Where JAX and PyTorch share a GPU, JAX takes half of its memory, unless XLA_CLIENT_MEM_FRACTION says otherwise.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

if "--against-pytorch" in sys.argv:
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.5")

import jax
import jax.numpy as jnp
import kernels
import numpy as np
from progress import progress

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from svdp_jax import flow, pipeline, sampler  # noqa: E402
from svdp_jax.config import Config, load_config  # noqa: E402
from svdp_jax.models import flops, tokens  # noqa: E402
from svdp_jax.models.attention import Backend, attention  # noqa: E402
from svdp_jax.models.layers import COMPILER  # noqa: E402
from svdp_jax.models.tokens import position_table  # noqa: E402
from svdp_jax.models.transformer import Transformer, abstract_inputs, layer_groups  # noqa: E402
from svdp_jax.peaks import peak_memory  # noqa: E402
from svdp_jax.types import Conditions, Constants  # noqa: E402

PASSES = "usdp"
GUIDANCE = (2.0, 2.5, 1.0)


class Window(NamedTuple):
    """What a step works on."""

    model: Transformer
    params: Any
    constants: Constants
    conditions: Conditions
    z: jax.Array


def make_config(flags: argparse.Namespace) -> Config:
    config = Config() if flags.size == "full" else load_config(pathlib.Path(__file__).parents[1] / "configs" / "demo.py")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=flags.dtype, history=flags.history, prediction="velocity"))


def make_window(config: Config, backend: Backend) -> Window:
    """Random weights, of which none is zero, and random latents; the same for every type of weights."""
    model, data = config.model, config.data
    height, width, _ = config.latent_shape
    leaves, structure = jax.tree.flatten_with_path(pipeline.abstract_weights(config, jax.devices()[0]))

    @functools.partial(jax.jit, static_argnums=0)
    def drawn(number: int) -> jax.Array:
        path, leaf = leaves[number]
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), number), leaf.shape) * 0.02
        return (noise + 1 if path[-1].key.endswith("norm") else noise).astype(leaf.dtype)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # as each compiles
        params = structure.unflatten(pool.map(drawn, range(len(leaves))))
    shapes = abstract_inputs(model, batch=1, frames=data.frames, history=data.history, height=height, width=width)
    keys = iter(jax.random.split(jax.random.key(2), 99))
    z, _, conditions, constants = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape, leaf.dtype), shapes)
    constants = constants._replace(positions=tokens.shifted_crops(position_table(model), config.grid, config.grid))
    return Window(Transformer(model, backend), params, constants, conditions, z)


def in_threads(makers: dict[str, Callable[[], Callable[[], Any]]]) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """What each maker, which compiles, makes: calls, and the seconds that each took beside the others. Python holds them up only where it lowers."""

    def timed(maker: Callable) -> tuple[Callable[[], Any], float]:
        begun = time.perf_counter()
        return maker(), time.perf_counter() - begun

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        made = dict(zip(makers, pool.map(timed, makers.values()), strict=True))
    return {name: call for name, (call, _) in made.items()}, {name: seconds for name, (_, seconds) in made.items()}


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each call in each round, after one that does not count. Calls return arrays of JAX, which are waited for, or what is there already."""
    seconds = {name: np.zeros(rounds) for name in calls}
    for number in range(-1, rounds):
        for name, call in list(calls.items())[:: 1 if number % 2 else -1]:  # a card is hot behind whoever worked it hard: in turn, that is another
            begun = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name][number] = time.perf_counter() - begun  # the round that does not count is written over by the last
        progress(f"round {number + 1} of {rounds}: " + ", ".join(f"{name} {taken[number]:.4f}" for name, taken in seconds.items()))
    return seconds


def step_of(window: Window, levels: tuple[int, ...], coefficients: list[float], *, steps: int) -> Callable[[], jax.Array]:
    """`steps` denoising steps with these passes, as `sampler.sample_window` does them, compiled."""
    signals = sampler.signals_of(window.model, window.params, window.constants, window.conditions, levels)
    noise_levels, weights = jnp.array(flow.noise_levels(steps, shift=3.0)), jnp.array(coefficients, jnp.float32)
    arguments = lambda: (window.params, window.constants, window.z + 0, signals, weights, noise_levels, jnp.int32(0), jnp.int32(steps))  # z is donated
    denoise = sampler.denoise.lower(window.model, *arguments()).compile()
    return lambda: denoise(*arguments())[0]


def product_of(side: int, dtype: str) -> Callable[[], jax.Array]:
    """The product of two square matrices, compiled."""
    square = jax.random.normal(jax.random.key(0), (side, side), jnp.dtype(dtype))
    return functools.partial(jax.jit(jnp.matmul).lower(square, square).compile(), square, square)


def components(config: Config, backend: Backend) -> dict[str, list[tuple[Callable, tuple[tuple[int, ...], ...], int]]]:
    """Of pass p: name -> (function, shapes of its arguments, how often), one entry for each shape of the image streams and of history."""
    model, frames, past, count = config.model, config.data.frames, config.data.history, config.grid**2
    words, width, hidden = model.text_tokens, model.width, model.mlp_ratio * model.width
    kinds = dict(layer_groups(model))
    updated = model.depth - 1 if model.history == "joint" else 0
    heads = lambda groups, length: (1, groups, length, model.heads, model.head_size)
    attend = lambda q, k, v: attention(q, k, v, bound=jnp.float32(model.head_size**0.5), backend=backend)  # as the norms', before they are trained
    project = lambda x, into, into_bias, out, out_bias: (x @ into + into_bias)[:, :width] @ out + out_bias
    square = (width, 3 * width), (3 * width,), (width, width), (width,)
    found = {}

    def add(name, function, shapes, times):
        if times:
            found.setdefault(name, []).append((function, shapes, times))

    asking = (frames + (past if updated else 0)) * count
    seen = heads(1, (frames + past) * count)
    add("temporal attention", attend, (heads(1, asking), seen, seen), model.depth)
    streams = [(frames, 3 * count, model.depth), (past, count, updated)]
    for groups, image, layers in streams:
        add("joint attention", attend, (heads(groups, words + image),) * 3, layers)
        add("dual attention", attend, (heads(groups, image),) * 3, kinds.get("dual", 0) * bool(layers))
        mlp = lambda x, wide, wide_bias, narrow, narrow_bias: jax.nn.gelu(x @ wide + wide_bias) @ narrow + narrow_bias
        add("MLP", mlp, ((groups * (words + image), width), (width, hidden), (hidden,), (hidden, width), (width,)), layers)
        add("projections", project, ((groups * (words + image), width), *square), layers)
        add("projections", project, ((groups * image, width), *square), kinds.get("dual", 0) * bool(layers))
    add("projections", project, (((frames + past) * count, width), *square), model.depth)
    return found


def in_a_row(function: Callable, shapes: tuple[tuple[int, ...], ...], times: int, dtype: str) -> Callable[[], jax.Array]:
    """`function` of arrays of these shapes, so many times, each of which waits for the one before, as layers do; compiled."""
    drawn = [jax.random.normal(jax.random.key(0), shape, jnp.dtype(dtype)) for shape in shapes]

    @functools.partial(jax.jit, compiler_options=COMPILER)
    def repeated(first, *others):
        again = lambda _, x: first + 0 * function(x, *others).ravel()[0]
        return jax.lax.fori_loop(0, times, again, first)

    return functools.partial(repeated.lower(*drawn).compile(), *drawn)


def apart(one: np.ndarray, other: np.ndarray, begun_at: jax.Array) -> float:
    """The norm of the difference between two steps' latents, over that of what the second step changes."""
    return float(np.linalg.norm(one - other) / np.linalg.norm(other - np.asarray(begun_at)))


def pytorch_calls(
    window: Window, levels: tuple[int, ...], coefficients: list[float], shapes: dict[str, tuple], side: int, flags: argparse.Namespace
) -> tuple[dict[str, Callable[[], Any]], dict]:
    """A step, and one large product, in PyTorch, on the same device with the same weights; and which of its attention kernels the step uses, by their
    seconds on `shapes`, name -> (of queries, of keys)."""
    import pytorch_reference as reference
    import torch

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    dtype = getattr(torch, flags.dtype)
    weights, constants = jax.tree.map(torch.from_dlpack, (window.params, window.constants))
    network = reference.Reference(window.model.config, weights, constants, dtype=dtype, device=device)
    tensor = lambda x: None if x is None else torch.from_numpy(np.array(x)).to(device)
    signals = [tokens.at_level(window.conditions, level, dropped="omit") for level in levels]
    passes = [reference.Inputs(*map(tensor, one[:3])) for one in signals]
    if not flags.eager:
        network.compile()
    z, square = tensor(window.z), torch.randn(side, side, device=device, dtype=dtype)
    t, t_next = flow.noise_levels(1, shift=3.0).tolist()
    attention_seconds = {name: reference.attention_seconds(*shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    taken_by_all = set.intersection(*map(set, attention_seconds.values()))
    total = {kernel: sum(seconds[kernel] for seconds in attention_seconds.values()) for kernel in taken_by_all}
    chosen = min(total, key=lambda kernel: total[kernel] * (1 if kernel == "default" else 1.02))  # another, if it gains anything

    def done(function):
        def call():
            with torch.inference_mode(), reference.KERNELS[chosen]():
                result = function()
                if device == "cuda":
                    torch.cuda.synchronize()
            return result

        return call

    step = lambda: reference.step(network, z, t, t_next, passes, coefficients, prediction="velocity")
    return {"pytorch step": done(step), "pytorch product": done(lambda: square @ square)}, {"used": chosen, "seconds": attention_seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", choices=["full", "small"], default="full")
    parser.add_argument("--history", choices=["joint", "cached"], default="joint", help="cached: keys and values of history once per window")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--attention", choices=get_args(Backend), default="auto", help="by another kernel than the device's")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--against-pytorch", action="store_true", help="the same step in PyTorch, in turn")
    parser.add_argument("--against-float32", action="store_true", help="how far pass p is from the same in float32")
    parser.add_argument("--eager", action="store_true", help="PyTorch without torch.compile")
    parser.add_argument("--trace", type=pathlib.Path, metavar="FOLDER", help="one step is traced into it, and the time of each kernel printed")
    flags = parser.parse_args()
    on_cpu = jax.default_backend() == "cpu"
    flags.dtype = flags.dtype or ("float32" if on_cpu else "bfloat16")
    if flags.against_pytorch and flags.history != "joint":
        parser.error("--against-pytorch goes with --history joint")
    config = make_config(flags)
    window = make_window(config, flags.attention)
    chosen = sampler.guided_passes(GUIDANCE, with_history=True)
    levels, coefficients = tuple(chosen), list(chosen.values())

    side = 1024 if on_cpu else 8192
    first = sampler.guided_passes(GUIDANCE, with_history=False)
    without = window._replace(conditions=window.conditions._replace(history=None))
    parts = components(config, flags.attention)
    progress("weights drawn")
    calls, compile_seconds = in_threads({
        "step": functools.partial(step_of, window, levels, coefficients, steps=1),
        "first": functools.partial(step_of, without, tuple(first), list(first.values()), steps=1),
        **{PASSES[level]: functools.partial(step_of, window, (level,), [1.0], steps=1) for level in levels},
        **{f"{name} {number}": functools.partial(in_a_row, *part, flags.dtype) for name, shapes in parts.items() for number, part in enumerate(shapes)},
        "product": functools.partial(product_of, side, flags.dtype),
    })
    progress("compiled: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in compile_seconds.items()))
    result_of_step = np.asarray(calls["step"]())
    assert np.isfinite(result_of_step).all(), "the result is not finite"
    progress("first step")
    if flags.against_pytorch:
        attended = {name: parts[name][0][1][:2] for name in ("temporal attention", "joint attention")}
        theirs, pytorch_attention = pytorch_calls(window, levels, coefficients, attended, side, flags)
        by_kernel = lambda seconds: ", ".join(f"{kernel} {1e3 * taken:.2f}" for kernel, taken in seconds.items())
        attention_line = f"{pytorch_attention['used']}; ms: " + "; ".join(f"{name} {by_kernel(seconds)}" for name, seconds in pytorch_attention["seconds"].items())
        progress(f"PyTorch's attention kernels: {attention_line}")
        begun = time.perf_counter()
        there = theirs["pytorch step"]().cpu().float().numpy()
        pytorch_compile_seconds = time.perf_counter() - begun
        progress("PyTorch's first step")
        theirs["pytorch step"]()  # its next two are slow as well
        calls = theirs | calls
    seconds = in_turn(calls, flags.repeats)
    typical = {name: float(np.median(taken)) for name, taken in seconds.items()}
    whole, by_pass = typical["step"], {PASSES[level]: typical[PASSES[level]] for level in levels}
    by_component = {part: sum(taken for name, taken in typical.items() if name.rpartition(" ")[0] == part) for part in parts}
    by_component["rest"] = by_pass["p"] - sum(by_component.values())

    shape = {"frames": config.data.frames, "tokens": config.grid**2}
    work = {PASSES[level]: flops.forward(config.model, **shape, history=config.data.history, level=level, remembered=flags.history == "cached").total / 1e12 for level in levels}
    product = 2 * side**3 / 1e12
    peak = product / typical["product"]
    result = {
        "seconds_per_step": whole,
        "seconds_per_step_first_window": typical["first"],
        "seconds_by_pass": by_pass,
        "seconds_by_component": by_component,
        "tflop_by_pass": work,
        "tflops": sum(work.values()) / whole,
        "matrix_peak_tflops": peak,
        "share_of_peak": sum(work.values()) / whole / peak,
        "peak_memory_gb": peak_memory(),
        "compile_seconds": compile_seconds["step"],  # while others are compiled
    }
    if flags.against_pytorch:
        low, ratio, high = np.quantile(seconds["pytorch step"] / seconds["step"], [0.25, 0.5, 0.75]).tolist()
        result |= {
            "pytorch_seconds": typical["pytorch step"],
            "times_as_fast_as_pytorch": ratio,
            "quarters": [low, high],
            "pytorch_apart": apart(there, result_of_step, window.z),
            "pytorch_matrix_peak_tflops": product / typical["pytorch product"],
            "pytorch_attention": pytorch_attention,
            "pytorch_compile_seconds": pytorch_compile_seconds,
        }
    if flags.against_float32:
        exact = make_window(dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32")), "auto")
        in_float32 = np.asarray(step_of(exact, levels[-1:], [1.0], steps=1)())
        result["pass_p_from_float32"] = apart(np.asarray(calls["p"]()), in_float32, window.z)
        progress("pass p in float32")
    shape["history_frames"] = config.data.history
    result |= {
        "sizes": {name: getattr(flags, name) for name in ("size", "history", "dtype", "attention", "repeats", "eager")} | shape,
        "device": jax.devices()[0].device_kind,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", *(("torch",) if flags.against_pytorch else ()))},
        "date": datetime.date.today().isoformat(),
    }
    print(f"step {whole:.3f} s (first window {typical['first']:.3f}), {result['tflops']:.2f} TFLOP/s, {result['share_of_peak']:.0%} of a product's {peak:.2f}")
    for title, shares in ("pass", by_pass), ("in pass p", by_component):
        print(f"{title:>10}: " + ", ".join(f"{name} {taken:.4f} s ({taken / by_pass['p']:.0%})" for name, taken in shares.items()))
    if flags.against_pytorch:
        print(f"   PyTorch: {result['pytorch_seconds']:.3f} s, a product {result['pytorch_matrix_peak_tflops']:.2f} TFLOP/s; apart by {result['pytorch_apart']:.1e}")
        print(f"            its attention kernels: {attention_line}")
        print(f"            ours is {ratio:.2f} times as fast (quarters of the rounds: {low:.2f}, {high:.2f})")
    if flags.against_float32:
        print(f"pass p is {result['pass_p_from_float32']:.2e} of what it changes from float32's")
    print(json.dumps(result), flush=True)  # before the trace, which may be cut short
    if flags.trace:
        found, span = kernels.read_kernels(kernels.traced(calls["step"], flags.trace, "step"))
        print(kernels.table(found, span), flush=True)
        print(json.dumps(result | {"kernel_milliseconds": kernels.by_kind(found), "kernels_span_milliseconds": span}))


if __name__ == "__main__":
    main()
