"""The record format: pairs of clips in ArrayRecord shards, which tensorflow-datasets reads as any other dataset.

In and out: `Clip`, two portraits in the same motion, frames [N,H,W,3] and landmarks [N,K,2] each; one that has no driver yet
has 0 frames of it. On disk a dataset is

    DIRECTORY/clips-{split}.array_record-{shard:05d}-of-{shards:05d}    one record per clip; frames are mp4 (H.264) bytes
    DIRECTORY/dataset_info.json, features.json                          written last, by `finish`: without them it is no dataset

TensorFlow is not needed, neither to write nor to read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from google.protobuf.message import DecodeError
from jaxtyping import Float, UInt8
from tensorflow_datasets.core import example_serializer

from svdp_jax import files
from svdp_jax.config import ConfigError
from svdp_jax.data import video

NAME = "clips"
CRF = 10  # visually lossless: the model should not learn the marks of a codec
MAKE = "make one with `python -m svdp_jax.data.synthetic --output {0}` or `python -m svdp_jax.data.prepare --output {0} --input VIDEOS`"

FEATURES = tfds.features.FeaturesDict(
    {
        "id": tfds.features.Text(),
        "video": tfds.features.Text(),
        "start": np.float64,
        "fps": np.float64,
        "target": tfds.features.Tensor(shape=(), dtype=np.object_),  # mp4
        "driver": tfds.features.Tensor(shape=(), dtype=np.object_),  # mp4
        "target_landmarks": tfds.features.Tensor(shape=(None, None, 2), dtype=np.float32, encoding="bytes"),
        "driver_landmarks": tfds.features.Tensor(shape=(None, None, 2), dtype=np.float32, encoding="bytes"),
    }
)
_SERIALIZER = example_serializer.ExampleSerializer(FEATURES.get_serialized_info())


class Clip(NamedTuple):
    """Two people in the same motion, frame by frame. Landmarks are pixels (x, y), pixel centres at integers."""

    id: str
    fps: float  # frames per second
    target: UInt8[np.ndarray, "N H W 3"] | Frames  # the real clip, RGB
    driver: UInt8[np.ndarray, "N H W 3"] | Frames  # the other person; 0 frames where there is none yet
    target_landmarks: Float[np.ndarray, "N K 2"]
    driver_landmarks: Float[np.ndarray, "N K 2"]
    video: str = ""  # that it was cut from; other videos are taken to show other people
    start: float = 0.0  # seconds, in that video

    @property
    def has_driver(self) -> bool:
        return len(self.driver_landmarks) > 0


class Frames:
    """Frames of a stored clip, decoded when they are asked for, by a list of their numbers."""

    def __init__(self, mp4: bytes, count: int):
        self.mp4 = mp4
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, numbers: Sequence[int]) -> UInt8[np.ndarray, "N H W 3"]:
        return video.decode(self.mp4, numbers)


def without_driver(clip: Clip) -> Clip:
    """`clip` with its target alone."""
    return clip._replace(driver=clip.target[:0], driver_landmarks=clip.target_landmarks[:0])


def shard_path(directory: str | os.PathLike, *, split: str, shard: int, shards: int) -> pathlib.Path:
    """Where `write_clips` puts shard number `shard` of `shards`."""
    return pathlib.Path(directory) / f"{NAME}-{split}.array_record-{shard:05d}-of-{shards:05d}"


def write_clips(clips: Iterable[Clip], directory: str | os.PathLike, *, split: str, shard: int, shards: int) -> pathlib.Path:
    """Write `clips` as one shard and return its path. The file appears only when it is whole, so that a run that was
    cut off may go on with the shards that are missing. After the last shard comes `finish`.

    A clip whose parts do not fit together (lengths, sizes, dtypes), or whose K differs from the first one's: ValueError."""

    def records() -> Iterator[bytes]:
        points = None
        for clip in clips:
            record = serialize(clip)
            points = points or clip.target_landmarks.shape[1]
            if clip.target_landmarks.shape[1] != points:
                raise ValueError(f"clip {clip.id} has {clip.target_landmarks.shape[1]} landmarks, the ones before it have {points}")
            yield record

    path = shard_path(directory, split=split, shard=shard, shards=shards)
    write_records(records(), path)
    return path


def write_records(records: Iterable[bytes], path: pathlib.Path, *, replace: bool = True) -> None:
    """An ArrayRecord file, which appears only when it is whole, and its folder; `replace=False` leaves one that is there by then. MediaError where it cannot be written."""
    with files.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(path, replace=replace) as partial:
        writing = lambda: files.writing(path, RuntimeError)  # of ArrayRecord
        with writing():
            # Records are read one by one, in any order; mp4 would not shrink any further.
            writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
        try:
            for record in records:
                with writing():
                    writer.write(record)
            with writing():
                writer.close()
        finally:
            if writer.is_open():
                with contextlib.suppress(RuntimeError):
                    writer.close()


