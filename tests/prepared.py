"""Videos to prepare, and what one straight run of prepare makes of them: for the tests of prepare. conftest.py has the two fixtures."""

import csv
import os
import pathlib
import shutil
from fractions import Fraction

import numpy as np
import pytest

from svdp_jax import cli
from svdp_jax.data import clips, detectors, prepare, synthetic, video

SIZE = 32
RULES = ["--rules.min-frames", "8", "--rules.max-frames", "20", "--rules.min-face", "20", "--rules.min-sharpness", "1"]


def person(number, frames):
    moves = synthetic.motion(synthetic.split_seed("train", number, "motion"), frames)
    return synthetic.render_clip(synthetic.identity(synthetic.split_seed("train", number, "identity")), moves, size=64)


def write(path, parts_of_it, *, fps=Fraction(25), gone=()):
    """A video of rendered people, one after the other, with landmarks beside it; `gone` frames show no face, they say."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rendered = [person(number, frames) for number, frames in parts_of_it]
    landmarks = np.concatenate([points for _, points in rendered])
    landmarks[list(gone)] = np.nan
    video.write_video(path, np.concatenate([frames for frames, _ in rendered]), fps=fps, metadata={})
    detectors.write_landmarks(path.with_suffix(".npz"), landmarks)
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    write(folder / "ann.mp4", [(0, 40)])
    write(folder / "deep" / "er" / "bob.mov", [(1, 30)])
    write(folder / "fifty.mp4", [(2, 50)], fps=Fraction(50))
    write(folder / "two people.mp4", [(3, 12), (4, 14)])
    write(folder / "hides.mp4", [(5, 40)], gone=range(12, 26))
    write(folder / "short.mp4", [(6, 5)])
    (folder / "junk.mp4").write_text("no video at all\n" * 99)
    (folder / "empty.mp4").touch()
    (folder / "notes.txt").write_text("of no interest")
    (folder / "._ann.mp4").write_text("what some systems leave behind")
    (folder / "again").symlink_to(folder / "deep")
    pathlib.Path(os.fsdecode(bytes(folder) + b"/caf\xe9.mp4")).write_text("of a name that is no text")
    whole = (folder / "ann.mp4").read_bytes()
    (folder / "cut off.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    shutil.copy(folder / "ann.npz", folder / "cut off.npz")
    write(folder / "few.mp4", [(7, 30)])
    detectors.write_landmarks(folder / "few.npz", np.load(folder / "few.npz")["landmarks"][:10])
    return folder


def run(output, *inputs, flags=()):
    """prepare in this process, the videos in two others."""
    given = ["--input", *map(str, inputs), "--output", str(output), "--size", str(SIZE), *RULES, "--workers", "2", *flags]
    prepare.main(cli.parse(prepare.Flags(), given, description="", prog=""))


@pytest.fixture(scope="module")
def straight(videos, tmp_path_factory):
    """The data set of one straight run."""
    output = tmp_path_factory.mktemp("straight") / "clips"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SVDP_FACE_LANDMARKER", raising=False)
        with pytest.warns(UserWarning, match="no landmarker given"):
            run(output, videos)
    return output


def rows(output):
    with (output / "report.csv").open() as file:
        return list(csv.DictReader(file))


def records(output):
    """Every shard, to the byte."""
    return {path.name: path.read_bytes() for path in sorted(output.glob("clips-*"))}


def all_clips(output):
    return {
        clip.id: clip
        for split in clips.splits(output)
        for clip in map(clips.open_clips(output, split=split).__getitem__, range(len(clips.open_clips(output, split=split))))
    }
