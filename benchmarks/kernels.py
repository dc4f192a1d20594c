"""Device time by kernel: a call is traced with JAX's profiler, and what ran on the device is read back from the trace. Needs jax alone.

The trace, `NAME.xplane.pb`, opens in XProf (`pip install xprof`; `xprof --logdir FOLDER`).
"""

from __future__ import annotations

import collections
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

# By the names of kernels: the first that fits. What is left is XLA's own: fusions.
KINDS = {
    "attention": re.compile(r"fmha|flash|sdpa|mha|attention", re.IGNORECASE),
    "products": re.compile(r"gemm|cutlass|nvjet|cublas|xmma|matmul", re.IGNORECASE),
    "copies": re.compile(r"^mem(cpy|set)|copy", re.IGNORECASE),
}


class Kernel(NamedTuple):
    """One name's share of a trace."""

    name: str
    kind: str
    times: int
    milliseconds: float


def traced(call: Callable[[], Any], folder: pathlib.Path, name: str) -> pathlib.Path:
    """Traces a call, which returns arrays, into folder/name.xplane.pb."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level, options.host_tracer_level = 0, 1
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:  # where the profiler makes folders within folders
        with jax.profiler.trace(scratch, profiler_options=options):
            jax.block_until_ready(call())
        return pathlib.Path(shutil.copy(next(pathlib.Path(scratch).rglob("*.xplane.pb")), folder / f"{name}.xplane.pb"))


def read_kernels(path: pathlib.Path) -> tuple[list[Kernel], float]:
    """What ran on the device, longest first, and milliseconds from the first kernel's start to the last one's end. Nothing, if the trace has no GPU."""
    planes = [plane for plane in jax.profiler.ProfileData.from_file(str(path)).planes if plane.name.startswith("/device:GPU")]
    events = [event for plane in planes for line in plane.lines if line.name.startswith("Stream") for event in line.events]
    spent = collections.defaultdict(list)
    for event in events:
        spent[event.name].append(event.duration_ns / 1e6)
    kernels = [Kernel(name, kind_of(name), len(taken), sum(taken)) for name, taken in spent.items()]
    span = max(event.start_ns + event.duration_ns for event in events) - min(event.start_ns for event in events) if events else 0
    return sorted(kernels, key=lambda kernel: -kernel.milliseconds), span / 1e6


def kind_of(name: str) -> str:
    """Of a kernel with this name."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(name)), "fusions")


def by_kind(kernels: list[Kernel]) -> dict[str, float]:
    """Milliseconds of each kind."""
    return {kind: sum(kernel.milliseconds for kernel in kernels if kernel.kind == kind) for kind in (*KINDS, "fusions")}


def table(kernels: list[Kernel], span: float, *, rows: int = 25) -> str:
    """The longest kernels, and the sum of each kind."""
    if not kernels:
        return "the trace has no kernels of a GPU"
    kinds = by_kind(kernels)
    lines = [f"{kernel.milliseconds:9.2f} ms {kernel.times:6} x  {kernel.kind:<9}  {kernel.name[:90]}" for kernel in kernels[:rows]]
    busy = ", ".join(f"{kind} {milliseconds:.1f} ms" for kind, milliseconds in kinds.items())
    return "\n".join([*lines, f"kernels {sum(kinds.values()):.1f} ms of {span:.1f}: {busy}"])
