"""Read and write images and video: frames, exact frame rate, audio.

In: a path (or bytes). Out: RGB frames uint8 [H, W, 3] one after the other, upright, at a constant rate; and back to
H.264 in an mp4 file, with the audio of another file. Video goes through av, whose frame rates are exact; stills and
animated images (GIF, WebP, PNG) through Pillow. Nothing here holds more than a frame or two of a file; `encode` and
`decode` serve short clips.

Damage is reported as far as it can be known: by what is missing, what a decoder refuses or marks, and PNG's checksums. H.264,
VP9, JPEG and GIF have none, so that a changed byte may make another legal picture.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import pathlib
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple, TypeVar

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from jaxtyping import UInt8
from PIL import Image, ImageOps

Item = TypeVar("Item")

STILL_FPS = Fraction(25)  # of a still image, taken as a video of one frame
METADATA_KEYS = ("title", "artist", "comment", "description", "copyright", "date", "genre", "synopsis")  # those an mp4 keeps
_BT709 = 1  # the number that H.264 has for the colours of HD video
# Between RGB and YUV; without accurate rounding each way makes the picture darker by about one level.
_CONVERSION = {"interpolation": Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT, "threads": 1}
_QUICK_CONVERSION = _CONVERSION | {"interpolation": Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT}  # half the time
KEY_EVERY = 8  # frames, of clips in bytes: how far one has to decode to reach any of them
_CLIP_OPTIONS = {"tune": "fastdecode", "g": str(KEY_EVERY), "keyint_min": str(KEY_EVERY), "sc_threshold": "0"}  # a tenth larger, read in half the time
_READ_ERRORS = (av.error.FFmpegError, OSError)
_MOST_FPS = 1000
_LONGEST = 60  # seconds for which one frame may be shown
_MOST_PIXELS = 1 << 26  # of a frame of video: 8192x8192
_MOST_STRETCH = 4  # of a pixel, width over height or the other way
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")  # images whose further ones are frames; those of other formats are pages or previews


class MediaError(ValueError):
    """A file that cannot be used. The message is one line: which file, what is wrong, what to do."""


class VideoInfo(NamedTuple):
    width: int  # as shown, after rotation, of square pixels
    height: int
    fps: Fraction  # exact, such as 30000/1001; the average where frames are not evenly spaced
    frames: int | None  # that `read_frames` gives; None where the file does not say when its frames are shown
    has_audio: bool


class _Timing(NamedTuple):
    fps: Fraction
    start: float  # seconds, of the first frame
    frames: int  # to give: all there are and, of a few missing in between, the neighbours
    promised: int  # frames to show, as the header has it; 0 if it does not say
    even: bool  # constant frame rate
    timed: bool  # the file says when frames are shown
    has_audio: bool


def probe(path: str | os.PathLike) -> VideoInfo:
    """Size, exact frame rate, length and audio of a video or an image. Decodes one frame of a video. MediaError if it has none."""
    path = _existing(path)
    images = _images_in(path)
    timing = _timing(path, images)
    _, first = next(_pictures(path, images), (None, None))
    if first is None:
        raise MediaError(f"{path}: no frame can be decoded; re-encode it, e.g. to H.264 in an mp4 file")
    height, width, _ = first.shape
    return VideoInfo(width, height, timing.fps, timing.frames if timing.timed else None, timing.has_audio)


def read_frames(path: str | os.PathLike) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Frames of a video, one every 1/fps seconds, upright and with square pixels; of a still image, that image.

    Frames that are not evenly spaced are brought to the average rate, and a neighbour stands in for a frame that is
    missing or cannot be decoded, so that audio stays in time; each gives one warning, however often a file is read. Frames
    after a damaged one may show traces of it, up to the next key frame. MediaError where there is no frame at all, where the
    size changes for good, and where times make no sense: over 1000 frames a second, or one that is shown for over a minute.
    """
    path = _existing(path)
    images = _images_in(path)
    timing = _timing(path, images)
    if not timing.even:
        rate = f"resampled to their average rate, {float(timing.fps):.3f} fps"
        warnings.warn(f"{path}: its {timing.frames} frames are not evenly spaced; {rate}", stacklevel=1)
    whole, due = 0, 0  # frames that can be read; number of the next frame to give
    frame = other = None
    for time, picture in _pictures(path, images):
        if frame is not None and picture.shape != frame.shape:
            if picture.shape == other:  # one may be damaged, two are a new size
                raise MediaError(f"{path}: frame {due} is {other[1]}x{other[0]}, not {frame.shape[1]}x{frame.shape[0]}; re-encode it at one size")
            other = picture.shape
            continue
        whole += 1
        number = min(round((time - timing.start) * timing.fps), timing.frames - 1) if timing.timed and time is not None else due
        while due < number:
            yield picture if frame is None else frame
            due += 1
        frame = picture
        if number >= due:
            yield frame
            due = number + 1
    if frame is None:
        raise MediaError(f"{path}: no frame can be decoded; re-encode it, e.g. to H.264 in an mp4 file")
    for _ in range(timing.frames - due if timing.timed else 0):
        yield frame
    expected = max(timing.frames, timing.promised)
    if whole < expected:
        warnings.warn(f"{path}: {whole} of {expected} frames can be read; the others are missing or damaged", stacklevel=1)


