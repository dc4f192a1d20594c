"""Video files, opened by av: which stream is the picture, and what is refused before a frame is decoded.

In: the path of a file. Out: av's container, in which `moving` finds a stream of a kind that is known, with frames and pixels of a
shape that can be shown; anything else is a MediaError.
"""

from __future__ import annotations

import os
import pathlib
from fractions import Fraction

import av
from av.stream import Disposition

from svdp_jax.files import MediaError, one_line

READ_ERRORS = (av.error.FFmpegError, OSError)  # of av, whether it reads or writes
MOST_PIXELS = 1 << 26  # of a frame of video: 8192x8192
_MOST_STRETCH = 4  # of a pixel, width over height or the other way


def open_video(path: pathlib.Path) -> av.container.InputContainer:
    """A file that has a moving picture, for the caller to close."""
    try:
        container = av.open(address(path), metadata_errors="replace")
    except READ_ERRORS as error:
        raise MediaError(f"{path}: not a video or image that can be read ({one_line(error)}); use e.g. a complete .mp4 or .jpg") from error
    problem = _problem(container)
    if problem:
        container.close()
        raise MediaError(f"{path}: {problem}")
    return container


def address(path: str | os.PathLike) -> str:
    """Of a file, for FFmpeg: absolute, or it would take what is before a colon in its name for a protocol."""
    return str(pathlib.Path(path).absolute())


def _problem(container: av.container.InputContainer) -> str | None:
    """Why a file is no driving video, and what to do; None if it is one."""
    if container.format.name.endswith("_pipe") or container.format.name in ("gif", "apng", "mjpeg", "image2"):
        return "is an image that Pillow cannot read, it may be damaged; use a complete one"
    stream = moving(container)
    if stream is None:
        return f"has no video stream{' but a cover picture' if container.streams.video else ''}; use a file with a moving picture"
    if stream.codec_context is None:
        return "its kind of video is not known; re-encode it, e.g. to H.264 in an mp4 file"
    width, height, shape = stream.codec_context.width, stream.codec_context.height, pixel_shape(stream)
    if width * height > MOST_PIXELS:
        return f"frames of {width}x{height} are too large; re-encode it at a smaller size"
    if not 1 / _MOST_STRETCH <= shape <= _MOST_STRETCH:
        return f"pixels cannot be {shape} times as wide as high; re-encode it with square ones"
    return None


def moving(container: av.container.InputContainer) -> av.VideoStream | None:
    """The first video stream that is not the cover of an album or a film."""
    return next((stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic), None)


def pixel_shape(stream: av.VideoStream) -> Fraction:
    """Width over height of a pixel as shown."""
    return stream.sample_aspect_ratio or Fraction(1)
