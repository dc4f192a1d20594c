"""Parts of a data set: whose fault a failure is, what is made anew, and what is left alone."""

import pathlib
import re
import shutil
from typing import NamedTuple

import pytest

from svdp_jax.config import ConfigError
from svdp_jax.data import clips, parts, synthetic
from svdp_jax.files import MediaError

PIECES = [f"{number}" for number in range(8)]


class Job(NamedTuple):
    folder: pathlib.Path
    number: int
    name: str
    broken: frozenset  # names of pieces that fail


def row(name, dropped=""):
    return {"name": name, "dropped": dropped, "note": "what it said", "thumbnail": ""}


def do(job):
    if job.name in job.broken:
        return parts.Failure(row(job.name, "failed"))
    clip = synthetic.pair("train", job.number, frames=2, size=16)
    return parts.write_part(job.folder, job.number, [(row(job.name), clips.serialize(clip))])


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(names of broken pieces) -> names of those that are kept; one process, which is this one."""
    monkeypatch.setattr(parts.workers, "in_processes", lambda function, jobs, workers: ((job, function(job)) for job in jobs))

    def call(broken=(), settings=None):
        work = parts.Parts(tmp_path / "made", "test", settings or {}, PIECES)
        if work.finished():
            return "complete"
        jobs = [Job(work.folder, number, PIECES[number], frozenset(broken)) for number in work.missing()]
        parts.work_through(work, jobs, do, share=parts.ALL, processes=1, sizes=[1] * len(PIECES), unit="piece")
        made = parts.finish(work, share=parts.ALL, title="", what="pieces", splits=lambda: {"train": range(len(PIECES))})
        return "".join(row["name"] for row in made[1] if not row["dropped"])

    call.directory = tmp_path / "made"
    return call


@pytest.mark.parametrize(("broken", "kept"), [("0", "1234567"), ("7", "0123456"), ("0123", "4567"), ("4567", "0123"), ("1234", "0567"), ("02467", "135")])
def test_where_others_work_a_failure_counts(run, broken, kept):
    assert run(broken) == kept


@pytest.mark.parametrize("broken", ["01234567", "01234", "234567"])
def test_many_in_a_row_are_the_machines_and_are_taken_up_again(run, broken):
    with pytest.raises(ConfigError, match=r"5 failed in a row .\d, \d, \d, \d, \d., and .*: what it said; mend that and run this again"):
        run(broken)
    assert run() == "01234567"


def test_what_fails_in_two_runs_is_given_up(run):
    with pytest.raises(ConfigError, match="5 failed in a row .0, 1, 2, 3, 4.,"):
        run("01234")
    assert run("01234") == "567"


def test_one_that_is_left_alone_is_tried_in_another_run(run):
    parts_of_it = parts.Parts(run.directory, "test", {}, PIECES)
    for number in range(7):
        do(Job(parts_of_it.folder, number, str(number), frozenset()))
    with pytest.raises(ConfigError, match="7 failed, and nothing else worked meanwhile"):
        run("7")
    assert run("7") == "0123456"


def test_a_part_that_is_there_stays(run):
    work = parts.Parts(run.directory, "test", {}, PIECES)
    do(Job(work.folder, 0, "0", frozenset()))
    assert parts.write_part(work.folder, 0, [(row("another"), None)]) == [row("0")]


def test_shards_of_other_parts_are_not_kept(run, monkeypatch):
    monkeypatch.setattr(parts, "SHARD_BYTES", 1)  # a shard for each
    assert run() == "01234567"
    whole = {path.name: path.read_bytes() for path in run.directory.glob("clips-*")}
    shutil.rmtree(run.directory)

    def gone(*_):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(clips, "finish", gone)  # the machine goes when all shards are written
        run("7")
    (run.directory / ".parts" / "000007.part").unlink()
    assert len(list(run.directory.glob("clips-*"))) == 7 and run() == "01234567"
    assert {path.name: path.read_bytes() for path in run.directory.glob("clips-*")} == whole


def test_shards_that_are_there_need_no_room(run, monkeypatch):
    monkeypatch.setattr(parts, "SHARD_BYTES", 1)
    write_records = clips.write_records
    with monkeypatch.context() as patch, pytest.raises(MediaError):

        def full_after_six(records, path, **options):
            if path.name.startswith("clips-") and "00006-of" in path.name:
                raise MediaError("full")
            write_records(records, path, **options)

        patch.setattr(clips, "write_records", full_after_six)
        run()
    shards = [path.stat().st_size for path in run.directory.glob("clips-*")]
    room = lambda free: monkeypatch.setattr(parts.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, free))
    (run.directory / ".clips-train.x.partial").write_bytes(b"left behind")
    room(0)
    with pytest.raises(ConfigError, match="has 0.0 GB free"):
        run()
    room(sum(shards) // 2)  # of six shards; two are missing
    assert run() == "01234567" and not list(run.directory.glob(".clips*"))


def test_a_part_that_is_damaged_inside_is_made_anew(run):
    work = parts.Parts(run.directory, "test", {}, PIECES)
    jobs = [Job(work.folder, number, name, frozenset()) for number, name in enumerate(PIECES)]
    for job in jobs:
        do(job)
    path = work.folder / "000003.part"
    data = bytearray(path.read_bytes())
    place = data.index(b"mdat")
    data[place + 10 : place + 50] = bytes(40)
    path.write_bytes(data)
    with pytest.raises(MediaError, match="the part of 3 is damaged; run the command again"):
        run()
    assert run() == "01234567"


def test_data_sets_of_others_are_left_alone(run, dataset, tmp_path):
    with pytest.raises(ConfigError, match="holds another data set, which `test` has not made"):
        parts.Parts(dataset, "test", {}, PIECES)
    run()
    assert run() == "complete"
    with pytest.raises(ConfigError, match="holds another data set, which `pairs` has not made"):
        parts.Parts(run.directory, "pairs", {}, PIECES)


def test_settings_that_cannot_be_kept_or_read_are_one_line(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MediaError, match=re.escape(f"{tmp_path / 'file' / 'test.json'}: cannot be written")):
        parts.Parts(tmp_path / "file", "test", {}, PIECES)
    run.directory.mkdir()
    (run.directory / "test.json").write_text("")  # of a machine that lost its power
    with pytest.raises(ConfigError, match="test.json is damaged"):
        run()


def test_without_locks_one_machine_puts_it_together(run, monkeypatch, capsys):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(parts.fcntl, "flock", none)
    work = parts.Parts(run.directory, "test", {}, PIECES)
    assert parts.finish(work, share=parts.Share(0, 2), title="", what="pieces", splits=dict) is None
    assert "file system without locks: when all are, run the command once more, without --shard" in capsys.readouterr().out
    assert run() == "01234567"
