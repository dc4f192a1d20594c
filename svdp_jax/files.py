"""Files: where they are, what is said, in one line, of one that cannot be used, and how one appears only when it is whole.

Below everything else that reads or writes files, so that all can use it.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import pathlib
import time
import uuid
from collections.abc import Iterator

from etils import epath

from svdp_jax.config import ConfigError

Place = pathlib.Path | epath.Path  # a local path, or one on Google Cloud Storage; they have the same methods

FREE = "free some space and run the command again"


class MediaError(ValueError):
    """A file that cannot be used. The message is one line: which file, what is wrong, what to do."""


def place(text: str | os.PathLike) -> Place:
    """The path that `text` names, local or gs://BUCKET/... ConfigError for any other address."""
    scheme, found, _ = os.fspath(text).partition("://")
    if not found:
        return pathlib.Path(text)
    if scheme != "gs":
        raise ConfigError(f"{text}: a place is a local path or gs://BUCKET/...")
    if not importlib.util.find_spec("gcsfs"):
        raise ConfigError(f"{text} needs another package: pip install -e '.[gcs]'")
    return epath.Path(text)


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is on Google Cloud Storage: what is written there appears whole, and nothing can be appended to it."""
    return "://" in os.fspath(path)


def one_line(error: BaseException) -> str:
    """The message of another library's exception, to stand in one of ours; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """What such a message begins with, without the pages behind it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def writing(path: str | os.PathLike, *others: type[Exception], advice: str = FREE) -> Iterator[None]:
    """OSErrors (and the `others`, of a library that writes) become a MediaError that names `path` and says what to do."""
    kinds = (Exception,) if is_remote(path) else (OSError, *others)  # of the network there are many
    try:
        yield
    except kinds as error:
        raise MediaError(f"{path}: cannot be written ({one_line(error)}); is the disk full? then {advice}") from error


@contextlib.contextmanager
def whole(path: Place, *, replace: bool = True, advice: str = FREE) -> Iterator[Place]:
    """A path to write to. When that is done it is on the disk and becomes `path`, at once; `replace=False` leaves one that is there by then.

    MediaError where it cannot be written. What a process leaves that is killed meanwhile is called `.{name}.*.partial`.
    """
    if is_remote(path):
        with writing(path, advice=advice):
            yield path
        return
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with writing(path, advice=advice):
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            if replace:
                partial.replace(path)
            else:
                _first(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def held(path: pathlib.Path, *, patience: float) -> Iterator[None]:
    """Inside, this process alone has the lock that is the file `path`. ConfigError where another one has it for `patience` seconds longer. On a file system
    without locks, everybody has it."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    until = time.monotonic() + patience
    with lock:
        while not lock_now(lock.fileno()):
            if time.monotonic() > until:
                raise ConfigError(f"{path.parent} is in use by another process, which holds {path.name}; let it finish, or end it")
            time.sleep(1)
        yield


def lock_now(descriptor: int) -> bool:
    """Locks an open file or folder, until it is closed; False where another process has it locked. On a file system without locks, True."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _first(partial: pathlib.Path, path: pathlib.Path) -> None:
    """`partial` under the name `path`, of several processes that do so at once the first one's."""
    try:
        os.link(partial, path)
    except FileExistsError:
        pass
    except OSError:  # no hard links here
        if not path.exists():
            partial.rename(path)
