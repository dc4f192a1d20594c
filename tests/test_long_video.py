"""Ten minutes of video take no more memory than two seconds."""

import os
import subprocess
import sys
from fractions import Fraction

import av
import imageio.v3 as iio
import numpy as np
import pytest
from conftest import ROOT

from svdp_jax.data import detectors, synthetic

SECONDS, FPS = 600, 30


@pytest.fixture(scope="module")
def long_video(tmp_path_factory):
    """long.mp4, 1280x720, with 478 landmarks a frame beside it: a few pictures, again and again."""
    folder = tmp_path_factory.mktemp("long")
    coarse = np.random.default_rng(0).integers(0, 256, (45, 80, 3), np.uint8)
    pictures = [np.roll(coarse, n, axis=1).repeat(16, axis=0).repeat(16, axis=1) for n in range(10)]
    pictures = [av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p") for picture in pictures]
    with av.open(str(folder / "long.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        for number in range(SECONDS * FPS):
            picture = pictures[number % 10]
            picture.pts, picture.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    points = np.random.default_rng(1).uniform([450, 200], [850, 600], (478, 2)).astype(np.float32)
    sway = 5 * np.sin(np.arange(SECONDS * FPS, dtype=np.float32) / 20)[:, None, None]
    detectors.write_landmarks(folder / "long.npz", points + sway)
    clip = synthetic.pair("validation", 0, frames=1, size=64)
    iio.imwrite(folder / "portrait.png", clip.target[0])
    detectors.write_landmarks(folder / "portrait.npz", points[None] / 12)
    return folder


# A process reports its own peak: what its parent sees of it (ru_maxrss) is no less than the parent's own.
MEASURED = """
import re, runpy
runpy.run_path("sample.py", run_name="__main__")
print("peak", re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def peak(folder, workdir, *flags):
    """Peak resident memory of sample.py, in MB."""
    given = ["-s", folder / "portrait.png", "-d", folder / "long.mp4", "-o", folder / "out", "--checkpoint", workdir, "--steps", 1, *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", MEASURED, *map(str, given)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return int(done.stdout.split()[-1]) / 1024


@pytest.mark.slow
def test_ten_minutes_add_less_than_500_megabytes(long_video, workdir):
    short, long = peak(long_video, workdir, "--max-frames", 2 * FPS), peak(long_video, workdir)
    print(f"peak resident memory: {short:.0f} MB for 2 seconds, {long:.0f} MB for {SECONDS}")
    assert len(list((long_video / "out").glob("*.mp4"))) == 2 and 20 < long - short < 500  # landmarks alone are 69 MB
