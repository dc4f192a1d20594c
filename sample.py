"""Animate a portrait with a driving video.

    python sample.py                                    the bundled portrait, driving clip and demo weights -> out/
    python sample.py -s PHOTO -d VIDEO -o DIR --checkpoint DIR

Writes {source}--{driving}.mp4 with the driver's frame rate, frame count and sound, the same beside its inputs
(_concat.mp4), and a .json that says how it was made. Finished windows are kept beside them until then: after a crash,
--resume goes on from the last one.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any

import cv2
import jax
import numpy as np
import tyro
from tqdm import tqdm

import svdp_jax
from svdp_jax import checkpoint, cli, pipeline, rendering
from svdp_jax.config import Config, ConfigError
from svdp_jax.data import faces, inputs, video

DEMO = pathlib.Path(svdp_jax.__file__).parent / "assets" / "demo"


@dataclasses.dataclass(frozen=True)
class Flags:
    """What to animate with what, and how."""

    source: Annotated[pathlib.Path | None, tyro.conf.arg(aliases=["-s"])] = None
    """Portrait to animate (default: the bundled one)."""
    driving: Annotated[pathlib.Path | None, tyro.conf.arg(aliases=["-d"])] = None
    """Video (or picture) whose expressions and pose it takes on (default: the bundled one)."""
    output: Annotated[pathlib.Path, tyro.conf.arg(aliases=["-o"])] = pathlib.Path("out")
    """Directory for the results."""
    checkpoint: str = str(DEMO / "checkpoint")
    """Training workdir or exported checkpoint, here or on gs://. The bundled one knows rendered portraits only."""
    steps: int | None = None
    """Denoising steps (default: the checkpoint's)."""
    guidance: tuple[float, float, float] | None = None
    """Weights of source, driving and history (default: the checkpoint's; the paper's are 2 2.5 1)."""
    seed: int = 42
    """Of the noise."""
    concat: bool = True
    """Also write source, driver and result side by side."""
    max_frames: int | None = None
    """Stop after so many frames of the driver."""
    landmarker: pathlib.Path | None = None
    """MediaPipe's face_landmarker.task, or the driver's landmarks in a .npz (default: $SVDP_FACE_LANDMARKER, else a simple detector)."""
    face: int | None = None
    """Which face of the source, 0 being the largest (default: the largest)."""
    driving_face: int | None = None
    """Which face of the driver's first frame that shows any (default: the largest)."""
    align: bool = True
    """Crop both faces to the same size and place."""
    paste_back: bool = True
    """Put the animated crop back into the whole picture."""
    resume: bool = False
    """Continue an interrupted rendering; the result is that of one that was not interrupted."""


