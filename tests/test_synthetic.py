"""The rendered portraits: seeds decide everything, landmarks sit on what is drawn, and two people in one motion move alike."""

import time

import cv2
import numpy as np
import pytest

from svdp_jax.data import clips, faces, synthetic

SEEDS = range(12)
LEFT_EYE, RIGHT_EYE, OUTER_LIPS, INNER_LIPS = np.r_[36:42], np.r_[42:48], np.r_[48:60], np.r_[60:68]


def still(frames=1, **changes):
    """No motion at all, but for `changes`."""
    zeros = np.zeros(frames, np.float32)
    return synthetic.Motion(*[zeros] * len(synthetic.Motion._fields))._replace(**{k: np.float32(v) + zeros for k, v in changes.items()})


def inside(points, size):
    """Boolean [size, size]: the pixels of a polygon in pixels."""
    return cv2.fillPoly(np.zeros((size, size), np.uint8), [np.round(points * 64).astype(np.int32)], 1, shift=6).astype(bool)


def near(frame, colour, tolerance):
    return np.abs(frame.astype(int) - np.round(colour).astype(int)).max(-1) <= tolerance


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
    one, one_landmarks = synthetic.render_clip(who, synthetic.Motion(*(field[9:10] for field in part)), size=32)
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


def test_one_motion_moves_two_people_alike():
    for seed in SEEDS[:6]:
        move = synthetic.motion(seed, 40, fps=10.0)
        a, b = (synthetic.render_clip(synthetic.identity(who), move, size=16)[1] for who in (2 * seed, 2 * seed + 1))
        a, b = a - a.mean(0), b - b.mean(0)
        correlation = (a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0))  # [68, 2]
        assert correlation.min() > 0.97
        assert np.abs(a - b).max() < 0.035 * 16  # proportions are alike, so the same pose is in nearly the same place


def test_proportions_are_alike():
    rest = np.concatenate([synthetic.render_clip(synthetic.identity(seed), still(), size=16)[1] for seed in range(100)])
    assert np.abs(rest - rest.mean(0)).max() < 0.025 * 16
    assert rest.std(0).max() > 0.005 * 16  # but not the same


def test_pose_moves_the_features():
    who = synthetic.identity(0)
    rest = synthetic.render_clip(who, still(), size=100)[1]
    shift = {}
    for name, value in {"x": 0.05, "y": 0.05, "yaw": 0.3, "pitch": 0.2, "roll": 0.2}.items():
        shift[name] = (synthetic.render_clip(who, still(**{name: value}), size=100)[1] - rest)[0]
    np.testing.assert_allclose(shift["x"], np.broadcast_to([5, 0], (68, 2)), atol=1e-4)
    np.testing.assert_allclose(shift["y"], np.broadcast_to([0, 5], (68, 2)), atol=1e-4)
    nose, jaw = np.r_[27:36], np.r_[0:17]
    assert shift["yaw"][nose, 0].mean() > 4 and shift["pitch"][nose, 1].mean() > 2  # to the image's right, down
    assert shift["yaw"][nose, 0].mean() > 2 * shift["yaw"][jaw, 0].mean()  # parallax: the outline moves less
    assert shift["roll"][LEFT_EYE, 1].mean() < -1 < 1 < shift["roll"][RIGHT_EYE, 1].mean()  # clockwise


@pytest.mark.parametrize("size", [64, 128])
def test_resolutions_agree(size):
    for seed in SEEDS:
        who, move = synthetic.identity(seed), synthetic.motion(seed, 2)
        large, large_landmarks = synthetic.render_clip(who, move, size=2 * size)
        small, small_landmarks = synthetic.render_clip(who, move, size=size)
        np.testing.assert_allclose((large_landmarks + 0.5) / 2, small_landmarks + 0.5, atol=1e-4)
        halved, moved = (
            np.stack([cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA) for frame in frames]).astype(int)
            for frames in (large, np.roll(large, 1, axis=2))
        )
        difference, half_a_pixel = np.abs(halved - small).mean(), np.abs(halved - moved).mean()
        assert difference < 0.45 * half_a_pixel


