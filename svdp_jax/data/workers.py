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
from typing import Any, TypeVar

import cv2

Job = TypeVar("Job")

DIED = object()


def in_processes(function: Callable[[Job], Any], jobs: Iterable[Job], *, workers: int) -> Iterator[tuple[Job, Any]]:
    """Results of `function` in the order in which they are ready. An input whose process dies is tried once more. An exception of
    `function` is raised here. Closing the iterator ends the processes, and those that they have started."""
    waiting = collections.deque(enumerate(jobs))
    running: dict[concurrent.futures.Future, tuple[int, Job, concurrent.futures.ProcessPoolExecutor]] = {}
    idle: list[concurrent.futures.ProcessPoolExecutor] = []  # of one process each, so that a death concerns its own input alone
    died: set[int] = set()
    before = set(multiprocessing.active_children())
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                pool = idle.pop() if idle else concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin)
                try:
                    running[pool.submit(function, waiting[0][1])] = (*waiting[0], pool)
                    waiting.popleft()
                except BrokenProcessPool:  # died while it had nothing to do
                    pool.shutdown()
            for future in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done:
                number, job, pool = running.pop(future)
                try:
                    result = future.result()
                    idle.append(pool)
                except BrokenProcessPool:
                    pool.shutdown()
                    if number not in died:
                        died.add(number)
                        waiting.appendleft((number, job))
                        continue
                    result = DIED
                yield job, result
    finally:
        for child in set(multiprocessing.active_children()) - before if running else ():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.kill()
        for pool in [*idle, *(pool for _, _, pool in running.values())]:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Ends this process if what is inside takes longer, even where it hangs in native code."""
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
        try:
            yield
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
