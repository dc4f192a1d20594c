"""How fast a training step is: seconds, share of the peak (MFU), memory. Random weights and frames; nothing is read from disk.

    python benchmarks/train_step.py --size full [--batch 1] [--remat attention] [--stage 2] [--accumulation 1]
    python benchmarks/train_step.py --size small                                                             a CPU can do this one

Needs jax, flax, optax and einops alone. TFLOP and MFU are of the model (`models/flops.py`): what rematerialisation does again does not count,
and the autoencoder, which encodes frames within the step, is timed apart. Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import statistics
import sys
import time

os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")  # as plans count with; JAX takes 0.75, in which the paper's model does not fit an H100

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from progress import progress

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from svdp_jax import sharding, train_state  # noqa: E402
from svdp_jax.config import Config, load_config  # noqa: E402
from svdp_jax.models import flops  # noqa: E402
from svdp_jax.models.autoencoder import make_autoencoder  # noqa: E402
from svdp_jax.models.tokens import position_table  # noqa: E402
from svdp_jax.peaks import peak_memory, peak_tflops  # noqa: E402
from svdp_jax.types import Batch, Frozen  # noqa: E402


def make_config(flags: argparse.Namespace) -> Config:
    """The paper's run, or the demo's, as the flags want it."""
    config = Config() if flags.size == "full" else load_config(pathlib.Path(__file__).parents[1] / "configs" / "demo.py")
    train = dataclasses.replace(config.train, batch=flags.batch, accumulation=flags.accumulation, remat=flags.remat)
    return dataclasses.replace(config, train=train)


def random_batch(config: Config) -> Batch:
    data = config.data
    draw = lambda *lead: np.random.default_rng(0).integers(0, 256, (config.train.batch, *lead, data.size, data.size, 3), np.uint8)
    return Batch(target=draw(data.frames), history=draw(data.history), source=draw(), driving=draw(data.frames))


def timed(function, *arguments, repeats: int) -> tuple[float, object]:
    """Median seconds of a call, and what the last one gave."""
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        result = jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", choices=["full", "small"], default="full")
    parser.add_argument("--batch", type=int, default=1, help="samples of a step, over all devices")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--remat", choices=["none", "full", "attention", "offload"], default="attention")
    parser.add_argument("--stage", type=int, choices=[1, 2], default=2, help="2 has history")
    parser.add_argument("--steps", type=int, default=10, help="that are timed, after two")
    flags = parser.parse_args()
    config, with_history = make_config(flags), flags.stage == 2
    layout = sharding.make_layout(config.mesh)
    sharding.check_batch(layout, flags.batch, accumulation=flags.accumulation)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, train_state.abstract_state(config, layout))
    state = jax.jit(lambda key: nn.meta.unbox(train_state.new_state(config, key)), out_shardings=shardings)(jax.random.key(0))
    autoencoder = nn.meta.unbox(jax.jit(make_autoencoder(config.autoencoder).init)(jax.random.key(1), jnp.zeros((1, 64, 64, 3)))["params"])
    model = config.model
    text, pooled = np.zeros((model.text_tokens, model.text_width), np.float32), np.zeros(model.pooled_width, np.float32)
    constants = train_state.constants_of(config, Frozen(autoencoder, position_table(model), text, pooled))
    batch, (autoencoder, constants, key) = jax.device_put(random_batch(config), layout.batch), jax.device_put((autoencoder, constants, jax.random.key(2)), layout.whole)
    votes = layout.votes(False)

    progress("state drawn")
    begun = time.perf_counter()
    step = train_state.make_step(config, layout, shardings, with_history=with_history).lower(state, batch, autoencoder, constants, key, votes).compile()
    compile_seconds = time.perf_counter() - begun
    progress("compiled")
    for _ in range(2):
        state, _ = step(state, batch, autoencoder, constants, key, votes)
    jax.block_until_ready(state)
    seconds = []
    for _ in range(flags.steps):
        begun = time.perf_counter()
        state, metrics = step(state, batch, autoencoder, constants, key, votes)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - begun)
    assert np.isfinite(float(metrics["loss"])), "the loss is not finite"
    progress(f"steps: {[round(taken, 4) for taken in seconds]} s")

    draws = jax.jit(functools.partial(train_state.draw, config, flags.batch, with_history=with_history))(key)
    encode = jax.jit(functools.partial(train_state.encode, config, with_history=with_history, layout=layout))
    timed(encode, autoencoder, batch, draws, repeats=1)
    encode_seconds, _ = timed(encode, autoencoder, batch, draws, repeats=5)

    work, median = flops.train_step(config, with_history=with_history).total, statistics.median(seconds)
    tflops, peak, memory = work / median / jax.device_count() / 1e12, peak_tflops(jax.devices()[0].device_kind), peak_memory()
    analysis = step.memory_analysis()
    result = {
        "seconds_per_step": median,
        "steps_per_second": 1 / median,
        "slowest_step": max(seconds),
        "model_tflop_per_step": work / 1e12,
        "tflops_per_device": tflops,
        "mfu": tflops / peak if peak else None,
        "peak_memory_gb": memory,
        "program_gb": {name: getattr(analysis, f"{name}_size_in_bytes") / 1e9 for name in ("argument", "temp")} if analysis else None,
        "autoencoder_seconds": encode_seconds,
        "compile_seconds": compile_seconds,
        **{name: getattr(flags, name) for name in ("size", "batch", "accumulation", "remat", "stage", "steps")},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
        "environment": {name: value for name, value in os.environ.items() if name.startswith(("MALLOC_", "GLIBC_", "XLA_"))},
        "date": datetime.date.today().isoformat(),
    }
    shown = [("s/step", f"{median:.3f}"), ("TFLOP/s", f"{tflops:.2f}"), ("MFU", f"{result['mfu']:.1%}" if peak else "-")]
    shown += [("GB", f"{memory:.1f}" if memory else "-"), ("autoencoder s", f"{encode_seconds:.3f}"), ("compile s", f"{compile_seconds:.0f}")]
    print(" ".join(f"{name:>14}" for name, _ in shown))
    print(" ".join(f"{value:>14}" for _, value in shown))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
