"""pairs: LivePortrait, played by a stand-in, drives other people; what is not where the target is does not count."""

import csv
import os
import shutil

import cv2
import numpy as np
import pytest
import skimage.data

from svdp_jax import cli
from svdp_jax.config import ConfigError
from svdp_jax.data import augment, clips, detectors, faces, liveportrait, pairs, parts, synthetic, video

FRAMES, SIZE = 10, 128

# What LivePortrait's command line does, as far as it is used here, but for the animation: its "other person" is the driver in other colours.
STANDIN = """
import argparse, pathlib, sys
import numpy as np
from svdp_jax.data import detectors, video

parser = argparse.ArgumentParser()
parser.add_argument("-s"), parser.add_argument("-d"), parser.add_argument("-o", type=pathlib.Path)
for flag in ("relative_motion", "do_crop", "pasteback", "stitching", "crop_driving_video"):
    parser.add_argument(f"--no_flag_{flag}", action="store_true", required=True)
flags = parser.parse_args()
assert pathlib.Path("inference.py").is_file(), "LivePortrait runs in its own folder"
face, info = video.read_image(flags.s), video.probe(flags.d)
frames = np.stack(list(video.read_frames(flags.d)))
assert face.shape == frames.shape[1:], "the picture is in the same crop"
red, green, blue = face.reshape(-1, 3).mean(axis=0)
kind = ["shifted", "good", "broken"][int(np.argmax([red, green, blue]))] if max(red, green, blue) > 1.3 * min(red, green, blue) else "short"
with open("calls.txt", "a") as log:
    log.write(kind + "\\n")
if kind == "broken":
    print("loading weights")
    sys.exit("CUDA out of memory")
if kind == "short":
    frames = frames[1:]
if kind == "shifted":
    frames = np.roll(frames, SHIFT, axis=2)
flags.o.mkdir()
made = flags.o / f"{pathlib.Path(flags.s).stem}--{pathlib.Path(flags.d).stem}.mp4"
detectors.write_landmarks(made.with_suffix(".npz"), detectors.read_landmarks("landmarks.npz") + np.float32([SHIFT if kind == "shifted" else 0, 0]))
frames = np.repeat(frames, 2, axis=1).repeat(2, axis=2)  # its own size, not ours
video.write_video(made, 255 - frames, fps=info.fps, metadata={})
"""


@pytest.fixture(scope="module")
def people():
    """Clips of five videos: one person in one motion, in the light of five colours; each colour makes the stand-in do something else."""
    photo, made = skimage.data.astronaut()[20:212, 120:312], []
    corner = np.arange(FRAMES)[:, None, None] * np.float32([1, 2])  # of the part of the photo that is shown
    face = detectors.average_face() * np.float32(80) + np.float32([62, 40])  # about where it is in there
    landmarks = ((face - corner + 0.5) * (SIZE / 160) - 0.5).astype(np.float32)
    for name, tint in ("target", (1, 1, 1)), ("red", (1, 0.5, 0.5)), ("green", (0.5, 1, 0.5)), ("blue", (0.5, 0.5, 1)), ("grey", (0.9, 0.9, 0.9)):
        frames = [photo[2 * n : 2 * n + 160, n : n + 160].mean(axis=2, keepdims=True) for n in range(FRAMES)]
        frames = np.stack([cv2.resize((frame * tint).astype(np.uint8), (SIZE, SIZE), interpolation=cv2.INTER_AREA) for frame in frames])
        made.append(clips.Clip(name, 25.0, frames, frames[:0], landmarks, landmarks[:0], video=f"{name}.mp4"))
    return {clip.id: clip for clip in made}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, people):
    folder = tmp_path_factory.mktemp("LivePortrait")
    box = faces.face_box(people["target"].target_landmarks[0])
    (folder / "inference.py").write_text(STANDIN.replace("SHIFT", str(round(0.12 * (box[2] - box[0])))))
    detectors.write_landmarks(folder / "landmarks.npz", people["target"].target_landmarks)
    return folder


@pytest.fixture
def make(people, checkout, tmp_path, monkeypatch):
    """make(train=[names], validation=[names], *flags) -> (pairs by name, rows by name, what the stand-in did)."""
    monkeypatch.chdir(tmp_path)  # paths may be relative
    monkeypatch.setattr(detectors, "make_detector", lambda landmarker: None)  # the stand-in has its landmarks beside its videos

    def call(*flags, **splits):
        data = tmp_path / "clips"
        if not data.exists():
            for split, names in splits.items():
                clips.write_clips([people[name] for name in names], data, split=split, shard=0, shards=1)
            clips.finish(data)
        (checkout / "calls.txt").write_text("")
        given = ["--input", data, "--output", "pairs", "--liveportrait", os.path.relpath(checkout, tmp_path), "--landmarker", "face_landmarker.task", *flags]
        pairs.main(cli.parse(pairs.Flags(), list(map(str, given)), description="", prog=""))
        stored = {split: clips.open_clips(tmp_path / "pairs", split=split) for split in clips.splits(tmp_path / "pairs")}
        found = {f"{split}/{clip.id}": clip for split in stored for clip in map(stored[split].__getitem__, range(len(stored[split])))}
        return found, call.rows(), (checkout / "calls.txt").read_text().split()

    def rows():
        with (tmp_path / "pairs" / "report.csv").open() as file:
            return {row["name"]: row for row in csv.DictReader(file)}

    call.rows, call.data, call.output = rows, tmp_path / "clips", tmp_path / "pairs"
    return call


