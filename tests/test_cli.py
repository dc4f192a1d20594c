"""train.py and sample.py as a user calls them: what they write, that a resumed run is the same run, and one line for a mistake."""

import json
import runpy
import shutil
import sys
from fractions import Fraction

import av
import imageio.v3 as iio
import jax
import numpy as np
import pytest
import skimage.data
from conftest import ROOT

from convert_weights.convert import convert
from svdp_jax import checkpoint, pipeline, rendering, train_state
from svdp_jax.data import detectors, inputs, synthetic, video

FRAMES, FPS = 6, Fraction(30000, 1001)  # two windows of 4, the second not full


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """portrait.png and motion.mp4, each with its landmarks."""
    folder = tmp_path_factory.mktemp("media")
    clip = synthetic.pair("validation", 1, frames=FRAMES, size=48)
    iio.imwrite(folder / "portrait.png", clip.target[0])
    detectors.write_landmarks(folder / "portrait.npz", clip.target_landmarks[:1])
    video.write_video(folder / "motion.mp4", clip.driver, fps=FPS, metadata={})
    detectors.write_landmarks(folder / "motion.npz", clip.driver_landmarks)
    return folder


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs a script as `python NAME FLAGS` would: (exit status, output, errors)."""

    def call(name, *flags):
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        status = 0
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as end:
            status = end.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def sample(script, media, workdir):
    """sample.py on the pair and the trained run; a flag given again counts."""

    def call(output, *flags):
        given = ["--source", media / "portrait.png", "--driving", media / "motion.mp4", "--checkpoint", workdir, "--output", output]
        status, out, err = script("sample.py", *given, *flags)
        assert status == 0, err
        return out

    return call


def frames_of(path):
    return np.stack(list(video.read_frames(path)))


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


# -------------------------------------------------------------------------------------------------------------- training


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


# -------------------------------------------------------------------------------------------------------------- sampling


def test_sampling_writes_the_video_and_how_it_was_made(sample, workdir, tmp_path):
    out = sample(tmp_path / "out")
    names = ["portrait--motion.json", "portrait--motion.mp4", "portrait--motion_concat.mp4"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert all(name in out for name in names)
    for name, size in (names[1], (48, 48)), (names[2], (3 * 256, 256)):
        info = video.probe(tmp_path / "out" / name)
        assert (info.frames, info.fps, info.width, info.height) == (FRAMES, FPS, *size)
        with av.open(str(tmp_path / "out" / name)) as file:
            assert "synthesised" in file.metadata["comment"]
            assert checkpoint.fingerprint(workdir) in file.metadata["comment"]
            assert not file.streams.audio  # the driver has none
    record = json.loads((tmp_path / "out" / names[0]).read_text())
    assert "synthesised" in record["note"]
    assert record["checkpoint"] == checkpoint.fingerprint(workdir)
    assert record["version"].startswith("svdp_jax ")
    assert (record["seed"], record["frames"], record["fps"], record["steps"]) == (42, FRAMES, str(FPS), 2)


def test_the_drivers_sound_is_in_both_videos(sample, media, tmp_path):
    speech = tmp_path / "speech.mp4"
    with av.open(str(speech), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        wave = np.sin(np.arange(16000) * 0.1).astype(np.float32)[None]
        sound = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound) + stream.encode())
    driver = tmp_path / "talk.mp4"
    video.write_video(driver, video.read_frames(media / "motion.mp4"), fps=FPS, metadata={}, audio_from=speech)
    shutil.copy(media / "motion.npz", tmp_path / "talk.npz")
    sample(tmp_path / "out", "--driving", driver)

    def packets(path):
        with av.open(str(path)) as container:
            return [bytes(packet) for packet in container.demux(audio=0) if packet.dts is not None]

    said = packets(driver)
    assert len(said) > 2
    for name in "portrait--talk.mp4", "portrait--talk_concat.mp4":
        assert packets(tmp_path / "out" / name) == said


def test_the_seed_makes_the_video_and_so_does_guidance(sample, tmp_path):
    def result(name, *flags):
        sample(tmp_path / name, "--no-concat", "--max-frames", "5", *flags)
        assert not (tmp_path / name / "portrait--motion_concat.mp4").exists()
        return frames_of(tmp_path / name / "portrait--motion.mp4")

    first = result("first")
    assert len(first) == 5
    np.testing.assert_array_equal(first, result("again"))
    assert (first != result("seed", "--seed", "7")).any()
    # Eight steps of training leave little difference between the passes: a large weight makes it seen in 8 bits.
    assert (first != result("guidance", "--guidance", "100", "1", "1")).any()


def test_a_rendering_that_was_cut_off_goes_on_as_if_it_had_not_been(sample, script, media, workdir, monkeypatch, tmp_path):
    sample(tmp_path / "straight")
    save, given = rendering.save, ["-s", media / "portrait.png", "-d", media / "motion.mp4", "--checkpoint", workdir, "-o", tmp_path / "cut"]

    def crash(folder, window):
        if window.number == 1:
            raise MemoryError("the machine is gone")
        save(folder, window)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(rendering, "save", crash)
        script("sample.py", *given)
    kept = tmp_path / "cut" / ".portrait--motion.windows"
    assert not (tmp_path / "cut" / "portrait--motion.mp4").exists() and rendering.windows_in(kept) == 1
    for flags, said in (([], "continue it with --resume"), (["--resume", "--seed", "7"], "seed was 42, is 7")):
        status, _, err = script("sample.py", *given, *flags)
        assert status == 2 and said in err.splitlines()[-1]
    (kept / ".000001.npz.partial").write_bytes(b"half a window")
    with monkeypatch.context() as patch:
        patch.setattr(inputs, "prepare", lambda *_, **__: pytest.fail("faces are looked for again"))
        sample(tmp_path / "cut", "--resume")
    np.testing.assert_array_equal(*(frames_of(tmp_path / name / "portrait--motion.mp4") for name in ("straight", "cut")))
    assert not kept.exists()
    assert json.loads((tmp_path / "cut" / "portrait--motion.json").read_text())["windows"] == {"rendered": 1, "resumed": 1}


def test_a_video_that_could_not_be_written_costs_no_window(sample, script, media, workdir, monkeypatch, tmp_path):
    given = ["-s", media / "portrait.png", "-d", media / "motion.mp4", "--checkpoint", workdir, "-o", tmp_path / "out"]

    def full(*_, **__):
        raise video.MediaError("out.mp4: cannot be written; is the disk full?")

    with monkeypatch.context() as patch:
        patch.setattr(video, "write_video", full)
        status, _, err = script("sample.py", *given)
        assert status == 2 and "is the disk full?" in err
    monkeypatch.setattr(checkpoint, "load_weights", lambda directory: pytest.fail("there is nothing left to render"))
    sample(tmp_path / "out", "--resume")


def test_resuming_nothing_begins(sample, tmp_path):
    sample(tmp_path / "out", "--resume")
    assert len(frames_of(tmp_path / "out" / "portrait--motion.mp4")) == FRAMES


def test_ctrl_c_is_one_line_that_says_how_to_go_on(script, media, workdir, monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(rendering, "save", interrupt)
    status, _, err = script("sample.py", "-s", media / "portrait.png", "-d", media / "motion.mp4", "--checkpoint", workdir, "-o", tmp_path / "out")
    assert status == 130 and "interrupted; finished windows are kept" in err.splitlines()[-1] and "Traceback" not in err


@pytest.fixture
def never_loaded(monkeypatch):
    def fail(directory):
        raise AssertionError("weights are loaded before the inputs are checked")

    monkeypatch.setattr(checkpoint, "load_weights", fail)


def broken_config(workdir, folder, section, **values):
    """A checkpoint directory whose config.json has other values."""
    config = json.loads((workdir / "config.json").read_text())
    config[section] |= values
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "case, named",
    [
        ("missing source", "nowhere.png"),
        ("not an image", "notes.txt"),
        ("missing driving", "nowhere.mp4"),
        ("not a video", "notes.txt"),
        ("no face", "grey.png"),
        ("no checkpoint", "config.json"),
        ("output is a file", "notes.txt"),
        ("a folder in the way", "portrait--motion.mp4"),
        ("size", "data.size=40"),
        ("history", "data.history=4"),
        ("alone", "--driving"),
        ("face", "face 3"),
        ("no frames", "--max-frames"),
        ("no steps", "sample.steps=0"),
        ("landmarker", "face.onnx"),
        ("the driver's landmarks for the source", "bare.npz beside it"),
        ("no weights", "holds neither weights/ nor a finished step"),
    ],
)
def test_a_mistake_is_one_line_before_any_weight_is_loaded(case, named, script, never_loaded, media, workdir, tmp_path):
    (tmp_path / "notes.txt").write_text("not a picture")
    iio.imwrite(tmp_path / "grey.png", np.full((64, 64, 3), 128, np.uint8))
    (tmp_path / "taken" / "portrait--motion.mp4").mkdir(parents=True)
    shutil.copy(media / "portrait.png", tmp_path / "bare.png")
    flags = {"--source": media / "portrait.png", "--driving": media / "motion.mp4", "--checkpoint": workdir, "--output": tmp_path / "out"}
    match case:
        case "missing source":
            flags["--source"] = tmp_path / "nowhere.png"
        case "not an image":
            flags["--source"] = tmp_path / "notes.txt"
        case "missing driving":
            flags["--driving"] = tmp_path / "nowhere.mp4"
        case "not a video":
            flags["--driving"] = tmp_path / "notes.txt"
        case "no face":
            flags["--source"] = tmp_path / "grey.png"
        case "no checkpoint":
            flags["--checkpoint"] = tmp_path
        case "output is a file":
            flags["--output"] = tmp_path / "notes.txt"
        case "a folder in the way":
            flags["--output"] = tmp_path / "taken"
        case "size":
            flags["--checkpoint"] = broken_config(workdir, tmp_path / "big", "data", size=40)
        case "history":
            flags["--checkpoint"] = broken_config(workdir, tmp_path / "long", "data", history=4)
        case "alone":
            del flags["--driving"]
        case "face":
            flags["--face"] = 3
        case "no frames":
            flags["--max-frames"] = 0
        case "no steps":
            flags["--steps"] = 0
        case "landmarker":
            flags |= {"--source": tmp_path / "bare.png", "--landmarker": "face.onnx"}
        case "the driver's landmarks for the source":
            flags |= {"--source": tmp_path / "bare.png", "--landmarker": media / "motion.npz"}
        case "no weights":
            flags["--checkpoint"] = broken_config(workdir, tmp_path / "bare", "data")
    status, _, err = script("sample.py", *(part for flag in flags.items() for part in flag))
    (line,) = err.splitlines()
    assert status == 2
    assert line.startswith("error: ") and named in line


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--sorce", "portrait.png"], "unknown flag --sorce; did you mean --source?"),
        (["--unknown", "3"], "unknown flag --unknown;"),
        (["portrait.png"], "portrait.png: no flag takes it"),
        (["--seed", "3", "--steps", "abc"], "--steps abc: takes a whole number"),
        (["--steps"], "--steps: takes a whole number"),
        (["--guidance", "1", "-2"], "--guidance 1 -2: takes 3 values, each a number"),
        (["--seed", "-1"], "--seed -1 must"),
        (["--seed", str(2**63 + 1)], f"--seed {2**63 + 1} must"),
    ],
)
def test_sampling_says_on_one_line_which_flag_is_wrong(script, flags, said):
    status, out, err = script("sample.py", *flags)
    (line,) = err.splitlines()
    assert status == 2 and not out
    assert line.startswith(f"error: {said}")


@pytest.mark.parametrize("name, flag", [("sample.py", "--guidance"), ("train.py", "--train.history-from-step")])
def test_help_lists_the_flags(script, monkeypatch, name, flag):
    monkeypatch.chdir(ROOT)
    status, out, err = script(name, "--help")
    assert (status, err) == (0, "")
    assert flag in out


@pytest.mark.parametrize(
    "module, flags, said",
    [
        ("svdp_jax.checkpoint", ["inspect"], "directory"),
        ("svdp_jax.checkpoint", ["export", "here", "there", "--dtype", "float16"], "float16"),
        ("svdp_jax.evaluation.rendered", ["--checkpoint", "here", "--clips", "few"], "few"),
        ("svdp_jax.data.bundle", [], "--output"),
        ("svdp_jax.data.prepare", ["--input", "here"], "--output"),
        ("svdp_jax.data.prepare", ["--rules.min-fase", "3"], "did you mean --rules.min-face?"),
        ("svdp_jax.data.pairs", ["--seed", "few"], "--seed few: takes a whole number"),
        ("svdp_jax.data.preview", ["-s", "here.png"], "--driving"),
    ],
)
def test_other_commands_say_on_one_line_what_is_wrong(monkeypatch, capsys, module, flags, said):
    monkeypatch.setattr(sys, "argv", [module, *flags])
    monkeypatch.delitem(sys.modules, module, raising=False)  # runpy warns of a module that is there already
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert line.startswith("error: ") and said in line


def test_weights_that_cannot_be_read_are_one_line(script, media, workdir, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(workdir, broken)
    (broken / "checkpoints" / "8" / "state" / "_METADATA").write_text("{")
    given = ["-s", media / "portrait.png", "-d", media / "motion.mp4", "--checkpoint", broken, "-o", tmp_path / "out"]
    status, _, err = script("sample.py", *given)
    (line,) = err.splitlines()
    assert status == 2
    assert line.startswith("error: ") and "broken" in line


def test_the_process_says_one_line_per_warning_and_exits_with_2(python, tmp_path):
    iio.imwrite(tmp_path / "source.png", skimage.data.astronaut())
    iio.imwrite(tmp_path / "grey.png", np.full((64, 64, 3), 128, np.uint8))
    given = ["--source", tmp_path / "source.png", "--driving", tmp_path / "grey.png", "--output", tmp_path / "out"]
    done = python("sample.py", *given, SVDP_FACE_LANDMARKER="")
    warning, error = done.stderr.splitlines()
    assert done.returncode == 2
    assert warning.startswith("warning: no landmarker given")
    assert error.startswith("error: ") and "grey.png" in error


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


def test_a_converted_model_trains_and_samples(script, media, dataset, sd35_file, tmp_path):
    convert(sd35_file, tmp_path / "weights")
    flags = ["--workdir", tmp_path / "run", "--train.init-from", tmp_path / "weights", "--data.path", dataset, "--sample.steps", 1]
    small = ["--train.batch", 1, "--train.steps", 1, "--data.frames", 2, "--data.history", 1, "--data.size", 32, "--sample.guidance", 1, 1, 1]
    status, _, err = script("train.py", "--config", tmp_path / "weights" / "config.json", *flags, *small)
    assert status == 0, err
    for directory in "weights", "run":
        given = ["--source", media / "portrait.png", "--driving", media / "motion.mp4", "--checkpoint", tmp_path / directory, "--max-frames", 2]
        status, _, err = script("sample.py", *given, "--output", tmp_path / f"out_{directory}", "--steps", 1, "--guidance", 1, 1, 1, "--no-concat")
        assert status == 0, err
        assert iio.imread(tmp_path / f"out_{directory}" / "portrait--motion.mp4").shape[0] == 2
