"""The plan: targets, rows, and what it says to users."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import jax
import pytest

from svdp_jax.config import ConfigError, load_config, to_dict
from svdp_jax.files import MediaError
from svdp_jax.models import flops
from svdp_jax.plan import __main__ as plan
from svdp_jax.plan import advice, cache, child, picture, programs, rows, targets

ROOT = pathlib.Path(__file__).parents[1]
TINY = ROOT / "configs" / "tiny.py"


@pytest.mark.parametrize(
    ("name", "platform", "count", "groups", "topology"),
    [
        ("v5p:2x2x2", "tpu", 8, 1, "v5p:2x2x2"),
        ("2xv5e:8x8", "tpu", 128, 2, "v5e:8x8"),
        ("h100x1", "cuda", 1, 1, "1x1x1"),
        ("h200x16", "cuda", 16, 2, "2x1x8"),
        ("cpu:8", "cpu", 8, 1, "8"),
    ],
)
def test_a_target_is_read_from_its_name(name, platform, count, groups, topology):
    target = targets.parse(name)
    assert (target.platform, target.count, target.groups, target.topology) == (platform, count, groups, topology)


@pytest.mark.parametrize("name", ["v5p", "v9p:2x2", "h100x12", "h100x0", "cpu:0", "0xv5e:8x8", "a100x8", "v5e:0x4"])
def test_a_target_that_does_not_exist_is_one_line(name):
    with pytest.raises(ConfigError, match=f"--target {name}: there is v5p:2x2x2"):
        targets.parse(name)


# ------------------------------------------------------------------------------------------------------------------- whole rows


def test_the_name_of_a_program_is_that_of_all_that_its_row_depends_on(monkeypatch):
    name = cache.of_program("text", "v5p:2x2x2", {"fsdp": 8}, 1.0)
    assert name == cache.of_program("text", "v5p:2x2x2", {"fsdp": 8}, 1.0)
    assert name not in (cache.of_program("text", "v5p:2x2x2", {"fsdp": 8}, 2.0), cache.of_program("text", "v5p:2x2x1", {"fsdp": 8}, 1.0))
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_something")
    assert name != cache.of_program("text", "v5p:2x2x2", {"fsdp": 8}, 1.0)


@pytest.mark.parametrize(
    ("strategy", "mesh"),
    [
        ("dp", {"data": 8, "fsdp": 1, "context": 1, "tensor": 1}),
        ("fsdp", {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}),
        ("fsdp_context:4", {"data": 2, "fsdp": 1, "context": 4, "tensor": 1}),
        ("fsdp_context_tensor", {"data": 2, "fsdp": 1, "context": 2, "tensor": 2}),
    ],
)
def test_between_two_groups_only_data_travels(strategy, mesh):
    config = programs.config_for(load_config(TINY), strategy, count=8, groups=2, program="train", batch=1, remat="none")
    assert {axis: getattr(config.mesh, axis) for axis in mesh} == mesh and config.train.batch == 8


@pytest.mark.parametrize(
    ("strategy", "count", "groups", "said"),
    [
        ("fsdp_context_tensor", 2, 1, "fsdp_context_tensor needs a multiple of 4 devices, and there are 2"),
        ("fsdp_context", 9, 1, "fsdp_context needs a multiple of 2 devices, and there are 9"),
        ("fsdp_context:16", 16, 2, "fsdp_context:16 needs a multiple of 16 devices in each slice or host, and there are 8"),
    ],
)
def test_devices_that_do_not_make_up_the_inner_axes_are_counted(strategy, count, groups, said):
    with pytest.raises(ConfigError, match=f"^{said}$"):
        programs.config_for(load_config(TINY), strategy, count=count, groups=groups, program="train", batch=1, remat="none")


def test_without_history_its_pass_and_its_share_of_a_step_are_not_planned():
    config = load_config(TINY)
    one = dataclasses.replace(config.model, depth=1, dual_blocks=0)
    config = dataclasses.replace(config, model=one, data=dataclasses.replace(config.data, history=0))
    shape = {"frames": config.data.frames, "history": 0, "tokens": config.grid**2}
    lowered = {}
    for program in programs.LOWER:
        given = programs.config_for(config, "dp", count=1, groups=1, program=program, batch=2, remat="none")
        lowered[program] = programs.LOWER[program](given, jax.devices()[:1], "cpu")
    passes = [flops.forward(config.model, **shape, level=level).total for level in range(3)]
    assert lowered["train"].flops == 3 * 2 * passes[2] and lowered["sample"].flops == sum(passes)


@pytest.mark.parametrize(
    ("said", "fits", "ended"),
    [("RESOURCE_EXHAUSTED: total memory required is 20.00G", False, False), ("INTERNAL: ptxas was not found", None, True)],
)
def test_of_what_a_compiler_complains_of_only_too_little_memory_is_an_answer(monkeypatch, tmp_path, said, fits, ended):
    def complain(*_):
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setitem(programs.LOWER, "train", complain)
    asked = rows.Request(load_config(TINY), targets.parse("cpu:1"), "dp", "train", 1, "none")
    row = child.main({"config": to_dict(asked.config), "directory": str(tmp_path), **asked.named}, tmp_path)
    assert row["fits"] is fits and row.get("ended", False) is ended and said in row["reason"]
    assert row.get("memory", {}).get("needed") == (20 * 2**30 if fits is False else None)


@pytest.fixture(scope="module")
def row(tmp_path_factory):
    """Of the tests' config on four virtual devices; the same again; and once more, as if the code had changed, but not the program."""
    request = rows.Request(load_config(TINY), targets.parse("cpu:4"), "fsdp", "train", 1, "none")
    directory = tmp_path_factory.mktemp("plan")
    (first,) = rows.fill([request], limits=rows.Limits(), directory=directory)
    (again,) = rows.fill([request], limits=rows.Limits(), directory=directory)
    assert not first[1] and again == (first[0], True)
    (kept,) = set(directory.glob("*.json")) - {directory / f"{first[0]['lowered']}.json"}
    kept.unlink()
    ((found, known),) = rows.fill([request], limits=rows.Limits(), directory=directory)
    assert known and found == first[0] | {"lower_seconds": found["lower_seconds"]} and kept.exists()
    return first[0]


