"""Read and write images and video: frames, exact frame rate, audio.

In: a path (or bytes). Out: RGB frames uint8 [H, W, 3] one after the other, upright, at a constant rate; and back to
H.264 in an mp4 file, with the audio of another file. Video goes through av, whose frame rates are exact; stills
through Pillow. Nothing here holds more than a frame or two of a file; `encode` and `decode` serve short clips.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import pathlib
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from jaxtyping import UInt8
from PIL import Image, ImageOps

STILL_FPS = Fraction(25)  # of a still image, taken as a video of one frame
METADATA_KEYS = ("title", "artist", "comment", "description", "copyright", "date", "genre", "synopsis")  # those an mp4 keeps
_BT709 = 1  # the number that H.264 has for the colours of HD video
# Between RGB and YUV; without accurate rounding each way makes the picture darker by about one level.
_CONVERSION = {"interpolation": Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT, "threads": 1}
_QUICK_CONVERSION = _CONVERSION | {"interpolation": Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT}  # half the time
KEY_EVERY = 8  # frames, of clips in bytes: how far one has to decode to reach any of them
_CLIP_OPTIONS = {"tune": "fastdecode", "g": str(KEY_EVERY), "keyint_min": str(KEY_EVERY), "sc_threshold": "0"}  # a tenth larger, read in half the time
_READ_ERRORS = (av.error.FFmpegError, OSError)


class MediaError(ValueError):
    """A file that cannot be used. The message is one line: which file, what is wrong, what to do."""


class VideoInfo(NamedTuple):
    width: int  # as shown, after rotation
    height: int
    fps: Fraction  # exact, such as 30000/1001; the average where frames are not evenly spaced
    frames: int | None  # that `read_frames` gives; None where the file does not say when its frames are shown
    has_audio: bool


class _Timing(NamedTuple):
    fps: Fraction
    start: float  # seconds, of the first frame
    packets: int  # with a frame that is shown
    promised: int  # frames to show, as the header has it; 0 if it does not say
    even: bool  # constant frame rate
    timed: bool  # packets say when they are shown


def probe(path: str | os.PathLike) -> VideoInfo:
    """Size, exact frame rate, length and audio of a video or a still image. Decodes one frame. MediaError if it has none."""
    path = _existing(path)
    if _is_still(path):
        height, width, _ = read_image(path).shape
        return VideoInfo(width, height, STILL_FPS, 1, False)
    with _open_video(path) as container:
        timing = _timing(container, path)
        has_audio = bool(container.streams.audio)
    with _open_video(path) as container:
        first = next(_tolerant_decode(container), None)
        if first is None:
            raise MediaError(f"{path}: no frame can be decoded; re-encode it, e.g. to H.264 in an mp4 file")
        height, width, _ = _upright(first).shape
    return VideoInfo(width, height, timing.fps, timing.packets if timing.timed else None, has_audio)


def read_frames(path: str | os.PathLike) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Frames of a video, one every 1/fps seconds, upright; of a still image, that image.

    Frames that are not evenly spaced are brought to the average rate, and a neighbour stands in for a frame that
    cannot be decoded, so that audio stays in time; each gives one warning, however often a file is read. MediaError where
    there is no frame at all.
    """
    path = _existing(path)
    if _is_still(path):
        yield read_image(path)
        return
    with _open_video(path) as container:
        timing = _timing(container, path)
    if not timing.even:
        warnings.warn(f"{path}: frames are not evenly spaced; resampled to their average rate, {float(timing.fps):.3f} fps", stacklevel=1)
    decoded, due = 0, 0  # frames read; number of the next frame to give
    shape = frame = None
    with _open_video(path) as container:
        for raw in _tolerant_decode(container):
            decoded += 1
            number = round((raw.time - timing.start) * timing.fps) if timing.timed and raw.time is not None else due
            picture = _upright(raw)
            while due < number:
                yield picture if frame is None else frame
                due += 1
            frame, shape = picture, shape or picture.shape
            if frame.shape != shape:
                raise MediaError(f"{path}: frame {decoded - 1} is {frame.shape[1]}x{frame.shape[0]}, not {shape[1]}x{shape[0]}; re-encode it at one size")
            if number >= due:
                yield frame
                due = number + 1
    if not decoded:
        raise MediaError(f"{path}: no frame can be decoded; re-encode it, e.g. to H.264 in an mp4 file")
    expected = max(timing.packets, timing.promised)
    if decoded < expected:
        warnings.warn(f"{path}: {decoded} of {expected} frames can be read; the file is cut off or damaged", stacklevel=1)


def read_image(path: str | os.PathLike) -> UInt8[np.ndarray, "H W 3"]:
    """A still image as RGB: turned upright (EXIF), laid on white where transparent; grey and 16 bits become RGB of 8."""
    path = _existing(path)
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # grey of 16 bits
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path}: not an image that can be read ({_one_line(error)}); use a complete .jpg or .png") from error


