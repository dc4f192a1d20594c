"""Command lines: arguments to values, warnings to one line each, and what a user got wrong to one line and exit status 2.

`parse` reads a dataclass by tyro, `ArgumentParser` is argparse; both name the argument that is wrong, and what it takes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import io
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import tyro

from svdp_jax.config import ConfigError

Values = TypeVar("Values")


class ArgumentParser(argparse.ArgumentParser):
    """argparse that tells a mistake in one line, without its usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help explains\n")


@contextlib.contextmanager
def messages(*mistakes: type[Exception]) -> Iterator[None]:
    """Around a command line: an exception of these types becomes one line on stderr and exit status 2, a warning one line.

    Ctrl-C becomes one line and status 130.
    """
    before, warnings.formatwarning = warnings.formatwarning, _warning_line
    try:
        yield
    except mistakes as problem:
        print(f"error: {' '.join(str(problem).splitlines())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as end:
        print(f"interrupted{''.join(f'; {what}' for what in end.args)}", file=sys.stderr)
        sys.exit(130)
    finally:
        warnings.formatwarning = before


@contextlib.contextmanager
def interrupted(advice: str) -> Iterator[None]:
    """Inside `messages`: what to say where Ctrl-C ends this part."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(advice) from None


def keep_programs() -> None:
    """What JAX compiles is kept on disk for the next start: in $JAX_COMPILATION_CACHE_DIR, else in the user's cache directory."""
    import jax  # which most commands do without

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory()))


def on_host() -> None:
    """JAX computes on the CPU and looks for nothing else: for commands that need no accelerator, where one may be full, or wait for other hosts. Before any
    computation."""
    import jax  # which most commands do without

    jax.config.update("jax_platforms", "cpu")


def cache_directory() -> pathlib.Path:
    """Of what can be made again."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "svdp_jax"


def _warning_line(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """Ours are plain UserWarnings, and where in the code they come from is no user's matter."""
    place = "" if category is UserWarning else f" ({category.__name__}, {filename}:{lineno})"
    return f"warning: {' '.join(str(message).splitlines())}{place}\n"


def parse(default: Values, arguments: list[str], *, description: str, prog: str) -> Values:
    """`default`, a dataclass, with the fields that `arguments` give by their dotted names. --help prints and exits.

    ConfigError where an argument is unknown or has a value of another type, and whatever the dataclass itself raises.
    """

    def read(arguments: list[str]) -> tuple[Values, list[str]]:
        with contextlib.redirect_stderr(io.StringIO()):  # where tyro draws a box of many lines
            return tyro.cli(type(default), default=default, args=arguments, description=description, prog=prog, return_unknown_args=True)

    try:
        values, unknown = read(arguments)
    except SystemExit as end:
        if not end.code:
            raise
        raise ConfigError(_wrong_value(type(default), next(filter(lambda flag: _fails(read, flag), _split(arguments)), arguments))) from None
    if unknown:
        raise ConfigError(_unknown(type(default), unknown[0]))
    return values


def _split(arguments: list[str]) -> list[list[str]]:
    """Each flag with its values."""
    starts = [number for number, argument in enumerate(arguments) if number == 0 or re.match("--?[a-z]", argument)]
    return [arguments[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]


def _fails(read: Any, flag: list[str]) -> bool:
    """Whether a flag cannot be read by itself. That its value does not go with the other fields is no matter here."""
    try:
        read(flag)
    except SystemExit:
        return True
    except ConfigError:
        return False
    return False


def _wrong_value(cls: type, flag: list[str]) -> str:
    hint = _flags(cls).get(flag[0].split("=")[0].replace("_", "-"))
    return f"{' '.join(flag)}: takes {_takes(hint)}; --help explains it"


def _unknown(cls: type, argument: str) -> str:
    if not argument.startswith("-"):
        return f"{argument}: no flag takes it; --help lists what each takes"
    close = difflib.get_close_matches(argument.split("=")[0].replace("_", "-"), _flags(cls), n=1, cutoff=0.75)
    return f"unknown flag {argument}; {f'did you mean {close[0]}? ' if close else ''}--help lists all"


def _flags(cls: type, prefix: str = "--") -> dict[str, Any]:
    """Flag -> type of what it sets, of a dataclass and those in it."""
    flags = {}
    for name, hint in get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            flags |= _flags(hint, f"{prefix}{name}.")
        else:
            flags[prefix + name.replace("_", "-")] = hint
            if hint is bool:
                flags[f"{prefix}no-{name.replace('_', '-')}"] = hint
    return flags


def _takes(hint: Any) -> str:
    """What a flag of this type takes, in words."""
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return f"one of {', '.join(parts)}"
    if get_origin(hint) is tuple:
        return f"{'any number of' if parts[-1] is ... else len(parts)} values, each {_takes(parts[0])}"
    if type(None) in parts:
        return _takes(next(part for part in parts if part is not type(None)))
    return {int: "a whole number", float: "a number", bool: "no value"}.get(hint, "a value")
