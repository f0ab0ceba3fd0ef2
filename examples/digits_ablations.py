"""Quality against cost on the digits: a teacher, its students, IMM and the baselines, by the same loop and network, as one plot.

    python examples/digits_ablations.py                                   # all rows, three training seeds each: hours on one core
    python examples/digits_ablations.py --only imm --seeds 1              # a row
    python examples/digits_ablations.py --only imm meanflow --max-images 5k --samples 256 --out runs/quick

A row is trained once for each seed by its preset, and sampled in several numbers of steps, as it says of itself; a step is one evaluation
of the network, as nothing is guided. The students of seed s, and what is distilled, are those of the teacher of seed s. The scores are FD-pixels. What is
measured is kept in quality.json and not measured again, trainings that are done are not repeated, so that the script goes on where it
was stopped, row by row. quality.png has the means over the seeds, quality.md also the spread: half the distance from the lowest to the
highest.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmgen
from ablations import count, ended
from mmgen import data
from mmgen.errors import MmgenError
from mmgen.metrics.frechet import fd_pixels, halves_distance
from mmgen.report.charts import Panel, line_chart
from mmgen.report.images import save_png

QUIET = {"run.checkpoint_every": 10**9, "run.preview_every": 10**9, "run.eval_num": 0}  # what is measured is measured here
FEW = (1, 2, 4, 8)


@dataclass(frozen=True)
class Row:
    title: str  # in the plot
    train: Callable[..., Any]  # of mmgen
    preset: str
    command: str  # that trains a model of it, {seed}, {steps} and {teacher} to be filled in
    steps: tuple[int, ...] = FEW
    settings: tuple[tuple[str, Any], ...] = ()
    sampler: str | None = None  # None: the model's own
    each: bool = False  # a model for each number of steps, of the teacher
    taught: bool = False  # one model, by the teacher


TEACHER, STUDENT = "mmgen train-teacher --preset {preset} --seed {seed}", "mmgen distill --teacher {teacher} --steps {steps} --seed {seed}"
IMM = "mmgen train-imm --preset {preset} --seed {seed}"
ROWS = {
    "teacher": Row("teacher, ancestral", mmgen.train_teacher, "digits-teacher", TEACHER, (*FEW, 16, 64, 256), sampler="ancestral"),
    "alternating": Row("student, alternating", mmgen.distill, "digits-distill", STUDENT, each=True),
    "instant": Row("student, instant", mmgen.distill, "digits-distill", STUDENT + " --method instant",
                   settings=(("loss.method", "instant"),), each=True),
    "imm": Row("IMM", mmgen.train_imm, "digits-imm", IMM),
    "consistency": Row("consistency training", mmgen.train_imm, "digits-consistency", IMM),
    "distilled": Row("consistency distillation", mmgen.train_imm, "digits-consistency", IMM + " --teacher {teacher}", taught=True),
    "flow": Row("flow matching, Euler", mmgen.train_teacher, "digits-flow", TEACHER, (*FEW, 16, 50)),
    "meanflow": Row("MeanFlow", mmgen.train_imm, "digits-meanflow", IMM),
}  # fmt: skip


def trained(row: Row, seed: int, out: Path, options: argparse.Namespace, first: dict[str, Any], name: str) -> Any:
    """The model of a row, trained in `out` or found there."""
    settings = {**QUIET, "train.seed": seed, **dict(row.settings)}
    if row.taught:
        settings["teacher.name"] = str(out / f"teacher-{seed}")
    if options.max_images:
        settings |= {"train.max_images": options.max_images, "optimizer.warmup_images": options.max_images // 20}
    run = row.train(preset=row.preset, settings=settings, out=out / name, progress=False, device="cpu", **first)
    return ended(run).load()


def measure(name: str, seed: int, options: argparse.Namespace, found: dict[str, Any], keep: Callable[[], None]) -> None:
    """The scores of a row of one seed by number of steps, in `found["rows"]`; those that are there are left alone."""
    row, real = ROWS[name], data.load("digits").images
    scores = found["rows"].setdefault(name, {"title": row.title, "command": "", "seeds": {}})["seeds"].setdefault(str(seed), {})
    teacher = options.out / f"teacher-{seed}"
    found["rows"][name]["command"] = row.command.format(preset=row.preset, seed="S", steps="K", teacher="runs/digits-teacher")
    for steps in row.steps:
        if str(steps) in scores:
            continue
        if row.each or row.taught:
            trained(ROWS["teacher"], seed, options.out, options, {}, teacher.name)
        if row.each:
            first = {"teacher": teacher, "steps": steps}
            model = trained(row, seed, options.out, options, first, f"{name}-{steps}-{seed}")
        else:
            model = trained(row, seed, options.out, options, {}, f"{name}-{seed}")
        own = {} if row.sampler is None else {"sampler": row.sampler}
        images = model.sample(options.samples, steps=steps, seed=seed, **own).images
        scores[str(steps)] = fd_pixels(images, real)
        print(f"{name}, seed {seed}, {steps} step{'s' * (steps > 1)}: {scores[str(steps)]:.4g}", flush=True)
        keep()


def read(file: Path, conditions: dict[str, Any]) -> dict[str, Any]:
    """What is measured so far, under the same conditions."""
    if not file.is_file():
        return {"conditions": conditions, "rows": {}}
    found = json.loads(file.read_text())
    if found["conditions"] != conditions:
        raise SystemExit(f"{file} was measured with {found['conditions']}, not {conditions}: choose another --out")
    return found


def write(file: Path, found: dict[str, Any]) -> None:
    """quality.json, whole or not at all, and the table and the plot of what it has."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(found, indent=1))
    os.replace(temporary, file)
    lines, series = ["| | evaluations | FD-pixels | seeds | command |", "|---|---|---|---|---|"], {}
    for name in (name for name in ROWS if name in found["rows"]):
        row = found["rows"][name]
        by_steps: dict[int, list[float]] = {}
        for scores in row["seeds"].values():
            for steps, value in scores.items():
                by_steps.setdefault(int(steps), []).append(value)
        for steps, values in sorted(by_steps.items()):
            mean, half = sum(values) / len(values), (max(values) - min(values)) / 2
            lines.append(f"| {row['title']} | {steps} | {mean:.3f} ± {half:.3f} | {len(values)} | `{row['command']}` |")
            xs, ys = series.setdefault(row["title"], ([], []))
            xs.append(steps)
            ys.append(mean)
    file.with_suffix(".md").write_text("\n".join(lines) + "\n")
    panel = Panel("FD-pixels (lower is better)", "network evaluations per image", series, log_y=True, log_x=True)
    save_png(file.with_suffix(".png"), line_chart([panel], width=900, height=560))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=f"of {', '.join(ROWS)} (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each row (default 3)")
    parser.add_argument("--first-seed", type=int, default=0, help="the seeds are this and those after it (default 0)")
    parser.add_argument("--max-images", type=count, help="of each training, for a quick look (default: the preset's)")
    parser.add_argument("--samples", type=int, default=1797, help="for a score (default 1,797, as many as the data)")
    parser.add_argument("--out", type=Path, default=Path("runs/digits-quality"), help="folder of the runs, quality.json, .md and .png")
    options = parser.parse_args()
    for name, least in (("seeds", 1), ("samples", 65), ("max_images", 128)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "quality.json"
    found = read(file, {"samples": options.samples, "max_images": options.max_images, "mmgen": mmgen.__version__})
    print(f"real against real: {halves_distance(data.load('digits').images):.3f}", flush=True)
    try:
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for name in options.only:
                measure(name, seed, options, found, lambda: write(file, found))
    except MmgenError as error:
        parser.exit(error.exit_status, f"{error}\n")
    write(file, found)
    print(f"written: {file}, {file.with_suffix('.md')}, {file.with_suffix('.png')}")


if __name__ == "__main__":
    main()
