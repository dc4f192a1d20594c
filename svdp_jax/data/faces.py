"""Faces: where they are, what of them the model sees, how they are cut out and put back.

Frames uint8 [H, W, 3] go through a detector (`data.detectors`) to landmarks float32 [N, K, 2] of one face: pixels x, y, with pixel
centres at integers; K is 68 (iBUG's order) or 478 (MediaPipe's). From landmarks follow one square crop for the clip, a crop of
the source that shows its face at the same size and place, and the boxes of eyes, nose and
mouth, outside which a driving frame is black. "Left" is the person's left. The face box goes from brows to chin, so
that it means the same for either K.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from scipy.ndimage import gaussian_filter1d

from svdp_jax.data.detectors import Detector
from svdp_jax.data.video import MediaError

LONGEST_GAP = 5  # frames without a face through which the last one is held
RAISE = 0.1  # in sides of the face box, by which a crop sits higher, so that hair is on it
FEATHER = 0.08  # in sides of the crop, over which an animated crop blends in
HEAD_SIGMA, EXPRESSION_SIGMA = 1.5, 0.5  # frames, of the temporal smoothing
ADVICE = "use a picture with a frontal, well-lit human face, or give landmarks (.npz) or face_landmarker.task as landmarker"
EYE_HEIGHT = 0.12  # in sides of the face box: a wide-open eye. A blink must not shrink the box, or lids would be cut off.


class Crop(NamedTuple):
    """A square of an image, in whole pixels; it may reach beyond the image."""

    x0: int
    y0: int
    side: int


class _Layout(NamedTuple):
    """Which landmarks make up what."""

    left_eye: list[int]
    right_eye: list[int]
    nose: list[int]
    mouth: list[int]
    outline: list[int]  # jaw from temple to temple, and brows
    rigid: list[int]  # corners of the eyes and the nose: move with the head, not with the expression


_LAYOUTS = {
    68: _Layout(
        left_eye=list(range(42, 48)),
        right_eye=list(range(36, 42)),
        nose=list(range(27, 36)),
        mouth=list(range(48, 68)),
        outline=list(range(27)),
        rigid=[36, 39, 42, 45, 27, 30, 33],
    ),
    478: _Layout(
        left_eye=[263, 249, 390, 373, 374, 380, 381, 382, 362, 466, 388, 387, 386, 385, 384, 398],
        right_eye=[33, 7, 163, 144, 145, 153, 154, 155, 133, 246, 161, 160, 159, 158, 157, 173],
        nose=[168, 6, 197, 195, 5, 4, 1, 19, 94, 2, 98, 97, 326, 327, 294, 278, 344, 440, 275, 45, 220, 115, 48, 64],
        mouth=[61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 185, 40, 39, 37, 0, 267, 269, 270, 409],
        outline=[127, 234, 93, 132, 58, 172, 136, 150, 149, 176, 148, 152, 377, 400, 378, 379, 365, 397, 288, 361, 323, 454, 356]
        + [70, 63, 105, 66, 107, 336, 296, 334, 293, 300],
        rigid=[33, 133, 362, 263, 168, 1, 2],
    ),
}


def face_box(landmarks: Float32[np.ndarray, "*batch K 2"]) -> Float32[np.ndarray, "*batch 4"]:
    """The square x0, y0, x1, y1 around brows and jaw."""
    low, high = _extent(landmarks, _layout(landmarks).outline)
    centre, half = (low + high) / 2, np.max(high - low, axis=-1, keepdims=True) / 2
    return np.concatenate([centre - half, centre + half], axis=-1)


def regions(landmarks: Float32[np.ndarray, "*batch K 2"], *, margin: float) -> Float32[np.ndarray, "*batch 4 4"]:
    """Boxes x0, y0, x1, y1 of left eye, right eye, nose and mouth, each `margin` sides of the face box larger on every side."""
    layout = _layout(landmarks)
    side = _side(face_box(landmarks))[..., None]
    boxes = []
    for indices in (layout.left_eye, layout.right_eye, layout.nose, layout.mouth):
        low, high = _extent(landmarks, indices)
        if indices in (layout.left_eye, layout.right_eye):
            lack = np.maximum(EYE_HEIGHT * side - (high - low), 0) * np.float32([0, 0.5])
            low, high = low - lack, high + lack
        boxes.append(np.concatenate([low - margin * side, high + margin * side], axis=-1))
    return np.stack(boxes, axis=-2)


def centres(landmarks: Float32[np.ndarray, "*batch K 2"]) -> Float32[np.ndarray, "*batch 4 2"]:
    """Where left eye, right eye, nose and mouth are: the mean of their landmarks."""
    layout = _layout(landmarks)
    return np.stack([landmarks[..., part, :].mean(axis=-2) for part in (layout.left_eye, layout.right_eye, layout.nose, layout.mouth)], axis=-2)


def mask_frames(frames: UInt8[np.ndarray, "N H W 3"], boxes: Float32[np.ndarray, "N B 4"]) -> UInt8[np.ndarray, "N H W 3"]:
    """`frames` with every pixel black whose centre lies outside all boxes of its frame."""
    masked = np.zeros_like(frames)
    first, stop = (np.maximum(edge, 0).astype(int) for edge in (np.ceil(boxes[..., :2]), np.floor(boxes[..., 2:]) + 1))
    for frame, out, firsts, stops in zip(frames, masked, first, stop, strict=True):
        for (x0, y0), (x1, y1) in zip(firsts, stops, strict=True):
            out[y0:y1, x0:x1] = frame[y0:y1, x0:x1]
    return masked


def inside(frames: UInt8[np.ndarray, "N H W 3"], boxes: Float32[np.ndarray, "N B 4"]) -> Bool[np.ndarray, "N H W"]:
    """Which pixels of `frames` lie in one of the boxes."""
    return mask_frames(np.ones_like(frames), boxes)[..., 0] > 0


def driving_crop(landmarks: Float32[np.ndarray, "N K 2"], *, scale: float, within: tuple[int, int] | None = None) -> Crop:
    """One crop for the whole clip: `scale` sides of the typical face box, around its typical place, larger where a face would leave it.

    `within` is the width and height of the frames: the crop then stays on them as far as the face stays in it, moved and made
    smaller if need be, so that few pixels, if any, are padding.
    """
    boxes = face_box(landmarks)
    low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    face = float(np.median(_side(boxes)))
    centre = np.median((boxes[:, :2] + boxes[:, 2:]) / 2, axis=0) - [0, RAISE * face]
    side = round(max(scale * face, 2 * np.max([centre - low, high - centre]), 1))
    corner = centre + 0.5 - side / 2
    if within:
        side = max(min(side, *within), round(float(np.max(high - low))))
        corner = np.clip(centre + 0.5 - side / 2, 0, np.maximum(np.array(within) - side, 0))
        corner = np.clip(corner, high + 0.5 - side, low + 0.5)
    x0, y0 = np.rint(corner).astype(int).tolist()
    return Crop(x0, y0, side)


def best_match(source_landmarks: Float[np.ndarray, "M J 2"], driving_landmarks: Float[np.ndarray, "N K 2"]) -> tuple[int, int]:
    """The two frames, one of each, whose faces look most alike: the least distance between landmarks once all are centred and of one
    size, so that a head turned or bent like the other counts, and not where it is."""
    return _most_alike(_normalised(source_landmarks)[2], _normalised(driving_landmarks)[2])


def source_crop(source_landmarks: Float[np.ndarray, "J 2"], driving_landmarks: Float[np.ndarray, "N K 2"], driving_crop: Crop) -> Crop:
    """The crop that shows the source's face at the size and place of the driver's in the `best_match`. Size and place are those of
    all landmarks together."""
    source_place, source_size, source = _normalised(source_landmarks)
    places, sizes, driving = _normalised(driving_landmarks)
    _, best = _most_alike(source[None], driving)
    side = float(driving_crop.side * (source_size / sizes[best]).item())
    within = (places[best, 0] - [driving_crop.x0, driving_crop.y0] + 0.5) / driving_crop.side  # 0..1 in the crop
    x0, y0 = np.rint(source_place[0] + 0.5 - side * within).astype(int).tolist()
    return Crop(x0, y0, max(round(side), 1))


def apply_crop(frame: UInt8[np.ndarray, "H W 3"], crop: Crop, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The crop as a square of `size` pixels; beyond the image its edge is repeated."""
    (rows, top, bottom), (columns, left, right) = (_within(start, crop.side, length) for start, length in zip((crop.y0, crop.x0), frame.shape, strict=False))
    part = frame[rows, columns]
    if top or bottom or left or right:
        part = cv2.copyMakeBorder(part, top, bottom, left, right, cv2.BORDER_REPLICATE)
    return _resize(part, size)


