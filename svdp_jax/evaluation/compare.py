"""Generated videos beside what they are compared with: which belong together, and, frame by frame, how far apart they are.

    folders  ->  Pair of each video;  Pair  ->  figures, of which no more than a window's frames are held at a time

Figures are those that need no weights: mean absolute error, PSNR, SSIM, and temporal error of whole frames; error and PSNR of eyes, nose,
mouth and of what lies outside them, all pixels of a clip together; error and PSNR of each window, in order.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from svdp_jax.config import ConfigError
from svdp_jax.data import faces, video
from svdp_jax.data.detectors import Detector
from svdp_jax.evaluation import metrics
from svdp_jax.files import MediaError

BETWEEN = "--"  # of the names of source and driver in that of a video
PARTS = {"eyes": [0, 1], "nose": [2], "mouth": [3]}  # of the boxes of `faces.regions`
EXACT = 100.0  # dB that stand for a frame without any error
MARGIN = 0.06  # of the boxes, in sides of the face box


class Pair(NamedTuple):
    """A generated video and what it is compared with."""

    name: str
    generated: pathlib.Path
    reference: pathlib.Path

    @property
    def source(self) -> str:
        """The name of the picture that the video was made from, as `sample.py` puts it before the driver's; empty where it is not there."""
        ending = BETWEEN + self.reference.stem
        return self.generated.stem.removesuffix(ending) if self.generated.stem.endswith(ending) else ""


class Window(NamedTuple):
    """Frames of a pair from the same times."""

    generated: UInt8[np.ndarray, "N H W 3"]
    reference: UInt8[np.ndarray, "N H W 3"]
    generated_faces: list[Float32[np.ndarray, "K 2"] | None]  # landmarks; None where no face was found, or none looked for
    faces: list[Float32[np.ndarray, "K 2"] | None]  # of the reference


def pairs(generated: pathlib.Path, reference: pathlib.Path) -> list[Pair]:
    """Each video of the one folder with that of the other whose name is the same, or what stands behind a "--" of its own, the longest first, as `sample.py`
    names what it writes; videos that end in _concat are passed over. ConfigError, naming them, where some have none, or names are not told apart."""
    found = _videos(reference)
    mine = {name: path for name, path in _videos(generated).items() if not name.endswith("_concat")}
    if not mine:
        raise ConfigError(f"{generated} holds no video but those that end in _concat")
    matched = [(path, next((found[ending] for ending in _endings(name) if ending in found), None)) for name, path in mine.items()]
    if missing := [path.name for path, other in matched if other is None]:
        raise ConfigError(f"--reference {reference} has nothing for {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}: names have to be the same, or end in --NAME")
    return [Pair(path.stem, path, other) for path, other in matched if other]


def unused(found: list[Pair], reference: pathlib.Path) -> list[pathlib.Path]:
    """The references that no video is compared with."""
    used = {pair.reference for pair in found}
    return [path for path in _videos(reference).values() if path not in used]


def _endings(name: str) -> Iterator[str]:
    """The name, and what stands behind each "--" of it."""
    while name:
        yield name
        name = name.partition(BETWEEN)[2]


