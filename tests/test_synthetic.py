"""The rendered portraits: seeds decide everything, splits share nobody, motion is lively, and the command writes a dataset."""

import time

import numpy as np
import pytest

from svdp_jax.data import clips, drawing, synthetic

SEEDS = range(12)


def test_a_seed_decides_everything():
    frames, landmarks = synthetic.render_clip(synthetic.identity(3), synthetic.motion(5, 6), size=48)
    again, same_landmarks = synthetic.render_clip(synthetic.identity(3), synthetic.motion(5, 6), size=48)
    assert (frames == again).all() and (landmarks == same_landmarks).all()
    assert frames.shape == (6, 48, 48, 3) and frames.dtype == np.uint8
    assert landmarks.shape == (6, 68, 2) and landmarks.dtype == np.float32
    assert len({synthetic.identity(seed) for seed in range(200)}) == 200


def test_a_frame_does_not_depend_on_the_others():
    whole, part = synthetic.motion(7, 60), synthetic.motion(7, 20)
    for long, short in zip(whole, part, strict=True):
        np.testing.assert_array_equal(long[:20], short)
    who = synthetic.identity(1)
    frames, landmarks = synthetic.render_clip(who, part, size=32)
    one, one_landmarks = synthetic.render_clip(who, drawing.Motion(*(field[9:10] for field in part)), size=32)
    np.testing.assert_array_equal(frames[9:10], one)
    np.testing.assert_array_equal(landmarks[9:10], one_landmarks)


def test_motion_is_lively_but_smooth():
    moves = [synthetic.motion(seed, 250) for seed in SEEDS]
    for name, limit, least_spread, greatest_step in (
        ("x", 0.09, 0.02, 0.02),
        ("y", 0.06, 0.012, 0.015),
        ("roll", np.radians(12), 0.05, 0.05),
        ("yaw", np.radians(25), 0.1, 0.1),
        ("pitch", np.radians(15), 0.06, 0.06),
        ("gaze_x", 1, 0.4, 0.6),
        ("gaze_y", 1, 0.4, 0.6),
        ("brow", 1, 0.35, 0.4),
        ("mouth_width", 1, 0.35, 0.45),
        ("smile", 1, 0.35, 0.4),
        ("mouth_open", 1, 0.3, 0.65),
        ("blink", 1, 0.1, 0.55),
    ):
        values = np.stack([getattr(move, name) for move in moves])
        assert np.abs(values).max() <= limit * 1.0001, name
        assert values.std() > least_spread, name
        assert np.abs(np.diff(values)).max() < greatest_step, name
    for move in moves:
        opened, shut = move.mouth_open > 0.8, move.mouth_open < 0.15
        assert all(opened[i : i + 50].any() and shut[i : i + 50].any() for i in range(0, 200, 25)), "the mouth should open and close in 2 s"
        blinks = (np.diff((move.blink > 0.01).astype(int)) == 1).sum()
        assert 3 <= blinks <= 8 and (move.blink > 0.01).sum() / max(blinks, 1) < 8


def test_copying_a_frame_does_not_solve_a_clip():
    psnr = []
    for index in SEEDS[:8]:
        clip = synthetic.pair("validation", index, frames=24, size=64)
        frames = clip.target.astype(float)
        error = ((frames[np.arange(24) != 5] - frames[5]) ** 2).mean((1, 2, 3))
        psnr.append(np.mean(10 * np.log10(255**2 / error)))
        steps = ((frames[1:] - frames[:-1]) ** 2).mean((1, 2, 3))
        assert np.median(steps) < 0.5 * np.median(error)
    assert 15.5 < np.mean(psnr) < 19


def test_splits_share_no_seed():
    splits, kinds = ("train", "validation", "test"), ("identity", "motion")
    indices = (0, 1, 2, 1000, 2**40 - 1)
    seeds = [synthetic.split_seed(split, index, kind) for split in splits for kind in kinds for index in indices]
    assert len(set(seeds)) == len(seeds)
    with pytest.raises(ValueError, match="index=-1"):
        synthetic.split_seed("train", -1, "motion")
    with pytest.raises(ValueError, match="split='val'"):
        synthetic.split_seed("val", 0, "motion")


