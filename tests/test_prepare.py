"""prepare: videos to clips. What is kept, that nothing stops it, and that a run which is killed ends in the same records."""

import csv
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time
from fractions import Fraction

import numpy as np
import pytest
from conftest import ROOT

from svdp_jax import cli
from svdp_jax.config import ConfigError, DataConfig
from svdp_jax.data import clips, detectors, faces, loader, parts, prepare, synthetic, video

SIZE = 32
RULES = ["--rules.min-frames", "8", "--rules.max-frames", "20", "--rules.min-face", "20", "--rules.min-sharpness", "1"]


def person(number, frames):
    moves = synthetic.motion(synthetic.split_seed("train", number, "motion"), frames)
    return synthetic.render_clip(synthetic.identity(synthetic.split_seed("train", number, "identity")), moves, size=64)


def write(path, parts_of_it, *, fps=Fraction(25), gone=()):
    """A video of rendered people, one after the other, with landmarks beside it; `gone` frames show no face, they say."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rendered = [person(number, frames) for number, frames in parts_of_it]
    landmarks = np.concatenate([points for _, points in rendered])
    landmarks[list(gone)] = np.nan
    video.write_video(path, np.concatenate([frames for frames, _ in rendered]), fps=fps, metadata={})
    detectors.write_landmarks(path.with_suffix(".npz"), landmarks)
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    write(folder / "ann.mp4", [(0, 40)])
    write(folder / "deep" / "er" / "bob.mov", [(1, 30)])
    write(folder / "fifty.mp4", [(2, 50)], fps=Fraction(50))
    write(folder / "two people.mp4", [(3, 12), (4, 14)])
    write(folder / "hides.mp4", [(5, 40)], gone=range(12, 26))
    write(folder / "short.mp4", [(6, 5)])
    (folder / "junk.mp4").write_text("no video at all\n" * 99)
    (folder / "empty.mp4").touch()
    (folder / "notes.txt").write_text("of no interest")
    (folder / "._ann.mp4").write_text("what some systems leave behind")
    (folder / "again").symlink_to(folder / "deep")
    pathlib.Path(os.fsdecode(bytes(folder) + b"/caf\xe9.mp4")).write_text("of a name that is no text")
    whole = (folder / "ann.mp4").read_bytes()
    (folder / "cut off.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    shutil.copy(folder / "ann.npz", folder / "cut off.npz")
    write(folder / "few.mp4", [(7, 30)])
    detectors.write_landmarks(folder / "few.npz", np.load(folder / "few.npz")["landmarks"][:10])
    return folder


def run(output, *inputs, flags=()):
    """prepare in this process, the videos in two others."""
    given = ["--input", *map(str, inputs), "--output", str(output), "--size", str(SIZE), *RULES, "--workers", "2", *flags]
    prepare.main(cli.parse(prepare.Flags(), given, description="", prog=""))


@pytest.fixture(scope="module")
def straight(videos, tmp_path_factory):
    """The data set of one straight run."""
    output = tmp_path_factory.mktemp("straight") / "clips"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SVDP_FACE_LANDMARKER", raising=False)
        with pytest.warns(UserWarning, match="no landmarker given"):
            run(output, videos)
    return output


def rows(output):
    with (output / "report.csv").open() as file:
        return list(csv.DictReader(file))


def records(output):
    """Every shard, to the byte."""
    return {path.name: path.read_bytes() for path in sorted(output.glob("clips-*"))}


def all_clips(output):
    return {
        clip.id: clip
        for split in clips.splits(output)
        for clip in map(clips.open_clips(output, split=split).__getitem__, range(len(clips.open_clips(output, split=split))))
    }


def test_what_is_kept_and_dropped_and_why(straight):
    found = [(row["name"], row["dropped"]) for row in rows(straight)]
    assert found == [
        ("ann.mp4#000000", ""),
        ("ann.mp4#000020", ""),
        ("caf\\xe9.mp4", "cannot be read"),
        ("cut off.mp4#000000", ""),
        ("deep/er/bob.mov#000000", ""),
        ("deep/er/bob.mov#000015", ""),
        ("empty.mp4", "cannot be read"),
        ("few.mp4", "cannot be read"),
        ("fifty.mp4#000000", ""),
        ("fifty.mp4#000012", ""),
        ("hides.mp4#000000", ""),
        ("hides.mp4#000012", "no face"),
        ("hides.mp4#000026", ""),
        ("junk.mp4", "cannot be read"),
        ("short.mp4#000000", "too short"),
        ("two people.mp4#000000", ""),
        ("two people.mp4#000012", ""),
    ]
    notes = {row["name"]: row["note"] for row in rows(straight)}
    assert "of 40 frames can be read" in notes["cut off.mp4#000000"] and not notes["ann.mp4#000000"]
    assert "landmarks of 10 frames, and the video has more" in notes["few.mp4"] and "junk.mp4: not a video" in notes["junk.mp4"]
    page = (straight / "report.html").read_text()
    assert "two people.mp4#000012" in page and "no face" in page and len(list((straight / "report").glob("*.jpg"))) == 13
    assert not (straight / ".parts").exists()


def test_clips_are_the_videos_cropped_once(straight, videos):
    clip = all_clips(straight)["ann.mp4#000020"]
    frames, landmarks = person(0, 40)
    smooth = faces.smooth(landmarks)[20:]
    crop = faces.driving_crop(smooth, scale=DataConfig().face_scale, within=(64, 64))
    assert clip.video == "ann.mp4" and clip.start == pytest.approx(0.8) and clip.fps == 25 and not clip.has_driver
    np.testing.assert_allclose(clip.target_landmarks, faces.crop_landmarks(smooth, crop, SIZE), atol=0.01)
    expected = np.stack([faces.apply_crop(frame, crop, SIZE) for frame in frames[20:]])
    assert clip.target.shape == expected.shape and np.abs(clip.target.astype(int) - expected).mean() < 4
    assert all(np.abs(clip.target[n].astype(int) - expected[n]).mean() < np.abs(clip.target[n].astype(int) - expected[n - 5]).mean() for n in range(5, 20))


def test_another_frame_rate_is_resampled_with_its_landmarks(straight):
    clip = all_clips(straight)["fifty.mp4#000012"]
    _, landmarks = person(2, 50)
    smooth = faces.smooth(landmarks[::2])[12:]
    crop = faces.driving_crop(smooth, scale=DataConfig().face_scale, within=(64, 64))
    np.testing.assert_allclose(clip.target_landmarks, faces.crop_landmarks(smooth, crop, SIZE), atol=0.01)


def test_no_video_is_in_two_splits(straight):
    by_split = {
        split: {clips.open_clips(straight, split=split).stored(n).video for n in range(len(clips.open_clips(straight, split=split)))}
        for split in clips.splits(straight)
    }
    assert set(by_split) == {"train", "validation"} and not by_split["train"] & by_split["validation"]


def test_the_same_command_again_says_that_it_is_done_and_another_one_is_refused(straight, videos, capsys, monkeypatch):
    monkeypatch.setenv("SVDP_FACE_LANDMARKER", "")
    before = records(straight)
    with pytest.warns(UserWarning, match="no landmarker"):
        run(straight, videos)
    assert "is complete" in capsys.readouterr().out and records(straight) == before
    with pytest.raises(ConfigError, match="was begun with --rules.min-face 20.0; use the same"), pytest.warns(UserWarning):
        run(straight, videos, flags=["--rules.min-face", "30"])
    with (
        pytest.raises(ConfigError, match=r"was begun with other input, 1 fewer .er/bob.mov. and 11 more .ann.mp4, .*; use the same"),
        pytest.warns(UserWarning),
    ):
        run(straight, videos / "deep")


@pytest.mark.filterwarnings("ignore:no landmarker given")
def test_machines_share_the_work(straight, videos, tmp_path, capsys):
    run(tmp_path / "clips", videos, flags=["--shard", "1/2"])
    assert "share 1/2 is done; 6 of 11 videos" in capsys.readouterr().out and not (tmp_path / "clips" / "dataset_info.json").exists()
    run(tmp_path / "clips", videos, flags=["--shard", "0/2"])
    assert records(tmp_path / "clips") == records(straight)


@pytest.mark.filterwarnings("ignore:no landmarker given")
def test_where_nothing_is_kept_the_report_says_why(videos, tmp_path):
    with pytest.raises(ConfigError, match="no clip was kept .2 face too small.: see .*report.html"):
        run(tmp_path / "clips", videos / "deep", flags=["--rules.min-face", "500"])
    assert [row["dropped"] for row in rows(tmp_path / "clips")] == ["face too small"] * 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "needs --input"),
        (["--input", "nowhere", "--output", "x"], "--input nowhere does not exist"),
        (["--input", "{empty}", "--output", "x"], "holds no video"),
        (["--input", "{videos}", "--output", "x", "--shard", "2/2"], "--shard 2/2: takes i/n"),
        (["--input", "{videos}", "--output", "x", "--size", "31"], "--size 31 must be even"),
        (["--input", "{videos}", "--output", "x", "--landmarker", "missing.task"], "missing.task: does not exist"),
        (["--input", "{videos}", "--output", "x", "--landmarker", "one.npz"], "one.npz: holds the landmarks of one video; put it beside that"),
        (["--input", "{videos}", "--output", "x", "--rules.min-frames", "200"], "min_frames=200"),
    ],
)
def test_mistakes_are_one_line_before_any_work(flags, said, videos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SVDP_FACE_LANDMARKER", "")
    (tmp_path / "nothing").mkdir()
    given = [flag.format(videos=videos, empty=tmp_path / "nothing") for flag in flags]
    with pytest.raises((ConfigError, video.MediaError), match=said) as error:
        prepare.main(cli.parse(prepare.Flags(), given, description="", prog=""))
    assert "\n" not in str(error.value) and not (tmp_path / "x").exists()


@pytest.mark.filterwarnings("ignore:no landmarker given")
def test_all_clips_have_one_kind_of_landmarks(tmp_path):
    for name in "abc":
        write(tmp_path / "videos" / f"{name}.mp4", [(0, 20)])
    (tmp_path / "videos" / "b.npz").unlink()
    detectors.write_landmarks(tmp_path / "videos" / "c.npz", np.random.default_rng(0).uniform(10, 50, (20, 478, 2)).astype(np.float32))
    assert prepare.landmarks_per_face(None, [tmp_path / "videos" / "b.mp4", tmp_path / "videos" / "c.mp4"]) == 478
    run(tmp_path / "clips", tmp_path / "videos")
    (note,) = [row["note"] for row in rows(tmp_path / "clips") if row["name"] == "c.mp4"]
    assert "c.npz: 478 per face, and all clips must have 68" in note


@pytest.mark.filterwarnings("ignore:no landmarker given")
def test_landmarks_that_may_be_of_something_else_are_told(tmp_path):
    long = write(tmp_path / "videos" / "long.mp4", [(0, 30)])
    write(tmp_path / "videos" / "trimmed.mp4", [(1, 20)])
    shutil.copy(long.with_suffix(".npz"), tmp_path / "videos" / "trimmed.npz")
    shutil.copy(long, tmp_path / "videos" / "long.MOV")
    write(tmp_path / "videos" / "good.mp4", [(2, 20)])
    run(tmp_path / "clips", tmp_path / "videos")
    notes = {row["name"]: row["note"] for row in rows(tmp_path / "clips")}
    assert "trimmed.npz: of 30 frames, and the video has 20" in notes["trimmed.mp4#000000"] and not notes["good.mp4#000000"]
    assert "long.npz: of long.MOV or of long.mp4? give the videos different names" in notes["long.mp4"] == notes["long.MOV"]


def test_waste_bins_are_not_searched(tmp_path):
    for path in (".Trash-1000/files/x.mp4", "$RECYCLE.BIN/y.mp4", "@eaDir/z.mp4", "deep/er/a.mp4"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    assert list(prepare.find_videos([tmp_path])) == ["deep/er/a.mp4"]


def test_names_of_videos_in_several_folders_differ(tmp_path):
    for path in ("a/x.mp4", "b/x.mp4", "b/c/x.mkv"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert list(prepare.find_videos([tmp_path / "a", tmp_path / "b", tmp_path / "b" / "c"])) == ["a/x.mp4", "b/c/x.mkv", "b/x.mp4"]
    assert list(prepare.find_videos([tmp_path / "a"])) == ["x.mp4"]
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "loop").symlink_to(tmp_path / "b")
    assert list(prepare.find_videos([tmp_path / "links"])) == ["b/c/x.mkv", "b/x.mp4"]
    assert len(prepare.find_videos([tmp_path / "b", tmp_path / "a" / ".." / "b", tmp_path / "links"])) == 2, "no video twice"
    assert list(prepare.find_videos([tmp_path / "b" / "c" / "x.mkv"])) == ["x.mkv"]


def test_clips_become_pairs_that_a_loader_reads(straight, tmp_path):
    from svdp_jax.data import pairs

    pairs.main(
        cli.parse(pairs.Flags(), ["--input", str(straight), "--output", str(tmp_path / "pairs"), "--augment", "--workers", "2"], description="", prog="")
    )
    data = DataConfig(path=str(tmp_path / "pairs"), size=SIZE, frames=4, history=2)
    batches = loader.batches(data, split="train", seed=0, batch=2)
    assert next(batches).driving.shape == (2, 4, SIZE, SIZE, 3)
    batches.close()
    before, after = all_clips(straight), all_clips(tmp_path / "pairs")
    assert before.keys() == after.keys()
    for name, clip in after.items():
        np.testing.assert_array_equal(clip.driver_landmarks, clip.target_landmarks)
        assert np.abs(clip.target.astype(int) - before[name].target).mean() < 3 < np.abs(clip.target.astype(int) - clip.driver).mean()


# --------------------------------------------------------------------------------------------------------- killed and resumed

# What a video can do to a decoder: it ends the process that reads crash.mp4, and never comes back from hang.mp4.
DECODER = """
import os, time
import av
from svdp_jax.data import workers

