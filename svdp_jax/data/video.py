"""Read and write images and video: frames, exact frame rate, audio.

In: a path. Out: RGB frames uint8 [H, W, 3] one after the other, upright, at a constant rate. Video goes through av, whose frame
rates are exact: `streams` opens it and `timing` says when its frames are shown. Images go through Pillow, in `stills`. The way back,
to H.264, is in `encoding`; callers find it here, too. Nothing here holds more than a frame or two of a file.

Damage is reported as far as it can be known: by what is missing, what a decoder refuses or marks, and PNG's checksums. H.264,
VP9, JPEG and GIF have none, so that a changed byte may make another legal picture.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import warnings
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import NamedTuple, TypeVar

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import Colorspace
from jaxtyping import Float32, UInt8
from PIL import Image

from svdp_jax.data import stills, streams
from svdp_jax.data.encoding import CONVERSION, KEY_EVERY, METADATA_KEYS, check_size, decode, encode, write_video
from svdp_jax.data.timing import STILL_FPS, timing_of
from svdp_jax.files import MediaError

__all__ = ["KEY_EVERY", "METADATA_KEYS", "STILL_FPS", "MediaError", "VideoInfo", "at_rate", "check_size", "decode", "encode"]
__all__ += ["probe", "read_audio", "read_frames", "read_image", "write_video"]

ENDINGS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv", ".3gp")  # of names of videos, in folders

# Numbers of H.264, which those of other codecs follow.
_HDR = {16: "PQ", 18: "HLG"}  # curves of brightness
_NO_COLOURS_SAID = 2
_LAPSE = 0.05  # seconds that sound may come late until it is taken for missing

Item = TypeVar("Item")


class VideoInfo(NamedTuple):
    width: int  # as shown, after rotation, of square pixels
    height: int
    fps: Fraction  # exact, such as 30000/1001; the average where frames are not evenly spaced
    frames: int | None  # that `read_frames` gives; None where the file does not say when its frames are shown
    has_audio: bool
    even: bool = True  # constant frame rate, and none missing; else frames are left out and repeated, and what is known of each frame of the file has no place


def probe(path: str | os.PathLike) -> VideoInfo:
    """Size, exact frame rate, length and audio of a video or an image. Decodes one frame of a video. MediaError if it has none."""
    path = _existing(path)
    images = stills.frame_count(path)
    timing = timing_of(path, images)
    _, first = next(_pictures(path, images), (None, None))
    if first is None:
        raise MediaError(f"{path}: no frame can be decoded; re-encode it, e.g. to H.264 in an mp4 file")
    height, width, _ = first.shape
    return VideoInfo(width, height, timing.fps, timing.frames if timing.timed else None, timing.has_audio, timing.even and timing.frames == timing.stored)


def read_frames(path: str | os.PathLike) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Frames of a video, one every 1/fps seconds, upright, with square pixels, laid on white where transparent; of a still image, that image.

    Frames that are not evenly spaced are brought to the average rate, and a neighbour stands in for a frame that is
    missing or cannot be decoded, so that audio stays in time; each gives one warning, however often a file is read, and so does
    HDR, whose colours are taken as they are coded. Frames after a damaged one may show traces of it, up to the next key frame.
    MediaError where there is no frame at all, where the size changes for good, and where times make no sense: over 1000 frames a
    second, or one that is shown for over a minute.
    """
    path = _existing(path)
    images = stills.frame_count(path)
    timing = timing_of(path, images)
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
        whole, other = whole + 1, None
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
    return stills.read(_existing(path))


def read_audio(path: str | os.PathLike, rate: int) -> Float32[np.ndarray, " samples"] | None:
    """What is heard in a video from its first frame on, mono, at `rate` samples a second, -1..1, up to where it is damaged, which is a warning; None where it
    has no sound. Where sound begins late, or is missing for a while, there is silence. MediaError where its sound changes its kind midway."""
    path = _existing(path)
    with streams.open_video(path) as container:
        if not container.streams.audio:
            return None
        timing = timing_of(path, images=0)
        heard, end, early = timing.start, timing.start + float(timing.frames / timing.fps), 0  # seconds so far, and of the picture; samples before the first frame
        resampler, parts = av.AudioResampler(format="s16", layout="mono", rate=rate), []  # of whole numbers; as floats, channels would be added up
        try:
            for number, frame in enumerate(container.decode(container.streams.audio[0])):
                time = heard if frame.time is None else frame.time
                if time > end:
                    break
                late = round((time - heard) * rate)
                if number == 0 or late > rate * _LAPSE:  # from then on times are rounded
                    early = max(-late, early)
                    parts.append(np.zeros(max(late, 0), np.int16))
                heard = time + frame.samples / frame.sample_rate
                parts += [part.to_ndarray()[0] for part in resampler.resample(frame)]
        except streams.READ_ERRORS:
            warnings.warn(f"{path}: its sound is damaged after {sum(map(len, parts)) / rate:.1f} s; what is before that is heard", stacklevel=1)
        except ValueError as error:
            raise MediaError(f"{path}: its sound changes rate or channels midway; re-encode it") from error
        parts += [part.to_ndarray()[0] for part in resampler.resample(None)]
    return np.concatenate(parts)[early:].astype(np.float32) / 32768 if parts else None