def test_arguments_are_the_shards_of_all_leaves(row):
    memory = row["memory"]
    parts = sum(memory[name] for name in ("parameters", "optimizer", "ema", "batch", "autoencoder", "constants"))
    assert memory["arguments"] == pytest.approx(parts, rel=0.01)
    assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], rel=0.01) and memory["ema"] == memory["parameters"]


def test_operations_are_the_counted_ones(row):
    config = load_config(TINY)
    encoded = (2 * config.data.frames + 1 + config.data.history) * flops.encode(config.autoencoder, config.data.size).total
    assert row["flops"] == pytest.approx(row["model_flops"] + encoded, rel=0.02)


def test_fsdp_sends_over_fsdp_alone(row):
    assert {tuple(collective["axes"]) for collective in row["collectives"]} == {("fsdp",)}
    assert {"all-gather", "all-reduce"} <= {collective["kind"] for collective in row["collectives"]}
    assert row["fits"] is None and not row["seconds"], "virtual devices have no limits and no speed"


def test_a_compilation_that_takes_too_long_is_a_row_with_its_reason(tmp_path):
    request = rows.Request(load_config(TINY), targets.parse("cpu:2"), "dp", "train", 1, "none")
    ((row, kept),) = rows.fill([request], limits=rows.Limits(seconds=1), directory=tmp_path)
    assert "ended after 1 s" in row["reason"] and row["fits"] is None and not kept
    assert not list(tmp_path.glob("*.json")), "another time it may have longer"


