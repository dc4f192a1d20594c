"""train.py as a user calls it: what it writes, that a resumed run is the same run, and one line for a mistake."""

import json

import imageio.v3 as iio
import jax
import numpy as np
import pytest
from conftest import ROOT

from svdp_jax import checkpoint, pipeline, train_state


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_training_writes_what_others_rely_on(workdir, dataset):
    lines = metrics_of(workdir)
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    for line in lines:
        assert {"step", "loss", "grad_norm", "seconds", "data_wait"} <= set(line)
        assert np.isfinite(list(line.values())).all()
        assert 0 <= line["data_wait"] <= 1
    assert json.loads((workdir / "config.json").read_text())["data"]["path"] == str(dataset)
    assert {path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()} == {"4", "8"}
    assert (workdir / "frozen").is_dir()
    assert list((workdir / "tensorboard").iterdir())
    assert iio.imread(workdir / "samples" / "0000008.png").shape == (3 * 32, 9 * 32, 3)


def test_a_resumed_run_is_the_same_run_bit_for_bit(workdir, train_tiny, tmp_path):
    resumed = tmp_path / "resumed"
    train_tiny(resumed, "--train.stop-at", "4")
    assert [path.name for path in (resumed / "checkpoints").iterdir() if path.name.isdigit()] == ["4"]
    train_tiny(resumed)
    straight, again = (checkpoint.load_tree(path / "checkpoints" / "8" / "state") for path in (workdir, resumed))
    assert {"params", "ema", "opt_state", "step"} <= set(straight)
    jax.tree.map(np.testing.assert_array_equal, straight, again)
    for one, other in zip(metrics_of(workdir), metrics_of(resumed), strict=True):
        assert [one[name] for name in ("step", "loss", "grad_norm")] == [other[name] for name in ("step", "loss", "grad_norm")]


def test_a_run_without_history_has_no_second_stage(train_tiny, tmp_path, monkeypatch):
    compiled = []

    def counts(config, state, *_, with_history):
        compiled.append(with_history)
        return state.replace(step=state.step + 1), {"loss": state.step, "grad_norm": state.step}

    monkeypatch.setattr(train_state, "train_step", counts)
    monkeypatch.setattr(pipeline, "contact_sheet", lambda *_: np.zeros((8, 8, 3), np.uint8))
    train_tiny(tmp_path / "run", "--data.history", "0")
    assert compiled == [False]
    assert len(metrics_of(tmp_path / "run")) == 4


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--train.stpes", "4"], "unknown flag --train.stpes; did you mean --train.steps?"),
        (["--train.unknown", "4"], "unknown flag --train.unknown;"),
        (["--model.heads", "7"], "model.heads=7 must"),
        (["--train.batch", "-1"], "train.batch=-1 must"),
        (["--train.seed", str(2**63 + 1)], f"train.seed={2**63 + 1} must"),
        (["--train.steps", "few"], "--train.steps few: takes a whole number"),
        (["--data.frames", "2", "--train.stop_at=soon", "--data.history", "1"], "--train.stop_at=soon: takes a whole number"),
        (["--model.dtype", "float16"], "--model.dtype float16: takes one of bfloat16, float32"),
        (["--config"], "argument --config: expected one argument"),
    ],
)
def test_training_says_on_one_line_which_flag_is_wrong(script, tmp_path, flags, said):
    status, out, err = script("train.py", "--config", ROOT / "configs" / "tiny.py", "--workdir", tmp_path / "run", *flags)
    (line,) = err.splitlines()
    assert status == 2 and not out
    assert line.startswith(f"error: {said}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, named",
    [
        ([], "--config"),
        (["--config", "missing.py", "--workdir", "run"], "missing.py"),
        (["--config", "configs/tiny.py", "--workdir", "{run}", "--data.path", "nowhere"], "nowhere"),
        (["--config", "configs/tiny.py", "--workdir", "{run}", "--mesh.data", "3"], "mesh data=3"),
    ],
)
def test_training_says_on_one_line_what_is_missing(script, tmp_path, monkeypatch, flags, named):
    monkeypatch.chdir(ROOT)
    status, _, err = script("train.py", *(flag.format(run=tmp_path / "run") for flag in flags))
    (line,) = err.splitlines()
    assert status == 2
    assert line.startswith("error: ") and named in line


def test_a_run_starts_from_a_checkpoint(workdir, train_tiny, tmp_path):
    still = ["--train.steps", "1", "--train.learning-rate", "1e-30", "--train.learning-rate-new", "1e-30"]
    train_tiny(tmp_path / "next", "--train.init-from", str(workdir), "--train.seed", "5", *still)
    _, before, frozen_before = checkpoint.load_weights(workdir)
    _, after, frozen = checkpoint.load_weights(tmp_path / "next")
    jax.tree.map(np.testing.assert_array_equal, (before, frozen_before._asdict()), (after, frozen._asdict()))


def test_another_network_is_no_start(script, workdir, dataset, tmp_path):
    given = ["--config", ROOT / "configs" / "tiny.py", "--workdir", tmp_path / "run", "--data.path", dataset]
    status, _, err = script("train.py", *given, "--train.init-from", workdir, "--model.width", 64, "--autoencoder.scale", 2)
    assert status == 2 and len(err.splitlines()) == 1
    assert "model.width=64 (checkpoint: 32), autoencoder.scale=2.0 (checkpoint: 1.0)" in err
    status, _, err = script("train.py", *given, "--train.init-from", tmp_path / "nowhere")
    assert status == 2 and "is not a checkpoint" in err and len(err.splitlines()) == 1
