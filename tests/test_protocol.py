"""Who is animated by whom: jobs for sample.py by both protocols, from videos and from a data set, and the whole way to a table with bundled weights."""

import csv
import json
import re
import subprocess
import sys
from fractions import Fraction

import imageio.v3 as iio
import numpy as np
import pytest
from conftest import ROOT

from svdp_jax.config import ConfigError
from svdp_jax.data import clips, detectors, synthetic, video
from svdp_jax.evaluation import __main__ as evaluation
from svdp_jax.evaluation import protocol


def run(monkeypatch, module, *flags):
    monkeypatch.setattr(sys, "argv", ["command", *map(str, flags)])
    module.main()


def jobs(folder):
    with (folder / "jobs.csv").open(newline="") as file:
        return [(row["source"], row["driving"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three people of 96 pixels, with landmarks: a stand-in for a corpus of cropped heads."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(3):
        clip = synthetic.pair("test", number, frames=9, size=96)
        video.write_video(folder / f"person{number}.mp4", iter(clip.target), fps=Fraction(25), metadata={})
        detectors.write_landmarks(folder / f"person{number}.npz", clip.target_landmarks)
    return folder


def test_of_videos_each_animates_its_own_first_frame_or_somebody_elses(videos, tmp_path, monkeypatch):
    run(monkeypatch, protocol, "--videos", videos, "--output", tmp_path / "self", "--protocol", "self")
    names = [f"person{number}" for number in range(3)]
    assert jobs(tmp_path / "self") == [(str(tmp_path / "self" / "sources" / f"{name}.png"), str(videos / f"{name}.mp4")) for name in names]
    portrait = iio.imread(tmp_path / "self" / "sources" / "person1.png")
    np.testing.assert_array_equal(portrait, next(video.read_frames(videos / "person1.mp4")))
    assert np.load(tmp_path / "self" / "sources" / "person1.npz")["landmarks"].shape == (1, 68, 2)
    run(monkeypatch, protocol, "--videos", videos, "--output", tmp_path / "cross", "--protocol", "cross")
    crossed = [(source.split("/")[-1][:-4], driver.split("/")[-1][:-4]) for source, driver in jobs(tmp_path / "cross")]
    assert sorted(source for source, _ in crossed) == [driver for _, driver in crossed] == names and all(source != driver for source, driver in crossed)


def test_of_a_data_set_clips_become_videos_and_nobody_animates_another_clip_of_the_same_video(tmp_path, monkeypatch):
    made = [clips.without_driver(synthetic.pair("test", number, frames=6, size=32))._replace(video=f"talk{number // 2}.mp4", start=number) for number in range(6)]
    clips.write_clips(made, tmp_path / "clips", split="validation", shard=0, shards=1)
    clips.finish(tmp_path / "clips")
    run(monkeypatch, protocol, "--clips", tmp_path / "clips", "--output", tmp_path, "--protocol", "cross")
    for source, driver in jobs(tmp_path):
        talk = [int(name.split("validation")[-1][:5]) // 2 for name in (source, driver)]
        assert talk[0] != talk[1]
    frames = np.stack(list(video.read_frames(tmp_path / "references" / "validation00003.mp4")))
    assert np.abs(frames.astype(int) - made[3].target).mean() < 6 and np.load(tmp_path / "references" / "validation00003.npz")["landmarks"].shape == (6, 68, 2)
    with (tmp_path / "clips.csv").open(newline="") as file:
        assert [row["video"] for row in csv.DictReader(file)] == [clip.video for clip in made]


def test_what_a_computer_leaves_among_videos_and_what_an_earlier_run_left_is_no_matter(videos, tmp_path, monkeypatch):
    for path in (*videos.glob("person*.mp4"), videos / "person0.npz"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "._person0.mp4").write_bytes(b"of macOS")
    run(monkeypatch, protocol, "--videos", tmp_path, "--output", tmp_path / "out", "--protocol", "self")
    assert [name for name in jobs(tmp_path / "out") if "._" in name[0]] == [] and (tmp_path / "out" / "sources" / "person0.npz").exists()
    (tmp_path / "person0.npz").unlink()
    run(monkeypatch, protocol, "--videos", tmp_path, "--output", tmp_path / "out", "--protocol", "self")
    assert not (tmp_path / "out" / "sources" / "person0.npz").exists()


@pytest.mark.parametrize("people", [[f"p{number}" for number in range(40)], [f"p{number // 2}" for number in range(40)], list("aabbbc"), list("ab")])
def test_nobody_is_animated_by_themselves(people):
    for seed in range(20):
        order = protocol.others(people, seed)
        assert sorted(order) == list(range(len(people))) and all(people[number] != people[place] for place, number in enumerate(order))


def test_what_cannot_be_crossed_is_said(tmp_path):
    with pytest.raises(ConfigError, match="3 of 5 videos show one person"):
        protocol.others(list("aaabc"), 0)
    with pytest.raises(ConfigError, match="has no video"):
        protocol.of_videos(tmp_path, None)


def test_a_person_of_several_videos_is_told_by_their_names(videos, tmp_path):
    page = (ROOT / "docs" / "evaluation.md").read_text()
    of_hdtf = re.search(r"--person '(RD_[^']+)'", page)[1].replace("\\|", "|")  # in a table
    for name in ("RD_Radio1_000", "RD_Radio11_000", "WDA_BobCasey0_000", "WDA_BobCasey1_003", "WRA_AdamKinzinger0_000"):
        (tmp_path / f"{name}.mp4").write_bytes((videos / "person0.mp4").read_bytes())
    found = [one.person for one in protocol.of_videos(tmp_path, None, of_hdtf)]
    assert found == ["RD_Radio11", "RD_Radio1", "WDA_BobCasey", "WDA_BobCasey", "WRA_AdamKinzinger"]
    assert len({one.person for one in protocol.of_videos(tmp_path, None)}) == 5
    with pytest.raises(ConfigError, match="finds nobody in the name of RD_Radio11_000.mp4"):
        protocol.of_videos(tmp_path, None, "W|RD_Radio1_")


@pytest.mark.slow
def test_from_whole_videos_to_jobs_of_other_people(videos, tmp_path, monkeypatch):
    rules = ["--rules.min-frames", "5", "--rules.min-face", "10", "--rules.min-sharpness", "0", "--size", "64"]
    prepare = [sys.executable, "-m", "svdp_jax.data.prepare", "--input", videos, "--output", tmp_path / "clips", "--validation", "0", *rules]
    subprocess.run(prepare, check=True)
    run(monkeypatch, protocol, "--clips", tmp_path / "clips", "--split", "train", "--output", tmp_path, "--protocol", "cross")
    assert len(jobs(tmp_path)) == 3
    with (tmp_path / "clips.csv").open(newline="") as file:
        assert {row["video"] for row in csv.DictReader(file)} == {f"person{number}.mp4" for number in range(3)}


@pytest.mark.slow
def test_from_a_folder_of_videos_to_a_table(videos, tmp_path, monkeypatch):
    """The commands of docs/evaluation.md, with the bundled weights."""
    run(monkeypatch, protocol, "--videos", videos, "--output", tmp_path, "--protocol", "self", "--limit", 2)
    sample = [sys.executable, "sample.py", "--jobs", tmp_path / "jobs.csv", "-o", tmp_path / "generated", "--no-align", "--no-concat"]
    subprocess.run(sample, check=True)
    run(monkeypatch, evaluation, "--generated", tmp_path / "generated", "--reference", videos, "--json", tmp_path / "out.json", "--report", tmp_path / "report.html")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["videos"] == 2 and (tmp_path / "report.html").exists()