def test_a_pair_counts_where_the_regions_agree(make, people, capsys):
    found, rows, did = make(train=["target", "green"], validation=["green"])
    pair, row = found["train/target"], rows["train/target"]
    assert did[0] == "good" and (row["dropped"], row["person"], row["made"], row["rejected"]) == ("", "green", "1", "0")
    assert float(row["agree"]) == 1 and float(row["apart"]) < 0.04
    assert pair.has_driver and pair.driver.shape == pair.target.shape == (FRAMES, SIZE, SIZE, 3) and pair.video == "target.mp4"
    stored = clips.open_clips(make.data, split="train").stored(0)
    assert clips.open_clips(make.output, split="train").stored(0).target.mp4 == stored.target.mp4, "the target is the real clip, to the byte"
    assert np.abs(pair.driver.astype(int) - (255 - people["target"].target)).mean() < 6, "and the driver what LivePortrait made"
    assert rows["train/green"]["dropped"] == "no driver made"
    assert "frames of 10" in rows["train/green"]["note"], "the person in the light of no colour makes it lose a frame"
    assert rows["validation/green"]["dropped"] == "no driver made", "not for want of people: where a split shows one alone, the other split lends one"


def test_a_driver_that_is_elsewhere_is_rejected_and_someone_else_is_tried(make, capsys):
    found, rows, did = make("--attempts", "4", "--seed", "3", train=["red", "blue", "green"], validation=["target"])
    row = rows["train/red"]
    tried = did[: 1 + int(row["rejected"]) + int(row["failed"])]
    assert tried[-1] == "good" and row["person"] == "green" and row["dropped"] == "" and "train/red" in found
    row = rows["train/blue"]
    assert (row["person"], row["dropped"]) == ("green", "") and int(row["rejected"]) == 1, "the seed tries the shifted one first"
    said = capsys.readouterr().out
    made, rejected, failed = (sum(int(row[name]) for row in rows.values()) for name in ("made", "rejected", "failed"))
    assert f"LivePortrait made {made} drivers, of which {rejected} ({rejected / made:.0%}) were rejected" in said and f"it failed {failed} times" in said
    assert rejected and failed and made + failed == len(did) and rejected == did.count("shifted")


def test_clips_that_nobody_fits_are_dropped_and_told(make):
    with pytest.raises(ConfigError, match="no clip was kept .2 regions apart, 1 no driver made.: see .*report.html"):
        make(train=["target", "red", "blue"])
    rows = make.rows()
    assert 0.08 < float(rows["train/target"]["apart"]) < 0.2 and float(rows["train/target"]["agree"]) == 0
    assert [rows["train/target"][name] for name in ("made", "rejected", "failed")] == ["1", "1", "1"]
    assert "CUDA out of memory" in rows["train/target"]["note"] and "9 frames of 10" in rows["train/red"]["note"]


def test_a_run_goes_on_where_it_was_cut_off(make, monkeypatch):
    work_through = pairs.parts.work_through

    def cut_off(work, jobs, *arguments, **options):
        work_through(work, jobs[:1], *arguments, **options)
        raise MemoryError("gone")

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(pairs.parts, "work_through", cut_off)
        make(train=["target", "green"], validation=["blue", "green"])
    _, rows, did = make()
    assert did[0] != "good" or len(did) < 4, "the first clip is not driven again"
    assert rows["train/target"]["dropped"] == ""


def test_a_broken_liveportrait_ends_the_run_and_burns_no_clip(make, checkout, monkeypatch):
    monkeypatch.setattr(parts, "PATIENCE", 2)
    script = (checkout / "inference.py").read_text()
    (checkout / "inference.py").write_text("raise SystemExit('no module named torch')")
    try:
        with pytest.raises(ConfigError, match="2 failed in a row .train/target, train/green., .*: LivePortrait ended .*no module named torch; mend that"):
            make(train=["target", "green", "blue"])
    finally:
        (checkout / "inference.py").write_text(script)
    found, rows, _ = make()
    assert rows["train/target"]["dropped"] == "" and set(found) == {"train/target", "train/blue"}


def test_another_data_set_is_not_continued(make, tmp_path):
    make(train=["target", "green"])
    path = clips.shard_path(tmp_path / "clips", split="train", shard=0, shards=1)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ConfigError, match="an --input that has changed since"):
        make()


