"""Training that is cut off: by kill -9 at any moment, by SIGTERM, by a full disk, by the loss of another process. What goes on is the same run."""

import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import CHEAP, ROOT, saved_state

from svdp_jax import processes

pytestmark = pytest.mark.slow  # minutes each; that what SIGTERM stops goes on as the same run is tested in test_train_cli.py, always

STEPS = 48
RUN = ["--train.steps", STEPS, "--train.history-from-step", 24, "--train.log-every", 1, "--train.checkpoint-every", 5, "--train.sample-every", 1000, *CHEAP]


@pytest.fixture(scope="module")
def start(dataset):
    """start(workdir, *flags, devices, **how): a training in a process of its own."""

    def call(workdir, *flags, devices=1, **how):
        variables = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        given = ["--config", ROOT / "configs" / "tiny.py", "--workdir", workdir, "--data.path", dataset, *RUN, *flags]
        command = [sys.executable, ROOT / "train.py", *given]
        return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how)

    return call


def ended(process, *, status=0):
    said, _ = process.communicate(timeout=400)
    assert process.returncode == status, said[-3000:]
    return said


def lines(workdir):
    """Of metrics.jsonl; one that is being written does not count."""
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


def wait_for_step(process, workdir, step):
    while not any(line["step"] >= step for line in lines(workdir)):
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.005)


def assert_same_run(workdir, other):
    """Parameters, moments, EMA and every loss, to the bit."""
    states = [saved_state(path, STEPS) for path in (workdir, other)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    told = [[(line["step"], line["loss"], line["grad_norm"]) for line in lines(path)] for path in (workdir, other)]
    assert told[0] == told[1] and [line[0] for line in told[0]] == list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def straight(start, tmp_path_factory):
    """The workdir of a run that nothing has cut off."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    ended(start(workdir))
    return workdir


@pytest.mark.parametrize("kills", [1, 10])
def test_a_run_that_is_killed_is_the_same_run(start, straight, tmp_path, kills):
    rng, workdir, points = random.Random(kills), tmp_path / "run", []
    for step in sorted(rng.choices(range(STEPS // 2, STEPS), k=kills)):
        process = start(workdir)
        wait_for_step(process, workdir, step)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        done = process.wait() == 0
        process.stdout.close()
        points.append("ended" if done else lines(workdir)[-1]["step"])
    said = ended(start(workdir))
    print(f"killed behind the steps {points}")
    assert "ended" not in points[:-1] and f"of {STEPS}" in said
    assert_same_run(workdir, straight)


def test_sigterm_saves_and_asks_to_be_started_again(start, straight, tmp_path):
    process = start(tmp_path / "run")
    wait_for_step(process, tmp_path / "run", 4)
    process.send_signal(signal.SIGTERM)
    said = ended(process, status=processes.AGAIN)
    last = lines(tmp_path / "run")[-1]["step"]
    assert 4 <= last < STEPS and f"step {last}: " in said.splitlines()[-1]
    assert max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()) == last
    ended(start(tmp_path / "run"))
    assert_same_run(tmp_path / "run", straight)


def test_a_disk_that_is_full_costs_no_step_that_was_saved(start, straight, tmp_path):
    workdir = tmp_path / "run"
    ended(start(workdir, "--train.stop-at", 12))

    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # bytes, as if there were no room for more

    said = ended(start(workdir, preexec_fn=small_files), status=2)
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "cannot be written" in error or "cannot be saved" in error
    ended(start(workdir))
    assert_same_run(workdir, straight)


# ------------------------------------------------------------------------------------------------------- several processes


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


TWO = ["--train.batch", 8, "--mesh.data", 4, "--mesh.fsdp", 2, "--mesh.strategy", "fsdp"]


def start_two(start, workdir, each=lambda number: []):
    """Two processes of four devices each; `each` has flags of a process."""
    address = f"127.0.0.1:{port()}"
    joined = lambda number: ["--coordinator", address, "--processes", 2, "--process", number, "--heartbeat", 10]
    return [start(workdir, *TWO, *each(number), *joined(number), devices=4) for number in range(2)]


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    """The workdir of one process with eight devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    ended(start(workdir, *TWO, devices=8))
    return workdir


def assert_close_losses(workdir, other, tolerance=1e-5):
    ours, theirs = ([line["loss"] for line in lines(path)] for path in (workdir, other))
    np.testing.assert_allclose(ours, theirs, rtol=tolerance)
    assert len(ours) == STEPS


def test_two_processes_are_one(start, alone, tmp_path):
    said = [ended(process) for process in start_two(start, tmp_path / "run")]
    assert_close_losses(tmp_path / "run", alone)
    assert "8 x cpu" in said[0] and "step 1:" in said[0] and "step 1:" not in said[1], "one of them speaks"


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_is_lost_ends_the_other_and_both_go_on(start, alone, tmp_path, lost):
    workdir = tmp_path / "run"
    both = start_two(start, workdir)
    wait_for_step(both[lost], workdir, 7)
    both[lost].kill()
    begun = time.monotonic()
    said, _ = both[1 - lost].communicate(timeout=60)
    print(f"the other ended after {time.monotonic() - begun:.1f} s, saying: {said.strip().splitlines()[-1]}")
    assert both[1 - lost].returncode not in (0, None) and said.strip()
    for process in start_two(start, workdir):
        ended(process)
    assert_close_losses(workdir, alone)


def test_a_process_that_cannot_begin_ends_the_other(start, tmp_path):
    both = start_two(start, tmp_path / "run", each=lambda number: ["--data.path", tmp_path / "nowhere"] if number else [])
    said = [process.communicate(timeout=90)[0] for process in both]
    assert both[1].returncode == 2 and f"{tmp_path / 'nowhere'}" in said[1].strip().splitlines()[-1]
    assert both[0].returncode not in (0, None) and said[0].strip()


def test_sigterm_to_one_process_stops_both_behind_the_same_step(start, alone, tmp_path):
    workdir = tmp_path / "run"
    both = start_two(start, workdir)
    wait_for_step(both[0], workdir, 4)
    both[1].send_signal(signal.SIGTERM)
    for process in both:
        ended(process, status=processes.AGAIN)
    assert lines(workdir)[-1]["step"] < STEPS
    for process in start_two(start, workdir):
        ended(process)
    assert_close_losses(workdir, alone)


def test_processes_that_do_not_share_a_workdir_are_told(start, tmp_path):
    address = f"127.0.0.1:{port()}"
    joined = ["--coordinator", address, "--processes", 2, "--heartbeat", 10]
    alone = [start(tmp_path / f"of{number}", *TWO, *joined, "--process", number, devices=4) for number in range(2)]
    for process in alone:
        assert "is not one directory to all processes: process 1 cannot see" in ended(process, status=2)


def test_a_run_goes_on_with_another_mesh(start, alone, tmp_path):
    ended(start(tmp_path / "run", *TWO, "--train.stop-at", 20, devices=8))
    other = ["--mesh.data", 1, "--mesh.fsdp", 2, "--mesh.context", 2, "--mesh.tensor", 1, "--mesh.strategy", "fsdp_context"]
    ended(start(tmp_path / "run", *TWO, *other, devices=4))
    assert_close_losses(tmp_path / "run", alone)
