"""A rendering in progress: its finished windows on disk, until the video is written, so that a crash costs one window.

In: windows (`pipeline.Window`), one after the other. Out: the last of them, to go on from, and all their frames, to the bit. A folder
holds

    settings.json     everything that decides the frames; a rendering is only continued with the same
    inputs.npz        what was found out about source and driver (`data.inputs`)
    000000.npz, ...   frames uint8 [n,H,W,3] and history float32 [P,h,w,C] of each window; a file is whole or not there

and belongs to one process at a time, which `held` makes sure of.

One frame takes H x W x 3 bytes: 1 MB at 576 x 576, 25 MB a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8

from svdp_jax import files
from svdp_jax.config import ConfigError
from svdp_jax.pipeline import Window

SETTINGS, INPUTS = "settings.json", "inputs.npz"


def windows_in(folder: pathlib.Path) -> int:
    """How many windows are finished."""
    return len(_files(folder))


@contextlib.contextmanager
def held(folder: pathlib.Path) -> Iterator[None]:
    """Inside, the folder is there and no other rendering's; an empty one is removed in the end. ConfigError where one is at work in it. On a file system
    without locks nobody makes sure of that."""
    while True:
        with files.writing(folder):
            folder.mkdir(exist_ok=True)
        place = os.open(folder, os.O_RDONLY)
        if not files.lock_now(place):
            os.close(place)
            raise ConfigError(f"{folder}: another process renders the same; let it finish, or give another --output")
        if folder.is_dir() and os.path.samestat(os.fstat(place), folder.stat()):  # else it was finished, and removed, meanwhile
            break
        os.close(place)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()
        os.close(place)


def begin(folder: pathlib.Path, settings: dict[str, Any], *, bytes_needed: int) -> None:
    """A folder for a new rendering; what an earlier one left in it without a finished window goes. ConfigError without room for it all."""
    for path in folder.iterdir() if folder.is_dir() else ():
        path.unlink()
    free = shutil.disk_usage(folder.parent).free
    if free < bytes_needed:
        raise ConfigError(f"{folder.parent} has {free / 1e9:.1f} GB free; finished windows need {bytes_needed / 1e9:.1f} GB until the video is written")
    with files.writing(folder):
        folder.mkdir(exist_ok=True)
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


def begun_with(folder: pathlib.Path, settings: dict[str, Any]) -> bool:
    """Whether there is a rendering with these settings."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / SETTINGS).read_text()) == json.loads(json.dumps(settings))
    return False


def check_settings(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    """ConfigError, naming what differs, unless the rendering was begun with these settings."""
    try:
        before = json.loads((folder / SETTINGS).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--resume: {folder} cannot be continued ({error}); delete it to begin anew") from error
    now = json.loads(json.dumps(settings))
    changed = [f"{name} was {before.get(name)}, is {now.get(name)}" for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if changed:
        raise ConfigError(f"--resume: {folder} was begun with other settings: {'; '.join(changed)}; use the same, or delete it to begin anew")


def save(folder: pathlib.Path, window: Window) -> None:
    """Keeps a window. MediaError where there is no room for it; those before it stay."""
    with files.whole(folder / f"{window.number:06d}.npz", advice="free some space and continue with --resume") as partial, partial.open("wb") as file:
        np.savez(file, frames=window.frames, history=window.history)


def last(folder: pathlib.Path) -> Window | None:
    """The last finished window; None where there is none yet."""
    files = _files(folder)
    if not files:
        return None
    with np.load(files[-1]) as stored:
        return Window(len(files) - 1, stored["frames"], stored["history"])


def frames(folder: pathlib.Path) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """The frames of all windows, of which one is held at a time."""
    for path in _files(folder):
        with np.load(path) as stored:
            yield from stored["frames"]


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The windows from the first on, as far as none is missing."""
    found = []
    while (path := folder / f"{len(found):06d}.npz").is_file():
        found.append(path)
    return found
