"""Animate a portrait with a driving video.

    python sample.py                                    the bundled portrait, driving clip and demo weights -> out/
    python sample.py -s PHOTO -d VIDEO -o DIR --checkpoint DIR
    python sample.py --jobs JOBS.csv -o DIR             many: a CSV file with the columns source, driving and, if need be, output

Writes {source}--{driving}.mp4 with the driver's frame rate, frame count and sound, the same beside its inputs
(_concat.mp4), and a .json that says how it was made. Finished windows are kept beside them until then: after a crash,
--resume goes on from the last one.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import queue
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, NamedTuple

import cv2
import jax
import numpy as np
import tyro
from tqdm import tqdm

import svdp_jax
from svdp_jax import checkpoint, cli, files, jobs, pipeline, rendering, sharding
from svdp_jax.config import Config, ConfigError, MeshConfig
from svdp_jax.data import detectors, faces, inputs, video
from svdp_jax.jobs import Job
from svdp_jax.stopwatch import Stopwatch
from svdp_jax.types import Frozen

DEMO = pathlib.Path(svdp_jax.__file__).parent / "assets" / "demo"
FIRST_FRAME = "first frame"  # seconds from the start, beside those of the stages

Place = sharding.Layout | jax.Device  # where a model is: over all devices, or on one


@dataclasses.dataclass(frozen=True)
class Mesh:
    """What several devices do."""

    strategy: Literal["data", "context"] = "data"
    """`data`: each takes jobs of its own. `context`: all of them share the frames of one job after the other."""


@dataclasses.dataclass(frozen=True)
class Flags:
    """What to animate with what, and how."""

    source: Annotated[pathlib.Path | None, tyro.conf.arg(aliases=["-s"])] = None
    """Portrait to animate (default: the bundled one)."""
    driving: Annotated[pathlib.Path | None, tyro.conf.arg(aliases=["-d"])] = None
    """Video (or picture) whose expressions and pose it takes on (default: the bundled one)."""
    output: Annotated[pathlib.Path, tyro.conf.arg(aliases=["-o"])] = pathlib.Path("out")
    """Directory for the results."""
    jobs: pathlib.Path | None = None
    """CSV file of many pairs: columns source, driving and, if need be, output. One that fails is told at the end and stops no other."""
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
    mesh: Mesh = Mesh()


class Model(NamedTuple):
    """A checkpoint, on a device or over all of them."""

    params: Any
    frozen: Frozen
    layout: sharding.Layout | None


def main(flags: Flags) -> None:
    cli.keep_programs()
    if flags.max_frames is not None and flags.max_frames < 1:
        raise ConfigError(f"--max-frames {flags.max_frames} must be at least 1")
    if not 0 <= flags.seed < 2**32:
        raise ConfigError(f"--seed {flags.seed} must be 0 to 2**32 - 1")
    if flags.face is not None and not flags.align:
        raise ConfigError("--face chooses the face to crop to, and --no-align takes the middle square: give one or the other")
    if flags.source is None and flags.jobs is None:  # the bundled pair is cropped already
        flags = dataclasses.replace(flags, align=False)
    asked = jobs_of(flags)
    stored, weights = checkpoint.find_weights(flags.checkpoint)  # once: training may save another step meanwhile
    config = override(stored, flags)
    provenance = functools.cache(lambda: checkpoint.fingerprint(flags.checkpoint, weights))
    if flags.mesh.strategy == "context":
        count = jax.device_count()
        if config.data.frames % count:
            raise ConfigError(f"--mesh.strategy context: {count} devices cannot share the {config.data.frames} frames of a window evenly")
        places = [sharding.make_layout(MeshConfig(data=1, context=count, strategy="fsdp_context"))]
    else:
        places = jax.local_devices()[: len(asked)]
    models = {place: functools.cache(functools.partial(load, flags, config, weights, place)) for place in places}
    if flags.jobs is None:
        print(render(asked[0], flags, config, models[places[0]], provenance))
    else:
        render_all(asked, flags, config, models, provenance)


def render_all(asked: list[Job], flags: Flags, config: Config, models: dict[Place, Callable[[], Model]], provenance: Callable[[], str]) -> None:
    """All jobs, as many at a time as there are places. Exits with status 1, naming them, where some have failed."""
    waiting, failed = queue.SimpleQueue(), []
    provenance()  # not once for each device
    for job in asked:
        waiting.put(job)
    bar = tqdm(total=len(asked), unit="job", dynamic_ncols=True)

    def work(place: Place) -> None:
        with contextlib.nullcontext() if isinstance(place, sharding.Layout) else jax.default_device(place):  # or its noise would wait for the first one
            work_through(models[place])

    def work_through(model: Callable[[], Model]) -> None:
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                tqdm.write(render(job, flags, config, model, provenance, quiet=len(models) > 1))
            except Exception as error:
                known = isinstance(error, (ConfigError, video.MediaError))
                failed.append((job, str(error) if known else "".join(traceback.format_exception(error)).strip()))
            bar.update()

    with bar:
        if len(models) == 1:
            work(*models)
        else:
            with concurrent.futures.ThreadPoolExecutor(len(models)) as workers:
                try:
                    for done in [workers.submit(work, place) for place in models]:
                        done.result()
                except KeyboardInterrupt:
                    print("interrupted; finished windows are kept: --resume continues", file=sys.stderr)
                    os._exit(130)  # or the others would be waited for
    for job, problem in failed:
        print(f"failed: {job.source} with {job.driving}: {problem}", file=sys.stderr)
    if failed:
        print(f"error: {len(failed)} of {len(asked)} jobs failed", file=sys.stderr)
        sys.exit(1)


def render(job: Job, flags: Flags, config: Config, model: Callable[[], Model], provenance: Callable[[], str], *, quiet: bool = False) -> str:
    """One job, from its files to its files: what is said of it in the end."""
    jobs.make_writable(job)
    with rendering.held(finished := job.output / f".{job.name}.windows"):
        return render_in(finished, job, flags, config, model, functools.cache(lambda: settings_of(flags, config, job, provenance())), quiet=quiet)


def render_in(
    finished: pathlib.Path, job: Job, flags: Flags, config: Config, model: Callable[[], Model], settings: Callable[[], dict[str, Any]], *, quiet: bool
) -> str:
    """`render`, with the folder for its finished windows, which is this process's."""
    # ------------------------------------------------------------------------- inputs: all checked before any slow work
    watch = Stopwatch()
    if flags.resume and (results := finished_results(flags, job, settings)):
        if rendering.begun_with(finished, settings()):  # left by a run that was ended behind its last file
            shutil.rmtree(finished)
        return "\n".join(f"finished before: {path}" for path in results)
    kept = rendering.windows_in(finished)
    if kept and not flags.resume:
        raise ConfigError(f"{finished} holds {kept} finished windows of an interrupted rendering; continue it with --resume, or delete it to begin anew")
    with watch("inputs"):
        if kept:
            prepared = inputs.load(finished / rendering.INPUTS, job.source, job.driving, config.data)
        else:
            prepared = inputs.prepare(
                job.source,
                job.driving,
                config.data,
                landmarker=flags.landmarker,
                face=flags.face,
                driving_face=flags.driving_face,
                align=flags.align,
                max_frames=flags.max_frames,
            )
        if flags.paste_back:
            video.check_size(prepared.picture.shape[1], prepared.picture.shape[0], name=job.source)
        chosen = settings()
    if kept:
        rendering.check_settings(finished, chosen)
    else:
        rendering.begin(finished, chosen, bytes_needed=3 * len(prepared.landmarks) * prepared.size**2)
        inputs.save(prepared, finished / rendering.INPUTS)

    # ---------------------------------------------------------------------------------------------------------- animate
    frames = len(prepared.landmarks)
    windows = -(-frames // config.data.frames)
    if kept < windows:
        with watch("load"):
            params, frozen, layout = model()
        steps, total = config.sample.steps, windows * config.sample.steps
        bar = tqdm(total=total, initial=kept * steps, unit="step", desc=f"{frames} frames, {windows} windows", dynamic_ncols=True, disable=quiet)
        masked = inputs.masked_frames(prepared, config.data, start=kept * config.data.frames)
        key, after = jax.random.key(flags.seed), rendering.last(finished)
        made = pipeline.animate(config, params, frozen, prepared.source, masked, key, after=after, layout=layout, progress=bar.update, watch=watch)
        with bar, cli.interrupted(f"finished windows are kept in {finished}: --resume continues"):
            keep_windows(finished, made, watch)

    # ------------------------------------------------------------------------------------------------------------ write
    made = {
        "note": "synthesised: this video shows events that did not happen",
        "version": f"svdp_jax {svdp_jax.__version__}",
        "checkpoint": chosen["checkpoint"],
    }
    metadata = {"title": job.name, "comment": "; ".join([made["note"], made["version"], f"checkpoint {made['checkpoint']}"])}
    result, record_file, beside = job.results
    with watch("write"):
        pictures = whole_pictures(rendering.frames(finished), prepared, paste_back=flags.paste_back)
        video.write_video(result, pictures, fps=prepared.info.fps, audio_from=job.driving, metadata=metadata)
        if flags.concat:
            pictures = side_by_side(rendering.frames(finished), prepared)
            video.write_video(beside, pictures, fps=prepared.info.fps, audio_from=job.driving, metadata=metadata)
    record = made | {
        "source": job.source.name,
        "driving": job.driving.name,
        "frames": frames,
        "fps": str(prepared.info.fps),
        "seed": flags.seed,
        "steps": config.sample.steps,
        "guidance": config.sample.guidance,
        "windows": {"rendered": windows - kept, "resumed": kept},
        "seconds": watch.seconds,
        "concat": flags.concat,
        "settings": chosen | written_as(flags),
    }
    written = [result, *([beside] if flags.concat else []), record_file]
    with files.whole(record_file) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n")
    shutil.rmtree(finished)
    first = watch.seconds.get(FIRST_FRAME)
    spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in watch.seconds.items() if name != FIRST_FRAME)
    spent += f"; first frame after {first:.1f}" if first else ""
    return "\n".join([f"seconds: {spent}; {watch.since_start():.1f} in all", *(f"wrote {path}" for path in written)])


