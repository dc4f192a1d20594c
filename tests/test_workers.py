"""Processes that crash, hang or lose their parent take nothing else along."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from svdp_jax.data import workers


def double(number):
    return 2 * number


def dies_at_three(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return number


def hangs_at_one(number):
    with workers.watchdog(1) as alive:
        for _ in range(4):
            time.sleep(60 if number == 1 else 0.4)  # longer than a second in all, and alive
            alive()
    return number


def dies_the_first_time(path):
    """How often it was called for this path; for the one that ends with 2, the first time is its end."""
    begun = pathlib.Path(path).read_text() if os.path.exists(path) else ""
    pathlib.Path(path).write_text(begun + ".")
    if path.endswith("2") and not begun:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)
    return len(begun) + 1


def raises_at_two(number):
    if number == 2:
        raise ValueError("two")
    return number


def tell_and_wait(path):
    """Starts a program, as LivePortrait is started, and waits for it."""
    program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    pathlib.Path(path).write_text(f"{os.getpid()} {program.pid}")
    program.wait()


def test_every_input_has_its_result():
    assert sorted(workers.in_processes(double, range(7), workers=2)) == [(number, 2 * number) for number in range(7)]
    assert list(workers.in_processes(double, [], workers=2)) == []


@pytest.mark.parametrize(("function", "lost"), [(dies_at_three, 3), (hangs_at_one, 1)])
def test_only_the_input_that_kills_its_process_is_lost(function, lost):
    results = dict(workers.in_processes(function, range(5), workers=2))
    assert results == {number: workers.DIED if number == lost else number for number in range(5)}


def test_what_dies_once_is_tried_again_and_costs_the_others_nothing(tmp_path):
    jobs = [str(tmp_path / str(number)) for number in range(4)]
    results = dict(workers.in_processes(dies_the_first_time, jobs, workers=2))
    assert results == {job: 2 if job.endswith("2") else 1 for job in jobs}, "how often each was begun"


def starts_a_program_and_dies(path):
    program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(path, "a") as log:
        log.write(f"{program.pid} ")
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_process_has_started_does_not_outlive_it(tmp_path):
    path = str(tmp_path / "programs")
    assert list(workers.in_processes(starts_a_program_and_dies, [path], workers=1)) == [(path, workers.DIED)]
    started = list(map(int, pathlib.Path(path).read_text().split()))
    assert len(started) == 2
    wait_for(lambda: not any(map(alive, started)), seconds=10)


def test_an_exception_is_raised_here():
    with pytest.raises(ValueError, match="two"):
        list(workers.in_processes(raises_at_two, range(5), workers=2))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_and_what_they_have_started_end_with_their_parent(tmp_path, end):
    paths = [str(tmp_path / name) for name in "ab"]
    code = f"import test_workers as t\nif __name__ == '__main__': list(t.workers.in_processes(t.tell_and_wait, {paths}, workers=2))"
    (tmp_path / "parent.py").write_text(code)
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background ignores it
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"], env=os.environ | {"PYTHONPATH": os.path.dirname(__file__)}, stderr=subprocess.DEVNULL, preexec_fn=heed)
    wait_for(lambda: all(os.path.exists(path) and pathlib.Path(path).read_text() for path in paths), seconds=60)
    children = [int(number) for path in paths for number in pathlib.Path(path).read_text().split()]
    assert len(children) == 4 and all(map(alive, children))
    parent.send_signal(end)
    parent.wait(timeout=60)
    wait_for(lambda: not any(map(alive, children)), seconds=10)


def wait_for(condition, *, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def alive(process):
    try:
        return pathlib.Path(f"/proc/{process}/stat").read_text().split(")")[-1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
