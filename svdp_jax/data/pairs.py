"""A driver for each clip, so that appearance cannot leak from it (SVDP, "Cross-identity training pairs").

    python -m svdp_jax.data.pairs --input CLIPS --output PAIRS --liveportrait CHECKOUT [--landmarker face_landmarker.task]
    python -m svdp_jax.data.pairs --input CLIPS --output PAIRS --augment

With --liveportrait the driver is another person of the same data set in the same motion, made by your LivePortrait. A pair counts
if eyes, nose and mouth are where the target's are; if not, someone else is tried. With --augment it is the clip itself in other
colours and light, which needs nothing and teaches less (`data.augment` says what it costs). A run that was cut off is continued by
the same command; machines that share PAIRS take --shard 0/n ... n-1/n.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
import pathlib
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import Annotated, NamedTuple

import numpy as np
import tyro

from svdp_jax import cli
from svdp_jax.config import ConfigError
from svdp_jax.data import augment, clips, detectors, faces, liveportrait, parts, report, video

NO_DRIVER = "no driver made"
DRAWS = 200  # clips among which other people are looked for


@dataclasses.dataclass(frozen=True)
class Flags:
    """What to pair, and how."""

    input: pathlib.Path | None = None
    """Data set of `data.prepare`."""
    output: pathlib.Path | None = None
    """Directory of the data set of pairs."""
    liveportrait: pathlib.Path | None = None
    """Your LivePortrait checkout, with its weights."""
    python: str = sys.executable
    """Python interpreter of LivePortrait's environment."""
    augment: bool = False
    """Change colour and light instead."""
    landmarker: pathlib.Path | None = None
    """MediaPipe's face_landmarker.task, that the clips were made with (default: $SVDP_FACE_LANDMARKER). A .npz beside LivePortrait's video comes first."""
    seed: int = 0
    """Of the choice of people, and of colours."""
    attempts: int = 3
    """People tried for a clip, until a pair counts."""
    tolerance: float = 0.04
    """How far apart eyes, nose and mouth of a pair may be, in sides of the face box ..."""
    agreement: float = 0.95
    """... in this share of the frames."""
    workers: int | None = None
    """Clips at a time (default: 1 with --liveportrait, which fills a GPU, else one per core)."""
    shard: Annotated[str, tyro.conf.arg(metavar="i/n")] = "0/1"
    """This machine's share of the clips: machine i of n, counted from 0."""

    def __post_init__(self):
        if self.attempts < 1 or (self.workers is not None and self.workers < 1):
            raise ConfigError(f"--attempts {self.attempts}, --workers {self.workers}: must be at least 1")
        if self.tolerance <= 0 or not 0 < self.agreement <= 1:
            raise ConfigError(f"--tolerance {self.tolerance} must be positive, --agreement {self.agreement} a share")


def main(flags: Flags) -> None:
    if not flags.input or not flags.output:
        raise ConfigError("pairs needs --input CLIPS and --output PAIRS; --help explains")
    if flags.augment == bool(flags.liveportrait):
        raise ConfigError("pairs needs either --liveportrait CHECKOUT or --augment")
    share, landmarker = parts.read_share(flags.shard), None
    if flags.liveportrait:
        flags = dataclasses.replace(flags, python=liveportrait.interpreter(flags.liveportrait, flags.python))
        landmarker = detectors.landmarker_for_any(flags.landmarker)
        if not landmarker:
            raise ConfigError("pairs --liveportrait needs --landmarker: without landmarks nobody sees whether a pair agrees")
        detectors.make_detector(landmarker)
    stored = {split: clips.open_clips(flags.input, split=split) for split in clips.splits(flags.input)}
    pieces = [f"{split}/{number}" for split in stored for number in range(len(stored[split]))]
    _check_first(flags.input, stored)
    settings = {name: getattr(flags, name) for name in ("augment", "seed", "attempts", "tolerance", "agreement")}
    if flags.liveportrait:
        settings |= {"landmarker": pathlib.Path(landmarker).name, "liveportrait": liveportrait.revision(flags.liveportrait)}
    work = parts.Parts(flags.output, "pairs", settings | {"data": clips.fingerprint(flags.input)}, pieces)
    if work.finished():
        print(f"{flags.output} is complete: see {flags.output / 'report.html'}")
        return

    jobs = [_Job(work.folder, number, pieces[number], landmarker, flags) for number in work.missing(share)]
    processes = flags.workers or (1 if flags.liveportrait else len(os.sched_getaffinity(0)))
    title = f"{flags.output.resolve().name}: pairs of {len(pieces)} clips"
    by_split = {split: [number for number, piece in enumerate(pieces) if piece.startswith(f"{split}/")] for split in stored}
    with cli.interrupted("the same command continues"):
        parts.work_through(work, jobs, _pair, share=share, processes=processes, sizes=[1] * len(pieces), unit="clip")
        made = parts.finish(work, share=share, title=title, what="clips", splits=lambda: by_split)
    if made:
        lengths, rows = made
        counts = report.summary(rows)
        told = ", ".join(f"{count} {split} pairs" for split, count in lengths.items())
        print(f"{flags.output}: {told}; {len(rows) - counts['kept']} clips without one")
        if flags.liveportrait:
            drivers, rejected, failed = (sum(row.get(name, 0) for row in rows) for name in ("made", "rejected", "failed"))
            told = f"{rejected} ({rejected / max(drivers, 1):.0%}) were rejected: their regions are not where the target's are"
            print(f"LivePortrait made {drivers} drivers, of which {told}; it failed {failed} times")
        for split in set(stored) - set(lengths):
            warnings.warn(f"no clip of the split {split!r} has a pair; train.py needs `train` and `validation`", stacklevel=1)
        print(f"see {flags.output / 'report.html'}; next: python train.py --data.path {flags.output} ...")