def crop_landmarks(landmarks: Float32[np.ndarray, "*batch K 2"], crop: Crop, size: int) -> Float32[np.ndarray, "*batch K 2"]:
    """Landmarks of the full image, in pixels of what `apply_crop` makes."""
    corner = np.float32([crop.x0, crop.y0]) - np.float32(0.5)  # pixel centres are at integers, so the crop begins half a pixel earlier
    return (landmarks - corner) * (size / crop.side) - 0.5


def paste_back(source_full: UInt8[np.ndarray, "H W 3"], animated: UInt8[np.ndarray, "size size 3"], crop: Crop) -> UInt8[np.ndarray, "H W 3"]:
    """`source_full` with `animated` in place of the crop, blended in along the crop's edges, except where they are the image's."""
    height, width, _ = source_full.shape
    rows = slice(max(crop.y0, 0), max(min(crop.y0 + crop.side, height), 0))
    columns = slice(max(crop.x0, 0), max(min(crop.x0 + crop.side, width), 0))
    result = source_full.copy()
    old, pasted = source_full[rows, columns], result[rows, columns]
    if not old.size:
        return result
    inside = slice(rows.start - crop.y0, rows.stop - crop.y0), slice(columns.start - crop.x0, columns.stop - crop.x0)
    pasted[:] = new = _resize_part(animated, crop.side, *inside)
    vertical, horizontal = _ramp(crop.y0, crop.side, height)[inside[0]], _ramp(crop.x0, crop.side, width)[inside[1]]
    (top, bottom), (left, right) = _full_weight(vertical), _full_weight(horizontal)
    for edge in np.s_[:top, :], np.s_[bottom:, :], np.s_[top:bottom, :left], np.s_[top:bottom, right:]:
        weight = np.outer(vertical[edge[0]], horizontal[edge[1]])[..., None]
        pasted[edge] = np.rint(old[edge] + weight * (new[edge].astype(np.float32) - old[edge]))
    return result


