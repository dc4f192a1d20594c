"""One compilation in a process of its own: a request as JSON on standard input, its row as JSON on the last line of output.

    python -m svdp_jax.plan.child DIR < request.json

DIR is empty, and the compiler's.
"""

from __future__ import annotations

import gc
import json
import os
import pathlib
import re
import sys
import time
from typing import Any

import jax

from svdp_jax.config import Config, ConfigError, from_dict
from svdp_jax.files import one_line
from svdp_jax.plan import cache, compiler, costs, programs, targets

NEEDS = re.compile(r"(?:total memory required|Used) .*?([\d.]+)([GM])")


def main(request: dict[str, Any], scratch: pathlib.Path) -> dict[str, Any]:
    """The row of a request: {config, directory, target, strategy, program, batch, remat}. What cannot be compiled is a row with `reason`; `known` says that
    the directory has the same program's row. What the compiler writes is left in `scratch`."""
    target = targets.parse(request["target"])
    names = ("program", "batch", "remat")
    row = {name: request[name] for name in ("target", "strategy", *names)}
    try:
        devices = targets.devices(target)
        given = {name: request[name] for name in names}
        config = programs.config_for(from_dict(Config, request["config"]), request["strategy"], count=target.count, groups=target.groups, **given)
        begun = time.perf_counter()
        program = programs.LOWER[request["program"]](config, devices, target.platform)
        row |= {"mesh": program.mesh, "lower_seconds": time.perf_counter() - begun, "lowered": cache.of_program(program.lowered.as_text(), target.name, *program[1:])}
        if found := cache.read(pathlib.Path(request["directory"]), row["lowered"]):
            return found | row | {"known": True}
        begun = time.perf_counter()
        compiled = compiler.optimise(program.lowered, scratch)
    except (ConfigError, ValueError, NotImplementedError) as problem:
        return row | {"fits": None, "reason": one_line(problem)}
    except Exception as problem:
        said = one_line(problem)
        if isinstance(problem, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in said:
            return row | {"fits": False, "reason": said[:500], "memory": {"needed": _needed(said)}}
        return row | {"fits": None, "reason": f"{type(problem).__name__}: {said}"[:500], "ended": True}  # of this machine, which may do better another time
    return row | {"compile_seconds": time.perf_counter() - begun} | _read(compiled, program, target)


def _read(compiled: compiler.Optimised, program: programs.Program, target: targets.Target) -> dict[str, Any]:
    """What a compiled program says of memory and costs; where the device is a real one, whether it fits, and the MFU at most."""
    asked, total = program.flops / target.count, compiled.arguments + compiled.temporaries
    found = costs.of(compiled.text, program.mesh or {"data": 1}, target.device, groups=target.groups)
    held = program.held | {"temporaries": compiled.temporaries, "arguments": compiled.arguments, "total": total}
    if target.platform == "tpu":  # which holds whole tiles
        held["padding"] = compiled.arguments - sum(program.held.values())
    row = {"memory": held, "model_flops": asked, "limit": None, "fits": None, "mfu": None, **costs.summary(found)}
    if target.device:
        limit = target.device.memory * 1e9
        row |= {"limit": limit, "fits": total <= limit, "mfu": asked / (target.device.tflops * 1e12) / found.seconds["step"]}
    return row


def _needed(said: str) -> float | None:
    """Bytes that a compiler says are needed in all."""
    found = NEEDS.search(said)
    return float(found[1]) * {"G": 2**30, "M": 2**20}[found[2]] if found else None


if __name__ == "__main__":
    gc.disable()  # a process that ends soon; looking through what tracing has made takes seconds
    print(json.dumps(main(json.load(sys.stdin), pathlib.Path(sys.argv[1]))), flush=True)
    os._exit(0)  # the compiler may still be at work
