"""Checkpoints: weights ready to sample or to start from, and a look into what a directory holds.

A training workdir holds `config.json`, `frozen/` (what training never changes, once) and `checkpoints/STEP/` (`steps.py`), of which `ema/`
are the weights. An exported checkpoint holds `config.json`, `frozen/` and `weights/`. All functions take either. A directory may be local or
gs://BUCKET/... (`files.place`).

    python -m svdp_jax.checkpoint inspect DIR                 what a checkpoint holds, without loading it
    python -m svdp_jax.checkpoint export DIR OUTPUT           the EMA weights of a workdir's last step, in float32 or bfloat16
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from svdp_jax import cli, files, processes
from svdp_jax.config import Config, ConfigError, read_config, to_dict
from svdp_jax.train_state import abstract_params
from svdp_jax.types import Frozen

CONFIG, FROZEN, STEPS, STATE, EMA, WEIGHTS = "config.json", "frozen", "checkpoints", "state", "ema", "weights"
COMMITTED = "commit_success.txt"
WRITTEN_AT_ONCE = 2  # GB that saving a tree may hold beside the tree
READ_AT_ONCE = 4  # GB that a host may hold of arrays on their way to its devices


# ------------------------------------------------------------------------------------------------------------------ trees


def write_config(directory: files.Place, config: Config) -> None:
    """The run's config as JSON, where every loader looks for it."""
    with files.writing(directory / CONFIG):
        directory.mkdir(parents=True, exist_ok=True)
    with files.whole(directory / CONFIG) as partial:
        partial.write_text(json.dumps(to_dict(config), indent=2) + "\n")


def save_tree(directory: files.Place, tree: Any) -> None:
    """A tree of arrays as a directory of its own, which may be moved; an older one is replaced."""
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=WRITTEN_AT_ONCE)  # which holds for arrays of jax's; numpy's are all copied first
    with ocp.Checkpointer(handler) as checkpointer:
        held = jnp.asarray if jax.process_count() == 1 else np.asarray  # of several processes, which all call this, one writes
        checkpointer.save(absolute(directory), args=ocp.args.PyTreeSave(jax.tree.map(held, tree)), force=True)
    if jax.process_index() == 0:
        (directory / COMMITTED).write_text("committed\n")  # orbax wrote where, on the machine it ran on


def load_tree(directory: files.Place, like: Any = None) -> Any:
    """A saved tree, as numpy arrays; or as arrays of the types and shardings of the shapes in `like`, each device reading its own part."""
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=READ_AT_ONCE)  # a checkpointer would warn that a part of a training step has no metadata of a step
    wanted = jax.tree.map(lambda _: 0, handler.metadata(absolute(directory)).tree)
    if like is None:
        places = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    else:
        places = jax.tree.map(lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, dtype=leaf.dtype), like)
    return handler.restore(absolute(directory), args=ocp.args.PyTreeRestore(item=wanted, restore_args=places))


def stored(directory: files.Place) -> Any:
    """Shapes and types of a saved tree, of which no array is read."""
    return ocp.PyTreeCheckpointHandler().metadata(absolute(directory)).tree


def save_frozen(directory: files.Place, frozen: Frozen) -> None:
    """`frozen/` of a workdir or an exported checkpoint."""
    save_tree(directory / FROZEN, frozen._asdict())