SPILLS = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
before, after = NamedSharding(mesh, P("data", None, "fsdp")), NamedSharding(mesh, P(None, ("fsdp", "data"), None))
anew = lambda latents: jax.lax.with_sharding_constraint(jnp.sin(latents), after)
jax.jit(anew, in_shardings=before).lower(jax.ShapeDtypeStruct((16, 16, 16), jnp.float32)).compile()
"""


def test_an_array_that_is_gathered_whole_to_be_laid_out_anew_is_named():
    environment = os.environ | targets.environment(targets.parse("cpu:8"))
    said = subprocess.run([sys.executable, "-c", SPILLS], env=environment, check=True, capture_output=True, text=True).stderr
    (warning,) = rows.spilled(said)
    assert re.fullmatch(r"f32\[8,16,4\] of latents, from \{.*\} to \{.*\}", warning)  # how a sharding is written differs between versions of XLA
    assert advice.told(targets.parse("v5e:2x4"), [made_up("fsdp", total=9e9, warnings=[warning])])[1] == f"fsdp: gathered whole on each device, to be laid out anew: {warning}"


def test_whoever_does_not_wait_leaves_no_compiler_behind(tmp_path, monkeypatch):
    begun, start = [], subprocess.Popen
    monkeypatch.setattr(rows.subprocess, "Popen", lambda *arguments, **how: begun.append(start(*arguments, **how)) or begun[-1])
    requests = [rows.Request(load_config(TINY), targets.parse("cpu:3"), name, "train", 1, "none") for name in ("fsdp", "dp", "dp")]
    filled = rows.fill(requests, limits=rows.Limits(), jobs=2, directory=tmp_path)
    assert "does not divide" in next(filled)[0]["reason"]
    closed = time.monotonic()
    filled.close()
    assert time.monotonic() - closed < 3
    assert len(begun) >= 2 and all(process.poll() is not None for process in begun)
    assert len(list(tmp_path.glob("*.json"))) == 1, "of what was ended nothing is kept"


def test_what_cannot_be_laid_out_is_a_row_with_its_reason(tmp_path):
    request = rows.Request(load_config(TINY), targets.parse("cpu:3"), "fsdp", "train", 1, "none")
    ((row, _),) = rows.fill([request], limits=rows.Limits(), directory=tmp_path)
    assert "does not divide" in row["reason"]


def test_where_rows_cannot_be_kept_is_said_before_anything_is_compiled(tmp_path):
    (tmp_path / "file").write_text("no directory")
    request = rows.Request(load_config(TINY), targets.parse("cpu:1"), "dp", "train", 1, "none")
    with pytest.raises(MediaError, match="set XDG_CACHE_HOME to a directory that can be written"):
        next(rows.fill([request], limits=rows.Limits(), directory=tmp_path / "file" / "plan"))


# ------------------------------------------------------------------------------------------------------------------ what is said


def made_up(strategy, *, total, step=1.0, remat="none", **others):
    seconds = {"compute": step, "matrix": step, "memory": step / 2, "interconnect": step / 4, "step": step}
    memory = {"parameters": total / 4, "optimizer": total / 2, "ema": total / 8, "temporaries": total / 8, "total": total}
    limit = targets.DEVICES["v5e"].memory * 1e9
    row = {"target": "v5e:2x4", "strategy": strategy, "remat": remat, "program": "train", "batch": 1, "mesh": {"data": 1, "fsdp": 8}, "limit": limit}
    row |= {"fits": total <= limit, "memory": memory, "seconds": seconds, "flops": 1e14, "mfu": 0.5, "compile_seconds": 9, "collectives": [], "warnings": []}
    return row | others


def test_the_fastest_that_fits_is_best_and_what_does_not_fit_lacks_so_much():
    given = [made_up("dp", total=40e9), made_up("fsdp", total=9e9, step=2.0), made_up("fsdp_tensor", total=8e9, step=1.5)]
    ranked = advice.ranked(given)
    assert [row["strategy"] for row in ranked] == ["fsdp_tensor", "fsdp", "dp"]
    best, lacking = advice.told(targets.parse("v5e:2x4"), ranked)
    assert best == "Best: fsdp_tensor, the shortest step of 2 that fit: 1.500 s, bound by products and memory, 8.9 GB to spare."
    assert lacking == "dp does not fit, by 23.1 GB; fsdp_tensor does."


def test_the_smallest_change_that_fits_is_that_of_rematerialisation():
    given = [made_up("dp", total=40e9), made_up("dp", total=9e9, step=3.0, remat="full"), made_up("fsdp", total=9e9)]
    assert "dp with remat none does not fit, by 23.1 GB; dp with remat full does." in advice.told(targets.parse("v5e:2x4"), advice.ranked(given))


def test_batches_are_compared_by_sample_and_a_smaller_one_is_a_smaller_change_than_another_strategy():
    given = [made_up("fsdp", total=40e9), made_up("fsdp", total=12e9, step=1.0, batch=0.5), made_up("fsdp_context", total=9e9, step=1.5)]
    best, lacking = advice.told(targets.parse("v5e:2x4"), advice.ranked(given))
    assert best.startswith("Best: fsdp_context with 1 per device, the shortest step by sample of 2 that fit: 1.500 s")
    assert lacking == "fsdp with 1 per device does not fit, by 23.1 GB; fsdp with 0.5 per device does."


def test_a_picture_shows_all_rows(tmp_path):
    picture.draw([made_up("dp", total=40e9), made_up("fsdp", total=9e9)], tmp_path / "rows.png")
    assert (tmp_path / "rows.png").stat().st_size > 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["rows.png"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--target", "h100x12"], "h100x12: there is"),
        (["--target", "cpu:2", "--strategies", "zero3"], "--strategies zero3: there is dp, fsdp"),
        (["--target", "cpu:2", "--strategies", "fsdp:4"], "--strategies fsdp:4"),
        (["--target", "cpu:2", "--remat", "some"], "--remat some: there is none, full"),
        (["--target", "cpu:2", "--batch-per-device", "0"], "0 is 0 samples on the 2 devices"),
        (["--target", "cpu:2", "--batch-per-device", "1,0.75"], "0.75 is 1.5 samples on the 2 devices of cpu:2"),
        (["--target", "cpu:2", "--batch-per-device", "all"], "--batch-per-device all must be numbers"),
        (["--target", "cpu:2", "--jobs", "0"], "--jobs 0 must be at least 1"),
        ([], "--target"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_compiled(python, flags, said):
    done = python("-m", "svdp_jax.plan", "--config", TINY, *flags)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and said in done.stderr


@pytest.fixture
def planned(monkeypatch):
    """Runs the command for made-up v5e devices, with flags and the rows that come of it, which no compiler sees: planned(rows, *flags)."""

    def call(found, *flags):
        monkeypatch.setattr(rows, "fill", lambda requests, limits, jobs: ((row, True) for row in found))
        monkeypatch.setattr("sys.argv", ["plan", "--config", str(TINY), "--target", "v5e:2x4", *map(str, flags)])
        monkeypatch.setattr(targets, "check_installed", lambda target: None)
        plan.main()

    return call


def test_json_has_the_rows_and_the_terminal_a_table(planned, capsys, tmp_path):
    planned([made_up("dp", total=9e9), made_up("fsdp", total=9e9)], "--strategies", "dp,fsdp", "--json", tmp_path / "rows.json")
    assert [row["strategy"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]] == ["dp", "fsdp"]
    assert "Best: dp" in capsys.readouterr().out


def refused(fits, reason):
    named = {name: value for name, value in made_up("dp", total=0).items() if name in ("target", "strategy", "remat", "program", "batch")}
    return named | {"fits": fits, "reason": reason, "memory": {"needed": None}}


def test_without_a_row_that_tells_anything_the_exit_status_is_1_and_what_does_not_fit_tells_something(planned, capsys, tmp_path):
    with pytest.raises(SystemExit, match="error: of 1 rows none was compiled"):
        planned([refused(None, "INTERNAL: no such thing")], "--strategies", "dp")
    planned([refused(False, "RESOURCE_EXHAUSTED: too large")], "--strategies", "dp", "--plot", tmp_path / "rows.png")
    assert "there is nothing to draw" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--program", "sample", "--strategies", "fsdp"], "--strategies fsdp is of training steps"),
        (["--program", "sample", "--remat", "full"], "--remat full is of training steps"),
        (["--program", "sample", "--batch-per-device", "all"], "--batch-per-device all is of training steps"),
        (["--json", "nowhere/rows.json"], "--json nowhere/rows.json: there is no directory nowhere"),
        (["--plot", "."], "--plot . is a directory"),
        (["--plot", "rows.docx"], r"--plot rows.docx: its name must end in one of .*\.png"),
    ],
)
def test_what_is_not_for_sampling_and_what_cannot_be_written_is_said_before_anything_is_compiled(planned, flags, said):
    with pytest.raises(ConfigError, match=said):
        planned([], *flags)


def test_that_matplotlib_is_missing_is_said_before_anything_is_compiled(planned, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    with pytest.raises(ConfigError, match="--plot needs matplotlib"):
        planned([], "--plot", "rows.png")
