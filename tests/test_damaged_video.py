"""Damaged copies of videos and images: each is refused in one line, or read in part with a warning that says how much, or read whole.

Of the formats here only PNG has checksums. A changed byte that makes another legal file, of other pictures, another size or other
times, cannot be told from the file that was meant. So a copy that is read without a warning counts as *harmless* if number, size,
rate and pictures are those of the intact file (CLOSE), else as *another*. What is merely cut off must never be another, nor may a
PNG. Of copies with changed bytes, from a bit to 512 bytes of zeros, the share that is another is measured, and bounded by ANOTHER.

Seeds run in processes of their own, so that a crash or a hang (SECONDS) in a native decoder is a failure that names its seed.
"""

import collections
import faulthandler
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
import warnings
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
import pytest
from PIL import Image

from svdp_jax.data import streams, video
from svdp_jax.data.video import MediaError

COUNT, HEIGHT, WIDTH = 24, 64, 96
SECONDS = 20  # for one seed, which takes less than one
MEMORY = 4 << 30  # bytes
CLOSE = 2.0  # levels that a frame differs by, on average: encoding it took 3 to 9, and from one frame to the next it is 23
ANOTHER = {  # of 200 seeds, those that change bytes: 8, 11, 6, 15, 20, 28, 48 and 0 in a hundred were measured
    "early.mp4": 0.15,
    "late.mp4": 0.18,
    "h264.mkv": 0.13,
    "vp9.webm": 0.22,
    "mjpeg.mov": 0.28,
    "moving.gif": 0.37,
    "still.jpg": 0.57,
    "still.png": 0.0,
}


def scene():
    """A textured plane that moves by two pixels a frame."""
    coarse = np.random.default_rng(0).integers(0, 256, (10, 20, 3), np.uint8)
    plane = np.asarray(Image.fromarray(coarse).resize((WIDTH + 2 * COUNT, HEIGHT + COUNT), Image.BICUBIC))
    return np.stack([plane[number : number + HEIGHT, 2 * number : 2 * number + WIDTH] for number in range(COUNT)])


def tone():
    samples = (8000 * np.sin(np.arange(48000) * 0.07)).astype(np.int16)
    frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = 48000, 0, Fraction(1, 48000)
    return frame


def write(path, codec, audio, **options):
    """`scene` at 25 fps, a key frame every 12, with a second of sound, in the order of time."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=25, options={"g": "12"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        sound = container.add_stream(audio, rate=48000, layout="mono") if audio else None
        packets = sound.encode(tone()) + sound.encode() if sound else []
        for number, frame in enumerate(scene()):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=stream.pix_fmt)
            picture.pts, picture.time_base = number, Fraction(1, 25)
            packets += stream.encode(picture)
        for packet in sorted(packets + stream.encode(), key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)


def write_all(folder):
    write(folder / "late.mp4", "libx264", "aac")  # its header is at the end
    write(folder / "early.mp4", "libx264", "aac", movflags="faststart")
    write(folder / "h264.mkv", "libx264", "aac")
    write(folder / "vp9.webm", "libvpx-vp9", "libopus")
    write(folder / "mjpeg.mov", "mjpeg", None)
    first, *rest = (Image.fromarray(frame) for frame in scene())
    first.save(folder / "moving.gif", save_all=True, append_images=rest, duration=40)
    first.save(folder / "still.png")
    first.save(folder / "still.jpg", quality=90)


def header(data):
    """Where a file says what it holds."""
    start = max(data.find(b"moov") - 4, 0)
    return start, min(len(data), start + 1500 if start else 700)


def damage(data, rng):
    """A damaged copy, and in words what was done."""
    data, done = bytearray(data), []
    kind = rng.choice(["cut", "changed", "both"], p=[0.25, 0.6, 0.15])
    if kind != "cut":
        first, last = header(data) if rng.random() < 0.4 else (0, len(data))
        for _ in range(rng.choice([1, 1, 1, 3])):
            place = int(rng.integers(first, last))
            match rng.choice(["bit", "byte", "run", "zeros"], p=[0.3, 0.3, 0.2, 0.2]):
                case "bit":
                    new = bytes([data[place] ^ 1 << int(rng.integers(8))])
                case "byte":
                    new = rng.bytes(1)
                case "run":
                    new = rng.bytes(int(rng.integers(2, 64)))
                case "zeros":
                    new = bytes(int(rng.integers(4, 512)))
            new = new[: len(data) - place]
            data[place : place + len(new)] = new
            done.append(f"{len(new)} bytes at {place}")
    if kind != "changed":
        del data[int(rng.integers(len(data))) :]
        done.append(f"cut at {len(data)}")
    return bytes(data), kind, ", ".join(done)


def check(condition, problem):
    if not condition:
        raise AssertionError(problem)


def refused(read, path):
    """The MediaError that reading ends in, checked, or None; and what was read."""
    try:
        return None, read(path)
    except MediaError as error:
        check(str(path) in str(error) and "\n" not in str(error), f"unclear error {error}")
        return str(error), None


def read_all(path):
    """Frames as far as they come, and the error that they end in."""
    frames = []
    try:
        frames += video.read_frames(path)  # `+=` keeps what came before an error
    except MediaError as error:
        check(str(path) in str(error) and "\n" not in str(error), f"unclear error {error}")
        return frames, str(error)
    return frames, None


def outcome(path, intact):
    """What becomes of a damaged file: refused, warned, harmless or another. AssertionError where that is not as it should be."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        problem, info = refused(video.probe, path)
        frames, end = read_all(path)
        if path.suffix in (".png", ".jpg"):
            check(bool(refused(video.read_image, path)[0]) == bool(problem), "read_image and probe differ")
    told = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning) and str(path) in str(warning.message)]
    told = [message for message in told if "is HDR" not in message]  # as a changed byte may say
    if problem or end:
        check(problem is None or not frames, f"probe fails, but frames can be read: {problem}")
        check(end is not None, f"probe fails, but read_frames does not: {problem}")
        check(not frames or "at one size" in end, f"fails after {len(frames)} frames: {end}")
        return "refused" if not frames else "refused late"
    check(0 < info.fps <= 1000, f"{info.fps} fps")
    check(info.frames in (None, len(frames)), f"{len(frames)} frames, probe says {info.frames}")
    check({frame.shape for frame in frames} == {(info.height, info.width, 3)}, "shapes are not those of probe")
    if told:
        readable = re.search(r"(\d+) of \d+ frames can be read|its (\d+) frames are not evenly", told[-1])
        check(readable and 0 < int(readable[1] or readable[2]) <= len(frames), f"{len(frames)} frames, and the warning says {told}")
        return "warned"
    same = (info.fps, info.width, info.height, len(frames)) == (intact.fps, WIDTH, HEIGHT, len(intact.frames))
    apart = [np.abs(ours.astype(int) - theirs).mean() for ours, theirs in zip(frames, intact.frames, strict=True)] if same else [np.inf]
    return "harmless" if max(apart) < CLOSE else "another"


