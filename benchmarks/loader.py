"""How fast clips come off the disk: samples and clips per second of `data.loader`, from stored video at full size.

    python benchmarks/loader.py [--data PAIRS] [--grain 0] [--size 576] [--frames 16] [--threads 2] [--workers 0]

A sample is two clips: F' + F target frames with a source frame, and F driving frames, masked. Of a data set of yours, or of rendered
portraits, which take about as many bits as talking heads from H.264 videos do (12 against 10 kB a frame); with `--grain`, as film has
it, more. Bits decide: see kB/frame. Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import sys
import tempfile
import time
from collections.abc import Iterator

import av
import grain
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from svdp_jax.config import DataConfig  # noqa: E402
from svdp_jax.data import clips, loader, synthetic  # noqa: E402


def dataset(directory: pathlib.Path, *, count: int, frames: int, size: int, grain_scale: float) -> None:
    """Writes `count` pairs; the noise has a standard deviation of `grain_scale`, of 255."""

    def grainy() -> Iterator[clips.Clip]:
        rng = np.random.default_rng(0)
        for index in range(count):
            clip = synthetic.pair("train", index, frames=frames, size=size)
            noisy = [
                np.clip(part + rng.normal(scale=grain_scale, size=part.shape).astype(np.float32), 0, 255).astype(np.uint8)
                for part in (clip.target, clip.driver)
            ]
            yield clip._replace(target=noisy[0], driver=noisy[1])

    clips.write_clips(grainy(), directory, split="train", shard=0, shards=1)
    clips.finish(directory)


def kilobytes_per_frame(directory: pathlib.Path) -> float:
    """Of the first clips, targets and drivers."""
    stored = clips.open_clips(directory, split="train")
    parts = [part for number in range(min(len(stored), 16)) for part in (stored.stored(number).target, stored.stored(number).driver)]
    return sum(len(part.mp4) for part in parts) / sum(map(len, parts)) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, default=None, help="data set of pairs to read (default: rendered for this)")
    parser.add_argument("--grain", type=float, default=0.0, help="standard deviation of the noise on rendered portraits, of 255")
    parser.add_argument("--size", type=int, default=576, help="pixels, height and width")
    parser.add_argument("--frames", type=int, default=16, help="F, frames of a window")
    parser.add_argument("--clips", type=int, default=8, help="clips in the data set")
    parser.add_argument("--length", type=int, default=100, help="frames of a stored clip")
    parser.add_argument("--samples", type=int, default=100, help="samples that are timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0, help="processes instead of threads")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not flags.data:
            dataset(pathlib.Path(folder), count=flags.clips, frames=flags.length, size=flags.size, grain_scale=flags.grain)
        path = flags.data or pathlib.Path(folder)
        data = DataConfig(path=str(path), size=flags.size, frames=flags.frames, workers=flags.workers)
        batches = loader.batches(data, split="train", seed=0, batch=1, threads=flags.threads)
        for _ in range(10):  # threads start, buffers fill
            next(batches)
        started = time.perf_counter()
        for _ in range(flags.samples):
            next(batches)
        seconds = time.perf_counter() - started
        batches.close()
        stored = kilobytes_per_frame(path)
    result = {
        "samples_per_second": flags.samples / seconds,
        "clips_per_second": 2 * flags.samples / seconds,
        "stored_kilobytes_per_frame": stored,
        "data": "given" if flags.data else f"rendered, grain {flags.grain}",
        **{name: getattr(flags, name) for name in ("size", "frames", "threads", "workers")},
        "device": f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "versions": {"grain": grain.__version__, "av": av.__version__, "numpy": np.__version__},
        "date": datetime.date.today().isoformat(),
    }
    print(f"{'samples/s':>10} {'clips/s':>8} {'kB/frame':>9}")
    print(f"{result['samples_per_second']:10.1f} {result['clips_per_second']:8.1f} {result['stored_kilobytes_per_frame']:9.1f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
