"""The paper's questions, answered on rendered portraits, where the truth is at hand.

    python benchmarks/ablations.py --workdir runs/ablations [--only svdp,zero,guidance] [--seeds 0,1,2] [--trained] [--steps 4000] [--clips 16]

Every variant is configs/ablations.py with the few fields that its question is about, trained by train.py with as much compute as the first one takes for its steps
(FLOP of `models/flops.py`: where a step costs more, there are fewer), and rolled out over ten windows of held-out pairs by `svdp_jax.evaluation.rendered`, of which the
figures are. What is there already is not done again; a run that was cut off goes on. Guidance is asked
of the first variant's weights. Out: a table for each question, WORKDIR/figures.json, and a picture for each question (errors by window, or a sweep).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
from typing import Any, NamedTuple

import matplotlib
import matplotlib.pyplot as plt

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from svdp_jax import cli, files  # noqa: E402
from svdp_jax.config import load_config  # noqa: E402
from svdp_jax.models import flops  # noqa: E402

matplotlib.use("agg")
CONFIG = ROOT / "configs" / "ablations.py"
WINDOWS, WINDOW = 10, 8
FIGURES = ("psnr", "regions", "rest", "change", "seams", "drift", "head", "mouth", "opening", "gaze", "leak")
BOUNDED = ("psnr", "regions", "opening", "gaze")


class Variant(NamedTuple):
    """What is trained, or sampled, otherwise than the first variant is."""

    flags: tuple[str, ...] = ()
    pairs: str = "others"  # the data set: driven by other people, or by "themselves"
    weights: str = ""  # those of this variant: nothing is trained
    guidance: tuple[float, ...] = (1.0, 1.0, 1.0)


GUIDED = (1.4, 1.6, 1.0)  # of which all four passes take part, as of the paper's 2, 2.5 and 1
VARIANTS = {
    "svdp": Variant(),
    "factorized": Variant(("--model.temporal", "factorized")),
    "no-history": Variant(("--data.history", "0")),
    "history-from-start": Variant(("--train.history-from-step", "0")),
    "zero": Variant(("--model.dropped", "zero")),
    "cached": Variant(("--model.history", "cached")),
    "same-masked": Variant(pairs="themselves"),
    "same-whole": Variant(("--data.no-driver-mask",), pairs="themselves"),
    "svdp-guided": Variant(weights="svdp", guidance=GUIDED),
    "zero-guided": Variant(weights="zero", guidance=GUIDED),
}
QUESTIONS = {  # -> which variants answer it, the figures that tell, and the one that is drawn beside the errors
    "full-video attention, or factorized": (("svdp", "factorized"), ("psnr", "regions", "change", "seams", "mouth", "gaze"), "change"),
    "history, or none": (("svdp", "no-history"), ("psnr", "regions", "change", "seams", "drift", "mouth", "gaze"), "seams"),
    "history last, or from the start": (("svdp", "history-from-start"), ("psnr", "regions", "mouth", "opening", "gaze", "drift"), "gaze"),
    "dropped signals left out, or zero": (("svdp", "zero", "svdp-guided", "zero-guided"), ("psnr", "regions", "mouth", "opening", "gaze", "seams"), "gaze"),
    "history joint, or cached": (("svdp", "cached"), ("psnr", "regions", "change", "seams", "drift"), "seams"),
    "the driver masked, or whole": (("svdp", "same-masked", "same-whole"), ("psnr", "regions", "rest", "leak", "mouth", "gaze"), "leak"),
}
BOUNDS = {"a copy of the source": "copy", "the latents, decoded": "autoencoder", "the truth, as it is read": "truth"}  # what figures lie between
SIGNALS = "source", "driving", "history"
GUIDANCE = "guidance"  # a question of its own, asked of the first variant's weights
SWEPT = ("psnr", "rest", "regions", "mouth", "gaze", "change")
WEIGHTS = (0.5, 1.0, 1.5, 2.0, 3.0)  # of one signal, the others at 1


def main() -> None:
    flags = parse()
    asked = [(variant, seed) for variant in VARIANTS if variant in flags.only for seed in flags.seeds]
    if not flags.trained:
        train(asked, flags)
    seeds: dict[str, list[int]] = {}
    for variant, seed in asked:
        if is_trained(variant, seed, flags):
            seeds.setdefault(variant, []).append(seed)
    if not seeds:
        sys.exit(f"error: nothing that was asked for is trained to the end in {flags.workdir}")
    found = {variant: [evaluate(variant, VARIANTS[variant].guidance, seed, flags) for seed in there] for variant, there in seeds.items()}
    swept = {}
    for signal in SIGNALS if GUIDANCE in flags.only and "svdp" in seeds else ():
        weighted = [tuple(weight if name == signal else 1.0 for name in SIGNALS) for weight in WEIGHTS]
        swept[signal] = [[evaluate("svdp", guidance, seed, flags) for seed in seeds["svdp"]] for guidance in weighted]
    steps = {variant: equal_steps(weights_of(variant), flags.steps) for variant in seeds}
    results = {"steps": steps, "seeds": seeds, "clips": flags.clips, "variants": found, "guidance": swept}
    with files.whole(flags.workdir / "figures.json") as partial:
        partial.write_text(json.dumps(results, indent=1) + "\n")
    print("\n\n".join(tables(results)))
    draw(results, flags.workdir)


def train(asked: list[tuple[str, int]], flags: argparse.Namespace) -> None:
    """What is missing, and pairs to train on."""
    missing = dict.fromkeys((weights_of(variant), seed) for variant, seed in asked if not is_trained(variant, seed, flags))
    for pairs in {VARIANTS[variant].pairs for variant, _ in missing}:
        run("-m", "svdp_jax.data.synthetic", "--output", flags.workdir / pairs, "--pairs", 1600, "--size", 64, *(["--same-person"] if pairs == "themselves" else []))
    for variant, seed in missing:
        given = ("--data.path", flags.workdir / VARIANTS[variant].pairs, "--train.seed", seed, *flags_of(variant, equal_steps(variant, flags.steps)))
        run("train.py", "--config", CONFIG, "--workdir", workdir_of(variant, seed, flags), *given)


def weights_of(variant: str) -> str:
    """The variant that is trained: itself, or another."""
    return VARIANTS[variant].weights or variant


def workdir_of(variant: str, seed: int, flags: argparse.Namespace) -> pathlib.Path:
    return flags.workdir / f"{weights_of(variant)}-{seed}"


def is_trained(variant: str, seed: int, flags: argparse.Namespace) -> bool:
    """To the end."""
    folder, steps = workdir_of(variant, seed, flags), equal_steps(weights_of(variant), flags.steps)
    if (config := folder / "config.json").exists() and (there := json.loads(config.read_text())["train"]["steps"]) != steps:
        sys.exit(f"error: {folder} holds a run of {there} steps, not of {steps}: another --workdir")
    return (folder / "checkpoints" / str(steps)).exists()


def flags_of(variant: str, steps: int) -> list[Any]:
    """Of train.py: history comes in the last quarter, unless the variant says otherwise."""
    own = VARIANTS[variant].flags
    curriculum = [] if "--train.history-from-step" in own else ["--train.history-from-step", steps * 3 // 4]
    return ["--train.steps", steps, *curriculum, *own]


def equal_steps(variant: str, steps: int) -> int:
    """So many of a variant's steps as take what `steps` of the first variant take."""
    return round(steps * compute("svdp", steps) / compute(variant, steps))


