"""sample.py as a user calls it: the video and what lies beside it, going on after a crash, and one line for a mistake."""

import json
import shutil

import av
import imageio.v3 as iio
import numpy as np
import pytest
from conftest import FPS, FRAMES

from convert_weights.convert import convert
from svdp_jax import checkpoint, rendering
from svdp_jax.data import inputs, video


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


@pytest.mark.slow  # tests/test_sampler.py shows the same of the pipeline
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
    monkeypatch.setattr(checkpoint, "load_weights", lambda *_: pytest.fail("there is nothing left to render"))
    sample(tmp_path / "out", "--resume")


def test_resuming_nothing_begins(sample, tmp_path):
    sample(tmp_path / "out", "--resume")
    assert len(frames_of(tmp_path / "out" / "portrait--motion.mp4")) == FRAMES


def test_what_is_finished_is_not_made_again(sample, monkeypatch, tmp_path):
    sample(tmp_path / "out")
    made = (tmp_path / "out" / "portrait--motion.mp4").stat().st_mtime_ns
    left = tmp_path / "out" / ".portrait--motion.windows"
    left.mkdir()  # as by a run that was ended behind its last file
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load_weights", lambda *_: pytest.fail("it is finished"))
        assert f"finished before: {tmp_path / 'out' / 'portrait--motion.mp4'}" in sample(tmp_path / "out", "--resume")
    sample(tmp_path / "out", "--resume", "--seed", 1)
    assert (tmp_path / "out" / "portrait--motion.mp4").stat().st_mtime_ns != made


def test_resuming_what_is_finished_leaves_another_renderings_windows_alone(sample, media, workdir, monkeypatch, tmp_path):
    sample(tmp_path / "out", "--no-concat")
    save = rendering.save

    def crash(folder, window):
        if window.number == 1:
            raise MemoryError
        save(folder, window)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(rendering, "save", crash)
        sample(tmp_path / "out", "--no-concat", "--seed", 7)
    left = tmp_path / "out" / ".portrait--motion.windows"
    assert "finished before" in sample(tmp_path / "out", "--no-concat", "--resume") and rendering.windows_in(left) == 1
    sample(tmp_path / "out", "--no-concat", "--resume", "--seed", 7)
    assert json.loads((tmp_path / "out" / "portrait--motion.json").read_text())["windows"]["resumed"] == 1 and not left.exists()
    (tmp_path / "out" / "portrait--motion_concat.mp4").write_bytes(b"of another run")
    assert "finished before" not in sample(tmp_path / "out", "--resume", "--seed", 7), "its side by side was never made"


def test_two_do_not_render_the_same_at_once(script, never_loaded, media, workdir, tmp_path):
    (tmp_path / "out").mkdir()
    with rendering.held(tmp_path / "out" / ".portrait--motion.windows"):
        status, _, err = script("sample.py", "-s", media / "portrait.png", "-d", media / "motion.mp4", "--checkpoint", workdir, "-o", tmp_path / "out")
        assert status == 2 and "another process renders the same" in err.splitlines()[-1]
    assert not list((tmp_path / "out").iterdir())


def test_a_name_that_no_result_can_have_is_told_before_any_work(script, never_loaded, media, workdir, tmp_path):
    given = ["-d", media / "motion.mp4", "--checkpoint", workdir, "-o", tmp_path / "out"]
    for name in ("long" * 55 + ".png", "caf\udce9.png"):
        shutil.copy(media / "portrait.png", tmp_path / name)
        status, _, err = script("sample.py", "-s", tmp_path / name, *given)
        assert status == 2 and len(err.splitlines()) == 1 and "give them shorter, readable names" in err


def test_a_portrait_too_large_for_a_video_is_told_before_any_work(script, never_loaded, media, workdir, tmp_path):
    iio.imwrite(tmp_path / "banner.png", np.zeros((64, 16400, 3), np.uint8))
    given = ["-s", tmp_path / "banner.png", "-d", media / "motion.mp4", "--checkpoint", workdir, "-o", tmp_path / "out", "--no-align"]
    status, _, err = script("sample.py", *given)
    assert status == 2 and "a video of 16400x64 pixels cannot be encoded" in err.splitlines()[-1]


