"""How processes find each other is told apart from being alone, and a signal to stop is only noted."""

import os
import signal

import jax
import pytest

from svdp_jax import processes
from svdp_jax.config import ConfigError


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "16"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_the_environment_speaks_of_others_or_not(environment, several):
    assert processes.expected(environment) == several


def test_alone_nothing_is_joined(monkeypatch):
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda *_, **__: pytest.fail("there is nobody"))
    processes.start(processes.Cluster(), {})


@pytest.mark.parametrize("cluster", [processes.Cluster("localhost:1"), processes.Cluster(processes=2, process=0)])
def test_flags_that_lack_one_are_refused(cluster):
    with pytest.raises(ConfigError, match="are given together"):
        processes.start(cluster, {})


def test_where_the_others_are_not_found_that_is_said(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out.\nMany more lines")

    monkeypatch.setattr(processes.jax.distributed, "initialize", fails)
    monkeypatch.setattr(processes.jax.config, "update", lambda *_: None)
    with pytest.raises(ConfigError, match="cannot be joined: DEADLINE_EXCEEDED: Barrier timed out. Many more lines"):
        processes.start(processes.Cluster("localhost:1", 2, 0), {})


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
    assert line.startswith("error: the processes of this run have lost each other, or a device has failed (UNKNOWN: Gloo AllGather failed: Connection closed by peer); start all")


def test_a_process_that_fails_by_itself_ends_at_once_too(ending, capsys):
    assert ending(SystemExit(2)) == 2 and not capsys.readouterr().err, "which has been told before"
    assert ending(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")) == 1 and "lost each other" not in capsys.readouterr().err
    assert ending(KeyError("a mistake of ours")) == 1 and "Traceback" in capsys.readouterr().err


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