def main(flags: Flags) -> None:
    # ------------------------------------------------------------------------- inputs: all checked before any slow work
    started = time.perf_counter()
    if (flags.source is None) != (flags.driving is None):
        raise ConfigError("--source and --driving go together; without both, the bundled pair is used")
    if flags.max_frames is not None and flags.max_frames < 1:
        raise ConfigError(f"--max-frames {flags.max_frames} must be at least 1")
    if not 0 <= flags.seed < 2**32:
        raise ConfigError(f"--seed {flags.seed} must be 0 to 2**32 - 1")
    bundled = flags.source is None
    source, driving = (DEMO / "source.png", DEMO / "driving.mp4") if bundled else (flags.source, flags.driving)
    config = read_config(flags)
    name = f"{source.stem}--{driving.stem}"
    make_writable(flags.output, name)
    finished = flags.output / f".{name}.windows"
    kept = rendering.windows_in(finished)
    if kept and not flags.resume:
        raise ConfigError(f"{finished} holds {kept} finished windows of an interrupted rendering; continue it with --resume, or delete it to begin anew")
    if kept:
        prepared = inputs.load(finished / rendering.INPUTS, source, driving, config.data)
    else:
        prepared = inputs.prepare(
            source,
            driving,
            config.data,
            landmarker=flags.landmarker,
            face=flags.face,
            driving_face=flags.driving_face,
            align=flags.align and not bundled,
            max_frames=flags.max_frames,
        )
    provenance = checkpoint.fingerprint(flags.checkpoint)
    settings = settings_of(flags, config, source, driving, provenance)
    if kept:
        rendering.check_settings(finished, settings)
    else:
        rendering.begin(finished, settings, bytes_needed=3 * len(prepared.landmarks) * prepared.size**2)
        inputs.save(prepared, finished / rendering.INPUTS)

    # ---------------------------------------------------------------------------------------------------------- weights
    loading = animating = time.perf_counter()
    frames = len(prepared.landmarks)
    windows = -(-frames // config.data.frames)
    if kept < windows:
        config, params, frozen = checkpoint.load_weights(flags.checkpoint)
        config = override(config, flags)
        params = jax.device_put(params)

        # ------------------------------------------------------------------------------------------------------ animate
        animating = time.perf_counter()
        steps, total = config.sample.steps, windows * config.sample.steps
        bar = tqdm(total=total, initial=kept * steps, unit="step", desc=f"{frames} frames, {windows} windows", dynamic_ncols=True)
        with bar, cli.interrupted(f"finished windows are kept in {finished}: --resume continues"):
            masked = inputs.masked_frames(prepared, config.data, start=kept * config.data.frames)
            key, after = jax.random.key(flags.seed), rendering.last(finished)
            for window in pipeline.animate(config, params, frozen, prepared.source, masked, key, after=after, progress=bar.update):
                rendering.save(finished, window)

    # ------------------------------------------------------------------------------------------------------------ write
    writing = time.perf_counter()
    made = {
        "note": "synthesised: this video shows events that did not happen",
        "version": f"svdp_jax {svdp_jax.__version__}",
        "checkpoint": provenance,
    }
    metadata = {"title": name, "comment": "; ".join([made["note"], made["version"], f"checkpoint {made['checkpoint']}"])}
    written = [flags.output / f"{name}.mp4"]
    pictures = whole_pictures(rendering.frames(finished), prepared, paste_back=flags.paste_back)
    video.write_video(written[0], pictures, fps=prepared.info.fps, audio_from=driving, metadata=metadata)
    if flags.concat:
        written.append(flags.output / f"{name}_concat.mp4")
        pictures = side_by_side(rendering.frames(finished), prepared)
        video.write_video(written[1], pictures, fps=prepared.info.fps, audio_from=driving, metadata=metadata)
    done = time.perf_counter()
    record = made | {
        "source": source.name,
        "driving": driving.name,
        "frames": frames,
        "fps": str(prepared.info.fps),
        "seed": flags.seed,
        "steps": config.sample.steps,
        "guidance": config.sample.guidance,
        "windows": {"rendered": windows - kept, "resumed": kept},
        "seconds": {"inputs": loading - started, "load": animating - loading, "animate": writing - animating, "write": done - writing},
    }
    written.append(flags.output / f"{name}.json")
    written[-1].write_text(json.dumps(record, indent=2) + "\n")
    shutil.rmtree(finished)
    print("\n".join(f"wrote {path}" for path in written))


def read_config(flags: Flags) -> Config:
    """The checkpoint's config with the flags' sampling, before its weights are loaded."""
    config, _ = checkpoint.find_weights(flags.checkpoint)
    return override(config, flags)


def override(config: Config, flags: Flags) -> Config:
    """`config` with the flags that were given."""
    given = {name: getattr(flags, name) for name in ("steps", "guidance") if getattr(flags, name) is not None}
    return dataclasses.replace(config, sample=dataclasses.replace(config.sample, **given))


def make_writable(directory: pathlib.Path, name: str) -> None:
    """Makes the directory; ConfigError if nothing can be written there, or a folder has the name of a result."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".{os.getpid()}.writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--output {directory} cannot be written: {error.strerror}") from error
    for path in (directory / f"{name}{ending}" for ending in (".mp4", "_concat.mp4", ".json")):
        if path.is_dir():
            raise ConfigError(f"--output {directory} cannot be written: {path.name} is a folder there; move it or choose another directory")


def settings_of(flags: Flags, config: Config, source: pathlib.Path, driving: pathlib.Path, provenance: str) -> dict[str, Any]:
    """All that decides the frames: a rendering can be continued with the same settings alone."""

    def digest(path: pathlib.Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]

    choices = {name: getattr(flags, name) for name in ("seed", "face", "driving_face", "align", "max_frames")}
    return choices | {
        "version": svdp_jax.__version__,
        "checkpoint": provenance,
        "source": digest(source),
        "driving": digest(driving),
        "landmarker": str(flags.landmarker),
        "steps": config.sample.steps,
        "guidance": config.sample.guidance,
    }


def whole_pictures(frames: Iterator[np.ndarray], prepared: inputs.Inputs, *, paste_back: bool) -> Iterator[np.ndarray]:
    """The frames inside the source picture, or as they are."""
    for frame in frames:
        yield faces.paste_back(prepared.picture, frame, prepared.crop) if paste_back else frame


def side_by_side(frames: Iterator[np.ndarray], prepared: inputs.Inputs, *, smallest: int = 256) -> Iterator[np.ndarray]:
    """Source | driver | result, each at least `smallest` pixels wide."""
    side = max(prepared.size, smallest)
    for driver, frame in zip(inputs.driver_frames(prepared), frames, strict=True):
        row = (prepared.source, driver, frame)
        yield np.concatenate([cv2.resize(picture, (side, side), interpolation=cv2.INTER_CUBIC) for picture in row], axis=1)


if __name__ == "__main__":
    with cli.messages(ConfigError, video.MediaError):
        main(cli.parse(Flags(), sys.argv[1:], description=__doc__, prog="sample.py"))
