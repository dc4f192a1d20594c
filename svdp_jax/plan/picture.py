"""A picture of rows: what a device holds, and how long a step takes, bar by bar."""

from __future__ import annotations

import pathlib

from svdp_jax import files
from svdp_jax.config import ConfigError
from svdp_jax.plan import rows

PARTS = {"parameters": "#4c72b0", "optimizer": "#dd8452", "ema": "#55a868", "batch": "#c44e52", "autoencoder": "#8172b3", "constants": "#937860", "latents": "#c44e52", "padding": "#e0c060", "temporaries": "#b0b0b0"}
TIMES = {"matrix": "#4c72b0", "memory": "#dd8452", "interconnect": "#c44e52", "step": "#303030"}


def check(path: pathlib.Path) -> None:
    """ConfigError where matplotlib is missing, or draws no such file."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install -e '.[plot]'") from None
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ConfigError(f"--plot {path}: its name must end in one of {', '.join(f'.{name}' for name in sorted(known))}")


def draw(compiled: list[rows.Row], path: pathlib.Path) -> None:
    """Writes it, of rows that were compiled. MediaError where it cannot be written."""
    from matplotlib.figure import Figure  # which is not needed without --plot

    shown = compiled[::-1]
    figure = Figure(figsize=(13, 2.2 + 0.42 * len(shown)), layout="constrained")
    memory, time = figure.subplots(1, 2, sharey=True)
    names = [rows.title(row) for row in shown]
    left = [0.0] * len(shown)
    for part, colour in PARTS.items():
        widths = [row["memory"].get(part, 0) / 1e9 for row in shown]
        if any(widths):
            memory.barh(names, widths, left=left, color=colour, label=part)
            left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, row in enumerate(shown):
        if row["limit"]:
            memory.plot([row["limit"] / 1e9] * 2, [place - 0.45, place + 0.45], color="black", linewidth=2, label="a device has" if place == 0 else None)
    memory.set_xlabel("GB on a device")
    memory.legend(fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    height = 0.8 / len(TIMES)
    for number, (name, colour) in enumerate(TIMES.items()):
        places = [place + 0.4 - (number + 0.5) * height for place in range(len(shown))]
        time.barh(places, [row["seconds"].get(name, 0) for row in shown], height=height, color=colour, label=name)
    time.set_xlabel("seconds of a step, at least")
    time.legend(fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    with files.whole(path) as partial:
        figure.savefig(partial, dpi=110, format=path.suffix[1:].lower())
