"""Measure generated videos against references: errors, the paper's learned metrics over weights that you supply, and a page to look at.

    python -m svdp_jax.evaluation --generated DIR --reference DIR [--protocol self|cross] [--report out.html]

self: references are the true videos; frames are compared. cross: references are the driving videos, of other people, whose motion is what
counts, and --sources has the portraits. A reference has its video's name, or what stands behind "--" in that. docs/evaluation.md has the
protocols, and where each metric's weights are published.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import pathlib
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from svdp_jax import cli, files
from svdp_jax.config import ConfigError
from svdp_jax.data import detectors, faces, stills, video
from svdp_jax.evaluation import compare, learned, page
from svdp_jax.files import MediaError

PLAIN = {  # figure -> what it is, digits
    "l1": ("mean absolute error", 4),
    "psnr": ("PSNR, dB", 2),
    "ssim": ("SSIM", 4),
    "temporal": ("temporal error: of what changes from frame to frame", 4),
    **{f"psnr_{part}": (f"PSNR, {part}, dB", 2) for part in (*compare.PARTS, "rest")},
    **{f"l1_{part}": (f"mean absolute error, {part}", 4) for part in (*compare.PARTS, "rest")},
}
RANKS = {"psnr": 1, "csim": 1, "sync_c": 1, "lpips": -1, "gaze_angle": -1}  # the first that there is says which video is worst; the sign that makes more better
PAPER = {  # as it reports them, on data of its own
    "self": {"l1": 0.0687, "lpips": 0.1031, "psnr": 22.97, "fvd": 50.31, "sync_d": 7.31, "sync_c": 8.01, "csim": 0.9087, "gaze_angle": 5.51},
    "cross": {"fvd": 152.31, "sync_d": 8.48, "sync_c": 6.98, "csim": 0.7961, "gaze_angle": 10.56},
}


def main() -> None:
    with cli.messages(ConfigError, MediaError):
        flags = parse()
        found = compare.pairs(flags.generated, flags.reference)
        metrics = {name: learned.METRICS[name](flags.weights) for name in flags.metrics}
        rows, failures = [], []
        for pair in tqdm(found, unit="video", dynamic_ncols=True):
            try:
                rows.append(measure(pair, metrics, flags))
            except MediaError as problem:
                failures.append(f"{pair.name}: {problem}")
            except Exception as problem:  # the figures of the others may have taken hours
                traceback.print_exc()
                failures.append(f"{pair.name}: {type(problem).__name__}: {problem}")
        if not rows:
            raise MediaError(f"no video could be measured: {failures[0]}")
        overall = {name: metric.overall() for name, metric in metrics.items()}
        lines = summary(rows, overall, flags.protocol) + missed(failures, compare.unused(found, flags.reference))
        show(lines, f"{len(rows)} videos, {sum(row['frames'] for row in rows)} frames, protocol {flags.protocol}")
        for failure in failures:
            print(f"failed: {failure}", file=sys.stderr)
        joint = {name: outcome._asdict() for name, outcome in overall.items() if outcome.counts}
        record = {"protocol": flags.protocol, "videos": len(rows), "not_measured": len(failures), "figures": means(rows) | joint_figures(overall), "together": joint}
        if flags.json:
            with files.whole(flags.json) as partial:
                partial.write_text(json.dumps(record | {"per_video": rows, "failed": failures}, indent=1) + "\n")
        print(json.dumps(record))
        if flags.report:
            write_page(flags, found, rows, lines, metrics)
        if failures:
            raise MediaError(f"{len(failures)} of {len(found)} videos could not be measured; the figures are of the others")


def measure(pair: compare.Pair, metrics: dict[str, learned.Metric], flags: argparse.Namespace) -> dict[str, Any]:
    """The figures of one video, by name, and of each learned metric what it counted. MediaError where it cannot be measured."""
    uses = {use for metric in metrics.values() for use in metric.uses}
    parts = flags.protocol == "self" and bool(flags.landmarker or pair.reference.with_suffix(".npz").is_file())
    if "landmarks" in uses:  # both faces are found by the same means, or a network would see two crops of equal frames
        looks = (detectors.make_detector(flags.landmarker),) * 2
    else:
        looks = None, detectors.detector_for(pair.reference, flags.landmarker, video.probe(pair.reference)) if parts else None
    clip = learned.Clip(video.probe(pair.generated).fps, audio=video.read_audio(pair.generated, learned.AUDIO_RATE) if "audio" in uses else None)
    if "csim" in metrics and flags.protocol == "cross":
        picture = video.read_image(source_of(pair, flags.sources))
        seen = detectors.make_detector(flags.landmarker)(picture)
        clip = clip._replace(source=picture, source_landmarks=faces.find_face(picture, lambda _: seen) if len(seen) else None)
    errors = compare.Errors(parts=parts) if flags.protocol == "self" else None
    for metric in metrics.values():
        metric.begin(clip)
    frames = 0
    for window in compare.windows(pair, size=flags.window, looks=looks):
        frames += len(window.generated)
        if errors:
            errors.add(window)
        for metric in metrics.values():
            metric.add(learned.Chunk(*window))
    outcomes = [metric.finish() for metric in metrics.values()]
    figures = errors.figures() if errors else {}
    counts = {name: outcome.counts for name, outcome in zip(metrics, outcomes, strict=True)}
    return {"name": pair.name, "frames": frames, **figures, **{name: figure for outcome in outcomes for name, figure in outcome.figures.items()}, "counts": counts}


def source_of(pair: compare.Pair, folder: pathlib.Path) -> pathlib.Path:
    """The portrait of a video's name. MediaError where there is none."""
    found = [path for path in sorted(folder.iterdir()) if path.stem == pair.source and path.is_file() and stills.frame_count(path)] if pair.source else []
    if not found:
        raise MediaError(f"--sources {folder} has no picture {pair.source or 'for a video whose name does not begin with SOURCE--'}")
    return found[0]


