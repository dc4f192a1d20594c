"""Weights that the user supplies: found in a folder, read, checked and put into a network; and frames as its input.

Networks are float32, on CUDA where PyTorch has it, without dropout and gradients. PyTorch is imported when a network is made.
"""

from __future__ import annotations

import importlib.util
import pathlib
import pickle
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
from jaxtyping import UInt8

from svdp_jax.config import ConfigError
from svdp_jax.evaluation.learned.interface import Needed

BATCH = 16  # frames that go through a network at once
Items = TypeVar("Items")


def found(metric: str, folder: pathlib.Path, needs: tuple[Needed, ...], *, packages: tuple[str, ...]) -> list[pathlib.Path]:
    """The path of each file that is needed. ConfigError, in one line, where packages or files are missing."""
    if absent := [package for package in packages if importlib.util.find_spec(package) is None]:
        raise ConfigError(f"{metric} needs {' and '.join(absent)}: pip install -e '.[metrics]'")
    if missing := [need for need in needs if not (folder / need.file).exists()]:
        raise ConfigError(f"{metric} needs in {folder}: {'; '.join(map(place, missing))}")
    return [folder / need.file for need in needs]


def place(need: Needed) -> str:
    """What a file is and where it comes from, for a message."""
    return f"{need.file} ({need.what}; licence: {need.licence}), published at {need.published}"


def read(path: pathlib.Path) -> dict[str, Any]:
    """The tensors of a file that PyTorch or safetensors wrote, by their names. No code of the file is run."""
    import safetensors
    import safetensors.torch
    import torch

    try:
        state = safetensors.torch.load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        raise unreadable(path, error) from error
    if not isinstance(state, dict):
        raise ConfigError(f"{path}: holds a {type(state).__name__}, no tensors by name; take the file that is published")
    return state


def unreadable(path: pathlib.Path, error: Exception) -> ConfigError:
    """What a user is told of a file that cannot be read."""
    return ConfigError(f"{path}: is damaged, or no plain file of weights ({next(iter(str(error).splitlines()), type(error).__name__)})")


def checked(state: dict[str, Any], expected: dict[str, tuple[int, ...]], path: pathlib.Path, *, unused: tuple[str, ...] = ()) -> dict[str, Any]:
    """Those tensors that are `expected`, with these shapes. ConfigError where one is missing, of another shape, or unknown.

    Names that begin with one of `unused` may be there; so may the counters of batch normalisation, which old files lack."""
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in state.items() if not name.startswith(unused) and not _counts(name)}
    if wrong := sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name)):
        name = wrong[0]
        given, wanted = (f"of shape {list(table[name])}" if name in table else "absent" for table in (shapes, expected))
        raise ConfigError(f"{path}: not the file that is published: {name} is {given}, should be {wanted}; {len(wrong)} of {len(expected)} differ")
    return {name: state[name] for name in expected}


def filled(module: Any, path: pathlib.Path, *, unused: tuple[str, ...] = ()) -> Any:
    """`module` with the weights of a file, ready for use."""
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items() if not _counts(name)}
    module.load_state_dict(checked(read(path), shapes, path, unused=unused), strict=False)
    return module.eval().requires_grad_(False).to(device())


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def pixels(frames: UInt8[np.ndarray, "N H W 3"]) -> Any:
    """Frames as a float tensor [N,3,H,W], still 0..255."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(frames)).to(device()).permute(0, 3, 1, 2).float()


def batches(items: Items, size: int = BATCH) -> Iterator[Items]:
    """A sequence in parts of at most `size`."""
    return (items[start : start + size] for start in range(0, len(items), size))


def _counts(name: str) -> bool:
    return name.endswith("num_batches_tracked")
