"""Folders of videos to a data set of clips: one face, one shot and one crop each.

    python -m svdp_jax.data.prepare --input VIDEOS --output DIR [--landmarker face_landmarker.task] [--shard i/n]

Each video is decoded twice: once to find cuts and to follow the largest face, once to cut out what the rules keep. Clips have no
driver yet; `python -m svdp_jax.data.pairs` gives them one. report.html and report.csv in DIR say what was kept and dropped, and why.
A run that was cut off is continued by the same command, and several machines that share DIR take --shard 0/n ... n-1/n; the
last one puts the data set together. No file stops a run: what cannot be read is in the report.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import hashlib
import os
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Annotated, NamedTuple

import numpy as np
import tyro

from svdp_jax import cli
from svdp_jax.config import ConfigError, DataConfig
from svdp_jax.data import clips, detectors, faces, inputs, parts, report, shots, video, workers

PAPER = DataConfig()


@dataclasses.dataclass(frozen=True)
class Flags:
    """What to make clips of, and which to keep."""

    input: tuple[pathlib.Path, ...] = ()
    """Folders with videos, at any depth, or videos."""
    output: pathlib.Path | None = None
    """Directory of the data set."""
    landmarker: pathlib.Path | None = None
    """MediaPipe's face_landmarker.task (default: $SVDP_FACE_LANDMARKER, else a simple detector that sees no expression). A .npz beside a video comes first."""
    size: int = PAPER.size
    """Pixels, height and width of a clip."""
    fps: float = PAPER.fps
    """Frames per second of the clips, whatever the videos have."""
    face_scale: float = PAPER.face_scale
    """Side of the crop, in sides of the face box."""
    rules: shots.Rules = shots.Rules()
    validation: float = 0.02
    """Share of the clips that go into the split `validation`, by whole videos: none is in both."""
    workers: int = len(os.sched_getaffinity(0))
    """Processes; each reads one video at a time."""
    shard: Annotated[str, tyro.conf.arg(metavar="i/n")] = "0/1"
    """This machine's share of the videos: machine i of n, counted from 0."""

    def __post_init__(self):
        if self.size < 16 or self.size % 2:
            raise ConfigError(f"--size {self.size} must be even, and at least 16")
        if not 0 < self.fps <= 240:
            raise ConfigError(f"--fps {self.fps} must be more than 0, and at most 240")
        if not 0 <= self.validation < 1:
            raise ConfigError(f"--validation {self.validation} must be a share, at least 0 and less than 1")
        if self.workers < 1:
            raise ConfigError(f"--workers {self.workers} must be at least 1")


def main(flags: Flags) -> None:
    if not flags.input or not flags.output:
        raise ConfigError("prepare needs --input FOLDER and --output DIR; --help explains")
    share = parts.read_share(flags.shard)
    videos = find_videos(flags.input)
    landmarker = detectors.landmarker_for_any(flags.landmarker)
    if not landmarker:
        warnings.warn(f"{detectors.NO_LANDMARKER}; a .npz beside a video is used all the same", stacklevel=1)
    detectors.make_detector(landmarker)  # what is wrong with it is said now
    points = landmarks_per_face(landmarker, videos.values())
    settings = {"size": flags.size, "fps": flags.fps, "face_scale": flags.face_scale, "validation": flags.validation}
    settings |= {f"rules.{name}": value for name, value in dataclasses.asdict(flags.rules).items()}
    settings |= {"landmarker": pathlib.Path(landmarker).name if landmarker else None, "points": points}
    work = parts.Parts(flags.output, "prepare", settings, list(videos))
    if work.finished():
        print(f"{flags.output} is complete: see {flags.output / 'report.html'}")
        return

    names = list(videos)
    jobs = [_Job(work.folder, number, names[number], videos[names[number]], landmarker, points, flags) for number in work.missing(share)]
    sizes = [path.stat().st_size for path in videos.values()]
    title = f"{flags.output.resolve().name}: clips of {len(names)} videos"
    with cli.interrupted("the same command continues"):
        parts.work_through(work, jobs, _prepare_video, share=share, processes=flags.workers, sizes=sizes, unit="B")
        made = parts.finish(work, share=share, title=title, what="videos", splits=lambda: split_by_video(work, share=flags.validation))
    if made:
        lengths, rows = made
        lost = ", ".join(f"{count} {reason}" for reason, count in report.summary(rows).items() if reason != "kept")
        print(f"{flags.output}: " + ", ".join(f"{count} {split} clips" for split, count in lengths.items()) + (f"; dropped: {lost}" if lost else ""))
        if "validation" not in lengths:
            warnings.warn("no split `validation`, of which train.py shows samples: all clips are of one video, or --validation is 0", stacklevel=1)
        print(f"see {flags.output / 'report.html'}; next: python -m svdp_jax.data.pairs --input {flags.output} --output PAIRS")


