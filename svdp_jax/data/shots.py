"""What of a video becomes clips: shots, the face that each follows, and the rules that drop what is of no use for training.

    frames [H,W,3] one after the other  ->  candidates: consecutive frames of one shot, with landmarks [N,K,2], kept or not and why

A shot ends at a cut (found by PySceneDetect, frame by frame). Within it the largest face is followed; where it is
gone for more than `faces.LONGEST_GAP` frames, its stretch ends and another one may begin. Stretches are divided into clips
of equal length. Numbers of frames are those at the rate of the data set.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float32, UInt8
from scenedetect import AdaptiveDetector, ContentDetector, FrameTimecode

from svdp_jax.config import ConfigError
from svdp_jax.data import detectors, faces

CUT_SIZE = 160  # pixels, longest side of the picture in which cuts are looked for
CUT_WINDOW = 2  # frames on either side, with whose change a cut's is compared
CUT_RATIO = 4.0  # times that change, from which it is a cut; jerky motion reaches 3, a cut between two people before one wall 37
CUT_LEAST = 8.0  # change of saturation and brightness, of 255, below which there is no cut
SHARPNESS_SIZE = 128  # pixels, side at which a face's sharpness is measured


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a clip must be to be kept."""

    min_frames: int = 20
    """Least length. Training needs history + window + 1 of them: 20 in the paper's config."""
    max_frames: int = 100
    """Longest clip; what is longer is divided."""
    min_face: float = 100.0
    """Least side of the face box (brows to chin), median over the clip, in pixels of the video."""
    max_step: float = 0.25
    """Farthest that the face may move from one frame to the next, or grow or shrink, in sides of the face box."""
    min_sharpness: float = 10.0
    """Least sharpness, median over the clip: variance of the Laplacian of the face (grey, 0 to 255) at 128 x 128."""

    def __post_init__(self):
        if not 1 < self.min_frames <= self.max_frames:
            raise ConfigError(f"min_frames={self.min_frames}, max_frames={self.max_frames}: must be at least 2, and the second not less than the first")


class Candidate(NamedTuple):
    """Consecutive frames start..stop-1 of a video, and why they are dropped, if they are."""

    start: int
    stop: int
    dropped: str  # the rule; empty: kept
    landmarks: Float32[np.ndarray, "N K 2"] | None = None  # smoothed, pixels of the video; None where there is no face
    face: float = 0.0  # pixels, side of the face box
    step: float = 0.0  # sides of the face box, the largest between two frames
    sharpness: float = 0.0


class _Stretch(NamedTuple):
    start: int
    found: list[np.ndarray | None]  # the face in each frame; where the first has none, none has
    sharpness: list[float]  # NaN where there is no face


