"""Which portrait is animated by which video: a folder of test videos becomes jobs for sample.py, by either protocol.

    python -m svdp_jax.evaluation.protocol --videos DIR --output EVAL --protocol self      # heads that are cropped already, with their sound
    python -m svdp_jax.evaluation.protocol --clips CLIPS --output EVAL --protocol cross    # of a data set that `svdp_jax.data.prepare` has made
    python sample.py --jobs EVAL/jobs.csv -o EVAL/generated --no-align --no-concat --checkpoint DIR
    python -m svdp_jax.evaluation --generated EVAL/generated --reference DIR --protocol self --report EVAL/report.html

self: the first frame of each video is animated by the video itself, which is then the truth. cross: by a video of somebody else; each portrait serves once, each video
once. Out: `sources/` (portraits), `jobs.csv`, and of a data set `references/` (its clips as videos, with their landmarks) and `clips.csv`, which says where each was cut.
"""

from __future__ import annotations

import argparse
import csv
import pathlib
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import imageio.v3 as iio
import numpy as np
from tqdm import tqdm

from svdp_jax import cli, files
from svdp_jax.config import ConfigError
from svdp_jax.data import clips as clips_lib
from svdp_jax.data import detectors, video


class Reference(NamedTuple):
    """A test video, and whose it is: those that were cut from one video show one person."""

    path: pathlib.Path
    person: str


def main() -> None:
    """The command line; see --help."""
    with cli.messages(ConfigError, video.MediaError):
        flags = parse()
        references = of_videos(flags.videos, flags.limit, flags.person) if flags.videos else of_clips(flags.clips, flags.split, flags.output, flags.limit)
        order = range(len(references)) if flags.protocol == "self" else others([reference.person for reference in references], flags.seed)
        write_jobs(flags.output, [(references[source].path, driver.path) for source, driver in zip(order, references, strict=True)])
        folder = flags.videos or flags.output / "references"
        print(f"{len(references)} jobs in {flags.output / 'jobs.csv'}; portraits in {flags.output / 'sources'}, reference videos in {folder}")


def of_videos(folder: pathlib.Path, limit: int | None, person: str | None = None) -> list[Reference]:
    """The videos of a folder, in the order of their names, each of whom the expression `person` finds at the beginning of its name, else somebody else.
    ConfigError where there is none, or nobody is found."""
    if not folder.is_dir():
        raise ConfigError(f"--videos {folder} is no folder")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in video.ENDINGS and not path.name.startswith("."))[:limit]
    if not found:
        raise ConfigError(f"--videos {folder} has no video ({', '.join(sorted(video.ENDINGS))})")
    people = [re.match(person, path.stem) if person else path.stem for path in found]
    if None in people:
        raise ConfigError(f"--person {person} finds nobody in the name of {found[people.index(None)].name}")
    return [Reference(path, who if isinstance(who, str) else who[0]) for path, who in zip(found, people, strict=True)]


def of_clips(directory: pathlib.Path, split: str, output: pathlib.Path, limit: int | None) -> list[Reference]:
    """The clips of a split, written as videos with their landmarks."""
    clips = clips_lib.open_clips(directory, split=split)
    folder, found = output / "references", []
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with files.whole(output / "clips.csv") as partial, partial.open("w", newline="") as table:
        rows = csv.writer(table)
        rows.writerow(("name", "id", "video", "start"))
        for number in tqdm(range(len(clips))[:limit], unit="clip", dynamic_ncols=True):
            clip = clips[number]
            path = folder / f"{split}{number:05d}.mp4"
            video.write_video(path, iter(clip.target), fps=Fraction(clip.fps).limit_denominator(1001), metadata={"comment": clip.id})
            detectors.write_landmarks(path.with_suffix(".npz"), clip.target_landmarks)
            rows.writerow((path.stem, clip.id, clip.video, f"{clip.start:.3f}"))
            found.append(Reference(path, clip.video or clip.id))
    return found


def others(people: Sequence[str], seed: int) -> list[int]:
    """For each the number of another, each once, drawn until nobody has their own video or one of the same person. ConfigError where that cannot be."""
    most = max(people.count(person) for person in set(people))
    if 2 * most > len(people):
        raise ConfigError(f"--protocol cross needs portraits of other people: {most} of {len(people)} videos show one person")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(people))
    while clashes := [place for place, number in enumerate(order) if people[number] == people[place]]:
        for place in clashes:
            other = int(rng.integers(len(people)))
            order[[place, other]] = order[[other, place]]
    return order.tolist()


def write_jobs(output: pathlib.Path, pairs: Sequence[tuple[pathlib.Path, pathlib.Path]]) -> None:
    """Portraits, each the first frame of a pair's first video, with its landmarks where there are some, and the list of jobs."""
    folder = output / "sources"
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with files.whole(output / "jobs.csv") as partial, partial.open("w", newline="") as table:
        rows = csv.writer(table)
        rows.writerow(("source", "driving"))
        for portrait, driver in pairs:
            source = folder / f"{portrait.stem}.png"
            iio.imwrite(source, next(video.read_frames(portrait)))
            landmarks = source.with_suffix(".npz")
            landmarks.unlink(missing_ok=True)  # of another run
            if (beside := portrait.with_suffix(".npz")).exists():
                detectors.write_landmarks(landmarks, detectors.read_landmarks(beside)[:1])
            rows.writerow((source, driver))


def parse() -> argparse.Namespace:
    parser = cli.ArgumentParser(prog="python -m svdp_jax.evaluation.protocol", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--videos", type=pathlib.Path, help="folder of test videos, cropped to the head")
    given.add_argument("--clips", type=pathlib.Path, help="data set that svdp_jax.data.prepare has made; it has no sound")
    parser.add_argument("--person", help="a regular expression for the beginning of a video's name that says who it is, as [^_]+ for PERSON_CLIP.mp4 (default: the whole name)")
    parser.add_argument("--split", default="validation", help="of the data set (default: %(default)s)")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder for what is written")
    parser.add_argument("--protocol", choices=["self", "cross"], required=True)
    parser.add_argument("--limit", type=int, help="so many videos, the first (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of who animates whom (default: %(default)s)")
    flags = parser.parse_args()
    try:
        re.compile(flags.person or "")
    except re.error as error:
        raise ConfigError(f"--person {flags.person} is no regular expression: {error}") from error
    if flags.limit is not None and flags.limit < 1:
        raise ConfigError(f"--limit {flags.limit} must be at least 1")
    return flags


if __name__ == "__main__":
    main()
