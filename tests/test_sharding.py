"""Every array has a place under every strategy, what does not fit is named, and where arrays lie changes no result."""

import functools
import math
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from svdp_jax import sharding, train_state
from svdp_jax.config import Config, ConfigError, MeshConfig, load_config
from svdp_jax.sharding import Layout

MESHES = {
    "dp": (8, 1, 1, 1),
    "fsdp": (2, 4, 1, 1),
    "fsdp_tensor": (1, 4, 1, 2),
    "fsdp_context": (1, 4, 2, 1),
    "fsdp_context_tensor": (1, 2, 2, 2),
}


def layout(strategy, sizes=None):
    return Layout(AbstractMesh(sizes or MESHES[strategy], sharding.AXES), strategy)


@functools.cache
def abstract_state(name):
    """Shapes and axis names of a run's whole state: the paper's, or the tests'."""
    config = Config() if name == "full" else load_config("configs/tiny.py")
    return jax.eval_shape(lambda: train_state.new_state(config, jax.random.key(0)))


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
    placed = sharding.shardings_of(state, layout(strategy))
    spread = sum(any(place.spec) for place in jax.tree.leaves(placed.params))
    assert spread == 0 if strategy == "dp" else spread > len(jax.tree.leaves(placed.params)) / 2
    assert placed.ema == placed.params
    assert placed.opt_state[1].mu == placed.opt_state[1].nu == placed.params


@pytest.mark.parametrize(("strategy", "share"), [("dp", 1), ("fsdp", 1 / 4), ("fsdp_tensor", 1 / 8), ("fsdp_context", 1 / 4), ("fsdp_context_tensor", 1 / 4)])
def test_each_device_holds_its_share_of_the_papers_state(strategy, share):
    """Of eight devices, as MESHES has them. A part that few parameters make up stays whole."""
    state = abstract_state("full")
    places = jax.tree.leaves(sharding.shardings_of(state, layout(strategy)))
    sizes = [(leaf.size, math.prod(place.shard_shape(leaf.shape))) for leaf, place in zip(jax.tree.leaves(nn.meta.unbox(state)), places, strict=True)]
    assert sum(held for _, held in sizes) / sum(size for size, _ in sizes) == pytest.approx(share, rel=0.03)


def test_names_become_the_mesh_axes_of_the_strategy():
    tree = boxed((3, 8, 16), "layers", "embed", "mlp")
    spec = lambda strategy: sharding.shardings_of(tree, layout(strategy))["kernel"].spec
    assert spec("dp") == PartitionSpec(None, None, None)
    assert spec("fsdp") == spec("fsdp_context") == PartitionSpec(None, "fsdp", None)
    assert spec("fsdp_tensor") == spec("fsdp_context_tensor") == PartitionSpec(None, "fsdp", "tensor")
    attention = boxed((8, 3, 4, 16), "embed", "qkv", "heads", "head_size")
    assert sharding.shardings_of(attention, layout("fsdp_tensor"))["kernel"].spec == PartitionSpec("fsdp", None, "tensor", None)


def test_strategies_differ_by_the_axes_in_their_names():
    whole = sharding.STRATEGIES["dp"]
    for name, table in sharding.STRATEGIES.items():
        assert table.keys() == whole.keys(), name
        assert {axis for row, axis in table.items() if axis != whole[row]} == set(name.split("_")) - {"dp"}, name


def test_activations_lie_by_their_names_too():
    names = ("batch", "frames", "tokens", "heads", "head_size")
    assert layout("fsdp").spec(*names) == PartitionSpec(("data", "fsdp"), None, None, None, None)
    assert layout("fsdp_context_tensor").spec(*names) == PartitionSpec(("data", "fsdp"), "context", None, "tensor", None)
    assert layout("fsdp_context").size("batch") == 4 and layout("fsdp_context").size("frames") == 2


def test_a_name_without_a_rule_is_an_error():
    with pytest.raises(ConfigError, match="strategy fsdp has no rule for the axis 'colour' of .*kernel"):
        sharding.shardings_of(boxed((8, 8), "embed", "colour"), layout("fsdp"))
    with pytest.raises(ConfigError, match="no rule for the axis 'colour' of an activation"):
        layout("fsdp").constrain(jnp.zeros((8, 8)), "batch", "colour")