def write_video(
    path: str | os.PathLike,
    frames: Iterable[UInt8[np.ndarray, "H W 3"]],
    *,
    fps: Fraction,
    audio_from: str | os.PathLike | None = None,
    metadata: dict[str, str],
    crf: int = 14,
) -> None:
    """Write `frames` as H.264 (yuv420p) to the mp4 file `path`, which appears only when it is complete.

    Odd sizes are padded by one row or column. The audio of `audio_from`, if any, is copied as it is, as long as the
    video lasts; audio that cannot be copied is left out with a warning, the picture is kept. `crf`: x264's quality,
    0 is lossless, 51 the worst. MediaError where `path` cannot be written, `frames` is empty, or an mp4 would drop a
    key of `metadata`.
    """
    path = pathlib.Path(path)
    dropped = sorted(set(metadata) - set(METADATA_KEYS))
    if dropped:
        raise MediaError(f"{path}: an mp4 file does not keep the metadata {', '.join(dropped)}; use {', '.join(METADATA_KEYS)}")
    with contextlib.ExitStack() as stack:
        try:  # before the first frame is asked for, which may have taken hours
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent))
            if path.is_dir():
                raise IsADirectoryError("it is a directory")
        except OSError as error:
            raise MediaError(f"{path}: cannot be written ({_one_line(error)}); choose an existing, writable folder") from error
        result = os.path.join(folder, "picture.mp4")
        try:
            with av.open(result, "w", format="mp4", options={"movflags": "faststart"}) as container:
                container.metadata.update(metadata)
                count = _encode_into(container, frames, fps=fps, threads=0, options={"crf": str(crf)})
        except _READ_ERRORS as error:
            raise MediaError(f"{path}: cannot be written ({_one_line(error)}); is the disk full?") from error
        if not count:
            raise MediaError(f"{path}: no frames to write")
        if audio_from is not None:
            with_audio = os.path.join(folder, "audio.mp4")
            try:
                if _add_audio(result, audio_from, with_audio, seconds=count / fps):
                    result = with_audio
            except (*_READ_ERRORS, ValueError) as error:
                warnings.warn(f"{path}: written without audio, that of {audio_from} cannot be copied ({_one_line(error)})", stacklevel=2)
        os.replace(result, path)


def encode(frames: UInt8[np.ndarray, "N H W 3"], *, fps: Fraction, crf: int = 12) -> bytes:
    """A clip as the bytes of an mp4 file (H.264, yuv420p), nearly without loss. H and W are even, N is at least 1.

    One thread, so that the bytes are the same on any machine; callers work on several clips at a time.
    """
    if not len(frames) or frames.shape[1] % 2 or frames.shape[2] % 2:
        raise MediaError(f"clip of shape {frames.shape}: must have a frame, and even height and width")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        _encode_into(container, frames, fps=fps, threads=1, options=_CLIP_OPTIONS | {"crf": str(crf)})
    return file.getvalue()


def decode(data: bytes, numbers: Sequence[int] | None = None) -> UInt8[np.ndarray, "N H W 3"]:
    """Frames of an mp4 file given as bytes: all of them, or those of `numbers`, in that order.

    Of a file that `encode` wrote, little more than what is asked for is decoded. MediaError where a frame that is asked for is
    missing or damaged.
    """
    found: dict[int, av.VideoFrame] = {}
    try:
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            wanted = range(stream.frames) if numbers is None else sorted(set(numbers))
            for first, last in _runs(wanted):
                if first:  # to the key frame before it
                    container.seek(round(first / stream.average_rate / stream.time_base), stream=stream)
                for frame in container.decode(stream):
                    number = round(frame.time * stream.average_rate)
                    if first <= number <= last and not frame.is_corrupt:
                        found[number] = frame
                    if number >= last:
                        break
    except (*_READ_ERRORS, IndexError, TypeError) as error:  # TypeError: a time or a rate that the file does not have
        raise MediaError(f"video of {len(data)} bytes cannot be decoded ({_one_line(error)}); write the record again") from error
    missing = [number for number in wanted if number not in found]
    if missing or not found:
        raise MediaError(f"video of {len(data)} bytes: {len(missing)} of {len(wanted)} frames are damaged or missing; write the record again")
    converter = VideoReformatter()  # one for all: a frame's own, set up anew each time, takes as long as decoding
    pictures = {number: converter.reformat(found[number], format="rgb24", **_QUICK_CONVERSION).to_ndarray() for number in wanted}
    return np.stack([pictures[number] for number in (wanted if numbers is None else numbers)])


def at_rate(
    frames: Iterable[UInt8[np.ndarray, "H W 3"]], *, fps: Fraction | float, rate: Fraction | float
) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Frames that come `fps` times a second, as they are seen `rate` times a second: some left out, or shown again."""
    given = 0
    for number, frame in enumerate(frames, start=1):
        while given * fps < number * rate:
            yield frame
            given += 1


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of rising `numbers`; a new run begins where seeking is cheaper than decoding what lies between."""
    breaks = [i for i in range(1, len(numbers)) if numbers[i] - numbers[i - 1] > KEY_EVERY]
    return [(numbers[start], numbers[end - 1]) for start, end in zip([0, *breaks], [*breaks, len(numbers)], strict=True)] if numbers else []