def check_audio(path, result, told):
    """A damaged file's audio costs no picture; it is whole, or the damage is told, here or by read_frames."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        video.write_video(result, scene(), fps=Fraction(25), metadata={}, audio_from=path)
        info = video.probe(result)
        check(info[:4] == (WIDTH, HEIGHT, Fraction(25), COUNT), f"with its audio, {info}")
        check(len(list(video.read_frames(result))) == COUNT, "with its audio, frames are lost")
    check(info.has_audio or caught or told or not has_audio(path), "audio is lost without a warning")
    if info.has_audio:
        with av.open(str(result)) as container:
            ends = [float((packet.pts + packet.duration) * packet.time_base) for packet in container.demux(audio=0) if packet.size]
        check(0 < max(ends) < COUNT / 25 + 0.2, f"audio ends at {max(ends)}")
        check(max(ends) > COUNT / 25 - 0.2 or caught or told, f"audio is cut off at {max(ends)} without a warning")


def has_audio(path):
    with av.open(str(path), metadata_errors="replace") as container:
        return bool(container.streams.audio)


class Intact(NamedTuple):
    data: bytes
    fps: Fraction
    frames: list[np.ndarray]


def main(folder, seeds):
    """Prints a line for each seed before it, and one for each file after it."""
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    intact = {path.name: Intact(path.read_bytes(), video.probe(path).fps, list(video.read_frames(path))) for path in sorted(folder.iterdir())}
    with tempfile.TemporaryDirectory() as place:
        for seed in seeds:
            print(json.dumps({"seed": seed}), flush=True)
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            for number, (name, whole) in enumerate(intact.items()):
                path = pathlib.Path(place) / name
                data, kind, done = damage(whole.data, np.random.default_rng([seed, number]))
                path.write_bytes(data)
                line = {"seed": seed, "name": name, "kind": kind, "done": done}
                try:
                    line["outcome"] = outcome(path, whole)
                    if name in ("late.mp4", "early.mp4", "h264.mkv", "vp9.webm"):
                        check_audio(path, pathlib.Path(place) / "result.mp4", line["outcome"] in ("warned", "another"))
                except Exception as error:  # any but MediaError is what this looks for
                    line["problem"] = f"{type(error).__name__}: {error}"
                print(json.dumps(line), flush=True)
    faulthandler.cancel_dump_traceback_later()


def run(folder, seeds):
    """What `main` says of each file, in a process of its own."""
    root = str(pathlib.Path(__file__).parents[1])
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    result = subprocess.run([sys.executable, __file__, str(folder), *map(str, seeds)], capture_output=True, text=True, env=variables)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 0, f"{lines[-1:]}: {result.stderr[-3000:]}"
    return [line for line in lines if "name" in line]


def check_lines(lines):
    assert not [line for line in lines if "problem" in line]
    assert not [line for line in lines if line["outcome"] == "another" and (line["kind"] == "cut" or not ANOTHER[line["name"]])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("intact")
    write_all(folder)
    return folder


def test_damage_is_refused_or_told(folder):
    lines = run(folder, range(20))
    assert len(lines) == 20 * len(ANOTHER)
    check_lines(lines)


@pytest.mark.slow
def test_more_damage_is_refused_or_told(folder):
    lines = [line for first in range(0, 200, 50) for line in run(folder, range(first, first + 50))]
    counts = collections.Counter((line["name"], line["kind"], line.get("outcome")) for line in lines)
    print(*(f"{count:4} {name:10} {kind:7} {outcome}" for (name, kind, outcome), count in sorted(counts.items(), key=str)), sep="\n")
    check_lines(lines)
    for name, bound in ANOTHER.items():
        changed = [line["outcome"] for line in lines if line["name"] == name and line["kind"] == "changed"]
        assert changed.count("another") <= bound * len(changed), name


def test_a_reader_that_keeps_damage_to_itself_is_caught(folder, tmp_path, monkeypatch):
    whole = folder / "early.mp4"
    intact = Intact(whole.read_bytes(), Fraction(25), list(video.read_frames(whole)))
    path = tmp_path / "cut.mp4"
    path.write_bytes(intact.data[: len(intact.data) * 7 // 10])
    assert outcome(path, intact) == "warned"
    monkeypatch.setattr(warnings, "warn", lambda *arguments, **keywords: None)
    assert outcome(path, intact) == "another"


def timed(path, milliseconds):
    """Frames of `scene` at given times."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuvj420p"
        stream.codec_context.time_base = Fraction(1, 90000)
        for time, frame in zip(milliseconds, scene(), strict=False):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuvj420p")
            picture.pts, picture.time_base = round(time * 90), Fraction(1, 90000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("milliseconds", "problem"),
    [
        ([0, 40, 80, 3_600_000, 3_600_040], "shows one frame for 3600 seconds"),
        ([0, 40, 80, 10**7], "shows one frame for 10000 seconds"),
        (np.arange(12) * 0.1, "shows 12 frames in 0.001 seconds"),
    ],
)
def test_times_that_make_no_sense_are_refused(tmp_path, milliseconds, problem):
    path = timed(tmp_path / "a.mov", milliseconds)
    for read in (video.probe, lambda path: next(video.read_frames(path))):
        with pytest.raises(MediaError, match=f"a.mov: {problem}"):
            read(path)


