"""Train: python train.py --config configs/demo.py --workdir DIR [--train.steps 4 ...]

Any field of the config, typed, by its dotted name. A workdir that holds checkpoints is resumed. It gets `config.json`,
`frozen/`, `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `samples/` and, with --train.profile, `profile/`. SIGTERM saves and ends, with status 75.
Several processes: --coordinator HOST:PORT --processes N --process I, where they do not find each other (docs/training.md).
"""

import contextlib
import dataclasses
import json
import pathlib
import sys
import time
import warnings

import flax.linen as nn
import jax
import numpy as np
from tqdm import tqdm

from svdp_jax import checkpoint, cli, files, pipeline, processes, sharding, steps, train_state
from svdp_jax.config import Config, ConfigError, load_config, to_dict
from svdp_jax.data import clips, loader
from svdp_jax.journal import Journal
from svdp_jax.models import flops
from svdp_jax.models.autoencoder import fit_linear, make_autoencoder
from svdp_jax.models.tokens import position_table
from svdp_jax.types import Batch, Frozen

FREELY = (  # what changes no step
    "init_from", "stop_at", "profile", "workers", "cache", "remat", "accumulation", "log_every", "sample_every", "checkpoint_every", "keep", "keep_every",
)
LOCK, LEAVING = ".lock", 30  # of a workdir, and seconds that a run which ends there may take
BAD_STEPS = 10  # in a row whose loss or gradient is not finite, until a run ends


class TrainingError(Exception):
    """Training cannot go on. The message is one line."""


def main(config: Config, workdir: files.Place, cluster: processes.Cluster) -> int:
    """Returns the exit status: 0, or `processes.AGAIN` where SIGTERM came before the end."""
    with processes.stop_signal() as told:
        processes.start(cluster)
        alone = jax.process_index() == 0 and not files.is_remote(workdir)
        with files.held(workdir / LOCK, patience=LEAVING) if alone else contextlib.nullcontext():
            return run(config, workdir, told)


