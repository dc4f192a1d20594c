"""The bundled pair: a rendered portrait, another person's driving clip, and their landmarks.

    python -m svdp_jax.data.bundle --output svdp_jax/assets/demo

writes source.png, source.npz, driving.mp4 and driving.npz: pair 0 of the held-out test split, chosen for nothing but its number.
"""

from __future__ import annotations

import pathlib
from fractions import Fraction

import imageio.v3 as iio

from svdp_jax import cli
from svdp_jax.data import detectors, synthetic, video

PAIR = 0
FRAMES = 72
SIZE = 256  # pixels
FPS = Fraction(25)


def write_bundle(directory: pathlib.Path) -> None:
    """Writes the four files; the source shows its person at the moment after the clip."""
    directory.mkdir(parents=True, exist_ok=True)
    clip = synthetic.pair("test", PAIR, frames=FRAMES + 1, size=SIZE)
    iio.imwrite(directory / "source.png", clip.target[-1])
    detectors.write_landmarks(directory / "source.npz", clip.target_landmarks[-1:])
    note = {"comment": "rendered: this person does not exist"}
    video.write_video(directory / "driving.mp4", clip.driver[:-1], fps=FPS, metadata=note)
    detectors.write_landmarks(directory / "driving.npz", clip.driver_landmarks[:-1])


if __name__ == "__main__":
    parser = cli.ArgumentParser(prog="python -m svdp_jax.data.bundle", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=pathlib.Path, required=True, help="directory for the four files")
    with cli.messages(video.MediaError):
        write_bundle(parser.parse_args().output)
