import importlib.util
import os
import pathlib
import sys
import tracemalloc
import warnings

import cv2
import numpy as np
import pytest
import skimage.data

from svdp_jax.data import detectors, faces, video
from svdp_jax.data.video import MediaError

MEDIA = pathlib.Path(os.environ.get("SVDP_TEST_MEDIA", pathlib.Path(__file__).parents[2] / "shared" / "data"))
LEFT_EYE, RIGHT_EYE, NOSE, MOUTH = slice(42, 48), slice(36, 42), slice(27, 36), slice(48, 68)


def a_face(x=100.0, y=80.0, side=120.0):
    return (detectors.average_face() * side + [x, y]).astype(np.float32)


def random_face(rng, count=68):
    return a_face() + rng.normal(0, 2, (68, 2)).astype(np.float32) if count == 68 else rng.uniform(0, 200, (478, 2)).astype(np.float32)


def with_closed_eyes(face):
    face = face.copy()
    for eye in (LEFT_EYE, RIGHT_EYE):
        face[eye, 1] = face[eye, 1].mean()
    return face


def box_of(points):
    return np.concatenate([points.min(0), points.max(0)])


def test_boxes_hold_their_part_and_the_margin():
    face = random_face(np.random.default_rng(0))
    side = np.ptp(faces.face_box(face)[[0, 2]])
    left, right, nose, mouth = faces.regions(face, margin=0.1)
    out = 0.1 * side * np.array([-1, -1, 1, 1])
    np.testing.assert_allclose(nose, box_of(face[NOSE]) + out, rtol=1e-5)
    np.testing.assert_allclose(mouth, box_of(face[MOUTH]) + out, rtol=1e-5)
    np.testing.assert_allclose(left[[0, 2]], (box_of(face[LEFT_EYE]) + out)[[0, 2]], rtol=1e-5)
    for box, eye in ((left, LEFT_EYE), (right, RIGHT_EYE)):
        assert (box[:2] <= box_of(face[eye])[:2] + out[:2] + 1e-3).all() and (box[2:] + 1e-3 >= box_of(face[eye])[2:] + out[2:]).all()
    assert right[2] < left[0]  # a person's left is on the image's right


def test_a_blink_leaves_the_eye_box_alone():
    face = a_face()
    np.testing.assert_allclose(faces.regions(with_closed_eyes(face), margin=0.06), faces.regions(face, margin=0.06), atol=1e-3)
    wide = face.copy()
    wide[[43, 44], 1] -= 20  # wider than any eye: it must still be inside
    assert faces.regions(wide, margin=0)[0, 1] == pytest.approx(wide[43, 1])


@pytest.mark.parametrize("count", [68, 478])
def test_boxes_move_and_grow_with_the_face(count):
    rng = np.random.default_rng(1)
    batch = np.stack([random_face(rng, count) for _ in range(3)])
    expected = faces.regions(batch, margin=0.06)
    assert expected.shape == (3, 4, 4) and expected.dtype == np.float32
    np.testing.assert_allclose(faces.regions(batch[1], margin=0.06), expected[1])
    moved = faces.regions(batch * 2 + np.float32([30, -7]), margin=0.06)
    np.testing.assert_allclose(moved, expected * 2 + np.float32([30, -7, 30, -7]), rtol=1e-4, atol=1e-3)


def test_an_unknown_number_of_landmarks_is_named():
    with pytest.raises(MediaError, match="5 landmarks per face"):
        faces.regions(np.zeros((5, 2), np.float32), margin=0.1)


def test_masked_frames_are_black_outside_the_boxes_and_untouched_inside():
    rng = np.random.default_rng(2)
    frames = rng.integers(1, 256, (2, 30, 40, 3), np.uint8)
    boxes = np.float32(
        [[[2, 3, 5.5, 7], [30.2, 20, 99, 25], [10, 10, 12, 12], [11, 11, 14, 13]], [[-5, -5, 0, 0], [8, 8, 7, 7], [50, 50, 60, 60], [3, 4, 3, 4]]]
    )
    masked = faces.mask_frames(frames, boxes)
    assert masked.dtype == np.uint8
    for n, y, x in np.ndindex(2, 30, 40):
        seen = any(x0 <= x <= x1 and y0 <= y <= y1 for x0, y0, x1, y1 in boxes[n])
        np.testing.assert_array_equal(masked[n, y, x], frames[n, y, x] if seen else 0)


