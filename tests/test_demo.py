"""The bundled demo: `python sample.py` does what the README says, and what is written about it is what was measured."""

import json
import os
import re
import subprocess
import sys
import time

import imageio.v3 as iio
import numpy as np
import pytest
from conftest import ROOT

from svdp_jax import checkpoint, rendering
from svdp_jax.config import load_config
from svdp_jax.data import bundle, synthetic, video
from svdp_jax.evaluation import metrics, readings, rendered

DEMO = ROOT / "svdp_jax" / "assets" / "demo"
MEASURED = ROOT / "benchmarks" / "results" / "demo_quality.json"


@pytest.fixture(scope="module")
def truth():
    """The portrait as it would move with the bundled driver, and the portrait: the very last frame."""
    frames = synthetic.pair("test", bundle.PAIR, frames=bundle.FRAMES + 1, size=bundle.SIZE).target
    return frames[:-1], frames[-1]


def test_the_bundled_portrait_follows_the_bundled_driver(python, truth, tmp_path):
    result = python("sample.py", "--output", tmp_path, JAX_DISABLE_MOST_OPTIMIZATIONS="0")  # as a user runs it
    assert result.returncode == 0, result.stderr
    results = [tmp_path / f"source--driving{ending}" for ending in (".mp4", "_concat.mp4", ".json")]
    assert [line for line in result.stdout.splitlines() if line.startswith("wrote ")] == [f"wrote {path}" for path in results]
    info = video.probe(results[0])
    assert (info.frames, info.fps, info.width, info.height) == (bundle.FRAMES, bundle.FPS, bundle.SIZE, bundle.SIZE)

    moved, still = truth
    frames = np.stack(list(video.read_frames(results[0])))
    copied = np.broadcast_to(still, moved.shape)
    assert metrics.psnr(frames, moved).mean() > metrics.psnr(copied, moved).mean() + 2
    assert metrics.correlation(readings.head_position(frames), readings.head_position(moved)) > 0.6
    assert metrics.frame_change_ratio(frames, moved) < 1.5


@pytest.mark.slow
def test_a_rendering_that_is_killed_is_resumed_to_the_bit(tmp_path):
    command = [sys.executable, "sample.py", "--no-concat", "--output"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    subprocess.run([*command, tmp_path / "straight"], check=True, cwd=ROOT, env=environment)
    kept, kills = tmp_path / "killed" / ".source--driving.windows", 0
    for windows in range(1, 5):
        process = subprocess.Popen([*command, tmp_path / "killed", "--resume"], cwd=ROOT, env=environment)
        while process.poll() is None and rendering.windows_in(kept) < windows:
            time.sleep(0.01)
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills == 4, "each time it was at work"
    subprocess.run([*command, tmp_path / "killed", "--resume"], check=True, cwd=ROOT, env=environment)
    straight, resumed = (list(video.read_frames(tmp_path / name / "source--driving.mp4")) for name in ("straight", "killed"))
    np.testing.assert_array_equal(straight, resumed)
    assert json.loads((tmp_path / "killed" / "source--driving.json").read_text())["windows"]["resumed"] >= 4


def test_the_bundled_files_are_what_the_program_writes(tmp_path):
    bundle.write_bundle(tmp_path)
    np.testing.assert_array_equal(iio.imread(tmp_path / "source.png"), iio.imread(DEMO / "source.png"))
    for name in "source.npz", "driving.npz":
        (ours,), (theirs,) = (np.load(folder / name).values() for folder in (tmp_path, DEMO))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
    ours, theirs = (np.stack(list(video.read_frames(folder / "driving.mp4"))) for folder in (tmp_path, DEMO))
    assert metrics.psnr(ours, theirs).min() > 40  # encoders differ


def test_the_bundled_weights_are_those_of_the_config():
    config, params, _ = checkpoint.load_weights(DEMO / "checkpoint")  # checks every shape
    assert config == load_config(ROOT / "configs" / "demo.py")
    sizes = [path.stat().st_size for path in DEMO.rglob("*") if path.is_file()]
    assert sum(sizes) < 40e6 and max(sizes) < 20e6, "what an installation, and a host of repositories, take without asking"
    assert params


@pytest.mark.parametrize("page", ["README.md", "svdp_jax/assets/demo/README.md"])
def test_the_figures_on_a_page_are_those_that_were_measured(page):
    record = json.loads(MEASURED.read_text())
    config = load_config(DEMO / "checkpoint" / "config.json")
    assert record["sampling"] == {"steps": config.sample.steps, "guidance": list(config.sample.guidance), "shift": config.sample.shift}
    assert (record["split"], record["frames"]) == ("test", 160)
    rows = {"PSNR, whole frames": "psnr", "PSNR, eyes, nose and mouth": "regions", "frame-to-frame change": "change", "the same where windows meet": "seams"}
    rows |= {"mouth opening": "mouth", "head position": "head", "gaze": "gaze", "error of the tenth window": "drift", "of which across": "head_x", "of which down": "head_y"}
    text = (ROOT / page).read_text()
    for title, figure in rows.items():
        (row,) = re.findall(rf"^\| {title}[^|]*\|([^|]+)\|([^|]+)\|([^|]+)\|", text, re.MULTILINE)
        told = [float(value.split()[0]) for value in row]
        measured = record["figures"][figure]
        assert told == [round(measured[name], 2) for name in ("mean", "standard_error", "median")], title
    missed = [figure for figure in rendered.ROWS if not record["figures"][figure].get("met", True)]
    assert text.count("**not met**") == len(missed)
