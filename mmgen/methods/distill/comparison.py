"""The end of a distillation: teacher and student side by side, as a table of scores and as a picture from the same noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from ...data import Dataset
from ...data.latents import LatentDataset
from ...models.denoiser import Denoiser
from ...sampling.denoiser_samplers import most_steps, samplers_of
from ...sampling.guidance import Guide
from ...sampling.guidance_interval import Interval
from ...report.images import labelled_rows
from ...models.config import SamplingSettings
from ...sampling.drawing import SampleSettings, draw, plan
from ...diffusion.schedules import ScheduleSettings
from ...training.evaluation import COLUMNS, layout, real_images, with_score
from ...training.task import Reporter, Work

if TYPE_CHECKING:
    from ...training.scorer import Scorer


@dataclass(frozen=True)
class Drawn:
    """A model with a way to sample it: a row of the table."""

    who: str  # "teacher" or "student"
    model: Denoiser  # whose config has that way as its default
    steps: int
    guide: Guide | None = None  # of the teacher

    @property
    def sampler(self) -> str:
        return self.model.config.sampling.sampler

    @property
    def caption(self) -> str:
        return f"{self.who}, {self.steps} {self.sampler} step{'s' * (self.steps > 1)}"


@dataclass(frozen=True)
class Row:
    who: str
    sampler: str
    steps: int
    evaluations: int  # of the network, per image
    value: float  # of the metric


def many_step_ways(teacher: Denoiser, schedule: ScheduleSettings, steps: int, guidance: float, interval: Interval = ()) -> list[Drawn]:
    """How a teacher is sampled at its best, in about `steps` evaluations: by the ancestral sampler, and by the better of the
    deterministic ones that suit it, which is heun where EDM trained it, in half as many steps, and else ddim.

    Ancestral steps are evenly spaced in `schedule`, as the student's; the others on the teacher's own grid. A teacher of
    timesteps has no more steps than those.
    """
    steps = int(min(steps, most_steps(teacher.settings)))
    usual = next(iter(samplers_of(teacher.settings)))
    deterministic = ("heun", max(steps // 2, 1)) if usual == "heun" else ("ddim", steps)
    return [_ancestral(teacher, schedule, steps, guidance, interval), _own(teacher, *deterministic, guidance, interval)]


def few_step_ways(teacher: Denoiser, schedule: ScheduleSettings, steps: int, guidance: float, interval: Interval = ()) -> list[Drawn]:
    """How it is sampled in k steps: as the student is, and by ddim."""
    ways = [_ancestral(teacher, schedule, steps, guidance, interval)]
    return ways + ([_own(teacher, "ddim", steps, guidance, interval)] if steps <= most_steps(teacher.settings) else [])


def _ancestral(teacher: Denoiser, schedule: ScheduleSettings, steps: int, guidance: float, interval: Interval) -> Drawn:
    return _drawn(teacher, SamplingSettings("ancestral", "schedule", guidance, steps, schedule=schedule, guidance_interval=interval), steps)


def _own(teacher: Denoiser, sampler: str, steps: int, guidance: float, interval: Interval) -> Drawn:
    return _drawn(teacher, SamplingSettings(sampler, "default", guidance, steps, guidance_interval=interval), steps)


def _drawn(teacher: Denoiser, sampling: SamplingSettings, steps: int) -> Drawn:
    view = Denoiser(replace(teacher.config, sampling=sampling), teacher.network)
    return Drawn("teacher", view.eval(), steps)


def measured(ways: Sequence[Drawn], scorer: Scorer, seed: int, teacher: str) -> list[Row]:
    """The score of each, of the same numbers of images. To be called in all processes.

    teacher: the hash of its weights, by which its scores are remembered from one distillation to the next.
    """
    rows = []
    for way in ways:
        if way.who == "teacher":
            value = scorer.measure_once(way.model, way.steps, seed, teacher, way.caption, way.guide)
        else:
            value = scorer.measure(way.model, [way.steps], seed, way.caption)[way.steps]
        nfe = plan(way.model.config, SampleSettings(steps=way.steps, guide=way.guide)).nfe
        rows.append(Row(way.who, way.sampler, way.steps, nfe, value))
    return rows


def best(rows: Sequence[Row]) -> int:
    """The index of the row with the best (lowest) score."""
    return min(range(len(rows)), key=lambda i: rows[i].value)


def as_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """As results.json keeps them."""
    return [asdict(row) for row in rows]


def side_by_side(
    ways: Sequence[Drawn], dataset: Dataset | LatentDataset, seed: int, drawn: dict[str, Tensor],
    scores: Mapping[str, str] = {}, work: Work = Reporter().work,
) -> Image.Image:  # fmt: skip
    """Images of each, from the same noise and of the same classes, above real ones of these classes.

    Args:
        drawn: caption -> images of the teacher, kept from one call to the next: in many steps they take their time.
        scores: by caption, and of the student by its number of steps.
    """
    shown, rows = layout(ways[0].model.config, dataset, seed), []
    for way in ways:
        if way.who == "student" or way.caption not in drawn:
            with work(f"picture: {way.caption}", len(shown.real)) as update:
                settings = SampleSettings(way.steps, seed=seed, classes=shown.classes, prompts=shown.prompts, guide=way.guide)
                drawn[way.caption] = draw(way.model, settings, range(len(shown.real)), update)[0]
        score = scores.get(str(way.steps)) if way.who == "student" else scores.get(way.caption)
        rows.append((with_score(way.caption, score), drawn[way.caption]))
    real = real_images(ways[0].model, dataset, shown.real)
    return labelled_rows([*rows, real], columns=len(shown.names) or COLUMNS, names=shown.names, padding=4)
