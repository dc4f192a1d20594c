"""The loader: every sample is a function of (seed, index) alone, and shows the frames it should.

Frames of the clips below are of one colour that tells clip (red), frame number (green), and target from driver (blue).
"""

import dataclasses
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
from conftest import ROOT
from test_clips import flip_bytes, one_line

from svdp_jax.config import ConfigError, DataConfig
from svdp_jax.data import clips, faces, loader, video
from svdp_jax.types import Batch

COUNT, FRAMES, SIZE = 7, 14, 32
BATCH = 4
STEP = 15  # grey levels from one clip or frame to the next, many times what compression costs
FACE = np.random.default_rng(0).uniform(6, 20, (68, 2)).astype(np.float32)


def make_clip(number: int, *, frames: int = FRAMES, size: int = SIZE) -> clips.Clip:
    def film(blue: int):
        colours = np.array([(30 + STEP * number, 30 + STEP * i, blue) for i in range(frames)], np.uint8)
        return np.broadcast_to(colours[:, None, None], (frames, size, size, 3)).copy()

    moved = FACE * (size / SIZE) + np.arange(frames, dtype=np.float32)[:, None, None] / 2  # boxes differ from frame to frame
    return clips.Clip(f"clip-{number}", 25.0, film(60), film(180), moved, moved)


def write(directory, made, *, split: str = "train") -> None:
    for shard in range(2):
        clips.write_clips(made[shard::2], directory, split=split, shard=shard, shards=2)
    clips.finish(directory)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    directory = tmp_path_factory.mktemp("records")
    write(directory, [make_clip(number) for number in range(COUNT)])
    return DataConfig(path=str(directory), size=SIZE, frames=4, history=2)


def take(count: int, data: DataConfig, **options) -> list[Batch]:
    """The first `count` batches; the stream is closed after them."""
    stream = loader.batches(data, **{"split": "train", "seed": 3, "batch": BATCH, **options})
    taken = [next(stream) for _ in range(count)]
    stream.close()
    return taken


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for name in Batch._fields:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def clip_numbers(frames: np.ndarray) -> np.ndarray:
    """Which clip each frame [..., H, W, 3] is of."""
    return np.rint((frames[..., 0].max((-1, -2)) - 30.0) / STEP).astype(int)


def frame_numbers(frames: np.ndarray) -> np.ndarray:
    """Which frame of its clip each frame [..., H, W, 3] is."""
    return np.rint((frames[..., 1].max((-1, -2)) - 30.0) / STEP).astype(int)


def test_shapes(data):
    (batch,) = take(1, data)
    assert type(batch) is Batch
    shapes = dict(target=(4, 4, SIZE, SIZE, 3), history=(4, 2, SIZE, SIZE, 3), source=(4, SIZE, SIZE, 3), driving=(4, 4, SIZE, SIZE, 3))
    for name, shape in shapes.items():
        array = getattr(batch, name)
        assert type(array) is np.ndarray and array.dtype == np.uint8 and array.shape == shape, name


def test_a_sample_shows_the_frames_it_should(data):
    for batch in take(20, data):
        numbers = frame_numbers(batch.target)
        np.testing.assert_array_equal(numbers, numbers[:, :1] + np.arange(4))
        np.testing.assert_array_equal(frame_numbers(batch.history), numbers[:, :1] + [-2, -1])
        np.testing.assert_array_equal(frame_numbers(batch.driving), numbers)
        source = frame_numbers(batch.source)
        assert ((source < numbers[:, 0] - 2) | (source > numbers[:, -1])).all()
        for name in ("target", "history", "driving"):
            frames = getattr(batch, name)
            assert (clip_numbers(frames) == clip_numbers(batch.source)[:, None]).all(), name
        for frames in (batch.target, batch.history, batch.source):
            assert abs(frames[..., 2].astype(int) - 60).max() < STEP / 2
        assert abs(batch.driving[..., 2].max((-1, -2)).astype(int) - 180).max() < STEP / 2


def test_every_window_and_every_source_is_drawn(data):
    clip, span, pairs = make_clip(0), 6, set()
    for seed in range(1500):
        sample = loader.cut(clip, data, rng=np.random.default_rng(seed))
        pairs.add((int(frame_numbers(sample.history)[0]), int(frame_numbers(sample.source))))
    starts, frames = range(FRAMES - span + 1), range(FRAMES)
    assert pairs == {(start, source) for start in starts for source in frames if not start <= source < start + span}