def _check_first(data: pathlib.Path, stored: dict[str, clips.Clips]) -> None:
    """ConfigError where the clips have drivers already: most often the first one shows it."""
    for records in stored.values():
        with contextlib.suppress(video.MediaError):
            if records.stored(0).has_driver:
                raise ConfigError(f"--input {data}: its clips have drivers already; give a data set of `data.prepare`")


# ----------------------------------------------------------------------------------------------------------- of one clip


class _Job(NamedTuple):
    """A clip, and all that a worker process needs to know."""

    folder: pathlib.Path  # of the parts
    number: int
    name: str  # SPLIT/NUMBER
    landmarker: str | None
    flags: Flags


_landmarker = functools.cache(detectors.make_detector)  # one in each process
_open = functools.cache(clips.open_clips)


def _pair(job: _Job) -> list[report.Row] | parts.Failure:
    """Writes the part of one clip and returns its rows; where LivePortrait has made nothing, it may be LivePortrait that is broken."""
    row, record = _row_and_record(job)
    return parts.Failure(row) if row["dropped"] == NO_DRIVER else parts.write_part(job.folder, job.number, [(row, record)])


def _row_and_record(job: _Job) -> tuple[report.Row, bytes | None]:
    flags, (split, number) = job.flags, job.name.split("/")
    row = {"name": job.name, "dropped": "", "note": "", "thumbnail": ""}
    records = _open(flags.input, split=split)
    try:
        clip, mp4 = records[int(number)], records.stored(int(number)).target.mp4
    except video.MediaError as error:
        return row | {"dropped": "cannot be read", "note": str(error)}, None
    row["name"] = f"{split}/{clip.id}"
    rng = _generator(flags.seed, clip.id)
    if flags.augment:
        clip = clip._replace(driver=augment.recolour(clip.target, rng), driver_landmarks=clip.target_landmarks)
        return row | {"thumbnail": _thumbnail(clip)}, clips.serialize(clip, target=mp4)

    failures, rejected = [], 0
    for other in itertools.islice(_others(flags.input, split, clip, rng), flags.attempts):
        try:
            driver, landmarks = _drive(clip, other, job)
        except liveportrait.Failed as error:
            failures.append(str(error))
            continue
        distance = liveportrait.apart(clip.target_landmarks, landmarks)
        row["person"] = other.id
        row["apart"], row["agree"] = round(float(np.median(distance)), 4), round(float((distance <= flags.tolerance).mean()), 3)
        made = clip._replace(driver=driver, driver_landmarks=landmarks)
        row["thumbnail"] = _thumbnail(made)
        if row["agree"] >= flags.agreement:
            return row | {"made": rejected + 1, "rejected": rejected, "failed": len(failures)}, clips.serialize(made, target=mp4)
        rejected += 1
    reason = "regions apart" if rejected else NO_DRIVER if failures else "nobody else"
    row |= {"dropped": reason, "note": "; ".join(dict.fromkeys(failures)), "made": rejected, "rejected": rejected, "failed": len(failures)}
    return row, None


def _others(data: pathlib.Path, split: str, clip: clips.Clip, rng: np.random.Generator) -> Iterator[clips.Clip]:
    """Clips of other videos, no video twice, in an order drawn from `rng`; those of other splits come last, for a split may show one person alone.

    DRAWS clips of a split are looked at: in each lies a whole video, and it is read for its name.
    """
    seen = {clip.video}
    for own in sorted(clips.splits(data), key=lambda name: name != split):
        stored = _open(data, split=own)
        for number in rng.permutation(len(stored))[:DRAWS].tolist():
            with contextlib.suppress(video.MediaError):
                other = stored.stored(number)
                if other.video not in seen:
                    seen.add(other.video)
                    yield other


def _drive(clip: clips.Clip, other: clips.Clip, job: _Job) -> tuple[np.ndarray, np.ndarray]:
    """Frames and landmarks of the other person in the clip's motion. Failed where there is none, or no face to be found in it."""
    flags = job.flags
    job.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=job.folder, ignore_cleanup_errors=True) as folder:  # which goes with the parts, if this process is killed
        try:
            picture = liveportrait.pose_like(other, clip.target_landmarks, size=clip.target.shape[1])
            driver, made = liveportrait.animate(picture, clip, checkout=flags.liveportrait, python=flags.python, folder=pathlib.Path(folder))
            beside = made.with_suffix(".npz")
            detector = detectors.make_detector(beside) if beside.is_file() else _landmarker(job.landmarker)
            landmarks = faces.track(driver, detector, fps=clip.fps, name="what LivePortrait made")
        except video.MediaError as error:
            raise liveportrait.Failed(str(error)) from error
    if landmarks.shape != clip.target_landmarks.shape:
        counts = f"{clip.target_landmarks.shape[1]} landmarks, those of --landmarker {landmarks.shape[1]}"
        raise ConfigError(f"--input {flags.input}: its clips have {counts}; give the landmarker they were made with")
    return driver, landmarks


def _generator(seed: int, name: str) -> np.random.Generator:
    """Of one clip's randomness, whatever the order of the work."""
    return np.random.default_rng([seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")])


def _thumbnail(pair: clips.Clip) -> str:
    """Target and driver side by side, at the beginning and in the middle."""
    return report.thumbnail([part[time] for time in (0, len(pair.target) // 2) for part in (pair.target, pair.driver)])


if __name__ == "__main__":
    with cli.messages(ConfigError, video.MediaError):
        main(cli.parse(Flags(), sys.argv[1:], description=__doc__, prog="python -m svdp_jax.data.pairs"))
