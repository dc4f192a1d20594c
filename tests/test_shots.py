"""Shots, stretches with one face, and the rules that drop clips."""

import cv2
import numpy as np
import pytest

from svdp_jax.config import ConfigError
from svdp_jax.data import detectors, shots

RULES = shots.Rules(min_frames=10, max_frames=20, min_face=30, max_step=0.3, min_sharpness=5)
_RNG = np.random.default_rng(0)
BLURRED = np.stack([cv2.resize(_RNG.integers(20, 200, (5, 5, 3), np.uint8), (80, 80), interpolation=cv2.INTER_LINEAR) for _ in range(3)])
SCENES = (BLURRED + _RNG.integers(0, 20, (3, 80, 80, 1))).astype(np.uint8)


def face(x=10.0, side=50.0):
    return (detectors.average_face() * side + [x, 10]).astype(np.float32)


def run(*faces_by_frame, scenes=None, rules=RULES, blur=()):
    """Candidates of a video in which each frame shows these faces, on the scene of its number."""
    scenes = scenes or [0] * len(faces_by_frame)
    frames = [BLURRED[scene] if number in blur else SCENES[scene] for number, scene in enumerate(scenes)]
    shown = iter(faces_by_frame)
    return list(shots.candidates(frames, lambda frame: np.array(next(shown), np.float32).reshape(-1, 68, 2), rules))


def spans(found):
    return [(one.start, one.stop, one.dropped) for one in found]


def test_a_long_stretch_is_divided_evenly():
    found = run(*[[face()]] * 45)
    assert spans(found) == [(0, 15, ""), (15, 30, ""), (30, 45, "")]
    assert all(one.landmarks.shape == (15, 68, 2) and 37 < one.face < 42 and one.step < 0.01 and one.sharpness > 5 for one in found)
    np.testing.assert_allclose(found[0].landmarks, np.stack([face()] * 15), atol=1e-3)


def test_clips_are_as_long_as_both_rules_allow():
    rules = shots.Rules(min_frames=16, max_frames=20, min_face=30, min_sharpness=5)
    assert spans(run(*[[face()]] * 30, rules=rules)) == [(0, 20, "")], "two of 15 would be too short"
    assert spans(run(*[[face()]] * 32, rules=rules)) == [(0, 16, ""), (16, 32, "")]


def test_another_face_in_its_place_ends_a_clip():
    far = (detectors.average_face() * 50 + [300, 10]).astype(np.float32)
    assert spans(run(*[[face()]] * 12, *[[far]] * 3, *[[face()]] * 12)) == [(0, 12, ""), (12, 15, "too short"), (15, 27, "")]


def test_a_cut_ends_a_clip_and_a_short_rest_is_too_short():
    assert spans(run(*[[face()]] * 30, scenes=[0] * 12 + [1] * 13 + [2] * 5)) == [(0, 12, ""), (12, 25, ""), (25, 30, "too short")]


def test_after_a_cut_the_largest_face_is_followed_again():
    small, large = face(side=35), face(x=30, side=48)
    found = run(*[[small]] * 12, *[[small, large]] * 12, scenes=[0] * 12 + [1] * 12)
    assert [one.face < 32 for one in found] == [True, False]
    assert all(one.face < 32 for one in run(*[[small]] * 12, *[[small, large]] * 12)), "without a cut it is the same person's"


def test_short_gaps_are_held_and_long_ones_end_a_stretch():
    short = run(*[[face()]] * 8, *[[]] * 5, *[[face()]] * 7)
    assert spans(short) == [(0, 20, "")]
    long = run(*[[face()]] * 12, *[[]] * 6, *[[face()]] * 12)
    assert spans(long) == [(0, 12, ""), (18, 30, "")]
    assert spans(run(*[[face()]] * 12, *[[]] * 13)) == [(0, 12, ""), (12, 25, "no face")]
    assert spans(run(*[[]] * 15, *[[face()]] * 10)) == [(0, 15, "no face"), (15, 25, "")]
    assert spans(run(*[[]] * 4, *[[face()]] * 10)) == [(4, 14, "")]
    assert run(*[[]] * 9) == [] and run() == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"faces": [[face(side=25)]] * 12}, "face too small"),
        ({"faces": [[face(x=5)]] * 6 + [[face(x=20)]] * 6}, "face jumps"),
        ({"faces": [[face(side=40)]] * 6 + [[face(side=70)]] * 6}, "face jumps"),
        ({"faces": [[face()]] * 12, "blur": range(12)}, "blurred"),
        ({"faces": [[face()]] * 12, "blur": range(5)}, ""),
    ],
)
def test_what_is_of_no_use_is_dropped_and_why(change, reason):
    (one,) = run(*change["faces"], blur=change.get("blur", ()), scenes=[0] * 12)
    assert one.dropped == reason


def test_a_cut_between_like_pictures_is_found_and_a_moving_one_is_not_cut():
    rng = np.random.default_rng(1)
    wall = np.full((90, 120, 3), 150, np.uint8)
    one, other = wall.copy(), wall.copy()
    one[10:80, 30:90], other[12:80, 32:92] = (200, 150, 120), (180, 100, 80)
    noisy = lambda picture: np.clip(picture + rng.normal(0, 2, picture.shape), 0, 255).astype(np.uint8)
    frames = [noisy(one) for _ in range(10)] + [noisy(other) for _ in range(10)]
    assert [number for number, (_, cut) in enumerate(shots.with_cuts(frames)) if cut] == [10]
    moving = [np.roll(SCENES[0], number, axis=1) for number in range(20)]
    kept = list(shots.with_cuts(moving))
    assert not any(cut for _, cut in kept)
    assert all((frame == given).all() for (frame, _), given in zip(kept, moving, strict=True))


@pytest.mark.parametrize("size", [(2, 4000), (4000, 3), (1, 1)])
def test_pictures_may_be_as_thin_as_can_be(size):
    assert not any(cut for _, cut in shots.with_cuts([np.zeros((*size, 3), np.uint8)] * 6))


def test_rules_that_cannot_be_met_are_named():
    with pytest.raises(ConfigError, match="min_frames=30, max_frames=20"):
        shots.Rules(min_frames=30, max_frames=20)