def serialize(clip: Clip, *, target: bytes | None = None) -> bytes:
    """A record: the clip's frames as mp4, its landmarks and where it is from. Always the same bytes for the same clip. `target` is the mp4 of
    its target where it is stored already, and need not lose anything by being encoded again."""
    _check_clip(clip)
    fps = Fraction(clip.fps).limit_denominator(1001)
    record = {
        "id": clip.id,
        "video": clip.video,
        "start": clip.start,
        "fps": clip.fps,
        "target": target or video.encode(clip.target, fps=fps, crf=CRF),
        "driver": video.encode(clip.driver, fps=fps, crf=CRF) if clip.has_driver else b"",
        "target_landmarks": clip.target_landmarks,
        "driver_landmarks": clip.driver_landmarks if clip.has_driver else clip.target_landmarks[:1],  # tfds reads no empty array
    }
    return _SERIALIZER.get_tf_example(FEATURES.encode_example(record)).SerializeToString(deterministic=True)  # a map has no order of its own


def finish(directory: str | os.PathLike) -> dict[str, int]:
    """Write the metadata for all shards in `directory`, which makes it a dataset; returns clips per split.

    May be called again after another split was added. No shards, missing shards, or shards of two different
    divisions of a split: ConfigError."""
    directory = pathlib.Path(directory)
    found: dict[str, dict[int, list[int]]] = {}  # split -> shards -> shard numbers
    for path in sorted(directory.glob(f"{NAME}-*.array_record-*")):
        match = re.fullmatch(rf"{NAME}-(\w+)\.array_record-(\d{{5}})-of-(\d{{5}})", path.name)
        if match:
            found.setdefault(match[1], {}).setdefault(int(match[3]), []).append(int(match[2]))
    if not found:
        raise ConfigError(f"{directory} holds no shards; {MAKE.format(directory)}")
    splits, lengths = [], {}
    for split, divisions in found.items():
        if len(divisions) > 1:
            kinds = " and in ".join(map(str, sorted(divisions)))
            raise ConfigError(f"{directory} holds the split {split} both in {kinds} shards; delete those of one kind")
        shards, numbers = next(iter(divisions.items()))
        missing = sorted(set(range(shards)) - set(numbers))
        if missing:
            raise ConfigError(f"{directory} lacks shards {_short(missing)} of {shards} of {split}; run the command that writes them again")
        paths = [shard_path(directory, split=split, shard=shard, shards=shards) for shard in range(shards)]
        shard_lengths = [_records(path) for path in paths]
        for path, length in zip(paths, shard_lengths, strict=True):
            if length == 0:
                raise ConfigError(f"{path} has no records or is cut off; delete it and run the command that writes it again")
        lengths[split] = sum(shard_lengths)
        size = sum(path.stat().st_size for path in paths)
        template = tfds.core.ShardedFileTemplate(dataset_name=NAME, data_dir=directory, split=split, filetype_suffix="array_record")
        splits.append(tfds.core.SplitInfo(name=split, shard_lengths=shard_lengths, num_bytes=size, filename_template=template))
    with files.writing(directory / "dataset_info.json"):
        tfds.folder_dataset.write_metadata(
            data_dir=directory,
            features=FEATURES,
            split_infos=splits,
            filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            check_data=False,  # the check reads through TensorFlow
        )
    return lengths


class Clips:
    """The clips of one split, by number; made by `open_clips`. May be pickled and read from several threads."""

    def __init__(self, path: str, records: tfds.core.data_sources.base.BaseDataSource):
        self.path = path
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Clip:
        """Clip number `index`, decoded. A record that cannot be read: MediaError; no such record: IndexError."""
        clip = self.stored(index)
        with self._named(index):
            clip = clip._replace(target=clip.target[range(len(clip.target))])
            clip = clip._replace(driver=clip.driver[range(len(clip.driver))]) if clip.has_driver else without_driver(clip)
            _check_clip(clip)
        return clip

    def readable(self, numbers: Iterable[int] | None = None) -> Iterator[Clip]:
        """The clips of these numbers (all, if not given) that can be read. MediaError where none can be."""
        problem = found = None
        for number in range(len(self)) if numbers is None else numbers:
            try:
                found = self[number]
            except video.MediaError as error:
                problem = error
                continue
            yield found
        if found is None:
            raise video.MediaError(f"{self.path}: no clip can be read; the last: {problem}")

    def stored(self, index: int) -> Clip:
        """Clip number `index` with `Frames`, of which none is decoded yet. Errors as above; those of decoding come later."""
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        with self._named(index):
            record = self.records[index]
            driver_landmarks = record["driver_landmarks"] if record["driver"] else record["target_landmarks"][:0]
            return Clip(
                id=record["id"].decode(),
                fps=float(record["fps"]),
                target=Frames(record["target"], len(record["target_landmarks"])),
                driver=Frames(record["driver"], len(driver_landmarks)),
                target_landmarks=record["target_landmarks"],
                driver_landmarks=driver_landmarks,
                video=record["video"].decode(),
                start=float(record["start"]),
            )

    @contextlib.contextmanager
    def _named(self, index: int) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError, DecodeError) as error:  # of ArrayRecord, of video and _check_clip, of the record itself
            raise video.MediaError(f"record {index} of {self.path}: {error}") from error


