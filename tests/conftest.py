"""Shared by the tests of the command lines and of checkpoints: a rendered dataset, and one run of configs/tiny.py on it."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # train.py and sample.py stand beside the package

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


@pytest.fixture
def python():
    """Runs python in a process of its own: python(*arguments, **environment) -> CompletedProcess."""

    def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"} | environment
        return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=variables, cwd=ROOT)

    return call
