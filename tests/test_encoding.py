"""Frames to H.264 and back: nothing lost but what a codec loses, sound and metadata kept, and no half-written file."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from prepared import person
from small_videos import NTSC, clip, write

from svdp_jax.data import encoding, video
from svdp_jax.data.video import MediaError


@pytest.mark.parametrize("count", [1, 12])
def test_encode_decode(count, strict):
    frames = clip(count)
    decoded = video.decode(video.encode(frames, fps=NTSC))
    assert decoded.shape == frames.shape and decoded.dtype == np.uint8
    difference = decoded.astype(int) - frames
    assert np.abs(difference).mean() < 1 and abs(difference.mean()) < 0.3  # no darker, no brighter


def test_the_same_frames_are_the_same_bytes_whatever_memory_held_before():
    """Twenty times. Of frames that move as people do: of others too little depends on it."""
    found, (frames, _) = set(), person(5, 20)
    for number in range(20):
        stray = [np.random.default_rng(number).integers(0, 256, size, np.uint8) for size in range(1000, 200_000, 5000)]
        del stray
        found.add(video.encode(frames, fps=Fraction(25)))
    assert len(found) == 1


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


def test_encode_and_decode_name_what_is_wrong():
    with pytest.raises(MediaError, match="even height and width"):
        video.encode(clip(2, height=63), fps=NTSC)
    data = video.encode(clip(), fps=NTSC)
    middle = data.index(b"mdat") + 740  # in a frame that x264 decodes all the same, with a hole
    damaged = data[:middle] + np.random.default_rng(0).bytes(40) + data[middle + 40 :]
    for broken in (b"", b"junk" * 100, data[: len(data) // 2], damaged):
        with pytest.raises(MediaError, match=f"video of {len(broken)} bytes"):
            video.decode(broken)


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


def audio_packets(path):
    with av.open(str(path)) as container:
        return [(float(packet.pts * packet.time_base), bytes(packet)) for packet in container.demux(audio=0) if packet.dts is not None]


def test_audio_is_copied_as_long_as_the_video_lasts(tmp_path, strict):
    sound = write(tmp_path / "sound.mp4", audio="aac")
    video.write_video(tmp_path / "a.mp4", clip(), fps=Fraction(25), metadata={}, audio_from=sound)
    assert video.probe(tmp_path / "a.mp4") == video.VideoInfo(96, 64, Fraction(25), 12, True)
    copied, original = audio_packets(tmp_path / "a.mp4"), audio_packets(sound)
    assert 0.4 < copied[-1][0] < 0.48 < original[-1][0]
    assert copied == original[: len(copied)]


def test_sound_lies_beside_its_picture_in_the_file(tmp_path, strict):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        wave = av.AudioFrame.from_ndarray(np.zeros((1, 16000 * 24), np.float32), format="fltp", layout="mono")
        wave.sample_rate = 16000
        container.mux(stream.encode(wave) + stream.encode())
    video.write_video(tmp_path / "a.mp4", clip(25 * 24), fps=Fraction(25), metadata={}, audio_from=tmp_path / "sound.mp4")
    with av.open(str(tmp_path / "a.mp4")) as container:
        packets = sorted((packet.pos, float(packet.dts * packet.time_base), packet.stream.type) for packet in container.demux() if packet.dts is not None)
    seen, apart = {"video": 0.0, "audio": 0.0}, []
    for _, time, kind in packets:
        seen[kind] = time
        apart.append(abs(seen["video"] - seen["audio"]))
    assert seen["audio"] > 20 and max(apart) < 1


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


@pytest.mark.parametrize(("width", "height"), [(16386, 2), (2, 16386)])
def test_sizes_that_cannot_be_encoded_are_told(tmp_path, strict, width, height):
    said = f"big.*: a video of {width}x{height} pixels cannot be encoded, no side may be longer than 16384"
    with pytest.raises(MediaError, match=said):
        video.check_size(width, height, name="big.png")
    with pytest.raises(MediaError, match=said):
        video.write_video(tmp_path / "big.mp4", np.zeros((1, height, width, 3), np.uint8), fps=NTSC, metadata={})


def test_the_largest_size_can_be_encoded(tmp_path, strict):
    video.check_size(16383, 2, name="wide.png")
    video.write_video(tmp_path / "wide.mp4", np.zeros((1, 2, 16383, 3), np.uint8), fps=NTSC, metadata={})
    assert video.probe(tmp_path / "wide.mp4").width == 16384


def test_a_colon_in_a_name_is_no_protocol(tmp_path, strict, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("rec-12:30:00.mp4", audio="aac")
    video.write_video("made-12:31:00.mp4", clip(), fps=Fraction(25), metadata={}, audio_from="rec-12:30:00.mp4")
    assert video.probe("made-12:31:00.mp4") == video.VideoInfo(96, 64, Fraction(25), 12, True)