def finished_results(flags: Flags, job: Job, settings: Callable[[], dict[str, Any]]) -> list[pathlib.Path]:
    """What an earlier run has written for this job, whole and with the same settings; empty where it has not."""
    _, record_file, beside = job.results
    results = [path for path in job.results if flags.concat or path != beside]
    try:
        record = json.loads(record_file.read_text())
        before, with_concat = record["settings"], record["concat"]
    except (OSError, ValueError, LookupError, TypeError):
        return []
    now = json.loads(json.dumps(settings() | written_as(flags)))
    return results if before == now and (with_concat or not flags.concat) and all(path.is_file() for path in results) else []


def written_as(flags: Flags) -> dict[str, Any]:
    """What decides how finished frames are written."""
    return {"paste_back": flags.paste_back}


def keep_windows(folder: pathlib.Path, windows: Iterator[pipeline.Window], watch: Stopwatch) -> None:
    """Fetches and keeps each window while the device is at work on the next."""

    def keep(window: pipeline.Window) -> None:
        with watch("decode"):
            window = pipeline.Window(window.number, np.asarray(window.frames), np.asarray(window.history))
        watch.seconds.setdefault(FIRST_FRAME, watch.since_start())
        with watch("keep"):
            rendering.save(folder, window)

    with concurrent.futures.ThreadPoolExecutor(1) as writer:
        before = None
        for window in windows:
            if before:
                before.result()
            before = writer.submit(keep, window)
        if before:
            before.result()


