"""From files to what sampling sees: landmarks beside a file count, crops show both faces alike, the mask hides the rest."""

import dataclasses
from fractions import Fraction

import imageio.v3 as iio
import numpy as np
import pytest
from conftest import write_pair

from svdp_jax.config import DataConfig
from svdp_jax.data import detectors, faces, inputs, synthetic, video
from svdp_jax.files import MediaError

DATA = DataConfig(size=64, frames=4, history=2)
FRAMES = 7


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A portrait and a driving video of two rendered people, with their landmarks beside them."""
    folder = tmp_path_factory.mktemp("pair")
    clip = synthetic.pair("validation", 0, frames=FRAMES, size=96)
    write_pair(folder, clip, fps=Fraction(30000, 1001))
    return folder, clip


@pytest.mark.parametrize("width, height, crop", [(10, 4, (3, 0, 4)), (4, 10, (0, 3, 4)), (7, 7, (0, 0, 7))])
def test_the_middle_square_is_in_the_middle(width, height, crop):
    assert inputs.middle_square(width, height) == crop


def test_landmarks_beside_the_files_are_used(pair):
    folder, clip = pair
    prepared = inputs.prepare(folder / "portrait.png", folder / "motion.mp4", DATA)
    expected = faces.crop_landmarks(faces.smooth(clip.driver_landmarks), prepared.driver_crop, DATA.size)
    np.testing.assert_allclose(prepared.landmarks, expected, atol=1e-3)
    assert prepared.info.fps == Fraction(30000, 1001)


def test_landmarks_that_could_be_of_either_file_are_refused(pair, tmp_path):
    for name, ending in ("portrait", ".png"), ("motion", ".mp4"), ("motion", ".npz"):
        (tmp_path / f"anna{ending}").write_bytes((pair[0] / f"{name}{ending}").read_bytes())
    with pytest.raises(MediaError, match="anna.npz: of anna.png or of anna.mp4"):
        inputs.prepare(tmp_path / "anna.png", tmp_path / "anna.mp4", DATA)


def test_landmarks_of_a_video_of_no_constant_rate_are_refused(pair, tmp_path):
    (tmp_path / "phone.npz").write_bytes((pair[0] / "motion.npz").read_bytes())
    info = video.probe(pair[0] / "motion.mp4")
    detectors.detector_for(tmp_path / "phone.mp4", None, info)
    with pytest.raises(MediaError, match="phone.mp4: its frames are not evenly spaced"):
        detectors.detector_for(tmp_path / "phone.mp4", None, info._replace(even=False))


def test_landmarks_beside_a_file_come_before_a_landmarker(pair):
    folder, _ = pair
    prepared = inputs.prepare(folder / "portrait.png", folder / "motion.mp4", DATA, landmarker=folder / "missing.task")
    assert len(prepared.landmarks) == FRAMES


@pytest.mark.parametrize("most, frames", [(None, FRAMES), (3, 3), (100, FRAMES)])
def test_there_are_as_many_driving_frames_as_landmarks(pair, most, frames):
    folder, _ = pair
    prepared = inputs.prepare(folder / "portrait.png", folder / "motion.mp4", DATA, max_frames=most)
    shown = list(inputs.driver_frames(prepared))
    assert len(shown) == len(prepared.landmarks) == frames
    assert {frame.shape for frame in shown} == {(64, 64, 3)}


def test_masked_frames_are_the_driver_inside_the_regions_and_black_outside(pair):
    folder, _ = pair
    prepared = inputs.prepare(folder / "portrait.png", folder / "motion.mp4", DATA)
    x, y = np.meshgrid(np.arange(64), np.arange(64))
    boxes = faces.regions(prepared.landmarks, margin=DATA.region_margin)
    for masked, whole, four in zip(inputs.masked_frames(prepared, DATA), inputs.driver_frames(prepared), boxes, strict=True):
        inside = np.any([(x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1) for x0, y0, x1, y1 in four], axis=0)
        assert 0.02 < inside.mean() < 0.5
        assert not masked[~inside].any()
        np.testing.assert_array_equal(masked[inside], whole[inside])


def test_a_driver_without_a_mask_is_seen_whole(pair):
    folder, _ = pair
    prepared = inputs.prepare(folder / "portrait.png", folder / "motion.mp4", DATA)
    frames = inputs.masked_frames(prepared, dataclasses.replace(DATA, driver_mask=False), start=2)
    for seen, whole in zip(frames, inputs.driver_frames(prepared, start=2), strict=True):
        np.testing.assert_array_equal(seen, whole)


def test_an_aligned_source_face_has_the_drivers_size_and_place(pair, tmp_path):
    folder, clip = pair
    wide = np.zeros((200, 260, 3), np.uint8)  # the same portrait, small and off the middle
    wide[80:176, 130:226] = clip.target[0]
    iio.imwrite(tmp_path / "wide.png", wide)
    landmarks = clip.target_landmarks[0] + np.float32([130, 80])
    detectors.write_landmarks(tmp_path / "wide.npz", landmarks[None])
    prepared = inputs.prepare(tmp_path / "wide.png", folder / "motion.mp4", DATA)
    assert prepared.source.shape == (64, 64, 3)
    source = faces.crop_landmarks(landmarks, prepared.crop, DATA.size)
    place = lambda points: points.mean(axis=-2)
    spread = lambda points: np.sqrt(np.square(points - points.mean(axis=-2, keepdims=True)).sum(axis=-1).mean(axis=-1))
    apart = np.abs(place(prepared.landmarks) - place(source)).max(axis=-1) / 64 + np.abs(spread(prepared.landmarks) / spread(source) - 1)
    assert apart.min() < 0.05, "in one frame of the driver, the faces agree"


def test_unaligned_inputs_are_their_middle_squares(pair):
    folder, clip = pair
    prepared = inputs.prepare(folder / "portrait.png", folder / "motion.mp4", DATA, align=False)
    assert prepared.crop == prepared.driver_crop == (0, 0, 96)
    np.testing.assert_array_equal(prepared.source, faces.apply_crop(clip.target[0], faces.Crop(0, 0, 96), 64))
