"""How fast clips come off the disk: samples and clips per second of `data.loader`, from stored video at full size.

    python benchmarks/loader.py [--size 576] [--frames 16] [--threads 2] [--workers 0]

A sample is two clips: F' + F target frames with a source frame, and F driving frames, masked. Rendered portraits with
film grain, so that the video holds about as many bits as a camera's. Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import tempfile
import time
from collections.abc import Iterator

import av
import grain
import numpy as np

from svdp_jax.config import DataConfig
from svdp_jax.data import clips, loader, synthetic

GRAIN = 3.0  # standard deviation of the noise, of 255


def dataset(directory: pathlib.Path, *, count: int, frames: int, size: int) -> int:
    """Writes `count` clips and returns their bytes."""

    def grainy() -> Iterator[clips.Clip]:
        rng = np.random.default_rng(0)
        for index in range(count):
            clip = synthetic.pair("train", index, frames=frames, size=size)
            noisy = [np.clip(part + rng.normal(scale=GRAIN, size=part.shape).astype(np.float32), 0, 255).astype(np.uint8) for part in (clip.target, clip.driver)]
            yield clip._replace(target=noisy[0], driver=noisy[1])

    path = clips.write_clips(grainy(), directory, split="train", shard=0, shards=1)
    clips.finish(directory)
    return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", type=int, default=576, help="pixels, height and width")
    parser.add_argument("--frames", type=int, default=16, help="F, frames of a window")
    parser.add_argument("--clips", type=int, default=8, help="clips in the data set")
    parser.add_argument("--length", type=int, default=100, help="frames of a stored clip")
    parser.add_argument("--samples", type=int, default=100, help="samples that are timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0, help="processes instead of threads")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stored = dataset(pathlib.Path(folder), count=flags.clips, frames=flags.length, size=flags.size)
        data = DataConfig(path=folder, size=flags.size, frames=flags.frames, workers=flags.workers)
        batches = loader.batches(data, split="train", seed=0, batch=1, threads=flags.threads)
        for _ in range(10):  # threads start, buffers fill
            next(batches)
        started = time.perf_counter()
        for _ in range(flags.samples):
            next(batches)
        seconds = time.perf_counter() - started
        batches.close()
    result = {
        "samples_per_second": flags.samples / seconds,
        "clips_per_second": 2 * flags.samples / seconds,
        "stored_kilobytes_per_frame": stored / (2 * flags.clips * flags.length) / 1e3,
        **{name: getattr(flags, name) for name in ("size", "frames", "length", "threads", "workers")},
        "device": f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "versions": {"grain": grain.__version__, "av": av.__version__, "numpy": np.__version__},
        "date": datetime.date.today().isoformat(),
    }
    print(f"{'samples/s':>10} {'clips/s':>8} {'kB/frame':>9}")
    print(f"{result['samples_per_second']:10.1f} {result['clips_per_second']:8.1f} {result['stored_kilobytes_per_frame']:9.1f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
