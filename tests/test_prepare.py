"""prepare: videos to clips. What is kept, what is dropped and why, and that several machines share the work."""

import shutil

import numpy as np
import pytest
from prepared import SIZE, all_clips, person, records, rows, run, write

from svdp_jax import cli
from svdp_jax.config import ConfigError, DataConfig
from svdp_jax.data import clips, detectors, faces, loader, prepare, video


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