def test_a_size_that_does_not_divide_is_an_error():
    with pytest.raises(ConfigError, match=r"axis 'embed' of .*kernel.* has 6 entries, which mesh\.fsdp=4"):
        sharding.shardings_of(boxed((6,), "embed"), layout("fsdp"))
    with pytest.raises(ConfigError, match=r"axis 'batch' of an activation has 6 entries, which mesh\.data=2 x mesh\.fsdp=4 does not divide"):
        layout("fsdp").constrain(jnp.zeros((6, 8)), "batch", "width")


# ------------------------------------------------------------------------------------------------------------------- mesh


def devices(count, *, platform="gpu", slices=1, hosts=1):
    """Stand-ins for devices: as many in each slice and host, one after the other."""
    return [
        types.SimpleNamespace(
            id=number, platform=platform, device_kind=platform, slice_index=number * slices // count, process_index=number * hosts // count, coords=None
        )
        for number in range(count)
    ]


@pytest.fixture
def mesh_shape(monkeypatch):
    """mesh_shape(config, devices): sizes of the mesh that would be made."""
    monkeypatch.setattr(sharding, "Mesh", lambda grid, axes, axis_types: grid.shape)
    return sharding.make_mesh


@pytest.mark.parametrize(
    "config, sizes",
    [
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(fsdp=2), (4, 2, 1, 1)),
        (MeshConfig(data=2, tensor=-1), (2, 1, 1, 4)),
        (MeshConfig(data=1, fsdp=8), (1, 8, 1, 1)),
        (MeshConfig(data=1, fsdp=2, context=-1), (1, 2, 4, 1)),
    ],
)
def test_minus_one_takes_what_is_left(config, sizes, mesh_shape):
    assert mesh_shape(config, devices(8)) == sizes


@pytest.mark.parametrize("config", [MeshConfig(data=3), MeshConfig(fsdp=3), MeshConfig(fsdp=16), MeshConfig(data=2, fsdp=2)])
def test_a_mesh_for_another_number_of_devices_is_an_error(config):
    with pytest.raises(ConfigError, match="but there are 8; set mesh.data=-1"):
        sharding.make_mesh(config, devices(8))


@pytest.mark.parametrize(
    ("sizes", "of", "place"),
    [
        ((4, 2, 1, 1), {"slices": 2}, "slice_index"),
        ((2, 1, 2, 2), {"slices": 2}, "slice_index"),
        ((8, 1, 1, 1), {"slices": 4}, "slice_index"),
        ((2, 4, 1, 1), {"platform": "cpu", "hosts": 2}, "process_index"),
    ],
)
def test_only_the_outer_part_of_data_crosses_slices(sizes, of, place):
    found = devices(8, **of)
    grid = sharding.device_grid(sizes, found[::2] + found[1::2])  # in whatever order they come
    groups = np.vectorize(lambda device: getattr(device, place))(grid)
    assert sorted(device.id for device in grid.flat) == list(range(8))
    assert (groups == groups[:, :1, :1, :1]).all(), "fsdp, context and tensor stay within a slice"
    count = max(of.get("slices", 1), of.get("hosts", 1))
    assert (groups[:, 0, 0, 0] == np.repeat(np.arange(count), sizes[0] // count)).all(), "and so does the inner part of data"


def test_a_mesh_that_would_cross_slices_otherwise_is_an_error():
    with pytest.raises(ConfigError, match="mesh.data=1 must be a multiple of the 2 slices or hosts"):
        sharding.device_grid((1, 8, 1, 1), devices(8, slices=2))


def test_an_axis_of_a_tpus_torus_may_be_divided():
    tpu = lambda number: types.SimpleNamespace(
        id=number, platform="tpu", device_kind="TPU v5 lite", slice_index=0, process_index=0, coords=(number % 16, number // 16, 0), core_on_chip=0
    )
    grid = sharding.device_grid((1, 64, 4, 1), [tpu(number) for number in range(256)])
    assert grid.shape == (1, 64, 4, 1) and len({device.id for device in grid.flat}) == 256
    for group in grid.reshape(64, 4):
        reach = np.ptp([device.coords for device in group], axis=0)
        assert reach.sum() == 3 or sorted(reach) == [0, 1, 1], "neighbours share the frames of a sample"


def test_gpus_of_several_hosts_in_one_slice_are_one_group():
    grid = sharding.device_grid((1, 8, 1, 1), devices(8, hosts=8))  # a process per GPU, all in one NVLink domain
    assert [device.id for device in grid.flat] == list(range(8))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MeshConfig(context=2), "mesh.context=2: mesh.strategy=dp shares nothing over it; fsdp_context, fsdp_context_tensor do, or use mesh.data"),
        (MeshConfig(fsdp=2), "mesh.fsdp=2: mesh.strategy=dp shares nothing over it; fsdp, fsdp_tensor, fsdp_context, fsdp_context_tensor do"),
        (MeshConfig(tensor=2, strategy="fsdp"), "mesh.tensor=2: mesh.strategy=fsdp shares nothing over it"),
    ],
)
def test_an_axis_over_which_devices_would_do_the_same_is_an_error(config, said, monkeypatch):
    sizes = (1, config.fsdp, config.context, config.tensor)
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: AbstractMesh(sizes, sharding.AXES))
    with pytest.raises(ConfigError, match=said):
        sharding.make_layout(config)
    sharding.make_layout(MeshConfig(*sizes, strategy="fsdp_context_tensor"))