def read_image(path: str | os.PathLike) -> UInt8[np.ndarray, "H W 3"]:
    """A still image as RGB: turned upright (EXIF), laid on white where transparent; grey and 16 bits become RGB of 8."""
    path = _existing(path)
    with _image(path) as opened:
        opened.verify()  # PNG's checksums, which reading passes over
    with _image(path) as opened:
        return _as_rgb(ImageOps.exif_transpose(opened))


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
            except Exception as error:  # whatever it is, the picture may have taken hours
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


def at_rate(frames: Iterable[Item], *, fps: Fraction | float, rate: Fraction | float) -> Iterator[Item]:
    """Frames (or what belongs to each) that come `fps` times a second, as they are seen `rate` times a second: some left out, or shown again."""
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
    with av.open(picture) as video, av.open(os.fspath(audio_from), metadata_errors="replace") as other:
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
            end = None
            for packet in other.demux(audio):
                if packet.dts is None or packet.pts is None:
                    continue
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                if packet.pts * audio.time_base >= seconds:
                    break
                if packet.pts * audio.time_base < -1:  # long before our first frame; decoders need what is shortly before
                    continue
                end = (packet.pts + (packet.duration or 0)) * audio.time_base
                packet.stream = audio_out
                container.mux(packet)
        if end is None:
            raise ValueError("none of it is to be heard while the picture is seen")
        promised = _declared_end(audio)
        if promised is not None and min(promised - start, seconds) - end > 0.1:
            warnings.warn(f"{audio_from}: its audio ends after {float(end):.2f} seconds; the file is cut off or damaged", stacklevel=3)
    return True


