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
    """Results of `function` in the order in which they are ready. Where a process dies, all that was running is run again, one at a
    time, so that only the input that kills it is lost. An exception of `function` is raised here. Closing the iterator ends the processes."""
    waiting, suspects = collections.deque(jobs), collections.deque()
    while waiting or suspects:
        # A pool that breaks takes all that runs in it along, so suspects get one of their own each.
        queue = collections.deque([suspects.popleft()]) if suspects else waiting
        alone = queue is not waiting
        running: dict[concurrent.futures.Future, Job] = {}
        pool = concurrent.futures.ProcessPoolExecutor(1 if alone else workers, multiprocessing.get_context("spawn"), _begin)
        try:
            broken = False
            while running or (queue and not broken):
                while queue and len(running) < workers and not broken:
                    job = queue.popleft()
                    try:
                        running[pool.submit(function, job)] = job
                    except BrokenProcessPool:
                        queue.appendleft(job)
                        broken = True
                for future in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done:
                    job = running.pop(future)
                    try:
                        result = future.result()
                    except BrokenProcessPool:
                        broken = True
                        if not alone:
                            suspects.append(job)
                            continue
                        result = DIED
                    yield job, result
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()
            raise
        finally:
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
    """In each process: one core, Ctrl-C is the parent's to handle, and no life without it."""
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
