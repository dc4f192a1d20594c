"""The plan for GPUs and TPUs, by their own compilers: what is sent, computed and held is what theory says. Skipped where a compiler is not installed."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from svdp_jax import train_state
from svdp_jax.config import AutoencoderConfig, Config, ConfigError, DataConfig, ModelConfig, TrainConfig, to_dict
from svdp_jax.models import flops
from svdp_jax.models.transformer import computing_type
from svdp_jax.plan import rows, targets

DEVICES = 8
SMALL = Config(  # many layers of some width, so that what stands around them is little
    model=ModelConfig(width=256, heads=4, depth=9, dual_blocks=0, text_tokens=8, text_width=8, pooled_width=8),
    autoencoder=AutoencoderConfig(kind="linear", patch=8, scale=1.0, shift=0.0),
    data=DataConfig(size=64, frames=2, history=1),
    train=TrainConfig(remat="full"),
)
TARGETS = ["h100x8", "v5p:2x2x2"]
STRATEGIES = [pytest.param("dp", marks=pytest.mark.slow), "fsdp"]


def installed(name):
    """The target, where its compiler is here."""
    target = targets.parse(name)
    try:
        targets.check_installed(target)
    except ConfigError as missing:
        pytest.skip(str(missing))
    return target


@functools.cache
def row(name, strategy):
    target = installed(name)
    ((found, _),) = rows.fill([rows.Request(SMALL, target, strategy, "train", 1, "full")], limits=rows.Limits(), directory=CACHE)
    assert "reason" not in found, found["reason"]
    return found


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    global CACHE
    CACHE = tmp_path_factory.mktemp("plan")


def parameters():
    """(path, shape) of each."""
    return [([entry.key for entry in path], path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(train_state.abstract_params(SMALL))]


def sent(row, *kinds, dtype="bf16"):
    return sum(found["bytes"] for found in row["collectives"] if found["kind"] in kinds and found["dtype"] == dtype)


@pytest.mark.parametrize("name", TARGETS)
def test_fsdp_gathers_matrices_once_more_where_layers_are_computed_again_and_reduces_their_gradients_once(name):
    found, model = row(name, "fsdp"), SMALL.model
    kernels = [(keys, leaf.size) for keys, _, leaf in parameters() if keys[-1] == "kernel" and not any("modulation" in key for key in keys)]
    scanned, last = (2 * sum(size for keys, size in kernels if keys[0] == name) for name in ("plain", "last"))  # bytes in bfloat16
    matrices = scanned + last
    chunks, clocks = 3 + 6 + 6, 2  # modulations stay in shares: their partial sums travel, of each sample and for both clocks, and again where a layer is computed again
    partial_sums = 2 * model.depth * chunks * model.width * DEVICES * clocks * 2
    assert sent(found, "all-gather") == pytest.approx(2 * scanned + last, rel=0.05)  # the last layer is not computed again
    assert sent(found, "all-gather", dtype="f32") < 0.01 * matrices
    assert sent(found, "reduce-scatter", "all-reduce") == pytest.approx(matrices + partial_sums, rel=0.05)
    assert {axis for collective in found["collectives"] for axis in collective["axes"]} == {"fsdp"}
    if name.startswith("h"):  # on TPUs the compiler reduces a layer's gradients together and has each device keep its share
        assert sent(found, "reduce-scatter") > 0.95 * matrices


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_dp_reduces_gradients_and_nothing_else(name):
    found = row(name, "dp")
    gradients = sum(leaf.size * (2 if computing_type(SMALL.model, path) == "bfloat16" else 4) for _, path, leaf in parameters())
    assert sum(sent(found, "all-reduce", dtype=dtype) for dtype in ("bf16", "f32")) == pytest.approx(gradients, rel=0.05)
    assert {collective["kind"] for collective in found["collectives"]} == {"all-reduce"}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", TARGETS)
def test_operations_and_arguments_are_the_counted_ones(name, strategy):
    found, data = row(name, strategy), SMALL.data
    shape = {"frames": data.frames, "history": data.history, "tokens": SMALL.grid**2, "level": 3}
    forward = lambda depth: flops.forward(dataclasses.replace(SMALL.model, depth=depth), **shape).total
    again = forward(SMALL.model.depth) - forward(1)  # of all layers but the last, by rematerialisation
    encoded = (2 * data.frames + 1 + data.history) * flops.encode(SMALL.autoencoder, data.size).total
    assert found["flops"] == pytest.approx(3 * forward(SMALL.model.depth) + again + encoded, rel=0.02)
    memory = found["memory"]
    shards = sum(memory[name] for name in ("parameters", "optimizer", "ema", "batch", "autoencoder", "constants"))
    assert memory["arguments"] == pytest.approx(shards + memory.get("padding", 0), rel=0.01)
    assert ("padding" in memory) == name.startswith("v") and memory.get("padding", 0) >= 0, "TPUs hold whole tiles of 8 x 128"
    assert found["fits"] and math.isclose(memory["total"], memory["arguments"] + memory["temporaries"])


WHOLE = """
import json, os, pathlib, sys
from svdp_jax.config import Config, from_dict
from svdp_jax.plan import compiler, costs, programs, targets

target = targets.parse(sys.argv[1])
config = programs.config_for(from_dict(Config, json.load(sys.stdin)), "fsdp", count=target.count, groups=target.groups, program="train", batch=1, remat="full")
program = programs.lower_train(config, targets.devices(target), target.platform)
compiled = program.lowered.compile()
whole, half = compiler.of_machine_code(compiled), compiler.optimise(program.lowered, pathlib.Path(sys.argv[2]))
read = [costs.of(found.text, program.mesh, target.device) for found in (whole, half)]
memory = {"whole": whole[1:], "half": half[1:], "peak": compiled.memory_analysis().peak_memory_in_bytes}
print(json.dumps({"same": read[0] == read[1], "flops": read[0].flops, **memory}), flush=True)
os._exit(0)  # where one compiler is still at work
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_a_program_compiled_to_its_end_costs_and_holds_the_same(name, tmp_path):
    target = installed(name)
    environment = os.environ | targets.environment(target) | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    command = [sys.executable, "-c", WHOLE, name, str(tmp_path)]
    found = json.loads(subprocess.run(command, input=json.dumps(to_dict(SMALL)), env=environment, text=True, capture_output=True, check=True).stdout.splitlines()[-1])
    assert found["same"] and found["flops"] > 1e9 and list(tmp_path.glob("*buffer-assignment.txt"))
    assert found["half"][0] == found["whole"][0]
    if target.platform == "cuda":
        assert found["half"] == found["whole"]
    else:  # what is held at once is less than what has a place, and `temp_size_in_bytes` of an executable more
        assert found["peak"] <= sum(found["half"]) <= sum(found["whole"])
