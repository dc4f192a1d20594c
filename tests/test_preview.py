"""The preview shows what goes into the model, and marks where it comes from."""

import dataclasses
import shutil
from fractions import Fraction

import imageio.v3 as iio
import numpy as np
import pytest

from svdp_jax import cli
from svdp_jax.config import ConfigError, DataConfig
from svdp_jax.data import detectors, faces, inputs, preview, synthetic, video

DATA = DataConfig(size=preview.CELL, frames=4, history=2)  # a cell shows it pixel by pixel
BAND, CELL = 26, preview.CELL


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    clip = synthetic.pair("validation", 0, frames=9, size=200)
    iio.imwrite(folder / "portrait.png", clip.target[4])
    detectors.write_landmarks(folder / "portrait.npz", clip.target_landmarks[4:5])
    video.write_video(folder / "motion.mp4", clip.driver, fps=Fraction(25), metadata={})
    detectors.write_landmarks(folder / "motion.npz", clip.driver_landmarks)
    return folder


def cell(picture, row, column):
    return picture[row * (CELL + BAND) + BAND : (row + 1) * (CELL + BAND), column * CELL : (column + 1) * CELL]


def test_the_bottom_row_is_what_the_model_sees(media):
    prepared = inputs.prepare(media / "portrait.png", media / "motion.mp4", DATA)
    picture = preview.picture(prepared, DATA, columns=3)
    assert picture.shape == (3 * (CELL + BAND), 4 * CELL, 3)
    np.testing.assert_array_equal(cell(picture, 2, 0), prepared.source)
    _, best = faces.best_match(prepared.source_landmarks[None], prepared.landmarks)
    masked = list(inputs.masked_frames(prepared, DATA))
    assert best == 4, "the same person's motion"
    for column, number in enumerate((best, 0, 8), start=1):
        np.testing.assert_array_equal(cell(picture, 2, column), masked[number])
        assert 0.02 < (cell(picture, 2, column) > 0).any(axis=2).mean() < 0.5


def test_a_driver_without_a_mask_is_shown_whole(media):
    bare = dataclasses.replace(DATA, driver_mask=False)
    prepared = inputs.prepare(media / "portrait.png", media / "motion.mp4", bare)
    np.testing.assert_array_equal(cell(preview.picture(prepared, bare, columns=1), 2, 1), list(inputs.driver_frames(prepared))[4])


def test_crop_landmarks_and_regions_are_marked(media):
    prepared = inputs.prepare(media / "portrait.png", media / "motion.mp4", DATA)
    picture = preview.picture(prepared, DATA, columns=1)
    for column in range(2):
        for row in range(2):
            for colour, seen in (preview.YELLOW, True), (preview.BLUE, True), (preview.GREEN, row == 0):
                assert (cell(picture, row, column) == colour).all(axis=2).any() == seen
    y, x = np.nonzero((cell(picture, 0, 0) == preview.GREEN).all(axis=2))
    crop, scale = prepared.crop, CELL / max(200, prepared.crop.side)
    assert np.ptp(x) == pytest.approx(crop.side * scale, abs=4) and np.ptp(y) == pytest.approx(crop.side * scale, abs=4)


@pytest.mark.parametrize("columns", [1, 9, 30])
def test_there_are_as_many_columns_as_there_can_be(media, columns):
    prepared = inputs.prepare(media / "portrait.png", media / "motion.mp4", DATA)
    assert preview.picture(prepared, DATA, columns=columns).shape[1] == (1 + min(columns, 9)) * CELL


def test_raw_frames_and_a_still_driver_have_a_preview_too(media, tmp_path):
    raw = inputs.prepare(media / "portrait.png", media / "motion.mp4", DATA, align=False)
    picture = preview.picture(raw, DATA, columns=2)
    assert not (cell(picture, 1, 0) == preview.YELLOW).all(axis=2).any() and (cell(picture, 1, 1) == preview.YELLOW).all(axis=2).any()
    still = inputs.prepare(media / "portrait.png", media / "portrait.png", DATA)
    assert preview.picture(still, DATA, columns=4).shape[1] == 2 * CELL


def run(*flags):
    preview.main(cli.parse(preview.Flags(), list(map(str, flags)), description="", prog=""))


def test_the_command_writes_the_picture(media, tmp_path, capsys):
    (tmp_path / "config.py").write_text(f"from svdp_jax.config import *\nconfig = Config(data=DataConfig(size={16 * 6}))")
    run("-s", media / "portrait.png", "-d", media / "motion.mp4", "-o", tmp_path / "out.png", "--columns", 2, "--config", tmp_path / "config.py")
    assert iio.imread(tmp_path / "out.png").shape == (3 * (CELL + BAND), 3 * CELL, 3) and "out.png" in capsys.readouterr().out


def test_a_place_that_cannot_be_written_to_is_told_before_anything_slow(media, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "prepare", None)
    (tmp_path / "folder.png").mkdir()
    for output, said in (tmp_path / "folder.png", "folder.png: is a folder"), ("/proc/out.png", "/proc/out.png: cannot be written"):
        with pytest.raises((ConfigError, video.MediaError), match=said):
            run("-s", media / "portrait.png", "-d", media / "motion.mp4", "-o", output)


def test_a_picture_that_cannot_be_written_leaves_the_old_one(media, tmp_path, monkeypatch):
    def full(path, picture, **_):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(iio, "imwrite", full)
    (tmp_path / "old.png").write_bytes(b"old")
    with pytest.raises(video.MediaError, match="old.png: cannot be written .No space left"):
        run("-s", media / "portrait.png", "-d", media / "motion.mp4", "-o", tmp_path / "old.png")
    assert [path.name for path in tmp_path.iterdir()] == ["old.png"] and (tmp_path / "old.png").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "needs --source"),
        (["-s", "{media}/portrait.png", "-d", "{media}/nowhere.mp4"], "nowhere.mp4: does not exist"),
        (["-s", "{media}/portrait.png", "-d", "{media}/motion.mp4", "-o", "out.gif"], "out.gif: must be a .png or .jpg"),
        (["-s", "{media}/portrait.png", "-d", "{media}/motion.mp4", "-o", "no/out.png"], "must be a .png or .jpg in a folder that exists"),
        (["-s", "{media}/portrait.png", "-d", "{media}/motion.mp4", "--columns", "0"], "--columns 0"),
        (["-s", "{media}/bare.png", "-d", "{media}/motion.mp4", "--landmarker", "x.onnx"], "x.onnx: must be"),
    ],
)
def test_mistakes_are_one_line(media, flags, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(media / "portrait.png", media / "bare.png")
    with pytest.raises((ConfigError, video.MediaError), match=said):
        run(*(flag.format(media=media) for flag in flags))
