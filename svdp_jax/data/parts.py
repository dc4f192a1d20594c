"""A data set that is made in parts, by any number of processes and machines, each of which may be killed at any moment.

Work is a list of pieces (videos, clips). What a piece yields, records and rows of the report, is one file, which is whole or not
there; whoever finds all of them there puts the shards together. So a run that was cut off goes on with the pieces that are
missing, and ends in the same records as one that was not.

    DIRECTORY/{command}.json          what the records depend on: settings and pieces. Another run in the directory must have the same
    DIRECTORY/.parts/000123.part      ArrayRecord: the records of piece 123, its rows and its records' sizes as JSON; gone when all is done
    DIRECTORY/clips-*                 the data set (`data.clips`)
"""

from __future__ import annotations

import collections
import contextlib
import errno
import fcntl
import itertools
import json
import pathlib
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from array_record.python import array_record_module
from tqdm import tqdm

from svdp_jax import files
from svdp_jax.config import ConfigError
from svdp_jax.data import clips, report, workers
from svdp_jax.data.report import Row
from svdp_jax.files import MediaError

SHARD_BYTES = 2**28  # about so much goes into a shard; a record is never divided
PATIENCE = 5  # pieces in a row that may fail, until it is the machine that is mended


class Share(NamedTuple):
    """Which of the pieces are this machine's: every `count`-th, from number `index` on."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


class Job(Protocol):
    """A piece of work for another process."""

    number: int  # of the piece
    name: str


def read_share(text: str) -> Share:
    """`i/n` as a Share. ConfigError where it is none."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise ConfigError(f"--shard {text}: takes i/n, machine i of n, from 0/n to n-1/n")
    return Share(int(match[1]), int(match[2]))


def settle(path: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings of a data set to `path`; where they are there, they must be the same: ConfigError that names those that differ."""
    now = json.loads(json.dumps(settings))
    with files.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(path, replace=False) as mine:  # of machines that begin at once one is first, and the others see what it wrote
        mine.write_text(json.dumps(now, indent=1) + "\n")
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({files.one_line(error)}); use another --output") from error
    if before != now:
        changed = [_difference(name, before.get(name), now.get(name)) for name in before | now if before.get(name) != now.get(name)]
        raise ConfigError(f"{path.parent} was begun with {', '.join(changed)}; use the same, or another --output")


ALL = Share(0, 1)


class Parts:
    """The parts of a data set that `command` makes from `pieces`. ConfigError if the directory was begun with others, or with other settings, or
    holds a data set that something else has made."""

    def __init__(self, directory: pathlib.Path, command: str, settings: Mapping[str, Any], pieces: Sequence[str]):
        if (directory / "dataset_info.json").exists() and not (directory / f"{command}.json").exists():
            raise ConfigError(f"--output {directory} holds another data set, which `{command}` has not made; use another --output")
        settle(directory / f"{command}.json", {**settings, "pieces": list(pieces)})
        self.directory = directory
        self.folder = directory / ".parts"
        self.pieces = list(pieces)

    def of(self, share: Share) -> range:
        """The numbers of the pieces of this share."""
        return range(share.index, len(self.pieces), share.count)

    def missing(self, share: Share = ALL) -> list[int]:
        """Those that are still to do."""
        return [number for number in self.of(share) if not part_path(self.folder, number).exists()]

    def finished(self) -> bool:
        """Whether the data set and its report are there. Parts go only after that, so that it counts where some are missing; what is left of them
        (a late machine may have written one) goes now."""
        done = (self.directory / "dataset_info.json").is_file() and bool(self.missing())
        if done:
            self.remove()
        return done

    def rows(self, number: int) -> list[Row]:
        """What was written of piece `number`."""
        return self._tail(number, 2)

    def sizes(self, number: int) -> list[int]:
        """Bytes of each record of piece `number`."""
        return self._tail(number, 1)

    @contextlib.contextmanager
    def assembly(self) -> Iterator[bool]:
        """Only one process at a time puts the shards together. False where the file system has no locks to make sure of that."""
        with files.writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / "lock").open("w")
        with lock:
            locked, told = False, False
            while not locked:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    locked = True
                except OSError as error:
                    if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                        break
                    if not told:
                        print(f"waiting for another process, which puts {self.directory} together")
                    told = True
                    time.sleep(1)
            yield locked

    def drop_unreadable(self) -> None:
        """Parts that a machine has lost in a crash of its own are missing ones."""
        for number in range(len(self.pieces)):
            try:
                self.sizes(number)
            except (RuntimeError, ValueError):
                part_path(self.folder, number).unlink()

    def forget_shards(self) -> None:
        """Shards of an assembly that was cut off are not of the pieces that are still to do: where there are such, shards are written anew."""
        with self.assembly():
            if not (self.directory / "dataset_info.json").is_file():
                for shard in self.directory.glob(f"{clips.NAME}-*.array_record-*"):
                    shard.unlink()

    def assemble(self, splits: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Writes the shards, the records of each split's pieces in order, and the metadata; returns clips per split. May be cut off, too."""
        for left in self.directory.glob(f".{clips.NAME}-*.partial"):  # by a process that was killed here
            left.unlink()
        plan = {split: _divide(size for number in numbers for size in self.sizes(number)) for split, numbers in splits.items()}
        path_of = lambda split, shard: clips.shard_path(self.directory, split=split, shard=shard, shards=len(plan[split]))
        sizes = {path_of(split, shard): sum(contents) for split, shards in plan.items() for shard, contents in enumerate(shards)}
        needed, free = sum(size for path, size in sizes.items() if not path.exists()), shutil.disk_usage(self.directory).free
        if free < needed:
            raise ConfigError(f"{self.directory} has {free / 1e9:.1f} GB free; shards need {needed / 1e9:.1f} GB beside the parts; free some and run this again")
        with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="shards", dynamic_ncols=True, delay=2) as bar:
            for split, shards in plan.items():
                records = self._all_records(splits[split])
                for shard, contents in enumerate(shards):
                    path = path_of(split, shard)
                    taken = itertools.islice(records, len(contents))
                    if path.exists():
                        collections.deque(taken, maxlen=0)
                    else:
                        clips.write_records((read() for read in taken), path)
                    bar.update(sizes[path])
        return clips.finish(self.directory)

    def remove(self) -> None:
        """The parts, once they are in shards and in the report: at once, so that no cut-off removal looks like missing pieces."""
        gone = self.folder.with_name(f".parts.{uuid.uuid4().hex}.done")
        with contextlib.suppress(FileNotFoundError):
            self.folder.rename(gone)
        for left in self.directory.glob(".parts.*.done"):
            shutil.rmtree(left, ignore_errors=True)

    def _tail(self, number: int, place: int) -> Any:
        return _tail(part_path(self.folder, number), place)

    def _all_records(self, numbers: Sequence[int]) -> Iterator[Callable[[], bytes]]:
        """For each record a function that reads it: those of shards that are there need not be read."""
        for number in numbers:
            with _reader(part_path(self.folder, number)) as reader:
                for index in range(reader.num_records() - 2):
                    yield lambda reader=reader, number=number, index=index: self._read(reader, number, index)

    def _read(self, reader: array_record_module.ArrayRecordReader, number: int, index: int) -> bytes:
        try:
            return reader.read([index])[0]
        except RuntimeError as error:
            part_path(self.folder, number).unlink()
            raise MediaError(f"the part of {self.pieces[number]} is damaged; run the command again, which makes it anew") from error