def read(file, *arguments, **options):
    match os.path.basename(str(file)):
        case "crash.mp4":
            os.abort()
        case "hang.mp4":
            time.sleep(600)
    return opened(file, *arguments, **options)

opened, av.open, workers.HANGS = av.open, read, 3
"""


def test_videos_that_crash_or_hang_their_decoder_stop_nothing(tmp_path):
    for name in "crash", "good", "hang", "other":
        write(tmp_path / "videos" / f"{name}.mp4", [(len(name), 20)])
    (tmp_path / "patches").mkdir()
    (tmp_path / "patches" / "sitecustomize.py").write_text(DECODER)
    said = ended(start(tmp_path / "videos", tmp_path / "clips", patches=tmp_path / "patches"))
    assert [(row["name"], row["dropped"]) for row in rows(tmp_path / "clips")] == [
        ("crash.mp4", "cannot be read"), ("good.mp4#000000", ""), ("hang.mp4", "cannot be read"), ("other.mp4#000000", "")
    ]  # fmt: skip
    assert {row["note"] for row in rows(tmp_path / "clips") if row["dropped"]} == {"its process died or hung, twice"}
    assert "100%" in said and "4 pieces" in said and "2 clips kept, 2 dropped" in said and "<00:00" in said, "a progress bar with the time left"



COMMAND = [sys.executable, "-m", "svdp_jax.data.prepare", "--size", str(SIZE), *RULES, "--workers", "2"]


def start(videos, output, *flags, patches=""):
    variables = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{patches}", "SVDP_FACE_LANDMARKER": ""}
    command = [*COMMAND, "--input", videos, "--output", output, *flags]
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process):
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def killed(videos, output, *, after, rng):
    """Starts the command and kills it at a random moment behind its part number `after`, or -1: while shards are written. Returns the number of
    parts that were there, -1 where there was a shard; None where the command was quicker."""
    process = start(videos, output)
    count = lambda: len(list((output / ".parts").glob("*.part")))
    shards = lambda: list(output.glob("clips-*")) + list(output.glob(".clips-*.partial"))
    while process.poll() is None and not (shards() if after < 0 else count() >= after):
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.15) if after >= 0 else 0)
    process.kill()
    done, said = process.wait() == 0, -1 if shards() else count()
    process.stdout.close()
    return None if done else said


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_ends_in_the_same_records(straight, videos, tmp_path, kills):
    output, rng, points = tmp_path / "clips", random.Random(kills), []
    while len(points) < kills:
        last = points[-1] if points else 0
        left = kills - len(points)
        after = -1 if left <= kills // 5 else rng.randint(last, min(last + 1 + 9 // kills, 10))  # the last ones while shards are written
        point = killed(videos, output, after=after, rng=rng)
        if point is None:
            shutil.rmtree(output)  # it was quicker: all begins anew
            points.clear()
        else:
            points.append(point)
    print(f"killed with so many of 11 parts there, -1 with shards: {points}")
    assert any(0 < point < 11 for point in points)
    ended(start(videos, output))
    assert records(output) == records(straight)
    assert (output / "report.csv").read_text() == (straight / "report.csv").read_text()
    assert not list(output.glob(".*")), "nothing is left behind"


def test_machines_that_work_at_once_end_in_the_same_records(straight, videos, tmp_path):
    output = tmp_path / "clips"
    machines = [start(videos, output, "--shard", f"{index}/3") for index in (0, 1, 2, 2)]  # and one was started twice
    said = "".join(map(ended, machines))
    assert "next: python -m svdp_jax.data.pairs" in said and records(output) == records(straight)
    assert "is complete" in ended(start(videos, output)) and not list(output.glob(".parts*"))


@pytest.mark.filterwarnings("ignore:no landmarker given")
def test_a_part_that_comes_late_or_is_damaged_is_no_trouble(straight, videos, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SVDP_FACE_LANDMARKER", "")
    output = tmp_path / "clips"
    run(output, videos, flags=["--shard", "0/2"])
    (output / ".parts" / "000002.part").write_bytes(b"")  # lost with the machine
    run(output, videos, flags=["--shard", "1/2"])
    assert "1 of 11 videos are not" in capsys.readouterr().out
    run(output, videos)
    assert records(output) == records(straight)
    parts.write_part(output / ".parts", 3, [({"name": "late", "dropped": "", "note": "", "thumbnail": ""}, b"record")])
    capsys.readouterr()
    run(output, videos)
    assert "is complete" in capsys.readouterr().out and not (output / ".parts").exists() and records(output) == records(straight)


@pytest.mark.filterwarnings("ignore:no landmarker given")
def test_a_full_disk_is_one_line(videos, tmp_path, monkeypatch):
    def full(self, record):
        raise RuntimeError("write() failed: No space left on device")

    writer = type("Writer", (), {"__init__": lambda self, *_: None, "write": full, "is_open": lambda self: False})
    monkeypatch.setattr(clips.array_record_module, "ArrayRecordWriter", writer)
    with pytest.raises(video.MediaError, match="a.part: cannot be written .write.. failed: No space left on device.; is the disk full"):
        clips.write_records([b"record"], tmp_path / "a.part")
    assert not list(tmp_path.iterdir())


def test_being_cut_off_while_shards_are_written_loses_nothing(straight, videos, tmp_path, monkeypatch):
    monkeypatch.setenv("SVDP_FACE_LANDMARKER", "")
    monkeypatch.setattr(parts, "SHARD_BYTES", 20_000)
    written, write_records = [], clips.write_records

    def dies_at_the_third(records, path):
        if path.name.startswith("clips-"):
            if len(written) == 2:
                raise MemoryError("gone")
            written.append(path)
        write_records(records, path)

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="no landmarker"), pytest.raises(MemoryError):
        patch.setattr(clips, "write_records", dies_at_the_third)
        run(tmp_path / "clips", videos)
    kept = [path.stat().st_mtime_ns for path in written]
    with pytest.warns(UserWarning, match="no landmarker"):
        run(tmp_path / "clips", videos)
    assert [path.stat().st_mtime_ns for path in written] == kept, "what was there is not written again"
    one, other = all_clips(tmp_path / "clips"), all_clips(straight)
    assert list(one) == list(other) and len(records(tmp_path / "clips")) > 4
    assert all((one[name].target == other[name].target).all() for name in one)
