"""A program compiled as far as a plan looks: optimised, scheduled, every array in its place.

XLA writes down what it has by then, where its options say so, and goes on to machine code, which takes most of its time (on TPUs nine tenths) and which
nobody runs here. It cannot be told to stop: what it still does ends with the process.
"""

from __future__ import annotations

import concurrent.futures
import pathlib
import re
import threading
from typing import NamedTuple

import jax

PLACES, REPORT = "after_optimizations-buffer-assignment.txt", "after_optimizations-memory-usage-report.txt"  # written in this order
PROGRAM = "after_optimizations.txt"  # before them, or (jax 0.11) behind them
END = re.compile(r"^ENTRY .*^\}$", re.MULTILINE | re.DOTALL)  # of a program's text
POLL = 0.1  # seconds
ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (.*)$", re.MULTILINE)


class Optimised(NamedTuple):
    """A program of which there need be no machine code."""

    text: str
    arguments: int  # bytes on a device
    temporaries: int  # what it has to have beside them


def optimise(lowered: jax.stages.Lowered, directory: pathlib.Path) -> Optimised:
    """The program, for one of the devices; XLA writes into an empty `directory`. Raises what compiling raises."""
    machine: concurrent.futures.Future[jax.stages.Compiled] = concurrent.futures.Future()

    def compile_whole() -> None:
        try:
            machine.set_result(lowered.compile({"xla_dump_to": str(directory), "xla_dump_hlo_as_text": True}))
        except BaseException as problem:
            machine.set_exception(problem)

    threading.Thread(target=compile_whole, daemon=True).start()
    while not (found := written(directory)):
        try:
            return of_machine_code(machine.result(timeout=POLL))  # of a compiler that writes under other names
        except concurrent.futures.TimeoutError:
            continue
    return found


def written(directory: pathlib.Path) -> Optimised | None:
    """What XLA has written there by now, if that is all of it."""
    for report in directory.glob(f"*{REPORT}"):
        begin = str(report).removesuffix(REPORT)
        program = pathlib.Path(begin + PROGRAM)
        if program.exists() and END.search(text := program.read_text()):
            return Optimised(text, *places(pathlib.Path(begin + PLACES).read_text()))
    return None


def of_machine_code(compiled: jax.stages.Compiled) -> Optimised:
    """The same of a program compiled to its end."""
    memory = compiled.memory_analysis()
    return Optimised(compiled.as_text(), memory.argument_size_in_bytes, memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes)


def places(assignment: str) -> tuple[int, int]:
    """Bytes of arguments and of what else is put into a device's memory, from XLA's account of it. What lies elsewhere has a color; constants, and what is
    local to a thread, are no arrays of the program."""
    arguments = others = 0
    for size, what in ALLOCATION.findall(assignment):
        if "parameter" in what:
            arguments += int(size)
        elif not re.search(r"\bcolor \d|thread-local|constant", what.split("shape is")[0]):
            others += int(size)
    return arguments, others