def test_the_shortest_clip_gives_a_sample(data):
    clip = make_clip(0, frames=7)  # history, window and one more
    drawn = {int(frame_numbers(loader.cut(clip, data, rng=np.random.default_rng(seed)).source)) for seed in range(20)}
    assert drawn == {0, 6}


def test_driving_frames_show_the_regions_and_nothing_else(data):
    clip = clips.open_clips(data.path, split="train")[2]
    sample = loader.cut(clip, data, rng=np.random.default_rng(0))
    for frame, number in zip(sample.driving, frame_numbers(sample.driving), strict=True):
        boxes = faces.regions(clip.driver_landmarks[number], margin=data.region_margin)
        seen = np.zeros((SIZE, SIZE), bool)
        for x0, y0, x1, y1 in boxes:
            columns, rows = np.meshgrid(np.arange(SIZE), np.arange(SIZE))
            seen |= (columns >= x0) & (columns <= x1) & (rows >= y0) & (rows <= y1)
        assert 0 < seen.sum() < SIZE * SIZE
        assert (frame[~seen] == 0).all()
        np.testing.assert_array_equal(frame[seen], clip.driver[number][seen])


def test_larger_frames_shrink_and_landmarks_with_them(tmp_path, data):
    large, small = make_clip(0, size=2 * SIZE), make_clip(0)
    texture = np.random.default_rng(1).integers(0, 255, large.target.shape, np.uint8)
    # Pixel centres are integers, so the centre of the frame is at (size - 1) / 2 and a shrunk point at (x + 0.5) / 2 - 0.5.
    large = large._replace(target=texture, driver_landmarks=2 * small.driver_landmarks + 0.5)
    shrunk = loader.cut(large, data, rng=np.random.default_rng(0))
    same = loader.cut(small, data, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(shrunk.driving, same.driving)
    numbers = frame_numbers(same.target)
    expected = [cv2.resize(texture[number], (SIZE, SIZE), interpolation=cv2.INTER_AREA) for number in numbers]
    np.testing.assert_array_equal(shrunk.target, expected)


def test_data_do_not_depend_on_threads_workers_or_processes(data):
    straight = take(6, data, threads=1)
    assert_same(take(6, data, threads=4), straight)
    workers = dataclasses.replace(data, workers=2)
    assert_same(take(4, workers, start_sample=2 * BATCH), straight[2:])  # resumed with workers after two steps of threads
    for rows in ([[0, 1], [2, 3]], [[0], [1], [2], [3]], [[0, 2], [1, 3]]):  # of each process; the last as where a mesh is interleaved
        shares = [take(6, data, rows=own) for own in rows]
        joined = [Batch(*(np.concatenate(arrays)[np.argsort(sum(rows, []))] for arrays in zip(*parts, strict=True))) for parts in zip(*shares, strict=True)]
        assert_same(joined, straight)


def test_cached_clips_are_the_same(data):
    cached = dataclasses.replace(data, cache=True)
    assert_same(take(4, cached, threads=2), take(4, data))
    jittered = dataclasses.replace(data, region_jitter=0.05)
    assert_same(take(4, dataclasses.replace(jittered, cache=True)), take(4, jittered))
    smaller = dataclasses.replace(data, size=SIZE // 2)
    assert_same(take(4, dataclasses.replace(smaller, cache=True)), take(4, smaller))
    assert_same(take(4, dataclasses.replace(smaller, cache=True, workers=2), start_sample=3), take(4, smaller, start_sample=3))


def test_a_data_set_may_be_smaller_than_a_batch(data):
    (batch,) = take(1, data, batch=2 * COUNT + 2)
    counts = np.bincount(clip_numbers(batch.source), minlength=COUNT)
    assert counts.min() == 2 and counts.max() <= 3 + 1


def test_batch_size_only_divides_the_same_samples(data):
    small = take(4, data, batch=2)
    joined = [Batch(*map(np.concatenate, zip(*small[k : k + 2], strict=True))) for k in (0, 2)]
    assert_same(joined, take(2, data, batch=4))


def test_resume_goes_on_exactly(data):
    assert_same(take(4, data, start_sample=3 * BATCH), take(7, data)[3:])


def test_an_epoch_has_every_clip_once_and_its_own_order(data):
    drawn = np.concatenate([clip_numbers(batch.source) for batch in take(COUNT, data)])[: 4 * COUNT].reshape(4, COUNT)
    for epoch in drawn:
        assert sorted(epoch) == list(range(COUNT))
    assert len({tuple(epoch) for epoch in drawn}) > 1
    again = np.concatenate([frame_numbers(batch.history)[:, 0] for batch in take(COUNT, data)]).reshape(4, COUNT)
    by_clip = [again[epoch][np.argsort(drawn[epoch])] for epoch in range(4)]
    assert any((by_clip[0] != other).any() for other in by_clip[1:])  # windows are drawn anew, too


def test_seeds_differ(data):
    assert any((one.target != other.target).any() for one, other in zip(take(3, data), take(3, data, seed=4), strict=True))


def test_a_corrupt_record_is_replaced_and_nothing_else_changes(tmp_path, data, caplog):
    write(tmp_path, [make_clip(number) for number in range(COUNT)])
    flip_bytes(clips.shard_path(tmp_path, split="train", shard=0, shards=2), b"clip-4")
    damaged = dataclasses.replace(data, path=str(tmp_path), corrupt_limit=0.5)
    whole = take(2 * COUNT, data)
    with caplog.at_level(logging.WARNING):
        replaced = take(2 * COUNT, damaged)
    warnings = [record.getMessage() for record in caplog.records if record.name == loader.__name__]
    assert len(warnings) == 1 and f"1 of {COUNT} so far" in warnings[0] and "record 2 of" in warnings[0]  # the third of the first shard
    assert_same(take(2 * COUNT, damaged, threads=4), replaced)
    hit = 0
    for one, other in zip(whole, replaced, strict=True):
        for sample, was in enumerate(clip_numbers(one.source)):
            if was == 4:
                hit += 1
                assert clip_numbers(other.source)[sample] != 4
                assert (frame_numbers(other.target)[sample] == frame_numbers(other.driving)[sample]).all()
            else:
                assert_same([Batch(*(part[sample] for part in one))], [Batch(*(part[sample] for part in other))])
    assert hit == 8


@pytest.mark.parametrize(("workers", "cache"), [(0, False), (2, False), (0, True), (2, True)])
def test_too_many_corrupt_records_stop_the_run(tmp_path, data, workers, cache):
    data = dataclasses.replace(data, path=str(tmp_path), workers=workers, cache=cache)
    write(tmp_path, [make_clip(number) for number in range(COUNT)])
    flip_bytes(clips.shard_path(tmp_path, split="train", shard=0, shards=2), b"clip-4")
    with pytest.raises(video.MediaError, match=rf"1 of {COUNT} records .* more than data.corrupt_limit=0.01 allows.*record 2 of"):
        take(2 * COUNT, data)
    take(2 * COUNT, dataclasses.replace(data, corrupt_limit=1 / COUNT))


def test_too_many_short_clips_are_not_called_corrupt(tmp_path, data):
    write(tmp_path, [make_clip(number, frames=6 if number == 3 else FRAMES) for number in range(COUNT)])
    needed = rf"1 of {COUNT} records .*; the last: clip clip-3 .* has 6 frames; .* need 7: make clips of no fewer .prepare's --rules.min-frames"
    with pytest.raises(ConfigError, match=needed) as error:
        take(2 * COUNT, dataclasses.replace(data, path=str(tmp_path)))
    assert "corrupt_limit" in one_line(error) and "corrupt record" not in str(error.value)


def test_where_all_but_the_first_are_too_short_it_is_told(tmp_path, data):
    write(tmp_path, [make_clip(number, frames=6 if number else FRAMES) for number in range(COUNT)])
    with pytest.raises(ConfigError, match="has 6 frames; .* need 7"):
        take(2 * COUNT, dataclasses.replace(data, path=str(tmp_path), corrupt_limit=1.0), seed=1)


def test_regions_are_jittered_in_training_alone(data):
    jittered = dataclasses.replace(data, region_jitter=0.05)
    plain, moved, again = take(2, data), take(2, jittered), take(2, jittered)
    assert_same(moved, again)
    for one, other in zip(plain, moved, strict=True):
        assert (one.target == other.target).all() and (one.source == other.source).all()
        assert ((one.driving > 0) != (other.driving > 0)).any()
    clip = make_clip(0)
    np.testing.assert_array_equal(loader.whole_clip(clip, jittered)[1], loader.whole_clip(clip, data)[1])


def test_a_clip_without_a_driver_asks_for_pairs(tmp_path, data):
    write(tmp_path, [clips.without_driver(make_clip(number)) for number in range(COUNT)])
    with pytest.raises(ConfigError, match="has no driver yet; `python -m svdp_jax.data.pairs`"):
        loader.batches(dataclasses.replace(data, path=str(tmp_path)), split="train", seed=0, batch=1)


def test_a_short_clip_among_others_is_replaced(tmp_path, data, caplog):
    write(tmp_path, [make_clip(number, frames=6 if number == 3 else FRAMES) for number in range(COUNT)])
    with caplog.at_level(logging.WARNING):
        batches = take(COUNT, dataclasses.replace(data, path=str(tmp_path), corrupt_limit=0.5))
    assert 3 not in np.concatenate([clip_numbers(batch.source) for batch in batches])
    assert any(record.getMessage().startswith("clip that does not suit skipped") and "clip-3" in record.getMessage() for record in caplog.records)


def test_records_that_are_all_bad_are_an_error(tmp_path, data, monkeypatch):
    monkeypatch.setattr(video, "encode", lambda frames, **_: b"no mp4")
    write(tmp_path, [make_clip(number) for number in range(2)])
    with pytest.raises(ConfigError, match="none of the first records can be read") as error:
        loader.batches(dataclasses.replace(data, path=str(tmp_path)), split="train", seed=0, batch=1)
    one_line(error)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"frames": 12}, "has 14 frames; data.history=2, data.frames=12 and a source need 15"),
        ({"size": 48}, "frames of 32 pixels; data.size=48"),
        ({"fps": 30.0}, "has 25 frames per second; set data.fps"),
    ],
)
def test_a_dataset_that_does_not_suit_is_told_at_once(data, change, problem):
    with pytest.raises(ConfigError, match=problem) as error:
        loader.batches(dataclasses.replace(data, **change), split="train", seed=0, batch=1)
    assert data.path in one_line(error)


