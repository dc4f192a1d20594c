"""Checkpoints on Google Cloud Storage, of which an emulator speaks the protocol: the same run, the same weights."""

import json
import os

import jax
import numpy as np
import pytest
from conftest import CHEAP, ROOT

from svdp_jax import checkpoint, files
from svdp_jax.config import ConfigError

BUCKET = "svdp-test"


@pytest.fixture(scope="module")
def cloud():
    """Variables by which a process finds the emulator, which is this process."""
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    from gcp_storage_emulator.handlers import objects

    def download(request, response, storage, *rest):
        """As the emulator does it, and with the generation of the object, by which tensorstore tells whether somebody else has written."""
        original(request, response, storage, *rest)
        if response.status in (200, 206):
            response["x-goog-generation"] = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])["generation"]

    original = objects.download
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects, "download", download)
        for _, handlers in emulator.HANDLERS:
            if handlers.get("GET") is original:
                patch.setitem(handlers, "GET", download)
        server = emulator.create_server("localhost", 0, in_memory=True, default_bucket=BUCKET)
        server.start()
        address = f"http://localhost:{server._api._httpd.server_port}"
        yield {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address, "GOOGLE_CLOUD_PROJECT": "test"}
        server.stop()


@pytest.mark.slow
def test_a_run_on_a_bucket_is_the_same_run(cloud, python, workdir, dataset, tmp_path):
    place = f"gs://{BUCKET}/runs/tiny"

    def call(*arguments):
        done = python(*arguments, **cloud)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()

    train = ["train.py", "--config", ROOT / "configs" / "tiny.py", "--workdir", place, "--data.path", dataset, *CHEAP]
    call(*train, "--train.stop-at", 4)
    assert f"{place}: tiny, step 4 of 8; saved: 4" in call("-m", "svdp_jax.checkpoint", "inspect", place)
    call(*train)
    call("-m", "svdp_jax.checkpoint", "export", place, tmp_path / "exported")
    ours, theirs = (checkpoint.load_weights(path) for path in (workdir, tmp_path / "exported"))
    jax.tree.map(np.testing.assert_array_equal, ours[1], theirs[1])
    metrics = "from etils import epath; import sys; print(epath.Path(sys.argv[1]).read_text())"
    losses = [json.loads(line)["loss"] for line in call("-c", metrics, f"{place}/metrics.jsonl") if line]
    assert losses == [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    listing = "from etils import epath; import sys; print(*(path.name for path in epath.Path(sys.argv[1]).iterdir()))"
    assert set(" ".join(call("-c", listing, place)).split()) == set(os.listdir(workdir))


def test_other_addresses_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="s3://bucket/run: a place is a local path or gs://"):
        files.place("s3://bucket/run")
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"gs://bucket/run needs another package: pip install -e '.\[gcs\]'"):
        files.place("gs://bucket/run")
    assert files.place("runs/one") == files.pathlib.Path("runs/one")