@pytest.mark.parametrize("crop", [faces.Crop(20, 10, 64), faces.Crop(-15, 30, 100), faces.Crop(31, 20, 40), faces.Crop(30, -110, 170)])
def test_landmarks_follow_the_picture_into_the_crop(crop):
    x, y = np.meshgrid(np.arange(128), np.arange(96))
    point = np.float32([[52.3, 40.6]])
    spot = 255 * np.exp(-((x - point[0, 0]) ** 2 + (y - point[0, 1]) ** 2) / 8)
    cropped = faces.apply_crop(np.repeat(spot[..., None], 3, axis=2).astype(np.uint8), crop, 50)[..., 0].astype(float)
    assert cropped.shape == (50, 50)
    y, x = np.mgrid[:50, :50]
    seen = np.array([(x * cropped).sum(), (y * cropped).sum()]) / cropped.sum()
    np.testing.assert_allclose(faces.crop_landmarks(point, crop, 50)[0], seen, atol=0.1)


def test_a_crop_repeats_the_edge_and_averages_when_it_shrinks():
    frame = np.random.default_rng(3).integers(0, 256, (40, 60, 3), np.uint8)
    np.testing.assert_array_equal(faces.apply_crop(frame, faces.Crop(5, 7, 20), 20), frame[7:27, 5:25])
    outside = faces.apply_crop(frame, faces.Crop(-10, -10, 20), 20)
    np.testing.assert_array_equal(outside[10:, 10:], frame[:10, :10])
    assert (outside[:10, :10] == frame[0, 0]).all() and (outside[12, :10] == frame[2, 0]).all()
    means = frame[:40, :40].reshape(10, 4, 10, 4, 3).mean(axis=(1, 3))
    assert np.abs(faces.apply_crop(frame, faces.Crop(0, 0, 40), 10) - means).max() <= 0.51


def test_the_driving_crop_shows_the_face_at_its_scale():
    rng = np.random.default_rng(4)
    clip = np.stack([a_face() + rng.normal(0, 3, 2).astype(np.float32) for _ in range(20)])
    crop = faces.driving_crop(clip, scale=2.0)
    box = faces.face_box(faces.crop_landmarks(clip, crop, 100))
    np.testing.assert_allclose(box[:, 2] - box[:, 0], 50, atol=1)
    middle = (box[:, :2] + box[:, 2:]).mean(0) / 2
    np.testing.assert_allclose(middle, [49.5, 49.5 + 100 * faces.RAISE / 2], atol=1.5)


def test_the_driving_crop_never_loses_the_face():
    clip = np.stack([a_face(x=100 + 300 * (number == 7)) for number in range(20)])
    box = faces.face_box(faces.crop_landmarks(clip, faces.driving_crop(clip, scale=2.0), 100))
    assert box.min() >= -1.5 and box.max() <= 100.5


def test_the_driving_crop_stays_on_the_frame_if_it_can():
    clip = np.stack([a_face(x=10), a_face(x=40)])  # near the left edge
    free = faces.driving_crop(clip, scale=2.0)
    kept = faces.driving_crop(clip, scale=2.0, within=(640, 480))
    assert free.x0 < 0 and kept.x0 == 0 and kept.side == free.side and kept.y0 == free.y0
    small = faces.driving_crop(clip, scale=4.0, within=(640, 300))
    assert small.side == 300 and small.y0 == 0
    tight = faces.driving_crop(clip, scale=4.0, within=(640, 90))  # less high than the faces: they come before the frame
    box = faces.face_box(faces.crop_landmarks(clip, tight, 100))
    assert box.min() > -1.5 and box.max() < 101.5 and tight.side < 200
    outside = faces.driving_crop(np.stack([a_face(x=-60)]), scale=2.0, within=(640, 480))
    assert faces.face_box(faces.crop_landmarks(np.stack([a_face(x=-60)]), outside, 100)).min() > -1.5, "a face at the border is padded"


