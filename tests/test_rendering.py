import numpy as np
import pytest

from svdp_jax import files, rendering
from svdp_jax.config import ConfigError
from svdp_jax.pipeline import Window


def window(number, frames=4):
    generator = np.random.default_rng(number)
    return Window(number, generator.integers(0, 256, (frames, 8, 8, 3), np.uint8), generator.normal(size=(2, 2, 2, 6)).astype(np.float32))


def test_windows_come_back_to_the_bit(tmp_path):
    folder = tmp_path / "windows"
    rendering.begin(folder, {"seed": 1}, bytes_needed=0)
    assert rendering.windows_in(folder) == 0 and rendering.last(folder) is None
    windows = [window(0), window(1), window(2, frames=1)]
    for one in windows:
        rendering.save(folder, one)
    last = rendering.last(folder)
    assert last.number == 2 and last.history.dtype == np.float32
    np.testing.assert_array_equal(last.history, windows[2].history)
    np.testing.assert_array_equal(np.stack(list(rendering.frames(folder))), np.concatenate([one.frames for one in windows]))


def test_what_lies_behind_a_missing_window_does_not_count(tmp_path):
    rendering.begin(tmp_path / "a", {}, bytes_needed=0)
    for number in 0, 1, 3:
        rendering.save(tmp_path / "a", window(number))
    assert rendering.windows_in(tmp_path / "a") == 2 and rendering.last(tmp_path / "a").number == 1


def test_other_settings_are_named(tmp_path):
    rendering.begin(tmp_path / "a", {"seed": 1, "guidance": (1.0, 2.0, 1.0), "face": None}, bytes_needed=0)
    rendering.check_settings(tmp_path / "a", {"seed": 1, "guidance": (1.0, 2.0, 1.0), "face": None})
    with pytest.raises(ConfigError, match="other settings: face was None, is 1; steps was None, is 3"):
        rendering.check_settings(tmp_path / "a", {"seed": 1, "guidance": (1.0, 2.0, 1.0), "face": 1, "steps": 3})
    (tmp_path / "a" / rendering.SETTINGS).write_text("{")
    with pytest.raises(ConfigError, match="cannot be continued"):
        rendering.check_settings(tmp_path / "a", {"seed": 1})


def test_a_full_disk_is_said_and_leaves_no_half_window(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="GB free; finished windows need 1000000.0 GB"):
        rendering.begin(tmp_path / "a", {}, bytes_needed=10**15)
    rendering.begin(tmp_path / "a", {}, bytes_needed=1)
    rendering.save(tmp_path / "a", window(0))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(files.MediaError, match="000001.npz: cannot be written .* No space left on device.; .* free some space and continue with --resume"):
        rendering.save(tmp_path / "a", window(1))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["000000.npz", rendering.SETTINGS]
