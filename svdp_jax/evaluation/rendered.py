"""How well a checkpoint animates rendered portraits, where the true answer is known.

    python -m svdp_jax.evaluation.rendered --checkpoint DIR [--split test] [--clips 32] [--sheet PNG] [--animation GIF]

In: weights, and pairs of a held-out split: a person animated by another, both drawn in the same motion, rendered and shrunk as
the training records are. The source is a frame two seconds behind the clip, so that no window is nearer to it than another; all frames of
the clip are driven, masked, in windows with generated history.
Out: a table with targets, each mean with its standard error over clips, and as last line its figures as JSON.

    psnr              dB of whole frames, mean over the frames of a clip          copy: of showing the source throughout
    regions           dB of eyes, nose and mouth, from a clip's mean square error there
    change            frame-to-frame change, output over truth
    seams             the same between the last frame of a window and the first of the next: as `change`, where they do not show
    head              where the head is, measured in output and truth alike and correlated over a clip, as a vector
    head_x, head_y    each axis by itself: up and down the head moves a third as much as sideways
    mouth             how much of the inside of the mouth is seen, likewise
    gaze              degrees between where the eyes look and where they were drawn to look; 0 to the front where no pupil is found, blinks left out
    opening           how far the mouth is open, read from output and truth alike: the difference, 1 from closed to wide open
    drift             mean absolute error of the last window, times that of the first
    rest              dB of all but eyes, nose and mouth, where the person's looks are
    leak              how much of the driver is in that rest, beside how much of the truth: 0 nothing, 1 the driver's colours as they are
    autoencoder       dB of the truth, encoded and decoded: what no model with these latents exceeds by much
    truth             the same read from the truth, against what was drawn: how well it can be read

On the truth, the measured head goes with the drawn one's middle (0.95; 0.94 across, 0.96 down) and the measured mouth with its opening
(0.97): mean correlations of 32 clips of the test split. A copy of the source does not move: for it, all are 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import pathlib
import platform
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import cv2
import imageio.v3 as iio
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Key, UInt8
from tqdm import tqdm

import svdp_jax
from svdp_jax import checkpoint, cli, files, pipeline
from svdp_jax.config import Config, ConfigError, DataConfig
from svdp_jax.data import drawing, faces, loader, synthetic, video
from svdp_jax.evaluation import metrics, readings
from svdp_jax.types import Frozen

RENDERED = 128  # pixels at which the records of training are drawn, before they are shrunk to data.size
WINDOWS = 3  # at least, so that history made from generated history counts
AWAY = 50  # frames from a clip to its source: half a turn of the slowest motions and more
COLUMNS = 8  # frames of a contact sheet
MADE = f"synthesised: this shows events that did not happen (svdp_jax {svdp_jax.__version__})"

# Figure -> what it is, its target and the sign that makes more better. The mean over clips is what is judged.
ROWS = {
    "psnr": ("PSNR, whole frames (dB)", None, 0),
    "psnr_copy": ("  of copying the source", None, 0),
    "psnr_autoencoder": ("  of the autoencoder alone", None, 0),
    "psnr_gain": ("  gain over copying", 2.0, 1),
    "regions": ("PSNR, eyes, nose, mouth (dB)", None, 0),
    "regions_copy": ("  of copying the source", None, 0),
    "regions_autoencoder": ("  of the autoencoder alone", None, 0),
    "regions_gain": ("  gain over copying", 8.0, 1),
    "rest": ("PSNR, the rest (dB)", None, 0),
    "leak": ("driver's colours in the rest", None, 0),
    "change": ("frame-to-frame change, x truth's", 1.2, -1),
    "seams": ("  where windows meet", None, 0),
    "drift": ("error, last window x first", 1.1, -1),
    "head_x": ("head across, correlation", None, 0),
    "head_y": ("head down, correlation", None, 0),
    "head": ("head position, correlation", 0.8, 1),
    "mouth": ("mouth opening, correlation", 0.95, 1),
    "opening": ("mouth opening, error", None, 0),
    "opening_copy": ("  of copying the source", None, 0),
    "opening_truth": ("  of the reading, on truth", None, 0),
    "gaze": ("gaze, error (degrees)", 5.0, -1),
    "gaze_copy": ("  of copying the source", None, 0),
    "gaze_truth": ("  of the reading, on truth", None, 0),
}


class Case(NamedTuple):
    """One pair of the split, in pixels of data.size."""

    source: UInt8[np.ndarray, "H W 3"]
    driving: UInt8[np.ndarray, "N H W 3"]  # black but for eyes, nose and mouth
    target: UInt8[np.ndarray, "N H W 3"]
    boxes: Float32[np.ndarray, "N 4 4"]  # of the target's eyes, nose and mouth
    landmarks: Float32[np.ndarray, "N 68 2"]  # the target's
    motion: drawing.Motion  # of N frames
    style: drawing.Style
    driver: UInt8[np.ndarray, "N H W 3"]  # all of it


def case_of(data: DataConfig, *, split: synthetic.Split, index: int, frames: int, style: str | None = None) -> Case:
    """Pair number `index`, drawn in its own style or another; N = `frames`, and the source is AWAY behind the last of them."""
    clip = synthetic.pair(split, index, frames=frames + AWAY, size=max(RENDERED, data.size), style=style)
    kept = [*range(frames), frames + AWAY - 1]
    arrays = {name: getattr(clip, name)[kept] for name in ("target", "driver", "target_landmarks", "driver_landmarks")}
    clip = clip._replace(**arrays)
    scale = data.size / clip.target.shape[1]
    landmarks = (clip.target_landmarks[:-1] + 0.5) * scale - 0.5  # pixel centres are integers
    moves = synthetic.motion(synthetic.split_seed(split, index, "motion"), frames)
    drawn = drawing.STYLES[style or synthetic.identity(synthetic.split_seed(split, 2 * index, "identity")).drawing]
    boxes = faces.regions(landmarks, margin=data.region_margin)
    driver = loader.whole_clip(clip._replace(target=clip.driver), data)[2]
    return Case(*loader.whole_clip(clip, data), boxes, landmarks.astype(np.float32), moves, drawn, driver)


class Models(NamedTuple):
    """Compiled once, called for every batch."""

    animate: Callable[[np.ndarray, np.ndarray, Key[Array, ""]], np.ndarray]  # source [B,H,W,3], driving [B,N,H,W,3], key -> [B,N,H,W,3]
    reconstruct: Callable[[np.ndarray], np.ndarray]  # frames [B,N,H,W,3] through the autoencoder


def make_models(config: Config, params: Any, frozen: Frozen, *, progress: Callable[[int], None] = lambda steps: None) -> Models:
    """The roll-out of whole batches. `progress` is called with the denoising steps that are done."""
    encode, decode = pipeline.make_coders(config, frozen)
    params = jax.device_put(params)

    def animate(source, driving, key):
        made = pipeline.animate_batch(config, params, frozen, source, np.moveaxis(driving, 1, 0), key, progress=progress)
        return np.concatenate([np.asarray(window.frames) for window in made], axis=1)

    def reconstruct(frames):
        windows = pipeline.full_windows(np.moveaxis(frames, 1, 0), config.data.frames)
        return np.concatenate([np.asarray(decode(encode(np.stack(window, axis=1)))) for window in windows], axis=1)

    return Models(animate, reconstruct)


def measure(case: Case, output: UInt8[np.ndarray, "N H W 3"], reconstructed: UInt8[np.ndarray, "N H W 3"], *, window: int) -> dict[str, float]:
    """The figures of one clip, made in windows of so many frames, by the names of ROWS."""
    truth, copy = case.target, np.broadcast_to(case.source, case.target.shape)
    inside = faces.inside(truth, case.boxes)
    made = {"": output, "_copy": copy, "_autoencoder": reconstructed}
    figures = {f"psnr{name}": float(metrics.psnr(frames, truth).mean()) for name, frames in made.items()}
    figures |= {f"regions{name}": metrics.region_psnr(frames, truth, inside) for name, frames in made.items()}
    figures |= {f"{name}_gain": figures[name] - figures[f"{name}_copy"] for name in ("psnr", "regions")}
    errors = window_errors(output, truth, window)
    figures |= {"rest": metrics.region_psnr(output, truth, ~inside), "leak": leak(output, truth, case.driver, ~inside)}
    figures |= {"change": metrics.frame_change_ratio(output, truth), "seams": metrics.frame_change_ratio(output, truth, every=window)}
    figures |= {"drift": float(errors[-1] / errors[0]) if errors[0] else 1.0}
    return figures | followed(output, case) | expression(output, copy, case)


def window_errors(output: UInt8[np.ndarray, "N H W 3"], truth: UInt8[np.ndarray, "N H W 3"], window: int) -> Float[np.ndarray, " windows"]:
    """Mean absolute error of each whole window."""
    error = metrics.l1(output, truth)
    return error[: len(error) // window * window].reshape(-1, window).mean(1)


def leak(
    output: UInt8[np.ndarray, "N H W 3"], truth: UInt8[np.ndarray, "N H W 3"], driver: UInt8[np.ndarray, "N H W 3"], where: Bool[np.ndarray, "N H W"]
) -> float:
    """The driver's part in the output's pixels, taken for a constant colour, so much of the truth and so much of the driver, in least squares. An output that
    fades, or loses the person to a mean of all, has less of the truth, and no more of the driver."""
    made, true, other = (frames[where].astype(np.float64) - frames[where].mean(0) for frames in (output, truth, driver))
    return float(np.linalg.lstsq(np.stack([true.ravel(), other.ravel()], axis=1), made.ravel(), rcond=1e-9)[0][1])


def expression(output: UInt8[np.ndarray, "N H W 3"], copy: UInt8[np.ndarray, "N H W 3"], case: Case) -> dict[str, float]:
    """How far gaze and mouth are from what they should be: of the output, of a copy, and of the truth as it is read."""
    drawn, figures = readings.gaze_angles(case.motion.gaze_x, case.motion.gaze_y), {}
    seen = {"": output, "_copy": copy, "_truth": case.target}
    frames = {name: case.style.untone(pictures) for name, pictures in seen.items()}
    gaze = {name: readings.gaze(pictures, case.landmarks) for name, pictures in frames.items()}
    opening = {name: readings.mouth_opening(pictures, case.landmarks, case.style.mouth_inside) for name, pictures in frames.items()}
    looking = np.isfinite(gaze["_truth"]).all(-1)
    for name in frames:
        figures[f"gaze{name}"] = float(np.linalg.norm(np.nan_to_num(gaze[name])[looking] - drawn[looking], axis=-1).mean())
        figures[f"opening{name}"] = float(np.abs(opening[name] - (case.motion.mouth_open if name == "_truth" else opening["_truth"])).mean())
    return figures


def followed(output: UInt8[np.ndarray, "N H W 3"], case: Case) -> dict[str, float]:
    """How the output's head and mouth go with the truth's: correlations over time."""
    made, true = (motion_of(case.style.untone(frames), case.boxes, case.style.mouth_inside) for frames in (output, case.target))
    head, mouth = (metrics.correlation(*pair) for pair in zip(made, true, strict=True))
    across, down = (metrics.correlation(made[0][:, axis], true[0][:, axis]) for axis in (0, 1))
    return {"head_x": across, "head_y": down, "head": head, "mouth": mouth}


def motion_of(
    frames: UInt8[np.ndarray, "N H W 3"], boxes: Float32[np.ndarray, "N 4 4"], inside: tuple[int, int, int] = drawing.MOUTH_INSIDE
) -> tuple[Float[np.ndarray, "N 2"], Float[np.ndarray, " N"]]:
    """What pixels say of the motion: where the head is, and how much is seen of the inside of the mouth, which has this colour."""
    # One box for the clip: a box that went with the true mouth would let its motion into what is measured.
    mouth = np.concatenate([boxes[:, 3, :2].min(0), boxes[:, 3, 2:].max(0)])
    return readings.head_position(frames), readings.colour_amount(frames, inside, mouth)


def summary(clips: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Figure -> mean, its standard error, median and quartiles over the clips; target and whether the mean meets it, where there is one."""
    rows = {}
    for name, (_, target, sign) in ROWS.items():
        values = [clip[name] for clip in clips]
        quarter, median, three_quarters = (float(value) for value in np.percentile(values, [25, 50, 75]))
        error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
        rows[name] = {"mean": float(np.mean(values)), "standard_error": error, "median": median, "quartiles": [quarter, three_quarters]}
        if target is not None:
            rows[name] |= {"target": target, "met": bool(sign * rows[name]["mean"] >= sign * target)}
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The summary as text, one line per figure."""
    lines = [f"{'':<34}{'mean':>8}{'+-':>6}{'median':>8}   {'quartiles':<16}{'target':<9}"]
    for name, (title, target, sign) in ROWS.items():
        row = rows[name]
        low, high = row["quartiles"]
        aim, verdict = ("", "") if target is None else (f"{'>=' if sign > 0 else '<='} {target:g}", "pass" if row["met"] else "FAIL")
        error = "" if row["standard_error"] is None else f"{row['standard_error']:.2f}"
        lines.append(f"{title:<34}{row['mean']:>8.2f}{error:>6}{row['median']:>8.2f}   {f'{low:.2f} .. {high:.2f}':<16}{aim:<9}{verdict}".rstrip())
    return "\n".join(lines)


def ranked(clips: list[dict[str, float]]) -> dict[str, int]:
    """Numbers of the worst, the median (of an even count the better middle one) and the best clip by PSNR."""
    order = np.argsort([clip["psnr"] for clip in clips], kind="stable")
    return {"worst": int(order[0]), "median": int(order[len(order) // 2]), "best": int(order[-1])}


# ---------------------------------------------------------------------------------------------------------------- pictures


def contact_sheet(blocks: list[tuple[str, Case, np.ndarray]]) -> UInt8[np.ndarray, "HH WW 3"]:
    """For each (title, case, output): driver as the model sees it, output and truth, one below the other, over time; the source left."""
    parts = []
    for title, case, output in blocks:
        times = np.linspace(0, len(output) - 1, COLUMNS).astype(int)
        size = output.shape[1]
        blank = np.full((size, size, 3), 255, np.uint8)
        rows = (case.source, "", case.driving), (blank, "output", output), (blank, "truth", case.target)
        pictures = [np.concatenate([_write(left.copy(), word), *frames[times]], axis=1) for left, word, frames in rows]
        heading = np.full((size // 4, pictures[0].shape[1], 3), 255, np.uint8)
        parts += [_write(heading, f"{title}   source | driver, output, truth at frames {', '.join(map(str, times))}"), *pictures]
    return np.concatenate(parts)


def _write(picture: UInt8[np.ndarray, "H W 3"], text: str) -> UInt8[np.ndarray, "H W 3"]:
    return cv2.putText(picture, text, (4, picture.shape[0] * 2 // 3), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)


def write_animation(
    path: pathlib.Path, source: UInt8[np.ndarray, "H W 3"], driver: UInt8[np.ndarray, "N H W 3"], driving: UInt8[np.ndarray, "N H W 3"],
    output: UInt8[np.ndarray, "N H W 3"],
) -> None:  # fmt: skip
    """Source, driver and output side by side, twice as large, 25 frames per second: a .gif that loops, or an .mp4.

    Of `driver`, what `driving` (the same, masked) hides from the model is faded."""
    faded = np.where(driving.any(-1, keepdims=True), driver, (0.3 * driver + 0.7 * 255).astype(np.uint8))
    frames = [np.concatenate([source, *pictures], axis=1) for pictures in zip(faded, output, strict=True)]
    frames = [cv2.resize(frame, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC) for frame in frames]
    if path.suffix == ".mp4":
        video.write_video(path, frames, fps=Fraction(25), audio_from=None, metadata={"comment": MADE})
    else:
        iio.imwrite(path, frames, extension=".gif", duration=40, loop=0, comment=MADE.encode())


# ---------------------------------------------------------------------------------------------------------------- program


def main(arguments: list[str] | None = None) -> None:
    """The command line; see --help."""
    with cli.messages(ConfigError, video.MediaError):
        evaluate(parse(arguments))


def evaluate(flags: argparse.Namespace) -> None:
    check(flags)
    cli.keep_programs()
    config, weights = checkpoint.find_weights(flags.checkpoint)  # once: training may save another step meanwhile
    _, params, frozen = checkpoint.load_weights(flags.checkpoint, weights=weights)
    chosen = {"steps": flags.steps, "guidance": flags.guidance and tuple(flags.guidance)}
    given = {name: value for name, value in chosen.items() if value is not None}
    config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, **given))
    window = config.data.frames
    if flags.frames < WINDOWS * window:
        raise ConfigError(f"--frames {flags.frames} must be at least {WINDOWS * window}: {WINDOWS} windows of data.frames={window}")

    started, batches = time.perf_counter(), -(-flags.clips // flags.batch)
    steps = batches * -(-flags.frames // window) * config.sample.steps
    cases, outputs, clips, errors = [], [], [], []
    with tqdm(total=steps, unit="step", desc=f"{flags.clips} clips of {flags.split}", dynamic_ncols=True) as bar:
        models = make_models(config, params, frozen, progress=bar.update)
        for number in range(batches):
            indices = range(number * flags.batch, min((number + 1) * flags.batch, flags.clips))
            batch = [case_of(config.data, split=flags.split, index=index, frames=flags.frames, style=flags.style) for index in indices]
            filled = batch + batch[-1:] * (flags.batch - len(batch))  # one shape, one compilation
            source, driving, target = (np.stack(arrays) for arrays in list(zip(*filled, strict=True))[:3])
            made = models.animate(source, driving, jax.random.fold_in(jax.random.key(config.train.seed), number))
            seen = zip(batch, made, models.reconstruct(target), strict=False)  # without what filled the batch
            clips += [measure(case, output, reconstructed, window=window) for case, output, reconstructed in seen]
            errors += [window_errors(output, case.target, window) for case, output in zip(batch, made, strict=False)]
            cases += batch
            outputs += list(made[: len(batch)])
    seconds = time.perf_counter() - started

    rows, named = summary(clips), ranked(clips)
    sampling = {"steps": config.sample.steps, "guidance": list(config.sample.guidance), "shift": config.sample.shift}
    asked = {"split": flags.split, "style": flags.style, "clips": flags.clips, "frames": flags.frames, "batch": flags.batch}
    how = f"{sampling['steps']} steps, guidance {sampling['guidance']}"
    people = f"split {flags.split}" + (f", drawn in the style {flags.style}" if flags.style else "")
    print(f"{config.name}: {flags.clips} clips of {flags.frames} driven frames, {people}; {how}")
    print(table(rows))
    print(f"clips by PSNR: {', '.join(f'{name} {clip}' for name, clip in named.items())}; targets are for the mean; {seconds:.0f} s")
    if flags.sheet:
        titles = {clip: f"clip {clip}, {clips[clip]['psnr']:.1f} dB (copy {clips[clip]['psnr_copy']:.1f})" for clip in named.values()}
        iio.imwrite(flags.sheet, contact_sheet([(f"{name}: {titles[clip]}", cases[clip], outputs[clip]) for name, clip in named.items()]))
    if flags.animation:
        case = cases[named["median"]]
        write_animation(flags.animation, case.source, case.driver, case.driving, outputs[named["median"]])
    device = jax.devices()[0]
    versions = {"svdp_jax": svdp_jax.__version__, "jax": jax.__version__, "numpy": np.__version__, "python": platform.python_version()}
    record = {
        "config": config.name, "weights": checkpoint.fingerprint(flags.checkpoint, weights), "date": datetime.date.today().isoformat(), **asked, "sampling": sampling, "device": f"{device.platform}: {device.device_kind}", "versions": versions,
        "seconds": round(seconds, 1), "by_psnr": named, "figures": rows, "error_by_window": np.mean(errors, axis=0).tolist(),
    }  # fmt: skip
    if flags.json:
        with files.whole(flags.json) as partial:
            partial.write_text(json.dumps(record | {"per_clip": clips}, indent=2) + "\n")
    print(json.dumps(record))


def check(flags: argparse.Namespace) -> None:
    """Whatever can be wrong with the flags themselves, before slow work: ConfigError."""
    for name in ("clips", "batch"):
        if getattr(flags, name) < 1:
            raise ConfigError(f"--{name} {getattr(flags, name)} must be at least 1")
    if flags.animation and flags.animation.suffix not in (".gif", ".mp4"):
        raise ConfigError(f"--animation {flags.animation} must end in .gif or .mp4")
    if flags.sheet and flags.sheet.suffix != ".png":
        raise ConfigError(f"--sheet {flags.sheet} must end in .png")
    for path in filter(None, (flags.json, flags.sheet, flags.animation)):
        if not path.parent.is_dir():
            raise ConfigError(f"{path} cannot be written: there is no directory {path.parent}; make it first")
    flags.batch = min(flags.batch, flags.clips)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.ArgumentParser(
        prog="python -m svdp_jax.evaluation.rendered",
        description="Animate held-out rendered portraits and measure how well; prints a table with targets and, last, a line of JSON.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, help="training workdir or exported checkpoint")
    parser.add_argument("--split", choices=["test", "validation"], default="test", help="people and motions never trained on")
    parser.add_argument("--style", choices=list(drawing.STYLES), help=f"of drawing, for all people (default: each its own of {', '.join(drawing.TRAINED)}, which are trained on)")
    parser.add_argument("--clips", type=int, default=32, help="pairs of people")
    parser.add_argument("--frames", type=int, default=40, help="per clip, all of them driven; in whole windows, where figures of windows are to count all")
    parser.add_argument("--steps", type=int, help="denoising steps per window (default: the checkpoint's)")
    parser.add_argument("--guidance", type=float, nargs=3, help="weights of source, driving and history (default: the checkpoint's)")
    parser.add_argument("--batch", type=int, default=8, help="clips animated at once; the noise of a clip depends on it")
    parser.add_argument("--json", type=pathlib.Path, help="file for all figures, those of each clip too")
    parser.add_argument("--sheet", type=pathlib.Path, help=".png of the worst, median and best clip")
    parser.add_argument("--animation", type=pathlib.Path, help=".gif or .mp4 of the median clip: source, driver, output")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
