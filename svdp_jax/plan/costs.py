"""What a compiled program costs on a device: operations, bytes, collectives, and the seconds these need at least.

Seconds are a roofline's. Each operation takes as long as its products at the matrix units' peak or its bytes at the memory's, whichever is longer;
operations follow each other. Collectives run beside them, each at the speed of the network it crosses; a step takes as long as the longer of the two.
A real step takes longer: `benchmarks/` measure it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

from svdp_jax.peaks import Device
from svdp_jax.plan import hlo


class Collective(NamedTuple):
    """All collectives of a step of one kind, over the same axes, of the same type."""

    kind: str
    axes: tuple[str, ...]  # of the mesh
    devices: int  # that take part in one
    dtype: str
    bytes: int  # whole: what is reduced, or what has been gathered; on a device
    times: int


class Costs(NamedTuple):
    """Of one device and one step."""

    flops: float  # of products, recomputed ones, too
    moved: int  # bytes read and written
    collectives: list[Collective]
    seconds: dict[str, float]  # compute: operations one after the other; matrix and memory: each alone; interconnect; step. Empty for devices that are not real


def of(text: str, mesh: dict[str, int], device: Device | None, *, groups: int = 1) -> Costs:
    """The costs of a program's text on a mesh whose `data` axis crosses `groups` slices or hosts."""
    module, chains = hlo.Module(text), set()
    flops, moved, seconds, found = 0.0, 0, 0.0, defaultdict(lambda: [0, 0])
    for computation, op, times in module.walk():
        sent = [part for part in module.inside(computation, op) if part[1].collective]
        for where, part in sent:
            if part.chain:  # begun in one operation, and still there in others
                if (computation, part.chain) in chains:
                    continue
                chains.add((computation, part.chain))
            kind = _kind(part, where)
            axes, devices = (("data",), groups) if part.between_slices else hlo.axes_of(part, mesh)  # of which only `data` leaves a slice
            arrays = [array for arrays in module.operands(where, part) for array in arrays]
            for dtype in {array.dtype for array in arrays}:  # one may take arrays of several
                entry = found[kind, axes, devices, dtype]
                entry[0] += sum(array.bytes for array in arrays if array.dtype == dtype) * (devices if kind == "all-gather" else 1) * times
                entry[1] += times
        work = module.flops(computation, op)
        bytes_ = module.moved(computation, op) if work or not sent else 0
        flops, moved = flops + work * times, moved + bytes_ * times
        if device:
            seconds += times * max(work / (device.tflops * 1e12), bytes_ / (device.bandwidth * 1e9))
    collectives = [Collective(*key, *value) for key, value in sorted(found.items(), key=lambda item: -item[1][0]) if key[2] > 1]
    if not device:
        return Costs(flops, moved, collectives, {})
    sending = sum(_seconds(collective, device, groups) for collective in collectives)
    took = {"compute": seconds, "matrix": flops / (device.tflops * 1e12), "memory": moved / (device.bandwidth * 1e9), "interconnect": sending}
    return Costs(flops, moved, collectives, took | {"step": max(seconds, sending)})


def _kind(op: hlo.Op, computation: str) -> str:
    """On TPUs a reduction of which each device keeps its share is a fusion around an all-reduce."""
    return "reduce-scatter" if op.collective == "all-reduce" and "all-reduce-scatter" in computation else op.collective or ""


def _seconds(collective: Collective, device: Device, groups: int) -> float:
    """As a ring, or each with each: what a device sends, at the speed of the slowest network on the way."""
    shares = (collective.devices - 1) / collective.devices
    sent = collective.bytes * {"all-reduce": 2 * shares, "collective-permute": 1.0, "collective-broadcast": 1.0}.get(collective.kind, shares)
    if groups > 1 and "data" in collective.axes:  # within a group first; between groups each device has its share of the rest
        inner = collective.devices // groups
        return sent / inner / (device.network * 1e9) + (sent / (device.link * 1e9) if inner > 1 else 0.0)
    return sent / (device.link * 1e9)


def summary(costs: Costs) -> dict[str, Any]:
    """As JSON has it."""
    return costs._asdict() | {"collectives": [collective._asdict() for collective in costs.collectives]}
