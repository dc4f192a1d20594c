"""Compare sharding strategies before booking a single chip: each is compiled, here, by the compiler of the devices it is for.

    python -m svdp_jax.plan --config configs/svdp_sd35m.py --target v5p:2x2x2 --target h100x8

Says of each strategy whether it fits and by how much, what a device holds, computes, moves and sends, and how long a step takes at least. Rows are kept in
the user's cache directory until config, code or compiler change. Exit status 1 if no row was compiled, and none was found not to fit.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import pathlib
import sys
from typing import get_args

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from svdp_jax import cli, files
from svdp_jax.config import ConfigError, load_config
from svdp_jax.files import MediaError
from svdp_jax.models.transformer import Remat
from svdp_jax.plan import advice, picture, rows, targets
from svdp_jax.sharding import STRATEGIES


def main() -> None:
    parser = cli.ArgumentParser(prog="python -m svdp_jax.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=pathlib.Path, required=True, help="as of train.py")
    parser.add_argument("--target", action="append", required=True, help="v5p:2x2x2, 2xv5e:8x8 (two slices), h100x8, h200x16, cpu:8; may be given again")
    parser.add_argument("--strategies", help=f"of {', '.join(STRATEGIES)}; inner axes have 2 devices, or as many as fsdp_context:4 or fsdp_context_tensor:4:2 say (default: all)")
    parser.add_argument("--remat", help=f"of {', '.join(get_args(Remat))}; several, with commas, are compared (default: the config's)")
    parser.add_argument("--batch-per-device", help="samples of a training step by the number of devices, as 2 or 0.25; several, with commas, are compared (default: 1)")
    parser.add_argument("--program", choices=["train", "sample"], default="train", help="a training step with history, or a denoising step, for which devices share frames")
    parser.add_argument("--jobs", type=int, default=1, help="compilations at once; one takes a core or two, and up to --memory (default: %(default)s)")
    parser.add_argument("--json", type=pathlib.Path, help="write all rows here")
    parser.add_argument("--plot", type=pathlib.Path, help="write a picture of memory and time here (.png, .pdf, .svg, ...)")
    parser.add_argument("--memory", type=float, default=rows.Limits().memory, help="GB of this machine that one compilation may take (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=rows.Limits().seconds, help="that one compilation may take (default: %(default)s)")
    flags = parser.parse_args()

    check_places(flags)
    asked = requests(flags)
    found, filling = [], rows.fill(asked, limits=rows.Limits(flags.memory, flags.seconds), jobs=flags.jobs)
    with tqdm(total=len(asked), unit="row", dynamic_ncols=True) as bar, contextlib.closing(filling) as filled:
        for request in asked:
            bar.set_description(rows.title(request.named))
            row, kept = next(filled)
            took = "from the cache" if kept else row.get("reason") or f"compiled in {row['compile_seconds']:.0f} s"
            bar.write(f"{rows.title(row)}: {took}", file=sys.stderr)
            bar.update()
            found.append(row)
    console = Console(width=None if sys.stdout.isatty() else 200)
    for target in dict.fromkeys(row["target"] for row in found):
        ranked = advice.ranked([row for row in found if row["target"] == target])
        console.print(table(targets.parse(target), ranked))
        for line in advice.told(targets.parse(target), ranked):
            console.print(line, soft_wrap=True, highlight=False)
    if flags.json:
        with files.whole(flags.json) as partial:
            partial.write_text(json.dumps({"rows": found}, indent=1) + "\n")
    compiled = [row for row in found if "compile_seconds" in row]
    if flags.plot and compiled:
        picture.draw(compiled, flags.plot)
    elif flags.plot:
        print("--plot: no row was compiled, so that there is nothing to draw", file=sys.stderr)
    if not compiled and not any(row["fits"] is False for row in found):
        sys.exit(f"error: of {len(found)} rows none was compiled")


def check_places(flags: argparse.Namespace) -> None:
    """ConfigError where what is found out could not be written in the end."""
    for flag, path in ("--json", flags.json), ("--plot", flags.plot):
        if path and path.is_dir():
            raise ConfigError(f"{flag} {path} is a directory: give a file")
        if path and not path.parent.is_dir():
            raise ConfigError(f"{flag} {path}: there is no directory {path.parent}")
    if flags.plot:
        picture.check(flags.plot)


def requests(flags: argparse.Namespace) -> list[rows.Request]:
    """All that is to be compiled. ConfigError, before any of it is, for what does not exist."""
    config = load_config(flags.config)
    chosen = [targets.parse(name) for name in dict.fromkeys(flags.target)]
    for target in chosen:
        targets.check_installed(target)
    if flags.jobs < 1:
        raise ConfigError(f"--jobs {flags.jobs} must be at least 1")
    if flags.program == "sample":
        for flag, value in ("--strategies", flags.strategies), ("--remat", flags.remat), ("--batch-per-device", flags.batch_per_device):
            if value is not None:
                raise ConfigError(f"{flag} {value} is of training steps: with --program sample, devices share the frames of one portrait")
        names, batches, remats = ["context"], [1.0], ["none"]
    else:
        names = list(STRATEGIES) if flags.strategies in (None, "all") else list(dict.fromkeys(flags.strategies.split(",")))
        for name in names:
            advice.check_strategy(name)
        batches = batches_per_device("1" if flags.batch_per_device is None else flags.batch_per_device, chosen)
        remats = list(dict.fromkeys((flags.remat or config.train.remat).split(",")))
        if unknown := set(remats) - set(get_args(Remat)):
            raise ConfigError(f"--remat {', '.join(sorted(unknown))}: there is {', '.join(get_args(Remat))}")
    return [rows.Request(config, target, name, flags.program, batch, remat) for target in chosen for name in names for batch in batches for remat in remats]


def batches_per_device(given: str, chosen: list[targets.Target]) -> list[float]:
    """Each of what is given. ConfigError unless they are samples in all on every target."""
    try:
        found = list(dict.fromkeys(map(float, given.split(","))))
    except ValueError:
        raise ConfigError(f"--batch-per-device {given} must be numbers, with commas between them") from None
    for batch, target in itertools.product(found, chosen):
        samples = batch * target.count
        if round(samples) < 1 or abs(samples - round(samples)) > 0.01:
            raise ConfigError(f"--batch-per-device {batch:g} is {samples:g} samples on the {target.count} devices of {target.name}")
    return found


def table(target: targets.Target, ranked: list[rows.Row]) -> Table:
    """What is known of a target's rows, the best first."""
    device = target.device
    peak = f"; a device: {device.memory:.1f} GB, {device.tflops:.0f} TFLOP/s, {device.bandwidth:.0f} GB/s" if device else " (virtual devices: kinds and axes of collectives are right, memory is another backend's)"
    drawn = Table(title=f"{target.name}: {target.count} devices{peak}", title_justify="left")
    for name in ("strategy", "remat", "mesh", "batch", "fits", "GB", "params", "optimizer", "EMA", "rest", "temporary", "TFLOP", "sent, GB", "s/step", "MFU", "compile s"):
        drawn.add_column(name, justify="left" if name in ("strategy", "remat", "mesh", "sent, GB") else "right")
    for place, row in enumerate(ranked):
        drawn.add_row(*cells(row, target.count), style="bold" if place == 0 and row.get("fits") else None)
    return drawn