def test_a_pause_of_some_seconds_is_resampled(tmp_path):
    path = timed(tmp_path / "a.mov", [0, 40, 80, 5000, 5040])
    with pytest.warns(UserWarning, match="its 5 frames are not evenly spaced; resampled to their average rate, 0.79"):
        assert len(list(video.read_frames(path))) == video.probe(path).frames == 5


def test_a_few_missing_frames_are_made_up_for(tmp_path):
    path = timed(tmp_path / "a.mov", [40 * number for number in range(20) if number not in (3, 11, 12)])
    assert video.probe(path)[2:4] == (25, 20)
    with pytest.warns(UserWarning, match="17 of 20 frames can be read") as caught:
        frames = list(video.read_frames(path))
    assert len(frames) == 20 and len(caught) == 1
    same = [number for number in range(1, 20) if (frames[number] == frames[number - 1]).all()]
    assert same == [3, 11, 12]


def test_absurd_sizes_are_refused(tmp_path, monkeypatch):
    path = timed(tmp_path / "a.mov", range(0, 400, 40))
    data = bytearray(path.read_bytes())
    frames = [match.start() for match in re.finditer(b"\xff\xc0\x00\x11", data)]
    for claiming in (frames[4:5], frames):
        for frame in claiming:
            data[frame + 5 : frame + 9] = b"\xff\x00\xff\x00"
        path.write_bytes(data)
        if claiming != frames:
            with pytest.warns(UserWarning, match="9 of 10 frames can be read"):
                assert [frame.shape for frame in video.read_frames(path)] == [(HEIGHT, WIDTH, 3)] * 10
    with pytest.raises(MediaError, match="a.mov: no frame can be decoded"):
        video.probe(path)
    monkeypatch.setattr(streams, "MOST_PIXELS", WIDTH * HEIGHT - 1)
    with pytest.raises(MediaError, match=f"b.mov: frames of {WIDTH}x{HEIGHT} are too large"):
        video.probe(timed(tmp_path / "b.mov", [0, 40]))


@pytest.mark.parametrize("cut", [0.4, 0.7, 0.98])
def test_damaged_audio_costs_no_picture(folder, tmp_path, cut):
    data = (folder / "early.mp4").read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(data[: int(len(data) * cut)])
    check_audio(path, tmp_path / "result.mp4", told=False)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), [int(seed) for seed in sys.argv[2:]])
