"""How processes find each other is told apart from being alone, and a signal to stop is only noted."""

import http.server
import os
import signal
import socket
import threading

import jax
import pytest

from svdp_jax import processes
from svdp_jax.config import ConfigError


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "16", "SLURM_STEP_NODELIST": "n[1-2]"}, True),
        ({"SLURM_NTASKS": "16"}, False),  # the shell of an allocation, without srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, True),
        ({"TPU_PROCESS_ADDRESSES": "10.0.0.1:8476,10.0.0.2:8476"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_the_environment_speaks_of_others_or_not(environment, several):
    assert processes.expected(environment) == several


@pytest.fixture
def metadata():
    """Serves a virtual machine's attributes as Google's do: metadata(attributes) -> the environment that points there."""
    servers = []

    def serve(attributes):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                value = attributes.get(self.path.removeprefix("/computeMetadata/v1/instance/attributes/"))
                self.send_response(404 if value is None or self.headers["Metadata-Flavor"] != "Google" else 200)
                self.end_headers()
                self.wfile.write((value or "").encode())

            def log_message(self, *_):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return {"GCE_METADATA_IP": f"127.0.0.1:{servers[-1].server_port}"}

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("attributes", "several"),
    [
        ({}, False),
        ({"worker-network-endpoints": "10.0.0.1", "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-8'\n"}, False),
        ({"worker-network-endpoints": "unknown:unknown:10.0.0.1,unknown:unknown:10.0.0.2"}, True),
        ({"worker-network-endpoints": "10.0.0.1", "tpu-env": "ZONE: 'us-east5-a'\nMEGASCALE_NUM_SLICES: '2'\n"}, True),
    ],
)
def test_a_tpu_vm_is_asked_for_the_other_workers(attributes, several, metadata, monkeypatch):
    environment = metadata(attributes)
    assert not processes.expected(environment)  # here is no TPU
    monkeypatch.setattr(processes, "_has_tpu", lambda: True)
    assert processes.expected(environment) == several
    assert not processes.expected(environment | {"TPU_SKIP_MDS_QUERY": "1"})


def test_a_tpu_elsewhere_has_no_others(monkeypatch):
    monkeypatch.setattr(processes, "_has_tpu", lambda: True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = f"127.0.0.1:{server.getsockname()[1]}"
    assert not processes.expected({"GCE_METADATA_IP": nobody})


def test_alone_nothing_is_joined(monkeypatch):
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda *_, **__: pytest.fail("there is nobody"))
    processes.start(processes.Cluster(), {})


@pytest.mark.parametrize("cluster", [processes.Cluster("localhost:1"), processes.Cluster(processes=2, process=0)])
def test_flags_that_lack_one_are_refused(cluster):
    with pytest.raises(ConfigError, match="are given together"):
        processes.start(cluster, {})


@pytest.mark.parametrize("place", ["localhost", ":1", "localhost:http"])
def test_a_coordinator_is_a_host_and_a_port(place):
    with pytest.raises(ConfigError, match=f"--coordinator {place} is not HOST:PORT"):
        processes.start(processes.Cluster(place, 2, 1), {})


def test_where_joining_fails_that_is_said(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("UNKNOWN: no such cluster.\nMany more lines")

    monkeypatch.setattr(processes.jax.distributed, "initialize", fails)
    monkeypatch.setattr(processes.jax.config, "update", lambda *_: None)
    with pytest.raises(ConfigError, match="cannot be joined at localhost:1: UNKNOWN: no such cluster. Many more lines"):
        processes.start(processes.Cluster("localhost:1", 2, 1), {})


@pytest.fixture
def taken():
    """A port that somebody listens at who is no process 0."""
    with socket.create_server(("", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("port", ["taken", 99999999])
def test_a_coordinator_that_cannot_listen_is_told(taken, port):
    place = f"localhost:{taken if port == 'taken' else port}"
    with pytest.raises(ConfigError, match=f"--coordinator {place}: process 0 cannot listen there"):
        processes.start(processes.Cluster(place, 2, 0), {})


JOIN = """
import sys
from svdp_jax import processes
processes.PATIENCE = 2
processes.start(processes.Cluster(sys.argv[1], 2, int(sys.argv[2])))
"""


@pytest.mark.parametrize(
    ("process", "said"),
    [
        (1, "at --coordinator {place} nobody answers ([Errno 111] Connection refused); process 0 must run there"),
        (0, "{place} answers, but not all 2 are there; is that process 0 of this run, and has each a --process of its own, 0 to 1?"),
    ],
)
def test_a_process_that_nobody_joins_says_so_and_ends(python, free, process, said):
    place = f"127.0.0.1:{free}"
    done = python("-c", JOIN, place, process)
    assert done.returncode == 1
    assert f"error: the processes of this run have not all come within 2 s: {said.format(place=place)}" in done.stderr.splitlines()


@pytest.fixture
def free():
    """A port that is free."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


class Ended(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def ending(monkeypatch):
    """ending(error): with which status a process ends whose run of several processes fails with it."""

    def end(status):
        raise Ended(status)

    monkeypatch.setattr(processes.jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.os, "_exit", end)

    def call(error):
        with pytest.raises(Ended) as caught, processes.together():
            raise error
        return caught.value.args[0]

    return call


def test_a_process_that_loses_the_others_says_so_and_ends_at_once(ending, capsys):
    assert ending(jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed:\nConnection closed by peer")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the processes of this run have lost each other (UNKNOWN: Gloo AllGather failed: Connection closed by peer); start all")


def test_a_process_that_fails_by_itself_ends_at_once_too(ending, capsys):
    assert ending(SystemExit(2)) == 2 and not capsys.readouterr().err, "which has been told before"
    assert ending(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")) == 1 and "lost each other" not in capsys.readouterr().err
    for error in KeyError("a mistake of ours"), jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile TPU kernel: unsupported shape"):
        assert ending(error) == 1
        said = capsys.readouterr().err
        assert "Traceback" in said and str(error) in said and "lost each other" not in said


def test_a_process_alone_fails_as_ever():
    with pytest.raises(KeyError), processes.together():
        raise KeyError("a mistake of ours")


def test_a_signal_to_stop_is_noted_and_a_second_one_is_not_kept_back():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("the old way"))
    try:
        with processes.stop_signal() as told:
            assert not told.to_stop
            os.kill(os.getpid(), signal.SIGTERM)
            assert told.to_stop and not heard
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(heard) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