def _videos(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """By name, without its ending."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder of videos")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in video.ENDINGS and not path.name.startswith("."))
    if not paths:
        raise ConfigError(f"{folder} holds no video ({', '.join(video.ENDINGS)})")
    found = {path.stem: path for path in paths}
    if twice := [path.name for path in paths if found[path.stem] != path]:
        raise ConfigError(f"{folder}: {twice[0]} and {found[pathlib.Path(twice[0]).stem].name} have one name")
    return found


def windows(pair: Pair, *, size: int, looks: tuple[Detector | None, Detector | None] = (None, None)) -> Iterator[Window]:
    """Of `size` frames each, the last perhaps shorter; `looks` finds faces of generated frames and of the reference's. A reference of another size is brought
    to that of the generated frames. MediaError where one video ends before the other, or rates or shapes differ, or one cannot be read."""
    rates = [video.probe(path).fps for path in (pair.generated, pair.reference)]
    if abs(rates[0] - rates[1]) > Fraction(1, 100):
        raise MediaError(f"{pair.generated} has {float(rates[0]):g} frames a second, {pair.reference} {float(rates[1]):g}: their frames are of other times")
    frames = [video.read_frames(path) for path in (pair.generated, pair.reference)]
    follow, count = [faces.Tracker(patience=faces.LONGEST_GAP) for _ in frames], 0
    while True:
        parts = [[frame for _, frame in zip(range(size), one, strict=False)] for one in frames]
        if len(parts[0]) != len(parts[1]):
            short, long = sorted(zip(parts, pair[1:], strict=True), key=lambda one: len(one[0]))
            raise MediaError(f"{short[1]} ends after {count + len(short[0])} frames, {long[1]} goes on: they are compared frame by frame")
        if not parts[0]:
            return
        count += len(parts[0])
        mine, landmarks = ([one(look(frame)) if look else None for frame in part] for part, look, one in zip(parts, looks, follow, strict=True))
        generated, reference = (np.stack(part) for part in parts)
        tall, wide = generated.shape[1:3]
        if abs(reference.shape[2] * tall / reference.shape[1] - wide) > 2:  # odd sizes are made even
            shapes = [f"{frames.shape[2]}x{frames.shape[1]}" for frames in (generated, reference)]
            raise MediaError(f"{pair.generated} is {shapes[0]}, {pair.reference} {shapes[1]}: crop them alike")
        scale = np.array(generated.shape[2:0:-1]) / reference.shape[2:0:-1]
        landmarks = [None if face is None else ((face + 0.5) * scale - 0.5).astype(np.float32) for face in landmarks]
        yield Window(generated, _resized(reference, *generated.shape[1:3]), mine, landmarks)


def _resized(frames: UInt8[np.ndarray, "N H W 3"], height: int, width: int) -> UInt8[np.ndarray, "N height width 3"]:
    if frames.shape[1:3] == (height, width):
        return frames
    how = cv2.INTER_AREA if frames.shape[1] > height else cv2.INTER_CUBIC
    return np.stack([cv2.resize(frame, (width, height), interpolation=how) for frame in frames])


class Errors:
    """The figures of a pair, window by window: `add` each, then `figures`. `parts` says that faces were looked for."""

    def __init__(self, *, parts: bool) -> None:
        self.frames: dict[str, list[float]] = {"l1": [], "psnr": [], "ssim": []}
        self.of_windows: dict[str, list[float]] = {"l1": [], "psnr": []}
        self.changes = [0.0, 0]  # sum of temporal errors, pairs of frames
        self.parts = {name: np.zeros(3) for name in (*PARTS, "rest")} if parts else {}  # sums of absolute and of squared errors, pixels
        self.last: tuple[np.ndarray, np.ndarray] | None = None  # frames
        self.without_face = 0

    def add(self, window: Window) -> None:
        """The next frames of the pair."""
        output, truth = window.generated, window.reference
        error = metrics.error(output, truth)
        absolute, squared = error.mean(-1), np.square(error).mean(-1)  # of pixels
        found = {"l1": absolute.mean((1, 2)), "psnr": np.minimum(metrics.decibels(squared.mean((1, 2))), EXACT), "ssim": metrics.ssim(output, truth)}
        for name, values in found.items():
            self.frames[name] += values.tolist()
            if name in self.of_windows:
                self.of_windows[name].append(float(values.mean()))
        joined = [np.concatenate(pair) for pair in zip(self.last, (output, truth), strict=True)] if self.last else [output, truth]
        self.changes[0] += metrics.temporal_error(*joined) * (len(joined[0]) - 1)
        self.changes[1] += len(joined[0]) - 1
        self.last = output[-1:].copy(), truth[-1:].copy()
        if not self.parts:
            return
        seen = [number for number, face in enumerate(window.faces) if face is not None]
        self.without_face += len(output) - len(seen)
        if seen:
            boxes = faces.regions(np.stack([window.faces[number] for number in seen]), margin=MARGIN)
            inside = {name: faces.inside(truth[seen], boxes[:, places]) for name, places in PARTS.items()}
            for name, where in (inside | {"rest": ~np.any(list(inside.values()), axis=0)}).items():
                self.parts[name] += [*(values[seen].sum(where=where, dtype=np.float64) for values in (absolute, squared)), where.sum()]

    def figures(self) -> dict[str, Any]:
        """By name; lists are of windows. Parts are there where a face was found."""
        found: dict[str, Any] = {name: float(np.mean(values)) for name, values in self.frames.items()}
        found["temporal"] = self.changes[0] / self.changes[1] if self.changes[1] else 0.0
        for name, (absolute, squared, count) in self.parts.items():
            if count:
                found |= {f"l1_{name}": absolute / count, f"psnr_{name}": min(float(metrics.decibels(squared / count)), EXACT)}
        return found | ({"without_face": self.without_face} if self.parts else {}) | {"windows": self.of_windows}