def test_the_source_is_cropped_like_the_most_similar_driving_frame():
    rng = np.random.default_rng(5)
    driver = np.stack([random_face(rng) + rng.normal(0, 15, 2).astype(np.float32) for _ in range(12)])
    driver[6] *= 0.8  # of another size, too
    crop = faces.driving_crop(driver, scale=2.3)
    source = driver[6] * 3.3 + np.float32([500, -40])
    placed = faces.crop_landmarks(source, faces.source_crop(source, driver, crop), 256)
    expected = faces.crop_landmarks(driver, crop, 256)
    np.testing.assert_allclose(placed, expected[6], atol=1)
    assert all(np.abs(placed - expected[n]).max() > 5 for n in range(12) if n != 6)
    with pytest.raises(MediaError, match="68 landmarks and driver 478"):
        faces.source_crop(source, random_face(rng, 478)[None], crop)


def test_pasting_back_changes_only_the_crop():
    rng = np.random.default_rng(6)
    source = rng.integers(0, 256, (120, 140, 3), np.uint8)
    crop = faces.Crop(30, 20, 64)
    animated = rng.integers(0, 256, (64, 64, 3), np.uint8)
    pasted = faces.paste_back(source, animated, crop)
    outside = np.ones((120, 140), bool)
    outside[20:84, 30:94] = False
    np.testing.assert_array_equal(pasted[outside], source[outside])
    np.testing.assert_array_equal(pasted[26:78, 36:88], animated[6:58, 6:58])
    np.testing.assert_array_equal(faces.paste_back(source, source[20:84, 30:94], crop), source)
    line = faces.paste_back(np.zeros_like(source), np.full_like(animated, 255), crop)[50, 30:94, 0].astype(int)
    assert 0 < line[0] < 60 and (np.diff(line[:10]) >= 0).all() and (line == line[::-1]).all()


