"""LivePortrait, the user's own checkout, through its own command line: another person in the motion of a clip.

    target clip [N,H,W,3] + a picture of someone else [H,W,3]  ->  driver [N,H,W,3], and whether it is where the target is

The method rests on the driver's eyes, nose and mouth being where the target's are. LivePortrait by default moves a face relative to
its own first pose, crops it anew and pastes it back, so all of that is switched off: absolute motion, in the crop that the picture
comes in, in which the face already has the target's size and place. And since that is not enough for every pair of people, what
comes out is measured.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
from fractions import Fraction

import imageio.v3 as iio
import numpy as np
from jaxtyping import Float32, UInt8

from svdp_jax import files
from svdp_jax.config import ConfigError
from svdp_jax.data import clips, faces, video

FLAGS = ("--no_flag_relative_motion", "--no_flag_do_crop", "--no_flag_pasteback", "--no_flag_stitching", "--no_flag_crop_driving_video")
SECONDS = 1800  # that one run may take


class Failed(Exception):
    """LivePortrait gave no usable video. The message is one line."""


def interpreter(checkout: pathlib.Path, python: str) -> str:
    """The absolute path of `python`, to call LivePortrait with from its own folder. ConfigError where there is none, or no LivePortrait."""
    if not (checkout / "inference.py").is_file():
        raise ConfigError(f"--liveportrait {checkout}: has no inference.py; give the folder of a LivePortrait checkout")
    found = shutil.which(python)
    if not found:
        raise ConfigError(f"--python {python}: no such program; give the interpreter of LivePortrait's environment")
    return os.path.abspath(found)  # links stay: they tell a virtual environment


def revision(checkout: pathlib.Path) -> str | None:
    """The commit that a checkout stands at; None where git does not say."""
    git = checkout / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        branch = head.removeprefix("ref: ")
        if branch == head:
            return head
        if (git / branch).is_file():
            return (git / branch).read_text().strip()
        return next((line.split()[0] for line in (git / "packed-refs").read_text().splitlines() if line.endswith(f" {branch}")), None)
    except OSError:
        return None


def animate(
    picture: UInt8[np.ndarray, "H W 3"], clip: clips.Clip, *, checkout: pathlib.Path, python: str, folder: pathlib.Path
) -> tuple[UInt8[np.ndarray, "N H W 3"], pathlib.Path]:
    """The person of `picture` in the motion of `clip.target`, at the clip's size, and the file they were read from. Failed if there is none such."""
    frames, size, folder = clip.target, clip.target.shape[1], folder.absolute()  # LivePortrait runs in its own
    with files.writing(folder):
        iio.imwrite(folder / "face.png", picture)
    video.write_video(folder / "motion.mp4", frames, fps=Fraction(clip.fps).limit_denominator(1001), metadata={}, crf=clips.CRF)
    output = folder / "made"
    command = [python, "inference.py", "-s", folder / "face.png", "-d", folder / "motion.mp4", "-o", output, *FLAGS]
    try:
        piped = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}  # in the background nobody answers
        done = subprocess.run(list(map(str, command)), cwd=checkout, text=True, errors="replace", timeout=SECONDS, **piped)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failed(f"LivePortrait did not run: {error}") from error
    made = output / "face--motion.mp4"
    if done.returncode or not made.is_file():
        said = [line for line in done.stdout.splitlines() if line.strip()] or ["it said nothing"]
        raise Failed(f"LivePortrait ended with status {done.returncode} and no {made.name}: {said[-1].strip()[:300]}")
    try:
        driver = np.stack([faces.apply_crop(frame, faces.Crop(0, 0, min(frame.shape[:2])), size) for frame in video.read_frames(made)])
    except video.MediaError as error:
        raise Failed(str(error)) from error
    if len(driver) != len(frames):
        raise Failed(f"LivePortrait made {len(driver)} frames of {len(frames)}")
    return driver, made


def pose_like(other: clips.Clip, landmarks: Float32[np.ndarray, "N K 2"], *, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The person of another clip in the frame that looks most like one of the target's, cropped so that the face has that one's size and place."""
    frame, _ = faces.best_match(other.target_landmarks, landmarks)
    return faces.apply_crop(other.target[[frame]][0], faces.source_crop(other.target_landmarks[frame], landmarks, faces.Crop(0, 0, size)), size)


def apart(target: Float32[np.ndarray, "N K 2"], driver: Float32[np.ndarray, "N K 2"]) -> Float32[np.ndarray, "N"]:
    """How far apart eyes, nose and mouth of the two are in each frame: the farthest of the four, in sides of the target's face box."""
    distance = np.linalg.norm(faces.centres(target) - faces.centres(driver), axis=-1).max(axis=-1)
    box = faces.face_box(target)
    return distance / (box[:, 2] - box[:, 0])
