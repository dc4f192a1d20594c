"""The record format: what is written comes back, through us and through tensorflow-datasets, and damage is told in one line."""

from fractions import Fraction

import numpy as np
import pytest
import tensorflow_datasets as tfds

from svdp_jax.config import ConfigError
from svdp_jax.data import clips, video

FRAMES, SIZE, POINTS = 6, 32, 68


def make_clip(number: int, *, frames: int = FRAMES, points: int = POINTS) -> clips.Clip:
    """Smooth frames, so that compression is nearly exact; landmarks are arbitrary."""
    rng = np.random.default_rng(number)
    ramp = np.linspace(0, 1, SIZE)
    shade = 40 + 20 * number + 60 * ramp[:, None, None] + 60 * ramp[None, :, None] + rng.uniform(0, 20, 3)
    target = np.stack([shade + 3 * i for i in range(frames)]).astype(np.uint8)
    landmarks = rng.uniform(0, SIZE, (2, frames, points, 2)).astype(np.float32)
    return clips.Clip(f"clip-{number}", 25.0, target, 255 - target, *landmarks)


@pytest.fixture
def dataset(tmp_path):
    for shard in range(2):
        clips.write_clips([make_clip(2 * shard), make_clip(2 * shard + 1)], tmp_path, split="train", shard=shard, shards=2)
    clips.write_clips([make_clip(7)], tmp_path, split="validation", shard=0, shards=1)
    assert clips.finish(tmp_path) == {"train": 4, "validation": 1}
    return tmp_path


def flip_bytes(path, marker: bytes):
    """Damage the record that holds `marker`, and only that one."""
    content = bytearray(path.read_bytes())
    place = content.index(marker)
    content[place : place + len(marker)] = bytes(255 - byte for byte in marker)
    path.write_bytes(content)


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_round_trip(dataset):
    source = clips.open_clips(dataset, split="train")
    assert len(source) == 4
    for number in range(4):
        written, read = make_clip(number), source[number]
        assert (read.id, read.fps) == (written.id, written.fps)
        assert read.target.dtype == read.driver.dtype == np.uint8
        for name in ("target", "driver"):
            coded = video.decode(video.encode(getattr(written, name), fps=Fraction(25), crf=clips.CRF))
            np.testing.assert_array_equal(getattr(read, name), coded, err_msg=name)
        np.testing.assert_array_equal(read.target_landmarks, written.target_landmarks)
        np.testing.assert_array_equal(read.driver_landmarks, written.driver_landmarks)
    assert [clip.id for clip in clips.open_clips(dataset, split="validation")] == ["clip-7"]


def test_what_can_be_read_is_read(dataset, monkeypatch):
    source, read = clips.open_clips(dataset, split="train"), clips.Clips.__getitem__
    broken = {0, 2}

    def item(self, number):
        if number in broken:
            raise video.MediaError(f"record {number} is damaged")
        return read(self, number)

    monkeypatch.setattr(clips.Clips, "__getitem__", item)
    assert next(source.readable()).id == read(source, 1).id
    assert [clip.id for clip in source.readable([2, 3, 0])] == [read(source, 3).id]
    with pytest.raises(video.MediaError, match="no clip can be read; the last: record 2 is damaged"):
        next(source.readable([0, 2]))


def test_records_are_nearly_lossless(dataset):
    read = clips.open_clips(dataset, split="train")[0]
    for name in ("target", "driver"):
        error = getattr(read, name).astype(int) - getattr(make_clip(0), name)
        assert np.abs(error).mean() < 1 and np.abs(error).max() <= 6, name


def test_is_an_ordinary_tfds_dataset(dataset):
    builder = tfds.builder_from_directory(dataset)
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {"train": 4, "validation": 1}
    record = builder.as_data_source(split="train")[3]
    assert set(record) == set(clips.Clip._fields)
    assert record["id"] == b"clip-3" and record["fps"] == 25.0
    assert record["target_landmarks"].shape == (FRAMES, POINTS, 2)
    np.testing.assert_array_equal(video.decode(record["target"]), clips.open_clips(dataset, split="train")[3].target)


def test_a_split_can_be_added_later(dataset):
    clips.write_clips([make_clip(8)], dataset, split="test", shard=0, shards=1)
    assert clips.finish(dataset) == {"train": 4, "validation": 1, "test": 1}
    assert clips.open_clips(dataset, split="test")[0].id == "clip-8"


