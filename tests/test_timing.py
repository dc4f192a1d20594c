"""When frames are shown: exact rates, uneven ones resampled, and how many a file promised."""

import warnings
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image
from small_videos import NTSC, clip, numbers, store, write

from svdp_jax.data import detectors, video


@pytest.mark.parametrize("fps", [Fraction(25), NTSC, Fraction(24000, 1001), Fraction(60)])
def test_frame_rate_is_exact(tmp_path, strict, fps):
    video.write_video(tmp_path / "a.mp4", clip(), fps=fps, metadata={})
    assert video.probe(tmp_path / "a.mp4") == video.VideoInfo(96, 64, fps, 12, False)
    assert numbers(video.read_frames(tmp_path / "a.mp4")) == list(range(12))


@pytest.mark.parametrize(
    "fps, rate, shown", [(25, 25, [0, 1, 2, 3]), (50, 25, [0, 2]), (30, 25, [0, 1, 2, 3]), (12, 25, [0, 0, 0, 1, 1, 2, 2, 3, 3]), (NTSC, 15, [0, 1, 3])]
)
def test_frames_at_another_rate_are_those_seen_then(fps, rate, shown):
    frames = [np.full((2, 2, 3), number, np.uint8) for number in range(4)]
    assert [frame.max() for frame in video.at_rate(frames, fps=fps, rate=rate)] == shown


def test_uneven_frames_are_resampled_to_their_average_rate(tmp_path):
    pts = np.concatenate([[0], np.cumsum([40, 40, 40, 40, 40, 80, 80, 80, 80, 80])]).tolist()  # 25, then 12.5 fps
    path = write(tmp_path / "a.mkv", pts=pts)
    info = video.probe(path)
    assert info.fps == pytest.approx(10 / 0.6, rel=1e-3)
    with pytest.warns(UserWarning, match="not evenly spaced") as caught:
        warnings.simplefilter("default")
        frames = list(video.read_frames(path))
        assert len(list(video.read_frames(path))) == 11  # and says no more
    assert len(caught) == 1 and len(frames) == info.frames == 11
    shown = np.array(pts)[numbers(frames)] / 1000
    assert np.abs(shown - np.arange(11) / float(info.fps)).max() < 0.06  # what is seen is as old as a frame at most


def test_rounded_times_are_still_even(tmp_path, strict):
    path = write(tmp_path / "a.mkv", pts=[round(1000 * number / float(NTSC)) for number in range(40)])  # the header says 25
    assert video.probe(path).fps == pytest.approx(float(NTSC), rel=1e-3)
    assert numbers(video.read_frames(path)) == [number % 16 for number in range(40)]


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_an_animated_image_keeps_its_times(tmp_path, name):
    first, *rest = (Image.fromarray(frame) for frame in clip(5))
    first.save(tmp_path / name, save_all=True, append_images=rest, duration=[40, 120, 40, 40, 40])
    with pytest.warns(UserWarning, match="its 5 frames are not evenly spaced; resampled to their average rate, 16.667 fps"):
        assert numbers(video.read_frames(tmp_path / name)) == [0, 1, 1, 2, 4]  # shown at 0, 60, 120, 180 and 240 ms
    assert video.probe(tmp_path / name) == video.VideoInfo(96, 64, Fraction(50, 3), 5, False, even=False)


def test_a_gif_in_no_hurry_is_as_fast_as_in_a_browser(tmp_path, strict):
    first, *rest = (Image.fromarray(frame) for frame in clip(3))
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest, duration=10)
    assert video.probe(tmp_path / "a.gif").fps == 10


@pytest.mark.parametrize(("milliseconds", "fps"), [(16, 62.5), (17, 1000 / 17), (11, 1000 / 11), (10, 10)])
def test_an_animated_png_is_as_fast_as_in_a_browser(tmp_path, strict, milliseconds, fps):
    first, *rest = (Image.fromarray(frame) for frame in clip(12))
    first.save(tmp_path / "a.png", save_all=True, append_images=rest, duration=milliseconds)
    assert float(video.probe(tmp_path / "a.png").fps) == pytest.approx(fps, rel=1e-3)


def test_landmarks_of_frames_of_which_some_are_missing_have_no_place(tmp_path):
    path = write(tmp_path / "a.mp4", pts=[40 * number for number in range(50) if number not in (20, 21)])
    info = video.probe(path)
    assert (info.frames, info.fps, info.even) == (50, 25, False)
    np.savez(tmp_path / "a.npz", landmarks=np.ones((48, 68, 2), np.float32))
    with pytest.raises(video.MediaError, match="some are missing"):
        detectors.detector_for(path, None, info)


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.mp4"])
def test_a_cut_off_video_says_so(tmp_path, name):
    whole = store(tmp_path / f"whole.{name}", clip(16), "libvpx-vp9" if name == "a.webm" else "libx264", options={"g": "4"})
    if name == "a.mp4":
        video.write_video(whole, clip(16), fps=Fraction(25), metadata={})
    (tmp_path / name).write_bytes(whole.read_bytes()[:-400])
    with pytest.warns(UserWarning, match="of 16 frames can be read") as caught:
        count = len(list(video.read_frames(tmp_path / name)))
    assert count < 16 and len(caught) == 1 and f"{count} of 16" in str(caught[0].message) and video.probe(tmp_path / name).frames == count


def test_a_truncated_video_gives_its_frames_and_one_warning(tmp_path):
    whole = write(tmp_path / "a.mov", codec="mjpeg", options={"movflags": "faststart"}).read_bytes()
    cut = tmp_path / "cut.mov"
    cut.write_bytes(whole[: int(len(whole) * 0.7)])
    with pytest.warns(UserWarning) as caught:
        got = numbers(video.read_frames(cut))
    assert got == list(range(len(got))) and 4 < len(got) < 12
    assert len(caught) == 1 and f"{len(got)} of 12 frames" in str(caught[0].message)