def run(config: Config, workdir: files.Place, told: processes.Told) -> int:
    """`main`, of processes that have found each other, in a workdir that is theirs."""
    # ----------------------------------------------------------------------------------------------------- mesh and data
    if jax.process_count() == 1:  # of several, only the first would find its own, and GPUs share out the tuning of what they compile together
        cli.keep_programs()
    train, writer = config.train, jax.process_index() == 0
    if train.profile and files.is_remote(workdir):
        raise ConfigError(f"train.profile={train.profile} needs a local --workdir: a trace cannot be written to {workdir}")
    if (workdir / checkpoint.WEIGHTS).exists():
        raise ConfigError(f"--workdir {workdir} holds an exported or converted checkpoint: another one, and --train.init-from {workdir} to start from it")
    if config.data.history and train.history_from_step >= train.steps:
        warnings.warn(f"history is not trained before train.history_from_step={train.history_from_step}, and train.steps={train.steps} end before", stacklevel=1)
    layout = sharding.make_layout(config.mesh)
    sharding.check_batch(layout, train.batch, accumulation=train.accumulation)
    sharding.check_frames(layout, config.data.frames)
    checkpoints = steps.manager(workdir, keep=train.keep, keep_every=train.keep_every)
    processes.check_shared(workdir)
    start, end = checkpoints.latest_step() or 0, min(train.steps, train.stop_at or train.steps)
    if end < start:
        raise ConfigError(f"the run in {workdir} has {start} steps behind it: train.{'steps' if end == train.steps else 'stop_at'}={end} is before that")
    key_init, key = jax.random.split(jax.random.key(train.seed))
    record = steps.Run(samples=0, key=jax.random.key_data(key).tolist(), pending=[], config=to_dict(config))
    if start:
        record = steps.restore_run(checkpoints)
        tell_changes(config, record.config)
        train = dataclasses.replace(train, init_from=record.config["train"]["init_from"])  # what it began from
        config = dataclasses.replace(config, train=train)
    rows = layout.rows(train.batch)
    batches = loader.batches(config.data, split="train", seed=train.seed, batch=train.batch, start_sample=record.samples, rows=rows)
    source, *frames = loader.whole_clip(next(clips.open_clips(config.data.path, split="validation").readable()), config.data)
    shown = (source, *(part[: 2 * config.data.frames] for part in frames))  # two windows: the second has a history that was generated

    # -------------------------------------------------------------------------------------------- state, born in its shards
    abstract = train_state.abstract_state(config, layout)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if start:
        state, frozen = steps.restore(checkpoints, abstract), checkpoint.load_frozen(workdir)
    elif train.init_from:
        params, frozen = checkpoint.load_initial(train.init_from, config, abstract.params)
        state = jax.jit(lambda params: train_state.init_state(config, params), out_shardings=shardings, donate_argnums=0)(params)
    else:
        state, frozen = jax.jit(lambda key: nn.meta.unbox(train_state.new_state(config, key)), out_shardings=shardings)(key_init), new_frozen(config)
    if not start:
        with files.writing(workdir / checkpoint.FROZEN, ValueError):
            checkpoint.save_frozen(workdir, frozen)
        if writer:
            checkpoint.write_config(workdir, config)
    constants, autoencoder, key = layout.replicate((train_state.constants_of(config, frozen), frozen.autoencoder, np.array(record.key, np.uint32)))
    key = jax.random.wrap_key_data(key)

    # -------------------------------------------------------------------------------------------------------------- loop
    step_of = {stage: train_state.make_step(config, layout, shardings, with_history=stage) for stage in (False, True)}
    journal = Journal(workdir, every=train.log_every, start=start, end=train.steps, pending=record.pending, writer=writer)
    if writer:
        count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        print(f"{config.name}: {count:,} parameters, step {start} of {train.steps}, {jax.device_count()} x {jax.devices()[0].device_kind}")
    begun, done, before, tracing = record.samples, start, None, False

    def read(step: int, metrics: dict[str, jax.Array], work: float) -> bool:
        """Waits for a step and notes what came of it. Whether to stop."""
        stop = journal.add(step, metrics, work)
        if journal.bad >= BAD_STEPS:
            steps.finish(checkpoints)
            last = checkpoints.latest_step()
            raise TrainingError(f"step {step}: loss or gradient was not finite for {BAD_STEPS} steps in a row; {workdir} keeps the checkpoint of step {last}")
        return stop

    bar = tqdm(total=train.steps, initial=start, unit="step", dynamic_ncols=True, disable=not writer)
    with bar, contextlib.closing(batches):
        for done in range(start + 1, end + 1):
            asked = time.perf_counter()
            batch = Batch(*(layout.place(part, rows, train.batch) for part in next(batches)))
            journal.waited_for_data(time.perf_counter() - asked)
            if config.profiled and done == config.profiled.start:
                jax.profiler.start_trace(workdir / "profile")
                tracing = True
            with_history = config.has_history(done - 1)
            with jax.profiler.StepTraceAnnotation("train", step_num=done):
                state, metrics = step_of[with_history](state, batch, autoencoder, constants, key, layout.votes(told.to_stop))
            stopping = before is not None and read(done - 1, *before)  # while this one is at work, so that no device waits for the host
            before = metrics, flops.train_step(config, with_history=with_history).total
            bar.update()
            last = done == end or stopping
            if tracing and (done == config.profiled.stop - 1 or last):
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
                tracing = False
            if done % train.checkpoint_every == 0 or last:
                stopping |= read(done, *before)
                before = None
                record = record._replace(samples=begun + (done - start) * train.batch, pending=journal.pending, config=to_dict(config))
                steps.save(checkpoints, state, record)
                if writer:
                    checkpoint.write_config(workdir, config)  # not before: the steps that are there were trained with another
            if done % train.sample_every == 0 or done == train.steps:
                with journal.paused():
                    ema = train_state.gathered(config.model, state.ema, layout)
                    if writer:
                        journal.picture(done, pipeline.contact_sheet(config.as_trained(done), ema, frozen, *shown))
                    del ema  # of which a device has no room to spare
            if stopping:
                break
        steps.finish(checkpoints)
        processes.wait_for_all()  # the last picture may take minutes
    checkpoints.close()
    journal.close()
    if writer:
        print(f"step {done}: {workdir}")
    return 0 if done == end else processes.AGAIN