def test_a_shard_appears_only_when_whole(tmp_path):
    def interrupted():
        yield make_clip(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        clips.write_clips(interrupted(), tmp_path, split="train", shard=0, shards=1)
    assert list(tmp_path.iterdir()) == []


def test_finish_names_missing_shards(tmp_path):
    with pytest.raises(ConfigError, match="no shards"):
        clips.finish(tmp_path)
    clips.write_clips([make_clip(0)], tmp_path, split="train", shard=1, shards=3)
    with pytest.raises(ConfigError, match=r"lacks shards 0, 2 of 3 of train") as error:
        clips.finish(tmp_path)
    one_line(error)
    clips.write_clips([make_clip(0)], tmp_path, split="train", shard=0, shards=1)
    with pytest.raises(ConfigError, match="both in 1 and in 3 shards"):
        clips.finish(tmp_path)


def test_opening_what_is_no_dataset(dataset, tmp_path):
    for directory, problem in ((tmp_path / "absent", "is no directory"), (dataset.parent / "empty", "holds no dataset")):
        if "empty" in directory.name:
            directory.mkdir()
        with pytest.raises(ConfigError, match=problem) as error:
            clips.open_clips(directory, split="train")
        message = one_line(error)
        assert str(directory) in message and f"python -m svdp_jax.data.synthetic --output {directory}" in message
        assert "python -m svdp_jax.data.prepare" in message


def test_opening_an_absent_split(dataset):
    with pytest.raises(ConfigError, match=r"\['train', 'validation'\], not 'tset'") as error:
        clips.open_clips(dataset, split="tset")
    assert str(dataset) in one_line(error)


def test_opening_a_dataset_cut_off_before_finish(dataset):
    (dataset / "dataset_info.json").unlink()
    with pytest.raises(ConfigError, match="was cut off while being written") as error:
        clips.open_clips(dataset, split="train")
    assert "svdp_jax.data.synthetic" in one_line(error)


def test_opening_unreadable_metadata(dataset):
    (dataset / "features.json").write_text("{")
    with pytest.raises(ConfigError, match="unreadable metadata") as error:
        clips.open_clips(dataset, split="train")
    one_line(error)


@pytest.mark.parametrize("damage", ["cut", "emptied", "deleted"])
def test_opening_a_damaged_shard(dataset, damage):
    path = clips.shard_path(dataset, split="train", shard=1, shards=2)
    if damage == "deleted":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if damage == "cut" else 0])
    with pytest.raises(ConfigError, match="gone or cut off") as error:
        clips.open_clips(dataset, split="train")
    assert path.name in one_line(error)
    assert len(clips.open_clips(dataset, split="validation")) == 1  # the other split is as it was


def test_a_corrupt_record_raises_and_spares_its_neighbours(dataset):
    flip_bytes(clips.shard_path(dataset, split="train", shard=1, shards=2), b"clip-2")
    source = clips.open_clips(dataset, split="train")
    with pytest.raises(video.MediaError, match="record 2 of") as error:
        source[2]
    one_line(error)
    assert [source[number].id for number in (0, 1, 3)] == ["clip-0", "clip-1", "clip-3"]


def test_a_video_that_cannot_be_decoded_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "encode", lambda frames, **_: b"no mp4")
    clips.write_clips([make_clip(0)], tmp_path, split="train", shard=0, shards=1)
    clips.finish(tmp_path)
    with pytest.raises(video.MediaError, match="record 0 of"):
        clips.open_clips(tmp_path, split="train")[0]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"target": np.zeros((FRAMES, SIZE, SIZE, 3), np.float32)}, "target frames float32"),
        ({"target": np.zeros((FRAMES, SIZE, SIZE + 2, 3), np.uint8)}, "must be square"),
        ({"driver": np.zeros((FRAMES - 1, SIZE, SIZE, 3), np.uint8)}, "driver frames"),
        ({"target_landmarks": np.zeros((FRAMES, 5, 2), np.float32)}, "driver_landmarks"),
        ({"driver_landmarks": np.zeros((FRAMES - 1, POINTS, 2), np.float32)}, "driver_landmarks"),
        ({"driver_landmarks": np.full((FRAMES, POINTS, 2), np.nan, np.float32)}, "must be finite"),
    ],
)
def test_writing_a_clip_that_does_not_fit_together(tmp_path, change, problem):
    with pytest.raises(ValueError, match=problem) as error:
        clips.write_clips([make_clip(0)._replace(**change)], tmp_path, split="train", shard=0, shards=1)
    assert "clip-0" in one_line(error)


def test_writing_two_kinds_of_landmarks(tmp_path):
    with pytest.raises(ValueError, match="clip-1 has 478 landmarks, the ones before it have 68"):
        clips.write_clips([make_clip(0), make_clip(1, points=478)], tmp_path, split="train", shard=0, shards=1)


def test_a_clip_without_a_driver_stays_one(tmp_path):
    clip = clips.without_driver(make_clip(0))._replace(video="people/one.mp4", start=2.5)
    clips.write_clips([clip], tmp_path, split="train", shard=0, shards=1)
    clips.finish(tmp_path)
    read = clips.open_clips(tmp_path, split="train")[0]
    assert not read.has_driver and read.driver.shape == (0, *read.target.shape[1:]) and (read.video, read.start) == (clip.video, clip.start)
    np.testing.assert_array_equal(read.target_landmarks, clip.target_landmarks)


def test_a_stored_clip_decodes_what_is_asked_for(tmp_path):
    clips.write_clips([make_clip(0)], tmp_path, split="train", shard=0, shards=1)
    clips.finish(tmp_path)
    dataset = clips.open_clips(tmp_path, split="train")
    stored, whole = dataset.stored(0), dataset[0]
    assert len(stored.target) == len(whole.target)
    np.testing.assert_array_equal(stored.driver[[3, 1]], whole.driver[[3, 1]])
