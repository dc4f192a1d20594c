"""Checkpoints: save, restore onto any mesh, and weights ready to sample from.

A training workdir holds `config.json`, `frozen/` (what training never changes, once) and `checkpoints/STEP/`. An exported
checkpoint holds `config.json`, `frozen/` and `weights/`, the EMA parameters alone. `load_weights` reads both.

    python -m svdp_jax.checkpoint inspect DIR                 what a checkpoint holds, without loading it
    python -m svdp_jax.checkpoint export DIR OUTPUT           the EMA weights of a workdir's last step, in float32 or bfloat16
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import pathlib
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from svdp_jax import cli, files
from svdp_jax.config import Config, ConfigError, load_config, to_dict
from svdp_jax.train_state import TrainState, abstract_params
from svdp_jax.types import Frozen

CONFIG, FROZEN, STEPS, WEIGHTS = "config.json", "frozen", "checkpoints", "weights"
COMMITTED = "commit_success.txt"
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a step that is not whole
WRITTEN_AT_ONCE = 2  # GB that saving a tree may hold beside the tree


def write_config(directory: pathlib.Path, config: Config) -> None:
    """The run's config as JSON, where every loader looks for it."""
    with files.writing(directory / CONFIG):
        directory.mkdir(parents=True, exist_ok=True)
    with files.whole(directory / CONFIG) as partial:
        partial.write_text(json.dumps(to_dict(config), indent=2) + "\n")


class Run(NamedTuple):
    """What a step's checkpoint says of its run, beside the state."""

    samples: int  # taken from the data, in all: where they go on
    key: list[int]  # of everything that is drawn
    pending: list[dict[str, Any]]  # metrics since the last line that was logged
    config: dict[str, Any]


def manager(workdir: pathlib.Path, *, keep: int, keep_every: int = 0) -> ocp.CheckpointManager:
    """Saves and restores the training state of a workdir; saving goes on in the background.

    The last `keep` steps stay, and every multiple of `keep_every`. ConfigError for a folder of checkpoints that is not one, or not to be written."""
    directory = (workdir / STEPS).absolute()
    strange = [path.name for path in directory.glob("*") if not path.name.isdigit() and UNFINISHED not in path.name] if directory.is_dir() else []
    if strange:  # if they are checkpoints that somebody has renamed, training must not begin anew beside them
        raise ConfigError(f"{directory} holds {', '.join(sorted(strange)[:3])}, which is no step of training; move that away, or use another workdir")
    policies = ocp.checkpoint_managers
    kept = [policies.LatestN(keep), *([policies.EveryNSteps(keep_every)] if keep_every else [])]
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept), enable_async_checkpointing=True, cleanup_tmp_directories=True
    )
    try:  # now, and not when the first step is done
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return ocp.CheckpointManager(directory, options=options)
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be written ({first_line(error)}); use another workdir") from error


def save(checkpoints: ocp.CheckpointManager, state: TrainState, run: Run) -> None:
    """Starts saving the state under its step. ConfigError where this save or the one before has failed; steps that are there stay."""
    items = {"state": ocp.args.StandardSave(state), "run": ocp.args.JsonSave(run._asdict())}
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
        raise ConfigError(f"{checkpoints.directory}: a step cannot be saved ({first_line(error)}); is the disk full? {left}") from error


def restore_run(checkpoints: ocp.CheckpointManager) -> Run:
    """What the last saved step says of its run. ConfigError where that cannot be read."""
    with _reading(checkpoints) as step:
        return Run(**checkpoints.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"])


def restore(checkpoints: ocp.CheckpointManager, state: TrainState) -> TrainState:
    """The last saved state, in the shardings of `state` (arrays or shapes). ConfigError if it does not fit or cannot be read."""
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    with _reading(checkpoints) as step:
        directory = pathlib.Path(checkpoints.directory) / str(step)
        stored = ocp.PyTreeCheckpointHandler().metadata(directory / "state").tree
        problem = _misfit(_shapes(target.params), _shapes(stored["params"]))
        if problem:  # orbax would say so in many lines
            raise ConfigError(f"checkpoint {directory} does not fit the config: {problem}")
        return checkpoints.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]


