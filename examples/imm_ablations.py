"""The paper's sanity checks of IMM, in small: what each part of the loss is worth, on digits, over several seeds.

    python examples/imm_ablations.py --out runs/ablations            # about twenty minutes on one core
    python examples/imm_ablations.py --seeds 1 --images 5000         # a first look
    python examples/imm_ablations.py --only group_size k --images 512k --processes 16       # over time: see ablations.py

The group `parts`, which is made if nothing else is said, changes one setting each of a small version of the preset digits-imm
(arXiv:2503.07565, figures 5 and 11, tables 3 and 4), and is scored at the end. The others are of the preset's own network (0.19M parameters) at a
constant learning rate of 2e-3 (ema_betas 0.996), each training scored every 64,000 images (`--every`); the table has the first and
those after twice as many images and so on, and the last. The tables have FD-pixels by number of steps: the mean over seeds, and half the
distance between the lowest and the highest. What is there is not done again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import mmgen
from ablations import Job, Scores, add_options, carry_out, check_least, chosen, count, ended, settings_of, slug, spread
from mmgen.errors import MmgenError
from mmgen.report.charts import Panel, line_chart
from mmgen.report.images import save_png

QUIET = {"run.preview_every": 10**9, "run.checkpoint_every": 10**9, "run.log_every": 100}
SMALL = {
    "flow.parametrization": "simple_edm",
    "network.model_channels": 16, "network.channel_mult": [1, 1], "train.batch_size": 64, "train.ema_betas": [0.99],
    "loss.k": 10.0, "run.eval_steps": [1, 2, 8], "run.eval_every": 10**9, **QUIET,
}  # fmt: skip
LONG = {"optimizer.lr": 2e-3, "optimizer.decay": "none", "train.ema_betas": [0.996], "run.eval_steps": [1, 2, 4, 8], **QUIET}


@dataclass(frozen=True)
class Variant:
    group: str
    name: str
    changes: dict[str, Any] = field(default_factory=dict)


PRESET = "M = 4, Euler-FM, k = 11, a = 1, b = 5"
VARIANTS = [
    Variant("parts", "baseline: M = 4, Simple-EDM, eta, full weight"),
    Variant("parts", "M = 1 (a consistency model)", {"loss.group_size": 1}),
    Variant("parts", "M = 2", {"loss.group_size": 2}),
    Variant("parts", "weight 1", {"loss.weighting": "none"}),
    Variant("parts", "weight ELBO", {"loss.weighting": "elbo"}),
    Variant("parts", "weight ELBO x alpha", {"loss.weighting": "elbo_alpha"}),
    Variant("parts", "identity parametrisation", {"flow.parametrization": "identity"}),
    Variant("parts", "Euler-FM parametrisation", {"flow.parametrization": "euler_fm"}),
    Variant("parts", "cosine schedule", {"flow.schedule": "vp_cosine"}),
    Variant("parts", "r constant in t", {"loss.mapping": "t"}),
    Variant("parts", "r constant in log-SNR", {"loss.mapping": "log_snr"}),
    Variant("parts", "r constant in 1/eta", {"loss.mapping": "inverse_eta"}),
    Variant("parts", "RBF kernel", {"loss.kernel": "rbf"}),
    Variant("parts", "target sees undropped labels", {"loss.target_labels": "undropped"}),
    *(Variant("group_size", f"M = {size}", {"loss.group_size": size}) for size in (1, 2, 8, 16)),
    *(Variant("parametrisation", name, {"flow.parametrization": value}) for name, value in (("Simple-EDM", "simple_edm"), ("identity", "identity"))),
    *(Variant("k", f"k = {k}", {"loss.k": float(k)}) for k in (6, 8, 10, 12, 14, 16)),
    *(Variant("weight", f"a = {a}, b = {b}", {"loss.a": float(a), "loss.b": float(b)}) for a, b in ((1, 3), (1, 4), (1, 6), (2, 4), (2, 5), (2, 6))),
]  # fmt: skip
GROUPS = list(dict.fromkeys(variant.group for variant in VARIANTS))


def settings_for(variant: Variant, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    base = SMALL if variant.group == "parts" else {**LONG, "run.eval_every": options.every}
    own = {"train.seed": seed, "train.max_images": options.images, "run.eval_num": options.samples}
    return {**base, **settings_of(options.set), **variant.changes, **own}


def job_name(variant: Variant, seed: int) -> str:
    """Of its run and its scores. The others than `parts` share what has the same name."""
    return f"{'' if variant.group == 'parts' else 'long-'}{slug(variant.name)}-{seed}"


def run(name: str, settings: dict[str, Any], out: Path, device: str = "cpu") -> dict[str, dict[str, float]]:
    """FD-pixels by number of images and of steps. Trains the run in `out`, or finds it finished there."""
    done = ended(mmgen.train_imm(preset="digits-imm", settings=settings, out=out / name, progress=False, device=device))
    lines = [json.loads(line) for line in (done.folder / "log.jsonl").read_text().splitlines()]
    found = {str(line["images"]): line["values"] for line in lines if "values" in line}
    return {**found, str(done.images): done.results["values"]}


def shown(images: list[int]) -> list[int]:
    """Of what was scored, the first, those at twice as many images and so on, and the last."""
    doubled = {images[0] * 2**i for i in range(64)}
    return [each for each in images if each in doubled or each == images[-1]]


def table(group: str, rows: list[tuple[str, list[dict[str, Any]]]], seeds: int, out: Path) -> None:
    """table.md of `parts`, else GROUP.md and GROUP.png: scores over images. rows: name, and what was found of each seed."""
    steps = (1, 2, 8) if group == "parts" else (1, 2, 4, 8)
    over_time = group != "parts"
    names = ["variant", *["images"] * over_time, *(f"{k} step{'s' * (k > 1)}" for k in steps)]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    means: dict[int, dict[str, tuple[list[int], list[float]]]] = {k: {} for k in steps}
    for name, found in rows:
        every = sorted(map(int, set.intersection(*(set(each) for each in found)))) if found else []
        part = f" ({len(found)} of {seeds} seeds)" * (len(found) < seeds)
        for images in shown(every) if every else []:
            scores = [[each[str(images)][str(k)] for each in found] for k in steps]
            first = [f"{name}{part}", *[f"{images:,}"] * over_time]
            lines.append(f"| {' | '.join([*first, *(spread(values, 3 if over_time else 2) for values in scores)])} |")
        for k in steps:
            means[k][name] = every, [float(np.mean([each[str(images)][str(k)] for each in found])) for images in every]
    print("\n".join(lines), flush=True)
    (out / ("table.md" if group == "parts" else f"{group}.md")).write_text("\n".join(lines) + "\n")
    if over_time:
        panels = [Panel(names[2 + i], "images", means[k], i == 0, log_x=True) for i, k in enumerate(steps)]
        save_png(out / f"{group}.png", line_chart(panels, width=1600, height=420))


def compare(options: argparse.Namespace) -> None:
    def job(variant: Variant, seed: int) -> Job:
        name, settings = job_name(variant, seed), settings_for(variant, seed, options)
        return Job(name, {"settings": settings}, partial(run, name, settings, options.out, options.device))

    groups = {}
    for group in options.only:
        base = [] if group == "parts" else [Variant(group, PRESET)]
        groups[group] = base + [variant for variant in VARIANTS if variant.group == group]
    names = chosen(options.variant, [each.name for variants in groups.values() for each in variants])
    groups = {group: [each for each in variants if each.name in names] for group, variants in groups.items()}
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    jobs = {each.name: each for seed in seeds for variants in groups.values() for each in (job(variant, seed) for variant in variants)}
    if not carry_out(list(jobs.values()), options):
        return
    scores = Scores(options.out)
    for group, variants in ((group, variants) for group, variants in groups.items() if variants):
        rows = [(each.name, [found for seed in seeds if (found := scores.get(job(each, seed))) is not None]) for each in variants]
        table(group, rows, len(seeds), options.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS[:1], help="what is compared (default parts)")
    parser.add_argument("--images", type=count, default=19_200, help="images per run (default 19,200: 300 steps)")
    parser.add_argument("--every", type=count, default=64_000, help="images between scores, but of parts (default 64,000)")
    parser.add_argument("--samples", type=int, default=1797, help="samples per measurement (default 1,797)")
    add_options(parser, "runs/ablations", "runs per variant")
    options = parser.parse_args()
    check_least(parser, options, images=1, every=1, samples=2)
    try:
        compare(options)
    except MmgenError as error:
        parser.exit(error.exit_status, f"{error}\n")


if __name__ == "__main__":
    main()
