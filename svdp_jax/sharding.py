"""The mesh, and how each named strategy lays arrays over it.

Models name the axes of their parameters and of their activations; a strategy is one table from those names to mesh axes. A name
without a row is an error, and so is an array that a row cannot divide: nothing is replicated silently.

Mesh axes: `data` (whole copies of the model), `fsdp` (parameters in shares, gathered layer by layer), `context` (frames),
`tensor` (heads and MLP columns). Only the outer part of `data` crosses the network between slices or hosts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from svdp_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "context", "tensor")
BATCH = ("data", "fsdp")  # samples are spread over both: with fsdp, devices share parameters, not work

Rule = str | tuple[str, ...] | None  # mesh axes of one axis of an array

_WHOLE: dict[str, Rule] = {
    # Axes of parameters.
    "layers": None,  # scanned: each step of the loop needs one layer, whole
    "embed": None,  # the width, which every matrix has; strategies that share parameters do it here
    "qkv": None,  # queries, keys and values stay together, so that a device has all three of its heads
    "heads": None,  # of parameters and of what attention sees: a head is independent of the others until the output
    "head_size": None,  # the sum of every score
    "mlp": None,  # columns of the MLP, independent of each other between its two matrices
    "chunks": None,  # shift, scale, gate, ...: a few, used one by one
    "modulation": None,  # columns of a modulation: 37% of all parameters, and next to no work
    "hidden": None,  # the middle of the small embeddings
    "patch": None,  # inputs and outputs of a few values: patch, time, text, pooled
    "time": None,
    "text": None,
    "pooled": None,
    # Axes of batches and activations.
    "batch": BATCH,  # samples are independent but for the gradient
    "frames": None,  # of z, source, driving and history
    "tokens": None,  # of a frame: attention within a frame needs them all
    "width": None,  # norms need it whole
}
_TENSOR: dict[str, Rule] = {"heads": "tensor", "mlp": "tensor", "modulation": "tensor"}
STRATEGIES: dict[str, dict[str, Rule]] = {
    # Every device holds everything; only gradients travel. Fits small models.
    "dp": _WHOLE,
    # Each matrix is split along the width, which every one of them has, and gathered when its layer's turn comes.
    "fsdp": _WHOLE | {"embed": "fsdp"},
    # Besides, each device has some heads and some MLP columns: one reduction after attention and one after the MLP. And some columns of
    # modulations, of which a row per sample travels.
    "fsdp_tensor": _WHOLE | {"embed": "fsdp", **_TENSOR},
    # Each device has some frames of a sample. Within a frame nothing travels; across frames, attention exchanges frames for heads.
    # Parameters are not shared over `context`, so that at fsdp=1 nothing but that exchange and the gradients travels.
    "fsdp_context": _WHOLE | {"embed": "fsdp", "frames": "context"},
    # All of it: for samples that are too large for one device even with few frames.
    "fsdp_context_tensor": _WHOLE | {"embed": "fsdp", "frames": "context", **_TENSOR},
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the strategy by which arrays lie on it. Hashable: a static argument, and an attribute of modules."""

    mesh: Mesh
    strategy: str

    def spec(self, *names: str | None) -> PartitionSpec:
        """Mesh axes of an array whose axes have these names; None is an axis that stays whole. ConfigError for a name without a rule."""
        return PartitionSpec(*(self._rule(name, "an array") for name in names))

    def sharding(self, *names: str | None) -> NamedSharding:
        """The same with the mesh."""
        return NamedSharding(self.mesh, self.spec(*names))

    def constrain(self, x: Array, *names: str | None) -> Array:
        """`x`, which is to lie as its names say. ConfigError where that does not divide it."""
        return jax.lax.with_sharding_constraint(x, self.of("an activation", names, x.shape))

    def in_use(self, tree: Any, names: Any) -> Any:
        """Parameters in use: matrices whose shares over `fsdp` are gathered, here and once for all who use them, and whose gradient, when all of it is
        there, is reduced into shares. `names` are a tree of their axes. Modulations stay in shares: a vector goes through them, and sending partial sums
        of it is less than sending them."""

        def of(names: tuple[str | None, ...], kernel: Array) -> Array:
            rules = [self._rule(name, "a matrix") for name in names]
            if "fsdp" not in rules or len(names) == 1 or "chunks" in names:
                return kernel
            whole = PartitionSpec(*(None if rule == "fsdp" else rule for rule in rules))
            return _whole(NamedSharding(self.mesh, whole), self.sharding(*names), kernel)

        return jax.tree.map(of, names, tree, is_leaf=lambda leaf: isinstance(leaf, tuple))

    def of(self, where: str, names: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
        """The sharding of the array `where`. ConfigError, naming it, for a name without a rule and for a size that does not divide."""
        for name, size in zip(names, shape, strict=True):
            devices = math.prod(self.mesh.shape[axis] for axis in _axes(self._rule(name, where)))
            if size % devices:
                axes = " x ".join(f"mesh.{axis}={self.mesh.shape[axis]}" for axis in _axes(self._rule(name, where)))
                raise ConfigError(f"axis {name!r} of {where} has {size} entries, which {axes} does not divide")
        return NamedSharding(self.mesh, PartitionSpec(*(self._rule(name, where) for name in names)))

    def _rule(self, name: str | None, where: str) -> Rule:
        table = STRATEGIES[self.strategy]
        if name is not None and name not in table:
            raise ConfigError(f"strategy {self.strategy} has no rule for the axis {name!r} of {where}; it knows {', '.join(table)}")
        return None if name is None else table[name]

    def size(self, name: str) -> int:
        """Devices that share this axis."""
        return math.prod(self.mesh.shape[axis] for axis in _axes(self._rule(name, "an array")))

    @property
    def batch(self) -> NamedSharding:
        """Of arrays whose first axis is samples, and the others whole."""
        return self.sharding("batch")

    @property
    def whole(self) -> NamedSharding:
        """The whole array on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def each(self) -> NamedSharding:
        """Of an array with an entry for each device."""
        return NamedSharding(self.mesh, PartitionSpec(AXES))

    def rows(self, samples: int) -> list[int]:
        """Which samples of a batch this process's devices need."""
        parts = self.batch.addressable_devices_indices_map((samples,)).values()
        return sorted({row for (part,) in parts for row in range(*part.indices(samples))})

    def place(self, local: np.ndarray, rows: Sequence[int], samples: int) -> Array:
        """An array of the whole batch, of which this process has `rows`."""
        first = {row: place for place, row in enumerate(rows)}

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(samples)
            return local[first[start] : first[start] + stop - start]

        return jax.make_array_from_callback((samples, *local.shape[1:]), self.batch, part)

    def replicate(self, tree: Any) -> Any:
        """A tree that is the same in all processes, whole on every device."""
        one = lambda leaf: jax.make_array_from_callback(np.shape(leaf), self.whole, lambda index: np.asarray(leaf)[index])
        return jax.tree.map(one, tree)

    def votes(self, vote: bool) -> Array:
        """For each device of the mesh whether its process votes for something."""
        return jax.make_array_from_callback((self.mesh.size,), self.each, lambda _: np.full(1, vote, np.int32))

    def per_frame(self, function: Callable[..., Array]) -> Callable[..., Array]:
        """`function` of arrays [B,F,...], which treats frames alike and merges the two axes: each device does its own frames of its own samples."""

        def apply(*arrays: Array) -> Array:
            count = arrays[0].shape[1]
            extra = -count % self.size("frames")
            padded = [jnp.pad(x, ((0, 0), (0, extra), *[(0, 0)] * (x.ndim - 2))) for x in arrays]
            spec = self.spec("batch", "frames")
            return jax.shard_map(function, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False)(*padded)[:, :count]

        return apply


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _whole(whole: NamedSharding, shares: NamedSharding, kernel: Array) -> Array:
    in_shares = jax.lax.with_sharding_constraint(kernel, shares)  # in this type: else what it was cast from could be gathered
    return jax.lax.with_sharding_constraint(in_shares, whole)


# Left to itself, the gradient of a constraint has the same constraint: every device would reduce all of it.
_whole.defvjp(
    lambda whole, shares, kernel: (_whole(whole, shares, kernel), None),
    lambda whole, shares, _, gradient: (jax.lax.with_sharding_constraint(gradient, shares),),
)


def _axes(rule: Rule) -> tuple[str, ...]:
    return () if rule is None else (rule,) if isinstance(rule, str) else rule


def make_layout(config: MeshConfig, devices: list[jax.Device] | None = None) -> Layout:
    """The mesh of a config, with its strategy. ConfigError if its sizes do not make up the number of devices, or an axis has several that would do the same."""
    layout = Layout(make_mesh(config, devices), config.strategy)
    shares = {strategy: {axis for name, rule in table.items() if name != "batch" for axis in _axes(rule)} for strategy, table in STRATEGIES.items()}
    for axis in AXES[1:]:
        if layout.mesh.shape[axis] > 1 and axis not in shares[config.strategy]:
            knowing = ", ".join(strategy for strategy, axes in shares.items() if axis in axes)
            raise ConfigError(f"mesh.{axis}={layout.mesh.shape[axis]}: mesh.strategy={config.strategy} shares nothing over it; {knowing} do, or use mesh.data")
    return layout


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
    return Mesh(device_grid(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def device_grid(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices in the shape `sizes` (data, fsdp, context, tensor), neighbours in the fast network where they talk most.

    Where devices are in several slices (TPU slices; hosts, where XLA knows them as such), only the outer part of `data` is in different
    ones. ConfigError where that does not divide."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    hosts = len({device.process_index for device in devices})
    by_host = slices == 1 and hosts > 1 and devices[0].platform == "cpu"
    groups = hosts if by_host else slices
    if groups == 1:
        return _placed(mesh_utils.create_device_mesh, sizes, devices)
    if sizes[0] % groups:
        raise ConfigError(f"mesh.data={sizes[0]} must be a multiple of the {groups} slices or hosts: between them, only `data` crosses the slow network")
    inner = (sizes[0] // groups, *sizes[1:])
    return _placed(mesh_utils.create_hybrid_device_mesh, inner, (groups, 1, 1, 1), devices, process_is_granule=by_host)


def _placed(create: Callable[..., np.ndarray], *arguments: Any, **options: Any) -> np.ndarray:
    """A mesh whose axes are whole axes of a TPU's torus, or, where their sizes are no products of those, as context=4 on 16x16, parts of them."""
    try:
        return create(*arguments, **options)
    except NotImplementedError:
        return create(*arguments, **options, allow_split_physical_axes=True)


def shardings_of(tree: Any, layout: Layout) -> Any:
    """The sharding of every array of a tree; boxed arrays (see `flax.linen.meta`) by their names, others whole."""

    def sharding(path, leaf):
        if isinstance(leaf, nn.LogicallyPartitioned):
            return layout.of(jax.tree_util.keystr(path), leaf.names, leaf.value.shape)
        return layout.whole

    return jax.tree_util.tree_map_with_path(sharding, tree, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes of a tree whose arrays may be boxed, with their shardings: what a checkpoint is restored into."""
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), nn.meta.unbox(tree), shardings)


def check_frames(layout: Layout, frames: int) -> None:
    """ConfigError unless those who share the frames of a window have as many each: where mesh.context is -1, the config could not know."""
    if frames % layout.size("frames"):
        raise ConfigError(f"data.frames={frames} must be a multiple of the {layout.size('frames')} devices along mesh.context")


def check_batch(layout: Layout, samples: int, *, accumulation: int) -> None:
    """ConfigError unless every device has as many samples as the others, in each part of a step."""
    devices = layout.size("batch")
    if samples % (devices * accumulation):
        what = f"mesh.data x mesh.fsdp{' x train.accumulation' if accumulation > 1 else ''} = {devices * accumulation}"
        raise ConfigError(f"train.batch={samples} must be a multiple of {what}")