@contextlib.contextmanager
def _reading(checkpoints: ocp.CheckpointManager) -> Iterator[int]:
    step = checkpoints.latest_step()
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            yield step
        except ConfigError:
            raise
        except Exception as error:  # orbax has a different one for each kind of damage
            # The reads that were under way go on to complain, in many lines each, until the process ends.
            sys.unraisablehook = threading.excepthook = lambda _: None
            directory = pathlib.Path(checkpoints.directory) / str(step)
            raise ConfigError(f"checkpoint {directory} cannot be read ({first_line(error)}); move it out of the workdir to go on from the step before") from error


def save_tree(directory: pathlib.Path, tree: Any) -> None:
    """A tree of arrays as a directory of its own, which may be moved; an older one is replaced."""
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=WRITTEN_AT_ONCE)  # which holds for arrays of jax's; numpy's are all copied first
    with ocp.Checkpointer(handler) as checkpointer:
        held = jnp.asarray if jax.process_count() == 1 else np.asarray  # of several processes, which all call this, one writes
        checkpointer.save(directory.absolute(), args=ocp.args.PyTreeSave(jax.tree.map(held, tree)), force=True)
    if jax.process_index() == 0:
        (directory / COMMITTED).write_text("committed\n")  # orbax wrote where, on the machine it ran on


def load_tree(directory: pathlib.Path, *, part: str | None = None) -> Any:
    """A saved tree, as numpy arrays; where it has a branch named `part`, that branch alone is read."""
    handler = ocp.PyTreeCheckpointHandler()  # a checkpointer would warn that a part of a training step has no metadata of a step
    found = handler.metadata(directory.absolute()).tree
    wanted = jax.tree.map(lambda _: 0, {part: found[part]} if part in found else found)
    arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    return handler.restore(directory.absolute(), args=ocp.args.PyTreeRestore(item=wanted, restore_args=arrays, partial_restore=True))


def save_frozen(directory: pathlib.Path, frozen: Frozen) -> None:
    """`frozen/` of a workdir or an exported checkpoint."""
    save_tree(directory / FROZEN, frozen._asdict())


def load_frozen(directory: pathlib.Path) -> Frozen:
    """What `save_frozen` wrote."""
    return Frozen(**load_tree(directory / FROZEN))


def load_weights(directory: pathlib.Path) -> tuple[Config, Any, Frozen]:
    """Config, EMA parameters (float32) and frozen arrays of an exported checkpoint or a workdir's last step.

    Raises ConfigError, naming what is missing, if the directory is neither.
    """
    config, params, frozen = load_stored(directory)
    return config, jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params), frozen


def load_stored(directory: pathlib.Path) -> tuple[Config, Any, Frozen]:
    """As `load_weights`, in the types that the checkpoint stores."""
    config, weights = find_weights(directory)
    try:
        tree = load_tree(weights, part="ema")
        frozen = load_frozen(directory)
    except (ValueError, KeyError, OSError, AttributeError, TypeError) as error:  # orbax has a different one for each missing file
        raise ConfigError(f"checkpoint {directory} cannot be read: {first_line(error)}") from error
    params = tree.get("ema", tree)
    check_shapes(directory, config, params)
    return config, params, frozen


def load_initial(directory: pathlib.Path, config: Config) -> tuple[Any, Frozen]:
    """EMA parameters (float32) and frozen arrays to start a new run from. ConfigError where the run's config wants another network.

    How the network is used (history, dropped signals, the kind of temporal attention) is the run's choice; what its weights
    mean is not.
    """
    stored, params, frozen = load_weights(directory)
    free = ("position_step", "temporal", "temporal_gate", "history", "dropped", "dtype")
    differences = []
    for part in "model", "autoencoder":
        ours, theirs = dataclasses.asdict(getattr(config, part)), dataclasses.asdict(getattr(stored, part))
        differences += [f"{part}.{name}={ours[name]} (checkpoint: {theirs[name]})" for name in ours if ours[name] != theirs[name] and name not in free]
    if differences:
        raise ConfigError(f"train.init_from={directory} holds another network than the config: {', '.join(differences)}")
    return params, frozen