def find_face(image: UInt8[np.ndarray, "H W 3"], detector: Detector, *, face: int | None = None, name: str = "source") -> Float32[np.ndarray, "K 2"]:
    """Landmarks of the largest face of an image, or of face number `face`, the largest being 0. `name` is for the MediaError."""
    faces = detector(image)
    if not len(faces):
        raise MediaError(f"no face found in {name}: {ADVICE}")
    try:
        return _nth_largest(faces, face)
    except MediaError as error:
        raise MediaError(f"{name}: {error}") from error


def track(
    frames: Iterable[UInt8[np.ndarray, "H W 3"]],
    detector: Detector,
    *,
    face: int | None = None,
    fps: Fraction | float = 25,
    name: str = "driving video",
) -> Float32[np.ndarray, "N K 2"]:
    """Landmarks of one face through a video: the largest (or number `face`) of the first frame that shows any, then the nearest.

    Through at most LONGEST_GAP frames without it the last face is held; a longer gap is a MediaError that says when
    (`fps` and `name` are for that message).
    """
    follow = Tracker(face=face)
    found: list[np.ndarray | None] = []
    for frame in frames:
        try:
            found.append(follow(detector(frame)))
        except MediaError as error:
            raise MediaError(f"{name}, frame {len(found)}: {error}") from error
    if follow.last is None:
        raise MediaError(f"no face found in {name}: {ADVICE}")
    _check_gaps(found, fps=fps, name=name)
    landmarks = np.stack(hold(found))
    found.clear()  # of an hour's landmarks, two copies are enough
    return smooth(landmarks)


