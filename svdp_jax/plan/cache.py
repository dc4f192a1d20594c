"""Rows that are known already: by what was asked, of which code; and, where the code is another, by the program that it comes to, which may be the same."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Iterable
from typing import Any

PACKAGE = pathlib.Path(__file__).parents[1]
COMPILERS = ("jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt")

Row = dict[str, Any]


def of_request(asked: Row) -> str:
    """A name for the row of a request: of that, all code, and the compilers."""
    return _digest(json.dumps(asked, sort_keys=True), PACKAGE.rglob("*.py"))


def of_program(text: str, target: str) -> str:
    """A name for the row of a program that is lowered for a target: of both, the code that says how it is compiled and what is read from it, and the compilers."""
    return _digest(f"{target}\n{text}", [*(PACKAGE / "plan").glob("*.py"), PACKAGE / "peaks.py", PACKAGE / "models" / "layers.py"])


def read(directory: pathlib.Path, name: str) -> Row | None:
    """The row of this name; None where there is none."""
    path = directory / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def write(directory: pathlib.Path, name: str, row: Row) -> None:
    """Puts it there, whole or not at all."""
    partial = directory / f"{name}.part"
    partial.write_text(json.dumps(row))
    partial.replace(directory / f"{name}.json")


def _digest(text: str, files: Iterable[pathlib.Path]) -> str:
    digest = hashlib.sha256(text.encode())
    for path in sorted(files):
        digest.update(path.read_bytes())
    for name in COMPILERS:
        try:
            digest.update(f"{name} {importlib.metadata.version(name)}".encode())
        except importlib.metadata.PackageNotFoundError:
            continue
    return digest.hexdigest()[:32]
