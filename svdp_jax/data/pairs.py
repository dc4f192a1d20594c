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
from collections.abc import Iterator
from typing import Annotated, NamedTuple

import numpy as np
import tyro

from svdp_jax import cli
from svdp_jax.config import ConfigError
from svdp_jax.data import augment, clips, detectors, faces, liveportrait, parts, report, video


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
    if flags.liveportrait:
        liveportrait.check(flags.liveportrait)
        if not detectors.has_landmarker(flags.landmarker):
            raise ConfigError("pairs --liveportrait needs --landmarker: without landmarks nobody sees whether a pair agrees")
        detectors.make_detector(flags.landmarker)
    share = parts.read_share(flags.shard)
    stored = {split: clips.open_clips(flags.input, split=split) for split in clips.splits(flags.input)}
    pieces = [f"{split}/{number}" for split in stored for number in range(len(stored[split]))]
    settings = {name: getattr(flags, name) for name in ("augment", "seed", "attempts", "tolerance", "agreement")}
    work = parts.Parts(flags.output, "pairs", settings | {"input": flags.input.resolve().name}, pieces)
    if work.finished():
        print(f"{flags.output} is complete: see {flags.output / 'report.html'}")
        return

    jobs = [_Job(work.folder, number, pieces[number], flags) for number in work.missing(share)]
    count = flags.workers or (1 if flags.liveportrait else os.cpu_count() or 1)
    parts.work_through(work, jobs, _pair, share=share, workers_count=count, sizes=[1] * len(pieces), unit="clip")
    by_split = {split: [number for number, piece in enumerate(pieces) if piece.startswith(f"{split}/")] for split in stored}
    made = parts.finish(work, share=share, title=f"{flags.output.resolve().name}: pairs of {len(pieces)} clips", splits=lambda: by_split)
    if made:
        lengths, rows = made
        counts = report.summary(rows)
        told = ", ".join(f"{count} {split} pairs" for split, count in lengths.items())
        print(f"{flags.output}: {told}; {len(rows) - counts['kept']} clips without one")
        if flags.liveportrait:
            drivers, rejected, failed = (sum(row.get(name, 0) for row in rows) for name in ("made", "rejected", "failed"))
            share = f"{rejected} ({rejected / max(drivers, 1):.0%}) were rejected: their regions are not where the target's are"
            print(f"LivePortrait made {drivers} drivers, of which {share}; it failed {failed} times")
        print(f"see {flags.output / 'report.html'}; next: python train.py --data.path {flags.output} ...")


# ----------------------------------------------------------------------------------------------------------- of one clip


class _Job(NamedTuple):
    """A clip, and all that a worker process needs to know."""

    folder: pathlib.Path  # of the parts
    number: int
    name: str  # SPLIT/NUMBER
    flags: Flags


_landmarker = functools.cache(detectors.make_detector)  # one in each process
_open = functools.cache(clips.open_clips)


def _pair(job: _Job) -> list[parts.Row]:
    """Writes the part of one clip and returns its rows."""
    split, number = job.name.split("/")
    return parts.write_part(job.folder, job.number, [_row_and_record(job.flags, split, int(number))])


def _row_and_record(flags: Flags, split: str, number: int) -> tuple[parts.Row, bytes | None]:
    row = {"name": f"{split}/{number}", "dropped": "", "note": "", "thumbnail": ""}
    try:
        clip = _open(flags.input, split=split)[number]
    except video.MediaError as error:
        return row | {"dropped": "cannot be read", "note": str(error)}, None
    row["name"] = f"{split}/{clip.id}"
    if clip.has_driver:
        raise ConfigError(f"--input {flags.input}: {clip.id} has a driver already; give a data set of `data.prepare`")
    rng = _generator(flags.seed, clip.id)
    if flags.augment:
        clip = clip._replace(driver=augment.recolour(clip.target, rng), driver_landmarks=clip.target_landmarks)
        return row | {"thumbnail": _thumbnail(clip)}, clips.serialize(clip)

    failures, rejected, driver = [], 0, None
    for other in itertools.islice(_others(flags.input, split, clip, rng), flags.attempts):
        row["person"] = other.id
        try:
            driver, landmarks = _drive(clip, other, flags)
        except liveportrait.Failed as error:
            failures.append(str(error))
            continue
        distance = liveportrait.apart(clip.target_landmarks, landmarks)
        row["apart"], row["agree"] = round(float(np.median(distance)), 4), round(float((distance <= flags.tolerance).mean()), 3)
        made = clip._replace(driver=driver, driver_landmarks=landmarks)
        row["thumbnail"] = _thumbnail(made)
        if row["agree"] >= flags.agreement:
            return row | {"made": rejected + 1, "rejected": rejected, "failed": len(failures)}, clips.serialize(made)
        rejected += 1
    reason = "regions apart" if rejected else "no driver made" if failures else "nobody else"
    row |= {"dropped": reason, "note": "; ".join(dict.fromkeys(failures)), "made": rejected, "rejected": rejected, "failed": len(failures)}
    return row, None


def _others(data: pathlib.Path, split: str, clip: clips.Clip, rng: np.random.Generator) -> Iterator[clips.Clip]:
    """Clips of other videos, no video twice, in an order drawn from `rng`; those of other splits come last, for a split may show one person alone."""
    seen = {clip.video}
    for own in sorted(clips.splits(data), key=lambda name: name != split):
        stored = _open(data, split=own)
        for number in rng.permutation(len(stored)).tolist():
            with contextlib.suppress(video.MediaError):
                other = stored.stored(number)
                if other.video not in seen:
                    seen.add(other.video)
                    yield other


def _drive(clip: clips.Clip, other: clips.Clip, flags: Flags) -> tuple[np.ndarray, np.ndarray]:
    """Frames and landmarks of the other person in the clip's motion. Failed where there is none, or no face to be found in it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            picture = liveportrait.pose_like(other, clip.target_landmarks, size=clip.target.shape[1])
            driver, made = liveportrait.animate(picture, clip, checkout=flags.liveportrait, python=flags.python, folder=pathlib.Path(folder))
            beside = made.with_suffix(".npz")
            detector = detectors.make_detector(beside) if beside.is_file() else _landmarker(flags.landmarker)
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
