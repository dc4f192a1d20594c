"""prepare that is killed, cut off, or given videos that kill it: it ends in the same records as one straight run."""

import os
import random
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from prepared import RULES, SIZE, all_clips, records, rows, run, write

from svdp_jax.data import clips, parts, video

# What a video can do to a decoder: it ends the process that reads crash.mp4, and never comes back from hang.mp4.
DECODER = """
import os, time
import av
from svdp_jax.data import workers

def read(file, *arguments, **options):
    match os.path.basename(str(file)):
        case "crash.mp4":
            os.abort()
        case "hang.mp4":
            time.sleep(600)
    return opened(file, *arguments, **options)

opened, av.open, workers.HANGS = av.open, read, 3
"""


def test_videos_that_crash_or_hang_their_decoder_stop_nothing(tmp_path):
    for name in "crash", "good", "hang", "other":
        write(tmp_path / "videos" / f"{name}.mp4", [(len(name), 20)])
    (tmp_path / "patches").mkdir()
    (tmp_path / "patches" / "sitecustomize.py").write_text(DECODER)
    said = ended(start(tmp_path / "videos", tmp_path / "clips", patches=tmp_path / "patches"))
    assert [(row["name"], row["dropped"]) for row in rows(tmp_path / "clips")] == [
        ("crash.mp4", "cannot be read"), ("good.mp4#000000", ""), ("hang.mp4", "cannot be read"), ("other.mp4#000000", "")
    ]  # fmt: skip
    assert {row["note"] for row in rows(tmp_path / "clips") if row["dropped"]} == {"its process died or hung, twice"}
    assert "100%" in said and "4 pieces" in said and "2 clips kept, 2 dropped" in said and "<00:00" in said, "a progress bar with the time left"



COMMAND = [sys.executable, "-m", "svdp_jax.data.prepare", "--size", str(SIZE), *RULES, "--workers", "2"]


def start(videos, output, *flags, patches=""):
    variables = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{patches}", "SVDP_FACE_LANDMARKER": ""}
    command = [*COMMAND, "--input", videos, "--output", output, *flags]
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process):
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def killed(videos, output, *, after, rng):
    """Starts the command and kills it at a random moment behind its part number `after`, or -1: while shards are written. Returns the number of
    parts that were there, -1 where there was a shard; None where the command was quicker."""
    process = start(videos, output)
    count = lambda: len(list((output / ".parts").glob("*.part")))
    shards = lambda: list(output.glob("clips-*")) + list(output.glob(".clips-*.partial"))
    while process.poll() is None and not (shards() if after < 0 else count() >= after):
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.15) if after >= 0 else 0)
    process.kill()
    done, said = process.wait() == 0, -1 if shards() else count()
    process.stdout.close()
    return None if done else said


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_ends_in_the_same_records(straight, videos, tmp_path, kills):
    output, rng, points = tmp_path / "clips", random.Random(kills), []
    while len(points) < kills:
        last = points[-1] if points else 0
        left = kills - len(points)
        after = -1 if left <= kills // 5 else rng.randint(last, min(last + 1 + 9 // kills, 10))  # the last ones while shards are written
        point = killed(videos, output, after=after, rng=rng)
        if point is None:
            shutil.rmtree(output)  # it was quicker: all begins anew
            points.clear()
        else:
            points.append(point)
    print(f"killed with so many of 11 parts there, -1 with shards: {points}")
    assert any(0 < point < 11 for point in points)
    ended(start(videos, output))
    assert records(output) == records(straight)
    assert (output / "report.csv").read_text() == (straight / "report.csv").read_text()
    assert not list(output.glob(".*")), "nothing is left behind"


def test_machines_that_work_at_once_end_in_the_same_records(straight, videos, tmp_path):
    output = tmp_path / "clips"
    machines = [start(videos, output, "--shard", f"{index}/3") for index in (0, 1, 2, 2)]  # and one was started twice
    said = "".join(map(ended, machines))
    assert "next: python -m svdp_jax.data.pairs" in said and records(output) == records(straight)
    assert "is complete" in ended(start(videos, output)) and not list(output.glob(".parts*"))


@pytest.mark.filterwarnings("ignore:no landmarker given")
def test_a_part_that_comes_late_or_is_damaged_is_no_trouble(straight, videos, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SVDP_FACE_LANDMARKER", "")
    output = tmp_path / "clips"
    run(output, videos, flags=["--shard", "0/2"])
    (output / ".parts" / "000002.part").write_bytes(b"")  # lost with the machine
    run(output, videos, flags=["--shard", "1/2"])
    assert "1 of 11 videos are not" in capsys.readouterr().out
    run(output, videos)
    assert records(output) == records(straight)
    parts.write_part(output / ".parts", 3, [({"name": "late", "dropped": "", "note": "", "thumbnail": ""}, b"record")])
    capsys.readouterr()
    run(output, videos)
    assert "is complete" in capsys.readouterr().out and not (output / ".parts").exists() and records(output) == records(straight)


@pytest.mark.filterwarnings("ignore:no landmarker given")
def test_a_full_disk_is_one_line(videos, tmp_path, monkeypatch):
    def full(self, record):
        raise RuntimeError("write() failed: No space left on device")

    writer = type("Writer", (), {"__init__": lambda self, *_: None, "write": full, "is_open": lambda self: False})
    monkeypatch.setattr(clips.array_record_module, "ArrayRecordWriter", writer)
    with pytest.raises(video.MediaError, match="a.part: cannot be written .write.. failed: No space left on device.; is the disk full"):
        clips.write_records([b"record"], tmp_path / "a.part")
    assert not list(tmp_path.iterdir())


def test_being_cut_off_while_shards_are_written_loses_nothing(straight, videos, tmp_path, monkeypatch):
    monkeypatch.setenv("SVDP_FACE_LANDMARKER", "")
    monkeypatch.setattr(parts, "SHARD_BYTES", 20_000)
    written, write_records = [], clips.write_records

    def dies_at_the_third(records, path):
        if path.name.startswith("clips-"):
            if len(written) == 2:
                raise MemoryError("gone")
            written.append(path)
        write_records(records, path)

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="no landmarker"), pytest.raises(MemoryError):
        patch.setattr(clips, "write_records", dies_at_the_third)
        run(tmp_path / "clips", videos)
    kept = [path.stat().st_mtime_ns for path in written]
    with pytest.warns(UserWarning, match="no landmarker"):
        run(tmp_path / "clips", videos)
    assert [path.stat().st_mtime_ns for path in written] == kept, "what was there is not written again"
    one, other = all_clips(tmp_path / "clips"), all_clips(straight)
    assert list(one) == list(other) and len(records(tmp_path / "clips")) > 4
    assert all((one[name].target == other[name].target).all() for name in one)