def jobs_of(flags: Flags) -> list[Job]:
    """What is to be done. ConfigError where that is not clear."""
    if (flags.source is None) != (flags.driving is None):
        raise ConfigError("--source and --driving go together; without both, the bundled pair is used")
    if flags.jobs is None:
        bundled = flags.source is None
        return [Job(DEMO / "source.png", DEMO / "driving.mp4", flags.output) if bundled else Job(flags.source, flags.driving, flags.output)]
    if flags.source is not None:
        raise ConfigError("--jobs has the pairs of --source and --driving: give one or the other")
    if flags.landmarker and flags.landmarker.suffix == ".npz":
        raise ConfigError(f"--landmarker {flags.landmarker} holds the landmarks of one video: with --jobs put each driver's beside it, under its name")
    return jobs.read(flags.jobs, flags.output)


def load(flags: Flags, config: Config, weights: files.Place, place: Place) -> Model:
    """The checkpoint's weights, where they are used. The position table, of which little is used, stays with the host."""
    _, params, frozen = checkpoint.load_weights(flags.checkpoint, pipeline.abstract_weights(config, place), weights)
    layout = place if isinstance(place, sharding.Layout) else None
    return Model(params, frozen._replace(autoencoder=jax.device_put(frozen.autoencoder, layout.whole if layout else place)), layout)


def override(config: Config, flags: Flags) -> Config:
    """`config` with the flags that were given."""
    given = {name: getattr(flags, name) for name in ("steps", "guidance") if getattr(flags, name) is not None}
    return dataclasses.replace(config, sample=dataclasses.replace(config.sample, **given))


def settings_of(flags: Flags, config: Config, job: Job, provenance: str) -> dict[str, Any]:
    """All that decides the frames: a rendering can be continued with the same settings alone."""

    def digest(path: pathlib.Path | None) -> str | None:
        if not path or not path.is_file():
            return None
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]

    choices = {name: getattr(flags, name) for name in ("seed", "face", "driving_face", "align", "max_frames")}
    return choices | {
        "version": svdp_jax.__version__,
        "checkpoint": provenance,
        "source": digest(job.source),
        "driving": digest(job.driving),
        "landmarker": digest(detectors.chosen(flags.landmarker)),
        "source_landmarks": digest(job.source.with_suffix(".npz")),
        "driving_landmarks": digest(job.driving.with_suffix(".npz")),
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
    enlarged = lambda picture: cv2.resize(picture, (side, side), interpolation=cv2.INTER_CUBIC)
    source = enlarged(prepared.source)
    for driver, frame in zip(inputs.driver_frames(prepared), frames, strict=True):
        yield np.concatenate([source, enlarged(driver), enlarged(frame)], axis=1)


if __name__ == "__main__":
    with cli.messages(ConfigError, video.MediaError):
        main(cli.parse(Flags(), sys.argv[1:], description=__doc__, prog="sample.py"))
