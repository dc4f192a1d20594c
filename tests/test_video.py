import io
import tracemalloc
import warnings
import weakref
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition
from av.video.reformatter import ColorRange
from PIL import Image

from svdp_jax.data import encoding, video
from svdp_jax.data.video import MediaError

NTSC = Fraction(30000, 1001)


def clip(count=12, height=64, width=96):
    """Frames that tell their number by their brightness, and which way is up by colours: red top left, blue bottom right."""
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[:] = (40 + 12 * (np.arange(count) % 16))[:, None, None, None]
    frames[:, : height // 4, : width // 4] = [220, 0, 0]
    frames[:, -height // 4 :, -width // 4 :] = [0, 0, 220]
    return frames


def numbers(frames):
    """The numbers that `clip` gave to frames."""
    return [round((float(frame[frame.shape[0] // 2, frame.shape[1] // 2].mean()) - 40) / 12) for frame in frames]


def tone(seconds=1):
    samples = (8000 * np.sin(np.arange(16000 * seconds) * 0.2)).astype(np.int16)
    frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = 16000, 0, Fraction(1, 16000)
    return frame


def write(path, *, pts=None, codec="libx264", audio=None, damaged=(), options=None):
    """A file of `clip`, made with av alone. `pts` in ms, or 25 fps; `audio` a codec for one second; `damaged` packets are zeros."""
    pts = [40 * number for number in range(12)] if pts is None else pts
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream(audio, rate=16000, layout="mono") if audio else None
        packets = []
        for time, frame in zip(pts, clip(len(pts)), strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=stream.pix_fmt)
            picture.pts, picture.time_base = time, Fraction(1, 1000)
            packets += stream.encode(picture)
        for number, packet in enumerate(packets + stream.encode()):
            if number in damaged:
                packet.update(bytes(packet.size))
            container.mux(packet)
        if sound:
            container.mux(sound.encode(tone()))
            container.mux(sound.encode())
    return path


def store(path, frames, codec="libx264", pix_fmt="yuv420p", options=None, reformat=None, **context):
    """`frames` at 25 fps, with whatever av lets one say about a stream (`context`) and about the conversion to YUV (`reformat`)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pix_fmt, **(reformat or {}))
            picture.pts, picture.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def copy(sources, path, keep=lambda packet: True, cover=None):
    """The first video streams of `sources` in one file, of their packets those to `keep`, and a picture as its cover."""
    with av.open(str(path), "w") as container:
        inputs = [av.open(str(source)) for source in sources]
        outputs = [container.add_stream_from_template(each.streams.video[0]) for each in inputs]
        if cover is not None:
            outputs[cover].disposition = Disposition.attached_pic
        for each, stream in zip(inputs, outputs, strict=True):
            for packet in each.demux(video=0):
                if packet.size and keep(packet):
                    packet.stream = stream
                    container.mux(packet)
            each.close()
    return path


def audio_packets(path):
    with av.open(str(path)) as container:
        return [(float(packet.pts * packet.time_base), bytes(packet)) for packet in container.demux(audio=0) if packet.dts is not None]


@pytest.fixture
def strict():
    """No warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("count", [1, 12])
def test_encode_decode(count, strict):
    frames = clip(count)
    decoded = video.decode(video.encode(frames, fps=NTSC))
    assert decoded.shape == frames.shape and decoded.dtype == np.uint8
    difference = decoded.astype(int) - frames
    assert np.abs(difference).mean() < 1 and abs(difference.mean()) < 0.3  # no darker, no brighter


def test_decoded_frames_do_not_depend_on_those_before():
    data = video.encode(clip(6), fps=NTSC)
    with av.open(io.BytesIO(data)) as container:
        apart = [frame.to_ndarray(format="rgb24", **encoding._QUICK_CONVERSION) for frame in container.decode(video=0)]
    np.testing.assert_array_equal(video.decode(data), apart)


@pytest.mark.parametrize("fps", [NTSC, Fraction(25), Fraction(24)])
@pytest.mark.parametrize("numbers", [[0], [29], [7, 8], [21, 22, 3], [16, 28], [8]])
def test_some_frames_of_a_clip_are_those_of_all(fps, numbers):
    data = video.encode(clip(30), fps=fps)
    np.testing.assert_array_equal(video.decode(data, numbers), video.decode(data)[numbers])


def test_a_frame_that_a_clip_does_not_have_is_missed():
    with pytest.raises(MediaError, match="1 of 2 frames are damaged or missing"):
        video.decode(video.encode(clip(6), fps=NTSC), [5, 6])


@pytest.mark.parametrize(
    "fps, rate, shown", [(25, 25, [0, 1, 2, 3]), (50, 25, [0, 2]), (30, 25, [0, 1, 2, 3]), (12, 25, [0, 0, 0, 1, 1, 2, 2, 3, 3]), (NTSC, 15, [0, 1, 3])]
)
def test_frames_at_another_rate_are_those_seen_then(fps, rate, shown):
    frames = [np.full((2, 2, 3), number, np.uint8) for number in range(4)]
    assert [frame.max() for frame in video.at_rate(frames, fps=fps, rate=rate)] == shown


def test_encode_and_decode_name_what_is_wrong():
    with pytest.raises(MediaError, match="even height and width"):
        video.encode(clip(2, height=63), fps=NTSC)
    data = video.encode(clip(), fps=NTSC)
    middle = data.index(b"mdat") + 740  # in a frame that x264 decodes all the same, with a hole
    damaged = data[:middle] + np.random.default_rng(0).bytes(40) + data[middle + 40 :]
    for broken in (b"", b"junk" * 100, data[: len(data) // 2], damaged):
        with pytest.raises(MediaError, match=f"video of {len(broken)} bytes"):
            video.decode(broken)


@pytest.mark.parametrize("fps", [Fraction(25), NTSC, Fraction(24000, 1001), Fraction(60)])
def test_frame_rate_is_exact(tmp_path, strict, fps):
    video.write_video(tmp_path / "a.mp4", clip(), fps=fps, metadata={})
    assert video.probe(tmp_path / "a.mp4") == video.VideoInfo(96, 64, fps, 12, False)
    assert numbers(video.read_frames(tmp_path / "a.mp4")) == list(range(12))


def test_colours_and_metadata(tmp_path, strict):
    metadata = {"title": "portrait", "comment": "synthesised; svdp_jax 0.1, checkpoint 12ab"}
    video.write_video(tmp_path / "a.mp4", clip(), fps=NTSC, metadata=metadata, audio_from=write(tmp_path / "sound.mp4", audio="aac"))
    frame = next(video.read_frames(tmp_path / "a.mp4"))
    assert np.abs(frame.astype(int) - clip(1)[0]).mean() < 1.5
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert metadata.items() <= container.metadata.items()
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
        assert next(container.decode(video=0)).colorspace == 1  # BT.709, said in the file
    with pytest.raises(MediaError, match="does not keep the metadata seed"):
        video.write_video(tmp_path / "b.mp4", clip(), fps=NTSC, metadata={"seed": "1"})


def test_odd_sizes_are_padded_with_the_edge(tmp_path):
    frames = clip(3, height=61, width=93)
    video.write_video(tmp_path / "a.mp4", frames, fps=NTSC, metadata={}, crf=1)
    frame = next(video.read_frames(tmp_path / "a.mp4")).astype(int)
    assert frame.shape == (62, 94, 3)
    assert np.abs(frame[:10, :10] - frames[0, 0, 0]).max() < 4  # nothing is resized
    assert np.abs(frame[61, -5] - [0, 0, 220]).max() < 4 and np.abs(frame[-5, 93] - [0, 0, 220]).max() < 4


def test_audio_is_copied_as_long_as_the_video_lasts(tmp_path, strict):
    sound = write(tmp_path / "sound.mp4", audio="aac")
    video.write_video(tmp_path / "a.mp4", clip(), fps=Fraction(25), metadata={}, audio_from=sound)
    assert video.probe(tmp_path / "a.mp4") == video.VideoInfo(96, 64, Fraction(25), 12, True)
    copied, original = audio_packets(tmp_path / "a.mp4"), audio_packets(sound)
    assert 0.4 < copied[-1][0] < 0.48 < original[-1][0]
    assert copied == original[: len(copied)]


def test_audio_keeps_its_place_when_the_first_frame_is_late(tmp_path, strict):
    late = write(tmp_path / "late.mkv", audio="aac", pts=[400 + 40 * number for number in range(12)])
    video.write_video(tmp_path / "a.mp4", clip(25), fps=Fraction(25), metadata={}, audio_from=late)
    with av.open(str(tmp_path / "a.mp4")) as container:
        start = [float(stream.start_time * stream.time_base) for stream in (container.streams.video[0], container.streams.audio[0])]
    with av.open(str(late)) as container:
        late_start = [float(stream.start_time * stream.time_base) for stream in (container.streams.video[0], container.streams.audio[0])]
    copied, original = audio_packets(tmp_path / "a.mp4"), audio_packets(late)
    offset = next(time for time, data in original if data == copied[5][1]) - copied[5][0]  # of one packet, in the two files
    assert offset == pytest.approx(late_start[0] - start[0], abs=0.002)


def test_audio_that_cannot_be_copied_costs_no_picture(tmp_path):
    missing, junk = tmp_path / "missing.mp4", tmp_path / "junk.mp4"
    junk.write_bytes(b"junk" * 999)
    early = write(tmp_path / "early.mkv", audio="aac", pts=[9000 + 40 * number for number in range(12)])  # over before the picture begins
    for source in (missing, junk, early, write(tmp_path / "sound.avi", audio="adpcm_ima_wav")):
        with pytest.warns(UserWarning, match=f"written without audio, that of .*{source.name}"):
            video.write_video(tmp_path / "a.mp4", clip(), fps=NTSC, metadata={}, audio_from=source)
        assert video.probe(tmp_path / "a.mp4") == video.VideoInfo(96, 64, NTSC, 12, False)
        assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_audio_that_ends_too_early_is_copied_with_a_warning(tmp_path):
    whole = write(tmp_path / "whole.mkv", audio="aac", pts=[0, 40, 80]).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.warns(UserWarning, match=r"cut.mkv: its audio ends after 0\.\d\d seconds; the file is cut off or damaged") as caught:
        video.write_video(tmp_path / "a.mp4", clip(25), fps=Fraction(25), metadata={}, audio_from=tmp_path / "cut.mkv")
    assert len(caught) == 1
    assert video.probe(tmp_path / "a.mp4") == video.VideoInfo(96, 64, Fraction(25), 25, True)


def test_no_audio_is_no_trouble(tmp_path, strict):
    video.write_video(tmp_path / "a.mp4", clip(), fps=NTSC, metadata={}, audio_from=write(tmp_path / "silent.mp4"))
    assert not video.probe(tmp_path / "a.mp4").has_audio


def test_a_failed_render_leaves_the_old_file(tmp_path):
    def breaks():
        yield from clip(3)
        raise RuntimeError("render failed")

    (tmp_path / "a.mp4").write_bytes(b"old")
    with pytest.raises(RuntimeError, match="render failed"):
        video.write_video(tmp_path / "a.mp4", breaks(), fps=NTSC, metadata={})
    with pytest.raises(MediaError, match="no frames to write"):
        video.write_video(tmp_path / "a.mp4", [], fps=NTSC, metadata={})
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"] and (tmp_path / "a.mp4").read_bytes() == b"old"


def test_unwritable_output_is_found_before_the_first_frame(tmp_path):
    def frames():
        raise AssertionError("rendered in vain")
        yield

    (tmp_path / "folder.mp4").mkdir()
    for path in (tmp_path / "missing" / "a.mp4", tmp_path / "folder.mp4"):
        with pytest.raises(MediaError, match=f"{path.name}: cannot be written"):
            video.write_video(path, frames(), fps=NTSC, metadata={})


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


@pytest.mark.parametrize(("matrix", "turns"), [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_rotated_videos_are_upright(tmp_path, strict, matrix, turns):
    # The track's display matrix is [a b u, c d v, x y w]: it takes a point right to (a, b) and a point down to (c, d).
    data = bytearray(write(tmp_path / "a.mp4").read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    fixed = [matrix[0] << 16, matrix[1] << 16, 0, matrix[2] << 16, matrix[3] << 16, 0, 0, 0, 1 << 30]
    data[place : place + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in fixed)
    (tmp_path / "a.mp4").write_bytes(data)
    expected = np.rot90(clip(1)[0], turns)
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
def test_ten_bits_of_hdr_become_eight(tmp_path, strict, codec, options):
    tags = {"color_primaries": 9, "color_trc": 16, "colorspace": 9}  # BT.2020, perceptual quantiser
    path = store(tmp_path / "a.mp4", clip(), codec, "yuv420p10le", options, {"dst_colorspace": 9}, **tags)
    assert video.probe(path) == video.VideoInfo(96, 64, Fraction(25), 12, False)
    frames = list(video.read_frames(path))
    assert numbers(frames) == list(range(12)) and np.abs(frames[0].astype(int) - clip(1)[0]).mean() < 4  # values as coded, not mapped to SDR


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


def two_sizes(path, *heights):
    """Frames of these heights in one mjpeg stream."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuvj420p"
        for number, height in enumerate(heights):
            (frame,) = clip(1, height=height)
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.height, encoder.width, encoder.pix_fmt, encoder.time_base = height, 96, "yuvj420p", Fraction(1, 25)
            (packet,) = encoder.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuvj420p"))
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 25)
            container.mux(packet)
    return path


def test_a_new_size_is_refused_and_one_odd_frame_passed_over(tmp_path):
    with pytest.raises(MediaError, match="a.mov: frame 3 is 96x32, not 96x64; re-encode it at one size"):
        list(video.read_frames(two_sizes(tmp_path / "a.mov", 64, 64, 64, 32, 32, 32)))
    odd = two_sizes(tmp_path / "b.mov", 64, 64, 64, 32, 64, 64)
    with pytest.warns(UserWarning, match="5 of 6 frames can be read"):
        assert [frame.shape for frame in video.read_frames(odd)] == [(64, 96, 3)] * 6


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


@pytest.mark.parametrize(("damaged", "expected"), [([5], [0, 1, 2, 3, 4, 4, 6, 7, 8, 9, 10, 11]), ([0, 1], [2, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])])
def test_a_neighbour_stands_in_for_a_broken_frame(tmp_path, damaged, expected):
    path = write(tmp_path / "a.mov", codec="mjpeg", damaged=damaged)
    with pytest.warns(UserWarning, match=f"{12 - len(damaged)} of 12 frames") as caught:
        assert numbers(video.read_frames(path)) == expected
    assert len(caught) == 1


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


def test_a_still_image_is_a_video_of_one_frame(tmp_path, strict):
    Image.fromarray(clip(1)[0]).save(tmp_path / "a.png")
    assert video.probe(tmp_path / "a.png") == video.VideoInfo(96, 64, Fraction(25), 1, False)
    (frame,) = video.read_frames(tmp_path / "a.png")
    np.testing.assert_array_equal(frame, clip(1)[0])


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_an_animated_image_is_a_video(tmp_path, strict, name):
    first, *rest = (Image.fromarray(frame) for frame in clip(4))
    first.save(tmp_path / name, save_all=True, append_images=rest, duration=40)
    assert video.probe(tmp_path / name) == video.VideoInfo(96, 64, Fraction(25), 4, False)
    assert numbers(video.read_frames(tmp_path / name)) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_an_animated_image_keeps_its_times(tmp_path, name):
    first, *rest = (Image.fromarray(frame) for frame in clip(5))
    first.save(tmp_path / name, save_all=True, append_images=rest, duration=[40, 120, 40, 40, 40])
    with pytest.warns(UserWarning, match="its 5 frames are not evenly spaced; resampled to their average rate, 16.667 fps"):
        assert numbers(video.read_frames(tmp_path / name)) == [0, 1, 1, 2, 4]  # shown at 0, 60, 120, 180 and 240 ms
    assert video.probe(tmp_path / name) == video.VideoInfo(96, 64, Fraction(50, 3), 5, False)


def test_a_gif_in_no_hurry_is_as_fast_as_in_a_browser(tmp_path, strict):
    first, *rest = (Image.fromarray(frame) for frame in clip(3))
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest, duration=10)
    assert video.probe(tmp_path / "a.gif").fps == 10


def test_a_gif_of_one_frame_is_a_still_image(tmp_path, strict):
    Image.fromarray(clip(1)[0]).save(tmp_path / "a.gif", save_all=True)
    assert video.probe(tmp_path / "a.gif") == video.VideoInfo(96, 64, Fraction(25), 1, False)
    (frame,) = video.read_frames(tmp_path / "a.gif")
    assert np.abs(frame.astype(int) - clip(1)[0]).mean() < 4


def test_a_cut_off_gif_gives_its_frames_and_one_warning(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    first, *rest = (Image.fromarray(frame) for frame in noise)
    first.save(tmp_path / "whole.gif", save_all=True, append_images=rest, duration=40)
    data = (tmp_path / "whole.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(data[: len(data) // 2])
    with pytest.warns(UserWarning, match="[23] of [4567] frames can be read") as caught:
        frames = list(video.read_frames(tmp_path / "a.gif"))
    assert len(caught) == 1 and len(frames) == video.probe(tmp_path / "a.gif").frames


@pytest.mark.parametrize("name", ["a.webp", "a.png"])
def test_a_transparent_animation_lies_on_white(tmp_path, strict, name):
    alpha = np.full((3, 64, 96, 1), 255, np.uint8)
    alpha[:, :20] = 0
    first, *rest = (Image.fromarray(frame) for frame in np.concatenate([clip(3), alpha], -1))
    first.save(tmp_path / name, save_all=True, append_images=rest, duration=40, lossless=True)
    frames = list(video.read_frames(tmp_path / name))
    assert numbers(frames) == [0, 1, 2] and all((frame[:20] == 255).all() for frame in frames)


def test_images_of_any_kind_become_rgb(tmp_path):
    rgb = clip(1)[0]
    image = Image.fromarray(rgb)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: turn clockwise to show
    image.save(tmp_path / "exif.png", exif=exif)
    np.testing.assert_array_equal(video.read_image(tmp_path / "exif.png"), np.rot90(rgb, -1))

    alpha = np.full((64, 96), 255, np.uint8)
    alpha[:20], alpha[20:30] = 0, 51
    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "alpha.png")
    got = video.read_image(tmp_path / "alpha.png").astype(int)
    assert (got[:20] == 255).all() and (got[30:] == rgb[30:]).all()
    assert np.abs(got[20:30] - (0.2 * rgb[20:30] + 0.8 * 255)).max() <= 1

    image.convert("L").save(tmp_path / "grey.png")
    assert (video.read_image(tmp_path / "grey.png") == np.asarray(image.convert("L"))[..., None]).all()
    Image.fromarray(np.full((4, 6), 40000, np.uint16)).save(tmp_path / "grey16.png")
    assert (video.read_image(tmp_path / "grey16.png") == 40000 // 257).all()
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width, encoder.pix_fmt, encoder.time_base = 64, 96, "rgb48be", Fraction(1, 25)
    (packet,) = encoder.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format="rgb48be"))
    (tmp_path / "rgb16.png").write_bytes(bytes(packet))
    assert np.abs(video.read_image(tmp_path / "rgb16.png").astype(int) - rgb).max() <= 1
    palette = image.convert("P")
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((0, 0)))
    assert (video.read_image(tmp_path / "palette.png")[0, 0] == 255).all()
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert np.abs(video.read_image(tmp_path / "cmyk.jpg").astype(int) - rgb).mean() < 6


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