def find_weights(directory: pathlib.Path) -> tuple[Config, pathlib.Path]:
    """The config of a checkpoint, and where in it the weights are. Raises ConfigError as `load_weights` does."""
    directory = pathlib.Path(directory)
    if not (directory / CONFIG).is_file():
        raise ConfigError(f"{directory} is not a checkpoint: it has no {CONFIG}; give a training workdir or an exported checkpoint")
    config = load_config(directory / CONFIG)
    weights = directory / WEIGHTS
    if not weights.is_dir():
        steps = sorted(int(path.name) for path in (directory / STEPS).glob("*") if path.name.isdigit())
        if not steps:
            raise ConfigError(f"{directory} holds neither {WEIGHTS}/ nor a finished step in {STEPS}/: train longer, or give another directory")
        weights = directory / STEPS / str(steps[-1]) / "state"
    return config, weights


def stored_dtype(weights: pathlib.Path) -> str:
    """The type of the weights in a directory of `find_weights`, which is not read for it."""
    tree = ocp.PyTreeCheckpointHandler().metadata(weights.absolute()).tree
    return np.dtype(jax.tree.leaves(tree.get("ema", tree))[0].dtype).name


def check_shapes(directory: pathlib.Path, config: Config, params: Any) -> None:
    """ConfigError if the parameters are not those of the config's network, naming the first that differs."""
    problem = _misfit(_shapes(abstract_params(config)), _shapes(params))
    if problem:
        raise ConfigError(f"checkpoint {directory} does not fit its {CONFIG}: {problem}")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _misfit(wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> str | None:
    """The first parameter of which shapes differ, in words."""
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            have, want = (shapes.get(name, "nothing") for shapes in (found, wanted))
            return f"{name} is {have}, the config's network has {want}"
    return None


def export(directory: pathlib.Path, output: pathlib.Path, *, dtype: str) -> None:
    """Writes the EMA weights of a checkpoint, its frozen arrays and its config to `output`."""
    config, params, frozen = load_weights(directory)
    write_config(output, config)
    save_tree(output / WEIGHTS, jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params))
    save_frozen(output, frozen)


def fingerprint(directory: pathlib.Path) -> str:
    """A short hash of the files that `load_weights` reads, for the provenance of what is made with them."""
    directory, digest = pathlib.Path(directory), hashlib.sha256()
    read = [directory / CONFIG, *(directory / FROZEN).rglob("*"), *find_weights(directory)[1].rglob("*")]
    for path in sorted(path for path in read if path.is_file()):
        digest.update(str(path.relative_to(directory)).encode())
        with path.open("rb") as file:
            while part := file.read(2**24):
                digest.update(part)
    return digest.hexdigest()[:16]


def first_line(error: BaseException) -> str:
    """What an error says, without the pages behind it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def inspect(directory: pathlib.Path) -> str:
    """A table of what a checkpoint holds: parameters, types and bytes by part."""
    config, params, frozen = load_weights(directory)
    rows = [f"{directory}: {config.name}"]
    for name, tree in {**params, **{f"frozen/{key}": value for key, value in frozen._asdict().items()}}.items():
        leaves = jax.tree.leaves(tree)
        rows.append(f"  {name:<24}{sum(leaf.size for leaf in leaves):>15,} values in {len(leaves):>3} arrays")
    rows.append(f"  {'parameters':<24}{sum(leaf.size for leaf in jax.tree.leaves(params)):>15,}")
    return "\n".join(rows)


def main() -> None:
    parser = cli.ArgumentParser(prog="python -m svdp_jax.checkpoint", description="Look into a checkpoint, or make a small one to sample from.")
    commands = parser.add_subparsers(dest="command", required=True)
    look = commands.add_parser("inspect", help="what it holds")
    look.add_argument("directory", type=pathlib.Path)
    out = commands.add_parser("export", help="the EMA weights, config and frozen arrays alone")
    out.add_argument("directory", type=pathlib.Path)
    out.add_argument("output", type=pathlib.Path)
    out.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights in the file")
    flags = parser.parse_args()
    with cli.messages(ConfigError):
        if flags.command == "inspect":
            print(inspect(flags.directory))
        else:
            export(flags.directory, flags.output, dtype=flags.dtype)
            print(f"wrote {flags.output}")


if __name__ == "__main__":
    main()
