"""What a run writes of itself: means over an interval, what a device does not tell left out, and nothing twice after a crash."""

import json
import time

import jax.numpy as jnp
import numpy as np
import pytest

from svdp_jax import journal, peaks
from svdp_jax.files import MediaError


def metrics(loss, *, bad=0, stop=0, t=0):
    samples = np.zeros(5)
    samples[t] = 2
    values = {"loss": loss, "grad_norm": 1.0, "bad": bad, "stop": stop, "loss_sums": samples * loss, "samples": samples}
    return {name: jnp.asarray(value) for name, value in values.items()}


def begin(folder, *, start=0, pending=(), every=2, end=10, writer=True):
    return journal.Journal(folder, every=every, start=start, end=end, pending=pending, writer=writer)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_record_is_the_mean_of_its_steps(tmp_path, capsys):
    log = begin(tmp_path)
    for step, loss in enumerate([1.0, 3.0, 10.0], start=1):
        log.add(step, metrics(loss, t=step), work=2e12)
    log.close()
    (record,) = lines(tmp_path)
    assert (record["step"], record["loss"], record["grad_norm"], record["bad"]) == (2, 2.0, 1.0, 0)
    assert record["loss_t/0.2-0.4"] == 1 and record["loss_t/0.4-0.6"] == 3 and "loss_t/0.0-0.2" not in record
    assert record["tflops"] == pytest.approx(2 / record["seconds"], rel=1e-6)
    assert "mfu" not in record and "memory_gb" not in record, "a CPU tells neither"
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert said.startswith("step 2: loss 2.0000, grad 1.00, ") and "TFLOP/s per device" in said
    assert list((tmp_path / "tensorboard").iterdir())


def test_what_is_done_in_a_pause_is_no_steps_time(tmp_path):
    log = begin(tmp_path, every=1)
    with log.paused():
        time.sleep(0.5)
    log.add(1, metrics(1.0), work=1.0)
    log.close()
    assert lines(tmp_path)[0]["seconds"] < 0.4


def test_steps_that_were_skipped_do_not_count(tmp_path):
    log = begin(tmp_path, every=3)
    for step, loss in enumerate([1.0, np.nan, 3.0], start=1):
        log.add(step, metrics(loss, bad=int(np.isnan(loss))), work=1.0)
        assert log.bad == int(np.isnan(loss))
    log.close()
    assert lines(tmp_path)[0]["loss"] == 2 and lines(tmp_path)[0]["bad"] == 1


def test_the_last_step_is_recorded_and_a_vote_to_stop_is_told(tmp_path):
    log = begin(tmp_path, every=4, end=5)
    told = [log.add(step, metrics(1.0, stop=step == 2), work=1.0) for step in range(1, 6)]
    log.close()
    assert told == [False, True, False, False, False]
    assert [line["step"] for line in lines(tmp_path)] == [4, 5]


def test_an_interval_that_was_cut_off_is_recorded_whole(tmp_path):
    log = begin(tmp_path, every=4)
    for step in 1, 2:
        log.add(step, metrics(float(step)), work=1.0)
    kept = json.loads(json.dumps(log.pending))  # as a checkpoint keeps it
    log.add(3, metrics(99.0), work=1.0)  # the machine goes behind this one
    log.close()
    log = begin(tmp_path, start=2, pending=kept, every=4)
    for step in 3, 4:
        log.add(step, metrics(float(step)), work=1.0)
    log.close()
    (record,) = lines(tmp_path)
    assert record["loss"] == 2.5


def test_what_was_logged_behind_the_checkpoint_goes(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0}\n{"step": 4, "loss": 1.0}\n{"step": 6, "lo')
    begin(tmp_path, start=3).close()
    assert lines(tmp_path) == [{"step": 2, "loss": 1.0}]


def test_others_than_the_writer_write_nothing(tmp_path):
    log = begin(tmp_path, writer=False)
    log.add(2, metrics(1.0, bad=1), work=1.0)
    log.picture(2, np.zeros((4, 4, 3), np.uint8))
    log.close()
    assert log.bad == 1 and not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(MediaError, match="metrics.jsonl: cannot be written"):
        begin(tmp_path)


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("TPU v5 lite", 197), ("TPU v5p", 459), ("TPU v5", 459), ("cpu", None)],
)
def test_peaks_by_the_names_that_jax_gives(kind, tflops):
    assert peaks.peak_tflops(kind) == tflops
