"""What each part of moment matching distillation is worth, in small: on digits, one change at a time, over several seeds.

    python examples/distill_ablations.py --out runs/distill-ablations     # many hours on one core: choose
    python examples/distill_ablations.py --seeds 1 --only posterior method
    python examples/distill_ablations.py --teacher runs/digits-teacher    # students of your own teacher of digits
    python examples/distill_ablations.py --only few --processes 16 --minutes 15      # see ablations.py

A small teacher is trained first, then the students (Salimans et al., arXiv:2406.04103), each from the teacher's weights and with as
many iterations, but for those that say otherwise. With `--wide`, the teacher is that of the preset, of 0.19M parameters. The table has
FD-pixels; the variance of the samples within their classes, in per cent of the data's; and, of the pixels too, precision (samples that
lie among the digits) and recall (digits that lie among the samples: diversity).
Each is the mean over the seeds, and half the distance between the lowest and the highest. What is there is not done again.

Groups: `ahead` asks what brings a student of 8 steps ahead of its teacher's 256; `few`, what helps in one and two;
`preconditioner`, what the instant method reaches by as much compute as the alternating one. An iteration costs passes of the networks: for each image of the
batch the alternating method takes 3 forward and 1 back, the instant one 2.5 and 1, where a pass back costs two forward and a derivative of
the teacher counts as two passes. So the instant students of that group have 10/9 as many iterations. A state of the student's own at step j of k
costs k - j passes more, which is not made up for.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mmgen
from ablations import Job, Scores, add_options, carry_out, check_least, chosen, ended, settings_of, slug, spread
from mmgen import data
from mmgen.report.charts import Panel, line_chart
from mmgen.errors import ConfigError, MmgenError, ModelError
from mmgen.report.images import labelled_rows, save_png
from mmgen.metrics.frechet import fd_pixels, halves_distance, pixel_features
from mmgen.metrics.neighbours import precision_recall

SHOWN = 15  # images of each row of the picture
QUIET = {"run.checkpoint_every": 10**9, "run.preview_every": 10**9, "run.eval_num": 0}  # what is measured is measured here
TEACHER = {"train.batch_size": 128, **QUIET}
SMALL, WIDE = {"network.channel_mult": [1, 1]}, {}  # 79k parameters; those of the preset
STUDENT = {"data.name": "digits", "student.stochasticity": 1.0, "run.teacher_steps": 0, **QUIET}
TEACHER_STEPS = (1, 2, 4, 8, 256)


@dataclass(frozen=True)
class Variant:
    """One change, for how many steps its students are, and how often as many iterations, and images in each, as the others they have."""

    group: str
    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    steps: tuple[int, ...] = (8,)
    times: float = 1
    batch: int = 1
    own_from: float | None = None  # the part of the training after which it begins at states of the student's own


SOFTER, SOFT = ({"loss.stochasticity": value, "student.stochasticity": value} for value in (0.5, 0.7))
HALF, ALL = {"student.rollouts": 0.5}, {"student.rollouts": 1.0}
THREE, FIVE = {"loss.auxiliary_updates": 3}, {"loss.auxiliary_updates": 5}  # with 2 and 3 times the iterations: as many updates of the student
DROPOUT, NOISE, SHIFT = {"student.dropout": 0.1}, {"student.noise_channels": 1}, {"student.shift": 2.0}
PLAIN, INSTANT, ADAM = {"loss.weighting": "uniform"}, {"loss.method": "instant"}, {"loss.preconditioner": "adam"}
STEPS, FEW = (8, 4, 2, 1), (2, 1)
VARIANTS = [
    Variant("steps", "alternating", {}, STEPS),
    Variant("posterior", "unconditional posterior", {"loss.posterior": "unconditional"}, (8, 2)),
    Variant("posterior", "stochasticity 0.5", SOFTER, (8, 2)),
    Variant("method", "instant", INSTANT, STEPS),
    Variant("weighting", "weight 1", PLAIN),
    Variant("weighting", "weight min(SNR, 5)", {"loss.weighting": "min_snr"}),
    Variant("weighting", "weight sigmoid of log-SNR", {"loss.weighting": "sigmoid"}),
    Variant("ahead", "rollouts 0.25", {"student.rollouts": 0.25}),
    Variant("ahead", "rollouts 0.5", HALF),
    Variant("ahead", "rollouts 0.75", {"student.rollouts": 0.75}),
    Variant("ahead", "rollouts 0.5 in the second half", HALF, own_from=0.5),
    Variant("ahead", "three auxiliary updates", THREE, times=2),
    Variant("ahead", "rollouts 0.5, three auxiliary updates", {**HALF, **THREE}, times=2),
    Variant("ahead", "five auxiliary updates", FIVE, times=3),
    Variant("ahead", "rollouts 0.5, five auxiliary updates", {**HALF, **FIVE}, times=3),
    Variant("ahead", "twice the iterations", times=2),
    Variant("ahead", "three times the iterations", times=3),
    Variant("ahead", "rollouts 0.5, twice the iterations", HALF, times=2),
    Variant("ahead", "batches twice as large", batch=2),
    Variant("ahead", "weight 1", PLAIN),
    Variant("few", "dropout", DROPOUT, FEW),
    Variant("few", "noise input", NOISE, FEW),
    Variant("few", "shift 2", SHIFT, FEW),
    Variant("few", "shift 0.5", {"student.shift": 0.5}, FEW),
    Variant("few", "stochasticity 0.7", SOFT, FEW),
    Variant("few", "stochasticity 0.5", SOFTER, FEW),
    Variant("few", "rollouts 0.5", HALF, FEW),
    Variant("few", "rollouts 1", ALL, FEW),
    Variant("few", "three auxiliary updates", THREE, FEW, times=2),
    Variant("few", "twice the iterations", {}, FEW, times=2),
    Variant("few", "weight 1", PLAIN, FEW),
    Variant("few", "dropout, shift 2", {**DROPOUT, **SHIFT}, FEW),
    Variant("few", "dropout, shift 2, rollouts 0.5, three auxiliary updates", {**DROPOUT, **SHIFT, **HALF, **THREE}, FEW, times=2),
    Variant("few", "noise input, rollouts 0.5, three auxiliary updates", {**NOISE, **HALF, **THREE}, FEW, times=2),
    Variant("preconditioner", "instant, as much compute", INSTANT, STEPS, times=10 / 9),
    Variant("preconditioner", "instant, Adam, as much compute", {**INSTANT, **ADAM}, STEPS, times=10 / 9),
]
GROUPS = list(dict.fromkeys(variant.group for variant in VARIANTS))


class Table:
    """Rows, printed at once. Scores are kept for the chart, pictures for the picture."""

    def __init__(self, samples: int) -> None:
        self.real, self.samples = data.load("digits"), samples
        self.rows, self.points, self.pictures = [], {}, []
        self.digits = {f"FD-pixels-{samples}": 3, "variance, %": 0, "precision": 2, "recall": 2}  # of the columns
        self._add(f"| | steps | {' | '.join(self.digits)} |")
        self._add("|---" * 6 + "|")
        self._add(f"| halves of the data | | {halves_distance(self.real.images):.3f} | | | |")

    def row(self, name: str, steps: int, found: list[dict[str, Any]], seeds: int) -> None:
        """What was measured of those of the seeds that are there, as `measure` gives it. None: no row."""
        if not found:
            return
        name += f" ({len(found)} of {seeds} seeds)" * (len(found) < seeds)
        figures = np.array([each["figures"] for each in found])
        self.pictures.append((f"{name}, {steps}", torch.tensor(found[0]["shown"], dtype=torch.uint8)))
        columns = zip(figures.T, self.digits.values(), strict=True)
        self._add(f"| {name} | {steps} | {' | '.join(spread(values, digits) for values, digits in columns)} |")
        self.points.setdefault(name, {})[steps] = figures.mean(0)

    def _add(self, row: str) -> None:
        self.rows.append(row)
        print(row, flush=True)

    def write(self, out: Path) -> None:
        """table.md, chart.png: scores over steps, and samples.png: the samples above real images."""
        (out / "table.md").write_text("\n".join(self.rows) + "\n")
        few = {name: sorted((k, values) for k, values in found.items() if k <= 8) for name, found in self.points.items()}
        panels = [
            Panel(title, "steps", {name: ([k for k, _ in line], [v[i] for _, v in line]) for name, line in few.items()}, i == 0)
            for i, title in enumerate(self.digits)
        ]
        save_png(out / "chart.png", line_chart(panels, width=1600, height=420))
        real = ("real", self.real.images[:SHOWN])
        save_png(out / "samples.png", labelled_rows([*self.pictures, real], columns=SHOWN, padding=4))


def variance(images: Tensor | np.ndarray, labels: Tensor | np.ndarray | None) -> float:
    """The variance within the classes, pooled, summed over the pixels, of images uint8 [N, C, H, W]. No labels: that of all."""
    x = pixel_features(images)
    label = torch.zeros(len(x), dtype=torch.int64) if labels is None else torch.tensor(labels.tolist())
    _, label, count = label.unique(return_inverse=True, return_counts=True)
    means = x.new_zeros(len(count), x.shape[1]).index_add(0, label, x) / count[:, None]
    return ((x - means[label]).square().sum() / (len(x) - len(count))).item()


def measure(model: Any, steps: int, seed: int, samples: int, draws: int) -> dict[str, Any]:
    """The mean figures of so many ancestral draws of a model, and the first images of the first."""
    real = data.load("digits")
    drawn = [model.sample(samples, steps=steps, seed=seed + 10 * i, sampler="ancestral") for i in range(draws)]
    found = [figures(each.images, each.labels, real) for each in drawn]
    return {"figures": np.mean(found, axis=0).tolist(), "shown": drawn[0].images[:SHOWN].tolist()}


def figures(images: Tensor, labels: Tensor | None, real: Any) -> tuple[float, ...]:
    """FD-pixels, the variance in per cent, precision, recall."""
    share = variance(images, labels) / variance(real.images, None if labels is None else real.labels)
    among = precision_recall(pixel_features(real.images), pixel_features(images))
    return fd_pixels(images, real.images), 100 * share, *among


def teacher(out: Path, iterations: int, wide: bool = False, device: str = "cpu") -> Path:
    """Trains the small teacher, or the preset's, in the folder `out`, or finds it there; the folder."""
    images = iterations * TEACHER["train.batch_size"]
    settings = {**TEACHER, **(WIDE if wide else SMALL), "train.max_images": images, "optimizer.warmup_images": images // 20}
    ended(mmgen.train_teacher(preset="digits-teacher", settings=settings, out=out, progress=False, device=device))
    return out


def student_settings(variant: Variant, seed: int, iterations: int, batch_size: int = 128, others: Mapping[str, Any] = {}) -> dict[str, Any]:
    """Of one student, `others` among them; what the variant changes has precedence."""
    batch = variant.batch * batch_size
    images = round(variant.times * iterations) * batch
    own = {} if variant.own_from is None else {"student.rollouts_after": round(variant.own_from * images)}
    return {
        **STUDENT, "train.batch_size": batch, "train.max_images": images, "optimizer.warmup_images": images // 20,
        **others, **variant.changes, **own, "train.seed": seed,
    }  # fmt: skip


def student(path: str, name: str, steps: int, settings: dict[str, Any], out: Path, device: str = "cpu") -> Any:
    """Distils the teacher at `path` in a folder in `out`, or finds the student there."""
    run = mmgen.distill(path, steps=steps, preset="digits-distill", settings=settings, out=out / name, progress=False, device=device)
    return ended(run).load(device=device)


def compared(only: list[str]) -> list[tuple[Variant, int]]:
    """What the groups compare, with the plain students of all their numbers of steps. A variant of two groups is there once."""
    asked = [(variant, steps) for variant in VARIANTS if variant.group in only for steps in variant.steps]
    plain = [(VARIANTS[0], steps) for steps in VARIANTS[0].steps if steps in {steps for _, steps in asked}]
    return list({(variant.name, steps): (variant, steps) for variant, steps in [*plain, *asked]}.values())


def compare(options: argparse.Namespace) -> None:
    path = options.teacher or str(options.out / "teacher")
    if not options.teacher and not options.job:  # which many do at a time, of a teacher that is there
        teacher(Path(path), options.teacher_iterations, options.wide, options.device)
    model = mmgen.load(path, device=options.device)
    if model.config.denoiser is None:
        raise ModelError(f"{path} is a flow map, which no student is distilled from: give a diffusion or flow-matching teacher")
    if model.image_shape != (1, 8, 8):
        raise ConfigError(f"the teacher {path} knows images of {model.image_shape}, and the digits are of (1, 8, 8)")
    weights = hashlib.sha256()
    for value in model.state_dict().values():
        weights.update(value.cpu().numpy().tobytes())
    same = {"teacher": weights.hexdigest(), "samples": options.samples, "draws": options.draws}
    others, seeds = settings_of(options.set), range(options.first_seed, options.first_seed + options.seeds)

    def of_teacher(steps: int, seed: int) -> Job:
        work = partial(measure, model, steps, seed, options.samples, options.draws)
        return Job(f"teacher-{steps}-{seed}", {**same, "steps": steps}, work)

    def of_student(variant: Variant, steps: int, seed: int) -> Job:
        name = f"{slug(variant.name)}-{steps}-{seed}"
        settings = student_settings(variant, seed, options.iterations, options.batch_size, others)

        def work() -> dict[str, Any]:
            found = student(path, name, steps, settings, options.out, options.device)
            return measure(found, steps, seed, options.samples, options.draws)

        return Job(name, {**same, "steps": steps, "settings": settings}, work)

    pairs = compared(options.only)
    names = chosen(options.variant, [variant.name for variant, _ in pairs])
    pairs = [(variant, steps) for variant, steps in pairs if variant.name in names and steps in (options.steps or STEPS)]
    rows = [("teacher", steps, partial(of_teacher, steps)) for steps in TEACHER_STEPS]
    rows += [(variant.name, steps, partial(of_student, variant, steps)) for variant, steps in pairs]
    if not carry_out([job(seed) for seed in seeds for _, _, job in rows], options):
        return
    table, scores = Table(options.samples), Scores(options.out)
    for name, steps, job in rows:
        table.row(name, steps, [found for seed in seeds if (found := scores.get(job(seed))) is not None], len(seeds))
    table.write(options.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", help="a teacher of digits: file, folder or hub id (default: one is trained, small)")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="what is compared (default: all)")
    parser.add_argument("--steps", type=int, nargs="+", choices=STEPS, help="of the students that are compared (default: all)")
    parser.add_argument("--iterations", type=int, default=1000, help="of each student (default 1000)")
    parser.add_argument("--batch-size", type=int, default=128, help="of the students (default 128)")
    parser.add_argument("--wide", action="store_true", help="a teacher of the preset's size, 0.19M parameters in place of 0.08M")
    parser.add_argument("--teacher-iterations", type=int, default=3000, help="of the teacher, 128 images each (default 3000)")
    parser.add_argument("--samples", type=int, default=1797, help="samples per measurement (default 1,797, as many as the data)")
    parser.add_argument("--draws", type=int, default=1, help="measurements of each student, whose mean is taken (default 1)")
    add_options(parser, "runs/distill-ablations", "students per variant")
    options = parser.parse_args()
    if options.teacher and options.wide:
        parser.error("--wide is of the teacher that is trained here: leave it out, or --teacher")
    check_least(parser, options, iterations=1, batch_size=1, teacher_iterations=1, samples=32, draws=1)
    try:
        compare(options)
    except MmgenError as error:
        parser.exit(error.exit_status, f"{error}\n")


if __name__ == "__main__":
    main()
