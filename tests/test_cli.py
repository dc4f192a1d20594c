"""What all commands have in common: help, one line per mistake, exit status 2."""

import runpy
import sys

import imageio.v3 as iio
import numpy as np
import pytest
import skimage.data
from conftest import ROOT


@pytest.mark.parametrize("name, flag", [("sample.py", "--guidance"), ("train.py", "--train.history-from-step")])
def test_help_lists_the_flags(script, monkeypatch, name, flag):
    monkeypatch.chdir(ROOT)
    status, out, err = script(name, "--help")
    assert (status, err) == (0, "")
    assert flag in out


@pytest.mark.parametrize(
    "module, flags, said",
    [
        ("svdp_jax.checkpoint", ["inspect"], "directory"),
        ("svdp_jax.checkpoint", ["export", "here", "there", "--dtype", "float16"], "float16"),
        ("svdp_jax.evaluation.rendered", ["--checkpoint", "here", "--clips", "few"], "few"),
        ("svdp_jax.data.bundle", [], "--output"),
        ("svdp_jax.data.prepare", ["--input", "here"], "--output"),
        ("svdp_jax.data.prepare", ["--rules.min-fase", "3"], "did you mean --rules.min-face?"),
        ("svdp_jax.data.pairs", ["--seed", "few"], "--seed few: takes a whole number"),
        ("svdp_jax.data.preview", ["-s", "here.png"], "--driving"),
    ],
)
def test_other_commands_say_on_one_line_what_is_wrong(monkeypatch, capsys, module, flags, said):
    monkeypatch.setattr(sys, "argv", [module, *flags])
    monkeypatch.delitem(sys.modules, module, raising=False)  # runpy warns of a module that is there already
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert line.startswith("error: ") and said in line


def test_the_process_says_one_line_per_warning_and_exits_with_2(python, tmp_path):
    iio.imwrite(tmp_path / "source.png", skimage.data.astronaut())
    iio.imwrite(tmp_path / "grey.png", np.full((64, 64, 3), 128, np.uint8))
    given = ["--source", tmp_path / "source.png", "--driving", tmp_path / "grey.png", "--output", tmp_path / "out"]
    done = python("sample.py", *given, SVDP_FACE_LANDMARKER="")
    warning, error = done.stderr.splitlines()
    assert done.returncode == 2
    assert warning.startswith("warning: no landmarker given")
    assert error.startswith("error: ") and "grey.png" in error