class Tracker:
    """Follows one face from frame to frame: the largest (or number `face`) of the first frame that shows any, then the nearest. After more than `patience`
    frames without it, it looks for one anew (None: never)."""

    def __init__(self, *, face: int | None = None, patience: int | None = None):
        self.face, self.patience = face, patience
        self.missed = 0
        self.last: np.ndarray | None = None

    def __call__(self, faces: Float32[np.ndarray, "faces K 2"]) -> Float32[np.ndarray, "K 2"] | None:
        """The face among those of the next frame; None where it is not there."""
        if self.patience is not None and self.missed > self.patience:
            self.last, self.missed = None, 0
        found = None
        if len(faces):
            found = _nth_largest(faces, self.face) if self.last is None else _nearest(faces, self.last)
        self.missed = self.missed + 1 if found is None else 0
        self.last = found if found is not None else self.last
        return found


def hold(found: Sequence[Float32[np.ndarray, "K 2"] | None]) -> list[Float32[np.ndarray, "K 2"]]:
    """`found` with each gap filled by the face before it, a gap at the beginning by the first face."""
    last = next(face for face in found if face is not None)
    held = []
    for face in found:
        last = face if face is not None else last
        held.append(last)
    return held


def smooth(landmarks: Float32[np.ndarray, "N K 2"]) -> Float32[np.ndarray, "N K 2"]:
    """Landmarks without the detector's jitter. A symmetric Gaussian over time, which delays nothing.

    Place and size of the head, from its rigid points, move slowly, so they are smoothed over several frames, and boxes do not
    shimmer. What is left, the expression, is fast: a kernel of mostly one frame keeps 79% of even a blink of one frame.
    """
    rigid = landmarks[:, _layout(landmarks).rigid]
    place, size, _ = _normalised(rigid)
    result = landmarks - place  # one array, changed in place: there may be an hour of them
    result /= size
    gaussian_filter1d(result, EXPRESSION_SIGMA, axis=0, mode="nearest", output=result)
    place, size = (gaussian_filter1d(x, HEAD_SIGMA, axis=0, mode="nearest") for x in (place, size))
    result *= size
    result += place
    return result.astype(np.float32, copy=False)


def _check_gaps(found: list[np.ndarray | None], *, fps: Fraction | float, name: str) -> None:
    gaps, start = [], 0
    for missing, run in itertools.groupby(found, key=lambda face: face is None):
        stop = start + len(list(run))
        if missing and stop - start > LONGEST_GAP:
            gaps.append(f"{start} to {stop - 1} ({start / float(fps):.2f} to {(stop - 1) / float(fps):.2f} s)")
        start = stop
    if gaps:
        raise MediaError(f"no face found in {name}, frames {', '.join(gaps)}: cut these parts out, or give landmarks of every frame (.npz)")


def _nth_largest(faces: np.ndarray, number: int | None) -> np.ndarray:
    number = number or 0
    if not 0 <= number < len(faces):
        raise MediaError(f"face {number} asked for, and {len(faces)} found; use 0 (the largest) to {len(faces) - 1}")
    return faces[np.argsort(-_side(face_box(faces)))[number]]


def _nearest(faces: np.ndarray, last: np.ndarray) -> np.ndarray | None:
    """The face nearest to the last one; None if it is further off than the last one's size, for then it is someone else's."""
    boxes, box = face_box(faces), face_box(last)
    distances = np.linalg.norm(boxes[:, :2] + boxes[:, 2:] - box[:2] - box[2:], axis=1) / 2
    return faces[np.argmin(distances)] if distances.min() <= _side(box) else None


