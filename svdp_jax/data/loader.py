"""From clips to batches: windows, source frames and masked driving frames, in an order that never depends on the machine.

In: a record dataset (`data/clips.py`). Out: `types.Batch` of uint8 arrays, target and driving [B,F,H,W,3], history
[B,P,H,W,3], source [B,H,W,3].

Sample i, counted from the start of training over all processes, is a function of (seed, i) alone, and global batch k
holds the samples k*B .. (k+1)*B - 1. So the state of the data is one integer, the step, and neither threads, nor
workers, nor the number of processes change what is learned from.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Generator, Iterator, Sequence
from multiprocessing import resource_tracker
from typing import NamedTuple

import cv2
import grain
import numpy as np
from absl import flags
from jaxtyping import Float, UInt8

from svdp_jax.config import ConfigError, DataConfig
from svdp_jax.data import clips as clips_lib
from svdp_jax.data import faces, video
from svdp_jax.types import Batch

ATTEMPTS = 16  # records tried for one sample; if all are bad, so is the dataset

Frame = UInt8[np.ndarray, "H W 3"]
Frames = UInt8[np.ndarray, "N H W 3"]


class LeftOut(NamedTuple):
    """A record in whose place another one stands."""

    number: int
    problem: str
    corrupt: bool  # or else whole, and of no use with this config


_log = logging.getLogger(__name__)


def batches(
    data: DataConfig,
    *,
    split: str,
    seed: int,
    batch: int,
    start_sample: int = 0,
    rows: Sequence[int] | None = None,
    threads: int = 2,
) -> Generator[Batch, None, None]:
    """Batches of `split` from sample `start_sample` on, without end; epochs follow each other, each in its own order.

    `batch` counts the samples of a step over all processes, of which this one gets `rows` (all, if not given). `threads` threads decode ahead, or `data.workers` processes if
    there are any; with `data.cache` these read every clip once, ahead of use (then the caller's script needs `if __name__ == "__main__"`). `close()` ends them.

    No dataset, or one that does not suit `data`: ConfigError, before any batch."""
    if not data.path:
        raise ConfigError(f"data.path is not set; {clips_lib.MAKE.format('DIR')}, then set data.path=DIR")
    clips = clips_lib.open_clips(data.path, split=split)
    _check_first(clips, data)
    rows = range(batch) if rows is None else rows
    make = Samples(clips, data, seed=seed)

    def at_step(step: int) -> tuple[Batch, list[LeftOut]]:
        samples, left_out = zip(*(make(start_sample + step * batch + row) for row in rows), strict=True)
        return Batch(*map(_stack, zip(*samples, strict=True))), [record for records in left_out for record in records]

    dataset = grain.MapDataset.range(sys.maxsize).map(at_step)
    workers = 0 if data.cache else data.workers
    if workers == 0:
        ahead = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
    else:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads absl's flags, which only absl's own main would have parsed
        ahead = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        ahead = ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2), worker_init_fn=functools.partial(_end_with_parent, os.getpid()))
    stream = _stream(ahead, make, first=start_sample, limit=data.corrupt_limit, workers=workers)
    atexit.register(_close, weakref.ref(stream))
    return stream


def _stream(ahead: grain.IterDataset, make: Samples, *, first: int, limit: float, workers: int) -> Generator[Batch, None, None]:
    """The batches alone. Those of `workers` lie in their worker's memory, which ends with it: they are copied."""
    clips = make.clips
    bad: set[int] = set()  # kept here and not where records are read, so that it is the same for any number of workers
    with make.reading(first), contextlib.closing(iter(ahead)) as iterator:
        begun = []
        if workers:
            with _deaf():  # each begins when it is first asked
                begun = [next(iterator) for _ in range(workers)]
        for batch, left_out in itertools.chain(begun, iterator):
            for record in left_out:
                if record.number not in bad:
                    bad.add(record.number)
                    kind = "corrupt record" if record.corrupt else "clip that does not suit"
                    _log.warning("%s skipped, another one stands in (%d of %d so far): %s", kind, len(bad), len(clips), record.problem)
            if len(bad) > limit * len(clips):
                raise _unusable(f"{len(bad)} of {len(clips)} records of {clips.path} cannot be used, more than data.corrupt_limit={limit:g} allows", record)
            yield Batch(*map(np.array, batch)) if workers else batch


def _unusable(what: str, last: LeftOut) -> video.MediaError | ConfigError:
    """The error for too many records that are left out, of which `last` shows what is wrong."""
    if last.corrupt:
        return video.MediaError(f"{what}; the last is corrupt: {last.problem}; make the dataset again")
    return ConfigError(f"{what}; the last: {last.problem}")


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Processes that begin inside never hear Ctrl-C or SIGTERM. Sent to the whole group, these are for the process that trains to answer, which
    may need some more batches; it hears them behind this."""
    resource_tracker.ensure_running()  # which would let signals in again when the first process needs it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent(parent: int, *_) -> None:
    """In a worker: it goes when its parent, a process of this number, is gone, which SIGKILL may have taken, and be it before the worker was ready."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _close(stream: weakref.ref[Generator[Batch, None, None]]) -> None:
    """At exit the threads and processes of a stream still in use end here, while the modules they need are there."""
    if (alive := stream()) is not None:
        alive.close()


class Samples:
    """Sample i of training with `seed`, as a Batch without its first axis, and the records left out on the way."""

    def __init__(self, clips: clips_lib.Clips, data: DataConfig, *, seed: int):
        self.clips = clips
        self.data = data
        self.seed = seed
        self.read, self.cut_data = clips.stored, data
        if data.cache:
            self.cut_data = data if data.region_jitter else dataclasses.replace(data, driver_mask=False)  # what is kept is masked already
            self.read = functools.cache(functools.partial(_to_keep, clips, data))

    @contextlib.contextmanager
    def reading(self, first: int) -> Iterator[None]:
        """Inside, where there are processes to read what is kept, they do, beginning with the records of sample `first`. Leaving ends them."""
        if not (self.data.cache and self.data.workers):
            yield
            return
        epoch, position = divmod(first, len(self.clips))
        numbers = np.roll(_order(self.seed, epoch, len(self.clips)), -position).tolist()
        spawn = multiprocessing.get_context("spawn")
        readers = concurrent.futures.ProcessPoolExecutor(self.data.workers, mp_context=spawn, initializer=_begin_reading, initargs=(self.clips, self.data, os.getpid()))
        try:
            with _deaf():
                coming = {number: readers.submit(_read_to_keep, number) for number in numbers}
            self.read = lambda number: coming[number].result()
            yield
        finally:
            readers.shutdown(wait=False, cancel_futures=True)

    def __call__(self, index: int) -> tuple[Batch, list[LeftOut]]:
        epoch, position = divmod(index, len(self.clips))
        number = int(_order(self.seed, epoch, len(self.clips))[position])
        left_out: list[LeftOut] = []
        others: np.random.Generator | None = None  # records in place of bad ones
        while len(left_out) < ATTEMPTS:
            try:
                clip = self.read(number)
                _check_clip(clip, self.data)
                # The window is drawn from a generator of its own, so that it does not depend on what was left out before.
                return cut(clip, self.cut_data, rng=np.random.default_rng((self.seed, 2, index))), left_out
            except (video.MediaError, ConfigError) as error:
                others = others or np.random.default_rng((self.seed, 1, index))
                left_out.append(LeftOut(number, str(error), corrupt=isinstance(error, video.MediaError)))
                number = int(others.integers(len(self.clips)))
        raise _unusable(f"sample {index}: {ATTEMPTS} records of {self.clips.path} in a row cannot be used", left_out[-1])


def _to_keep(clips: clips_lib.Clips, data: DataConfig, number: int) -> clips_lib.Clip:
    """A record with all of its frames and, unless regions jitter, as the model sees it: at its size, the driver masked."""
    clip = clips[number]
    _check_clip(clip, data)
    if data.region_jitter:
        return clip
    return clip._replace(target=_resize(clip.target, data.size), driver=_driving(clip.driver, clip.driver_landmarks, data))


_reading: tuple[clips_lib.Clips, DataConfig] | None = None  # in a process that reads for another one


def _begin_reading(clips: clips_lib.Clips, data: DataConfig, parent: int) -> None:
    global _reading
    _reading = clips, data
    cv2.setNumThreads(1)  # there are processes enough
    _end_with_parent(parent)


def _read_to_keep(number: int) -> clips_lib.Clip:
    return _to_keep(*_reading, number)


def cut(clip: clips_lib.Clip, data: DataConfig, *, rng: np.random.Generator) -> Batch:
    """One sample: history [P,H,W,3], then target and driving [F,H,W,3], consecutive; source [H,W,3] from anywhere else."""
    span = data.history + data.frames
    start = int(rng.integers(len(clip.target) - span + 1))
    first = start + data.history
    source = int(rng.integers(len(clip.target) - span))
    source += span if source >= start else 0  # the window is not there to choose from
    jitter = rng.normal(scale=data.region_jitter, size=(4, 4)) if data.region_jitter else 0
    if isinstance(clip.target, np.ndarray):  # nothing is copied here
        target, still, window = clip.target[start : start + span], clip.target[source : source + 1], slice(first, start + span)
    else:  # decoded together
        target, still = np.split(clip.target[[*range(start, start + span), source]], [span])
        window = range(first, start + span)
    target = _resize(target, data.size)
    return Batch(
        target=target[data.history :],
        history=target[: data.history],
        source=_resize(still, data.size)[0],
        driving=_driving(clip.driver[window], clip.driver_landmarks[window], data, jitter=jitter),
    )


def whole_clip(clip: clips_lib.Clip, data: DataConfig) -> tuple[Frame, Frames, Frames]:
    """Source, driving and target of a whole clip, for sampling: the source is its last frame, N are all the others."""
    source = _resize(clip.target[-1:], data.size)[0]
    driving = _driving(clip.driver[:-1], clip.driver_landmarks[:-1], data)
    return source, driving, _resize(clip.target[:-1], data.size)


def _driving(
    frames: Frames, landmarks: Float[np.ndarray, "N K 2"], data: DataConfig, *, jitter: Float[np.ndarray, "4 4"] | float = 0.0
) -> UInt8[np.ndarray, "N {data.size} {data.size} 3"]:
    if not data.driver_mask:
        return _resize(frames, data.size)
    # Masked at the size the model sees: a resized mask would have soft edges, and leak.
    scale = data.size / frames.shape[1]
    landmarks = (landmarks + 0.5) * scale - 0.5  # pixel centres are integers
    boxes = faces.regions(landmarks, margin=data.region_margin)
    face = np.median(faces.face_box(landmarks)[:, 2] - faces.face_box(landmarks)[:, 0])
    return faces.mask_frames(_resize(frames, data.size), (boxes + jitter * face).astype(np.float32))


def _resize(frames: Frames, size: int) -> UInt8[np.ndarray, "N {size} {size} 3"]:
    if frames.shape[1] == size:
        return frames
    shrunk = np.empty((len(frames), size, size, 3), np.uint8)
    for frame, out in zip(frames, shrunk, strict=True):
        cv2.resize(frame, (size, size), dst=out, interpolation=cv2.INTER_AREA)
    return shrunk


def _stack(parts: tuple[np.ndarray, ...]) -> np.ndarray:
    return np.stack(parts) if len(parts) > 1 else parts[0][None]  # one need not be copied


@functools.lru_cache(maxsize=4)  # prefetching threads may stand on both sides of the end of an epoch
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(count)


def _check_first(clips: clips_lib.Clips, data: DataConfig) -> None:
    """Most often a dataset is wrong as a whole: then the first readable clip shows it."""
    if not len(clips):
        raise ConfigError(f"data {clips.path} has no clips; {clips_lib.MAKE.format(data.path)}")
    for number in range(min(len(clips), ATTEMPTS)):
        try:
            clip = clips.stored(number)
            _check_clip(clip, data)
            size = clip.target[[0]].shape[1]
        except video.MediaError as error:
            last = error
            continue
        if size < data.size:
            raise ConfigError(f"clip {clip.id} of {data.path} has frames of {size} pixels; data.size={data.size} must not be larger")
        return
    raise ConfigError(f"data {data.path}: none of the first records can be read ({last}); {clips_lib.MAKE.format(data.path)}")


def _check_clip(clip: clips_lib.Clip, data: DataConfig) -> None:
    frames = len(clip.target)
    name, needed = f"clip {clip.id} of {data.path}", data.history + data.frames + 1
    if frames < needed:
        window = f"data.history={data.history}, data.frames={data.frames} and a source"
        raise ConfigError(f"{name} has {frames} frames; {window} need {needed}: make clips of no fewer (prepare's --rules.min-frames), or set a shorter window")
    if not clip.has_driver:
        raise ConfigError(f"{name} has no driver yet; `python -m svdp_jax.data.pairs` makes pairs of clips")
    if abs(clip.fps - data.fps) > 0.01:
        raise ConfigError(f"{name} has {clip.fps:g} frames per second; set data.fps to that, or make clips of data.fps={data.fps:g}")
