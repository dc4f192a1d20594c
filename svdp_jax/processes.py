"""Several processes in one run: how they find each other, and how they stop.

On a TPU pod JAX finds them by itself; under Slurm and MPI too, one process per GPU. Anywhere else (a JobSet of GPU nodes, two
terminals) each is told: `--coordinator HOST:PORT --processes N --process I`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax

from svdp_jax.config import ConfigError
from svdp_jax.files import one_line

HEARTBEAT = 20  # seconds without a sign of life, after which a process counts as gone


class Cluster(NamedTuple):
    """Who takes part, where it is not found out by itself."""

    coordinator: str | None = None  # HOST:PORT of process 0
    processes: int | None = None
    process: int | None = None
    heartbeat: int = HEARTBEAT


def start(cluster: Cluster, environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes, if there are any. Before any device is used. ConfigError where they are not found."""
    given = [value is not None for value in cluster[:3]]
    if any(given) and not all(given):
        raise ConfigError("--coordinator HOST:PORT, --processes N and --process I are given together")
    if not all(given) and not expected(environment):
        return
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours: all processes stop behind the same step
    try:
        jax.distributed.initialize(cluster.coordinator, cluster.processes, cluster.process, heartbeat_timeout_seconds=cluster.heartbeat)
    except Exception as error:  # of gRPC, of whoever looks for the cluster
        raise ConfigError(f"the other processes of this run cannot be joined: {one_line(error)[:300]}") from error


def expected(environment: Mapping[str, str]) -> bool:
    """Whether the environment speaks of other processes: Slurm, MPI, a TPU pod or several TPU slices."""
    several = lambda name: int(environment.get(name) or 1) > 1
    workers = [name for name in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    return several("SLURM_NTASKS") or several("OMPI_COMM_WORLD_SIZE") or several("MEGASCALE_NUM_SLICES") or len(workers) > 1


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around a command line that may be one of several processes: where it fails, it ends at once, and so, a heartbeat later, do the others.

    The end of a Python process waits for the others otherwise, and they for it. Where it fails because another one is gone, that is said."""
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            print(f"error: the processes of this run have lost each other, or a device has failed ({one_line(error)[:300]}); start all of them again: the run goes on", file=sys.stderr)
        elif not isinstance(error, SystemExit):  # of which the reason has been told
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


class Told:
    """Whether this process has been told to stop."""

    def __init__(self) -> None:
        self.to_stop = False


@contextlib.contextmanager
def stop_signal() -> Iterator[Told]:
    """SIGTERM, inside, is only noted. A second one ends the process, as it would have without this."""
    told = Told()
    before = signal.getsignal(signal.SIGTERM)

    def note(*_) -> None:
        told.to_stop = True
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, note)
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)
