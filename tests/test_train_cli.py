"""train.py as a user calls it: what it writes, that a resumed run is the same run, and one line for a mistake."""

import errno
import json
import os
import shutil
import signal
import tempfile

import imageio.v3 as iio
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CHEAP, ROOT, saved_state

from svdp_jax import checkpoint, files, journal, pipeline, processes, steps, train_state
from svdp_jax.data import loader


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_training_writes_what_others_rely_on(workdir, dataset):
    lines = metrics_of(workdir)
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    for line in lines:
        assert {"step", "loss", "grad_norm", "bad", "seconds", "data_wait", "tflops"} <= set(line)
        assert any(name.startswith("loss_t/") for name in line)
        assert np.isfinite(list(line.values())).all()
        assert 0 <= line["data_wait"] <= 1
    assert json.loads((workdir / "config.json").read_text())["data"]["path"] == str(dataset)
    assert {path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()} == {"4", "8"}
    assert (workdir / "frozen").is_dir()
    assert list((workdir / "tensorboard").iterdir())
    assert iio.imread(workdir / "samples" / "0000008.png").shape == (3 * 32, 9 * 32, 3)


def test_sigterm_saves_and_what_goes_on_is_the_same_run_bit_for_bit(workdir, train_tiny, tmp_path, monkeypatch, capsys):
    add = journal.Journal.add
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "add", lambda self, step, *rest: step == 2 and os.kill(os.getpid(), signal.SIGTERM) or add(self, step, *rest))
        assert train_tiny(tmp_path / "run") == processes.AGAIN
    saved = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]
    assert 3 <= max(saved) <= 5 and f"step {max(saved)}: " in capsys.readouterr().out.splitlines()[-1]
    assert train_tiny(tmp_path / "run") == 0
    straight, again = (saved_state(path, 8) for path in (workdir, tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, straight, again)
    for one, other in zip(metrics_of(workdir), metrics_of(tmp_path / "run"), strict=True):
        assert [one[name] for name in ("step", "loss", "grad_norm")] == [other[name] for name in ("step", "loss", "grad_norm")]


def test_a_run_without_history_has_no_second_stage(train_tiny, tmp_path, monkeypatch):
    compiled = []

    def counts(config, state, *_, with_history, layout):
        compiled.append(with_history)
        metrics = dict.fromkeys(("loss", "grad_norm"), state.step) | {"bad": state.bad, "loss_sums": jnp.ones(5), "samples": jnp.ones(5)}
        return state.replace(step=state.step + 1), metrics

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


def test_a_run_that_is_behind_its_end_already_is_left_alone(train, workdir):
    before = (workdir / "config.json").read_bytes()
    status, _, err = train(workdir, "--train.steps", 6)
    assert status == 2 and "has 8 steps behind it: train.steps=6 is before that" in err and (workdir / "config.json").read_bytes() == before


def test_what_is_trained_can_be_read_anywhere(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = script("train.py", "--help")
    assert status == 0 and "--train.steps" in out


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


# ----------------------------------------------------------------------------------------------------------------- faults


@pytest.fixture
def train(script, dataset):
    """train(workdir, *flags): (exit status, output, errors) of train.py on configs/tiny.py."""

    def call(workdir, *flags):
        given = ["--config", ROOT / "configs" / "tiny.py", "--workdir", workdir, "--data.path", dataset, *CHEAP]
        return script("train.py", *given, *flags)

    return call


def error_of(run):
    status, _, err = run
    assert status == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err
    return line


@pytest.fixture
def begun(workdir, tmp_path):
    """A copy of the finished run that has done four of its eight steps."""
    copy = tmp_path / "begun"
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "checkpoints" / "8")
    return copy


def test_another_network_does_not_go_on(train, begun):
    assert "holds a run of another network: model.width=64 (so far: 32)" in error_of(train(begun, "--model.width", 64))
    assert "model.prediction=velocity (so far: x0)" in error_of(train(begun, "--model.prediction", "velocity")), "though every shape is the same"


def test_another_seed_does_not_go_on(train, begun):
    assert "the run in this workdir has another train.seed, which decides all that is drawn: train.seed=7 (so far: 0)" in error_of(train(begun, "--train.seed", 7))


def test_a_checkpoint_is_no_workdir(train, begun, tmp_path):
    before = sorted(path.name for path in (begun / "frozen").rglob("*"))
    shutil.copytree(begun, tmp_path / "exported", ignore=shutil.ignore_patterns("checkpoints"))
    (tmp_path / "exported" / "weights").mkdir()
    assert "exported holds an exported or converted checkpoint" in error_of(train(tmp_path / "exported"))
    assert sorted(path.name for path in (tmp_path / "exported" / "frozen").rglob("*")) == before


def test_frozen_arrays_that_cannot_be_read_are_one_line(train, begun):
    shutil.rmtree(begun / "frozen")
    assert f"{begun / 'frozen'} cannot be read" in error_of(train(begun))


def test_other_settings_are_told_and_go_on(train, begun, recwarn):
    status, _, err = train(begun, "--train.learning-rate", "2e-3", "--train.log-every", 1, "--train.stop-at", 5)
    assert status == 0
    (said,) = [str(warning.message) for warning in recwarn if "goes on with" in str(warning.message)]
    assert said == "the run goes on with train.learning_rate=0.002 (so far: 0.001)"


def test_a_config_becomes_the_workdirs_with_the_first_step_that_was_trained_with_it(train, workdir, begun):
    margins = lambda folder: json.loads((folder / "config.json").read_text())["data"]["region_margin"]
    before = margins(workdir)
    assert train(workdir, "--data.region-margin", 0.5)[0] == 0 and margins(workdir) == before, "nothing was left to train"
    assert train(begun, "--data.region-margin", 0.5, "--train.stop-at", 5)[0] == 0 and margins(begun) == 0.5


def test_a_second_run_in_a_workdir_is_refused_and_spoils_nothing(train, begun, monkeypatch):
    monkeypatch.setattr("train.LEAVING", 0)
    unfinished = begun / "checkpoints" / f"7{steps.UNFINISHED}"
    unfinished.mkdir()
    with files.held(begun / ".lock", patience=0):
        assert "begun is in use by another process" in error_of(train(begun))
    assert unfinished.is_dir()


def test_the_files_of_processes_that_start_together_are_not_taken_for_steps(begun, monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: tempfile.NamedTemporaryFile(dir=dir, delete=False))  # as on file systems without O_TMPFILE
    for _ in range(2):
        steps.manager(begun, keep=3).close()


def test_a_process_that_is_lost_is_no_damaged_checkpoint(begun, monkeypatch):
    def lost(*_, **__):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: task 3 stopped sending heartbeats")

    checkpoints = steps.manager(begun, keep=3)
    monkeypatch.setattr(checkpoints, "restore", lost)
    with pytest.raises(jax.errors.JaxRuntimeError):
        steps.restore_run(checkpoints)
    checkpoints.close()


def test_sigterm_before_the_first_step_saves_that_and_asks_to_be_started_again(train_tiny, tmp_path, monkeypatch):
    batches = loader.batches
    monkeypatch.setattr(loader, "batches", lambda *given, **how: os.kill(os.getpid(), signal.SIGTERM) or batches(*given, **how))
    assert train_tiny(tmp_path / "run") == processes.AGAIN
    assert checkpoint.saved_steps(tmp_path / "run") in ([1], [2])


def test_a_disk_that_is_full_from_the_start_is_one_line(train, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_frozen", full)
    assert "frozen: cannot be written" in error_of(train(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut off", "gone", "empty"])
@pytest.mark.parametrize("part", ["state/manifest.ocdbt", "ema/_METADATA", "state/ocdbt.process_0/d/*", "ema/d/*", "run/metadata"])
def test_a_checkpoint_that_is_damaged_is_no_beginning(begun, dataset, python, part, damage):
    for path in (begun / "checkpoints" / "4").glob(part):
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if damage == "cut off" else 0])
    before = (begun / "metrics.jsonl").read_text()
    # In a process of its own, for what orbax leaves behind where it fails disturbs all that comes later in it.
    given = ["--config", ROOT / "configs" / "tiny.py", "--workdir", begun, "--data.path", dataset, "--train.stop-at", 5]
    done = python("train.py", *given, *CHEAP)
    assert "checkpoints/4 cannot be read" in error_of((done.returncode, done.stdout, done.stderr)), done.stderr
    assert (begun / "metrics.jsonl").read_text() == before


def test_steps_under_another_name_are_no_empty_folder(train, begun):
    (begun / "checkpoints" / "4").rename(begun / "checkpoints" / "4.old")
    assert "holds 4.old, which is no step of training" in error_of(train(begun))


@pytest.mark.parametrize("place", ["workdir", "checkpoints"])
def test_a_workdir_that_cannot_be_written_is_one_line(train, tmp_path, place):
    blocked = tmp_path / "run" / place if place == "checkpoints" else tmp_path / "run"
    blocked.parent.mkdir(exist_ok=True)
    blocked.write_text("a file is in the way")
    assert "cannot be written" in error_of(train(tmp_path / "run"))


def test_ten_steps_that_are_not_finite_end_the_run_and_keep_its_checkpoint(train, begun, monkeypatch):
    state = saved_state(begun, 4)
    step = train_state.train_step

    def nothing(config, state, *inputs, **how):
        after, metrics = step(config, state, *inputs, **how)
        return state.replace(step=after.step, bad=state.bad + 1), metrics | {"loss": metrics["loss"] * jnp.nan, "bad": state.bad + 1}

    monkeypatch.setattr(train_state, "train_step", nothing)
    said = error_of(train(begun, "--train.steps", 40, "--train.checkpoint-every", 100, "--train.log-every", 5))
    assert "step 14: loss or gradient was not finite for 10 steps in a row" in said and "keeps the checkpoint of step 4" in said
    jax.tree.map(np.testing.assert_array_equal, state, saved_state(begun, 4))
    assert [line["step"] for line in metrics_of(begun)] == [2, 4, 5, 10] and "loss" not in metrics_of(begun)[-1]


@pytest.mark.slow
def test_a_run_that_goes_on_need_not_compile_its_step_again(compiled_by, dataset, tmp_path):
    given = ["--config", "configs/tiny.py", "--workdir", tmp_path / "run", "--data.path", dataset, "--train.steps", 4]
    first, second = (compiled_by("train.py", *given, "--train.stop-at", stop) for stop in (1, 2))
    assert first["misses"] and not first["hits"]
    assert second["hits"] and second["misses"] < first["misses"] / 2  # what reads the checkpoint is new


@pytest.mark.slow
def test_a_data_set_may_be_smaller_than_a_batch(train, tmp_path):
    status, _, err = train(tmp_path / "run", "--train.batch", 8, "--train.steps", 1)  # of six clips
    assert status == 0, err


@pytest.mark.slow
def test_steps_are_kept_for_good(train, workdir, tmp_path):
    status, _, err = train(tmp_path / "run", "--train.checkpoint-every", 1, "--train.keep", 1, "--train.keep-every", 3)
    assert status == 0, err
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()} == {"3", "6", "8"}


@pytest.mark.slow
def test_a_trace_of_some_steps_is_written(train, tmp_path):
    status, _, err = train(tmp_path / "run", "--train.profile", "2:3", "--train.steps", 4)
    assert status == 0, err
    (trace,) = (tmp_path / "run" / "profile" / "plugins" / "profile").glob("*/*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(trace))
    names = {event.name for plane in profile.planes for line in plane.lines for event in line.events}
    assert "train" in names


@pytest.mark.slow
def test_what_a_device_is_at_is_never_waited_for(monkeypatch, train, tmp_path):
    """Metrics of a step are read when the next one has been given to the device."""
    order, add = [], journal.Journal.add
    make_step = train_state.make_step

    def told(*arguments, **options):
        step = make_step(*arguments, **options)

        def call(state, *inputs):
            order.append("given")
            return step(state, *inputs)

        return call

    monkeypatch.setattr(train_state, "make_step", told)
    monkeypatch.setattr(journal.Journal, "add", lambda self, step, *rest: order.append(step) or add(self, step, *rest))
    status, _, err = train(tmp_path / "run", "--train.checkpoint-every", 100, "--train.steps", 5)
    assert status == 0, err
    assert order == ["given", "given", 1, "given", 2, "given", 3, "given", 4, 5]