def portrait_of(pair: compare.Pair, flags: argparse.Namespace) -> pathlib.Path | None:
    """The picture to show beside a driver who is somebody else."""
    with contextlib.suppress(MediaError):
        return source_of(pair, flags.sources) if flags.protocol == "cross" and flags.sources else None
    return None


def missed(failures: Sequence[str], unused: Sequence[pathlib.Path]) -> list[page.Line]:
    """Lines of what no figure is of."""
    some = lambda names: ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    lines = [page.Line("videos that could not be measured", str(len(failures)), "", some([failure.split(": ")[0] for failure in failures]))] if failures else []
    return lines + ([page.Line("references without a generated video", str(len(unused)), "", some([path.stem for path in unused]))] if unused else [])


def means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of each figure over the videos that have it."""
    names = dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, float))
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def summary(rows: Sequence[dict[str, Any]], overall: dict[str, learned.Outcome], protocol: str) -> list[page.Line]:
    """A line for each figure: the mean over videos, or that of all together; in how many videos it was measured; what was not found."""
    found, joint, paper = means(rows), joint_figures(overall), PAPER[protocol]
    told = lambda counts: ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
    lines = []
    for name, value in (found | joint).items():
        title, digits = PLAIN.get(name, (name, 4))
        count = f"{sum(name in row for row in rows)} of {len(rows)} videos"
        if name in joint:
            count = f"all together: {told(next(outcome.counts for outcome in overall.values() if name in outcome.figures))}"
        lines.append(page.Line(title, f"{value:.{digits}f}", f"{paper[name]:g}" if name in paper else "", count))
    if lost := sum(row.get("without_face", 0) for row in rows):
        lines.append(page.Line("frames of references without a face", str(lost), "", "not in eyes, nose, mouth and rest"))
    for metric, outcome in overall.items():
        counts: Counter[str] = Counter()
        for row in rows:
            counts.update(row["counts"][metric])
        if not any(name.split("_")[0] == metric for name in found | joint):
            lines.append(page.Line(metric, "not measured", "", told(outcome.counts or counts)))
        lines += [page.Line(name, str(count), "", "in all videos") for name, count in lacking(metric, counts).items()]
    return lines


def lacking(metric: str, counts: dict[str, int]) -> dict[str, int]:
    """What a learned metric looked for and did not find, in words, and how often."""
    return {f"{metric}: {name.replace('_', ' ')}": count for name, count in counts.items() if "without" in name and count}


def joint_figures(overall: dict[str, learned.Outcome]) -> dict[str, float]:
    """Those of all videos together."""
    return {name: figure for outcome in overall.values() for name, figure in outcome.figures.items()}


def show(lines: Sequence[page.Line], title: str) -> None:
    """The summary on the terminal."""
    drawn = Table(title=title, title_justify="left")
    for name in ("metric", "here", "the paper, on other data", ""):
        drawn.add_column(name, justify="left" if name in ("metric", "") else "right")
    for line in lines:
        drawn.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 140).print(drawn)


def write_page(
    flags: argparse.Namespace, found: Sequence[compare.Pair], rows: Sequence[dict[str, Any]], lines: Sequence[page.Line], metrics: dict[str, learned.Metric]
) -> None:
    """--report: the worst videos first, by the first figure of RANKS that there is."""
    pairs = {pair.name: pair for pair in found}
    by = next((name for name in RANKS if name in means(rows)), "")
    ranked = sorted(rows, key=lambda row: RANKS[by] * row[by] if by in row else -math.inf)  # none: no face was found
    figures_of = lambda row: {name: value for name, value in row.items() if isinstance(value, float)}
    lacks_of = lambda row: {name: count for metric, counts in row["counts"].items() for name, count in lacking(metric, counts).items()}
    told = lambda row: ", ".join(f"{name} {value:.3g}" for name, value in (figures_of(row) | lacks_of(row)).items())
    clips = [page.Clip(pairs[row["name"]], told(row), portrait_of(pairs[row["name"]], flags)) for row in ranked[: flags.shown]]
    curves = {PLAIN[name][0]: [row["windows"][name] for row in rows] for name in ("l1", "psnr")} if flags.protocol == "self" else {}
    title = f"{flags.generated.resolve().name}: {len(rows)} videos, protocol {flags.protocol}"
    page.write(flags.report, title=title, lines=lines, curves=curves, clips=clips, order=f"the worst first, by {by}" if by else "", notes=notes(flags, metrics))


def notes(flags: argparse.Namespace, metrics: dict[str, learned.Metric]) -> Iterator[str]:
    """How everything was measured."""
    if flags.protocol == "self":
        yield (
            "Figures are means over videos, of means over frames. Errors take 1 for the range of a pixel; which range the paper's mean absolute error takes it does not "
            "say: of -1 to 1, it would be half of what stands here. A frame without error counts as 100 dB. SSIM: Gaussian window of sigma 1.5."
        )
        yield f"A window has {flags.window} frames, counted from the first frame of each video; later windows are those of longer videos."
        yield "Eyes, nose and mouth are boxes around the reference's landmarks, where it has any; of a clip all their pixels are taken together."
    for name, metric in metrics.items():
        yield f"{name}: {metric.protocol}"


def parse() -> argparse.Namespace:
    parser = cli.ArgumentParser(prog="python -m svdp_jax.evaluation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generated", type=pathlib.Path, required=True, help="folder of videos, as sample.py writes them")
    parser.add_argument("--reference", type=pathlib.Path, required=True, help="folder of the true videos (self), or of the driving videos (cross)")
    parser.add_argument("--protocol", choices=["self", "cross"], default="self", help="what the references are (default: %(default)s)")
    parser.add_argument("--sources", type=pathlib.Path, help="folder of the portraits, for identity in the cross protocol")
    parser.add_argument("--metrics", default="", help=f"learned ones, with commas: {', '.join(learned.METRICS)} (default: none; errors need no weights)")
    parser.add_argument("--weights", type=pathlib.Path, default=pathlib.Path("weights"), help="folder of the learned metrics' weights (default: %(default)s)")
    parser.add_argument("--landmarker", help="face_landmarker.task, for metrics of faces, and for errors of eyes, nose and mouth, where a .npz beside a video comes first")
    parser.add_argument("--window", type=int, default=16, help="frames of a window, of which errors are told apart (default: %(default)s)")
    parser.add_argument("--report", type=pathlib.Path, help="write a page here (.html), and its videos beside it")
    parser.add_argument("--shown", type=int, default=12, help="videos on the page, the worst first (default: %(default)s)")
    parser.add_argument("--json", type=pathlib.Path, help="write all figures here, those of each video, too")
    flags = parser.parse_args()
    flags.metrics = [name.strip() for name in flags.metrics.split(",") if name.strip()]
    flags.landmarker = detectors.landmarker_for_any(flags.landmarker)
    if unknown := set(flags.metrics) - set(learned.METRICS):
        raise ConfigError(f"--metrics {', '.join(sorted(unknown))}: there is {', '.join(learned.METRICS)}")
    if flags.protocol == "cross" and not flags.metrics:
        raise ConfigError("--protocol cross has no true frames to compare with: name learned metrics with --metrics")
    if flags.protocol == "cross" and "lpips" in flags.metrics:
        raise ConfigError("--metrics lpips compares with true frames, which --protocol cross has not")
    if flags.protocol == "cross" and "csim" in flags.metrics and not (flags.sources and flags.sources.is_dir()):
        raise ConfigError("--metrics csim in the cross protocol compares with the portraits: give their folder with --sources")
    if needing := [name for name in flags.metrics if "landmarks" in learned.METRICS[name].uses and not flags.landmarker]:
        raise ConfigError(f"--metrics {','.join(needing)} needs the faces of the generated videos: give face_landmarker.task with --landmarker")
    for name in ("window", "shown"):
        if getattr(flags, name) < 1:
            raise ConfigError(f"--{name} {getattr(flags, name)} must be at least 1")
    for path in filter(None, (flags.json, flags.report)):
        if not path.parent.is_dir():
            raise ConfigError(f"{path} cannot be written: there is no directory {path.parent}; make it first")
        if path.is_dir():
            raise ConfigError(f"{path} cannot be written: it is a directory")
    if flags.report:
        page.clips_folder(flags.report)
    return flags


if __name__ == "__main__":
    main()
