"""A function over many inputs in processes, any of which may crash: decoders are native code, and files are what they are.

In: a function that can be pickled, and its inputs. Out: (input, result) as they come; for an input whose process dies twice,
`DIED` instead of a result.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import faulthandler
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple, TypeVar

import cv2

Job = TypeVar("Job")

DIED = object()
HANGS = 300  # seconds without a sign of life


class _Worker(NamedTuple):
    """A process of its own for one input at a time, so that a death concerns that input alone."""

    pool: concurrent.futures.ProcessPoolExecutor
    process: multiprocessing.process.BaseProcess

    def end(self) -> None:
        """Ends the process and all that it has started, which may live on where it has died."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # it may not have had the time to begin a group
        self.pool.shutdown(cancel_futures=True)


def in_processes(function: Callable[[Job], Any], jobs: Iterable[Job], *, workers: int) -> Iterator[tuple[Job, Any]]:
    """Results of `function` in the order in which they are ready. An input whose process dies is tried once more, when the others have been.
    An exception of `function` is raised here. Closing the iterator ends the processes, and those that they have started."""
    waiting = collections.deque(enumerate(jobs))
    running: dict[concurrent.futures.Future, tuple[int, Job, _Worker]] = {}
    idle: list[_Worker] = []
    died: set[int] = set()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                future, worker = _submit(idle.pop() if idle else None, function, waiting[0][1])
                if future:
                    running[future] = (*waiting.popleft(), worker)
            for future in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done:
                number, job, worker = running.pop(future)
                try:
                    result = future.result()
                    idle.append(worker)
                except BrokenProcessPool:
                    worker.end()
                    if number not in died:
                        died.add(number)
                        waiting.append((number, job))
                        continue
                    result = DIED
                yield job, result
    finally:
        for _, _, worker in running.values():
            worker.end()
        for worker in idle:
            worker.pool.shutdown()


def _submit(worker: _Worker | None, function: Callable[[Job], Any], job: Job) -> tuple[concurrent.futures.Future | None, _Worker]:
    """Gives a job to an idle worker, or to a new one. No future where that has died with nothing to do."""
    if worker:
        try:
            return worker.pool.submit(function, job), worker
        except BrokenProcessPool:
            worker.end()
            return None, worker
    before = set(multiprocessing.active_children())
    pool = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin)
    future = pool.submit(function, job)  # which starts the process
    (process,) = set(multiprocessing.active_children()) - before
    return future, _Worker(pool, process)


@contextlib.contextmanager
def watchdog(seconds: float | None = None) -> Iterator[Callable[[], None]]:
    """Ends this process, even where it hangs in native code, if for so long (HANGS) neither what it yields is called nor what is inside ends."""
    with open(os.devnull, "w") as nowhere:

        def alive() -> None:
            faulthandler.dump_traceback_later(seconds or HANGS, exit=True, file=nowhere)

        alive()
        try:
            yield alive
        finally:
            faulthandler.cancel_dump_traceback_later()


def _begin() -> None:
    """In each process: one core, a process group of its own, which Ctrl-C does not reach, and no life for it without the parent."""
    cv2.setNumThreads(1)
    os.setpgid(0, 0)

    def follow() -> None:
        multiprocessing.parent_process().join()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=follow, daemon=True).start()
