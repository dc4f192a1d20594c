"""When the frames of a file are shown: at which rate, how many there are, and how many the file promised.

In: the path of an image or a video. Out: a `Timing`. A video's packets say it all, none of them is decoded; the frames of an
animated image have to be read. What cannot be brought to a constant rate is a MediaError.
"""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np

from svdp_jax.data import stills
from svdp_jax.data.streams import READ_ERRORS, moving, open_video
from svdp_jax.files import MediaError

STILL_FPS = Fraction(25)  # of a still image, taken as a video of one frame
_MOST_FPS = 1000
_LONGEST = 60  # seconds for which one frame may be shown


class Timing(NamedTuple):
    fps: Fraction
    start: float  # seconds, of the first frame
    frames: int  # to give: all there are and, of a few missing in between, the neighbours
    stored: int  # all there are
    promised: int  # frames to show, as the header has it; 0 if it does not say
    even: bool  # constant frame rate
    timed: bool  # the file says when frames are shown
    has_audio: bool


def timing_of(path: pathlib.Path, images: int) -> Timing:
    """When the frames of a file are shown; of a video from its packets alone, without decoding."""
    if images == 1:
        return Timing(STILL_FPS, 0.0, 1, 1, 1, even=True, timed=True, has_audio=False)
    if images:
        return _spaced(path, [time for time, _ in stills.animation(path)], [], promised=images + stills.lacks_end(path), has_audio=False)
    times, hidden, ends = [], 0, {}  # of video, in seconds; packets of it that are not shown; where each stream ends
    with open_video(path) as container:
        stream, has_audio = moving(container), bool(container.streams.audio)
        with contextlib.suppress(*READ_ERRORS):  # a file that is cut off ends here
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


def _spaced(path: pathlib.Path, times: Sequence[float | None], declared: Sequence[Fraction], *, promised: int, has_audio: bool) -> Timing:
    """The rate of frames that are shown at `times` (seconds; None where a raw stream does not say), one of those declared if it fits."""
    count = len(times)
    if not count:
        raise MediaError(f"{path}: has no video frames; use a file with a picture")
    if None in times or count == 1:  # there is nothing to resample by
        fps = declared[0] if declared else STILL_FPS
        return Timing(fps, 0.0 if None in times else times[0], count, count, promised, True, None not in times, has_audio)
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
            return Timing(fps, start, frames, count, promised, True, True, has_audio)
    even = bool(np.abs(seconds * float(measured) - np.arange(count)).max() < 0.5)
    return Timing(measured, start, count, count, promised, even, True, has_audio)


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
    declared = declared_end(stream)
    if declared is not None:
        missing += declared - ends[stream.index]
    elif clocked and container.duration:  # of the longest stream
        late = container.duration / av.time_base - max(ends.values())
        missing += late if late > 0.1 else 0.0
    return max(missing, 0.0)


def declared_end(stream: av.stream.Stream) -> float | None:
    """When a stream ends, in seconds, as the header of a Matroska or mp4 file has it; other files may have a guess."""
    if not re.search("matroska|mov", stream.container.format.name):
        return None
    tag = re.fullmatch(r"(\d+):(\d\d):(\d\d\.\d+)", stream.metadata.get("DURATION", ""))
    if tag:
        return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
    return None if stream.duration is None else float(((stream.start_time or 0) + stream.duration) * stream.time_base)
