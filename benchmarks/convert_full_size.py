"""Conversion at full size: python benchmarks/convert_full_size.py [--workdir DIR] [--dtype float32] [--json FILE]

Writes random weights in the layout and size of the published sd3.5_medium.safetensors (909 tensors, float16, 4.76 GiB), converts
them, and sends one 576x576 picture through diffusers and through the checkpoint. Needs the extra `parity`, 20 GB of disk,
24 GB of memory, and no network. Prints wall time and peak memory (RssAnon, of every process by itself) and, last, one line of JSON.
"""

import argparse
import datetime
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from convert_weights import rules  # noqa: E402
from convert_weights.export import write_safetensors  # noqa: E402
from svdp_jax.config import Config  # noqa: E402


def random_tensor(generator: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float16 values that keep activations at scale 1 and hide nothing behind zeros or ones."""
    noise = generator.standard_normal(shape, np.float32)
    if "pos_embed" in name:
        return noise.astype(np.float16)
    if len(shape) > 1:
        return (noise / math.sqrt(math.prod(shape[1:]))).astype(np.float16)
    is_norm = ".ln_" in name or ("norm" in name and name.endswith(".weight"))
    return ((1 if is_norm else 0) + 0.1 * noise).astype(np.float16)


def write_source(path: pathlib.Path, config: Config) -> None:
    """A random file in the published layout, tensor by tensor."""
    shapes = {name: shape for name, (shape, _) in rules.expected(config, "original").items()}
    generator = np.random.default_rng(0)
    values = (random_tensor(generator, name, shape) for name, shape in shapes.items())
    write_safetensors(path, {name: (np.dtype(np.float16), shape) for name, shape in shapes.items()}, values, metadata={})


def measured(arguments: list[str]) -> tuple[str, float, dict[str, int]]:
    """(output, seconds, peak RssAnon in bytes by module) of `python -m ...` and the processes it starts."""
    root = pathlib.Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])}
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=subprocess.PIPE, text=True, env=environment)
    peaks: dict[str, int] = {}
    while process.poll() is None:
        for pid in family(process.pid):
            try:
                command = pathlib.Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
            except OSError:  # it has just ended
                continue
            anonymous = next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)
            if "-m" in command:  # a process that is being born has no command yet
                module = command[command.index("-m") + 1]
                peaks[module] = max(peaks.get(module, 0), anonymous)
        time.sleep(0.05)
    output = process.stdout.read()
    print(output, end="", flush=True)
    if process.returncode:
        sys.exit(f"python -m {arguments[0]} ended with status {process.returncode}; peak memory by module: {peaks}")
    return output, time.perf_counter() - start, peaks


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    try:
        children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(member for child in children for member in family(int(child)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, help="on a disk with 20 GB left (default: the system's temporary directory)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the checkpoint")
    parser.add_argument("--json", type=pathlib.Path, help="where the last line goes, too")
    flags = parser.parse_args()
    config = Config()
    with tempfile.TemporaryDirectory(dir=flags.workdir) as scratch:
        source, checkpoint = pathlib.Path(scratch, "sd3.5_medium.safetensors"), pathlib.Path(scratch, "checkpoint")
        write_source(source, config)
        tree = sum(leaf.size * (2 if flags.dtype == "bfloat16" and path[0] == "params" else 4) for path, leaf in rules.target(config).items())
        print(f"source {source.stat().st_size / 2**30:.3f} GiB, output tree {tree / 1e9:.2f} GB ({flags.dtype})")
        _, convert_seconds, convert_peak = measured(["convert_weights", "--input", str(source), "--output", str(checkpoint), "--dtype", flags.dtype])
        report, verify_seconds, verify_peak = measured(["convert_weights.verify", "--checkpoint", str(checkpoint), "--source", str(source)])
    peak = convert_peak["convert_weights"]
    print(f"convert {convert_seconds:.0f} s, peak {peak / 1e9:.2f} GB, {peak / tree:.2f} of the output tree")
    print(f"verify {verify_seconds:.0f} s, peak " + ", ".join(f"{module} {size / 1e9:.2f} GB" for module, size in verify_peak.items()))
    result = {
        "date": datetime.date.today().isoformat(),
        "device": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("jax", "orbax-checkpoint", "torch", "diffusers", "safetensors")},
        "command": "python benchmarks/convert_full_size.py --dtype " + flags.dtype,
        "tree_bytes": tree,
        "convert": {"seconds": round(convert_seconds, 1), "peak_bytes": convert_peak},
        "verify": {"seconds": round(verify_seconds, 1), "peak_bytes": verify_peak, "table": report.splitlines()},
    }
    if flags.json:
        flags.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
