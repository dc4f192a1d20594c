"""What rows teach: which is best and why, what does not fit and what would, what is gathered whole for nothing."""

from __future__ import annotations

from collections import Counter

from svdp_jax.config import ConfigError
from svdp_jax.plan.rows import Row
from svdp_jax.plan.targets import Target
from svdp_jax.sharding import STRATEGIES


def check_strategy(name: str) -> None:
    """ConfigError unless it is a name of a strategy, perhaps with the sizes of its inner axes."""
    base, *sizes = name.split(":")
    inner = [axis for axis in ("context", "tensor") if axis in base]
    if base not in STRATEGIES or len(sizes) > len(inner) or not all(size.isdigit() and int(size) for size in sizes):
        raise ConfigError(f"--strategies {name}: there is {', '.join(STRATEGIES)}; sizes of {' and '.join(inner) or 'inner axes'} may follow, as in fsdp_context:4")


def ranked(rows: list[Row]) -> list[Row]:
    """Those that fit first, the fastest by sample first; then those that do not, the one that lacks least first; then those of which nothing is known."""

    def rank(row: Row) -> tuple[int, float]:
        if row["fits"] is None:
            return (1 if "compile_seconds" in row else 3, row.get("moved", 0) / row["batch"])
        total = row["memory"].get("total") or row["memory"].get("needed") or float("inf")
        return (0, by_sample(row)) if row["fits"] else (2, total)

    return sorted(rows, key=rank)


def by_sample(row: Row) -> float:
    """Seconds of a step for each sample of a device."""
    return row["seconds"]["step"] / row["batch"]


def sent(row: Row) -> dict[tuple[str, ...], int]:
    """Bytes of all collectives, by the axes that they cross."""
    sums: Counter[tuple[str, ...]] = Counter()
    for collective in row["collectives"]:
        sums[tuple(collective["axes"])] += collective["bytes"]
    return dict(sums.most_common())


def told(target: Target, rows: list[Row]) -> list[str]:
    """Sentences about a target's rows, which are ranked."""
    lines = []
    fitting = [row for row in rows if row["fits"]]
    differ = lambda name: len({row[name] for row in rows}) > 1

    def name(row: Row) -> str:
        which = ([f"remat {row['remat']}"] if differ("remat") else []) + ([f"{row['batch']:g} per device"] if differ("batch") else [])
        return row["strategy"] + (" with " + " and ".join(which) if which else "")

    if fitting:
        best, *others = fitting
        seconds, memory = best["seconds"], best["memory"]
        bound = "sending" if seconds["interconnect"] >= seconds["compute"] else "products and memory"
        why = f"the shortest step{' by sample' if differ('batch') else ''} of {len(fitting)} that fit" if others else f"the only one of {len(rows)} that fits"
        lines.append(f"{'Best' if len(rows) > 1 else 'It fits'}: {name(best)}{f', {why}' if len(rows) > 1 else ''}: {seconds['step']:.3f} s, bound by {bound}, {(best['limit'] - memory['total']) / 1e9:.1f} GB to spare.")
    for row in rows:
        if row["fits"] is False:
            total = row["memory"].get("total") or row["memory"].get("needed")
            lack = f"by {(total - target.device.memory * 1e9) / 1e9:.1f} GB" if total and target.device else f"({row['reason'][:200]})"
            change = f"; {name(smallest(row, fitting))} does" if fitting else ""
            lines.append(f"{name(row)} does not fit, {lack}{change}.")
        elif "compile_seconds" not in row:
            lines.append(f"{name(row)}: {row['reason']}")
        lines += [f"{name(row)}: gathered whole on each device, to be laid out anew: {warning}" for warning in row.get("warnings", [])]
    return lines


def smallest(row: Row, fitting: list[Row]) -> Row:
    """Of the rows that fit, the one that differs in least of rematerialisation, batch and strategy, rather in the former; of several the fastest by sample."""

    def change(other: Row) -> tuple[int, bool, bool, float]:
        strategy, batch, remat = (other[name] != row[name] for name in ("strategy", "batch", "remat"))
        return strategy + batch + remat, strategy, batch, by_sample(other)

    return min(fitting, key=change)