def at_rate(frames: Iterable[Item], *, fps: Fraction | float, rate: Fraction | float) -> Iterator[Item]:
    """Frames (or what belongs to each) that come `fps` times a second, as they are seen `rate` times a second: some left out, or shown again."""
    given = 0
    for number, frame in enumerate(frames, start=1):
        while given * fps < number * rate:
            yield frame
            given += 1


def _existing(path: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(path)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise MediaError(f"{path}: {problem}; give the path of an image or a video")
    if path.stat().st_size == 0:
        raise MediaError(f"{path}: is empty (0 bytes); copy or download it again")
    return path


def _pictures(path: pathlib.Path, images: int) -> Iterator[tuple[float | None, np.ndarray]]:
    """When each frame that can be decoded whole is shown (seconds; None where the file does not say), and its pixels as shown."""
    if images == 1:
        yield 0.0, stills.read(path)
    elif images:
        yield from stills.animation(path)
    else:
        with streams.open_video(path) as container:
            stream = streams.moving(container)
            shape, curve = streams.pixel_shape(stream), _HDR.get(stream.codec_context.color_trc)
            if curve:
                warnings.warn(f"{path}: is HDR ({curve}); its colours are taken as coded, paler than they are meant; convert it to SDR (BT.709)", stacklevel=1)
            for frame in _tolerant_decode(container):
                yield frame.time, _as_shown(frame, shape)


def _tolerant_decode(container: av.container.InputContainer) -> Iterator[av.VideoFrame]:
    """The frames that can be decoded whole, in order; others are passed over."""
    stream = streams.moving(container)
    options = {"max_pixels": str(streams.MOST_PIXELS)}
    if stream.codec_context.codec.intra_only:  # else what is not quite right costs all that is predicted from it, and no more is found
        options["err_detect"] = "crccheck+explode"
    stream.codec_context.options = options
    with contextlib.suppress(*streams.READ_ERRORS):  # from demux: the rest of the file is missing
        for packet in container.demux(stream):
            if packet.is_corrupt:  # the last, cut through
                continue
            with contextlib.suppress(*streams.READ_ERRORS):
                yield from (frame for frame in packet.decode() if not frame.is_corrupt)


def _as_shown(frame: av.VideoFrame, shape: Fraction) -> np.ndarray:
    """Pixels made square, laid on white where transparent, and upright: a phone held upright stores pictures that lie on their side, and an angle; one that
    films its owner may say that they are mirrored."""
    transparent = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    size = {"width": round(frame.width * max(shape, 1)), "height": round(frame.height / min(shape, 1))}
    pixels = frame.to_ndarray(format="rgba" if transparent else "rgb24", src_colorspace=_colours(frame), **size, **CONVERSION)
    if transparent:
        pixels = stills.on_white(Image.fromarray(pixels))
    turns = round(frame.rotation / 90)
    pixels = np.rot90(pixels, k=turns)
    return np.ascontiguousarray(np.flip(pixels, axis=turns % 2) if _mirrored(frame) else pixels)


def _colours(frame: av.VideoFrame) -> Colorspace | None:
    """BT.709 for frames as large as HD that do not say what their YUV means, as players take them; None: what they say, else FFmpeg's default, BT.601."""
    large = frame.width >= 1280 or frame.height >= 720
    return Colorspace.ITU709 if large and frame.colorspace == _NO_COLOURS_SAID else None


def _mirrored(frame: av.VideoFrame) -> bool:
    """Whether its display matrix turns the picture over: the angle is then that of its horizontal axis alone."""
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    if matrix is None:
        return False
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).astype(np.int64)
    return bool(a * d - b * c < 0)