def compute(variant: str, steps: int) -> float:
    """FLOP of a variant's training."""
    config = cli.parse(load_config(CONFIG), list(map(str, flags_of(variant, steps))), description="", prog="")
    with_history = sum(map(config.has_history, range(steps)))
    return (steps - with_history) * flops.train_step(config, with_history=False).total + with_history * flops.train_step(config, with_history=True).total


def evaluate(variant: str, guidance: tuple[float, ...], seed: int, flags: argparse.Namespace) -> dict[str, Any]:
    """The figures of what is trained over so many clips, which are measured once."""
    folder = workdir_of(variant, seed, flags)
    path = folder / f"figures-{flags.clips}-{'-'.join(map(str, guidance))}.json"
    if not path.exists():
        asked = ("--clips", flags.clips, "--frames", WINDOWS * WINDOW, "--json", path, "--guidance", *guidance)
        run("-m", "svdp_jax.evaluation.rendered", "--checkpoint", folder, *asked)
    found = json.loads(path.read_text())
    bounds = [f"{name}_{bound}" for name in BOUNDED for bound in BOUNDS.values()]
    means = {name: found["figures"][name]["mean"] for name in (*FIGURES, *bounds) if name in found["figures"]}
    return means | {name: found[name] for name in ("error_by_window", "date", "device", "versions")}


def run(*command: Any) -> None:
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, stdout=sys.stderr)