def test_ctrl_c_is_one_line_that_says_how_to_go_on(script, media, workdir, monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(rendering, "save", interrupt)
    status, _, err = script("sample.py", "-s", media / "portrait.png", "-d", media / "motion.mp4", "--checkpoint", workdir, "-o", tmp_path / "out")
    assert status == 130 and "interrupted; finished windows are kept" in err.splitlines()[-1] and "Traceback" not in err


@pytest.fixture
def never_loaded(monkeypatch):
    def fail(*_):
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


def test_weights_that_cannot_be_read_are_one_line(script, media, workdir, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(workdir, broken)
    (broken / "checkpoints" / "8" / "ema" / "_METADATA").write_text("{")
    given = ["-s", media / "portrait.png", "-d", media / "motion.mp4", "--checkpoint", broken, "-o", tmp_path / "out"]
    status, _, err = script("sample.py", *given)
    (line,) = err.splitlines()
    assert status == 2
    assert line.startswith("error: ") and "broken" in line


@pytest.mark.slow
def test_a_converted_model_trains_and_samples(script, media, dataset, sd35_file, tmp_path):
    convert(sd35_file, tmp_path / "weights")
    flags = ["--workdir", tmp_path / "run", "--train.init-from", tmp_path / "weights", "--data.path", dataset, "--sample.steps", 1]
    small = ["--train.batch", 1, "--train.steps", 1, "--data.frames", 2, "--data.history", 1, "--data.size", 32, "--sample.guidance", 1, 1, 1]
    status, _, err = script("train.py", "--config", tmp_path / "weights" / "config.json", *flags, *small)
    assert status == 0, err
    given = ["--source", media / "portrait.png", "--driving", media / "motion.mp4", "--checkpoint", tmp_path / "run", "--max-frames", 2]
    status, _, err = script("sample.py", *given, "--output", tmp_path / "out", "--steps", 1, "--guidance", 1, 1, 1, "--no-concat")
    assert status == 0, err
    assert iio.imread(tmp_path / "out" / "portrait--motion.mp4").shape[0] == 2


# ------------------------------------------------------------------------------------------------------------------- jobs


def write_jobs(path, *rows):
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in [("source", "driving", "output"), *rows]))
    return path


def test_jobs_are_done_one_after_the_other_and_a_failed_one_stops_none(sample, script, media, workdir, tmp_path):
    sample(tmp_path / "alone")
    good, bad = (media / "portrait.png", media / "motion.mp4"), (tmp_path / "gone.png", media / "motion.mp4")
    jobs = write_jobs(tmp_path / "jobs.csv", (*good, ""), (*bad, ""), (*good, tmp_path / "other"))
    jobs.write_bytes(b"\xef\xbb\xbf" + jobs.read_bytes())  # as Excel begins a file of UTF-8
    status, out, err = script("sample.py", "--jobs", jobs, "--checkpoint", workdir, "-o", tmp_path / "out")
    assert status == 1
    failed = [line for line in err.splitlines() if line.startswith(("failed", "error"))]
    assert len(failed) == 2 and str(tmp_path / "gone.png") in failed[0] and failed[1] == "error: 1 of 3 jobs failed"
    alone = frames_of(tmp_path / "alone" / "portrait--motion.mp4")
    for folder in "out", "other":
        np.testing.assert_array_equal(frames_of(tmp_path / folder / "portrait--motion.mp4"), alone)
        assert f"wrote {tmp_path / folder / 'portrait--motion.mp4'}" in out


@pytest.mark.slow
def test_devices_take_jobs_of_their_own_or_share_one(python, media, workdir, tmp_path):
    rows = [(media / "portrait.png", media / "motion.mp4", tmp_path / name) for name in ("one", "two", "three")]
    jobs = write_jobs(tmp_path / "jobs.csv", *rows)
    two = {"JAX_NUM_CPU_DEVICES": "2"}
    done = python("sample.py", "--jobs", jobs, "--checkpoint", workdir, "-o", tmp_path, **two)
    assert done.returncode == 0, done.stderr
    done = python("sample.py", *("-s", rows[0][0]), *("-d", rows[0][1]), "--checkpoint", workdir, "-o", tmp_path / "shared", "--mesh.strategy", "context", **two)
    assert done.returncode == 0, done.stderr
    first, *others = (frames_of(tmp_path / name / "portrait--motion.mp4").astype(int) for name in ("one", "two", "three", "shared"))
    for frames in others:
        assert np.abs(frames - first).mean() < 0.5, "but for rounding"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "needs a first line with the columns source,driving"),
        ("a,b\n1,2\n", "needs a first line with the columns source,driving"),
        ("source,driving\nface.png,\n", "line 2: source and driving must both be there"),
        ("source,driving\na/x.png,v.mp4\nb/x.png,w/v.mp4\n", "line 3: out/x--v.mp4 would be written by two jobs"),
        ("source,driving,output\na/x.png,v.mp4,out\nb/x.png,w/v.mp4,./out/../out\n", "line 3: out/../out/x--v.mp4 would be written by two jobs"),
        ("source,driving\nx.png,v.mp4\nx.png,v_concat.mp4\n", "line 3: out/x--v_concat.mp4 would be written by two jobs"),
    ],
)
def test_a_file_of_jobs_that_is_none_is_one_line(script, tmp_path, text, said):
    (tmp_path / "jobs.csv").write_text(text)
    status, _, err = script("sample.py", "--jobs", tmp_path / "jobs.csv")
    assert status == 2 and len(err.splitlines()) == 1 and said in err


def test_programs_are_kept_for_the_next_start(compiled_by, media, workdir, tmp_path):
    given = ["-s", media / "portrait.png", "-d", media / "motion.mp4", "--checkpoint", workdir, "--max-frames", 4]
    first, second = (compiled_by("sample.py", *given, "-o", tmp_path / name) for name in ("first", "second"))
    assert first["misses"] and not first["hits"]
    assert second["hits"] == first["misses"] and not second["misses"]
    assert list((tmp_path / "cache" / "svdp_jax").iterdir())
