"""What became of every clip: a CSV for scripts, a page with thumbnails for eyes.

In: rows, one per clip or file: `name`, `dropped` (why; empty: kept), `note`, `thumbnail` (JPEG as base64, or empty), and whatever
else was measured. Out: report.csv, report.html and the folder report/ with its pictures.
"""

from __future__ import annotations

import base64
import collections
import csv
import html
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from svdp_jax import files

Row = dict[str, Any]

THUMBNAIL = 96  # pixels, height

STYLE = """
:root { color-scheme: light dark; font: 14px/1.4 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 1200px; padding: 0 1rem; }
h1 { font-size: 1.3rem; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #8884; }
td:first-child, th:first-child { text-align: left; }
.bar { display: inline-block; height: .7rem; background: #888; vertical-align: middle; }
.kept { background: #2a7; }
button { font: inherit; margin: 0 .3rem .5rem 0; padding: .2rem .7rem; cursor: pointer; }
button[aria-pressed=true] { background: #27c; color: white; }
#clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: .8rem; }
.clip { border: 1px solid #8884; border-left: 4px solid #c55; padding: .5rem; overflow-wrap: anywhere; content-visibility: auto; contain-intrinsic-size: 300px 190px; }
.clip.is-kept { border-left-color: #2a7; }
.clip img { display: block; height: 96px; max-width: 100%; object-fit: contain; object-position: left; }
.clip small { opacity: .75; }
"""
_SCRIPT = """
const buttons = [...document.querySelectorAll('button')];
for (const button of buttons) button.onclick = () => {
  for (const other of buttons) other.ariaPressed = other === button;
  for (const clip of document.querySelectorAll('.clip'))
    clip.hidden = button.dataset.show !== 'all' && clip.dataset.verdict !== button.dataset.show;
};
"""


def thumbnail(frames: Sequence[UInt8[np.ndarray, "H W 3"]]) -> str:
    """A strip of pictures as base64 JPEG; empty for none."""
    if not len(frames):
        return ""
    widths = [max(1, round(frame.shape[1] * THUMBNAIL / frame.shape[0])) for frame in frames]
    small = [cv2.resize(frame, (width, THUMBNAIL), interpolation=cv2.INTER_AREA) for frame, width in zip(frames, widths, strict=True)]
    done, data = cv2.imencode(".jpg", np.concatenate(small, axis=1)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])
    return base64.b64encode(data).decode() if done else ""


def summary(rows: Iterable[Row]) -> dict[str, int]:
    """How many rows were kept, and dropped for each reason, most frequent first."""
    counts = collections.Counter(row["dropped"] or "kept" for row in rows)
    return {"kept": counts.pop("kept", 0), **dict(counts.most_common())}


def write(directory: pathlib.Path, rows: Iterable[Row], *, title: str) -> list[Row]:
    """Writes report.csv, report.html and report/. A report that is there is replaced. Returns the rows, their thumbnails as paths."""
    pictures, written = directory / "report", []
    with files.writing(pictures):
        pictures.mkdir(parents=True, exist_ok=True)
        for number, row in enumerate(rows):
            picture = ""
            if row["thumbnail"]:
                picture = f"{pictures.name}/{number:06d}.jpg"
                (directory / picture).write_bytes(base64.b64decode(row["thumbnail"]))
            written.append(row | {"thumbnail": picture})  # not the picture itself: there may be tens of thousands
    columns = list(dict.fromkeys(name for row in written for name in row if name != "thumbnail"))
    with files.whole(directory / "report.csv") as partial, partial.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(written)
    with files.whole(directory / "report.html") as partial:
        partial.write_text(_page(written, columns, title=title), encoding="utf-8", errors="backslashreplace")
    return written


def _page(rows: Sequence[Row], columns: Sequence[str], *, title: str) -> str:
    counts = summary(rows)
    most = max(counts.values())
    text = html.escape
    lines = [
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>{text(title)}</title><style>{STYLE}</style>",
        f"<h1>{text(title)}</h1><table><tr><th>verdict<th>clips<th>",
    ]
    for verdict, count in counts.items():
        bar = f"<span class='bar {'kept' if verdict == 'kept' else ''}' style='width:{300 * count / most:.0f}px'></span>"
        lines.append(f"<tr><td>{text(verdict)}<td>{count}<td style='text-align:left'>{bar}")
    lines.append("</table><p>")
    for verdict, label in [("all", f"all {len(rows)}"), *((verdict, f"{verdict} {count}") for verdict, count in counts.items())]:
        lines.append(f"<button data-show='{text(verdict, quote=True)}' aria-pressed={'true' if verdict == 'all' else 'false'}>{text(label)}</button>")
    lines.append("<div id=clips>")
    measured = [name for name in columns if name not in ("name", "dropped", "note")]
    for row in rows:
        verdict = row["dropped"] or "kept"
        picture = f"<img loading=lazy alt='' src='{row['thumbnail']}'>" if row["thumbnail"] else ""
        shown = ", ".join(f"{name} {_short(row[name])}" for name in measured if row.get(name) not in (None, ""))
        note = f"<br><small>{text(row['note'])}</small>" if row["note"] else ""
        body = f"{picture}<b>{text(verdict)}</b> {text(row['name'])}<br><small>{text(shown)}</small>{note}"
        lines.append(f"<div class='clip {'' if row['dropped'] else 'is-kept'}' data-verdict='{text(verdict, quote=True)}'>{body}</div>")
    return "\n".join([*lines, f"</div><script>{_SCRIPT}</script></html>", ""])


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
