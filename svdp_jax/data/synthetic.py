"""Rendered portraits: people who do not exist, drawn as polygons. Any motion can be put on any identity, so pairs are exact.

In: seeds. Out: frames uint8[F, size, size, 3] (RGB), and the 68 iBUG landmarks float32[F, 68, 2] in pixels, which are points of the
drawn geometry, not estimates. `pair` renders two identities under one motion; run as a program, the module writes a dataset of pairs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import pathlib
import signal
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from jaxtyping import Float32, UInt8
from tqdm import tqdm

from svdp_jax import cli
from svdp_jax.config import ConfigError
from svdp_jax.data import augment, clips, parts
from svdp_jax.data.drawing import HAIRSTYLES, STYLES, TRAINED, Identity, Motion, portrait
from svdp_jax.data.polygons import rasterise
from svdp_jax.files import MediaError

Split = Literal["train", "validation", "test"]

PAIRS_PER_SHARD = 25
SEED_STRIDE = 2**20  # pairs between the first ones of two seeds

SKIN = ((255, 222, 198), (247, 203, 170), (233, 180, 140), (212, 152, 112), (172, 116, 82), (130, 86, 62))
HAIR = ((44, 34, 40), (86, 56, 44), (140, 88, 52), (222, 174, 100), (196, 88, 50), (158, 158, 172), (122, 64, 108), (52, 72, 118))
IRIS = ((70, 130, 190), (86, 150, 96), (120, 74, 40), (150, 106, 44), (92, 96, 120))
CLOTHES = ((32, 128, 132), (232, 100, 86), (232, 172, 62), (52, 70, 128), (124, 66, 116), (58, 116, 84), (242, 234, 222), (66, 68, 80))
BACKDROP = (
    ((255, 222, 196), (248, 170, 146)),
    ((200, 232, 244), (128, 188, 222)),
    ((218, 240, 208), (146, 202, 168)),
    ((230, 220, 248), (176, 156, 220)),
    ((255, 240, 190), (250, 204, 118)),
    ((250, 220, 230), (228, 156, 184)),
    ((212, 220, 230), (146, 162, 186)),
    ((84, 116, 156), (38, 56, 90)),
)


def split_seed(split: str, index: int, kind: str) -> int:
    """The seed of the `index`-th identity or motion of a split. No seed belongs to two splits or kinds. ValueError where there is none such."""
    splits, kinds = ("train", "validation", "test"), ("identity", "motion")
    if split not in splits or kind not in kinds:
        raise ValueError(f"split={split!r}, kind={kind!r}: use one of {splits} and one of {kinds}")
    if not 0 <= index < 2**40:
        raise ValueError(f"index={index} must be at least 0 and less than 2**40")
    return (splits.index(split) * len(kinds) + kinds.index(kind)) * 2**40 + index


def identity(seed: int) -> Identity:
    """A person, drawn from a few palettes and styles; the proportions of the face vary by at most 8%."""
    rng = np.random.default_rng([seed, 1])

    def pick(palette):
        return palette[rng.integers(len(palette))]

    def factor(spread):
        return float(rng.uniform(1 - spread, 1 + spread))

    def shade(palette):
        return tuple(float(c) for c in np.clip(np.array(pick(palette)) * factor(0.06), 0, 255))

    hairstyle = pick(HAIRSTYLES)
    return Identity(
        drawing=pick(TRAINED),
        hairstyle=hairstyle,
        glasses=bool(rng.random() < 0.2),
        beard=bool(rng.random() < (0.45 if hairstyle == "short" else 0.06)),
        skin=shade(SKIN),
        hair=shade(HAIR),
        iris=shade(IRIS),
        clothes=shade(CLOTHES),
        backdrop=pick(BACKDROP),
        face_width=factor(0.06),
        jaw=float(rng.uniform(0.08, 0.25)),
        eye_size=factor(0.05),
        eye_distance=factor(0.04),
        nose_size=factor(0.08),
        mouth_size=factor(0.08),
        brow_size=factor(0.3),
        lip_red=float(rng.uniform(0.25, 0.85)),
    )


def motion(seed: int, frames: int, *, fps: float = 25.0) -> Motion:
    """A smooth, lively motion: a function of time, so that more frames of the same seed begin with the same ones."""
    rng = np.random.default_rng([seed, 2])
    t = np.arange(frames) / fps

    def wander(low, high, gain=1.0):
        """Three sinusoids of low..high hertz, bounded by -1..1."""
        frequency, phase, amplitude = rng.uniform(low, high, 3), rng.uniform(0, 2 * np.pi, 3), rng.uniform(0.5, 1.0, 3)
        return np.tanh(gain * amplitude @ np.sin(2 * np.pi * frequency[:, None] * t + phase[:, None]))

    x, y, roll, yaw, pitch = (limit * wander(0.25, 0.6, 0.5) for limit in (0.09, 0.06, *np.radians([12, 25, 15])))
    gaze_x, gaze_y = wander(0.3, 0.9), wander(0.3, 0.9)
    brow, mouth_width, smile = wander(0.3, 0.8, 0.8), wander(0.4, 1.0, 0.8), wander(0.2, 0.5)
    mouth_open = 0.5 + 0.5 * np.tanh(1.7 * np.sin(2 * np.pi * (rng.uniform(1.5, 2.0) * t + rng.random()) + 0.9 * wander(0.3, 0.8)) - 0.2)
    blink, at = np.zeros(frames), rng.uniform(0, 2)
    while at < frames / fps:
        blink = np.maximum(blink, np.cos(np.pi / 2 * np.clip((t - at) / 0.12, -1, 1)) ** 2)  # 0.24 s
        at += rng.uniform(1.4, 2.6)
    fields = x, y, roll, yaw, pitch, gaze_x, gaze_y, blink, brow, (mouth_open - 0.02).clip(0), mouth_width, smile
    return Motion(*(np.asarray(field, np.float32) for field in fields))


def render_clip(
    person: Identity,
    motion: Motion,
    *,
    size: int,
) -> tuple[UInt8[np.ndarray, "F {size} {size} 3"], Float32[np.ndarray, "F 68 2"]]:
    """RGB frames of `person` in `motion`, and their landmarks in pixels (pixel centres at integers)."""
    if size < 16:
        raise ValueError(f"size={size} is too small to draw a face; use at least 16 pixels")
    shapes, landmarks = portrait(person, motion)
    style = STYLES[person.drawing]
    frames = rasterise(shapes, person.backdrop, size=size, softness=style.softness)
    return style.tone(frames), (landmarks * size - 0.5).astype(np.float32)


def pair(split: Split, index: int, *, frames: int, size: int, style: str | None = None, recoloured: float = 0.0, same_person: bool = False) -> clips.Clip:
    """The `index`-th pair of a split: two people of their own in the same motion, at 25 frames per second; or one, who drives themselves.

    Both are drawn in `style`, if one is given; a share `recoloured` of all pairs is in colours that no palette has, each of the two in their own."""
    moves = motion(split_seed(split, index, "motion"), frames)
    people = [identity(split_seed(split, 2 * index + number, "identity")) for number in range(2)]
    if style:
        people = [person._replace(drawing=style) for person in people]
    (target, target_landmarks), (driver, driver_landmarks) = (render_clip(person, moves, size=size) for person in people)
    rng = np.random.default_rng([split_seed(split, index, "motion"), 3])
    if rng.random() < recoloured:
        target, driver = augment.recolour(target, rng), augment.recolour(driver, rng)
    if same_person:
        driver, driver_landmarks = target, target_landmarks
    return clips.Clip(f"{split}-{index:06d}", 25.0, target, driver, target_landmarks, driver_landmarks)


# ---------------------------------------------------------------------------------------------------------------- program


class _Shard(NamedTuple):
    """One file to write, all that a worker process needs to know."""

    directory: pathlib.Path
    split: Split
    shard: int
    shards: int
    indices: range
    how: dict[str, Any]  # of `pair`


def _write_shard(job: _Shard) -> int:
    """Renders and writes one shard; returns its number of pairs."""
    cv2.setNumThreads(1)  # there is a process per core already
    pairs = (pair(job.split, index, **job.how) for index in job.indices)
    clips.write_clips(pairs, job.directory, split=job.split, shard=job.shard, shards=job.shards)
    return len(job.indices)


def main(arguments: list[str] | None = None) -> None:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(
        prog="python -m svdp_jax.data.synthetic",
        description="Write a dataset of rendered portraits: pairs of people in the same motion, 25 frames per second.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=pathlib.Path, required=True, default=argparse.SUPPRESS, help="directory of the dataset; shards already there are kept")
    parser.add_argument("--pairs", type=int, required=True, default=argparse.SUPPRESS, help="pairs for training, each of two new people")
    parser.add_argument("--validation-pairs", type=int, default=32, help="pairs for validation, of other people and motions")
    parser.add_argument("--frames", type=int, default=24, help="frames per clip")
    parser.add_argument("--size", type=int, default=128, help="pixels, height and width of a frame")
    parser.add_argument("--recoloured", type=float, default=0.0, help="share of the training pairs whose colours no palette has, 0 to 1")
    parser.add_argument("--same-person", action="store_true", help="everybody drives themselves, as in training on videos of which there is no other person")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other people and motions")
    flags = parser.parse_args(arguments)
    limits = {
        "pairs": (1, SEED_STRIDE),
        "validation_pairs": (0, SEED_STRIDE),
        "frames": (1, 10_000),
        "size": (16, 2048),
        "recoloured": (0, 1),
        "seed": (0, 10_000),
    }
    for name, (least, most) in limits.items():
        if not least <= getattr(flags, name) <= most:
            parser.error(f"--{name.replace('_', '-')} {getattr(flags, name)} must be {least} to {most}")

    first, jobs = flags.seed * SEED_STRIDE, []
    for split, count in ("train", flags.pairs), ("validation", flags.validation_pairs):
        shards = -(-count // PAIRS_PER_SHARD)
        how = {"frames": flags.frames, "size": flags.size, "same_person": flags.same_person, "recoloured": flags.recoloured if split == "train" else 0.0}
        for shard in range(shards):
            indices = range(first + shard * count // shards, first + (shard + 1) * count // shards)
            jobs.append(_Shard(flags.output, split, shard, shards, indices, how))
    with cli.messages(ConfigError, MediaError), cli.interrupted("the same command goes on"):
        parts.settle(flags.output / "synthetic.json", {name: getattr(flags, name) for name in (*limits, "same_person")})
        missing = [job for job in jobs if not clips.shard_path(job.directory, split=job.split, shard=job.shard, shards=job.shards).exists()]
        total = flags.pairs + flags.validation_pairs
        done = total - sum(len(job.indices) for job in missing)
        deaf = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}  # Ctrl-C is the parent's to answer
        with multiprocessing.get_context("spawn").Pool(**deaf) as pool, tqdm(total=total, initial=done, unit="pair") as bar:
            for count in pool.imap_unordered(_write_shard, missing):
                bar.update(count)
        lengths = clips.finish(flags.output)
        print(f"{flags.output}: " + ", ".join(f"{count} {split} pairs" for split, count in lengths.items()))


if __name__ == "__main__":
    main()
