"""Checkpoints: what is saved comes back, on any mesh and in either type, and what is broken is named on one line."""

import dataclasses
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, saved_state
from tiny_network import TINY

from svdp_jax import checkpoint, cli, sharding, steps, train_state
from svdp_jax.config import ConfigError, MeshConfig

DEMO = ROOT / "svdp_jax" / "assets" / "demo" / "checkpoint"


@pytest.fixture(autouse=True)
def where_it_was(monkeypatch):
    """Commands that are run within this process leave JAX to the other tests as it is."""
    monkeypatch.setattr(cli, "on_host", lambda: None)


def state_of(workdir):
    """The last step's state, as arrays."""
    return saved_state(workdir, 8)


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_weights_of_a_workdir_are_the_ema(workdir):
    config, params, frozen = checkpoint.load_weights(workdir)
    saved = state_of(workdir)
    assert_equal(params, saved["ema"])
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(saved["params"]), strict=True))
    assert config.name == "tiny"
    assert frozen.table.shape == (12, 12, 32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_holds_the_ema_in_its_type(workdir, tmp_path, dtype):
    checkpoint.export(workdir, tmp_path / "exported", dtype=dtype)
    config, params, frozen = checkpoint.load_weights(tmp_path / "exported")
    before, ema, frozen_before = checkpoint.load_weights(workdir)
    assert config == before
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    assert_equal(params, jax.tree.map(lambda leaf: np.asarray(jnp.asarray(leaf, dtype), np.float32), ema))
    assert_equal(frozen._asdict(), frozen_before._asdict())


def test_an_export_says_nothing_of_the_machine_that_wrote_it(workdir, tmp_path):
    checkpoint.export(workdir, tmp_path / "exported", dtype="float32")
    files = [path for path in (tmp_path / "exported").rglob("*") if path.is_file()]
    assert any(path.name == "commit_success.txt" for path in files)
    assert not [path for path in files if str(tmp_path).encode() in path.read_bytes()]


def test_weights_are_read_without_a_word_and_without_the_optimizer(workdir, tmp_path, caplog):
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    for path in (copy / "checkpoints" / "8" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with caplog.at_level("WARNING"):
        checkpoint.load_weights(copy)
    assert not caplog.records


def test_weights_are_read_into_their_shards(workdir, tmp_path):
    checkpoint.export(workdir, tmp_path / "exported", dtype="bfloat16")
    config, expected, _ = checkpoint.load_weights(tmp_path / "exported")
    places = train_state.param_shardings(config, sharding.make_layout(MeshConfig()))
    like = sharding.abstract(train_state.abstract_params(config), places)
    params, _ = checkpoint.load_initial(tmp_path / "exported", config, like)
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    assert jax.tree.leaves(jax.tree.map(lambda leaf: leaf.sharding, params)) == jax.tree.leaves(places)
    assert_equal(params, expected)


def test_another_config_does_not_restore(workdir):
    config, *_ = checkpoint.load_weights(workdir)
    for changes in {"width": 64}, {"depth": 5}, {"dual_blocks": 0}:
        other = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
        from flax.linen import meta

        state = jax.eval_shape(lambda: meta.unbox(train_state.init_state(other, train_state.init_params(other, jax.random.key(0)))))  # noqa: B023
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), state)  # noqa: B023
        checkpoints = steps.manager(workdir, keep=3)
        with pytest.raises(ConfigError, match="does not fit the config") as caught:
            steps.restore(checkpoints, state)
        checkpoints.close()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lost", ["config.json", "checkpoints", "frozen", "checkpoints/8/ema/_METADATA", "checkpoints/8/ema/manifest.ocdbt"])
def test_a_checkpoint_that_lacks_something_is_named(workdir, tmp_path, lost):
    broken = tmp_path / "broken"
    shutil.copytree(workdir, broken)
    (shutil.rmtree if (broken / lost).is_dir() else lambda path: path.unlink())(broken / lost)
    with pytest.raises(ConfigError, match="broken") as caught:
        checkpoint.load_weights(broken)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_their_config_are_named(workdir, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(workdir, other)
    config = json.loads((other / "config.json").read_text())
    config["model"]["text_width"] += 1
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"other does not fit its config.json: \['text'\].* is \(") as caught:
        checkpoint.load_weights(other)
    assert "\n" not in str(caught.value)