def cells(row: rows.Row, devices: int) -> list[str]:
    """A row, as it is shown; `batch` is of all devices."""
    head, batch = [row["strategy"], row["remat"]], f"{row['batch'] * devices:.0f}" if row["program"] == "train" else "1"
    if "compile_seconds" not in row:
        return [*head, "", batch, "no" if row["fits"] is False else "-", *[""] * 11]
    memory, mesh = row["memory"], ",".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1)
    gigabytes = lambda *names: f"{sum(memory.get(name, 0) for name in names) / 1e9:.1f}"
    parts = [gigabytes(name) for name in ("parameters", "optimizer", "ema")] + [gigabytes("batch", "autoencoder", "constants", "latents", "padding"), gigabytes("temporaries")]
    spare = "" if row["limit"] is None else f"{(row['limit'] - memory['total']) / 1e9:+.1f}"
    sent = ", ".join(f"{'+'.join(axes)} {size / 1e9:.2f}" for axes, size in advice.sent(row).items())
    seconds = f"{row['seconds']['step']:.3f}" if row["seconds"] else "-"
    mfu = f"{row['mfu']:.0%}" if row["mfu"] else "-"
    fits = {True: spare, False: f"no {spare}", None: "-"}[row["fits"]]
    return [*head, mesh, batch, fits, gigabytes("total"), *parts, f"{row['flops'] / 1e12:.1f}", sent, seconds, mfu, f"{row['compile_seconds']:.0f}"]


if __name__ == "__main__":
    with cli.messages(ConfigError, MediaError):
        main()
