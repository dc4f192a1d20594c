"""What a training run says of itself: a line on the terminal, metrics.jsonl, TensorBoard, and pictures.

In: the metrics of each step, one after the other. Out: one record per `train.log_every` steps, means over them:

    step, loss, grad_norm, loss_t/0.0-0.2 ... (by noise level), bad (steps that were skipped), seconds (a step), data_wait (share of the time),
    tflops (of the model, per second and device), mfu (share of the device's peak), memory_gb (peak on the fullest device); what a
    device does not tell is left out.

A run that goes on drops what it had logged behind the step it goes on from.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import imageio.v3 as iio
import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from svdp_jax.files import Place, is_remote, whole, writing
from svdp_jax.peaks import peak_memory, peak_tflops


class Lines:
    """A file of lines, of which those that `keep` says stay, and to which others are added."""

    def __init__(self, path: Place, keep: Callable[[str], bool]):
        self.path = path
        with writing(path):
            lines = path.read_text().splitlines() if path.exists() else []
            self.lines = [line for line in lines if keep(line)]
            if self.lines != lines:
                self._write_all()
            self.file = None if is_remote(path) else path.open("a")

    def add(self, line: str) -> None:
        with writing(self.path):
            if self.file:
                self.file.write(line + "\n")
                self.file.flush()
            else:  # where nothing can be appended
                self.lines.append(line)
                self._write_all()

    def _write_all(self) -> None:
        with whole(self.path) as partial:
            partial.write_text("".join(f"{line}\n" for line in self.lines))

    def close(self) -> None:
        if self.file:
            self.file.close()


class Journal:
    """Writes into `workdir` if this process is the `writer`; the others count along."""

    def __init__(self, workdir: Place, *, every: int, start: int, end: int, pending: Sequence[dict[str, Any]], writer: bool):
        self.workdir, self.every, self.end, self.writer = workdir, every, end, writer
        self.pending = list(pending)
        self.bad = 0  # skipped steps in a row, so far
        self.log = self.board = None
        if writer:
            self.log = Lines(workdir / "metrics.jsonl", keep=lambda line: _step_of(line) <= start)
            with writing(workdir / "tensorboard"):
                self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)
        self._begin()

    def _begin(self) -> None:
        self.waited, self.since, self.steps, self.work = 0.0, time.perf_counter(), 0, 0.0

    def waited_for_data(self, seconds: float) -> None:
        self.waited += seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside is no step's time."""
        begun = time.perf_counter()
        yield
        self.since += time.perf_counter() - begun

    def add(self, step: int, metrics: dict[str, jax.Array], work: float) -> bool:
        """The metrics of step number `step`, counted from 1, and its floating-point operations: waits for that step. Writes a record where one
        is due. Whether a process wants to stop."""
        values = {name: np.asarray(value).tolist() for name, value in jax.device_get(metrics).items()}
        self.bad, stop = values["bad"], values.pop("stop")
        self.pending.append(values)
        self.steps += 1
        self.work += work
        if step % self.every == 0 or step == self.end:
            self._write(self._record(step))
            self.pending = []
            self._begin()
        return bool(stop)

    def picture(self, step: int, picture: np.ndarray) -> None:
        """Samples of the model after a step."""
        if self.writer:
            path = self.workdir / "samples" / f"{step:07d}.png"
            with writing(path):
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(iio.imwrite("<bytes>", picture, extension=".png"))
            self.board.add_image("samples", picture, step, dataformats="HWC")

    def close(self) -> None:
        if self.writer:
            self.log.close()
            self.board.close()

    def _record(self, step: int) -> dict[str, float]:
        seconds = (time.perf_counter() - self.since) / self.steps
        finite = [values for values in self.pending if values["bad"] == 0]
        mean = lambda name: float(np.mean([values[name] for values in finite])) if finite else float("nan")
        sums, samples = (np.sum([values[name] for values in finite], axis=0) for name in ("loss_sums", "samples"))
        parts = np.linspace(0, 1, np.size(samples) + 1)
        record = {"step": step, "loss": mean("loss"), "grad_norm": mean("grad_norm")}
        record |= {f"loss_t/{parts[i]:.1f}-{parts[i + 1]:.1f}": float(sums[i] / samples[i]) for i in np.flatnonzero(samples)}
        record |= {"bad": len(self.pending) - len(finite), "seconds": seconds, "data_wait": self.waited / (seconds * self.steps)}
        record["tflops"] = self.work / self.steps / seconds / jax.device_count() / 1e12
        peak, memory = peak_tflops(jax.devices()[0].device_kind), peak_memory()
        return record | ({"mfu": record["tflops"] / peak} if peak else {}) | ({"memory_gb": memory} if memory else {})

    def _write(self, record: dict[str, float]) -> None:
        if not self.writer:
            return
        self.log.add(json.dumps({name: value for name, value in record.items() if np.isfinite(value)}))
        for name, value in record.items():
            self.board.add_scalar(name if "/" in name else f"train/{name}", value, record["step"])
        said = f"step {record['step']}: loss {record['loss']:.4f}, grad {record['grad_norm']:.2f}, {record['seconds']:.2f} s/step, waiting {record['data_wait']:.0%}"
        said += f", {record['tflops']:.1f} TFLOP/s per device" + (f", MFU {record['mfu']:.1%}" if "mfu" in record else "")
        said += (f", {record['memory_gb']:.1f} GB" if "memory_gb" in record else "") + (f", {record['bad']} skipped" if record["bad"] else "")
        tqdm.write(said)


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; of one that was cut off, later than any."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
