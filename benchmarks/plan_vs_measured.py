"""How far the plan is from the device: memory and seconds of a training step, predicted without it and measured on it.

    python benchmarks/plan_vs_measured.py --target h100x1 [--remat full,attention] [--batch-per-device 1]

Both compile the same step: `svdp_jax.plan` for the target, `benchmarks/train_step.py` for the devices of this machine, which have to be the target's.
Prints a table and, last, one line of JSON. A plan's seconds are a bound: how much longer a step takes is what this is to find out.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from svdp_jax import peaks  # noqa: E402
from svdp_jax.config import Config, load_config  # noqa: E402
from svdp_jax.plan import rows, targets  # noqa: E402


def measured(flags: argparse.Namespace, target: targets.Target, remat: str) -> dict[str, Any]:
    """What benchmarks/train_step.py says, in a process of its own: this one leaves the devices to it."""
    command = [sys.executable, str(ROOT / "benchmarks" / "train_step.py"), "--size", flags.size, "--remat", remat, "--batch", str(flags.batch_per_device * target.count)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"error: benchmarks/train_step.py ended with status {done.returncode} (remat {remat}): what it said stands above")
    found = json.loads(done.stdout.splitlines()[-1])
    count, _, kind = found["device"].partition(" x ")
    if int(count) != target.count or peaks.named(kind) != target.device:
        sys.exit(f"error: --target {target.name} is {target.count} x {target.device.kind if target.device else 'cpu'}, this machine has {found['device']}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--target", required=True, help="what this machine has, as of svdp_jax.plan: h100x1, h100x8, v5e:2x4; cpu:1 to try this script")
    parser.add_argument("--remat", default="full,attention")
    parser.add_argument("--batch-per-device", type=int, default=1)
    parser.add_argument("--size", choices=["full", "small"], default="full", help="as of benchmarks/train_step.py")
    flags = parser.parse_args()
    target = targets.parse(flags.target)
    targets.check_installed(target)
    config = Config() if flags.size == "full" else load_config(ROOT / "configs" / "demo.py")
    results = []
    print(f"{'':12}{'GB planned':>12}{'measured':>12}{'ratio':>8}{'s planned':>12}{'measured':>12}{'ratio':>8}")
    for remat in flags.remat.split(","):
        ((row, _),) = rows.fill([rows.Request(config, target, "dp", "train", flags.batch_per_device, remat)], limits=rows.Limits())
        if "reason" in row:
            sys.exit(f"error: the plan for {remat}: {row['reason']}")
        found = measured(flags, target, remat)
        pairs = (row["memory"]["total"] / 1e9, found["peak_memory_gb"]), (row["seconds"].get("step"), found["seconds_per_step"])
        cells = [part for planned, seen in pairs for part in (planned, seen, seen / planned if planned and seen else None)]
        print(f"{remat:12}" + "".join(f"{'-' if cell is None else format(cell, '.3f'):>{width}}" for cell, width in zip(cells, (12, 12, 8) * 2, strict=True)))
        results.append({"remat": remat, "planned": {name: row[name] for name in ("memory", "seconds", "flops", "mfu")}, "measured": found})
    print(json.dumps({"target": target.name, "batch_per_device": flags.batch_per_device, "rows": results}))


if __name__ == "__main__":
    main()
