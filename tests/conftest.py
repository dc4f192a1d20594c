"""Shared by the tests of the command lines and of checkpoints: a rendered dataset, and one run of configs/tiny.py on it."""

import json
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
import warnings
from fractions import Fraction

# Most of a test's time is compilation, and what is compiled runs once: a quick compiler takes a sixth of the time, and all
# processes share what they have compiled. Subprocesses, too.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="compiled-")  # for as long as the process that starts the others lives
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name

import imageio.v3 as iio  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # train.py and sample.py stand beside the package

from jaxtyping import install_import_hook  # noqa: E402

# Shapes and types, as annotated, are checked at every call. Not in the config, which says itself what is wrong with a value,
# nor in the loader, whose functions travel to worker processes, nor in sharding, where tests put other things for devices.
TOP = ["checkpoint", "evaluation", "files", "flow", "jobs", "journal", "models", "pipeline", "rendering", "sampler", "steps", "train_state"]
DATA = ["augment", "bundle", "clips", "detectors", "drawing", "encoding", "faces", "inputs", "liveportrait", "polygons", "preview", "report"]
DATA += ["shots", "stills", "streams", "synthetic", "timing", "video"]
install_import_hook([f"svdp_jax.{name}" for name in TOP] + [f"svdp_jax.data.{name}" for name in DATA], "typechecker.check")

import sd35  # noqa: E402
from prepared import straight, videos  # noqa: E402, F401  fixtures

from svdp_jax import checkpoint  # noqa: E402
from svdp_jax.data import clips, detectors, synthetic, video  # noqa: E402

FRAMES, FPS = 6, Fraction(30000, 1001)  # of the driving video: two windows of 4, the second not full
LONG = ["test_sample_cli", "test_train_state", "test_train_cli", "test_sampler", "test_transformer", "test_interruptions", "test_learning", "test_sharding", "test_convert_live", "test_convert"]
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
def train_tiny(dataset):
    """Calls train.py in this process: train_tiny(workdir, *flags)."""
    import train

    def call(workdir: pathlib.Path, *flags: str) -> int:
        with pytest.MonkeyPatch.context() as patch:
            given = ["--config", str(ROOT / "configs" / "tiny.py"), "--workdir", str(workdir), "--data.path", str(dataset)]
            patch.setattr(sys, "argv", ["train.py", *given, *CHEAP, *flags])
            return train.main(*train.parse())

    return call


@pytest.fixture(scope="session")
def workdir(train_tiny, tmp_path_factory) -> pathlib.Path:
    """A finished run: 8 steps, the last four with history."""
    directory = tmp_path_factory.mktemp("runs") / "straight"
    train_tiny(directory)
    return directory


@pytest.fixture(scope="session")
def media(tmp_path_factory):
    """portrait.png and motion.mp4, each with its landmarks."""
    folder = tmp_path_factory.mktemp("media")
    write_pair(folder, synthetic.pair("validation", 1, frames=FRAMES, size=48), fps=FPS)
    return folder


def write_pair(folder: pathlib.Path, clip: clips.Clip, *, fps: Fraction) -> None:
    """portrait.png and motion.mp4 of the two people of a clip, with their landmarks beside them."""
    iio.imwrite(folder / "portrait.png", clip.target[0])
    detectors.write_landmarks(folder / "portrait.npz", clip.target_landmarks[:1])
    video.write_video(folder / "motion.mp4", clip.driver, fps=fps, metadata={})
    detectors.write_landmarks(folder / "motion.npz", clip.driver_landmarks)


def saved_state(workdir, step):
    """What a workdir holds of a step, as arrays."""
    found = [checkpoint.load_tree(workdir / "checkpoints" / str(step) / part) for part in ("state", "ema")]
    return found[0] | {"ema": found[1]}


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs a script as `python NAME FLAGS` would: (exit status, output, errors)."""

    def call(name, *flags):
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        status = 0
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as end:
            status = end.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def sd35_file(tmp_path_factory) -> pathlib.Path:
    """A small random model in the layout of Stable Diffusion 3.5's single file."""
    return sd35.write_source(tmp_path_factory.mktemp("sd35") / "sd3.5_small.safetensors")


@pytest.fixture(scope="session")
def sd35_folder(sd35_file) -> pathlib.Path:
    """The same model as a diffusers folder."""
    return sd35.write_folder(sd35_file.parent / "folder", sd35_file)


@pytest.fixture
def torch():
    """PyTorch, seeded; what asks for it is skipped where it is not installed."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    return torch


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def strict():
    """No warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def python():
    """Runs python in a process of its own: python(*arguments, **environment) -> CompletedProcess."""

    def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"} | environment
        return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=variables, cwd=ROOT)

    return call


HITS = """
import json, runpy, sys
import jax
counts = {"hits": 0, "misses": 0}
def note(event, **_):
    for name in counts:
        counts[name] += event == f"/jax/compilation_cache/cache_{name}"
jax.monitoring.register_event_listener(note)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
print(json.dumps(counts))
"""


@pytest.fixture
def compiled_by(python, tmp_path):
    """compiled_by(SCRIPT, *flags): how many programs a run in a process of its own found (`hits`) in tmp_path/cache, and how many it had to compile (`misses`)."""

    def call(*command) -> dict[str, int]:
        own = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_COMPILATION_CACHE_DIR": ""}
        done = python("-c", HITS, *command, **own, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")  # all are kept, however quick a machine
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return call


@pytest.fixture(scope="session")
def eight_devices(tmp_path_factory):
    """eight_devices(cases): what tests/eight_devices.py finds out about them."""
    variables = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}

    def call(*cases: str) -> dict:
        script = [sys.executable, str(ROOT / "tests" / "eight_devices.py"), str(tmp_path_factory.mktemp("eight")), *cases]
        result = subprocess.run(script, capture_output=True, text=True, env=variables, cwd=ROOT)
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads(result.stdout.splitlines()[-1])

    return call


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Files that take minutes come first, so that processes end at about the same time."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
