"""What every learned metric offers, and what is handed to it.

    metric = Lpips(folder)          reads its weights;          ConfigError where a file or a package is missing
    metric.begin(clip)              what is known before the first frame
    metric.add(chunk) ...           consecutive frames, as many at a time as the caller likes; none is kept for longer than a window
    metric.finish() -> Outcome      the figures of this clip
    metric.overall() -> Outcome     the figures that exist over all clips alone; of most metrics there are none

Frames are uint8 [N,H,W,3], RGB. Landmarks are float32 [K,2] of one face, None where there is none: pixels x, y, with pixel centres at
integers, K 68 (iBUG's order) or 478 (MediaPipe's), as `svdp_jax.data.detectors` finds them.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt8

AUDIO_RATE = 16000  # samples a second


class Needed(NamedTuple):
    """One file, or folder, of weights that the user supplies."""

    file: str  # its name in the folder of weights
    what: str
    published: str  # where
    licence: str  # as far as it is known here


class Clip(NamedTuple):
    """What is known of a clip before its first frame."""

    fps: Fraction  # of the generated video
    audio: Float32[np.ndarray, " samples"] | None = None  # of the clip: mono, AUDIO_RATE, -1..1
    source: UInt8[np.ndarray, "H W 3"] | None = None  # whose identity the frames should have; None: that of the reference, frame by frame
    source_landmarks: Float32[np.ndarray, "K 2"] | None = None


class Chunk(NamedTuple):
    """Consecutive frames of a generated video, and those of its reference that belong to them."""

    generated: UInt8[np.ndarray, "N H W 3"]
    reference: UInt8[np.ndarray, "N h w 3"]
    generated_landmarks: Sequence[Float32[np.ndarray, "K 2"] | None] = ()  # N of them, for metrics that use landmarks
    reference_landmarks: Sequence[Float32[np.ndarray, "K 2"] | None] = ()


class Outcome(NamedTuple):
    """What was measured. A figure that could not be, such as that of a face in a clip without any, is not among them."""

    figures: dict[str, float]
    counts: dict[str, int]  # of what was measured, and of what could not be


@runtime_checkable
class Metric(Protocol):
    name: ClassVar[str]
    uses: ClassVar[tuple[Literal["landmarks", "audio"], ...]]  # beside the frames
    needs: ClassVar[tuple[Needed, ...]]  # all of them; of Fvd's, either is enough
    protocol: str  # how it is measured, to the last choice: figures measured otherwise do not compare

    def __init__(self, folder: pathlib.Path): ...  # of weights

    def begin(self, clip: Clip) -> None: ...

    def add(self, chunk: Chunk) -> None: ...

    def finish(self) -> Outcome: ...

    def overall(self) -> Outcome: ...
