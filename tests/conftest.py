"""Shared by the tests of the command lines and of checkpoints: a rendered dataset, and one run of configs/tiny.py on it."""

import json
import os
import pathlib
import subprocess
import sys

# Most of a test's time is compilation, and what is compiled runs once: a quick compiler takes half as long.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # for subprocesses, too

import jax  # noqa: E402
import pytest  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # train.py and sample.py stand beside the package

from jaxtyping import install_import_hook  # noqa: E402

# Shapes and types, as annotated, are checked at every call. Not in the config, which says itself what is wrong with a value,
# nor in the loader, whose functions travel to worker processes, nor in sharding, where tests put other things for devices.
TOP = ["checkpoint", "evaluation", "flow", "models", "pipeline", "rendering", "sampler", "train_state"]
DATA = ["augment", "bundle", "clips", "detectors", "drawing", "encoding", "errors", "faces", "inputs", "liveportrait", "polygons", "preview", "report"]
DATA += ["shots", "stills", "streams", "synthetic", "timing", "video"]
install_import_hook([f"svdp_jax.{name}" for name in TOP] + [f"svdp_jax.data.{name}" for name in DATA], "typechecker.check")

import sd35  # noqa: E402

from svdp_jax.data import clips, synthetic  # noqa: E402

CHEAP = ["--sample.steps", "2", "--sample.guidance", "1", "1", "1"]  # one pass per step: less to compile


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> pathlib.Path:
    """Six pairs to train on and two to validate with, 12 frames of 32 pixels."""
    directory = tmp_path_factory.mktemp("dataset")
    for split, count in ("train", 6), ("validation", 2):
        pairs = (synthetic.pair(split, index, frames=12, size=32) for index in range(count))
        clips.write_clips(pairs, directory, split=split, shard=0, shards=1)
    clips.finish(directory)
    return directory


@pytest.fixture(scope="session")
def train_tiny(dataset, tmp_path_factory):
    """Calls train.py in this process: train_tiny(workdir, *flags). What one call has compiled, the next one finds."""
    import train

    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    def call(workdir: pathlib.Path, *flags: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            given = ["--config", str(ROOT / "configs" / "tiny.py"), "--workdir", str(workdir), "--data.path", str(dataset)]
            patch.setattr(sys, "argv", ["train.py", *given, *CHEAP, *flags])
            train.main(*train.parse())

    yield call
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="session")
def workdir(train_tiny, tmp_path_factory) -> pathlib.Path:
    """A finished run: 8 steps, the last four with history."""
    directory = tmp_path_factory.mktemp("runs") / "straight"
    train_tiny(directory)
    return directory


@pytest.fixture(scope="session")
def sd35_file(tmp_path_factory) -> pathlib.Path:
    """A small random model in the layout of Stable Diffusion 3.5's single file."""
    return sd35.write_source(tmp_path_factory.mktemp("sd35") / "sd3.5_small.safetensors")


@pytest.fixture(scope="session")
def sd35_folder(sd35_file) -> pathlib.Path:
    """The same model as a diffusers folder."""
    return sd35.write_folder(sd35_file.parent / "folder", sd35_file)


@pytest.fixture
def python():
    """Runs python in a process of its own: python(*arguments, **environment) -> CompletedProcess."""

    def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"} | environment
        return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=variables, cwd=ROOT)

    return call


@pytest.fixture(scope="session")
def eight_devices(tmp_path_factory) -> dict:
    """What tests/eight_devices.py has found out."""
    flags = "--xla_force_host_platform_device_count=8"
    variables = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    script = [sys.executable, str(ROOT / "tests" / "eight_devices.py"), str(tmp_path_factory.mktemp("eight"))]
    result = subprocess.run(script, capture_output=True, text=True, env=variables, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What needs eight devices is slow: on two cores, eight virtual devices compile and run for minutes."""
    for item in items:
        if "eight_devices" in item.fixturenames:
            item.add_marker(pytest.mark.slow)
