"""Videos of any kind are read as upright RGB frames of square pixels; what is missing or broken has its line."""

import tracemalloc
import warnings
import weakref
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image
from small_videos import NTSC, clip, copy, numbers, store, tone, two_sizes, write

from svdp_jax.data import video
from svdp_jax.data.video import MediaError


def test_nothing_holds_the_whole_video(tmp_path, monkeypatch):
    alive, most = weakref.WeakSet(), 0

    class Frame(np.ndarray):
        __hash__ = object.__hash__

    def render():
        nonlocal most
        for frame in clip(60):
            frame = frame.copy().view(Frame)
            alive.add(frame)
            most = max(most, len(alive))
            yield frame

    video.write_video(tmp_path / "a.mp4", render(), fps=NTSC, metadata={})
    assert most <= 4
    video.probe(tmp_path / "a.mp4")  # what is imported on the way is not the video's
    decoded, decode = [], video._tolerant_decode
    monkeypatch.setattr(video, "_tolerant_decode", lambda container: (decoded.append(None) or frame for frame in decode(container)))
    tracemalloc.start()
    try:
        for number, _ in enumerate(video.read_frames(tmp_path / "a.mp4"), start=1):
            assert len(decoded) <= number + 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert number == 60 and peak < 20 * 64 * 96 * 3


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((0, 1, -1, 0), lambda picture: np.rot90(picture, -1)),
        ((-1, 0, 0, -1), lambda picture: np.rot90(picture, 2)),
        ((0, -1, 1, 0), lambda picture: np.rot90(picture, 1)),
        ((-1, 0, 0, 1), np.fliplr),
        ((1, 0, 0, -1), np.flipud),
        ((0, 1, 1, 0), lambda picture: picture.swapaxes(0, 1)),
        ((0, -1, -1, 0), lambda picture: np.rot90(picture, 2).swapaxes(0, 1)),
    ],
)
def test_rotated_and_mirrored_videos_are_upright(tmp_path, strict, matrix, shown):
    # The track's display matrix is [a b u, c d v, x y w]: it takes a point right to (a, b) and a point down to (c, d).
    data = bytearray(write(tmp_path / "a.mp4").read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    fixed = [matrix[0] << 16, matrix[1] << 16, 0, matrix[2] << 16, matrix[3] << 16, 0, 0, 0, 1 << 30]
    data[place : place + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in fixed)
    (tmp_path / "a.mp4").write_bytes(data)
    expected = shown(clip(1)[0])
    info, frame = video.probe(tmp_path / "a.mp4"), next(video.read_frames(tmp_path / "a.mp4"))
    assert (info.height, info.width) == expected.shape[:2]
    assert np.abs(frame.astype(int) - expected).mean() < 3


@pytest.mark.parametrize(("shape", "size"), [(Fraction(4, 3), (64, 128)), (Fraction(8, 9), (72, 96)), (Fraction(1), (64, 96))])
def test_pixels_that_are_not_square_are_made_so(tmp_path, strict, shape, size):
    path = store(tmp_path / "a.mp4", clip(), sample_aspect_ratio=shape)
    info, frames = video.probe(path), list(video.read_frames(path))
    assert (info.height, info.width) == size == frames[0].shape[:2] and numbers(frames) == list(range(12))
    height, width = size
    assert np.abs(frames[0][: height // 5, : width // 5].astype(int) - [220, 0, 0]).mean() < 8  # the red quarter is as wide as it was
    with pytest.raises(MediaError, match="b.mp4: pixels cannot be 9 times as wide as high"):
        video.probe(store(tmp_path / "b.mp4", clip(2), sample_aspect_ratio=Fraction(9)))


def test_odd_sizes_are_read_as_they_are(tmp_path, strict):
    path = store(tmp_path / "a.webm", clip(4, height=61, width=93), "libvpx-vp9")
    assert video.probe(path)[:2] == (93, 61)
    assert [frame.shape for frame in video.read_frames(path)] == [(61, 93, 3)] * 4


@pytest.mark.parametrize(("codec", "options"), [("libx264", {}), ("libx265", {"x265-params": "log-level=none"})])
@pytest.mark.parametrize(("curve", "name"), [(16, "PQ"), (18, "HLG")])
def test_ten_bits_of_hdr_become_eight_with_one_warning(tmp_path, codec, options, curve, name):
    tags = {"color_primaries": 9, "color_trc": curve, "colorspace": 9}  # BT.2020
    path = store(tmp_path / "a.mp4", clip(), codec, "yuv420p10le", options, {"dst_colorspace": 9}, **tags)
    with pytest.warns(UserWarning, match=rf"a.mp4: is HDR \({name}\); its colours are taken as coded") as caught:
        warnings.simplefilter("default")
        assert video.probe(path) == video.VideoInfo(96, 64, Fraction(25), 12, False)
        frames = list(video.read_frames(path))
    assert len(caught) == 1
    assert numbers(frames) == list(range(12)) and np.abs(frames[0].astype(int) - clip(1)[0]).mean() < 4  # values as coded, not mapped to SDR


@pytest.mark.parametrize(
    ("size", "said", "meant"),
    [
        ((720, 960), {}, Colorspace.ITU709),
        ((536, 1280), {}, Colorspace.ITU709),
        ((718, 1278), {}, Colorspace.ITU601),
        ((720, 960), {"colorspace": Colorspace.ITU601}, Colorspace.ITU601),
        ((480, 640), {"colorspace": Colorspace.ITU709}, Colorspace.ITU709),
    ],
)
def test_colours_that_a_file_does_not_tell_are_as_players_take_them(tmp_path, strict, size, said, meant):
    colour = np.array([224, 172, 140], np.uint8)  # skin
    frames = np.broadcast_to(colour, (2, *size, 3))
    path = store(tmp_path / "a.mp4", frames, options={"crf": "1", "preset": "ultrafast"}, reformat=video.CONVERSION | {"dst_colorspace": meant}, **said)
    assert np.abs(next(video.read_frames(path)).astype(int) - colour).max() <= 2


def test_motion_jpeg_of_any_size_has_the_colours_of_jpeg(tmp_path, strict):
    (frame,) = frames = np.broadcast_to(np.array([224, 172, 140], np.uint8), (1, 720, 1280, 3))
    path = store(tmp_path / "a.mov", frames, "mjpeg", "yuvj420p", reformat={"dst_color_range": ColorRange.JPEG}, color_range=2)
    assert np.abs(next(video.read_frames(path)).astype(int) - frame).max() <= 4


@pytest.mark.parametrize(("codec", "pix_fmt"), [("prores_ks", "yuva444p10le"), ("qtrle", "argb"), ("png", "rgba")])
def test_transparent_video_lies_on_white(tmp_path, strict, codec, pix_fmt):
    alpha = np.full((3, 64, 96, 1), 255, np.uint8)
    alpha[:, :20], alpha[:, 20:40] = 0, 51
    path = store(tmp_path / "a.mov", np.concatenate([clip(3), alpha], axis=-1), codec, pix_fmt)
    frames = np.stack(list(video.read_frames(path))).astype(int)
    assert numbers(frames[:, 42:54]) == [0, 1, 2] and np.abs(frames[:, :16] - 255).max() <= 1
    expected = 0.2 * clip(3)[:, 24:36, 40:60] + 0.8 * 255
    assert np.abs(frames[:, 24:36, 40:60] - expected).max() <= 2


@pytest.mark.parametrize("codec", ["libx264", "mjpeg"])
def test_full_range_is_as_bright_as_it_was(tmp_path, strict, codec):
    path = store(tmp_path / "a.mov", clip(), codec, "yuvj420p", reformat={"dst_color_range": ColorRange.JPEG}, color_range=2)
    difference = next(video.read_frames(path)).astype(int) - clip(1)[0]
    assert np.abs(difference).mean() < 4 and np.abs(difference[32:40, 40:56]).max() < 4


def test_grey_video_becomes_rgb(tmp_path, strict):
    path = store(tmp_path / "a.mkv", clip(), "ffv1", "gray")
    frames = list(video.read_frames(path))
    assert numbers(frames) == list(range(12)) and all((frame == frame[..., :1]).all() for frame in frames)


def test_a_cover_picture_is_no_driving_video(tmp_path, strict):
    picture, moving = store(tmp_path / "cover.mp4", clip(1, 32, 32), "mjpeg", "yuvj420p"), store(tmp_path / "moving.mp4", clip())
    both = copy([picture, moving], tmp_path / "both.mp4", cover=0)
    assert video.probe(both) == video.VideoInfo(96, 64, Fraction(25), 12, False)
    assert numbers(video.read_frames(both)) == list(range(12))
    only = copy([picture], tmp_path / "only.mp4", cover=0)
    for read in (video.probe, lambda path: next(video.read_frames(path))):
        with pytest.raises(MediaError, match="only.mp4: has no video stream but a cover picture"):
            read(only)


def test_of_two_videos_the_first_is_read(tmp_path, strict):
    both = copy([store(tmp_path / "a.mp4", clip(6)), store(tmp_path / "b.mp4", clip(12, 32, 32))], tmp_path / "both.mp4")
    assert video.probe(both) == video.VideoInfo(96, 64, Fraction(25), 6, False)
    assert numbers(video.read_frames(both)) == list(range(6))


def test_a_video_that_starts_between_key_frames_waits_for_the_next(tmp_path):
    whole = store(tmp_path / "whole.mp4", clip(16), options={"g": "8", "bf": "0", "sc_threshold": "0"})
    path = copy([whole], tmp_path / "a.mkv", keep=lambda packet: packet.pts * packet.time_base >= Fraction(3, 25))
    with pytest.warns(UserWarning, match="8 of 1[36] frames can be read"):
        assert numbers(video.read_frames(path)) == [8] * 5 + list(range(8, 16))
    assert video.probe(path).frames == 13


def test_a_broken_frame_of_h264_is_passed_over(tmp_path):
    path = write(tmp_path / "a.mp4", damaged=[6])
    with pytest.warns(UserWarning, match="11 of 12 frames can be read") as caught:
        assert len(list(video.read_frames(path))) == video.probe(path).frames == 12
    assert len(caught) == 1


def test_a_new_size_is_refused_and_one_odd_frame_passed_over(tmp_path):
    with pytest.raises(MediaError, match="a.mov: frame 3 is 96x32, not 96x64; re-encode it at one size"):
        list(video.read_frames(two_sizes(tmp_path / "a.mov", 64, 64, 64, 32, 32, 32)))
    odd = two_sizes(tmp_path / "b.mov", 64, 64, 64, 32, 64, 64)
    with pytest.warns(UserWarning, match="5 of 6 frames can be read"):
        assert [frame.shape for frame in video.read_frames(odd)] == [(64, 96, 3)] * 6


@pytest.mark.parametrize(("damaged", "expected"), [([5], [0, 1, 2, 3, 4, 4, 6, 7, 8, 9, 10, 11]), ([0, 1], [2, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])])
def test_a_neighbour_stands_in_for_a_broken_frame(tmp_path, damaged, expected):
    path = write(tmp_path / "a.mov", codec="mjpeg", damaged=damaged)
    with pytest.warns(UserWarning, match=f"{12 - len(damaged)} of 12 frames") as caught:
        assert numbers(video.read_frames(path)) == expected
    assert len(caught) == 1


def test_a_colon_in_a_name_is_no_protocol(tmp_path, strict, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write("rec-12:30:00.mp4")
    assert video.probe(path).frames == len(list(video.read_frames(path))) == 12


@pytest.mark.parametrize("read", [video.probe, lambda path: next(video.read_frames(path)), video.read_image])
def test_files_that_cannot_be_used_are_named(tmp_path, read):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "whole.jpg")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is not a video\n" * 50)
    (tmp_path / "header.mp4").write_bytes(video.encode(clip(), fps=NTSC)[:200])
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:500])
    (tmp_path / "folder.mp4").mkdir()
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        container.mux(container.add_stream("pcm_s16le", rate=16000, layout="mono").encode(tone()))
    for name in ("missing.mp4", "empty.mp4", "text.mp4", "header.mp4", "cut.jpg", "folder.mp4", "sound.wav"):
        with pytest.raises(MediaError, match=name) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_video_without_frames_is_named(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        sound = container.add_stream("aac", rate=16000, layout="mono")
        container.mux(sound.encode(tone()))
        container.mux(sound.encode())
    undecodable = write(tmp_path / "b.mov", codec="mjpeg", damaged=range(12))
    for path in (tmp_path / "a.mp4", undecodable):
        for read in (video.probe, lambda path: next(video.read_frames(path))):
            with pytest.raises(MediaError, match=f"{path.name}: (has no video|no frame can be decoded|not a video)"):
                read(path)
