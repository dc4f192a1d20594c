"""The mesh, and how each named strategy lays arrays over it.

Models name the axes of their parameters; a strategy is one table from those names to mesh axes. A name without a row is an
error, and so is an array that a row cannot divide: nothing is replicated silently.

Mesh axes: `data` (whole copies of the model), `fsdp` (parameters in shares, gathered layer by layer), `context` (frames),
`tensor` (heads and MLP columns).
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from svdp_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "context", "tensor")
BATCH = ("data", "fsdp")  # samples are spread over both: with fsdp, devices share parameters, not work

_WHOLE = {
    "layers": None,  # scanned: each step of the loop needs one layer, whole
    "embed": None,
    "qkv": None,  # queries, keys and values stay together, so that a device has all three of its heads
    "heads": None,
    "head_size": None,
    "mlp": None,
    "chunks": None,
    "modulation": None,
    "hidden": None,
    "patch": None,  # patch, time, text and pooled are small inputs
    "time": None,
    "text": None,
    "pooled": None,
}
STRATEGIES: dict[str, dict[str, str | None]] = {
    # Every device holds everything; only gradients travel. Fits small models.
    "dp": _WHOLE,
    # Each matrix is split along the width, which every one of them has.
    "fsdp": _WHOLE | {"embed": "fsdp"},
    # Besides, each device has some heads and some MLP columns: one reduction after attention and one after the MLP.
    "fsdp_tensor": _WHOLE | {"embed": "fsdp", "heads": "tensor", "mlp": "tensor"},
}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of a config; raises ConfigError if its sizes do not make up the number of devices."""
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(len(devices) // -math.prod(sizes), 1)  # the product of the others, but for the sign
    product = math.prod(sizes)
    if product != len(devices):
        shape = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ConfigError(f"mesh {shape} is for {product} devices, but there are {len(devices)}; set mesh.data=-1, or sizes whose product is {len(devices)}")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def shardings_of(tree: Any, mesh: Mesh, strategy: str) -> Any:
    """The sharding of every array of a tree; boxed arrays (see `flax.linen.meta`) by their names, others whole."""

    def sharding(path, leaf):
        names = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else (None,) * leaf.ndim
        shape = leaf.value.shape if isinstance(leaf, nn.LogicallyPartitioned) else leaf.shape
        return _sharding(jax.tree_util.keystr(path), names, shape, mesh, strategy)

    return jax.tree_util.tree_map_with_path(sharding, tree, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def _sharding(where: str, names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, strategy: str) -> NamedSharding:
    table = STRATEGIES[strategy]
    spec = []
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in table:
            raise ConfigError(f"strategy {strategy} has no rule for the axis {name!r} of {where}; it knows {', '.join(table)}")
        axis = None if name is None else table[name]
        if axis is not None and size % mesh.shape[axis]:
            raise ConfigError(f"axis {name!r} of {where} has {size} entries, which mesh.{axis}={mesh.shape[axis]} does not divide")
        spec.append(axis)
    return NamedSharding(mesh, PartitionSpec(*spec))


def batch_sharding(mesh: Mesh, samples: int) -> NamedSharding:
    """Samples over devices; every array of a batch has them as its first axis. ConfigError if they do not divide."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if samples % devices:
        raise ConfigError(f"train.batch={samples} must be a multiple of mesh.data x mesh.fsdp = {devices}")
    return NamedSharding(mesh, PartitionSpec(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())
