"""Checkpoints of a training run: WORKDIR/checkpoints/STEP/, from which it goes on as if nothing had been.

    state/     parameters, moments, counts of steps
    ema/       the EMA of the parameters: what `checkpoint.load_weights` reads
    run/       where the data go on, the key of all that is drawn, metrics that are not logged yet, the config

Every array is written by the devices that hold it, and read by those that need it, on whatever mesh.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from svdp_jax import checkpoint, files
from svdp_jax.config import ConfigError
from svdp_jax.train_state import TrainState

RUN = "run"
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a step that is not whole


class Run(NamedTuple):
    """What a step's checkpoint says of its run, beside the state."""

    samples: int  # taken from the data, in all: where they go on
    key: list[int]  # of everything that is drawn
    pending: list[dict[str, Any]]  # metrics since the last line that was logged
    config: dict[str, Any]


def manager(workdir: files.Place, *, keep: int, keep_every: int = 0) -> ocp.CheckpointManager:
    """Saves and restores the training state of a workdir; saving goes on in the background.

    The last `keep` steps stay, and every multiple of `keep_every`. ConfigError for a folder of checkpoints that is not one, or not to be written."""
    directory = checkpoint.absolute(workdir / checkpoint.STEPS)
    strange = [path.name for path in directory.glob("*") if not path.name.isdigit() and UNFINISHED not in path.name] if directory.is_dir() else []
    if strange:  # if they are checkpoints that somebody has renamed, training must not begin anew beside them
        raise ConfigError(f"{directory} holds {', '.join(sorted(strange)[:3])}, which is no step of training; move that away, or use another workdir")
    policies = ocp.checkpoint_managers
    kept = [policies.LatestN(keep), *([policies.EveryNSteps(keep_every)] if keep_every else [])]
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept), enable_async_checkpointing=True, cleanup_tmp_directories=True,
        single_host_load_and_broadcast=True,  # or processes whose views of the disk are not of one age go on from different steps
    )  # fmt: skip
    try:  # now, and not when the first step is done
        directory.mkdir(parents=True, exist_ok=True)
        if not files.is_remote(directory):
            tempfile.TemporaryFile(dir=workdir).close()  # not among the steps, where other processes look for what is strange
        handlers = {name: ocp.StandardCheckpointHandler(restore_concurrent_gb=checkpoint.READ_AT_ONCE) for name in (checkpoint.STATE, checkpoint.EMA)}
        return ocp.CheckpointManager(directory, options=options, item_handlers=handlers | {RUN: ocp.JsonCheckpointHandler()})
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be written ({files.first_line(error)}); use another workdir") from error


def save(checkpoints: ocp.CheckpointManager, state: TrainState, run: Run) -> None:
    """Starts saving the state under its step. ConfigError where this save or the one before has failed; steps that are there stay."""
    items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()} | {RUN: ocp.args.JsonSave(run._asdict())}
    with _saving(checkpoints):
        checkpoints.save(int(state.step), args=ocp.args.Composite(**items))


def finish(checkpoints: ocp.CheckpointManager) -> None:
    """Waits until the last step is saved. ConfigError where that has failed."""
    with _saving(checkpoints):
        checkpoints.wait_until_finished()


@contextlib.contextmanager
def _saving(checkpoints: ocp.CheckpointManager) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        last = checkpoints.latest_step()
        left = f"the last step there is {last}" if last else "no step is there"
        raise ConfigError(f"{checkpoints.directory}: a step cannot be saved ({files.first_line(error)}); is the disk full? {left}") from error


def restore_run(checkpoints: ocp.CheckpointManager) -> Run:
    """What the last saved step says of its run. ConfigError where that cannot be read."""
    with _reading(checkpoints) as step:
        return Run(**checkpoints.restore(step, args=ocp.args.Composite(**{RUN: ocp.args.JsonRestore()}))[RUN])


def restore(checkpoints: ocp.CheckpointManager, state: TrainState) -> TrainState:
    """The last saved state, in the shardings of `state` (arrays or shapes). ConfigError if it does not fit or cannot be read."""
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    with _reading(checkpoints) as step:
        directory = checkpoint.absolute(checkpoints.directory) / str(step)
        stored = checkpoint.stored(directory / checkpoint.EMA)
        if problem := checkpoint.misfit(target.ema, stored):  # orbax would say so in many lines
            raise ConfigError(f"checkpoint {directory} does not fit the config: {problem}")
        wanted = {name: ocp.args.StandardRestore(tree) for name, tree in _items(target).items()}
        found = checkpoints.restore(step, args=ocp.args.Composite(**wanted))
        return TrainState(**found[checkpoint.STATE], ema=found[checkpoint.EMA])


def _items(state: TrainState) -> dict[str, Any]:
    """The parts of a state that lie in folders of their own."""
    return {checkpoint.STATE: {name: getattr(state, name) for name in ("step", "params", "opt_state", "bad")}, checkpoint.EMA: state.ema}


@contextlib.contextmanager
def _reading(checkpoints: ocp.CheckpointManager) -> Iterator[int]:
    step = checkpoints.latest_step()
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            yield step
        except (ConfigError, jax.errors.JaxRuntimeError):  # the latter of devices and of other processes, not of files
            raise
        except Exception as error:  # orbax has a different one for each kind of damage
            # The reads that were under way go on to complain, in many lines each, until the process ends.
            sys.unraisablehook = threading.excepthook = lambda _: None
            logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
            directory, said = checkpoint.absolute(checkpoints.directory) / str(step), files.first_line(error)
            raise ConfigError(f"checkpoint {directory} cannot be read ({said}); move it out of the workdir to go on from the step before") from error