def tables(results: dict[str, Any]) -> list[str]:
    """A title and a Markdown table for each question whose variants are all there, and for each signal of the guidance."""
    found = results["variants"]
    first = next(iter(found.values()))[0]
    limits = {title: {name: first[f"{name}_{bound}"] for name in BOUNDED if f"{name}_{bound}" in first} for title, bound in BOUNDS.items()}
    bounds = [f"0. between what figures lie\n\n{table({title: [values] for title, values in limits.items()}, BOUNDED)}"]
    answered = [
        f"{number}. {question}\n\n{table({variant: found[variant] for variant in variants}, names)}"
        for number, (question, (variants, names, _)) in enumerate(QUESTIONS.items(), start=1)
        if set(variants) <= set(found)
    ]
    swept = [f"guidance: {signal}\n\n{table(dict(zip(map(str, WEIGHTS), runs, strict=True)), SWEPT)}" for signal, runs in results["guidance"].items()]
    return bounds + answered + swept


def table(found: dict[str, list[dict[str, Any]]], names: tuple[str, ...]) -> str:
    """Markdown, a row for each variant: means over the seeds, and from the least to the most."""
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for variant, runs in found.items():
        cells = []
        for name in names:
            values = [figures[name] for figures in runs if name in figures]
            if not values:
                cells.append("")
                continue
            spread = f" ({min(values):.2f} .. {max(values):.2f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict[str, Any], folder: pathlib.Path) -> None:
    """A picture for each of the tables."""
    found = results["variants"]
    for number, (question, (variants, _, telling)) in enumerate(QUESTIONS.items(), start=1):
        if set(variants) <= set(found):
            draw_variants({variant: found[variant] for variant in variants}, question, telling, folder / f"question{number}.png")
    if results["guidance"]:
        draw_guidance(results["guidance"], folder / "guidance.png")


def draw_variants(found: dict[str, list[dict[str, Any]]], title: str, telling: str, path: pathlib.Path) -> None:
    """Error of each window, a line for each variant and a thin one for each seed; and one figure, a dot for each seed."""
    figure, (curves, dots) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=(3, 2), layout="constrained")
    for number, (variant, runs) in enumerate(found.items()):
        errors = [figures["error_by_window"] for figures in runs]
        windows = range(1, len(errors[0]) + 1)
        for error in errors:
            curves.plot(windows, error, color=f"C{number}", linewidth=0.6, alpha=0.6)
        curves.plot(windows, [statistics.mean(values) for values in zip(*errors, strict=True)], color=f"C{number}", linewidth=2, label=variant)
        dots.plot([figures[telling] for figures in runs], [number] * len(runs), "o", color=f"C{number}")
    highest = max(max(figures["error_by_window"]) for runs in found.values() for figures in runs)
    curves.set(xlabel="window", ylabel="mean absolute error", title=title, ylim=(0, 1.1 * highest))
    curves.legend(loc="lower right")
    most = max(figures[telling] for runs in found.values() for figures in runs)
    dots.set(xlabel=telling, yticks=range(len(found)), yticklabels=list(found), ylim=(len(found) - 0.5, -0.5), xlim=(0, 1.1 * most))
    dots.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_guidance(swept: dict[str, list[list[dict[str, Any]]]], path: pathlib.Path) -> None:
    """Looks against motion as one weight grows: dB of what is not eyes, nose and mouth, and degrees of gaze."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for panel, (name, label) in zip(panels, (("rest", "looks: PSNR of the rest, dB"), ("gaze", "motion: error of gaze, degrees")), strict=True):
        for signal, by_weight in swept.items():
            panel.plot(WEIGHTS, [statistics.mean(figures[name] for figures in runs) for runs in by_weight], marker="o", label=signal)
        panel.set(xlabel="weight, the others at 1", ylabel=label)
    panels[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--only", default=",".join([*VARIANTS, GUIDANCE]), help="variants, and guidance, with commas (default: all)")
    parser.add_argument("--seeds", default="0,1,2", help="of training, with commas (default: %(default)s)")
    parser.add_argument("--trained", action="store_true", help="train nothing: of the runs that are done")
    parser.add_argument("--steps", type=int, default=4000, help="of training the first variant (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=16, help="held-out pairs (default: %(default)s)")
    flags = parser.parse_args()
    flags.only, flags.seeds = flags.only.split(","), [int(seed) for seed in flags.seeds.split(",")]
    if unknown := set(flags.only) - {*VARIANTS, GUIDANCE}:
        parser.error(f"--only {', '.join(sorted(unknown))}: there is {', '.join([*VARIANTS, GUIDANCE])}")
    if GUIDANCE in flags.only and "svdp" not in flags.only:
        parser.error("--only guidance: asks svdp's weights; add svdp")
    flags.workdir = flags.workdir.resolve()
    flags.workdir.mkdir(parents=True, exist_ok=True)
    return flags


if __name__ == "__main__":
    main()