@pytest.mark.parametrize("seed", SEEDS)
def test_the_mouth_is_where_its_landmarks_are(seed):
    size = 128
    who = synthetic.identity(seed)
    move = synthetic.motion(seed, 24)._replace(mouth_open=np.linspace(0, 1, 24).astype(np.float32))
    frames, landmarks = synthetic.render_clip(who, move, size=size)
    boxes, shown = faces.regions(landmarks, margin=0.03)[:, 3], []
    for frame, points, (x0, y0, x1, y1), opening in zip(frames, landmarks, boxes, move.mouth_open, strict=True):
        dark = near(frame, synthetic.MOUTH_INSIDE, 6)
        lips = inside(points[OUTER_LIPS], size)
        y, x = np.nonzero(dark)
        assert not len(x) or ((x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1)).all()
        assert not (dark & ~lips).any()
        if opening > 0.5:
            assert dark[inside(points[INNER_LIPS], size)].mean() > 0.15
        shown.append(dark.sum())
    assert shown[0] == 0 and shown[-1] > 100 and shown[-1] > 1.5 * shown[12]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_eyes_are_where_their_landmarks_are(seed):
    size = 128
    who = synthetic.identity(seed)._replace(glasses=False, iris=(20.0, 220.0, 40.0))  # a colour that nothing else has
    move = synthetic.motion(seed, 16)._replace(blink=np.zeros(16, np.float32))
    frames, landmarks = synthetic.render_clip(who, move, size=size)
    boxes = faces.regions(landmarks, margin=0.02)[:, :2]
    for frame, points, pair in zip(frames, landmarks, boxes, strict=True):
        green = near(frame, who.iris, 30)
        y, x = np.nonzero(green)
        in_box = [(x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1) for x0, y0, x1, y1 in pair]
        assert min(map(np.sum, in_box)) > 25 and np.logical_or(*in_box).all()
        for eye in LEFT_EYE, RIGHT_EYE:
            white = near(frame, synthetic.EYE_WHITE, 12) | near(frame, synthetic.EYE_SHADE, 12)
            assert white[inside(points[eye], size)].mean() > 0.12
    shut, _ = synthetic.render_clip(who, move._replace(blink=np.ones(16, np.float32)), size=size)
    assert not near(shut, who.iris, 30).any()


def test_gaze_and_blink_are_visible():
    who = synthetic.identity(2)._replace(glasses=False, iris=(20.0, 220.0, 40.0))
    (left, right), _ = synthetic.render_clip(who, still(2, gaze_x=[-1, 1]), size=128)
    x = [np.nonzero(near(frame, who.iris, 30))[1].mean() for frame in (left, right)]
    assert x[1] - x[0] > 6
    _, landmarks = synthetic.render_clip(who, still(2, blink=[0, 1]), size=128)
    height = landmarks[:, [40, 41], 1].mean(1) - landmarks[:, [37, 38], 1].mean(1)
    assert height[0] > 12 and abs(height[1]) < 0.1


def test_features_are_large_enough_for_16_pixel_tokens():
    for seed in range(40):
        _, landmarks = synthetic.render_clip(synthetic.identity(seed), still(2, mouth_open=[0, 1]), size=128)
        for eye in LEFT_EYE, RIGHT_EYE:
            width, _ = np.ptp(landmarks[0, eye], axis=0)
            assert 23.9 <= width <= 28
        assert 26 <= np.ptp(landmarks[:, OUTER_LIPS, 0], axis=1).min()
        assert 14 <= np.ptp(landmarks[1, INNER_LIPS, 1]) <= 18
        crown_to_chin = 2 * synthetic.HEAD_UNIT
        assert 0.55 <= crown_to_chin <= 0.6
        assert landmarks[:, :, 0].min() > 0.1 * 128 and landmarks[:, :, 0].max() < 0.9 * 128


def test_every_style_can_be_drawn_in_any_pose():
    moves = still(4, yaw=[-0.44, 0.44, 0, 0], pitch=[0, 0, -0.26, 0.26], x=[-0.09, 0.09, 0, 0], y=[0, 0, -0.06, 0.06])
    for drawing in synthetic.DRAWING:
        for hairstyle in synthetic.HAIRSTYLES:
            who = synthetic.identity(0)._replace(drawing=drawing, hairstyle=hairstyle, glasses=True, beard=True)
            frames, landmarks = synthetic.render_clip(who, moves, size=32)
            assert frames.std() > 20 and (landmarks > 0).all() and (landmarks < 31).all()


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
    with pytest.raises(SystemExit, match="begun with --size 32; use the same, or another --output"):
        synthetic.main([*command[:-1], "48"])
    with pytest.raises(SystemExit):
        synthetic.main([*command[:-1], "8"])
    assert "--size 8 must be 16 to 2048" in capsys.readouterr().err


def test_a_frame_too_small_for_a_face_is_refused():
    with pytest.raises(ValueError, match="size=8 is too small"):
        synthetic.render_clip(synthetic.identity(0), still(), size=8)