def test_another_landmarker_or_liveportrait_does_not_continue(make, checkout):
    git = checkout / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "refs" / "heads" / "main").write_text("0123abcd\n")
    make(train=["target", "green"])
    with pytest.raises(ConfigError, match="was begun with --landmarker face_landmarker.task; use the same"):
        make("--landmarker", "other.task")
    (git / "refs" / "heads" / "main").unlink()
    (git / "packed-refs").write_text("# pack-refs with: peeled fully-peeled sorted\n4567cdef refs/heads/other\n0123abcd refs/heads/main\n")
    make()
    (git / "HEAD").write_text("4567cdef\n")
    try:
        with pytest.raises(ConfigError, match="was begun with LivePortrait at 0123abcd; use the same"):
            make()
    finally:
        shutil.rmtree(git)
    assert liveportrait.revision(checkout) is None


def test_the_seed_chooses_the_people(people, tmp_path):
    clips.write_clips(people.values(), tmp_path, split="train", shard=0, shards=1)
    clips.finish(tmp_path)
    orders = []
    for seed in 0, 0, 1, 2:
        rng = pairs._generator(seed, "target")
        orders.append([other.id for other in pairs._others(tmp_path, "train", people["target"], rng)])
    assert orders[0] == orders[1] and len({tuple(order) for order in orders}) > 1
    assert all(sorted(order) == ["blue", "green", "grey", "red"] for order in orders), "everybody once, and never oneself"


def test_how_far_apart_is_in_faces(people):
    target = people["target"].target_landmarks
    side = np.ptp(faces.face_box(target)[0, [0, 2]])
    np.testing.assert_allclose(liveportrait.apart(target, target + np.float32([0.05 * side, 0])), 0.05, rtol=0.1)
    np.testing.assert_allclose(liveportrait.apart(target, target), 0, atol=1e-6)


def test_the_other_face_is_cropped_to_the_targets_size_and_place():
    one, other = (synthetic.pair("train", number, frames=12, size=64) for number in (0, 5))
    picture = liveportrait.pose_like(clips.without_driver(other), one.target_landmarks, size=64)
    frame, match = faces.best_match(other.target_landmarks, one.target_landmarks)
    crop = faces.source_crop(other.target_landmarks[frame], one.target_landmarks, faces.Crop(0, 0, 64))
    placed = faces.crop_landmarks(other.target_landmarks[frame], crop, 64)
    assert picture.shape == (64, 64, 3) and np.abs(placed.mean(axis=0) - one.target_landmarks[match].mean(axis=0)).max() < 1.5


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "needs --input"),
        (["--input", "{data}", "--output", "x"], "needs either --liveportrait CHECKOUT or --augment"),
        (["--input", "{data}", "--output", "x", "--augment", "--liveportrait", "y"], "needs either"),
        (["--input", "{data}", "--output", "x", "--liveportrait", "y"], "--liveportrait y: has no inference.py"),
        (["--input", "{data}", "--output", "x", "--liveportrait", "{here}"], "--liveportrait needs --landmarker"),
        (["--input", "{data}", "--output", "x", "--liveportrait", "{here}", "--python", "no/python"], "--python no/python: no such program"),
        (["--input", "{data}", "--output", "x", "--liveportrait", "{here}", "--landmarker", "x.npz"], "x.npz: holds the landmarks of one video"),
        (["--input", "{data}", "--output", "x", "--augment"], "its clips have drivers already"),
        (["--input", "nowhere", "--output", "x", "--augment"], "nowhere is no directory"),
        (["--input", "{data}", "--output", "x", "--augment", "--attempts", "0"], "--attempts 0"),
    ],
)
def test_mistakes_are_one_line(flags, said, dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SVDP_FACE_LANDMARKER", "")
    (tmp_path / "inference.py").touch()
    with pytest.raises((ConfigError, video.MediaError), match=said) as error:
        pairs.main(cli.parse(pairs.Flags(), [flag.format(data=dataset, here=tmp_path) for flag in flags], description="", prog=""))
    assert "\n" not in str(error.value) and not os.path.exists("x")


def test_recolouring_changes_colours_and_moves_nothing():
    clip = synthetic.pair("train", 0, frames=3, size=64)
    one, again, other = (augment.recolour(clip.target, np.random.default_rng(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert one.shape == clip.target.shape and one.dtype == np.uint8 and (one != other).mean() > 0.9
    changes, edges = [], []
    grey = lambda frame: cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32)
    for seed in range(12):
        made = augment.recolour(clip.target, np.random.default_rng(seed))
        changes.append(np.abs(made.astype(int) - clip.target).mean())
        edges.append(cv2.phaseCorrelate(np.abs(cv2.Laplacian(grey(made[0]), -1)), np.abs(cv2.Laplacian(grey(clip.target[0]), -1)))[0])
    assert np.median(changes) > 30, "strong"
    assert np.abs(edges).max() < 0.5, "in place"


def test_the_command_line(python, tmp_path):
    done = python("-m", "svdp_jax.data.pairs", "--input", tmp_path / "nowhere", "--output", tmp_path / "x", "--augment")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