def find_videos(folders: Sequence[pathlib.Path]) -> dict[str, pathlib.Path]:
    """Name -> path of every video in `folders`, sorted. A name is the path from the folder, or, of several, from what they have in common."""
    for folder in folders:
        if not folder.exists():
            raise ConfigError(f"--input {folder} does not exist")
    folders = [pathlib.Path(os.path.abspath(folder)) for folder in folders]
    found: dict[pathlib.Path, pathlib.Path] = {}  # the file itself -> where it was found, for it may be found by two ways
    for folder in folders:
        for path in _files(folder) if folder.is_dir() else [folder]:
            if path.is_file() and (path == folder or path.suffix.lower() in video.ENDINGS and not path.name.startswith(".")):
                found.setdefault(path.resolve(), path)
    if not found:
        raise ConfigError(f"--input {' '.join(map(str, folders))} holds no video ({', '.join(video.ENDINGS)})")
    common = os.path.commonpath([folder if folder.is_dir() else folder.parent for folder in folders])
    # Names that no text can hold are written as if they were quoted.
    names = {os.fsencode(os.path.relpath(path, common)).decode("utf-8", "backslashreplace"): path for path in found.values()}
    return dict(sorted(names.items()))


def _files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """All files below, through links too, each folder once, if it can be by its own name."""
    seen = set()
    unreadable = lambda error: warnings.warn(f"{error.filename}: cannot be looked into ({error.strerror}); what is in there is left out", stacklevel=1)
    for place, subfolders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        real = os.path.realpath(place)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "$", "@"))]  # waste bins, and what systems keep for themselves
        subfolders.sort(key=lambda name: (os.path.islink(os.path.join(place, name)), name))
        yield from (pathlib.Path(place, name) for name in sorted(names))


def landmarks_per_face(landmarker: str | None, videos: Iterable[pathlib.Path]) -> int:
    """How many every clip has: MediaPipe's 478 if there is a landmarker, else as many as in the first .npz beside a video, else the cascade's 68."""
    if landmarker:
        return detectors.COUNTS[1]
    for path in videos:
        if (beside := path.with_suffix(".npz")).is_file():
            with contextlib.suppress(video.MediaError):
                return detectors.read_landmarks(beside).shape[1]
    return detectors.COUNTS[0]


def split_by_video(work: parts.Parts, *, share: float) -> dict[str, list[int]]:
    """Videos of each split: those for validation in an order that only their names decide, until they hold `share` of the clips."""
    clips_of = {number: count for number in range(len(work.pieces)) if (count := len(work.sizes(number)))}
    wanted, held, validation = share * sum(clips_of.values()), 0, set()
    for number in sorted(clips_of, key=lambda number: hashlib.sha256(work.pieces[number].encode()).digest()):
        if held >= wanted or len(validation) + 1 >= len(clips_of):
            break
        validation.add(number)
        held += clips_of[number]
    return {"train": [number for number in clips_of if number not in validation], "validation": [number for number in clips_of if number in validation]}


# ---------------------------------------------------------------------------------------------------------- of one video


class _Job(NamedTuple):
    """A video, and all that a worker process needs to know."""

    folder: pathlib.Path  # of the parts
    number: int
    name: str
    path: pathlib.Path
    landmarker: str | None
    points: int  # landmarks per face
    flags: Flags


class _Unusual(Exception):
    """What reading a video has raised that may be no fault of the video."""


