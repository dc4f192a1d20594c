"""How a head is drawn: landmarks sit on what is seen, pose and expression show, and two people in one motion move alike."""

import cv2
import numpy as np
import pytest

from svdp_jax.data import drawing, faces, synthetic

SEEDS = range(12)
LEFT_EYE, RIGHT_EYE, OUTER_LIPS, INNER_LIPS = np.r_[36:42], np.r_[42:48], np.r_[48:60], np.r_[60:68]


def still(frames=1, **changes):
    """No motion at all, but for `changes`."""
    zeros = np.zeros(frames, np.float32)
    return drawing.Motion(*[zeros] * len(drawing.Motion._fields))._replace(**{k: np.float32(v) + zeros for k, v in changes.items()})


def inside(points, size):
    """Boolean [size, size]: the pixels of a polygon in pixels."""
    return cv2.fillPoly(np.zeros((size, size), np.uint8), [np.round(points * 64).astype(np.int32)], 1, shift=6).astype(bool)


def near(frame, colour, tolerance):
    return np.abs(frame.astype(int) - np.round(colour).astype(int)).max(-1) <= tolerance


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
        dark = near(frame, drawing.MOUTH_INSIDE, 6)
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
            white = near(frame, drawing.EYE_WHITE, 12) | near(frame, drawing.EYE_SHADE, 12)
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
        crown_to_chin = 2 * drawing.HEAD_UNIT
        assert 0.55 <= crown_to_chin <= 0.6
        assert landmarks[:, :, 0].min() > 0.1 * 128 and landmarks[:, :, 0].max() < 0.9 * 128


def test_every_style_can_be_drawn_in_any_pose():
    moves = still(4, yaw=[-0.44, 0.44, 0, 0], pitch=[0, 0, -0.26, 0.26], x=[-0.09, 0.09, 0, 0], y=[0, 0, -0.06, 0.06])
    for style in drawing.STYLES:
        for hairstyle in drawing.HAIRSTYLES:
            who = synthetic.identity(0)._replace(drawing=style, hairstyle=hairstyle, glasses=True, beard=True)
            frames, landmarks = synthetic.render_clip(who, moves, size=32)
            assert frames.std() > 20 and (landmarks > 0).all() and (landmarks < 31).all()


def test_the_paper_of_a_style_can_be_taken_away():
    colours = np.random.default_rng(0).integers(0, 256, (50, 3)).astype(np.uint8)
    for name, style in drawing.STYLES.items():
        drawn = np.rint(colours @ drawing.LUMA)[:, None] if style.grey else colours
        assert np.abs(style.untone(style.tone(colours)).astype(float) - drawn).max() <= 1, name
    assert not set(drawing.STYLES) - set(drawing.TRAINED) & {synthetic.identity(seed).drawing for seed in range(60)}