def test_a_batch_that_does_not_divide_is_an_error():
    with pytest.raises(ConfigError, match=r"train.batch=12 must be a multiple of mesh.data x mesh.fsdp = 8"):
        sharding.check_batch(layout("fsdp"), 12, accumulation=1)
    with pytest.raises(ConfigError, match=r"train.batch=24 must be a multiple of mesh.data x mesh.fsdp x train.accumulation = 16"):
        sharding.check_batch(layout("fsdp"), 24, accumulation=2)
    sharding.check_batch(layout("fsdp"), 16, accumulation=2)
    assert layout("fsdp").batch.spec == PartitionSpec(("data", "fsdp"))


# ---------------------------------------------------------------------------------------------------------- eight devices


SMALL = "fsdp_context_tensor/2"  # all that is new about any of them
STRATEGIES = ["dp", "fsdp", "fsdp_tensor", "fsdp_context", "fsdp_context_tensor", "gather"]
CASES = STRATEGIES + [f"{name}/2" for name in STRATEGIES]


@pytest.fixture(scope="session")
def all_on_eight(eight_devices):
    return eight_devices(*CASES)


@pytest.fixture(scope="session")
def few_on_eight(eight_devices):
    return eight_devices(SMALL)


def test_a_gradient_is_the_same_wherever_arrays_lie(few_on_eight):
    case = few_on_eight[SMALL]
    assert case["losses"] < 1e-5 and case["gradient"][0] <= 1e-5, "relative L2 of each leaf"
    assert not case["misplaced"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_steps_are_the_same_wherever_arrays_lie(all_on_eight, name):
    case = all_on_eight[name]
    print({key: value for key, value in case.items() if key != "restored"})
    assert case["losses"] < 1e-5
    assert case["gradient"][0] <= 1e-5, "relative L2 of each leaf"
    assert case["params"][0] <= 1e-3 and case["ema"][0] <= 1e-3, "of the way a leaf has gone, after three steps"
    assert not case["misplaced"], "every array lies as its rules say"


@pytest.mark.slow
def test_a_collective_that_is_missing_is_found(all_on_eight):
    assert all_on_eight["mutant"][0] > 1e-2


def test_within_a_frame_nothing_travels_and_across_frames_heads_do(few_on_eight):
    found = few_on_eight["collectives"]["4 heads"]
    assert found["dual"] == [] and found["temporal"] == ["all-to-all"]
    assert found["dual, without shard_map"], "XLA merges samples and frames, for which it gathers them"
    assert few_on_eight["collectives"]["2 heads"] == ["all-gather"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dual", "plain", "last"])
def test_within_a_frame_nothing_travels_in_any_block(all_on_eight, kind):
    assert all_on_eight["collectives"]["4 heads"][kind] == []
    assert all_on_eight["collectives"]["4 heads"][f"{kind}, without shard_map"]


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_state_comes_back_on_any_mesh(all_on_eight, name):
    restored = all_on_eight[name]["restored"]
    assert set(restored) == {"one", *STRATEGIES}
    for target, facts in restored.items():
        assert facts["apart"][0] == 0 and facts["step"] == 3 and facts["placed"], target
