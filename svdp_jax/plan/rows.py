"""Compilations, each in a process of its own, one after the other or a few at once, and their rows: what is known already comes from the cache."""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from svdp_jax import cli
from svdp_jax.config import Config, to_dict
from svdp_jax.plan import cache, targets
from svdp_jax.plan.cache import Row
from svdp_jax.plan.targets import Target

# XLA's words for an array that is gathered whole to be laid out anew.
SPILLED = re.compile(r"Involuntary full rematerialization\..*? from sharding (\{.*?\}) to (\{.*?\}) efficiently for HLO operation %[\w.\-]+ = (\w+\[[\d,]*\])(.*)")


class Request(NamedTuple):
    """What is to be compiled."""

    config: Config
    target: Target
    strategy: str
    program: str  # train, sample
    batch: float  # samples of a step by the number of devices
    remat: str

    @property
    def named(self) -> Row:
        """What tells its row from others."""
        return {"target": self.target.name, "strategy": self.strategy, "program": self.program, "batch": self.batch, "remat": self.remat}


def title(row: Row) -> str:
    """Of a row in a list of several targets'."""
    return " ".join([row["target"], row["strategy"], row["remat"], *([] if row["batch"] == 1 else [f"{row['batch']:g} per device"])])


class Limits(NamedTuple):
    """Of one compilation."""

    memory: float = 20.0  # GB of this machine's
    seconds: float = 1800.0


def fill(requests: Iterable[Request], *, limits: Limits, jobs: int = 1, directory: pathlib.Path | None = None) -> Iterator[tuple[Row, bool]]:
    """The row of each request, and whether it was known; `jobs` are compiled at once. A compilation that fails is a row with its `reason`. `directory`
    keeps rows (default: in the user's cache directory). MediaError, before any of it, where nothing can be kept there."""
    directory = directory or cli.cache_directory() / "plan"
    cache.make(directory)
    left = threading.Event()

    def one(request: Request) -> tuple[Row, bool]:
        name = cache.of_request({"config": to_dict(request.config), **request.named})
        if row := cache.read(directory, name):
            return row, True
        if left.is_set():
            return request.named, False
        row = _compile(request, directory, limits, left)
        known = row.pop("known", False)
        if "ended" not in row:  # where the compiler has had its say; it may have more time or memory another time
            for each in filter(None, [name, row.get("lowered")]):
                cache.write(directory, each, row)
        return row, known

    workers = concurrent.futures.ThreadPoolExecutor(jobs)
    try:
        yield from workers.map(one, requests)
    finally:  # also where nobody waits for the rest
        left.set()
        workers.shutdown(cancel_futures=True)


def _compile(request: Request, directory: pathlib.Path, limits: Limits, left: threading.Event) -> Row:
    """In a process of its own, which is ended where it takes more time or memory than it may."""
    environment = os.environ | targets.environment(request.target) | {"PYTHONPATH": os.pathsep.join([str(cache.PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])}
    asked = json.dumps({"config": to_dict(request.config), "directory": str(directory), **request.named})
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complained, tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "svdp_jax.plan.child", scratch]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=complained, text=True, env=environment, start_new_session=True)
        try:
            process.stdin.write(asked)
            process.stdin.close()
            ended = _watch(process, limits, left)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for stream in said, complained:
            stream.seek(0)
        output, errors = said.read(), complained.read()
    if ended or process.returncode:
        last = (errors.strip().splitlines() or ["it said nothing"])[-1]
        return request.named | {"fits": None, "reason": ended or f"the compiler ended with status {process.returncode}: {last[:300]}", "ended": True}
    return {"warnings": spilled(errors)} | json.loads(output.splitlines()[-1])


def spilled(said: str) -> list[str]:
    """Of what a compiler said, each array that it gathers whole on every device to lay it out anew: its type and shape on a device, where in the model, and
    both layouts in XLA's words."""
    found = []
    for before, after, array, rest in SPILLED.findall(said):
        where = re.search(r'op_name="([^"]*)"', rest)
        found.append(f"{array} of {where[1] if where else 'an operation without a name'}, from {before} to {after}")
    return list(dict.fromkeys(found))


def _watch(process: subprocess.Popen, limits: Limits, left: threading.Event) -> str | None:
    """Waits for the process; why it was not waited for any longer."""
    begun = time.monotonic()
    while process.poll() is None:
        if time.monotonic() - begun > limits.seconds:
            return f"the compiler was ended after {limits.seconds:.0f} s (--seconds)"
        if (held := _resident(process.pid)) > limits.memory * 1e9:
            return f"the compiler was ended at {held / 1e9:.1f} GB of this machine's memory (--memory)"
        if left.wait(0.2):
            return "nobody waited for the compiler"
    return None


def _resident(pid: int) -> int:
    """Bytes of memory that a process has; 0 where the system does not tell."""
    try:
        return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0
