"""The figures of the evaluation: formulas by hand, measurements against the motion that was drawn, and the command as a whole."""

import dataclasses
import json

import flax.linen as nn
import imageio.v3 as iio
import jax
import numpy as np
import pytest

from configs import tiny
from svdp_jax import checkpoint, pipeline, train_state
from svdp_jax.config import DataConfig, SampleConfig
from svdp_jax.data import drawing, faces, loader, synthetic
from svdp_jax.evaluation import metrics, readings, rendered
from svdp_jax.models.autoencoder import fit_linear
from svdp_jax.models.tokens import position_table
from svdp_jax.types import Frozen

DATA = DataConfig(size=96)
CONFIG = dataclasses.replace(tiny.config, sample=SampleConfig(steps=1, guidance=(1.0, 1.0, 1.0), chunk=1))


def grey(values, size=2):
    """Frames [N, size, size, 3], each of one value."""
    return np.repeat(np.uint8(values), size * size * 3).reshape(-1, size, size, 3)


# ---------------------------------------------------------------------------------------------------------------- formulas


def test_psnr_is_of_each_frame():
    decibels = metrics.psnr(grey([51, 255, 7]), grey([0, 0, 7]))  # errors of 0.2, 1 and 0
    np.testing.assert_allclose(decibels, [13.9794, 0.0, np.inf], atol=1e-4)


def test_region_psnr_pools_the_pixels_of_all_frames():
    output, truth = grey([0, 0]), grey([0, 0])
    output[0, 0, 0], output[0, 1, 1] = 51, 255  # the second one is outside
    inside = np.zeros((2, 2, 2), bool)
    inside[0, 0, 0] = inside[1, 0] = inside[1, 1, 0] = True
    assert metrics.region_psnr(output, truth, inside) == pytest.approx(20.0, abs=1e-4)  # (0.04 + 3 * 0) / 4


def test_frame_change_is_relative_to_the_truth():
    truth = grey([100, 110, 100])
    assert metrics.frame_change_ratio(grey([10, 35, 60]), truth) == pytest.approx(2.5)  # 25 and 25 against 10 and 10
    assert metrics.frame_change_ratio(grey([9, 9, 9]), truth) == 0
    seams = grey([10, 20, 60, 70, 80]), grey([10, 20, 30, 40, 50])  # windows of 2 frames meet between 20 and 60, 70 and 80
    assert metrics.frame_change_ratio(*seams, every=2) == pytest.approx((40 + 10) / (10 + 10))
    with pytest.raises(ValueError, match="moves"):
        metrics.frame_change_ratio(truth, grey([9, 9, 9]))


def test_correlation():
    assert metrics.correlation(np.array([1.0, 2, 3]), np.array([1.0, 3, 2])) == pytest.approx(0.5)
    assert metrics.correlation(np.array([1.0, 2, 3]), np.array([30.0, 20, 10])) == pytest.approx(-1)
    assert metrics.correlation(np.array([2.0, 2, 2]), np.array([1.0, 3, 2])) == 0  # and not 0 / 0
    assert metrics.correlation(np.array([1.0, 3, 2]), np.array([2.0, 2, 2])) == 0
    along, both = np.array([[0.0, 0], [4, 0]]), np.array([[1.0, 5], [7, 13]])
    assert metrics.correlation(along, both) == pytest.approx(0.6)  # the cosine between (2, 0) and (3, 4)
    assert metrics.correlation(both, 3 * both + 1) == pytest.approx(1)


def test_head_position_is_the_centroid_before_the_background():
    ramp = np.linspace(60, 120, 32)
    frames = np.repeat((ramp[:, None] + ramp)[None, :, :, None], 2, axis=0).repeat(3, axis=3).astype(np.uint8)
    frames[0, 8:16, 10:18] = 0
    frames[1, 10:18, 14:22] = 0
    frames[:, 24:, 12:20] = 0  # shoulders
    np.testing.assert_allclose(readings.head_position(frames), [[14 / 32, 12 / 32], [18 / 32, 14 / 32]], atol=1e-6)


