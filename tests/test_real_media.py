"""Real portraits and a real driver, where they are at hand (SVDP_TEST_MEDIA): what a user's first own command gives."""

import importlib.util
import json

import av
import numpy as np
import pytest
from test_faces import MEDIA

from svdp_jax.config import DataConfig
from svdp_jax.data import faces, inputs, preview, video

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (MEDIA / "driving").is_dir(), reason="no real media: set SVDP_TEST_MEDIA")]
needs_mediapipe = pytest.mark.skipif(importlib.util.find_spec("mediapipe") is None, reason="no MediaPipe: pip install -e '.[face]'")


def sound(path):
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.dts is not None]


def test_the_result_has_the_drivers_frames_rate_and_sound(python, tmp_path):
    driver = MEDIA / "driving" / "d19.mp4"
    done = python("sample.py", "-s", MEDIA / "source" / "s7.jpg", "-d", driver, "-o", tmp_path, SVDP_FACE_LANDMARKER="", JAX_DISABLE_MOST_OPTIMIZATIONS="0")
    assert done.returncode == 0, done.stderr
    given, portrait = video.probe(driver), video.read_image(MEDIA / "source" / "s7.jpg")
    for name in "s7--d19.mp4", "s7--d19_concat.mp4":
        made = video.probe(tmp_path / name)
        assert (made.frames, made.fps, made.has_audio) == (given.frames, given.fps, True) == (250, 30, True)
        assert len(list(video.read_frames(tmp_path / name))) == 250 and sound(tmp_path / name) == sound(driver)
    assert video.probe(tmp_path / "s7--d19.mp4")[:2] == portrait.shape[1::-1]
    assert json.loads((tmp_path / "s7--d19.json").read_text())["frames"] == 250


@needs_mediapipe
@pytest.mark.parametrize(("source", "driver"), [("s5", "d18"), ("s6", "d19"), ("s7", "d20")])
def test_the_model_sees_eyes_nose_and_mouth_and_nothing_else(source, driver, tmp_path):
    data = DataConfig()
    landmarker, paths = MEDIA / "face_landmarker.task", (MEDIA / "source" / f"{source}.jpg", MEDIA / "driving" / f"{driver}.mp4")
    prepared = inputs.prepare(*paths, data, landmarker=landmarker, max_frames=60)
    assert preview.picture(prepared, data, columns=5).shape[1] == 6 * preview.CELL
    boxes = faces.regions(prepared.landmarks, margin=data.region_margin)
    for number, (frame, four) in enumerate(zip(inputs.masked_frames(prepared, data), boxes, strict=True)):
        seen = frame.any(axis=2)
        assert 0.03 < seen.mean() < 0.2, "a part of the frame"
        face = faces.face_box(prepared.landmarks[number])
        y, x = np.nonzero(seen)
        assert face[0] < x.min() and x.max() < face[2] and face[1] < y.min() + 40 and y.max() < face[3] + 40, "inside the face"
        for point in faces.centres(prepared.landmarks[number]):
            assert seen[round(float(point[1])), round(float(point[0]))]
        assert (four[:, 2:] > four[:, :2]).all()
