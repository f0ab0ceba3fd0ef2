"""What each part of moment matching distillation is worth, in small: on digits, one change at a time, over several seeds.

    python examples/distill_ablations.py --out runs/distill-ablations     # an hour or two on one core
    python examples/distill_ablations.py --seeds 1 --only posterior method
    python examples/distill_ablations.py --teacher runs/digits-teacher    # students of your own teacher of digits

A small teacher is trained first, then the students (Salimans et al., arXiv:2406.04103), each from the teacher's weights and with as
many iterations, but for three of the group `ahead`, which have twice as many. The table has FD-pixels; the variance of the samples
within their classes, in per cent of the data's; and, of the pixels too, precision (samples that lie among the digits) and recall
(digits that lie among the samples: diversity).
Each is the mean over the seeds, and half the distance between the lowest and the highest. Runs that are there are not repeated.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mmgen
from mmgen import data
from mmgen.report.charts import Panel, line_chart
from mmgen.errors import ConfigError, MmgenError, ModelError
from mmgen.report.images import labelled_rows, save_png
from mmgen.metrics.frechet import fd_pixels, halves_distance, pixel_features
from mmgen.metrics.neighbours import precision_recall

SHOWN = 15  # images of each row of the picture
QUIET = {"run.checkpoint_every": 10**9, "run.preview_every": 10**9, "run.eval_num": 0}  # what is measured is measured here
TEACHER = {"network.channel_mult": [1, 1], "train.batch_size": 128, **QUIET}
STUDENT = {"data.name": "digits", "student.stochasticity": 1.0, "train.batch_size": 128, "run.teacher_steps": 0, **QUIET}
TEACHER_STEPS = (1, 2, 4, 8, 256)


@dataclass(frozen=True)
class Variant:
    """One change, for how many steps its students are, and how often as many iterations as the others they have."""

    group: str
    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    steps: tuple[int, ...] = (8,)
    times: int = 1


AUXILIARY = {"loss.auxiliary_updates": 3}  # with twice the iterations: as many updates of the student
VARIANTS = [
    Variant("steps", "alternating", {}, (8, 4, 2, 1)),
    Variant("posterior", "unconditional posterior", {"loss.posterior": "unconditional"}, (8, 2)),
    Variant("posterior", "stochasticity 0.5", {"loss.stochasticity": 0.5, "student.stochasticity": 0.5}, (8, 2)),
    Variant("method", "instant", {"loss.method": "instant"}, (8, 4, 2, 1)),
    Variant("weighting", "weight 1", {"loss.weighting": "uniform"}),
    Variant("weighting", "weight min(SNR, 5)", {"loss.weighting": "min_snr"}),
    Variant("weighting", "weight sigmoid of log-SNR", {"loss.weighting": "sigmoid"}),
    Variant("ahead", "rollouts", {"student.rollouts": 0.5}),
    Variant("ahead", "three auxiliary updates", AUXILIARY, times=2),
    Variant("ahead", "both", {"student.rollouts": 0.5, **AUXILIARY}, times=2),
    Variant("ahead", "twice the iterations", times=2),
]
GROUPS = list(dict.fromkeys(variant.group for variant in VARIANTS))


class Table:
    """Rows that are printed as they are found. Scores are kept for the chart, pictures for the picture."""

    def __init__(self, samples: int) -> None:
        self.real, self.samples = data.load("digits"), samples
        self.rows, self.points, self.pictures = [], {}, []
        self.digits = {f"FD-pixels-{samples}": 3, "variance, %": 0, "precision": 2, "recall": 2}  # of the columns
        self._add(f"| | steps | {' | '.join(self.digits)} |")
        self._add("|---" * 6 + "|")
        self._add(f"| halves of the data | | {halves_distance(self.real.images):.3f} | | | |")

    def measure(self, name: str, steps: int, models: list, draws: int) -> None:
        """A row for models of the seeds 0, 1, ..., each sampled ancestrally so many times."""
        found = []
        for index, model in enumerate(models):
            drawn = [model.sample(self.samples, steps=steps, seed=index + 10 * i, sampler="ancestral") for i in range(draws)]
            found.append(np.mean([self._figures(each.images, each.labels) for each in drawn], axis=0))
            if index == 0:
                self.pictures.append((f"{name}, {steps}", drawn[0].images[:SHOWN]))
        columns = zip(np.transpose(found), self.digits.values(), strict=True)
        self._add(f"| {name} | {steps} | {' | '.join(spread(values, digits) for values, digits in columns)} |")
        self.points.setdefault(name, {})[steps] = np.mean(found, axis=0)

    def _figures(self, images: Tensor, labels: Tensor | None) -> tuple[float, ...]:
        share = variance(images, labels) / variance(self.real.images, None if labels is None else self.real.labels)
        among = precision_recall(pixel_features(self.real.images), pixel_features(images))
        return fd_pixels(images, self.real.images), 100 * share, *among

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


def spread(values: np.ndarray | list[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f} ± {np.ptp(values) / 2:.{digits}f}"


def ended(run: Any) -> Any:
    """A run that was told to stop ends the script, too: half a training is no result."""
    if run.signal is not None:
        raise SystemExit(128 + run.signal)
    return run


def teacher(out: Path, iterations: int) -> Path:
    """Trains the small teacher in the folder `out`, or finds it there; the folder."""
    images = iterations * TEACHER["train.batch_size"]
    settings = {**TEACHER, "train.max_images": images, "optimizer.warmup_images": images // 20}
    ended(mmgen.train_teacher(preset="digits-teacher", settings=settings, out=out, progress=False, device="cpu"))
    return out


def student(path: str, variant: Variant, steps: int, seed: int, iterations: int, out: Path):
    """Distils the teacher at `path` in a folder in `out`, or finds the student there."""
    images = variant.times * iterations * STUDENT["train.batch_size"]
    settings = {
        **STUDENT, **variant.changes, "train.seed": seed, "train.max_images": images, "optimizer.warmup_images": images // 20,
    }  # fmt: skip
    folder = out / f"{''.join(c if c.isalnum() else '-' for c in variant.name)}-{steps}-{seed}"
    run = mmgen.distill(path, steps=steps, preset="digits-distill", settings=settings, out=folder, progress=False, device="cpu")
    return ended(run).load()


def compare(options: argparse.Namespace) -> None:
    path = options.teacher or str(teacher(options.out / "teacher", options.teacher_iterations))
    model = mmgen.load(path)
    if model.config.denoiser is None:
        raise ModelError(f"{path} is a flow map, which no student is distilled from: give a diffusion or flow-matching teacher")
    if model.image_shape != (1, 8, 8):
        raise ConfigError(f"the teacher {path} knows images of {model.image_shape}, and the digits are of (1, 8, 8)")
    table = Table(options.samples)
    for steps in TEACHER_STEPS:
        table.measure("teacher", steps, [model] * options.seeds, draws=1)
    for variant in VARIANTS:
        chosen = variant.steps if variant.group in options.only else ()
        if variant is VARIANTS[0]:  # what the others are compared with
            chosen = chosen or (8,)
        for steps in chosen:
            models = [student(path, variant, steps, seed, options.iterations, options.out) for seed in range(options.seeds)]
            table.measure(variant.name, steps, models, options.draws)
    table.write(options.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", help="a teacher of digits: file, folder or hub id (default: one is trained, small)")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="what is compared (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="students per variant (default 3)")
    parser.add_argument("--iterations", type=int, default=1000, help="of each student, 128 images each (default 1000)")
    parser.add_argument("--teacher-iterations", type=int, default=3000, help="of the teacher, 128 images each (default 3000)")
    parser.add_argument("--samples", type=int, default=1797, help="samples per measurement (default 1,797, as many as the data)")
    parser.add_argument("--draws", type=int, default=1, help="measurements of each student, whose mean is taken (default 1)")
    parser.add_argument("--out", type=Path, default=Path("runs/distill-ablations"), help="folder of runs, table and pictures")
    options = parser.parse_args()
    for name, least in (("seeds", 1), ("iterations", 1), ("teacher_iterations", 1), ("samples", 32), ("draws", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    try:
        compare(options)
    except MmgenError as error:
        parser.exit(error.exit_status, f"{error}\n")


if __name__ == "__main__":
    main()