def _existing(path: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(path)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise MediaError(f"{path}: {problem}; give the path of an image or a video")
    if path.stat().st_size == 0:
        raise MediaError(f"{path}: is empty (0 bytes); copy or download it again")
    return path


@contextlib.contextmanager
def _image(path: pathlib.Path) -> Iterator[Image.Image]:
    """An image, opened. Whatever goes wrong with it is a MediaError."""
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # of a damaged file Pillow raises nearly anything
        raise MediaError(f"{path}: not an image that can be read ({_one_line(error)}); use a complete .jpg or .png") from error


def _images_in(path: pathlib.Path) -> int:
    """How many frames an image has, 1 if it is still; 0 where the file is no image."""
    try:
        with _image(path) as image:
            if image.format == "MPEG":  # of which Pillow knows the name alone
                return 0
            return image.n_frames - _not_shown(image) if image.format in _ANIMATED else 1
    except MediaError as error:
        if isinstance(error.__cause__, Image.UnidentifiedImageError):
            return 0
        raise


def _not_shown(image: Image.Image) -> int:
    """1 where a PNG's first image is only for those who cannot show it moving."""
    return int(getattr(image, "default_image", False))


def _as_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # grey of 16 bits
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _animation(path: pathlib.Path) -> Iterator[tuple[float, np.ndarray]]:
    """When each frame of an animated image is shown, in seconds, and its pixels; up to the first that cannot be read."""
    with _image(path) as image:
        milliseconds = 0
        for number in range(_not_shown(image), image.n_frames):
            try:
                image.seek(number)
                picture = _as_rgb(image)
            except Exception:  # of a damaged file Pillow raises nearly anything
                return
            yield milliseconds / 1000, picture
            duration = image.info.get("duration") or 0
            milliseconds += duration if duration >= 20 else 100  # as browsers have it


def _open_video(path: pathlib.Path) -> av.container.InputContainer:
    try:
        container = av.open(str(path), metadata_errors="replace")
    except _READ_ERRORS as error:
        raise MediaError(f"{path}: not a video or image that can be read ({_one_line(error)}); use e.g. a complete .mp4 or .jpg") from error
    problem = _problem(container)
    if problem:
        container.close()
        raise MediaError(f"{path}: {problem}")
    return container


def _problem(container: av.container.InputContainer) -> str | None:
    """Why a file is no driving video, and what to do; None if it is one."""
    if container.format.name.endswith("_pipe") or container.format.name in ("gif", "apng", "mjpeg", "image2"):
        return "is an image that Pillow cannot read, it may be damaged; use a complete one"
    stream = _moving(container)
    if stream is None:
        return f"has no video stream{' but a cover picture' if container.streams.video else ''}; use a file with a moving picture"
    if stream.codec_context is None:
        return "its kind of video is not known; re-encode it, e.g. to H.264 in an mp4 file"
    width, height, shape = stream.codec_context.width, stream.codec_context.height, _pixel_shape(stream)
    if width * height > _MOST_PIXELS:
        return f"frames of {width}x{height} are too large; re-encode it at a smaller size"
    if not 1 / _MOST_STRETCH <= shape <= _MOST_STRETCH:
        return f"pixels cannot be {shape} times as wide as high; re-encode it with square ones"
    return None


def _moving(container: av.container.InputContainer) -> av.VideoStream | None:
    """The first video stream that is not the cover of an album or a film."""
    return next((stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic), None)


def _pixel_shape(stream: av.VideoStream) -> Fraction:
    """Width over height of a pixel as shown."""
    return stream.sample_aspect_ratio or Fraction(1)


def _timing(path: pathlib.Path, images: int) -> _Timing:
    """When the frames of a file are shown; of a video from its packets alone, without decoding."""
    if images == 1:
        return _Timing(STILL_FPS, 0.0, 1, 1, even=True, timed=True, has_audio=False)
    if images:
        data = path.read_bytes()
        cut = data.startswith(b"GIF") and not data.rstrip(b"\0").endswith(b";")
        return _spaced(path, [time for time, _ in _animation(path)], [], promised=images + cut, has_audio=False)
    times, hidden, ends = [], 0, {}  # of video, in seconds; packets of it that are not shown; where each stream ends
    with _open_video(path) as container:
        stream, has_audio = _moving(container), bool(container.streams.audio)
        with contextlib.suppress(*_READ_ERRORS):  # a file that is cut off ends here
            for packet in container.demux():
                if not packet.size or packet.is_corrupt:
                    continue
                time = None
                if packet.pts is not None:
                    base, index = float(packet.time_base), packet.stream_index
                    time, end = packet.pts * base, (packet.pts + (packet.duration or 0)) * base
                    ends[index] = max(ends.get(index, end), end)
                if packet.stream_index == stream.index and packet.is_discard:  # before the point where an edit begins
                    hidden += 1
                elif packet.stream_index == stream.index:
                    times.append(time)
        declared = [rate for rate in (stream.average_rate, stream.base_rate) if rate and 0 < rate <= _MOST_FPS]
        promised = max(stream.frames - hidden, 0)
        timing = _spaced(path, times, declared, promised=promised, has_audio=has_audio)
        if not promised and timing.timed:
            promised = timing.frames + round(_missing_seconds(container, stream, ends) * timing.fps)
    return timing._replace(promised=promised)


def _spaced(path: pathlib.Path, times: Sequence[float | None], declared: Sequence[Fraction], *, promised: int, has_audio: bool) -> _Timing:
    """The rate of frames that are shown at `times` (seconds; None where a raw stream does not say), one of those declared if it fits."""
    count = len(times)
    if not count:
        raise MediaError(f"{path}: has no video frames; use a file with a picture")
    if None in times or count == 1:  # there is nothing to resample by
        fps = declared[0] if declared else STILL_FPS
        return _Timing(fps, 0.0 if None in times else times[0], count, promised, True, None not in times, has_audio)
    seconds = np.sort(np.array(times))
    seconds, start = seconds - seconds[0], float(seconds[0])
    longest = float(np.diff(seconds).max())
    if longest > _LONGEST:
        raise MediaError(f"{path}: shows one frame for {longest:.0f} seconds; re-encode it at a constant frame rate")
    if count - 1 > _MOST_FPS * seconds[-1]:
        raise MediaError(f"{path}: shows {count} frames in {seconds[-1]:.3f} seconds; re-encode it at a constant frame rate")
    measured = Fraction((count - 1) / seconds[-1]).limit_denominator(1001)
    for fps in declared:  # may be wrong, but only it is exact
        frames = _frames_at(fps, seconds)
        if frames:
            return _Timing(fps, start, frames, promised, True, True, has_audio)
    even = bool(np.abs(seconds * float(measured) - np.arange(count)).max() < 0.5)
    return _Timing(measured, start, count, promised, even, True, has_audio)


def _frames_at(fps: Fraction, seconds: np.ndarray) -> int:
    """Frames of a video whose frames are shown at `seconds` if it has that rate, a few missing ones counted; 0 if it has another."""
    places = seconds * float(fps)
    if np.abs(places - np.arange(len(seconds))).max() < 0.5:
        return len(seconds)
    numbers = np.round(places).astype(np.int64)
    missing = int(numbers[-1]) + 1 - len(seconds)
    fits = np.diff(numbers).min() > 0 and np.abs(places - numbers).max() < 0.2 and missing <= max(3, len(seconds) // 10)
    return len(seconds) + missing if fits else 0


def _missing_seconds(container: av.container.InputContainer, stream: av.VideoStream, ends: dict[int, float]) -> float:
    """What a video stream has lost at the beginning, if Matroska's clock is not at 0 there, and at its end, if that is declared."""
    clocked = "matroska" in container.format.name
    missing = (container.start_time or 0) / av.time_base if clocked else 0.0
    declared = _declared_end(stream)
    if declared is not None:
        missing += declared - ends[stream.index]
    elif clocked and container.duration:  # of the longest stream
        late = container.duration / av.time_base - max(ends.values())
        missing += late if late > 0.1 else 0.0
    return max(missing, 0.0)


def _declared_end(stream: av.stream.Stream) -> float | None:
    """When a stream ends, in seconds, as the header of a Matroska or mp4 file has it; other files may have a guess."""
    if not re.search("matroska|mov", stream.container.format.name):
        return None
    tag = re.fullmatch(r"(\d+):(\d\d):(\d\d\.\d+)", stream.metadata.get("DURATION", ""))
    if tag:
        return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
    return None if stream.duration is None else float(((stream.start_time or 0) + stream.duration) * stream.time_base)


def _pictures(path: pathlib.Path, images: int) -> Iterator[tuple[float | None, np.ndarray]]:
    """When each frame that can be decoded whole is shown (seconds; None where the file does not say), and its pixels as shown."""
    if images == 1:
        yield 0.0, read_image(path)
    elif images:
        yield from _animation(path)
    else:
        with _open_video(path) as container:
            shape = _pixel_shape(_moving(container))
            for frame in _tolerant_decode(container):
                yield frame.time, _as_shown(frame, shape)


def _tolerant_decode(container: av.container.InputContainer) -> Iterator[av.VideoFrame]:
    """The frames that can be decoded whole, in order; others are passed over."""
    stream = _moving(container)
    options = {"max_pixels": str(_MOST_PIXELS)}
    if stream.codec_context.codec.intra_only:  # else what is not quite right costs all that is predicted from it, and no more is found
        options["err_detect"] = "crccheck+explode"
    stream.codec_context.options = options
    with contextlib.suppress(*_READ_ERRORS):  # from demux: the rest of the file is missing
        for packet in container.demux(stream):
            if packet.is_corrupt:  # the last, cut through
                continue
            with contextlib.suppress(*_READ_ERRORS):
                yield from (frame for frame in packet.decode() if not frame.is_corrupt)


def _as_shown(frame: av.VideoFrame, shape: Fraction) -> np.ndarray:
    """Pixels made square, and upright: a phone held upright stores pictures that lie on their side, and an angle."""
    width, height = round(frame.width * max(shape, 1)), round(frame.height / min(shape, 1))
    pixels = frame.to_ndarray(format="rgb24", width=width, height=height, **_CONVERSION)
    return np.ascontiguousarray(np.rot90(pixels, k=round(frame.rotation / 90)))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
