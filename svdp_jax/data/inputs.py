"""A source picture and a driving video, as sampling wants them: faces found, cropped alike, the driver masked.

    paths  ->  source [size,size,3], and driving frames [size,size,3] one at a time, black but for eyes, nose and mouth

A driving video is read twice, first for its landmarks and then frame by frame, so that its length is no matter of memory.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from tqdm import tqdm

from svdp_jax import files
from svdp_jax.config import DataConfig
from svdp_jax.data import detectors, faces, video


class Inputs(NamedTuple):
    """What `prepare` has found out; no frame of the video is held."""

    picture: UInt8[np.ndarray, "H W 3"]  # the whole source
    crop: faces.Crop  # of the picture: what is animated
    driver: pathlib.Path
    driver_crop: faces.Crop  # one for the whole clip, so that the head moves in it
    landmarks: Float32[np.ndarray, "N K 2"]  # in the driver's crop, in pixels of `size`
    source_landmarks: Float32[np.ndarray, "K 2"] | None  # in the crop of the picture; None where no face was looked for
    info: video.VideoInfo
    size: int

    @property
    def source(self) -> UInt8[np.ndarray, "size size 3"]:
        """The animated part of the picture."""
        return faces.apply_crop(self.picture, self.crop, self.size)


def prepare(
    source: pathlib.Path,
    driving: pathlib.Path,
    data: DataConfig,
    *,
    landmarker: pathlib.Path | None = None,
    face: int | None = None,
    driving_face: int | None = None,
    align: bool = True,
    max_frames: int | None = None,
) -> Inputs:
    """Reads both, finds the faces and the crops. Raises MediaError for whatever is wrong with them.

    Landmarks come from a `.npz` beside a file where there is one, else from `landmarker` (see `detectors.make_detector`).
    `face` is the source's, `driving_face` the driver's, 0 being the largest. `align=False` takes the middle square of both as it is;
    the driver's landmarks are then for its mask alone.
    """
    picture = video.read_image(source)
    info = video.probe(driving)
    if align:  # quickly found, or not
        if source != driving and source.with_suffix("") == driving.with_suffix("") and source.with_suffix(".npz").is_file():
            raise video.MediaError(f"landmarks {source.with_suffix('.npz')}: of {source.name} or of {driving.name}? give the two different names")
        found = faces.find_face(picture, _source_detector(source, landmarker), face=face, name=str(source))
    frames = itertools.islice(video.read_frames(driving), max_frames)
    total = min(filter(None, (info.frames, max_frames)), default=None)
    with tqdm(frames, total=total, unit="frame", desc="faces", delay=2, dynamic_ncols=True) as seen:
        landmarks = faces.track(iter(seen), detectors.detector_for(driving, landmarker, info), face=driving_face, fps=info.fps, name=str(driving))
    if align:
        driver_crop = faces.driving_crop(landmarks, scale=data.face_scale, within=(info.width, info.height))
        crop = faces.source_crop(found, landmarks, driver_crop)
        found = faces.crop_landmarks(found, crop, data.size)
    else:
        driver_crop, crop, found = middle_square(info.width, info.height), middle_square(picture.shape[1], picture.shape[0]), None
    return Inputs(picture, crop, driving, driver_crop, faces.crop_landmarks(landmarks, driver_crop, data.size), found, info, data.size)


def save(inputs: Inputs, path: pathlib.Path) -> None:
    """Keeps what took time to find: `load` needs no detector. The file is whole or not there."""
    found = {} if inputs.source_landmarks is None else {"source_landmarks": inputs.source_landmarks}
    with files.whole(path) as partial, partial.open("wb") as file:
        np.savez(file, crop=inputs.crop, driver_crop=inputs.driver_crop, landmarks=inputs.landmarks, **found)


def load(path: pathlib.Path, source: pathlib.Path, driving: pathlib.Path, data: DataConfig) -> Inputs:
    """What `prepare` found in the same two files."""
    with np.load(path) as stored:
        crop, driver_crop = (faces.Crop(*stored[name].tolist()) for name in ("crop", "driver_crop"))
        found = stored["source_landmarks"] if "source_landmarks" in stored else None
        return Inputs(video.read_image(source), crop, driving, driver_crop, stored["landmarks"], found, video.probe(driving), data.size)


def driver_frames(inputs: Inputs, *, start: int = 0) -> Iterator[UInt8[np.ndarray, "size size 3"]]:
    """The driver's frames in its crop, unmasked, from number `start` on."""
    for frame in itertools.islice(video.read_frames(inputs.driver), start, len(inputs.landmarks)):
        yield faces.apply_crop(frame, inputs.driver_crop, inputs.size)


def masked_frames(inputs: Inputs, data: DataConfig, *, start: int = 0) -> Iterator[UInt8[np.ndarray, "size size 3"]]:
    """The driver's frames as the model sees them, from number `start` on."""
    for frame, landmarks in zip(driver_frames(inputs, start=start), inputs.landmarks[start:], strict=True):
        yield masked(frame, landmarks, data)


def masked(frame: UInt8[np.ndarray, "H W 3"], landmarks: Float32[np.ndarray, "K 2"], data: DataConfig) -> UInt8[np.ndarray, "H W 3"]:
    """A frame of the driver's crop as the model sees it."""
    if not data.driver_mask:
        return frame
    return faces.mask_frames(frame[None], faces.regions(landmarks[None], margin=data.region_margin))[0]


def middle_square(width: int, height: int) -> faces.Crop:
    """The largest square in the middle of a frame."""
    side = min(width, height)
    return faces.Crop((width - side) // 2, (height - side) // 2, side)


def _source_detector(path: pathlib.Path, landmarker: pathlib.Path | None) -> detectors.Detector:
    """Landmarks that are given in a .npz are the driver's."""
    given, beside = detectors.chosen(landmarker), path.with_suffix(".npz")
    if given and given.suffix == ".npz" and not beside.is_file():
        raise video.MediaError(f"landmarker {given}: holds the driver's landmarks; {path} needs its own, in {beside.name} beside it")
    return detectors.detector_for(path, landmarker)