def _encode_into(container: av.container.OutputContainer, frames: Iterable[np.ndarray], *, fps: Fraction, threads: int, options: dict[str, str]) -> int:
    """Encode `frames` into an open mp4 and say how many there were. 0 threads: as many as there are cores."""
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        return 0
    height, width, _ = first.shape
    pad = ((0, height % 2), (0, width % 2), (0, 0))  # yuv420p has one colour for 2x2 pixels
    stream = container.add_stream("libx264", rate=fps, options=options)
    stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
    codec = stream.codec_context
    codec.thread_count = threads
    codec.colorspace = codec.color_primaries = codec.color_trc = codec.color_range = _BT709  # else players guess, by the size
    count = 0
    for count, frame in enumerate(itertools.chain([first], frames), start=1):
        picture = av.VideoFrame.from_ndarray(np.pad(frame, pad, mode="edge"), format="rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, **_CONVERSION)
        picture.pts, picture.time_base = count - 1, 1 / fps
        container.mux(stream.encode(picture))
    container.mux(stream.encode())
    return count


def _add_audio(picture: str, audio_from: str | os.PathLike, output: str, *, seconds: Fraction) -> bool:
    """Put the streams of `picture` and the first `seconds` of audio of another file into `output`; False if there is no audio."""
    with av.open(picture) as video, av.open(os.fspath(audio_from)) as other:
        if not other.streams.audio:
            return False
        audio = other.streams.audio[0]
        start = Fraction(0)  # our first frame is at 0, wherever the other file has its own
        if other.streams.video and other.streams.video[0].start_time is not None:
            start = other.streams.video[0].start_time * other.streams.video[0].time_base
        with av.open(output, "w", format="mp4", options={"movflags": "faststart"}) as container:
            container.metadata.update({key: value for key, value in video.metadata.items() if key in METADATA_KEYS})
            video_out = container.add_stream_from_template(video.streams.video[0])
            audio_out = container.add_stream_from_template(audio)
            for packet in video.demux(video=0):
                if packet.dts is not None:
                    packet.stream = video_out
                    container.mux(packet)
            shift = round(start / audio.time_base)
            for packet in other.demux(audio):
                if packet.dts is None or packet.pts is None:
                    continue
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                if packet.pts * audio.time_base >= seconds:
                    break
                packet.stream = audio_out
                container.mux(packet)
    return True


def _existing(path: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(path)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise MediaError(f"{path}: {problem}; give the path of an image or a video")
    if path.stat().st_size == 0:
        raise MediaError(f"{path}: is empty (0 bytes); copy or download it again")
    return path


def _is_still(path: pathlib.Path) -> bool:
    try:
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1) == 1 or image.format == "MPO"  # photographs of phones carry a second, smaller one
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def _open_video(path: pathlib.Path) -> av.container.InputContainer:
    try:
        container = av.open(str(path))
    except _READ_ERRORS as error:
        raise MediaError(f"{path}: not a video or image that can be read ({_one_line(error)}); use e.g. a complete .mp4 or .jpg") from error
    if not container.streams.video:
        container.close()
        raise MediaError(f"{path}: has no video stream; use a file with a picture")
    return container


def _timing(container: av.container.InputContainer, path: pathlib.Path) -> _Timing:
    """When the frames of a file are shown, from its packets alone: nothing is decoded, the container is used up."""
    stream = container.streams.video[0]
    times, hidden = [], 0
    with contextlib.suppress(*_READ_ERRORS):  # a file that is cut off ends here
        for packet in container.demux(stream):
            if packet.is_discard:  # before the point where an edit begins
                hidden += 1
            elif packet.size:
                times.append(packet.pts)
    if not times:
        raise MediaError(f"{path}: has no video frames; use a file with a picture")
    promised = max(stream.frames - hidden, 0)
    declared = [rate for rate in (stream.average_rate, stream.base_rate) if rate] or [STILL_FPS]
    if None in times or len(times) == 1:  # raw streams do not say when; there is nothing to resample by
        return _Timing(declared[0], 0.0, len(times), promised, even=True, timed=None not in times)
    seconds = np.sort(np.array(times)) * float(stream.time_base)
    seconds, start = seconds - seconds[0], float(seconds[0])
    numbers = np.arange(len(times))
    measured = Fraction(numbers[-1] / max(seconds[-1], 1e-3)).limit_denominator(1001)
    for fps in (*declared, measured):  # a header may be wrong, but only a declared rate is exact
        even = bool(np.abs(seconds * float(fps) - numbers).max() < 0.5)
        if even:
            break
    return _Timing(fps, start, len(times), promised, even, timed=True)


def _tolerant_decode(container: av.container.InputContainer) -> Iterator[av.VideoFrame]:
    """The frames that can be decoded whole, in order; others are passed over."""
    with contextlib.suppress(*_READ_ERRORS):  # from demux: the rest of the file is missing
        for packet in container.demux(video=0):
            with contextlib.suppress(*_READ_ERRORS):
                yield from (frame for frame in packet.decode() if not frame.is_corrupt)


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """Pixels as shown: a phone held upright stores pictures that lie on their side, and an angle."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24", **_CONVERSION), k=round(frame.rotation / 90)))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
