"""Landmarks of the faces in an image: from MediaPipe, from a file, or from a cascade that finds faces and guesses the rest.

A `Detector` takes a frame uint8 [H, W, 3] and gives landmarks float32 [faces, K, 2]: pixels x, y, with pixel centres at integers;
K is 68 (iBUG's order) or 478 (MediaPipe's). Every caller is served by the three alike.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import pathlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float32, UInt8
from skimage.data import lbp_frontal_face_cascade_filename
from skimage.feature import Cascade

from svdp_jax.data.video import MediaError, VideoInfo

Detector = Callable[[UInt8[np.ndarray, "H W 3"]], Float32[np.ndarray, "faces K 2"]]

COUNTS = (68, 478)
NO_LANDMARKER = "no landmarker given: faces are found, expressions are not tracked; give face_landmarker.task (see README)"
UNEVEN = "{0}: its frames are not evenly spaced, or some are missing, and {1} does not say which of them is seen when; make the video one of a constant rate, or do without the .npz"
_STDERR = threading.Lock()
CASCADE_SIZE = 300  # pixels, longest side of the picture in which the cascade looks


def chosen(landmarker: str | os.PathLike | None) -> pathlib.Path | None:
    """The landmarker that is given, or else the environment's SVDP_FACE_LANDMARKER."""
    given = os.fspath(landmarker or os.environ.get("SVDP_FACE_LANDMARKER") or "")
    return pathlib.Path(given) if given else None


def landmarker_for_any(landmarker: str | os.PathLike | None) -> str | None:
    """The landmarker that is given, or else the environment's, if it can serve any number of videos; None without one. MediaError for a .npz,
    which holds the landmarks of one video."""
    given = chosen(landmarker)
    if given and given.suffix == ".npz":
        raise MediaError(f"landmarker {given}: holds the landmarks of one video; put it beside that, under its name, and give face_landmarker.task")
    return os.fspath(given) if given else None


def make_detector(landmarker: str | os.PathLike | None, *, frames: int | None = None) -> Detector:
    """The detector for `landmarker`, or else for the environment's SVDP_FACE_LANDMARKER: a .task file (MediaPipe), a .npz file
    (landmarks of each frame in turn, of a video of so many `frames`); without either, the cascade."""
    landmarker = chosen(landmarker)
    if not landmarker:
        return cascade_detector()
    match landmarker.suffix:
        case ".task":
            return mediapipe_detector(landmarker)
        case ".npz":
            return precomputed_detector(read_landmarks(landmarker, frames=frames))
    raise MediaError(f"landmarker {landmarker}: must be a MediaPipe .task file or a .npz file of landmarks")


def detector_for(path: pathlib.Path, landmarker: str | os.PathLike | None, info: VideoInfo | None = None) -> Detector:
    """The detector for the frames of a file: landmarks in a .npz beside it where there is one, else that of `make_detector`. `info`: of a video.
    MediaError where its frames have no even rate, of which landmarks say nothing."""
    beside = path.with_suffix(".npz")
    given = beside if beside.is_file() else chosen(landmarker)
    if info and not info.even and given and given.suffix == ".npz":
        raise MediaError(UNEVEN.format(path, given))
    return make_detector(given, frames=info.frames if info else None)


def mediapipe_detector(task_path: str | os.PathLike, *, max_faces: int = 4) -> Detector:
    """MediaPipe's Face Landmarker, 478 landmarks, each image on its own."""
    if not os.path.isfile(task_path):
        raise MediaError(f"landmarker {task_path}: does not exist; the README says where to get face_landmarker.task")
    try:
        # In a thread, because the import keeps its callers' variables alive, and a landmarker closed as late as that prints a traceback.
        with ThreadPoolExecutor(1) as thread:
            mp = thread.submit(importlib.import_module, "mediapipe").result()
    except (ImportError, OSError) as error:
        raise MediaError(f"a .task landmarker needs MediaPipe ({error}): pip install -e '.[face]'") from error
    vision = mp.tasks.vision
    options = vision.FaceLandmarkerOptions(base_options=mp.tasks.BaseOptions(model_asset_path=os.fspath(task_path)), num_faces=max_faces)

    def look(image: np.ndarray) -> Any:
        return landmarker.detect(mp.Image(image_format=mp.ImageFormat.SRGB, data=np.ascontiguousarray(image)))

    try:
        with _no_native_messages():  # of which a start has four, and none is any user's matter
            landmarker = vision.FaceLandmarker.create_from_options(options)
            look(np.zeros((64, 64, 3), np.uint8))
    except (RuntimeError, ValueError) as error:
        raise MediaError(f"landmarker {task_path}: not a Face Landmarker model; download face_landmarker.task again") from error

    def detect(image: np.ndarray) -> np.ndarray:
        result = look(image)
        points = np.array([[(p.x, p.y) for p in face] for face in result.face_landmarks], np.float32).reshape(-1, 478, 2)
        return points * np.float32([image.shape[1], image.shape[0]]) - np.float32(0.5)

    return detect


@contextlib.contextmanager
def _no_native_messages() -> Iterator[None]:
    """Keeps what native code writes to stderr from the terminal. One thread at a time, or one would take the other's nowhere for the terminal."""
    with _STDERR:
        sys.stderr.flush()
        terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, 2)
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            os.close(nowhere)