def test_colour_amount_counts_near_colours_in_part():
    frames = grey([200, 200], size=8)
    frames[0, 2, 2:4] = (110, 20, 30)  # two in the box
    frames[0, 7, 7] = (110, 20, 30)  # not in it
    frames[1, 3, 3] = (110, 20, 60)  # off by the spread
    amount = readings.colour_amount(frames, (110, 20, 30), np.float32([1.5, 1.5, 4.2, 4.2]))
    np.testing.assert_allclose(amount, [2, np.exp(-0.5)], atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------- measurements


def test_what_is_measured_on_the_truth_is_the_motion_that_was_drawn():
    """The head also where tokens of 16 pixels flicker, as a model's output does: by 8 of 255, one standard deviation."""
    found = []
    for index in range(32):
        who = synthetic.identity(synthetic.split_seed("test", 2 * index, "identity"))
        moves = synthetic.motion(synthetic.split_seed("test", index, "motion"), 39)
        frames, landmarks = synthetic.render_clip(who, moves, size=96)
        # The head leans about a point half a head unit below its middle, so that roll moves its middle, too.
        middle = np.stack([moves.x + 0.5 * drawing.HEAD_UNIT * np.sin(moves.roll), moves.y + 0.5 * drawing.HEAD_UNIT * (1 - np.cos(moves.roll))], 1)
        head, mouth = rendered.motion_of(frames, faces.regions(landmarks, margin=0.06))
        flicker = np.random.default_rng(index).normal(0, 8, (len(frames), 6, 6, 3)).repeat(16, 1).repeat(16, 2)
        flickering = np.clip(frames + flicker, 0, 255).astype(np.uint8)
        pairs = (head[:, 0], middle[:, 0]), (head[:, 1], middle[:, 1]), (head, middle), (readings.head_position(flickering), head), (mouth, moves.mouth_open)
        found.append([metrics.correlation(*pair) for pair in pairs])
    means = np.mean(found, axis=0)
    np.testing.assert_array_less(0.93 * np.ones(5), means)


def test_gaze_that_is_read_is_the_gaze_that_was_drawn():
    apart, drawn = [], []
    for index in range(8):
        who = synthetic.identity(synthetic.split_seed("test", 2 * index, "identity"))
        moves = synthetic.motion(synthetic.split_seed("test", index, "motion"), 39)
        frames, landmarks = synthetic.render_clip(who, moves, size=96)
        drawn.append(readings.gaze_angles(moves.gaze_x, moves.gaze_y))
        apart.append(readings.gaze(frames, landmarks) - drawn[-1])
        assert (np.isnan(apart[-1][:, 0]) == np.isnan(apart[-1][:, 1])).all() and np.isfinite(apart[-1][moves.blink < 0.1]).all()
    across, down = np.nanmean(np.abs(np.concatenate(apart)), axis=0)
    assert across < 1.5 and down < 1.5, "degrees"
    assert (np.concatenate(drawn).std(0) > (10, 5)).all(), "degrees, of what there is to read"


@pytest.mark.parametrize("size", [96, 128])
def test_a_mouth_that_is_read_is_open_as_it_was_drawn(size):
    apart, drawn = [], []
    for index in range(8):
        who = synthetic.identity(synthetic.split_seed("test", 2 * index, "identity"))
        moves = synthetic.motion(synthetic.split_seed("test", index, "motion"), 39)
        frames, landmarks = synthetic.render_clip(who, moves, size=size)
        drawn.append(moves.mouth_open)
        apart.append(readings.mouth_opening(frames, landmarks, drawing.MOUTH_INSIDE) - moves.mouth_open)
    assert np.abs(apart).mean() < 0.07 and np.std(drawn) > 0.3


def test_gaze_and_mouth_are_read_in_styles_that_let_paper_through():
    for style, gaze, opening in ("pastel", 2.5, 0.1), ("pencil", 2.5, 0.2):
        case = rendered.case_of(DATA, split="validation", index=0, frames=24, style=style)
        figures = rendered.measure(case, case.target, case.target, window=4)
        assert figures["gaze_truth"] < gaze and figures["opening_truth"] < opening and figures["mouth"] == pytest.approx(1), style


def test_an_error_that_grows_from_window_to_window_is_drift(case):
    error = np.repeat([0, 0, 4, 4, 4, 8], 4)[:, None, None, None]
    output = np.clip(case.target.astype(int) // 2 + 20 + error, 0, 255).astype(np.uint8)
    half = case._replace(target=case.target // 2 + 10)
    assert rendered.measure(half, output, output, window=4)["drift"] == pytest.approx(18 / 10)


def test_what_looks_half_like_the_driver_leaks_by_half(case):
    where = ~faces.inside(case.target, case.boxes)
    leak = lambda output: rendered.leak(output, case.target, case.driver, where)
    assert leak(case.target) == pytest.approx(0, abs=1e-9) and leak(case.driver) == pytest.approx(1)
    faded = (case.target.astype(int) * 3 // 10 + 90).astype(np.uint8)  # which loses the person, and has nothing of the driver
    assert leak(faded) == pytest.approx(0, abs=0.01)
    half = ((case.target.astype(int) + case.driver) // 2).astype(np.uint8)
    assert leak(half) == pytest.approx(0.5, abs=0.02)
    figures = rendered.measure(case, half, half, window=4)
    assert figures["leak"] == pytest.approx(0.5, abs=0.02) and figures["rest"] < 30


@pytest.fixture(scope="module")
def case():
    return rendered.case_of(DATA, split="validation", index=0, frames=24)


def test_the_truth_has_perfect_figures_and_a_copy_of_the_source_none(case):
    perfect = rendered.measure(case, case.target, case.target, window=4)
    assert [perfect[name] for name in ("change", "seams", "head_x", "head_y", "head", "mouth", "drift")] == pytest.approx([1] * 7)
    assert perfect["psnr"] == perfect["regions"] == np.inf
    assert perfect["opening"] == 0 and perfect["gaze"] == perfect["gaze_truth"] < 2.5 and perfect["opening_truth"] < 0.1
    copied = rendered.measure(case, np.broadcast_to(case.source, case.target.shape), case.target, window=4)
    assert copied["gaze"] == copied["gaze_copy"] > 10 and copied["opening"] == copied["opening_copy"] > 0.2
    assert [copied[name] for name in ("psnr_gain", "regions_gain", "change", "seams", "head_x", "head_y", "head", "mouth")] == [0] * 8
    assert copied["regions_copy"] < copied["psnr_copy"] < 25  # the regions are what moves


def test_a_motion_that_comes_late_or_mirrored_shows(case):
    late = np.concatenate([case.target[12:], case.target[:12]])
    assert max(rendered.followed(late, case).values()) < 0.8
    assert rendered.followed(case.target[:, :, ::-1], case)["head_x"] == pytest.approx(-1, abs=0.01)


def test_a_case_is_what_training_sees():
    clip = synthetic.pair("test", 3, frames=5, size=rendered.RENDERED)
    case = rendered.case_of(DATA, split="test", index=3, frames=4)
    for found, expected in zip(case[1:3], loader.whole_clip(clip, DATA)[1:], strict=True):
        np.testing.assert_array_equal(found, expected)
    # The target masked by its boxes is what masking it as a driver gives: boxes are in pixels of data.size.
    itself = clip._replace(driver=clip.target, driver_landmarks=clip.target_landmarks)
    np.testing.assert_array_equal(faces.mask_frames(case.target, case.boxes), loader.whole_clip(itself, DATA)[1])


def test_no_window_is_nearer_to_the_source_than_another():
    """A copy of the source, whose error says how far the truth is from it, has as much of it in the last window as in the first."""
    errors = []
    for index in range(12):
        case = rendered.case_of(DATA, split="test", index=index, frames=80)
        errors.append(rendered.window_errors(np.broadcast_to(case.source, case.target.shape), case.target, 8))
    by_window = np.mean(errors, axis=0)
    assert 0.85 < by_window[-1] / by_window[:-1].mean() < 1.15, by_window  # with a source next to the last window: 0.45


# ---------------------------------------------------------------------------------------------------------------- the table


def test_verdicts_are_of_the_mean_and_in_the_right_direction():
    clips = [dict.fromkeys(rendered.ROWS, value) for value in (0.5, 0.7, 1.8)]
    rows = rendered.summary(clips)
    assert [rows["psnr"]["mean"], rows["psnr"]["median"], *rows["psnr"]["quartiles"]] == pytest.approx([1.0, 0.7, 0.6, 1.25])
    assert rows["psnr"]["standard_error"] == pytest.approx(0.7 / 3**0.5)
    assert {name: row["met"] for name, row in rows.items() if "met" in row} == {
        "psnr_gain": False, "regions_gain": False, "change": True, "drift": True, "head": True, "mouth": True, "gaze": True,
    }  # fmt: skip
    lines = rendered.table(rows).splitlines()
    assert len(lines) == 1 + len(rendered.ROWS)
    assert sum(line.endswith("pass") for line in lines) == 5 and sum(line.endswith("FAIL") for line in lines) == 2
    still = rendered.summary([dict.fromkeys(rendered.ROWS, 1.6)])
    assert not still["change"]["met"]


def test_ranking():
    assert rendered.ranked([{"psnr": value} for value in (20.0, 25.0, 18.0, 21.0, 30.0)]) == {"worst": 2, "median": 3, "best": 4}


# ---------------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def weights():
    """Parameters and frozen arrays of configs/tiny.py, untrained but with every gate open."""
    shapes, tree = jax.tree.flatten(nn.meta.unbox(jax.eval_shape(lambda: train_state.init_params(CONFIG, jax.random.key(0)))))
    rng = np.random.default_rng(0)
    params = tree.unflatten([rng.normal(0, 0.2, leaf.shape).astype(np.float32) for leaf in shapes])
    model = CONFIG.model
    target = rendered.case_of(CONFIG.data, split="validation", index=0, frames=12).target
    text = np.zeros((model.text_tokens, model.text_width), np.float32), np.zeros(model.pooled_width, np.float32)
    return params, Frozen(fit_linear(CONFIG.autoencoder, target), position_table(model), *text)


def test_a_batch_is_animated_as_one_clip_is(weights):
    case = rendered.case_of(CONFIG.data, split="validation", index=1, frames=11)  # 11 frames: two windows of 4, and 3 of a third
    key, done = jax.random.key(5), []
    models = rendered.make_models(CONFIG, *weights, progress=done.append)
    batch = models.animate(case.source[None], case.driving[None], key)
    one = np.concatenate([window.frames for window in pipeline.animate(CONFIG, *weights, case.source, case.driving, key)])
    assert batch.shape == (1, 11, 32, 32, 3) and sum(done) == 3
    np.testing.assert_array_equal(batch[0], one)
    assert np.abs(np.diff(one.astype(int), axis=0)).mean() > 1  # it is no flat picture that would equal any other


def test_the_command_prints_the_table_and_its_last_line_is_json(weights, tmp_path, capsys):
    params, frozen = weights
    checkpoint.write_config(tmp_path / "run", CONFIG)
    checkpoint.save_tree(tmp_path / "run" / checkpoint.WEIGHTS, params)
    checkpoint.save_frozen(tmp_path / "run", frozen)
    files = {name: tmp_path / f"it.{name}" for name in ("json", "png", "gif")}
    rendered.main(
        ["--checkpoint", str(tmp_path / "run"), "--split", "validation", "--clips", "2", "--frames", "12", "--batch", "1", "--steps", "2"]
        + ["--guidance", "1", "1", "1", "--json", str(files["json"]), "--sheet", str(files["png"]), "--animation", str(files["gif"])]
    )
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert record["clips"] == 2 and record["sampling"]["steps"] == 2 and set(record["figures"]) == set(rendered.ROWS)
    assert len([line for line in lines if line.endswith(("pass", "FAIL"))]) == 7
    kept = json.loads(files["json"].read_text())
    assert [len(kept["per_clip"]), kept["figures"]] == [2, record["figures"]]
    assert np.mean([clip["psnr"] for clip in kept["per_clip"]]) == pytest.approx(record["figures"]["psnr"]["mean"])
    assert iio.imread(files["png"]).shape == (3 * (3 * 32 + 8), 9 * 32, 3)
    assert iio.imread(files["gif"]).shape == (12, 64, 192, 3)


def test_every_clip_is_measured_once_whatever_the_batch(weights, tmp_path, capsys, monkeypatch):
    params, frozen = weights
    checkpoint.write_config(tmp_path, CONFIG)
    checkpoint.save_tree(tmp_path / checkpoint.WEIGHTS, params)
    checkpoint.save_frozen(tmp_path, frozen)
    sizes = []

    def copy(source, driving, key):
        sizes.append(len(source))
        return np.broadcast_to(source[:, None], driving.shape)

    monkeypatch.setattr(rendered, "make_models", lambda *_, progress: rendered.Models(copy, lambda frames: frames ^ 1))
    path = tmp_path / "figures.json"
    rendered.main(["--checkpoint", str(tmp_path), "--clips", "3", "--frames", "12", "--batch", "2", "--json", str(path)])
    clips = json.loads(path.read_text())["per_clip"]
    assert sizes == [2, 2] and [clip["psnr_gain"] for clip in clips] == [0, 0, 0]
    for index, clip in enumerate(clips):
        case = rendered.case_of(CONFIG.data, split="test", index=index, frames=12)
        copied = np.broadcast_to(case.source, case.target.shape)
        assert clip["psnr"] == pytest.approx(metrics.psnr(copied, case.target).mean())


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--clips", "0"], "--clips 0"),
        (["--batch", "0"], "--batch 0"),
        (["--animation", "a.mov"], "a.mov must end in .gif or .mp4"),
        (["--sheet", "a.jpg"], "a.jpg must end in .png"),
        (["--json", "nowhere/a.json"], "no directory nowhere"),
        ([], "is not a checkpoint"),
    ],
)
def test_mistakes_are_told_in_one_line(flags, problem, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        rendered.main(["--checkpoint", "missing", *flags])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and problem in error


def test_too_few_frames_for_generated_history_to_count(weights, tmp_path, capsys):
    checkpoint.write_config(tmp_path, CONFIG)
    checkpoint.save_tree(tmp_path / checkpoint.WEIGHTS, weights[0])
    checkpoint.save_frozen(tmp_path, weights[1])
    with pytest.raises(SystemExit):
        rendered.main(["--checkpoint", str(tmp_path), "--frames", "11"])
    assert "--frames 11 must be at least 12" in capsys.readouterr().err
