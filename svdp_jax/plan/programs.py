"""The programs that `train.py` and `sample.py` run, lowered for devices that need not be there."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from svdp_jax import pipeline, sampler, sharding, train_state
from svdp_jax.config import Config, ConfigError, MeshConfig
from svdp_jax.models import flops
from svdp_jax.models.attention import compiling_for
from svdp_jax.models.autoencoder import make_autoencoder
from svdp_jax.models.transformer import abstract_inputs
from svdp_jax.sharding import Layout
from svdp_jax.types import Batch, Constants

KERNELS = {"cuda": "hopper"}  # of the GPUs that are planned for, all H100 and H200


class Program(NamedTuple):
    """What is to be compiled, what its arguments hold, and what is asked of it."""

    lowered: Any  # jax.stages.Lowered
    mesh: dict[str, int]  # devices along each axis
    held: dict[str, int]  # bytes of the arguments on a device, by part
    flops: float  # of the model, over all devices: what MFU counts


def lower_train(config: Config, devices: list[jax.Device], platform: str) -> Program:
    """A step of the last stage of training, which has history where the config has, on the mesh of the config."""
    layout = sharding.make_layout(config.mesh, devices)
    sharding.check_batch(layout, config.train.batch, accumulation=config.train.accumulation)
    state, with_history = train_state.abstract_state(config, layout), config.data.history > 0
    autoencoder, constants = _frozen(config, layout)
    votes = jax.ShapeDtypeStruct((layout.mesh.size,), jnp.int32, sharding=layout.each)
    key = _on(layout.whole, jax.eval_shape(lambda: jax.random.key(0)))
    arguments = state, _batch(config, layout), autoencoder, constants, key, votes
    step = train_state.make_step(config, layout, jax.tree.map(lambda leaf: leaf.sharding, state), with_history=with_history)
    with compiling_for(KERNELS.get(platform, platform)):
        lowered = step.trace(*arguments).lower(lowering_platforms=(platform,))
    parts = {"parameters": state.params, "optimizer": state.opt_state, "ema": state.ema, "batch": arguments[1], "autoencoder": autoencoder, "constants": constants}
    return Program(lowered, dict(layout.mesh.shape), _held(parts), flops.train_step(config, with_history=with_history).total)


def lower_sample(config: Config, devices: list[jax.Device], platform: str) -> Program:
    """Denoising steps of a window with history, where the config has any; their number is not known to the program, so that all figures are of one step.

    On several devices they share the frames of one portrait."""
    layout = sharding.make_layout(config.mesh, devices) if len(devices) > 1 else None
    where = layout.whole if layout else jax.sharding.SingleDeviceSharding(devices[0])
    model, (height, width, _) = config.model, config.latent_shape
    params = pipeline.abstract_weights(config, layout or devices[0])
    inputs = abstract_inputs(model, batch=1, frames=config.data.frames, history=config.data.history, height=height, width=width)
    z, _, conditions, constants = _on(where, inputs)
    if layout:
        z = jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=layout.sharding("batch", "frames"))
    passes = sampler.guided_passes(config.sample.guidance, with_history=config.data.history > 0)
    network = train_state.make_transformer(config, layout=layout)
    array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
    with compiling_for(KERNELS.get(platform, platform)):
        signals_of = functools.partial(sampler.signals_of, network, levels=tuple(passes))
        signals = _on(where, jax.eval_shape(signals_of, params, constants, conditions))
        number = array(dtype=jnp.int32)
        arguments = network, params, constants, z, signals, array(len(passes)), array(config.sample.steps + 1), number, number
        lowered = sampler.denoise.trace(*arguments).lower(lowering_platforms=(platform,))
    shape = {"frames": config.data.frames, "history": config.data.history, "tokens": config.grid**2}
    work = sum(flops.forward(model, **shape, level=level, remembered=model.history == "cached").total for level in passes)
    parts = {"parameters": params, "constants": constants, "latents": (z, signals)}
    return Program(lowered, dict(layout.mesh.shape) if layout else {}, _held(parts), work)


LOWER = {"train": lower_train, "sample": lower_sample}


def config_for(config: Config, strategy: str, *, count: int, groups: int, program: str, batch: float, remat: str) -> Config:
    """The config on `count` devices in `groups`, with `batch` samples per device; `strategy` is a name of `sharding.STRATEGIES` and, behind colons, the
    sizes of its inner axes (context, tensor; 2 each unless given): `fsdp_context:4`, `fsdp_context_tensor:4:2`. For sampling, devices share frames, whatever it is.
    ConfigError where a group's devices do not make up the inner axes, which stay within it."""
    if program == "sample":
        mesh = MeshConfig(context=count, strategy="fsdp_context")
    else:
        name, *sizes = strategy.split(":")
        inner = {axis: 2 for axis in ("context", "tensor") if axis in name}
        inner |= dict(zip(inner, map(int, sizes), strict=False))
        together = math.prod(inner.values())
        if count // groups % together:
            where = " in each slice or host" if groups > 1 else ""
            raise ConfigError(f"{strategy} needs a multiple of {together} devices{where}, and there are {count // groups}")
        outer = count // together
        shared = {"data": groups, "fsdp": outer // groups} if "fsdp" in name else {"data": outer}
        mesh = MeshConfig(**shared, **inner, strategy=name)
    train = dataclasses.replace(config.train, batch=round(batch * count), remat=remat)
    return dataclasses.replace(config, mesh=mesh, train=train)


def _frozen(config: Config, layout: Layout) -> tuple[Any, Constants]:
    """The autoencoder's parameters and the network's constants, whole on each device."""
    empty = jnp.zeros((1, config.data.size, config.data.size, 3))
    autoencoder = nn.meta.unbox(jax.eval_shape(make_autoencoder(config.autoencoder).init, jax.random.key(0), empty)["params"])
    height, width, _ = config.latent_shape
    *_, constants = abstract_inputs(config.model, batch=1, frames=1, history=0, height=height, width=width)
    return _on(layout.whole, (autoencoder, constants))


def _batch(config: Config, layout: Layout) -> Batch:
    data = config.data
    frames = lambda *lead: jax.ShapeDtypeStruct((config.train.batch, *lead, data.size, data.size, 3), np.uint8, sharding=layout.batch)
    return Batch(target=frames(data.frames), history=frames(data.history), source=frames(), driving=frames(data.frames))


def _on(where: Any, tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree)


def _held(parts: dict[str, Any]) -> dict[str, int]:
    """Bytes on one device of each part's shards."""
    of = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return {name: sum(of(leaf) for leaf in jax.tree.leaves(part)) for name, part in parts.items()}
