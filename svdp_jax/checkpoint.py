"""Checkpoints: save, restore onto any mesh, and weights ready to sample from.

A training workdir holds `config.json`, `frozen/` (what training never changes, once) and `checkpoints/STEP/`. An exported
checkpoint holds `config.json`, `frozen/` and `weights/`, the EMA parameters alone. `load_weights` reads both.

    python -m svdp_jax.checkpoint inspect DIR                 what a checkpoint holds, without loading it
    python -m svdp_jax.checkpoint export DIR OUTPUT           the EMA weights of a workdir's last step, in float32 or bfloat16
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from svdp_jax import cli
from svdp_jax.config import Config, ConfigError, load_config, to_dict
from svdp_jax.train_state import TrainState, abstract_params
from svdp_jax.types import Frozen

CONFIG, FROZEN, STEPS, WEIGHTS = "config.json", "frozen", "checkpoints", "weights"
COMMITTED = "commit_success.txt"
WRITTEN_AT_ONCE = 2  # GB that saving a tree may hold beside the tree


def write_config(directory: pathlib.Path, config: Config) -> None:
    """The run's config as JSON, where every loader looks for it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(json.dumps(to_dict(config), indent=2) + "\n")


def manager(workdir: pathlib.Path, *, keep: int) -> ocp.CheckpointManager:
    """Saves and restores the training state of a workdir; saving goes on in the background."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    return ocp.CheckpointManager((workdir / STEPS).absolute(), options=options)


def save(checkpoints: ocp.CheckpointManager, state: TrainState) -> None:
    """Starts saving the state under its step."""
    checkpoints.save(int(state.step), args=ocp.args.Composite(state=ocp.args.StandardSave(state)))


def restore(checkpoints: ocp.CheckpointManager, state: TrainState) -> TrainState:
    """The last saved state, in the shardings of `state` (arrays or shapes); raises ConfigError if it does not fit."""
    step = checkpoints.latest_step()
    try:
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        return checkpoints.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]
    except ValueError as error:
        raise ConfigError(f"checkpoint {checkpoints.directory}/{step} does not fit the config: {first_line(error)}") from error


def save_tree(directory: pathlib.Path, tree: Any) -> None:
    """A tree of arrays as a directory of its own, which may be moved; an older one is replaced."""
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=WRITTEN_AT_ONCE)  # which holds for arrays of jax's; numpy's are all copied first
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(directory.absolute(), args=ocp.args.PyTreeSave(jax.tree.map(jnp.asarray, tree)), force=True)
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
    expected = abstract_params(config)
    wanted, found = ({jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)} for tree in (expected, params))
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            have, want = (shapes.get(name, "nothing") for shapes in (found, wanted))
            raise ConfigError(f"checkpoint {directory} does not fit its {CONFIG}: {name} is {have}, the config's network has {want}")


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
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


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
