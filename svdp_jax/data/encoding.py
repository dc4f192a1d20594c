"""Frames to H.264: as an mp4 file with the audio of another one, or as the bytes of a short clip, and those back to frames.

In: RGB frames uint8 [H, W, 3], one every 1/fps seconds. Out: a file that appears when it is complete, with no more than a frame or
two of it in memory; or bytes, of which `decode` gives any frames without decoding all that come before.
"""

from __future__ import annotations

import contextlib
import heapq
import io
import itertools
import os
import pathlib
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction

import av
import cv2
import numpy as np
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from jaxtyping import UInt8

from svdp_jax.data.streams import READ_ERRORS, address, moving
from svdp_jax.data.timing import declared_end
from svdp_jax.files import MediaError, one_line

METADATA_KEYS = ("title", "artist", "comment", "description", "copyright", "date", "genre", "synopsis")  # those an mp4 keeps
_BT709 = 1  # the number that H.264 has for the colours of HD video
# Between RGB and YUV; without accurate rounding each way makes the picture darker by about one level.
CONVERSION = {"interpolation": Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT, "threads": 1}
_QUICK_CONVERSION = CONVERSION | {"interpolation": Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT}  # half the time
_LONGEST_SIDE = 16384  # pixels, that x264 encodes
KEY_EVERY = 8  # frames, of clips in bytes: how far one has to decode to reach any of them
_AVX512 = 13  # OpenCV's CPU_AVX_512F, which Python's has no name for
_CLIP_OPTIONS = {"tune": "fastdecode", "g": str(KEY_EVERY), "keyint_min": str(KEY_EVERY), "sc_threshold": "0"}  # a tenth larger, read in half the time
if cv2.checkHardwareSupport(_AVX512):
    _CLIP_OPTIONS["x264-params"] = "asm=avx2"  # x264's macroblock tree depends on stray memory with AVX-512: the same frames become other bytes each time


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
    0 is lossless, 51 the worst. MediaError where `path` cannot be written, `frames` is empty or too large (`check_size` says
    that before there are any), or an mp4 would drop a key of `metadata`.
    """
    path = pathlib.Path(path)
    dropped = sorted(set(metadata) - set(METADATA_KEYS))
    if dropped:
        raise MediaError(f"{path}: an mp4 file does not keep the metadata {', '.join(dropped)}; use {', '.join(METADATA_KEYS)}")
    with contextlib.ExitStack() as stack:
        try:  # before the first frame is asked for, which may have taken hours
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=address(path.parent)))
            if path.is_dir():
                raise IsADirectoryError("it is a directory")
        except OSError as error:
            raise MediaError(f"{path}: cannot be written ({one_line(error)}); choose an existing, writable folder") from error
        result = os.path.join(folder, "picture.mp4")
        try:
            with av.open(result, "w", format="mp4", options={"movflags": "faststart"}) as container:
                container.metadata.update(metadata)
                count = _encode_into(container, frames, fps=fps, threads=0, options={"crf": str(crf)}, name=path)
        except READ_ERRORS as error:
            raise MediaError(f"{path}: cannot be written ({one_line(error)}); is the disk full?") from error
        if not count:
            raise MediaError(f"{path}: no frames to write")
        if audio_from is not None:
            with_audio = os.path.join(folder, "audio.mp4")
            try:
                if _add_audio(result, audio_from, with_audio, seconds=count / fps):
                    result = with_audio
            except Exception as error:  # whatever it is, the picture may have taken hours
                warnings.warn(f"{path}: written without audio, that of {audio_from} cannot be copied ({one_line(error)})", stacklevel=2)
        with open(result, "rb") as file:
            os.fsync(file.fileno())  # what it was made of may be deleted next
        os.replace(result, path)


def check_size(width: int, height: int, *, name: str | os.PathLike) -> None:
    """MediaError where no frames of this size can be encoded. `name` is for the message."""
    if max(width, height) > _LONGEST_SIDE:
        raise MediaError(f"{name}: a video of {width}x{height} pixels cannot be encoded, no side may be longer than {_LONGEST_SIDE}; use a smaller picture")


def _add_audio(picture: str, audio_from: str | os.PathLike, output: str, *, seconds: Fraction) -> bool:
    """Put the streams of `picture` and the first `seconds` of audio of another file into `output`; False if there is no audio."""
    with av.open(picture) as video, av.open(address(audio_from), metadata_errors="replace") as other:
        if not other.streams.audio:
            return False
        audio = other.streams.audio[0]
        start = Fraction(0)  # our first frame is at 0, wherever the other file has its own
        seen = moving(other)
        if seen and seen.start_time is not None:
            start = seen.start_time * seen.time_base
        with av.open(output, "w", format="mp4", options={"movflags": "faststart"}) as container:
            container.metadata.update({key: value for key, value in video.metadata.items() if key in METADATA_KEYS})
            video_out = container.add_stream_from_template(video.streams.video[0])
            audio_out = container.add_stream_from_template(audio)
            shift, end = round(start / audio.time_base), None

            def sound() -> Iterator[av.Packet]:
                nonlocal end
                for packet in other.demux(audio):
                    if packet.dts is None or packet.pts is None:
                        continue
                    packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                    if packet.pts * audio.time_base >= seconds:
                        return
                    if packet.pts * audio.time_base < -1:  # long before our first frame; decoders need what is shortly before
                        continue
                    end = (packet.pts + (packet.duration or 0)) * audio.time_base
                    yield packet

            # By time, so that a player that reads from the start has sound and picture together.
            pictures = ((packet.dts * packet.time_base, video_out, packet) for packet in video.demux(video=0) if packet.dts is not None)
            sounds = ((packet.dts * audio.time_base, audio_out, packet) for packet in sound())
            for _, stream, packet in heapq.merge(pictures, sounds, key=lambda timed: timed[0]):
                packet.stream = stream
                container.mux(packet)
        if end is None:
            raise ValueError("none of it is to be heard while the picture is seen")
        promised = declared_end(audio)
        if promised is not None and min(promised - start, seconds) - end > 0.1:
            warnings.warn(f"{audio_from}: its audio ends after {float(end):.2f} seconds; the file is cut off or damaged", stacklevel=3)
    return True


def encode(frames: UInt8[np.ndarray, "N H W 3"], *, fps: Fraction, crf: int = 12) -> bytes:
    """A clip as the bytes of an mp4 file (H.264, yuv420p), nearly without loss. H and W are even, N is at least 1.

    One thread, so that the bytes are the same on any machine; callers work on several clips at a time.
    """
    if not len(frames) or frames.shape[1] % 2 or frames.shape[2] % 2:
        raise MediaError(f"clip of shape {frames.shape}: must have a frame, and even height and width")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        _encode_into(container, frames, fps=fps, threads=1, options=_CLIP_OPTIONS | {"crf": str(crf)}, name="clip")
    return file.getvalue()


def _encode_into(
    container: av.container.OutputContainer,
    frames: Iterable[np.ndarray],
    *,
    fps: Fraction,
    threads: int,
    options: dict[str, str],
    name: str | os.PathLike,
) -> int:
    """Encode `frames` into an open mp4 and say how many there were. 0 threads: as many as there are cores."""
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        return 0
    height, width, _ = first.shape
    check_size(width, height, name=name)
    pad = ((0, height % 2), (0, width % 2), (0, 0))  # yuv420p has one colour for 2x2 pixels
    stream = container.add_stream("libx264", rate=fps, options=options)
    stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
    codec = stream.codec_context
    codec.thread_count = threads
    codec.colorspace = codec.color_primaries = codec.color_trc = codec.color_range = _BT709  # else players guess, by the size
    count = 0
    for count, frame in enumerate(itertools.chain([first], frames), start=1):
        picture = av.VideoFrame.from_ndarray(np.pad(frame, pad, mode="edge"), format="rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, **CONVERSION)
        picture.pts, picture.time_base = count - 1, 1 / fps
        container.mux(stream.encode(picture))
    container.mux(stream.encode())
    return count


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
    except (*READ_ERRORS, IndexError, TypeError) as error:  # TypeError: a time or a rate that the file does not have
        raise MediaError(f"video of {len(data)} bytes cannot be decoded ({one_line(error)}); write the record again") from error
    missing = [number for number in wanted if number not in found]
    if missing or not found:
        raise MediaError(f"video of {len(data)} bytes: {len(missing)} of {len(wanted)} frames are damaged or missing; write the record again")
    converter = VideoReformatter()  # one for all: a frame's own, set up anew each time, takes as long as decoding
    pictures = {number: converter.reformat(found[number], format="rgb24", **_QUICK_CONVERSION).to_ndarray() for number in wanted}
    return np.stack([pictures[number] for number in (wanted if numbers is None else numbers)])


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of rising `numbers`; a new run begins where seeking is cheaper than decoding what lies between."""
    breaks = [i for i in range(1, len(numbers)) if numbers[i] - numbers[i - 1] > KEY_EVERY]
    return [(numbers[start], numbers[end - 1]) for start, end in zip([0, *breaks], [*breaks, len(numbers)], strict=True)] if numbers else []
