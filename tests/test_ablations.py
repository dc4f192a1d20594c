"""The questions of the ablations: each variant changes what its question is about and nothing else, and tables and pictures say what was found."""

import dataclasses
import json
import sys

import pytest
from conftest import ROOT

from svdp_jax import cli
from svdp_jax.config import load_config
from svdp_jax.sampler import guided_passes

sys.path.insert(0, str(ROOT / "benchmarks"))
ablations = pytest.importorskip("ablations", reason="needs matplotlib: pip install -e '.[plot]'")
BASE = load_config(ROOT / "configs" / "ablations.py")


def flat(config):
    fields = dataclasses.asdict(config)
    return {f"{part}.{name}": value for part, values in fields.items() if isinstance(values, dict) for name, value in values.items()}


def test_a_variant_changes_what_its_question_is_about():
    changed, trained = {}, [name for name, variant in ablations.VARIANTS.items() if not variant.weights]
    for name in trained:
        config = cli.parse(BASE, [str(flag) for flag in ablations.flags_of(name, 4000)], description="", prog="")
        changed[name] = {field: value for field, value in flat(config).items() if value != flat(BASE)[field]}
    assert changed == {
        "svdp": {}, "same-masked": {}, "factorized": {"model.temporal": "factorized"}, "no-history": {"data.history": 0},
        "history-from-start": {"train.history_from_step": 0}, "zero": {"model.dropped": "zero"}, "cached": {"model.history": "cached"},
        "same-whole": {"data.driver_mask": False},
    }  # fmt: skip
    assert set(guided_passes(ablations.GUIDED, with_history=True)) == {0, 1, 2, 3}
    asked = {variant for variants, _, _ in ablations.QUESTIONS.values() for variant in variants}
    assert asked == set(ablations.VARIANTS)


def test_every_variant_gets_the_compute_of_the_first():
    steps = {name: ablations.equal_steps(name, 4000) for name, variant in ablations.VARIANTS.items() if not variant.weights}
    assert steps["svdp"] == steps["same-masked"] == steps["same-whole"] == 4000
    assert steps["zero"] == steps["history-from-start"] < 4000 < steps["no-history"]  # history costs
    for name, count in steps.items():
        assert ablations.compute(name, count) == pytest.approx(ablations.compute("svdp", 4000), rel=1e-3)


def test_tables_have_means_and_what_seeds_lie_between(tmp_path):
    bounds = {"psnr_copy": 16.0, "psnr_autoencoder": 27.0, "gaze_truth": 1.5}
    runs = [{name: value for name in ablations.FIGURES} | bounds | {"error_by_window": [value, 2 * value]} for value in (1.0, 2.0)]
    results = {"variants": {"svdp": runs, "factorized": runs[:1]}, "guidance": {"source": [runs] * len(ablations.WEIGHTS)}}
    limits, question, guidance = ablations.tables(results)  # the other questions lack a variant
    assert limits.splitlines()[4:] == ["| a copy of the source | 16.00 |  |  |  |", "| the latents, decoded | 27.00 |  |  |  |", "| the truth, as it is read |  |  |  | 1.50 |"]
    lines = question.splitlines()
    assert lines[0].startswith("1. full-video") and lines[2].startswith("| | psnr | regions |") and lines[4].startswith("| svdp | 1.50 (1.00 .. 2.00) | 1.50")
    assert lines[5].startswith("| factorized | 1.00 | 1.00 |")
    assert [line.split(" | ")[0] for line in guidance.splitlines()[4:]] == [f"| {weight}" for weight in ablations.WEIGHTS]
    ablations.draw(results, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["guidance.png", "question1.png"]
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())


def test_the_page_has_the_tables_that_were_measured():
    results = json.loads((ROOT / "benchmarks" / "results" / "ablations.json").read_text())
    page = (ROOT / "docs" / "method.md").read_text()
    for titled in ablations.tables(results):
        assert titled.split("\n\n")[1] in page, titled
    assert set(results["variants"]) == set(ablations.VARIANTS)
