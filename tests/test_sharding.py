"""Every array has a place under every strategy, what does not fit is named, and where arrays lie changes no result."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from svdp_jax import sharding, train_state
from svdp_jax.config import Config, ConfigError, MeshConfig, load_config

MESHES = {"dp": (8, 1, 1, 1), "fsdp": (2, 4, 1, 1), "fsdp_tensor": (1, 4, 1, 2)}


@functools.cache
def abstract_state(name):
    """Shapes and axis names of a run's whole state: the paper's, or the tests'."""
    config = Config() if name == "full" else load_config("configs/tiny.py")
    return jax.eval_shape(lambda: train_state.init_state(config, train_state.init_params(config, jax.random.key(0))))


def boxed(array, *names):
    return {"kernel": nn.LogicallyPartitioned(jax.ShapeDtypeStruct(array, jnp.float32), names)}


@pytest.mark.parametrize("strategy", sharding.STRATEGIES)
@pytest.mark.parametrize("name", ["full", "tiny"])
def test_every_array_of_the_state_has_a_place(name, strategy):
    state = abstract_state(name)
    is_boxed = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_boxed):
        where = jax.tree_util.keystr(path)
        if not is_boxed(leaf):
            assert leaf.ndim == 0, f"{where} has no names"  # counts of steps
        else:
            assert len(leaf.names) == leaf.value.ndim, where
            assert None not in leaf.names and set(leaf.names) <= set(sharding.STRATEGIES[strategy]), where
    mesh = AbstractMesh(MESHES[strategy], sharding.AXES)
    placed = sharding.shardings_of(state, mesh, strategy)
    spread = sum(any(place.spec) for place in jax.tree.leaves(placed.params))
    assert spread == 0 if strategy == "dp" else spread > len(jax.tree.leaves(placed.params)) / 2
    assert placed.ema == placed.params
    assert placed.opt_state[1].mu == placed.opt_state[1].nu == placed.params


def test_names_become_the_mesh_axes_of_the_strategy():
    mesh = AbstractMesh((1, 4, 1, 2), sharding.AXES)
    tree = boxed((3, 8, 16), "layers", "embed", "mlp")
    spec = lambda strategy: sharding.shardings_of(tree, mesh, strategy)["kernel"].spec
    assert spec("dp") == PartitionSpec(None, None, None)
    assert spec("fsdp") == PartitionSpec(None, "fsdp", None)
    assert spec("fsdp_tensor") == PartitionSpec(None, "fsdp", "tensor")
    attention = boxed((8, 3, 4, 16), "embed", "qkv", "heads", "head_size")
    assert sharding.shardings_of(attention, mesh, "fsdp_tensor")["kernel"].spec == PartitionSpec("fsdp", None, "tensor", None)


def test_a_name_without_a_rule_is_an_error():
    with pytest.raises(ConfigError, match="no rule for the axis 'colour' of .*kernel"):
        sharding.shardings_of(boxed((8, 8), "embed", "colour"), AbstractMesh((1, 4, 1, 2), sharding.AXES), "fsdp")


def test_a_size_that_does_not_divide_is_an_error():
    with pytest.raises(ConfigError, match=r"axis 'embed' of .*kernel.* has 6 entries, which mesh\.fsdp=4"):
        sharding.shardings_of(boxed((6,), "embed"), AbstractMesh((1, 4, 1, 2), sharding.AXES), "fsdp")


@pytest.mark.parametrize(
    "config, sizes",
    [
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(fsdp=2), (4, 2, 1, 1)),
        (MeshConfig(data=2, tensor=-1), (2, 1, 1, 4)),
        (MeshConfig(data=1, fsdp=8), (1, 8, 1, 1)),
    ],
)
def test_minus_one_takes_what_is_left(config, sizes, monkeypatch):
    monkeypatch.setattr(jax, "make_mesh", lambda sizes, axes, **settings: AbstractMesh(sizes, axes))
    assert tuple(sharding.make_mesh(config, devices=[None] * 8).shape.values()) == sizes


@pytest.mark.parametrize("config", [MeshConfig(data=3), MeshConfig(fsdp=3), MeshConfig(fsdp=16), MeshConfig(data=2, fsdp=2)])
def test_a_mesh_for_another_number_of_devices_is_an_error(config):
    with pytest.raises(ConfigError, match="but there are 8; set mesh.data=-1"):
        sharding.make_mesh(config, devices=[None] * 8)


def test_a_batch_that_does_not_divide_is_an_error():
    mesh = AbstractMesh((2, 4, 1, 1), sharding.AXES)
    with pytest.raises(ConfigError, match="train.batch=12 must be a multiple of .* 8"):
        sharding.batch_sharding(mesh, 12)
    assert sharding.batch_sharding(mesh, 16).spec == PartitionSpec(("data", "fsdp"))


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_tensor"])
def test_a_step_is_the_same_wherever_arrays_lie(eight_devices, strategy):
    assert eight_devices["devices"] == 8
    single, spread = eight_devices["single"], eight_devices[strategy]
    assert math.isclose(spread["loss"], single["loss"], rel_tol=1e-5)
    assert math.isclose(spread["grad_norm"], single["grad_norm"], rel_tol=1e-4)
    assert spread["gradient_apart"] < 1e-5
    assert spread["params_apart"] < 2e-5  # of a step of 1e-3


def test_parameters_are_spread_from_birth(eight_devices):
    for strategy, share, kernel in ("fsdp", 1 / 4, [[32, 128], [8, 128]]), ("fsdp_tensor", 1 / 2, [[32, 128], [16, 64]]):
        facts = eight_devices[strategy]
        assert facts["kernel"] == kernel
        assert max(facts["share_born"], facts["share_after"]) < share + 0.1
