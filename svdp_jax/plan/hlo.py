"""What a compiled program does, read from its text: operations, how often each runs, what it moves, what it computes, what it sends.

    text of jax.stages.Compiled  ->  Module;  module.walk()  ->  (Op, times) of all that is scheduled

Bodies of loops count as often as they run, where the text or the loop's condition says so, else once. What is fused is one operation.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}  # others end in their number of bits
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_OP = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_ON_CHIP = re.compile(r":T\(.*S\([^05]\)")  # of layouts as TPUs have them: 0 is the device's memory, 5 the host's
_FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "opt-barrier", "partition-id", "replica-id")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast")


class Array(NamedTuple):
    """Type and shape of a value, or of a part of one."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool = False  # in a TPU's fast memory, not in the device's

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        bits = _BITS.get(self.dtype) or int(re.search(r"\d+", self.dtype)[0])
        return self.size * bits // 8

    @property
    def traffic(self) -> int:
        """Bytes that reading or writing it takes of the device's memory."""
        return 0 if self.on_chip else self.bytes


class Op(NamedTuple):
    """An instruction of a computation."""

    name: str
    kind: str  # its opcode
    results: tuple[Array, ...]
    operands: tuple[str, ...]  # names
    text: str  # what stands behind its operands
    root: bool

    def attribute(self, name: str) -> str | None:
        """The computation that an attribute names."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.text)
        return found[1] if found else None

    @property
    def chain(self) -> str | None:
        """The name of a collective that goes on while others compute: on TPUs it stands in each of these fusions, as in the one that begins it."""
        found = re.search(r'channel_id=(\d+).*chain_id="(\d+)"', self.text)
        return f"{found[1]} {found[2]}" if found else None

    @property
    def between_slices(self) -> bool:
        """Whether it sends something to other TPU slices."""
        return self.kind == "send" and "_xla_megascale_transfer_type" in self.text

    @property
    def collective(self) -> str | None:
        """Which kind of collective it is, or begins; between TPU slices they are what a host is sent."""
        if self.between_slices:
            kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', self.text)[1].lower().replace("_", "-")
            return "collective-permute" if kind == "one-to-one" else kind
        kind = self.kind.removesuffix("-start")
        return kind if kind in COLLECTIVES else None


class Module:
    """The computations of a program by name, each a list of operations in order, and which of them it begins with."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Op]] = {}
        self.entry = ""
        current: list[Op] = []
        types_of: dict[str, str] = {}
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current, types_of = [], {}
                self.computations[header[2]] = current
                if header[1]:
                    self.entry = header[2]
            elif match := _OP.match(line):
                root, name, types, kind, rest = match.groups()
                inside, behind = _operands(rest)
                operands = tuple(re.findall(r"%([\w.\-#]+)", inside))
                types_of[name] = types
                for part in operands:
                    if "#" in part and part not in types_of:  # an element of a tuple, as the text of jax 0.11 has it: without an operation of its own
                        whole, _, index = part.rpartition("#")
                        types_of[part] = _element(types_of[whole], int(index))
                        current.append(Op(part, "get-tuple-element", _arrays(types_of[part]), (whole,), f", index={index}", False))
                current.append(Op(name, kind, _arrays(types), operands, inside + ")" + behind if kind in ("parameter", "constant") else behind, bool(root)))
        if not self.entry:
            raise ValueError("this is no text of a compiled program: nothing is marked ENTRY")
        self._values = {name: {op.name: op for op in ops} for name, ops in self.computations.items()}

    def operands(self, computation: str, op: Op) -> list[tuple[Array, ...]]:
        """What goes into an operation."""
        values = self._values[computation]
        return [values[name].results for name in op.operands if name in values]

    def walk(self, computation: str | None = None, times: int = 1) -> Iterator[tuple[str, Op, int]]:
        """(computation, operation, how often it runs) of all that is scheduled: inside loops and branches, not inside fusions."""
        name = computation or self.entry
        for op in self.computations[name]:
            if op.kind == "while":
                yield from self.walk(op.attribute("body"), times * self._trips(name, op))
            elif op.kind == "call":
                yield from self.walk(op.attribute("to_apply"), times)
            elif op.kind == "conditional":
                for branch in _branches(op):
                    yield from self.walk(branch, times)
            elif op.kind not in _FREE and not op.kind.endswith(("-done", "-update")):
                yield name, op, times

    def inside(self, computation: str, op: Op) -> Iterator[tuple[str, Op]]:
        """The operation, or, where it is a fusion or what runs beside others, what it is made of, with the computation it stands in."""
        if called := op.attribute("calls"):
            for part in self.computations[called]:
                yield from self.inside(called, part)
        else:
            yield computation, op

    def _trips(self, computation: str, loop: Op) -> int:
        """How often a loop runs: as the text says, or from where it begins to the only number in its condition; 1 where that is not to be known."""
        if known := re.search(r'known_trip_count"?:\s*\{"?n"?:"?(\d+)', loop.text):
            return int(known[1])
        condition = list(self._all_of(loop.attribute("condition")))
        counts = [int(found[1]) for _, op in condition if op.kind == "constant" and (found := re.match(r"(\d+)\)", op.text))]
        if len(counts) != 1:
            return 1
        place = next((int(found[1]) for _, op in condition if op.kind == "get-tuple-element" and (found := re.search(r"index=(\d+)", op.text))), 0)
        return counts[0] - self._begin(computation, loop, place)

    def _begin(self, computation: str, loop: Op, place: int) -> int:
        """The constant that a loop begins with in this place of what it takes (not 0 where its first turn was taken out of it); 0 where it is none."""
        values = self._values[computation]
        op = values.get(loop.operands[0])
        name = op.operands[place] if op and op.kind == "tuple" else ""
        while (op := values.get(name)) and op.kind in ("copy", "copy-start", "copy-done", "bitcast"):
            name = op.operands[0]
        found = re.match(r"(\d+)\)", op.text) if op and op.kind == "constant" else None
        return int(found[1]) if found else 0

    def _all_of(self, computation: str | None) -> Iterator[tuple[str, Op]]:
        for op in self.computations.get(computation or "", []):
            yield from self.inside(computation, op)

    def moved(self, computation: str, op: Op) -> int:
        """Bytes that a scheduled operation reads and writes, each of its arrays once; of an array of which a fusion needs a slice, the slice."""
        if op.kind.removesuffix("-start") in ("slice", "dynamic-slice"):
            part, whole = op.results[op.kind.endswith("-start")], self.operands(computation, op)[0][0]
            return part.traffic + (0 if whole.on_chip else part.bytes)
        if op.kind == "dynamic-update-slice":
            part, whole = self.operands(computation, op)[1][0], op.results[0]
            return part.traffic + (0 if whole.on_chip else part.bytes)
        results, operands = self._passed_on(op)
        written = sum(array.traffic for place, array in enumerate(op.results) if place not in results)
        read = [sum(array.traffic for array in arrays) * (number not in operands) for number, arrays in enumerate(self.operands(computation, op))]
        if op.kind.endswith("-start"):  # whose results name its operands again
            written -= sum(read)
        if called := op.attribute("calls") if op.kind == "fusion" else None:
            shares = self._shares(called)
            read = [size * shares.get(number, 1.0) for number, size in enumerate(read)]
            last = self.computations[called][-1]
            if last.kind == "dynamic-update-slice":  # in place
                written = min(written, sum(array.bytes for array in self.operands(called, last)[1]))
        return int(sum(read) + written)

    def _passed_on(self, op: Op) -> tuple[set[int], set[int]]:
        """Which results and which operands belong to a collective that goes on beside what an operation does: its results lie where its operands do."""
        called = self.computations.get(op.attribute("calls") or "", [])
        aliases = re.search(r"output_to_operand_aliasing=\{((?:\{\d*\}: \(\d+, \{\d*\}\)(?:, )?)+)\}", op.text)
        if not aliases or not any(part.chain for part in called):
            return set(), set()
        places = re.findall(r"\{(\d*)\}: \((\d+),", aliases[1])
        return {int(result or 0) for result, _ in places}, {int(operand) for _, operand in places}

    @functools.cache  # noqa: B019  a module lives as long as its program is looked at
    def _shares(self, computation: str) -> dict[int, float]:
        """Of each parameter of a fused computation, by number, how much of it is needed."""
        ops, values, needed = self.computations[computation], self._values[computation], Counter()
        for op in reversed(ops):
            share = 1.0 if op.root else min(1.0, needed[op.name])
            for place, name in enumerate(op.operands):
                if name not in values:
                    continue
                part = share
                if place == 0 and op.kind in ("slice", "dynamic-slice"):
                    part = share * op.results[0].size / max(1, values[name].results[0].size)
                elif place == 0 and op.kind == "dynamic-update-slice":
                    part = 0.0
                needed[name] += part
        return {int(re.match(r"\d+", op.text)[0]): min(1.0, needed[op.name]) for op in ops if op.kind == "parameter"}

    def flops(self, computation: str, op: Op) -> float:
        """Of the products in a scheduled operation: two for a multiplication with its addition. Kernels that XLA does not see into by formula."""
        return sum(self._product(where, part) for where, part in self.inside(computation, op))

    def _product(self, computation: str, op: Op) -> float:
        if op.kind not in ("dot", "convolution", "custom-call"):
            return 0.0
        operands, result = [arrays[0] for arrays in self.operands(computation, op) if arrays], op.results[0]
        if op.kind == "dot":
            return _dot(result, operands[0], _numbers(op.text, r"lhs_contracting_dims=\{([\d,]*)\}"))
        if "dim_labels=" in op.text:
            return _convolution(result, *operands[:2], op.text)
        if "__cublas" in op.text:
            return _dot(result, operands[0], [int(n) for n in re.findall(r'"(\d+)"', re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', op.text)[1])])
        if "mosaic_gpu" in op.text:  # models/hopper.py
            return _attention(operands, backward=False, heads_last=True)
        if "fmha" in op.text:
            return _attention(operands, backward="Backward" in op.text, heads_last=True)
        if "splash_mha" in op.text or "splash_mha" in op.name:
            kind = re.search(r"splash_mha_(\w+)", op.text + op.name)[1]
            big = [array for array in operands if len(array.shape) >= 3 and array.dtype in ("bf16", "f16", "f32")]
            return _attention(big, backward=False, heads_last=False) * {"fwd": 1.0, "dq": 1.5, "dkv": 2.0}.get(re.match(r"fwd|dq|dkv", kind)[0], 1.0)
        return 0.0


def axes_of(op: Op, mesh: dict[str, int]) -> tuple[tuple[str, ...], int]:
    """Which axes of the mesh a collective crosses, and how many devices of a group take part. Devices are numbered as they stand in the mesh."""
    count = math.prod(mesh.values())
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", op.text):
        groups = [list(map(int, pair)) for pair in re.findall(r"(\d+),(\d+)", pairs[1])]
    else:
        groups = _groups(op.text, count)
    coordinates = np.stack(np.unravel_index(np.arange(count), list(mesh.values())), axis=-1)
    crossed = {axis for group in groups for axis in np.flatnonzero((coordinates[group] != coordinates[group[0]]).any(axis=0))}
    return tuple(axis for number, axis in enumerate(mesh) if number in crossed), max(len(group) for group in groups)


def _groups(text: str, count: int) -> list[list[int]]:
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(iota[2], iota[3]).reshape([int(n) for n in iota[1].split(",")]).tolist()
    if listed := re.search(r"replica_groups=\{\{(.*?)\}\}", text):
        return [[int(n) for n in group.split(",")] for group in listed[1].split("},{")]
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", text):  # axes of the compiler's own mesh
        sizes, crossed = {name: int(size) for name, size in re.findall(r"('\w+')=(\d+)", named[1])}, named[4].split(",")
        if math.prod(sizes.values()) == count and set(crossed) <= set(sizes):
            ids = _iota(named[2] or str(count), named[3]).reshape(list(sizes.values()))
            kept, moved = [place for place, name in enumerate(sizes) if name not in crossed], [list(sizes).index(name) for name in crossed]
            return ids.transpose(kept + moved).reshape(-1, math.prod(sizes[name] for name in crossed)).tolist()
    if "replica_groups={}" in text or "replica_groups" not in text:
        return [list(range(count))]
    raise ValueError(f"groups of devices in a form that is not known here: {text[text.index('replica_groups') :][:120]}")


def _iota(shape: str, order: str | None) -> np.ndarray:
    """0, 1, 2, .. in this shape, its axes in this order."""
    sizes = [int(n) for n in shape.split(",")]
    return np.arange(math.prod(sizes)).reshape(sizes).transpose([int(n) for n in order.split(",")] if order else None)


def _element(types: str, index: int) -> str:
    """The type of an element of a tuple."""
    depth, parts = 0, [""]
    for character in types.strip()[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts[index]


def _operands(rest: str) -> tuple[str, str]:
    """What stands in an operation's brackets, and what behind them."""
    depth = 1
    for place, letter in enumerate(rest):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0:
            return rest[:place], rest[place + 1 :]
    return rest, ""


def _arrays(types: str) -> tuple[Array, ...]:
    found = [match for match in _SHAPE.findall(types) if match[0] != "token"]
    return tuple(Array(dtype, tuple(int(n) for n in shape.split(",") if n), bool(_ON_CHIP.search(layout))) for dtype, shape, layout in found)


def _branches(op: Op) -> list[str]:
    if listed := re.search(r"branch_computations=\{([^}]*)\}", op.text):
        return [name.strip().lstrip("%") for name in listed[1].split(",")]
    return [name for attribute in ("true_computation", "false_computation") if (name := op.attribute(attribute))]


def _numbers(text: str, pattern: str) -> list[int]:
    found = re.search(pattern, text)
    return [int(n) for n in found[1].split(",") if n] if found else []


def _dot(result: Array, left: Array, contracted: list[int]) -> float:
    return 2.0 * result.size * math.prod(left.shape[axis] for axis in contracted)


def _attention(operands: list[Array], *, backward: bool, heads_last: bool) -> float:
    """Two products of queries, keys and heads; five in the backward pass. [B, S, N, H], or [.., N, S, H]."""
    q, k = operands[0].shape, operands[1].shape
    if heads_last:
        batch, queries, heads, size = q
        return 4.0 * batch * heads * queries * k[1] * size * (2.5 if backward else 1)
    *lead, queries, size = q
    return 4.0 * math.prod(lead) * queries * k[-2] * size


def _convolution(result: Array, left: Array, right: Array, text: str) -> float:
    """Products of which neither side is padding. On a TPU products of matrices are written as convolutions, and their batches as windows."""
    lefts, rights, outs = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text).groups()
    window = re.search(r"window=\{([^}]*)\}", text)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sorted(letter for letter in lefts if letter.isdigit())
    each = lambda name, default: fields[name].split("x") if name in fields else [default] * len(spatial)
    products = 2.0 * result.shape[outs.index("b")] * result.shape[outs.index("f")] * right.shape[rights.index("i")]
    rows = zip(spatial, each("size", "1"), each("stride", "1"), each("pad", "0_0"), each("lhs_dilate", "1"), each("rhs_dilate", "1"), strict=True)
    for letter, size, stride, pad, left_dilate, right_dilate in rows:
        length, out = left.shape[lefts.index(letter)], result.shape[outs.index(letter)]
        at = np.arange(out)[:, None] * int(stride) - int(pad.split("_")[0]) + np.arange(int(size)) * int(right_dilate)
        products *= int(((at >= 0) & (at <= (length - 1) * int(left_dilate)) & (at % int(left_dilate) == 0)).sum())
    return products
