"""Where the time goes: seconds by what they were spent on, and what the compiler took apart from that."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import jax

COMPILE = "compile"
_EVENTS = "/jax/core/compile/"  # of tracing, lowering and compiling; what comes from the compilation cache takes part of it

_compiled = threading.local()  # seconds, of each thread its own


def _note(event: str, seconds: float, **_) -> None:
    if event.startswith(_EVENTS):
        _compiled.seconds = _compiled_so_far() + seconds


def _compiled_so_far() -> float:
    return getattr(_compiled, "seconds", 0.0)


jax.monitoring.register_event_duration_secs_listener(_note)


class Stopwatch:
    """with watch("decode"): ...   adds to watch.seconds["decode"], less what was compiled inside, which is added to "compile"."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begun, compiled = time.perf_counter(), _compiled_so_far()
        try:
            yield
        finally:
            compiled = _compiled_so_far() - compiled
            self._add(name, max(time.perf_counter() - begun - compiled, 0.0))
            if compiled:
                self._add(COMPILE, compiled)

    def _add(self, name: str, seconds: float) -> None:
        with self._lock:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def since_start(self) -> float:
        return time.perf_counter() - self.started