def tell_changes(config: Config, before: dict) -> None:
    """What a run goes on with that is not as it was. ConfigError where that is another network; anything else is the user's to change."""
    changed = [
        (f"{part}.{name}", old.get(name), value)
        for part, values in to_dict(config).items()
        if part not in ("sample", "mesh") and isinstance(values, dict) and isinstance(old := before.get(part), dict)
        for name, value in json.loads(json.dumps(values)).items()
        if old.get(name) != value and name not in FREELY
    ]
    told = ", ".join(f"{name}={new} (so far: {old})" for name, old, new in changed)
    if "train.seed" in [name for name, *_ in changed]:
        raise ConfigError(f"the run in this workdir has another train.seed, which decides all that is drawn: {told}; use its own, or another workdir")
    if any(name.split(".")[0] in ("model", "autoencoder") for name, _, _ in changed):
        raise ConfigError(f"this workdir holds a run of another network: {told}; use its config.json, or another workdir")
    if changed:
        warnings.warn(f"the run goes on with {told}", stacklevel=1)


def new_frozen(config: Config) -> Frozen:
    """Frozen arrays of a run from scratch: an autoencoder fitted to the data or random, the sin-cos table, a zero prompt."""
    model = config.model
    if config.autoencoder.kind == "linear":
        records = clips.open_clips(config.data.path, split="train")
        chosen = np.random.default_rng(config.train.seed).choice(len(records), min(len(records), 64), replace=False)
        autoencoder = fit_linear(config.autoencoder, np.concatenate([loader.whole_clip(clip, config.data)[2][::4] for clip in records.readable(chosen.tolist())]))
    else:
        warnings.warn("autoencoder and prompt are random, too: --train.init-from DIR starts from converted or trained weights", stacklevel=1)
        empty = np.zeros((1, config.data.size, config.data.size, 3), np.float32)
        autoencoder = nn.meta.unbox(jax.jit(make_autoencoder(config.autoencoder).init)(jax.random.key(config.train.seed), empty)["params"])
    return Frozen(autoencoder, position_table(model), np.zeros((model.text_tokens, model.text_width), np.float32), np.zeros(model.pooled_width, np.float32))


def parse() -> tuple[Config, files.Place, processes.Cluster]:
    """--config and --workdir, which processes take part, and every field of the config by name."""
    parser = cli.ArgumentParser(prog="train.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=pathlib.Path)
    parser.add_argument("--workdir", type=files.place)
    for name, kind in ("coordinator", str), ("processes", int), ("process", int), ("heartbeat", int):
        parser.add_argument(f"--{name}", type=kind, default=processes.Cluster._field_defaults[name])
    given, arguments = parser.parse_known_args()
    if not (given.config and given.workdir) and not {"--help", "-h"} & set(arguments):
        raise ConfigError("train.py needs --config FILE (as configs/demo.py) and --workdir DIR")
    default = load_config(given.config) if given.config else Config()
    config = cli.parse(default, arguments, description=__doc__, prog="train.py --config FILE --workdir DIR")
    return config, given.workdir, processes.Cluster(given.coordinator, given.processes, given.process, given.heartbeat)


if __name__ == "__main__":
    with processes.together(), cli.messages(ConfigError, files.MediaError, TrainingError):
        status = main(*parse())
    sys.exit(status)