def precomputed_detector(landmarks: Float32[np.ndarray, "N K 2"]) -> Detector:
    """The n-th call finds the n-th face of `landmarks`, or none where they are NaN, or less than a pixel wide or high: for the frames of one video, from the
    first on."""
    calls = itertools.count()

    def detect(image: np.ndarray) -> np.ndarray:
        number = next(calls)
        if number >= len(landmarks):
            raise MediaError(f"landmarks of {len(landmarks)} frames, and the video has more; compute them for the whole video")
        found = landmarks[number : number + 1]
        return found if np.ptp(found, axis=1).min() >= 1 else found[:0]  # NaN is not

    return detect


def cascade_detector() -> Detector:
    """scikit-image's cascade of frontal faces, and in each face 68 landmarks where an average, still face has them: warns of that."""
    cascade = Cascade(lbp_frontal_face_cascade_filename())
    average = average_face()

    def detect(image: np.ndarray) -> np.ndarray:
        small = shrunk(image, CASCADE_SIZE)
        longest = max(small.shape[:2])
        shrink, least = longest / max(image.shape[:2]), max(longest // 6, 1)
        hits = cascade.detect_multi_scale(small, scale_factor=1.2, step_ratio=1, min_size=(least, least), max_size=(longest, longest))
        boxes: list[np.ndarray] = []  # x, y, side, largest first
        for x, y, side in sorted(((hit["c"], hit["r"], hit["width"]) for hit in hits), key=lambda box: -box[2]):
            middle = np.array([x, y]) + side / 2
            if not any((box[:2] <= middle).all() and (middle <= box[:2] + box[2]).all() for box in boxes):  # else a second find of one face
                boxes.append(np.array([x, y, side]))
        faces = [(average * box[2] + box[:2]) / shrink - 0.5 for box in boxes]
        if faces:  # with none there is an error to come, which says the same
            warnings.warn(NO_LANDMARKER, stacklevel=1)
        return np.array(faces, np.float32).reshape(-1, 68, 2)

    return detect


def shrunk(image: UInt8[np.ndarray, "H W 3"], longest: int) -> UInt8[np.ndarray, "h w 3"]:
    """The image, at its own proportions, with no side longer than `longest` pixels, and none of nothing."""
    shrink = min(longest / max(image.shape[:2]), 1)
    height, width = (max(round(side * shrink), 1) for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def average_face() -> Float32[np.ndarray, "68 2"]:
    """A frontal face at rest in iBUG's order, in sides of the box that the cascade puts around it."""

    def arc(middle: tuple[float, float], radii: tuple[float, float], degrees: np.ndarray) -> np.ndarray:
        angle = np.deg2rad(degrees)  # 0 is image right, 90 down
        return np.stack([np.cos(angle), np.sin(angle)], axis=-1) * radii + middle

    eye = np.array([180.0, 240, 300, 0, 60, 120])
    points = [
        arc((0.5, 0.40), (0.39, 0.63), np.linspace(180, 0, 17)),  # jaw
        arc((0.30, 0.30), (0.12, 0.05), np.linspace(195, 345, 5)),  # brows
        arc((0.70, 0.30), (0.12, 0.05), np.linspace(195, 345, 5)),
        np.linspace([0.5, 0.38], [0.5, 0.63], 4),  # nose: bridge, then wings
        arc((0.5, 0.63), (0.11, 0.04), np.linspace(180, 0, 5)),
        arc((0.32, 0.39), (0.08, 0.03), eye),
        arc((0.68, 0.39), (0.08, 0.03), eye),
        arc((0.5, 0.78), (0.14, 0.05), np.arange(180.0, 540, 30)),  # lips: outer, then inner
        arc((0.5, 0.78), (0.11, 0.015), np.arange(180.0, 540, 45)),
    ]
    return np.concatenate(points).astype(np.float32)


def read_landmarks(path: str | os.PathLike, *, frames: int | None = None) -> Float32[np.ndarray, "N K 2"]:
    """The array `landmarks` of a .npz file; a frame without a face is all NaN. MediaError unless it is of a shape that is known.

    `frames`: how many the video has that they are of, where that is known. More landmarks than that are a warning."""
    try:
        with np.load(path) as file:
            landmarks = file["landmarks"].astype(np.float32)
    except Exception as error:  # of a damaged file NumPy raises nearly anything
        raise MediaError(f"landmarks {path}: not a .npz file with an array `landmarks` ({error})") from error
    finite = np.isfinite(landmarks)
    whole = landmarks.ndim == 3 and landmarks.shape[2] == 2 and (finite.all(axis=(1, 2)) | np.isnan(landmarks).all(axis=(1, 2))).all()
    if not whole or not finite.any():
        raise MediaError(
            f"landmarks {path}: array of shape {landmarks.shape}; must be [frames, 68 or 478, 2], each frame all finite, or all NaN where it shows no face"
        )
    if landmarks.shape[1] not in COUNTS:
        raise MediaError(f"landmarks {path}: {landmarks.shape[1]} landmarks per face; give {COUNTS[0]} (iBUG) or {COUNTS[1]} (MediaPipe)")
    if frames is not None and len(landmarks) > frames:
        where = "if it was cut off at its end, those of its frames are used; if at its beginning, they are of other frames"
        warnings.warn(f"landmarks {path}: of {len(landmarks)} frames, and the video has {frames}; {where}", stacklevel=2)
    return landmarks


def write_landmarks(path: str | os.PathLike, landmarks: Float32[np.ndarray, "N K 2"]) -> None:
    """Write the .npz file that `read_landmarks` reads."""
    try:
        with open(path, "wb") as file:
            np.savez_compressed(file, landmarks=landmarks.astype(np.float32))
    except OSError as error:
        raise MediaError(f"landmarks {path}: cannot be written ({error.strerror})") from error