def candidates(frames: Iterable[UInt8[np.ndarray, "H W 3"]], detector: detectors.Detector, rules: Rules) -> Iterator[Candidate]:
    """Every frame of a video is in one candidate, but for pauses without a face that are too short for a clip, and rests that are
    left where clips of both the least and the greatest length cannot be had."""
    for stretch in _stretches(frames, detector):
        length = len(stretch.found)
        if stretch.found[0] is None:
            if length >= rules.min_frames:
                yield Candidate(stretch.start, stretch.start + length, "no face")
            continue
        held = np.stack(faces.hold(stretch.found))
        smooth = faces.smooth(held)
        pieces = max(1, min(-(-length // rules.max_frames), length // rules.min_frames))
        for piece in range(pieces):
            part = slice(piece * length // pieces, min((piece + 1) * length // pieces, piece * length // pieces + rules.max_frames))
            yield _judge(stretch.start + part.start, held[part], smooth[part], np.array(stretch.sharpness[part]), rules)


def sharpness(frame: UInt8[np.ndarray, "H W 3"], landmarks: Float32[np.ndarray, "K 2"]) -> float:
    """Of the face, at one size whatever its own, so that a small face is not sharp for being small."""
    x0, y0, x1, _ = np.rint(faces.face_box(landmarks)).astype(int).tolist()
    face = faces.apply_crop(frame, faces.Crop(x0, y0, max(x1 - x0, 1)), SHARPNESS_SIZE)
    return float(cv2.Laplacian(cv2.cvtColor(face, cv2.COLOR_RGB2GRAY), cv2.CV_32F).var())


def _judge(start: int, held: np.ndarray, landmarks: np.ndarray, sharp: np.ndarray, rules: Rules) -> Candidate:
    box = faces.face_box(held)  # not smoothed, or no face would jump
    side, centre = box[:, 2] - box[:, 0], (box[:, :2] + box[:, 2:]) / 2
    moves = np.linalg.norm(np.diff(centre, axis=0), axis=1) / side[1:]
    grows = np.abs(np.diff(side)) / side[1:]
    face, step, sharpness = float(np.median(side)), float(max(np.max(moves, initial=0), np.max(grows, initial=0))), float(np.nanmedian(sharp))
    dropped = ""
    if len(landmarks) < rules.min_frames:
        dropped = "too short"
    elif face < rules.min_face:
        dropped = "face too small"
    elif step > rules.max_step:
        dropped = "face jumps"
    elif sharpness < rules.min_sharpness:
        dropped = "blurred"
    return Candidate(start, start + len(landmarks), dropped, landmarks, face, step, sharpness)


def _stretches(frames: Iterable[np.ndarray], detector: detectors.Detector) -> Iterator[_Stretch]:
    """Runs of frames with one face, short gaps included, and of frames without any, in order; a cut ends either, another face the first."""
    follow, run = faces.Tracker(), _Stretch(0, [], [])
    for number, (frame, is_cut) in enumerate(with_cuts(frames)):
        if is_cut:
            yield from _ended(run)
            follow, run = faces.Tracker(), _Stretch(number, [], [])
        shown = detector(frame)
        found = follow(shown)
        if found is None and len(shown):  # someone else's face in its place
            yield from _ended(run)
            follow, run = faces.Tracker(), _Stretch(number, [], [])
            found = follow(shown)
        if found is not None and run.found and run.found[0] is None:  # a face comes in
            yield from _ended(run)
            run = _Stretch(number, [], [])
        run.found.append(found)
        run.sharpness.append(sharpness(frame, found) if found is not None else np.nan)
        if run.found[0] is not None and not any(face is not None for face in run.found[-faces.LONGEST_GAP - 1 :]):  # gone for good
            gone = number - faces.LONGEST_GAP
            yield from _ended(run)
            follow, run = faces.Tracker(), _Stretch(gone, run.found[gone - run.start :], run.sharpness[gone - run.start :])
    yield from _ended(run)


def _ended(run: _Stretch) -> Iterator[_Stretch]:
    """A run, if it has begun, without the frames at its end from which its face is missing."""
    if run.found:
        length = max((number for number, face in enumerate(run.found, start=1) if face is not None), default=len(run.found))
        yield _Stretch(run.start, run.found[:length], run.sharpness[:length])


def with_cuts(frames: Iterable[UInt8[np.ndarray, "H W 3"]]) -> Iterator[tuple[UInt8[np.ndarray, "H W 3"], bool]]:
    """Each frame, and whether it begins a new shot; a few frames behind, for a cut is a change that its neighbours do not share.

    Two portraits before the same wall differ less than one that moves: so a change counts that is large, or larger than those around it.
    """
    weights = ContentDetector.Components(delta_hue=0.0)  # on a grey wall hue is noise
    found = [
        ContentDetector(min_scene_len=0, weights=weights),
        AdaptiveDetector(min_scene_len=1, weights=weights, adaptive_threshold=CUT_RATIO, window_width=CUT_WINDOW, min_content_val=CUT_LEAST),
    ]
    cuts: set[int] = set()
    waiting: collections.deque[tuple[int, np.ndarray]] = collections.deque()
    for number, frame in enumerate(frames):
        small = cv2.cvtColor(detectors.shrunk(frame, CUT_SIZE), cv2.COLOR_RGB2BGR)
        for detector in found:
            cuts |= {cut.frame_num for cut in detector.process_frame(FrameTimecode(number, Fraction(25)), small)}
        waiting.append((number, frame))
        if len(waiting) > CUT_WINDOW:
            number, frame = waiting.popleft()
            yield frame, number in cuts
    for number, frame in waiting:
        yield frame, number in cuts