def test_pasting_back_does_not_blend_along_the_edge_of_the_image():
    source, white = np.zeros((60, 80, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8)
    assert (faces.paste_back(source[:, :60], white, faces.Crop(0, 0, 60)) == 255).all()
    corner = faces.paste_back(source, white, faces.Crop(-20, -10, 50))
    assert (corner[:30, :20] == 255).all() and corner[0, 29, 0] < 60 and (corner[40:] == 0).all()
    np.testing.assert_array_equal(faces.paste_back(source, white, faces.Crop(200, 0, 20)), source)


def test_pasting_back_is_blending_with_the_whole_crop():
    rng = np.random.default_rng(8)
    source, animated = rng.integers(0, 256, (150, 200, 3), np.uint8), rng.integers(0, 256, (48, 48, 3), np.uint8)  # noise: the hardest to resize
    crops = [(20, 30, 48), (20, 30, 100), (-40, -70, 301), (150, 100, 177), (-200, 20, 217), (30, -500, 577), (-900, -700, 1999), (60, 60, 21), (5, 5, 1)]
    for x0, y0, side in crops:
        crop = faces.Crop(x0, y0, side)
        inwards = (np.arange(side) + 0.5) / (faces.FEATHER * side)
        ramps = []
        for start, length in (y0, 150), (x0, 200):
            ramps.append(np.minimum(inwards if start > 0 else 1, inwards[::-1] if start + side < length else 1) * np.ones(side))
        alpha = np.minimum(ramps[0], 1)[:, None, None] * np.minimum(ramps[1], 1)[:, None]
        new = cv2.resize(animated, (side, side), interpolation=cv2.INTER_AREA if side < 48 else cv2.INTER_CUBIC)
        expected = source.astype(float)
        y, x = np.mgrid[max(y0, 0) : min(y0 + side, 150), max(x0, 0) : min(x0 + side, 200)]
        expected[y, x] += alpha[y - y0, x - x0] * (new[y - y0, x - x0] - expected[y, x])
        assert np.abs(faces.paste_back(source, animated, crop) - np.rint(expected)).max() <= 1, crop


def test_pasting_back_makes_only_what_lies_in_the_picture():
    source, animated = np.zeros((150, 200, 3), np.uint8), np.zeros((48, 48, 3), np.uint8)
    tracemalloc.start()
    try:
        faces.paste_back(source, animated, faces.Crop(-2500, -3000, 9000))
        assert tracemalloc.get_traced_memory()[1] < 0.05 * 3 * 9000**2
    finally:
        tracemalloc.stop()


def test_long_landmarks_are_not_copied_more_than_they_need_be():
    landmarks = np.repeat(random_face(np.random.default_rng(9), 478)[None], 2000, axis=0)
    crop = faces.Crop(10, 20, 300)
    for copies, call in (2, lambda: faces.crop_landmarks(landmarks, crop, 256)), (2.5, lambda: faces.source_crop(landmarks[0], landmarks, crop)):
        tracemalloc.start()
        try:
            call()
            assert tracemalloc.get_traced_memory()[1] < (copies + 0.1) * landmarks.nbytes
        finally:
            tracemalloc.stop()
    assert faces.crop_landmarks(landmarks, crop, 256).dtype == np.float32


def detector_of(per_frame):
    """A detector that finds the given faces, frame after frame."""
    calls = iter(per_frame)
    return lambda image: np.array(next(calls), np.float32).reshape(-1, 68, 2)


def track(per_frame, **options):
    return faces.track([np.zeros((4, 4, 3), np.uint8)] * len(per_frame), detector_of(per_frame), **options)


def test_the_largest_face_is_followed_even_if_another_outgrows_it():
    one = [a_face(x=10 + n, side=100) for n in range(10)]
    other = [a_face(x=300, side=50 + 20 * n) for n in range(10)]
    per_frame = [[b, a] if n % 2 else [a, b] for n, (a, b) in enumerate(zip(one, other, strict=True))]
    np.testing.assert_allclose(track(per_frame)[2:-2], one[2:-2], atol=0.5)
    np.testing.assert_allclose(track(per_frame, face=1)[:, 0, 0], 300 + 0.11 * (50 + 20 * np.arange(10)), atol=20)
    with pytest.raises(MediaError, match="driving video, frame 0: face 2 asked for, and 2 found"):
        track(per_frame, face=2)
    image = np.zeros((4, 4, 3), np.uint8)
    np.testing.assert_array_equal(faces.find_face(image, detector_of([[other[0], one[0]]])), one[0])
    np.testing.assert_array_equal(faces.find_face(image, detector_of([[other[0], one[0]]]), face=1), other[0])


def test_short_gaps_are_held_and_long_ones_named():
    here, there = [a_face()], [a_face(x=130)]
    held = track([here] * 5 + [[]] * 5 + [there] * 5)
    np.testing.assert_allclose(held[:6], np.stack(here * 6), atol=0.1)
    np.testing.assert_allclose(track([[]] * 3 + [here] * 3), np.stack(here * 6), atol=1e-3)
    far = [a_face(x=900)]  # someone else, further off than a face is wide
    np.testing.assert_allclose(track([here] * 4 + [far] * 3 + [here] * 4), np.stack(here * 11), atol=1e-3)
    with pytest.raises(MediaError, match=r"no face found in d\.mp4, frames 4 to 9 \(0\.16 to 0\.36 s\), 12 to 17 \(0\.48 to 0\.68 s\)"):
        track([here] * 4 + [[]] * 6 + [here] * 2 + [[]] * 6, name="d.mp4")
    with pytest.raises(MediaError, match="no face found in d.mp4: use"):
        track([[]] * 3, name="d.mp4")
    with pytest.raises(MediaError, match="no face found in cat.png: use"):
        faces.find_face(np.zeros((4, 4, 3), np.uint8), detector_of([[]]), name="cat.png")


def test_smoothing_calms_jitter_delays_nothing_and_keeps_blinks():
    rng = np.random.default_rng(7)
    still = np.stack([a_face()] * 41)
    np.testing.assert_allclose(faces.smooth(still), still, atol=1e-3)

    jitter = faces.smooth(still + rng.normal(0, 1, (41, 1, 2)).astype(np.float32)) - still
    assert jitter.mean(axis=1).std() < 0.6

    blink = still.copy()
    blink[20] = with_closed_eyes(a_face())
    opening = np.ptp(faces.smooth(blink)[:, LEFT_EYE, 1], axis=1)
    assert opening.argmin() == 20 and opening[20] < 0.25 * opening[0]
    np.testing.assert_allclose(opening[:20], opening[:20:-1], rtol=1e-3)

    nod = still + (40 * np.exp(-(((np.arange(41) - 20) / 6) ** 2)))[:, None, None].astype(np.float32)
    path = faces.smooth(nod).mean(axis=(1, 2))
    np.testing.assert_allclose(path, path[::-1], rtol=1e-4)
    np.testing.assert_allclose(faces.smooth(nod), nod, atol=4)


def test_landmark_files(tmp_path):
    landmarks = np.stack([a_face()] * 3)
    detectors.write_landmarks(tmp_path / "a.npz", landmarks)
    np.testing.assert_array_equal(detectors.read_landmarks(tmp_path / "a.npz"), landmarks)
    detector = detectors.make_detector(tmp_path / "a.npz")
    frames = [np.zeros((4, 4, 3), np.uint8)] * 4
    np.testing.assert_allclose(faces.track(frames[:3], detector), landmarks, atol=1e-3)
    with pytest.raises(MediaError, match="landmarks of 3 frames, and the video has more"):
        detector(frames[3])
    with pytest.raises(MediaError, match="cannot be written"):
        detectors.write_landmarks(tmp_path / "no" / "a.npz", landmarks)
    landmarks[1] = np.nan  # no face there
    detectors.write_landmarks(tmp_path / "gap.npz", landmarks)
    detector = detectors.make_detector(tmp_path / "gap.npz")
    assert [len(detector(frame)) for frame in frames[:3]] == [1, 0, 1]
    landmarks[1, :5] = 0
    detectors.write_landmarks(tmp_path / "half.npz", landmarks)

    landmarks[1] = 0  # nor is there one in a single point
    detectors.write_landmarks(tmp_path / "point.npz", landmarks)
    detector = detectors.make_detector(tmp_path / "point.npz")
    np.testing.assert_allclose(faces.track(frames[:3], detector), np.stack([a_face()] * 3), atol=1e-3)
    detectors.write_landmarks(tmp_path / "points.npz", 0 * landmarks)
    with pytest.raises(MediaError, match="no face found in d.mp4"):
        faces.track(frames[:3], detectors.make_detector(tmp_path / "points.npz"), name="d.mp4")

    (tmp_path / "junk.npz").write_text("junk")
    with (tmp_path / "single.npz").open("wb") as file:
        np.save(file, landmarks)
    damaged = bytearray((tmp_path / "a.npz").read_bytes())
    damaged[60:80] = b"\xff" * 20
    (tmp_path / "damaged.npz").write_bytes(damaged)
    np.savez(tmp_path / "key.npz", points=landmarks)
    np.savez(tmp_path / "shape.npz", landmarks=landmarks[0])
    np.savez(tmp_path / "nan.npz", landmarks=np.full_like(landmarks, np.nan))
    np.savez(tmp_path / "count.npz", landmarks=landmarks[:, :5])
    np.savez(tmp_path / "words.npz", landmarks=np.array(["a"]))
    for name in ("missing", "junk", "single", "damaged", "key", "shape", "nan", "half", "count", "words"):
        with pytest.raises(MediaError, match=f"{name}.npz" if name != "count" else "5 landmarks per face"):
            detectors.read_landmarks(tmp_path / f"{name}.npz")


def test_the_cascade_finds_the_face_and_says_once_that_it_tracks_no_expression(monkeypatch):
    monkeypatch.delenv("SVDP_FACE_LANDMARKER", raising=False)
    detector, astronaut = detectors.make_detector(None), skimage.data.astronaut()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert detector(np.zeros((100, 80, 3), np.uint8)).shape == (0, 68, 2)
    with pytest.warns(UserWarning, match="expressions are not tracked") as caught:
        warnings.simplefilter("default")
        found = detector(astronaut)
        twice = detector(np.concatenate([astronaut[40:200, 150:310]] * 2, axis=1))
    assert len(caught) == 1 and found.shape == (1, 68, 2) and found.dtype == np.float32
    # Where they are on that photograph.
    centres = [found[0, part].mean(axis=0) for part in (LEFT_EYE, RIGHT_EYE, MOUTH)]
    np.testing.assert_allclose(centres, [[246, 103], [204, 100], [223, 146]], atol=8)
    assert len(twice) == 2


@pytest.mark.parametrize("size", [(2, 4000), (4000, 3), (1, 1), (4, 4), (3, 5)])
def test_pictures_that_can_show_no_face_show_none(size):
    with pytest.raises(MediaError, match="no face found in thin.png"):
        faces.find_face(np.zeros((*size, 3), np.uint8), detectors.cascade_detector(), name="thin.png")


@pytest.mark.filterwarnings("ignore:no landmarker given")
def test_one_face_is_not_found_twice(monkeypatch):
    class Cascade:
        def __init__(self, file):
            pass

        def detect_multi_scale(self, image, **options):
            return [{"c": c, "r": r, "width": width, "height": width} for c, r, width in ((30, 40, 20), (20, 20, 60), (100, 20, 40), (24, 24, 60))]

    monkeypatch.setattr(detectors, "Cascade", Cascade)
    found = detectors.cascade_detector()(np.zeros((200, 200, 3), np.uint8))
    np.testing.assert_allclose(found, detectors.average_face() * [[[60]], [[40]]] + [[[20, 20]], [[100, 20]]] - 0.5, rtol=1e-5)


def test_unusable_landmarkers_are_named(tmp_path, monkeypatch):
    (tmp_path / "a.task").write_bytes(b"junk")
    monkeypatch.setitem(sys.modules, "mediapipe", None)
    with pytest.raises(MediaError, match=r"pip install -e '\.\[face\]'"):
        detectors.make_detector(tmp_path / "a.task")
    monkeypatch.setenv("SVDP_FACE_LANDMARKER", str(tmp_path / "missing.task"))
    with pytest.raises(MediaError, match="missing.task: does not exist"):
        detectors.make_detector(None)
    with pytest.raises(MediaError, match="a.onnx: must be a MediaPipe .task"):
        detectors.make_detector(tmp_path / "a.onnx")


needs_media = pytest.mark.skipif(not (MEDIA / "driving").is_dir(), reason="no real media: set SVDP_TEST_MEDIA")


@needs_media
@pytest.mark.skipif(importlib.util.find_spec("mediapipe") is None, reason="no MediaPipe: pip install -e '.[face]'")
def test_mediapipe_on_real_faces():
    detector = detectors.make_detector(MEDIA / "face_landmarker.task")
    frames = [frame for frame, _ in zip(video.read_frames(MEDIA / "driving" / "d18.mp4"), range(20), strict=False)]
    landmarks = faces.track(frames, detector)
    assert landmarks.shape == (20, 478, 2)
    left, right, nose, mouth = ((box[:2] + box[2:]) / 2 for box in faces.regions(landmarks, margin=0.06)[0])
    assert right[0] < nose[0] < left[0] and max(left[1], right[1]) < nose[1] < mouth[1]
    crop = faces.driving_crop(landmarks, scale=2.3)
    source = faces.find_face(video.read_image(MEDIA / "source" / "s6.jpg"), detector)
    placed = faces.crop_landmarks(source, faces.source_crop(source, landmarks, crop), 256)
    distance = np.abs(faces.regions(placed, margin=0.06) - faces.regions(faces.crop_landmarks(landmarks, crop, 256), margin=0.06))
    assert distance.max(axis=(1, 2)).min() < 15  # eyes, nose, mouth come to lie where the driver has them
    with pytest.raises(MediaError, match="no face found in s33.jpg"):
        faces.find_face(video.read_image(MEDIA / "source" / "s33.jpg"), detector, name="s33.jpg")


@needs_media
@pytest.mark.filterwarnings("ignore:no landmarker given")
def test_cascade_on_real_faces():
    detector = detectors.cascade_detector()
    for name in ("s5.jpg", "s6.jpg", "s7.jpg"):
        image = video.read_image(MEDIA / "source" / name)
        box = faces.face_box(faces.find_face(image, detector))
        assert box.min() > 0 and 0.15 < (box[2] - box[0]) / len(image) < 0.8
    with pytest.raises(MediaError, match="no face found in s33.jpg"):
        faces.find_face(video.read_image(MEDIA / "source" / "s33.jpg"), detector, name="s33.jpg")