class Failure(NamedTuple):
    """What a piece has yielded where the reason may be the machine's and not its own: a disk that is gone, too little memory, a broken
    program. No part is written of it yet."""

    row: Row


class _Failures:
    """Failures count, as rows, once another piece has been worked through in the same run, or if they were failures of an earlier run, too.
    PATIENCE of them in a row end the run, and the next one takes them up again."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.waiting: dict[int, Row] = {}
        self.works = False  # the machine, as another piece has shown

    def add(self, job: Job, row: Row) -> None:
        if self._mark(job.number).exists():
            self._count(job.number, row)
            return
        self.waiting[job.number] = row
        if len(self.waiting) == PATIENCE:
            self._stop()

    def worked(self, job: Job) -> None:
        self.works = True
        self._mark(job.number).unlink(missing_ok=True)
        self.end()

    def end(self) -> None:
        if self.waiting and not self.works:
            self._stop()
        for number, row in self.waiting.items():
            self._count(number, row)
        self.waiting.clear()

    def _count(self, number: int, row: Row) -> None:
        write_part(self.folder, number, [(row, None)])
        self._mark(number).unlink(missing_ok=True)

    def _stop(self) -> None:
        with files.writing(self.folder):
            self.folder.mkdir(exist_ok=True)
            for number in self.waiting:
                self._mark(number).touch()
        names, last = [row["name"] for row in self.waiting.values()], list(self.waiting.values())[-1]
        alone = f"{len(names)} failed in a row ({', '.join(names)})" if len(names) > 1 else f"{names[0]} failed"
        raise ConfigError(f"{alone}, and nothing else worked meanwhile: {last['note']}; mend that and run this again, which gives up on what fails then, too")

    def _mark(self, number: int) -> pathlib.Path:
        return part_path(self.folder, number).with_suffix(".failed")


def work_through(
    work: Parts, jobs: Sequence[Job], function: Callable[[Any], list[Row] | Failure], *, share: Share, processes: int, sizes: Sequence[int], unit: str
) -> None:
    """Calls `function`, which writes a part and returns its rows, or a Failure, for each of the missing pieces, under a progress bar.

    `sizes` says for every piece how much of the bar it is. A piece whose process dies twice is a Failure. ConfigError where it seems to
    be the machine that fails, and not the pieces. Ends early where another machine, with the same share, has finished the data set.
    """
    if jobs:
        work.forget_shards()
    own, failures = work.of(share), _Failures(work.folder)
    total, todo = sum(sizes[number] for number in own), sum(sizes[job.number] for job in jobs)
    kept = dropped = 0
    with tqdm(total=total, initial=total - todo, unit=unit, unit_scale=unit == "B", desc=f"{len(own)} pieces", dynamic_ncols=True) as bar:
        try:
            for job, result in workers.in_processes(function, jobs, workers=processes):
                if work.finished():
                    return
                if result is workers.DIED:
                    result = Failure({"name": job.name, "dropped": "cannot be read", "note": "its process died or hung, twice", "thumbnail": ""})
                if isinstance(result, Failure):
                    failures.add(job, result.row)
                else:
                    failures.worked(job)
                rows = [result.row] if isinstance(result, Failure) else result
                kept += sum(not row["dropped"] for row in rows)
                dropped += sum(bool(row["dropped"]) for row in rows)
                bar.update(sizes[job.number])
                bar.set_postfix_str(f"{kept} clips kept, {dropped} dropped")
            failures.end()
        except MediaError:
            if not work.finished():  # then it was the parts' folder that went
                raise


def finish(work: Parts, *, share: Share, title: str, what: str, splits: Callable[[], Mapping[str, Sequence[int]]]) -> tuple[dict[str, int], list[Row]] | None:
    """Puts the data set together and writes the report; returns clips per split and all rows, without thumbnails. None where pieces (`what`: videos,
    clips) of other shares are missing, or another machine was quicker. ConfigError, after the report, where no clip was kept."""
    with work.assembly() as locked:
        if work.finished():
            return None
        if not locked and share != ALL:
            print(f"share {share} is done; {work.directory} is on a file system without locks: when all are, run the command once more, without --shard")
            return None
        if not work.missing():
            work.drop_unreadable()
        if missing := work.missing():
            whose = "of other shares" if not work.missing(share) else "some of them damaged; run this again"
            print(f"share {share} is done; {len(missing)} of {len(work.pieces)} {what} are not, {whose}: who is last puts the data set together")
            return None
        rows = report.write(work.directory, (row for number in range(len(work.pieces)) for row in work.rows(number)), title=title)
        if all(row["dropped"] for row in rows):
            reasons = ", ".join(f"{count} {reason}" for reason, count in report.summary(rows).items() if count)
            raise ConfigError(f"no clip was kept ({reasons}): see {work.directory / 'report.html'}; change the input or the rules, and use another --output")
        lengths = work.assemble(splits())
        work.remove()
    return lengths, rows


def part_path(folder: pathlib.Path, number: int) -> pathlib.Path:
    """Where the part of piece `number` is in the folder of the parts."""
    return folder / f"{number:06d}.part"


def write_part(folder: pathlib.Path, number: int, yielded: Iterable[tuple[Row, bytes | None]]) -> list[Row]:
    """Writes what a piece yields: rows of the report, each with its record if it has one. Returns the rows without thumbnails.

    A part that is there, by another process with the same share, stays as it is: it may be read at this moment."""
    path, rows, sizes = part_path(folder, number), [], []
    if path.exists():
        return [row | {"thumbnail": ""} for row in _tail(path, 2)]

    def records() -> Iterator[bytes]:
        for row, record in yielded:
            rows.append(row)
            if record is not None:
                sizes.append(len(record))
                yield record
        yield json.dumps(rows).encode()
        yield json.dumps(sizes).encode()

    clips.write_records(records(), path, replace=False)
    return [row | {"thumbnail": ""} for row in rows]


def _tail(path: pathlib.Path, place: int) -> Any:
    with _reader(path) as reader:
        return json.loads(reader.read([reader.num_records() - place])[0])


@contextlib.contextmanager
def _reader(path: pathlib.Path) -> Iterator[array_record_module.ArrayRecordReader]:
    reader = array_record_module.ArrayRecordReader(str(path))
    if not reader.ok():  # closing it would raise, too
        raise ValueError(f"{path} cannot be read")
    try:
        yield reader
    finally:
        reader.close()


def _divide(sizes: Iterable[int]) -> list[list[int]]:
    """Records of these sizes, one after the other, in shards."""
    shards: list[list[int]] = []
    for size in sizes:
        if not shards or sum(shards[-1]) >= SHARD_BYTES:
            shards.append([])
        shards[-1].append(size)
    return shards


def _difference(name: str, before: Any, now: Any) -> str:
    if name == "points":
        return f"{before} landmarks per face"
    if name == "liveportrait":
        return f"LivePortrait at {before or 'an unknown commit'}"
    if name == "pieces":
        new, gone = sorted(set(now) - set(before)), sorted(set(before) - set(now))
        told = [f"{len(names)} {word} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" for names, word in ((new, "fewer"), (gone, "more")) if names]
        return f"other input, {' and '.join(told) or 'in another order'}"
    return f"--{name.replace('_', '-')} {before}" if name != "data" else "an --input that has changed since"
