"""Rows that are known already: by what was asked, of which code; and, where the code is another, by the program that it comes to, which may be the same."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import pathlib
import tempfile
from collections.abc import Iterable
from typing import Any

from svdp_jax import files

PACKAGE = pathlib.Path(__file__).parents[1]
COMPILERS = ("jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt")
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # of the environment, which compilers heed
ADVICE = "free some, or set XDG_CACHE_HOME to a directory that can be written"

Row = dict[str, Any]


def of_request(asked: Row) -> str:
    """A name for the row of a request: of that, all code, and the compilers."""
    return _digest(json.dumps(asked, sort_keys=True), PACKAGE.rglob("*.py"))


def of_program(text: str, *known: Any) -> str:
    """A name for the row of a lowered program: of its text and what else is known of it, of the code that says how it is compiled and what is read from it,
    and of the compilers."""
    code = [PACKAGE / name for name in ("peaks.py", "train_state.py", "sampler.py", "models/layers.py")]
    return _digest(f"{json.dumps(known)}\n{text}", [*(PACKAGE / "plan").glob("*.py"), *code])


def make(directory: pathlib.Path) -> None:
    """A directory for rows, unless it is there. MediaError where none can be put there."""
    with files.writing(directory, advice=ADVICE):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass


def read(directory: pathlib.Path, name: str) -> Row | None:
    """The row of this name; None where there is none."""
    path = directory / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def write(directory: pathlib.Path, name: str, row: Row) -> None:
    """Puts it there, whole or not at all. MediaError where it cannot be written."""
    with files.whole(directory / f"{name}.json", advice=ADVICE) as partial:
        partial.write_text(json.dumps(row))


def _digest(text: str, code: Iterable[pathlib.Path]) -> str:
    digest = hashlib.sha256(text.encode())
    for path in sorted(code):
        digest.update(path.read_bytes())
    for name in COMPILERS:
        try:
            digest.update(f"{name} {importlib.metadata.version(name)}".encode())
        except importlib.metadata.PackageNotFoundError:
            continue
    for name in FLAGS:
        digest.update(f"{name} {os.environ.get(name)}".encode())
    return digest.hexdigest()[:32]