def open_clips(directory: str | os.PathLike, *, split: str) -> Clips:
    """The clips of `split`, with len() and [i]. No dataset, no such split, or a shard that is gone or cut off: ConfigError."""
    directory = pathlib.Path(directory)
    builder = _builder(directory)
    if split not in builder.info.splits:
        raise ConfigError(f"data {directory} has the splits {sorted(builder.info.splits)}, not {split!r}; {MAKE.format(directory)}")
    info = builder.info.splits[split]
    for path, length in zip(info.filepaths, info.shard_lengths, strict=True):
        if _records(path) != length:
            raise ConfigError(f"{path} is gone or cut off, with {length} clips; delete it and run the command that wrote it again")
    return Clips(f"{directory} ({split})", builder.as_data_source(split=split))


def fingerprint(directory: str | os.PathLike) -> str:
    """A short hash of a data set: of what is written about it, and of the ends of its shards."""
    digest = hashlib.sha256()
    for path in sorted([pathlib.Path(directory) / "dataset_info.json", *pathlib.Path(directory).glob(f"{NAME}-*.array_record-*")]):
        with path.open("rb") as file:
            digest.update(file.read(2**16))
            file.seek(max(path.stat().st_size - 2**16, 0))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def splits(directory: str | os.PathLike) -> list[str]:
    """The splits of a data set. No dataset: ConfigError."""
    return sorted(_builder(pathlib.Path(directory)).info.splits)


def _builder(directory: pathlib.Path) -> tfds.core.DatasetBuilder:
    if not directory.is_dir():
        raise ConfigError(f"data {directory} is no directory; {MAKE.format(directory)}")
    if not (directory / "dataset_info.json").is_file():
        state = "was cut off while being written" if any(directory.glob(f"{NAME}-*.array_record-*")) else "holds no dataset"
        raise ConfigError(f"data {directory} {state}; {MAKE.format(directory)}")
    try:
        builder = tfds.builder_from_directory(directory)
    except Exception as error:  # tfds has no common type for what can be wrong with two JSON files
        raise ConfigError(f"data {directory} has unreadable metadata ({files.one_line(error)}); {MAKE.format(directory)}") from error
    if set(builder.info.features) != set(FEATURES):
        fields = sorted(builder.info.features)
        raise ConfigError(f"data {directory} has the fields {fields}, not {sorted(FEATURES)}; {MAKE.format(directory)}")
    return builder


def _check_clip(clip: Clip) -> None:
    shape = clip.target.shape
    if len(shape) != 4 or shape[0] == 0 or shape[1] != shape[2] or shape[3] != 3 or clip.target.dtype != np.uint8:
        raise ValueError(f"clip {clip.id} has target frames {clip.target.dtype}{list(shape)}; they must be square, uint8[N,H,H,3]")
    if clip.driver.shape != (shape if clip.has_driver else (0, *shape[1:])) or clip.driver.dtype != np.uint8:
        driver = f"{clip.driver.dtype}{list(clip.driver.shape)}"
        raise ValueError(f"clip {clip.id} has driver frames {driver}; those of the target are uint8{list(shape)}")
    points = clip.target_landmarks.shape[1:2]
    for name, landmarks, frames in (("target_landmarks", clip.target_landmarks, clip.target), ("driver_landmarks", clip.driver_landmarks, clip.driver)):
        if landmarks.shape != (len(frames), *points, 2) or not np.isfinite(landmarks).all():
            raise ValueError(f"clip {clip.id} has {name} {list(landmarks.shape)}; they must be finite, [{shape[0]},K,2], one K for both")


def _records(path: str | os.PathLike) -> int:
    """Records of a shard; 0 for a file that is gone or cut off."""
    if not os.path.isfile(path):
        return 0
    reader = array_record_module.ArrayRecordReader(str(path))
    if not reader.ok():  # closing it would raise, too
        return 0
    records = reader.num_records()
    reader.close()
    return records


def _short(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