def inspected(monkeypatch, capsys, *arguments):
    """Lines of `checkpoint inspect`, with every array's bytes out of reach."""
    monkeypatch.setattr(sys, "argv", ["checkpoint", "inspect", *map(str, arguments)])
    monkeypatch.setattr(checkpoint.ocp.PyTreeCheckpointHandler, "restore", lambda *_, **__: pytest.fail("an array is read"))
    checkpoint.main()
    return capsys.readouterr().out.splitlines()


def test_inspect_tells_steps_shapes_types_and_sizes_and_loads_nothing(workdir, monkeypatch, capsys):
    state = state_of(workdir)
    count = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
    lines = inspected(monkeypatch, capsys, workdir)
    assert lines[0] == f"{workdir}: tiny, step 8 of 8; saved: 4, 8"
    found = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    leaves = jax.tree.leaves(state["params"])
    assert lines[-1].split() == ["parameters", f"{len(leaves)}", f"{count:,}", f"{4 * count / 1e6:,.2f}", "float32"]
    assert found["state/params"] == found["parameters"] and found["frozen/table"][1] == f"{12 * 12 * 32:,}"
    assert {"ema/dual", "ema/plain", "ema/last", "state/opt_state", "state/step", "frozen/autoencoder"} <= set(found)
    kernel = state["ema"]["last"]["temporal"]["qkv"]["linear"]["kernel"]
    assert any(f"  temporal/qkv/linear/kernel {list(kernel.shape)}" in line for line in inspected(monkeypatch, capsys, workdir, "--arrays"))


def test_inspect_tells_what_an_export_holds(workdir, tmp_path, monkeypatch, capsys):
    checkpoint.export(workdir, tmp_path / "exported", dtype="bfloat16")
    lines = inspected(monkeypatch, capsys, tmp_path / "exported")
    assert lines[0] == f"{tmp_path / 'exported'}: tiny" and lines[-1].endswith("bfloat16") and not any("state/" in line for line in lines)


def test_looking_and_exporting_ask_for_no_accelerator(python, tmp_path):
    for command in ["inspect", DEMO], ["export", DEMO, tmp_path / "exported"]:
        done = python("-m", "svdp_jax.checkpoint", *command, JAX_PLATFORMS="one that is busy")
        assert done.returncode == 0, done.stderr


def test_inspecting_what_is_broken_names_it(tmp_path):
    shutil.copytree(DEMO, tmp_path / "broken")
    (tmp_path / "broken" / "weights" / "_METADATA").unlink()
    with pytest.raises(ConfigError, match="checkpoint .*broken cannot be read") as caught:
        checkpoint.inspect(tmp_path / "broken")
    assert "\n" not in str(caught.value)


def test_an_export_replaces_nothing(workdir, tmp_path):
    for output in workdir, tmp_path / "file":
        (tmp_path / "file").write_text("mine")
        with pytest.raises(ConfigError, match="exists already"):
            checkpoint.export(workdir, output, dtype="float32")


def test_inspecting_no_checkpoint_exits_with_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["checkpoint", "inspect", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        checkpoint.main()
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and str(tmp_path) in line


def test_a_fingerprint_changes_with_any_byte_that_is_read(tmp_path):
    checkpoint.write_config(tmp_path, TINY)
    for part in "weights", "frozen":
        (tmp_path / part).mkdir()
        (tmp_path / part / "array").write_bytes(b"values")
    seen = [checkpoint.fingerprint(tmp_path)]
    (tmp_path / "metrics.jsonl").write_text("a training that goes on writes this")
    assert checkpoint.fingerprint(tmp_path) == seen[0]
    for part in "weights", "frozen":
        (tmp_path / part / "array").write_bytes(b"valued")
        seen.append(checkpoint.fingerprint(tmp_path))
    (tmp_path / "weights" / "array").rename(tmp_path / "weights" / "other")
    checkpoint.write_config(tmp_path, dataclasses.replace(TINY, name="another"))
    seen.append(checkpoint.fingerprint(tmp_path))
    assert len(set(seen)) == 4