def load_frozen(directory: files.Place) -> Frozen:
    """What `save_frozen` wrote. ConfigError where it cannot be read."""
    with _reading(str(directory / FROZEN)):
        return Frozen(**load_tree(directory / FROZEN))


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
    """What goes wrong inside becomes a ConfigError: orbax has a different one for each missing file."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, KeyError, OSError, AttributeError, TypeError) as error:
        raise ConfigError(f"{what} cannot be read: {files.first_line(error)}") from error


def absolute(path: files.Place) -> files.Place:
    """As orbax wants it."""
    place = files.place(path)
    return place if files.is_remote(place) else place.absolute()


# ---------------------------------------------------------------------------------------------------------------- weights


def find_weights(directory: str | os.PathLike) -> tuple[Config, files.Place]:
    """The config of a checkpoint, and where in it the weights are. A workdir's weights that have not been trained with history yet are sampled without it.
    Raises ConfigError as `load_weights` does."""
    directory = files.place(directory)
    if not (directory / CONFIG).is_file():
        raise ConfigError(f"{directory} is not a checkpoint: it has no {CONFIG}; give a training workdir or an exported checkpoint")
    config = read_config(directory / CONFIG)
    weights = directory / WEIGHTS
    if not weights.is_dir():
        steps = saved_steps(directory)
        if not steps:
            raise ConfigError(f"{directory} holds neither {WEIGHTS}/ nor a finished step in {STEPS}/: train longer, or give another directory")
        weights, config = directory / STEPS / str(steps[-1]) / EMA, config.as_trained(steps[-1])
    return config, weights


def saved_steps(workdir: files.Place) -> list[int]:
    """Steps of training that are saved, whole, in a workdir."""
    found = [path for path in (workdir / STEPS).glob("*") if path.name.isdigit()] if (workdir / STEPS).is_dir() else []
    if files.is_remote(workdir):  # where a step has its name from the start, and a mark at the end
        found = [path for path in found if (path / COMMITTED).exists()]
    return sorted(int(path.name) for path in found)


def load_weights(directory: str | os.PathLike, like: Any = None, weights: files.Place | None = None) -> tuple[Config, Any, Frozen]:
    """Config, EMA parameters (float32) and frozen arrays of an exported checkpoint or a workdir's last step.

    Parameters are numpy arrays, or arrays as in `like` (shapes with types and shardings): then no host holds them all. Raises ConfigError, naming what is missing or
    does not fit the config, if the directory is neither. `weights`: what `find_weights` found there before, where training may have saved another step since."""
    config, params, frozen = load_stored(directory, like, weights)
    return config, params if like else jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params), frozen


def load_stored(directory: str | os.PathLike, like: Any = None, weights: files.Place | None = None) -> tuple[Config, Any, Frozen]:
    """As `load_weights`; numpy arrays in the types that the checkpoint stores."""
    config, latest = find_weights(directory)
    weights = weights or latest
    with _reading(f"checkpoint {directory}"):
        if problem := misfit(abstract_params(config), stored(weights)):
            raise ConfigError(f"checkpoint {directory} does not fit its {CONFIG}: {problem}")
        return config, load_tree(weights, like), load_frozen(files.place(directory))


def load_initial(directory: str | os.PathLike, config: Config, like: Any = None) -> tuple[Any, Frozen]:
    """As `load_weights`, to start a new run from. ConfigError where the run's config wants another network.

    How the network is used (history, dropped signals, the kind of temporal attention) is the run's choice; what its weights
    mean is not.
    """
    theirs, weights = find_weights(directory)
    if weights.name == EMA:  # all processes start from what the first one finds: the run there may go on
        weights = files.place(directory) / STEPS / str(processes.agreed(int(weights.parent.name))) / EMA
    free = ("position_step", "temporal", "temporal_gate", "history", "dropped", "dtype")
    differences = []
    for part in "model", "autoencoder":
        here, there = dataclasses.asdict(getattr(config, part)), dataclasses.asdict(getattr(theirs, part))
        differences += [f"{part}.{name}={here[name]} (checkpoint: {there[name]})" for name in here if here[name] != there[name] and name not in free]
    if differences:
        raise ConfigError(f"train.init_from={directory} holds another network than the config: {', '.join(differences)}")
    _, params, frozen = load_weights(directory, like, weights)
    return params, frozen


def stored_dtype(weights: files.Place) -> str:
    """The type of the weights in a directory of `find_weights`, which is not read for it."""
    return np.dtype(jax.tree.leaves(stored(weights))[0].dtype).name


def misfit(wanted: Any, found: Any) -> str | None:
    """The first array of which two trees have different shapes, in words."""
    shapes, have = ({jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)} for tree in (wanted, found))
    for name in sorted(shapes.keys() | have.keys()):
        if shapes.get(name) != have.get(name):
            return f"{name} is {have.get(name, 'nothing')}, the config's network has {shapes.get(name, 'nothing')}"
    return None


def fingerprint(directory: str | os.PathLike, weights: files.Place | None = None) -> str:
    """A short hash of the files that `load_weights` reads, for the provenance of what is made with them. ConfigError where one goes meanwhile."""
    directory, digest = files.place(directory), hashlib.sha256()
    weights = weights or find_weights(directory)[1]
    read = [directory / CONFIG, *(directory / FROZEN).rglob("*"), *weights.rglob("*")]
    for path in sorted(path for path in read if path.is_file()):
        digest.update(str(path.relative_to(directory)).encode())
        try:
            with path.open("rb") as file:
                while part := file.read(2**24):
                    digest.update(part)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({files.one_line(error)}); a run that goes on removes old steps: export one, or set train.keep") from error
    return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------- command line


def export(directory: str | os.PathLike, output: str | os.PathLike, *, dtype: str) -> None:
    """Writes the EMA weights of a checkpoint, its frozen arrays and its config to `output`. ConfigError where something is there already."""
    output = files.place(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"output {output} exists already: give a new directory, or remove it")
    config, params, frozen = load_weights(directory)
    with files.writing(output, ValueError):
        save_tree(output / WEIGHTS, jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params))
        save_frozen(output, frozen)
    write_config(output, config)  # last: without it a directory is no checkpoint


def inspect(directory: str | os.PathLike, *, arrays: bool = False) -> str:
    """A table of what a checkpoint holds: arrays, values, bytes and types by part, or of every array. Nothing but their description is read."""
    directory = files.place(directory)
    config, weights = find_weights(directory)
    steps = [] if (directory / WEIGHTS).is_dir() else saved_steps(directory)
    reached = f", step {steps[-1]} of {config.train.steps}; saved: {', '.join(map(str, steps))}" if steps else ""
    places = [weights, *([weights.parent / STATE] if steps else []), directory / FROZEN]
    rows = [f"{directory}: {config.name}{reached}", f"  {'':<48} {'arrays':>7} {'values':>15} {'MB':>10}  type"]
    with _reading(f"checkpoint {directory}"):
        trees = {place.name: stored(place) for place in places}
    for place, tree in trees.items():
        for name, part in tree.items():
            rows.append(_row(f"{place}/{name}", part))
            for path, leaf in jax.tree_util.tree_leaves_with_path(part) if arrays else ():
                rows.append(_row(f"  {jax.tree_util.keystr(path, simple=True, separator='/')} {list(leaf.shape)}", leaf))
    return "\n".join([*rows, _row("parameters", trees[weights.name])])


def _row(name: str, tree: Any) -> str:
    leaves = jax.tree.leaves(tree)
    sizes = [int(np.prod(leaf.shape)) for leaf in leaves]
    types = sorted({np.dtype(leaf.dtype).name for leaf in leaves})
    size = sum(count * np.dtype(leaf.dtype).itemsize for count, leaf in zip(sizes, leaves, strict=True))
    return f"  {name:<48} {len(leaves):>7,} {sum(sizes):>15,} {size / 1e6:>10,.2f}  {', '.join(types)}"


def main() -> None:
    parser = cli.ArgumentParser(prog="python -m svdp_jax.checkpoint", description="Look into a checkpoint, or make a small one to sample from.")
    commands = parser.add_subparsers(dest="command", required=True)
    look = commands.add_parser("inspect", help="what it holds; nothing is loaded")
    look.add_argument("directory")
    look.add_argument("--arrays", action="store_true", help="with a line for every array")
    out = commands.add_parser("export", help="the EMA weights, config and frozen arrays alone")
    out.add_argument("directory")
    out.add_argument("output")
    out.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights in the file")
    flags = parser.parse_args()
    cli.on_host()
    with cli.messages(ConfigError, files.MediaError):
        if flags.command == "inspect":
            print(inspect(flags.directory, arrays=flags.arrays))
        else:
            export(flags.directory, flags.output, dtype=flags.dtype)
            print(f"wrote {flags.output}")


if __name__ == "__main__":
    main()