def test_pairs_are_two_new_people_in_one_motion():
    people = set()
    for index in range(20):
        people |= {synthetic.identity(synthetic.split_seed("train", i, "identity")) for i in (2 * index, 2 * index + 1)}
    assert len(people) == 40
    clip, other = (synthetic.pair(split, 4, frames=5, size=32) for split in ("train", "test"))
    moves = synthetic.motion(synthetic.split_seed("train", 4, "motion"), 5)
    for frames, landmarks, seed in (clip.target, clip.target_landmarks, 8), (clip.driver, clip.driver_landmarks, 9):
        expected, expected_landmarks = synthetic.render_clip(synthetic.identity(seed), moves, size=32)
        np.testing.assert_array_equal(frames, expected)
        np.testing.assert_array_equal(landmarks, expected_landmarks)
    assert (clip.target != clip.driver).any() and (clip.target != other.target).any()
    assert clip.id != other.id and clip.fps == 25.0


def test_a_share_of_pairs_is_in_colours_of_its_own():
    plain = [synthetic.pair("train", index, frames=2, size=32) for index in range(30)]
    clips_ = [synthetic.pair("train", index, frames=2, size=32, recoloured=0.3) for index in range(30)]
    changed = [(a.target != b.target).any() for a, b in zip(plain, clips_, strict=True)]
    assert changed == [(a.driver != b.driver).any() for a, b in zip(plain, clips_, strict=True)] and 4 <= sum(changed) <= 15
    assert all((a.target_landmarks == b.target_landmarks).all() for a, b in zip(plain, clips_, strict=True)), "nothing moves"


def test_both_people_are_drawn_in_the_style_that_is_asked_for():
    plain, drawn = (synthetic.pair("test", 0, frames=2, size=32, style=style) for style in (None, "pencil"))
    for before, after in (plain.target, drawn.target), (plain.driver, drawn.driver):
        assert np.ptp(before.astype(int), axis=-1).max() > 60 and np.ptp(after.astype(int), axis=-1).max() < 12, "grey, but for the paper"
    assert (plain.target_landmarks == drawn.target_landmarks).all()


def test_who_drives_themselves_is_their_own_driver():
    pair, itself = (synthetic.pair("train", 3, frames=2, size=32, recoloured=1.0, same_person=same) for same in (False, True))
    assert (itself.target == pair.target).all() and (itself.driver == itself.target).all() and (itself.driver_landmarks == itself.target_landmarks).all()


def test_rendering_is_fast():
    who, move = synthetic.identity(0), synthetic.motion(0, 24)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        synthetic.render_clip(who, move, size=128)
        seconds.append(time.process_time() - start)
    assert 24 / min(seconds) > 60  # frames per second of one core


def test_the_command_writes_a_dataset_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(synthetic, "PAIRS_PER_SHARD", 2)
    command = ["--output", str(tmp_path), "--pairs", "3", "--validation-pairs", "1", "--frames", "6", "--size", "32"]
    synthetic.main(command)
    shards = sorted(tmp_path.glob("*.array_record*"))
    assert len(shards) == 3
    written = [shard.stat().st_mtime_ns for shard in shards]
    shards[0].unlink()
    synthetic.main(command)
    assert [shard.stat().st_mtime_ns for shard in shards[1:]] == written[1:] and shards[0].exists()
    source = clips.open_clips(tmp_path, split="train")
    assert len(source) == 3
    for index in range(3):
        expected = synthetic.pair("train", index, frames=6, size=32)
        found = source[index]
        assert found.id == expected.id
        np.testing.assert_array_equal(found.driver_landmarks, expected.driver_landmarks)
        assert np.abs((found.target.astype(float) - expected.target) @ [0.3, 0.6, 0.1]).mean() < 3  # the codec halves colour, not light
    with pytest.raises(SystemExit):
        synthetic.main([*command[:-1], "48"])
    assert "begun with --size 32; use the same, or another --output" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        synthetic.main(["--output", str(tmp_path / "file" / "data"), *command[2:]])
    assert end.value.code == 2 and "cannot be written" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        synthetic.main([*command[:-1], "8"])
    assert "--size 8 must be 16 to 2048" in capsys.readouterr().err


def test_a_frame_too_small_for_a_face_is_refused():
    with pytest.raises(ValueError, match="size=8 is too small"):
        synthetic.render_clip(synthetic.identity(0), synthetic.motion(0, 1), size=8)
