"""The questions of the ablations: each variant changes what its question is about and nothing else, and tables and pictures say what was found."""

import dataclasses
import sys

import pytest
from conftest import ROOT
from rich.console import Console

from svdp_jax import cli
from svdp_jax.config import load_config

sys.path.insert(0, str(ROOT / "benchmarks"))
ablations = pytest.importorskip("ablations", reason="needs matplotlib: pip install -e '.[plot]'")
BASE = load_config(ROOT / "configs" / "ablations.py")


def flat(config):
    fields = dataclasses.asdict(config)
    return {f"{part}.{name}": value for part, values in fields.items() if isinstance(values, dict) for name, value in values.items()}


def test_a_variant_changes_what_its_question_is_about():
    changed = {}
    for name in ablations.VARIANTS:
        config = cli.parse(BASE, [str(flag) for flag in ablations.trained(name, 4000)], description="", prog="")
        changed[name] = {field: value for field, value in flat(config).items() if value != flat(BASE)[field]}
    assert changed == {
        "svdp": {}, "same-masked": {}, "factorized": {"model.temporal": "factorized"}, "no-history": {"data.history": 0},
        "history-from-start": {"train.history_from_step": 0}, "zero": {"model.dropped": "zero"}, "cached": {"model.history": "cached"},
        "same-whole": {"data.driver_mask": False},
    }  # fmt: skip
    asked = {variant for variants, _ in ablations.QUESTIONS.values() for variant in variants}
    assert asked == set(ablations.VARIANTS)


def test_every_variant_gets_the_compute_of_the_first():
    steps = {name: ablations.equal_steps(name, 4000) for name in ablations.VARIANTS}
    assert steps["svdp"] == steps["same-masked"] == steps["same-whole"] == 4000
    assert steps["history-from-start"] < 4000 < steps["no-history"]  # history costs
    for name, count in steps.items():
        assert ablations.compute(name, count) == pytest.approx(ablations.compute("svdp", 4000), rel=1e-3)


def test_tables_have_means_and_what_seeds_lie_between(tmp_path):
    runs = [{"psnr": value, "rest": value, "gaze": value, "error_by_window": [value, 2 * value]} for value in (1.0, 2.0)]
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    console.print(ablations.table("a question", {"one": runs, "other": runs[:1]}, ("psnr",)))
    said = console.export_text()
    assert "1.50 (1.00 .. 2.00)" in said and "a question" in said
    ablations.draw_windows({"one": runs}, "a question", tmp_path / "windows.png")
    ablations.draw_guidance({"source": [runs] * len(ablations.WEIGHTS)}, tmp_path / "guidance.png")
    assert (tmp_path / "windows.png").stat().st_size > 5000 and (tmp_path / "guidance.png").stat().st_size > 5000
