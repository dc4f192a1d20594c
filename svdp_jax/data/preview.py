"""What the model sees of a source and a driving video, as one picture.

    python -m svdp_jax.data.preview -s SOURCE -d DRIVING -o PICTURE.png [--landmarker face_landmarker.task]

From top to bottom: the files as they are, with crop (green), landmarks (yellow) and regions (blue); the crops; what goes into the
model: the source's crop as it is, of the driver eyes, nose and mouth alone (all of it where `data.driver_mask` is off). From
left to right: source, the driver's frame that looks most like it, and others, evenly spaced in time.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Annotated

import cv2
import imageio.v3 as iio
import numpy as np
import tyro
from jaxtyping import Float32, UInt8

from svdp_jax import cli, files
from svdp_jax.config import ConfigError, DataConfig, load_config
from svdp_jax.data import faces, inputs, video

CELL = 320  # pixels
GREEN, YELLOW, BLUE, WHITE = (40, 220, 80), (255, 220, 0), (90, 190, 255), (255, 255, 255)


@dataclasses.dataclass(frozen=True)
class Flags:
    """What to show."""

    source: Annotated[pathlib.Path | None, tyro.conf.arg(aliases=["-s"])] = None
    """Portrait."""
    driving: Annotated[pathlib.Path | None, tyro.conf.arg(aliases=["-d"])] = None
    """Driving video or picture."""
    output: Annotated[pathlib.Path, tyro.conf.arg(aliases=["-o"])] = pathlib.Path("preview.png")
    """Picture to write (.png or .jpg)."""
    config: pathlib.Path | None = None
    """Config (.py, or the config.json of a checkpoint) with the size, crop and margins to show (default: the paper's)."""
    landmarker: pathlib.Path | None = None
    """MediaPipe's face_landmarker.task, or the driver's landmarks in a .npz (default: $SVDP_FACE_LANDMARKER, else a simple detector)."""
    face: int | None = None
    """Which face of the source, 0 being the largest."""
    driving_face: int | None = None
    """Which face of the driver."""
    align: bool = True
    """Crop both faces to the same size and place."""
    max_frames: int | None = None
    """Look at so many frames of the driver."""
    columns: int = 5
    """Frames of the driver to show."""


def main(flags: Flags) -> None:
    if not flags.source or not flags.driving:
        raise ConfigError("preview needs --source PICTURE and --driving VIDEO; --help explains")
    if flags.columns < 1 or (flags.max_frames is not None and flags.max_frames < 1):
        raise ConfigError(f"--columns {flags.columns}, --max-frames {flags.max_frames}: must be at least 1")
    if not flags.output.absolute().parent.is_dir() or flags.output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ConfigError(f"--output {flags.output}: must be a .png or .jpg in a folder that exists")
    if flags.output.is_dir():
        raise ConfigError(f"--output {flags.output}: is a folder; give the picture another name")
    with files.writing(flags.output):
        tempfile.TemporaryFile(dir=flags.output.absolute().parent).close()
    data = load_config(flags.config).data if flags.config else DataConfig()
    prepared = inputs.prepare(
        flags.source,
        flags.driving,
        data,
        landmarker=flags.landmarker,
        face=flags.face,
        driving_face=flags.driving_face,
        align=flags.align,
        max_frames=flags.max_frames,
    )
    made = picture(prepared, data, columns=flags.columns)
    with files.whole(flags.output) as partial:
        iio.imwrite(partial, made, extension=flags.output.suffix.lower())
    print(f"wrote {flags.output}")


def picture(prepared: inputs.Inputs, data: DataConfig, *, columns: int) -> UInt8[np.ndarray, "H W 3"]:
    """The preview of one source and `columns` frames of its driver, three rows of squares."""
    count = len(prepared.landmarks)
    boxes = faces.regions(prepared.landmarks, margin=data.region_margin)
    best = faces.best_match(prepared.source_landmarks[None], prepared.landmarks)[1] if prepared.source_landmarks is not None else 0
    others = np.linspace(0, count - 1, min(columns, count) - 1).round().astype(int).tolist() if min(columns, count) > 1 else []
    shown = [best, *(number for number in others if number != best)]
    seen = {}
    for number, frame in enumerate(video.read_frames(prepared.driver)):
        if number in shown:
            seen[number] = frame
        if number >= max(shown):
            break

    whole = prepared.picture.shape
    own = None if prepared.source_landmarks is None else faces.regions(prepared.source_landmarks, margin=data.region_margin)
    marked = _marked(prepared.source, prepared.source_landmarks, own)
    strips = [
        [
            _titled(_whole(prepared.picture, prepared.crop, prepared.source_landmarks, own, prepared.size), f"source {whole[1]}x{whole[0]}"),
            _titled(marked, f"crop of {prepared.crop.side} pixels"),
            _titled(_fitted(prepared.source), f"into the model: {prepared.size}x{prepared.size}"),
        ]
    ]
    for number in shown:
        crop = faces.apply_crop(seen[number], prepared.driver_crop, prepared.size)
        landmarks, box = prepared.landmarks[number], boxes[number]
        time = f"frame {number} of {count}, {float(number / prepared.info.fps):.2f} s" + (", most alike" if number == best and own is not None else "")
        strips.append(
            [
                _titled(_whole(seen[number], prepared.driver_crop, landmarks, box, prepared.size), time),
                _titled(_marked(crop, landmarks, box), f"crop of {prepared.driver_crop.side} pixels"),
                _titled(_fitted(inputs.masked(crop, landmarks, data)), f"into the model: {prepared.size}x{prepared.size}"),
            ]
        )
    return np.concatenate([np.concatenate(strip, axis=0) for strip in strips], axis=1)


def _whole(
    frame: UInt8[np.ndarray, "H W 3"],
    crop: faces.Crop,
    landmarks: Float32[np.ndarray, "K 2"] | None,
    boxes: Float32[np.ndarray, "4 4"] | None,
    size: int,
) -> UInt8[np.ndarray, "h w 3"]:
    """The whole frame with the crop and what was found in it, as far as the crop reaches beyond the frame on grey."""
    left, top = max(-crop.x0, 0), max(-crop.y0, 0)
    right, bottom = max(crop.x0 + crop.side - frame.shape[1], 0), max(crop.y0 + crop.side - frame.shape[0], 0)
    canvas = np.pad(frame, ((top, bottom), (left, right), (0, 0)), constant_values=96)
    corner = np.array([crop.x0 + left, crop.y0 + top])
    scale = CELL / max(canvas.shape[:2])
    inside = lambda points: (corner + (points + 0.5) * (crop.side / size)) * scale - 0.5
    canvas = _fitted(canvas)
    x0, y0, x1, y1 = np.rint([*corner * scale, *(corner + crop.side) * scale - 1]).astype(int).tolist()
    cv2.rectangle(canvas, (x0, y0), (x1, y1), GREEN, 2)
    return _draw(canvas, landmarks, boxes, inside)


def _marked(crop: np.ndarray, landmarks: np.ndarray | None, boxes: np.ndarray | None) -> np.ndarray:
    """A crop with landmarks and regions."""
    return _draw(_fitted(crop), landmarks, boxes, lambda points: (points + 0.5) * (CELL / len(crop)) - 0.5)


def _draw(canvas: np.ndarray, landmarks: np.ndarray | None, boxes: np.ndarray | None, place: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    if landmarks is None or boxes is None:
        return canvas
    for corners in place(boxes.reshape(-1, 2, 2)):
        cv2.rectangle(canvas, *np.rint(corners).astype(int).tolist(), BLUE, 1)
    for x, y in place(landmarks):
        cv2.circle(canvas, (round(float(x)), round(float(y))), 1, YELLOW, -1)
    return canvas


def _fitted(image: np.ndarray) -> np.ndarray:
    """The whole image in a cell, at its own proportions, from the top left."""
    scale = CELL / max(image.shape[:2])
    size = max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1)
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    return np.pad(small, ((0, CELL - small.shape[0]), (0, CELL - small.shape[1]), (0, 0)), constant_values=32)


def _titled(cell: np.ndarray, text: str) -> np.ndarray:
    """A cell with a line above it."""
    band = np.full((26, CELL, 3), 32, np.uint8)
    cv2.putText(band, text, (6, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.45, WHITE, 1, cv2.LINE_AA)
    return np.concatenate([band, cell], axis=0)


if __name__ == "__main__":
    with cli.messages(ConfigError, video.MediaError):
        main(cli.parse(Flags(), sys.argv[1:], description=__doc__, prog="python -m svdp_jax.data.preview"))