def _prepare_video(job: _Job) -> list[report.Row] | parts.Failure:
    """Writes the part of one video and returns its rows."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        try:
            return parts.write_part(job.folder, job.number, _rows_and_records(job, said))
        except _Unusual as error:
            return parts.Failure(_row(job.name, "cannot be read", note=str(error)))


def _rows_and_records(job: _Job, said: list[warnings.WarningMessage]) -> Iterator[tuple[report.Row, bytes | None]]:
    rate = Fraction(job.flags.fps).limit_denominator(1001)
    try:
        with workers.watchdog() as alive:
            info = video.probe(job.path)
            frames = lambda: video.at_rate(_telling(video.read_frames(job.path), alive), fps=info.fps, rate=rate)
            found = list(shots.candidates(frames(), _detector(job, info, rate), job.flags.rules))
            notes = "; ".join(dict.fromkeys(str(warning.message) for warning in said if str(warning.message) != detectors.NO_LANDMARKER))
            crops = [_crop(candidate, info, job.flags) for candidate in found]
            for candidate, crop, pictures in _with_pictures(found, crops, frames(), job.flags.size):
                yield _row_and_record(job, candidate, crop, pictures, rate, note=notes if candidate is found[0] else "")
        if not found:
            yield _row(job.name, "too short", note=notes), None
    except video.MediaError as error:
        if not job.path.exists():
            raise _Unusual(str(error)) from error
        yield _row(job.name, "cannot be read", note=str(error)), None
    except Exception as error:  # whatever a file can do to a library, the others are not to wait
        raise _Unusual(f"{type(error).__name__}: {error}") from error


def _telling(frames: Iterator[np.ndarray], alive: Callable[[], None]) -> Iterator[np.ndarray]:
    for frame in frames:
        alive()
        yield frame


_landmarker = functools.cache(detectors.make_detector)  # one in each process


def _detector(job: _Job, info: video.VideoInfo, rate: Fraction) -> detectors.Detector:
    """For the frames of the video as they are seen at `rate`."""
    beside = job.path.with_suffix(".npz")
    if beside.is_file():
        owners = [path.name for path in job.path.parent.glob(f"{glob.escape(job.path.stem)}.*") if path.suffix.lower() in video.ENDINGS]
        if len(owners) > 1:
            raise video.MediaError(f"landmarks {beside}: of {' or of '.join(sorted(owners))}? give the videos different names")
        if not info.even:
            raise video.MediaError(detectors.UNEVEN.format(job.path, beside.name))
        landmarks = detectors.read_landmarks(beside, frames=info.frames)
        if landmarks.shape[1] != job.points:
            raise video.MediaError(
                f"landmarks {beside}: {landmarks.shape[1]} per face, and all clips must have {job.points}, as the landmarker or the first .npz"
            )
        return detectors.precomputed_detector(np.stack(list(video.at_rate(landmarks, fps=info.fps, rate=rate))))
    if not job.landmarker and job.points != detectors.COUNTS[0]:
        raise video.MediaError(f"{job.path}: has no {beside.name} beside it, as others have, and there is no --landmarker")
    return _landmarker(job.landmarker)


def _crop(candidate: shots.Candidate, info: video.VideoInfo, flags: Flags) -> faces.Crop:
    if candidate.landmarks is None:
        return inputs.middle_square(info.width, info.height)
    return faces.driving_crop(candidate.landmarks, scale=flags.face_scale, within=(info.width, info.height))


def _with_pictures(
    found: Sequence[shots.Candidate], crops: Sequence[faces.Crop], frames: Iterator[np.ndarray], size: int
) -> Iterator[tuple[shots.Candidate, faces.Crop, list[np.ndarray]]]:
    """Each candidate with its crop and its cropped frames; of one that is dropped three, as small as the report shows them."""
    numbered = enumerate(frames)
    for candidate, crop in zip(found, crops, strict=True):
        start, stop = candidate.start, candidate.stop
        wanted = {start, (start + stop) // 2, stop - 1} if candidate.dropped else range(start, stop)
        pictures = []
        for number, frame in numbered:
            if number in wanted:
                pictures.append(faces.apply_crop(frame, crop, report.THUMBNAIL if candidate.dropped else size))
            if number == stop - 1:
                break
        yield candidate, crop, pictures


def _row_and_record(
    job: _Job, candidate: shots.Candidate, crop: faces.Crop, pictures: list[np.ndarray], rate: Fraction, *, note: str
) -> tuple[report.Row, bytes | None]:
    name, start = f"{job.name}#{candidate.start:06d}", float(candidate.start / rate)
    measured = {"face_pixels": round(candidate.face), "step": round(candidate.step, 3), "sharpness": round(candidate.sharpness, 1)}
    row = _row(
        name,
        candidate.dropped,
        note=note,
        start=round(start, 3),
        seconds=round(float((candidate.stop - candidate.start) / rate), 3),
        frames=candidate.stop - candidate.start,
        **(measured if candidate.landmarks is not None else {}),
        thumbnail=report.thumbnail([pictures[i] for i in sorted({0, len(pictures) // 2, len(pictures) - 1})] if pictures else []),
    )
    if candidate.dropped:
        return row, None
    target = np.stack(pictures)
    landmarks = faces.crop_landmarks(candidate.landmarks, crop, job.flags.size)
    clip = clips.Clip(name, float(rate), target, target[:0], landmarks, landmarks[:0], video=job.name, start=start)
    return row, clips.serialize(clip)


def _row(name: str, dropped: str, *, note: str = "", thumbnail: str = "", **measured: float) -> report.Row:
    return {"name": name, "dropped": dropped, **measured, "note": note, "thumbnail": thumbnail}


if __name__ == "__main__":
    with cli.messages(ConfigError, video.MediaError):
        main(cli.parse(Flags(), sys.argv[1:], description=__doc__, prog="python -m svdp_jax.data.prepare"))
