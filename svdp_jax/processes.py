"""Several processes in one run: how they find each other, and how they stop.

On a TPU pod JAX finds them by itself; under Slurm and MPI too, one process per GPU. Anywhere else (a JobSet of GPU nodes, two
terminals) each is told: `--coordinator HOST:PORT --processes N --process I`.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from svdp_jax.config import ConfigError
from svdp_jax.files import Place, one_line

HEARTBEAT = 20  # seconds without a sign of life, after which a process counts as gone
PATIENCE = 300  # seconds until all processes must have come
SEEN_WITHIN = 30  # seconds, what one process writes on a file system by all others
AGAIN = 75  # the status of a run that was told to stop before its end: whoever started it is to start it again (EX_TEMPFAIL of sysexits.h)
LOST = re.compile("unavailable|deadline|aborted|cancelled|heartbeat|coordination|barrier|gloo|nccl|connection|socket|peer|preempt", re.IGNORECASE)  # of what JAX says


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
    if cluster.coordinator and not re.fullmatch(r".+:\d+", cluster.coordinator):
        raise ConfigError(f"--coordinator {cluster.coordinator} is not HOST:PORT")
    if not all(given) and not expected(environment):
        return
    if cluster.process == 0:
        _expect_free(cluster.coordinator)
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours: all processes stop behind the same step
    try:
        with _gives_up(cluster):
            limits = {"initialization_timeout": 2 * PATIENCE, "heartbeat_timeout_seconds": cluster.heartbeat}
            jax.distributed.initialize(cluster.coordinator, cluster.processes, cluster.process, **limits)
    except Exception as error:  # of gRPC, of whoever looks for the cluster
        where = f" at {cluster.coordinator}" if given[0] else "; --coordinator HOST:PORT, --processes N and --process I say where they are"
        raise ConfigError(f"the other processes of this run cannot be joined{where}: {one_line(error)[:300]}") from error


def _expect_free(coordinator: str) -> None:
    """ConfigError where the coordinator's port is taken, at which JAX crashes."""
    try:
        socket.create_server(("", int(coordinator.rpartition(":")[2]))).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--coordinator {coordinator}: process 0 cannot listen there ({one_line(error)}); another port, or end what has it") from error


@contextlib.contextmanager
def _gives_up(cluster: Cluster) -> Iterator[None]:
    """Ends the process where it is not out of here within PATIENCE, and says why. JAX's own limit ends it with a stack trace of C++."""

    def give_up() -> None:
        print(f"error: {absence(cluster)}", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(PATIENCE, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def absence(cluster: Cluster) -> str:
    """Who is missing, as far as one process can tell."""
    late = f"the processes of this run have not all come within {PATIENCE} s"
    if not cluster.coordinator:
        return f"{late}; have all of them been started, and do they reach each other?"
    host, _, port = cluster.coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        return f"{late}: at --coordinator {cluster.coordinator} nobody answers ({one_line(error)}); process 0 must run there"
    return f"{late}: {cluster.coordinator} answers, but not all {cluster.processes} are there; is that process 0 of this run, and has each a --process of its own, 0 to {cluster.processes - 1}?"


def expected(environment: Mapping[str, str]) -> bool:
    """Whether there are other processes: by what the environment says of Slurm, MPI, a TPU pod or several TPU slices, and by what a Cloud TPU VM's metadata say.
    Under Slurm, what `srun` starts: in the shell of an allocation one process runs alone."""
    several = lambda name: int(environment.get(name) or 1) > 1
    listed = lambda name: len(_names(environment.get(name, ""))) > 1
    if several("SLURM_NTASKS") and "SLURM_STEP_NODELIST" in environment:
        return True
    if any(map(several, ("OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES"))) or any(map(listed, ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"))):
        return True
    if environment.get("TPU_SKIP_MDS_QUERY") or not _has_tpu():
        return False
    slices = re.search(r"MEGASCALE_NUM_SLICES: *'?(\d+)", _metadata("tpu-env", environment))
    return len(_names(_metadata("worker-network-endpoints", environment))) > 1 or bool(slices and int(slices[1]) > 1)


def _names(listed: str) -> list[str]:
    return [name for name in listed.split(",") if name.strip()]


def _has_tpu() -> bool:
    """Whether JAX will use TPU chips of this machine."""
    return bool(importlib.util.find_spec("libtpu") and (glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")))


def _metadata(name: str, environment: Mapping[str, str]) -> str:
    """An attribute of this virtual machine, empty where it has none or is none of Google's."""
    host = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(f"http://{host}/computeMetadata/v1/instance/attributes/{name}", headers={"Metadata-Flavor": "Google"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=10) as answer:
            return answer.read().decode()
    except OSError:
        return ""


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around a command line that may be one of several processes: where it fails, it ends at once, and so, a heartbeat later, do the others.

    The end of a Python process waits for the others otherwise, and they for it. Where it fails because another one is gone, that is said."""
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, jax.errors.JaxRuntimeError) and LOST.search(str(error)):
            print(f"error: the processes of this run have lost each other ({one_line(error)[:300]}); start all of them again: the run goes on", file=sys.stderr)
        elif not isinstance(error, SystemExit):  # of which the reason has been told
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


def check_shared(directory: Place) -> None:
    """ConfigError unless all processes see what one of them writes in this directory: the parts of a checkpoint would not come together."""
    if jax.process_count() == 1:
        return
    mark = directory / f".shared-{int(multihost_utils.broadcast_one_to_all(np.int32(secrets.randbits(31)))):08x}"
    if jax.process_index() == 0:
        mark.write_text("seen by all processes")
    wait_for_all()
    until = time.monotonic() + SEEN_WITHIN
    while not (seen := mark.exists()) and time.monotonic() < until:
        time.sleep(1)
    blind = np.flatnonzero(~multihost_utils.process_allgather(np.array(seen))).tolist()
    if jax.process_index() == 0:
        mark.unlink()
    if blind:
        which = f"process{'es' if len(blind) > 1 else ''} {', '.join(map(str, blind))}"
        raise ConfigError(f"{directory} is not one directory to all processes: {which} cannot see what process 0 writes there; use a file system that all share, or gs://")


def agreed(number: int) -> int:
    """The first process's number, in all of them."""
    return number if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def wait_for_all() -> None:
    """Until all processes are here, however long one takes: at their ends JAX gives them five minutes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("all are here")


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
