"""A page of an evaluation for eyes: figures beside the paper's, error from window to window, and the clips side by side, the worst first.

In: what was found out. Out: one HTML file, and beside it a folder of its videos.
"""

from __future__ import annotations

import html
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8

import svdp_jax
from svdp_jax import files
from svdp_jax.config import ConfigError
from svdp_jax.data import video
from svdp_jax.data.report import STYLE
from svdp_jax.evaluation.compare import Pair

HEIGHT = 256  # pixels of the videos
MADE = f"synthesised: this shows events that did not happen (svdp_jax {svdp_jax.__version__})"
WIDE, HIGH, LEFT, BELOW = 560, 200, 56, 36  # pixels of a plot and of its margins

_MORE = """
video { display: block; width: 100%; }
svg { background: #8881; max-width: 100%; } svg text { font: 11px system-ui, sans-serif; fill: currentColor; }
p.note { max-width: 80ch; opacity: .8; }
"""


class Line(NamedTuple):
    """A figure of all clips."""

    name: str
    value: str
    paper: str  # the paper's, of other data; empty where it has none
    note: str


class Clip(NamedTuple):
    """A clip that is shown."""

    pair: Pair
    told: str  # its figures
    portrait: pathlib.Path | None = None  # that it was made from


def write(
    path: pathlib.Path, *, title: str, lines: Sequence[Line], curves: dict[str, list[list[float]]], clips: Sequence[Clip], order: str, notes: Iterable[str]
) -> None:
    """Writes the page, and NAME_clips/ beside it, in place of earlier ones. `curves`: of each name, one list per clip, a value per window; `order`: of the
    clips, in words. MediaError where it cannot be written."""
    folder = clips_folder(path)
    with files.writing(folder):
        folder.mkdir(exist_ok=True)
        for earlier in folder.iterdir():
            earlier.unlink()
    shown = []
    for number, clip in enumerate(clips):
        place = folder / f"{number:03d}.mp4"
        video.write_video(place, side_by_side(clip), fps=video.probe(clip.pair.generated).fps, audio_from=clip.pair.generated, metadata={"comment": MADE})
        shown.append((f"{folder.name}/{place.name}", clip))
    with files.whole(path) as partial:
        partial.write_text(_page(title, lines, curves, shown, order, notes), encoding="utf-8")


def clips_folder(path: pathlib.Path) -> pathlib.Path:
    """Where the videos of a page lie. ConfigError where that is a folder with anything else in it."""
    folder = path.with_name(f"{path.stem}_clips")
    if folder.exists() and not (folder.is_dir() and all(re.fullmatch(r"\d{3,}\.mp4", place.name) for place in folder.iterdir())):
        raise ConfigError(f"--report {path} puts its videos into {folder}, which is there and holds other things: another name")
    return folder


def side_by_side(clip: Clip) -> Iterator[UInt8[np.ndarray, "256 W 3"]]:
    """Frames, from the left: the portrait where it is known, the reference, the generated video."""
    portrait = [_of_height(video.read_image(clip.portrait))] if clip.portrait else []
    for frames in zip(video.read_frames(clip.pair.reference), video.read_frames(clip.pair.generated), strict=False):
        yield np.concatenate([*portrait, *map(_of_height, frames)], axis=1)


def _of_height(frame: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "256 V 3"]:
    width = 2 * round(frame.shape[1] * HEIGHT / frame.shape[0] / 2)  # even, for the encoder
    return cv2.resize(frame, (width, HEIGHT), interpolation=cv2.INTER_AREA if frame.shape[0] > HEIGHT else cv2.INTER_CUBIC)


def curve(values: Sequence[Sequence[float]]) -> str:
    """An SVG of clips' values from window to window: their mean, and between which the middle half of them is. Later windows are those of longer clips."""
    columns = [np.array([clip[window] for clip in values if len(clip) > window]) for window in range(max(map(len, values)))]
    mean, low, high = np.array([[column.mean(), *np.percentile(column, [25, 75])] for column in columns]).T
    top = max(high.max(), mean.max(), 1e-9) * 1.1
    across = LEFT + (WIDE - LEFT - 10) * (np.arange(len(columns)) / max(len(columns) - 1, 1))
    down = lambda y: (HIGH - BELOW) * (1 - np.asarray(y) / top) + 6
    path = lambda y, x=across: " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, down(y), strict=True))
    parts = [f"<svg viewBox='0 0 {WIDE} {HIGH}' width={WIDE} height={HIGH} role=img>"]
    for tick in np.linspace(0, top / 1.1, 3):
        parts.append(f"<line x1={LEFT} x2={WIDE - 10} y1={down(tick):.1f} y2={down(tick):.1f} stroke='#8886'/><text x={LEFT - 6} y={down(tick) + 4:.1f} text-anchor=end>{tick:.3g}</text>")
    parts.append(f"<polygon points='{path(low)} {path(high[::-1], across[::-1])}' fill='#27c3'/><polyline points='{path(mean)}' fill=none stroke='#27c' stroke-width=2 />")
    for number in sorted({0, len(columns) // 2, len(columns) - 1}):
        parts.append(f"<text x={across[number]:.1f} y={HIGH - 14} text-anchor=middle>{number + 1}</text>")
    return "".join([*parts, f"<text x={WIDE / 2} y={HIGH - 1} text-anchor=middle>window, of {len(values)} clips</text></svg>"])


def _page(
    title: str, lines: Sequence[Line], curves: dict[str, list[list[float]]], shown: Sequence[tuple[str, Clip]], order: str, notes: Iterable[str]
) -> str:
    """The page's text; `shown` are paths of videos, and what they are of."""
    text = html.escape
    page = [f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>{text(title)}</title><style>{STYLE}{_MORE}</style>"]
    page.append(f"<h1>{text(title)}</h1><table><tr><th>metric<th>here<th>the paper, on other data<th style='text-align:left'>")
    page += [f"<tr><td>{text(line.name)}<td>{text(line.value)}<td>{text(line.paper)}<td style='text-align:left'>{text(line.note)}" for line in lines]
    page.append("</table>")
    for name, values in curves.items():
        page.append(f"<h2>{text(name)}, from window to window</h2>{curve(values)}")
    shows = "Portrait, reference and generated" if any(clip.portrait for _, clip in shown) else "Reference and generated"
    page.append(f"<h2>{shows}{f', {text(order)}' if order else ''}</h2><div id=clips>")
    for place, clip in shown:
        page.append(f"<div class='clip is-kept'><video controls loop muted preload=metadata src='{text(place, quote=True)}#t=0.01'></video><b>{text(clip.pair.name)}</b><br><small>{text(clip.told)}</small></div>")
    page.append("</div><h2>How it was measured</h2>")
    page += [f"<p class=note>{text(note)}</p>" for note in notes]
    return "\n".join([*page, "</html>", ""])