def test_what_is_no_dataset_is_told_at_once(tmp_path, data):
    with pytest.raises(ConfigError, match="svdp_jax.data.synthetic --output"):
        loader.batches(dataclasses.replace(data, path=str(tmp_path / "absent")), split="train", seed=0, batch=1)
    with pytest.raises(ConfigError, match="data.path is not set"):
        loader.batches(DataConfig(), split="train", seed=0, batch=1)
    with pytest.raises(ConfigError, match=r"has the splits \['train'\], not 'validation'"):
        loader.batches(data, split="validation", seed=0, batch=1)


def test_whole_clip(data):
    clip = clips.open_clips(data.path, split="train")[1]
    source, driving, target = loader.whole_clip(clip, data)
    np.testing.assert_array_equal(source, clip.target[-1])
    np.testing.assert_array_equal(target, clip.target[:-1])
    boxes = faces.regions(clip.driver_landmarks[:-1], margin=data.region_margin)
    np.testing.assert_array_equal(driving, faces.mask_frames(clip.driver[:-1], boxes))
    np.testing.assert_array_equal(loader.whole_clip(clip, dataclasses.replace(data, driver_mask=False))[1], clip.driver[:-1])
    assert loader.whole_clip(clip, dataclasses.replace(data, size=16))[1].shape == (FRAMES - 1, 16, 16, 3)


WORKERS = """
import multiprocessing, os, signal, sys
from svdp_jax.config import DataConfig
from svdp_jax.data import loader

if __name__ == "__main__":
    config = DataConfig(path=sys.argv[1], size=32, frames=4, history=1, workers=2, cache=bool(sys.argv[2:]))
    stream = loader.batches(config, split="train", seed=0, batch=2)
    next(stream)
    signal.signal(signal.SIGTERM, lambda *_: None)
    os.killpg(0, signal.SIGTERM)
    for _ in range(20):
        next(stream)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("flags", [[], ["cache"]])
def test_workers_end_with_their_process_and_not_before(data, tmp_path, flags):
    """A signal to the whole group, as Slurm sends it, is for the process that trains to answer."""
    (tmp_path / "script.py").write_text(WORKERS)
    variables = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, tmp_path / "script.py", data.path, *flags], capture_output=True, text=True, env=variables, start_new_session=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    workers = [pathlib.Path("/proc", number, "stat") for number in done.stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(worker.exists() and worker.read_text().split()[2] != "Z" for worker in workers):
        assert time.monotonic() < deadline, "processes are left over"
        time.sleep(0.1)