def _normalised(landmarks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Place [..., 1, 2], size [..., 1, 1] (root mean square distance from there), and landmarks free of both."""
    place = landmarks.mean(axis=-2, keepdims=True)
    normalised = landmarks - place
    size = np.sqrt(np.square(normalised).sum(axis=-1, keepdims=True).mean(axis=-2, keepdims=True))
    normalised /= size
    return place, size, normalised


def _most_alike(source: np.ndarray, driving: np.ndarray) -> tuple[int, int]:
    """The two frames, one of each, between whose normalised landmarks [M, K, 2] and [N, K, 2] the distance is the least."""
    if source.shape[1] != driving.shape[1]:
        raise MediaError(f"source has {source.shape[1]} landmarks and driver {driving.shape[1]}; use one landmarker for both")
    found = np.argmax(source.reshape(len(source), -1) @ driving.reshape(len(driving), -1).T)  # all have one norm: the largest product is the least distance
    return divmod(int(found), len(driving))


def _ramp(start: int, side: int, length: int) -> np.ndarray:
    """Weight of the crop along one axis [side]: rises from its edges to 1, but stays 1 up to an edge of the image."""
    inwards = (np.arange(side, dtype=np.float32) + 0.5) / (FEATHER * side)
    rise = inwards if start > 0 else np.ones_like(inwards)
    fall = inwards[::-1] if start + side < length else np.ones_like(inwards)
    return np.minimum(np.minimum(rise, fall), 1)


def _full_weight(ramp: np.ndarray) -> tuple[int, int]:
    """From where to where a ramp is 1."""
    full = np.flatnonzero(ramp == 1)
    return (int(full[0]), int(full[-1]) + 1) if len(full) else (len(ramp), len(ramp))


def _within(start: int, side: int, length: int) -> tuple[slice, int, int]:
    """The part of start..start+side that lies on an axis of this length, at least one pixel of it, and how much is missing before and behind."""
    first, last = min(max(start, 0), length - 1), min(max(start + side, 1), length)
    before = min(max(first - start, 0), side - 1)
    return slice(first, last), before, side - before - (last - first)


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if image.shape[0] > size else cv2.INTER_CUBIC)


def _resize_part(image: np.ndarray, size: int, rows: slice, columns: slice) -> np.ndarray:
    """These rows and columns of `_resize(image, size)`, without making much more of it than is asked for."""
    if size <= len(image):
        return _resize(image, size)[rows, columns]
    (y0, y1, top, bottom), (x0, x1, left, right) = (_behind(part, len(image), size) for part in (rows, columns))
    resized = cv2.resize(image[y0:y1, x0:x1], (right - left, bottom - top), interpolation=cv2.INTER_CUBIC)
    return resized[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]


def _behind(part: slice, length: int, size: int) -> tuple[int, int, int, int]:
    """Along an axis of `length` pixels that becomes `size`: the first and last of what `part` of the result is made of, and where these come to lie. Both come
    to lie between two pixels of the result (to 1/512 of their own width), or resizing what is between them would put it elsewhere."""
    scale = size / length
    places = np.arange(length + 1) * scale
    between = np.flatnonzero(np.abs(places - np.rint(places)) <= scale / 512)
    reach = 3 * scale  # cubic interpolation looks two pixels around
    first = between[places[between] <= max(part.start - reach, 0)][-1]
    last = between[places[between] >= min(part.stop + reach, places[-1])][0]
    return int(first), int(last), round(places[first]), round(places[last])


def _layout(landmarks: np.ndarray) -> _Layout:
    count = landmarks.shape[-2]
    if count not in _LAYOUTS:
        raise MediaError(f"{count} landmarks per face; give 68 (iBUG) or 478 (MediaPipe)")
    return _LAYOUTS[count]


def _extent(landmarks: np.ndarray, indices: list[int]) -> tuple[np.ndarray, np.ndarray]:
    points = landmarks[..., indices, :]
    return points.min(axis=-2), points.max(axis=-2)


def _side(box: np.ndarray) -> np.ndarray | np.floating:
    return box[..., 2] - box[..., 0]
