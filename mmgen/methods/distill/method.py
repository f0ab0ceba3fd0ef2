"""Moment matching distillation (arXiv:2406.04103), from settings to what the training loop needs."""

from __future__ import annotations

import contextlib
import copy
from functools import partial
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ...data import Dataset, DataShape
from ...data.latents import LatentDataset
from ...data.resolve import locate
from ...models.denoiser import Denoiser
from ...config.sections import CAPTIONS, READING, DataSettings
from ...config.distill import DistillConfig, resolve, settled, student_denoiser, student_network, student_schedule
from ...errors import ConfigError, MmgenError
from ...formats.family import ConvertOptions
from ...models.autoguidance import AutoguidedDenoiser, check_guide
from ...models.build import AnyModel
from ...models.compilation import compile_network
from ...models.config import ModelConfig, SamplingSettings
from ...models.files import find_model, read_config
from ...networks import checkpoint_blocks, widen_input, with_second_time, without_augment
from ...networks.diffusers_text import with_guidance_input
from ...report.push import CONVERTED
from ...sampling.drawing import check_defaults
from ...sampling.guidance import Guide
from .teachers import Teacher, adam_second_moments, check_data, load_teacher, range_note
from . import comparison as report
from .alternating import alternating_parts, turn
from .rollouts import Rollouts
from ...training.inputs import Inputs
from .instant import GROUP, MOMENT_BATCHES, MOMENT_PASS, choose_derivative, data_second_moments, instant_parts
from .lora import LoraNetworks
from .matching import Matching
from ...training.sharding import is_sharded
from ...training.cost import ALTERNATING, INSTANT, Adapters, Work
from ...training.task import Reporter, Task
from ..method import Start, Training

if TYPE_CHECKING:
    from ...training.scorer import Scorer

USUAL_RANK = 64  # of LoRA, where the dry run shows what it would take
DISTILLED = "distilled"  # entry of ModelConfig.training that says what a student is a student of


def find_teacher(config: DistillConfig, device: Any = "cpu") -> tuple[Teacher, DistillConfig]:
    """The teacher on the device, and the config with what follows from it. Raises ConfigError and ModelError."""
    _needs_teacher(config)
    said = config.teacher
    options = ConvertOptions(type=said.type, preset=said.preset, heads=said.heads, num_classes=said.num_classes)
    teacher = load_teacher(said.name, device, options=options)
    own = replace(teacher.model.config, data=_data_of(teacher.model.config))
    if said.guide:
        guide = Guide.of(said.guide)
        check_guide(own, guide.model.config)
        teacher = replace(teacher, guide=replace(guide, model=guide.model.to(device)))
    return teacher, settled(config, own, teacher.sha256, teacher.has_null_class, teacher.guide.sha256 if teacher.guide else "")


def _needs_teacher(config: DistillConfig) -> list[str]:
    """Raises ConfigError where no teacher is named."""
    if not config.teacher.name:
        raise ConfigError("a student needs a teacher: name a file, a run folder or a hub repository with --teacher")
    return []


def _data_of(teacher: ModelConfig) -> str:
    """The name of the teacher's data: its own, or where they lay if that name now means something else."""
    path = str(teacher.training.get("data", {}).get("place", ""))
    return teacher.data if not path or locate(teacher.data) == path else path


def check_same_data(teacher: Teacher, data: DataSettings, dataset: Dataset | LatentDataset) -> None:
    """Raises ConfigError where the data that the teacher's file names are not those that it was trained on any more."""
    known = teacher.model.config.training.get("data", {}).get("fingerprint")
    then = teacher.model.config.training.get("config", {}).get("data", {})
    if known and known != dataset.fingerprint and all(then.get(key, getattr(DataSettings(), key)) == getattr(data, key) for key in (*READING, *CAPTIONS)):
        raise ConfigError(
            f"the teacher {teacher.name} was trained on {teacher.model.config.data}, and {dataset.path} now holds other images or "
            "labels: bring back those of the training, or say with --data what to distil on"
        )


def student_model_config(config: DistillConfig, teacher: Teacher, shape: DataShape | None = None) -> ModelConfig:
    """What the student's file says of itself. config: settled."""
    own, student, loss = teacher.model.config, config.student, config.loss
    names, counts = own.class_names, own.class_counts
    if shape is not None and own.num_classes:
        names, counts = names or shape.class_names, counts or shape.class_counts
    origin = {
        "teacher": teacher.name, "sha256": teacher.sha256, "method": loss.method, "steps": student.steps,
        "guidance": config.teacher.guidance,
        **({"guidance_interval": list(config.teacher.guidance_interval)} if config.teacher.guidance_interval else {}),
        **({"guidance_range": list(student.guidance_range)} if student.guidance_range else {}),
        **({"guide": config.teacher.guide, "guide_sha256": config.teacher.guide_sha256} if config.teacher.guide else {}),
    }  # fmt: skip
    if student.lora:
        origin["lora"] = student.lora
    if CONVERTED in own.training:
        origin[CONVERTED] = own.training[CONVERTED]
    schedule, denoiser = student_schedule(student, own.denoiser, own.sampling.schedule), student_denoiser(student, own)
    grid, ends = "schedule", student.guidance_range
    if own.text is not None and own.text.pipeline and denoiser.precondition == "schedule" and schedule.name == "fm":
        grid, denoiser = "flow", replace(denoiser, round_time=True)  # the times of the scheduler that samples it in diffusers
    model_config = replace(
        own,
        augment_dim=0,  # a student draws images as they are
        network=student_network(student, own.network),
        denoiser=denoiser,
        class_names=names,
        class_counts=counts,
        captions=own.captions or (shape.captions if shape is not None and own.text is not None else None),
        data=config.data.name,
        sampling=SamplingSettings(
            sampler="ancestral",
            grid=grid,
            guidance=student_guidance(config, own) if ends else 1.0,
            guidance_range=ends,
            steps=student.steps,
            schedule=schedule,
            stochasticity=loss.stochasticity if student.stochasticity is None else student.stochasticity,
            student_steps=student.steps,
        ),
        training={DISTILLED: origin},
    )
    check_defaults(model_config)
    return model_config


def student_guidance(config: DistillConfig, teacher: ModelConfig) -> float:
    """w of the teacher that the student's images are compared with; of a student that is told w the teacher's usual one."""
    ends = config.student.guidance_range
    return min(max(teacher.sampling.guidance, ends[0]), ends[1]) if ends else config.teacher.guidance


def copy_of(teacher: Denoiser, config: ModelConfig) -> Denoiser:
    """A denoiser of this config that begins as the teacher: with the same weights, those of further inputs being zero.

    The teacher's augmentation input is left out where the config has none: it has no bias and is never given, so outputs are equal.
    """
    model = Denoiser(config).to(teacher.device)
    state = teacher.network.state_dict()
    if not config.augment_dim:
        state = without_augment(state)
    state = with_second_time(widen_input(state, model.network), model.network)
    model.network.load_state_dict(with_guidance_input(state, model.network))
    return model.eval()  # torch's own dropout stays off; a student's, which has keys, does not look at the mode


def distill_task(
    config: DistillConfig,
    teacher: Teacher,
    model_config: ModelConfig,
    dataset: Dataset | LatentDataset,
    reporter: Reporter,
    accelerator: Any,
) -> Task:
    """The student, and of the alternating method the auxiliary: copies of the teacher, or adapters in it. config: settled."""
    own = teacher.model.config
    plain = replace(own, denoiser=replace(own.denoiser, clip=False))  # what is clipped is no mean
    alternating = config.loss.method == "alternating"
    lora, hooks = None, {}
    if config.student.lora:
        lora = LoraNetworks(teacher.model.network, config.student, accelerator, half_base(config))
        reporter.note(lora.description)
        teacher = replace(teacher, model=Denoiser(own, lora.base.itself()).eval())
        hooks = {"save": lora.save, "averaged": lora.averaged(model_config)}
    network, guide = teacher.model.network, teacher.guide and teacher.guide.model
    if not alternating and config.run.gradient_checkpointing:  # its gradient is taken as well
        checkpoint_blocks(network)
    if alternating and is_sharded(accelerator):  # the loop shards them; the comparison needs whole ones
        network, guide = copy.deepcopy((network, guide))
        for whole in teacher.networks:
            whole.to("cpu")
    student = copy_of(teacher.model, model_config) if lora is None else Denoiser(model_config, lora.student).eval()
    frozen = Denoiser(plain, network if lora is None or alternating else lora.auxiliary).eval()
    frozen = frozen if guide is None else AutoguidedDenoiser(frozen, guide)
    schedule = model_config.sampling.schedule
    matching = Matching(
        student, frozen, schedule, config.loss, Inputs(config.data, config.train.seed, own.latents),
        steps=config.student.steps, guidance=config.teacher.guidance, seed=config.train.seed,
        half_teacher=config.train.frozen_precision == "half", guidance_range=config.student.guidance_range,
        guidance_interval=config.teacher.guidance_interval, rollouts=_rollouts(config, model_config),
    )  # fmt: skip
    comparison = Comparison(teacher, config, schedule, dataset, reporter, accelerator.device)
    shown = {
        "model_config": model_config, "picture": comparison.picture, "finish": comparison.finish,
        "levels": matching.edges.exp().tolist(), **hooks,
    }  # fmt: skip
    if alternating:
        told = replace(plain.denoiser, told_guidance=model_config.denoiser.told_guidance)
        of_auxiliary = replace(plain, augment_dim=0, denoiser=told, network=student_network(replace(config.student, dropout=0.0), own.network))
        auxiliary = copy_of(teacher.model, of_auxiliary) if lora is None else Denoiser(of_auxiliary, lora.auxiliary).eval()
        edges = ", ".join(f"{edge:.3g}" for edge in matching.edges.exp().tolist())
        reporter.note(
            f"moment_gap should fall (by_noise: sigma {edges}); student_loss has no lower bound and is no measure of it"
        )
        networks = (network,) if guide is None else (network, guide.network)
        own_turn = partial(turn, auxiliary_updates=config.loss.auxiliary_updates)
        return Task(alternating_parts(matching, auxiliary), turn=own_turn, frozen=networks, **shown)
    derivative, note = choose_derivative(matching)
    if note is not None:
        reporter.note(note)
    moments = second_moments(config, teacher, matching, dataset, reporter, accelerator)
    if config.run.compile:  # here, as the loop would shard them too, and products with directions need whole ones
        for whole in teacher.networks:
            compile_network(whole)
    return Task(instant_parts(matching, derivative, moments, accelerator), group_size=GROUP, **shown)


def half_base(config: DistillConfig) -> torch.dtype | None:
    """What the weights under adapters are kept in; None: float32."""
    chosen = config.student.lora and config.train.frozen_precision == "half"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[config.train.precision] if chosen else None


def _rollouts(config: DistillConfig, model_config: ModelConfig) -> Rollouts | None:
    student = config.student
    if student.rollouts == 0:
        return None
    if model_config.sampling.grid != "schedule":
        raise ConfigError("student.rollouts is not for students of flow pipelines, whose sampler has a grid of its own: leave it out")
    stochasticity = model_config.sampling.stochasticity
    return Rollouts(student.rollouts, student.rollouts_after, student.steps, stochasticity, config.train.seed)


def second_moments(
    config: DistillConfig, teacher: Teacher, matching: Matching, dataset: Dataset | LatentDataset, reporter: Reporter,
    accelerator: Any,
) -> dict | None:  # fmt: skip
    """Those of Adam that the preconditioner takes; None for the identity."""
    if config.loss.preconditioner == "identity":
        return None
    moments = None if config.student.lora else adam_second_moments(teacher)  # those are of the weights, not of adapters
    if moments is not None:
        reporter.note(f"preconditioner: Adam's second moments, from the checkpoint of {teacher.name}")
        return moments
    half = config.train.batch_size // 2
    reporter.note(
        f"preconditioner: second moments of these parameters are not at hand, so they are collected from {MOMENT_BATCHES} batches of "
        f"{half} images"
    )
    # `auto` is found with what is collected here
    at_most = MOMENT_PASS if config.run.batch_per_device == "auto" else config.run.batch_per_device
    with reporter.work("second moments", MOMENT_BATCHES, "batches") as update:
        return data_second_moments(matching, dataset, accelerator, half, at_most, update)


def description(config: DistillConfig, teacher: Teacher) -> str:
    """What is about to be done, and what of it the teacher was not trained for."""
    own = teacher.model.config
    steps, schedule = config.student.steps, student_schedule(config.student, own.denoiser, own.sampling.schedule)
    shifted = "" if schedule.shift == 1 else f", shifted by {schedule.shift:g}"
    text = f"teacher: {teacher.name} (sha256 {teacher.sha256[:12]}); student: {steps} step{'s' * (steps > 1)} on {schedule.name}"
    text += shifted
    if ends := config.student.guidance_range:
        text += f", guidance w = {ends[0]:g} to {ends[1]:g} learned, u + w (c - u)"
    if config.teacher.guidance != 1:
        away = f"away from {config.teacher.guide}" if config.teacher.guide else "u + w (c - u)"
        text += f", guidance w = {config.teacher.guidance:g} learned, {away}"
    outside = range_note(teacher.model.settings, schedule)
    return text if outside is None else f"{text}; warning: {outside}"


class Comparison:
    """Teacher and student side by side: the table in results.json and the pictures."""

    def __init__(self, teacher, config, schedule, dataset, reporter, device) -> None:
        self.networks, self.device = teacher.networks, device
        rounded = half_base(config)  # whose scores are none of the teacher's own
        self.teacher = teacher.sha256 if rounded is None else f"{teacher.sha256} {rounded}"
        teacher_steps = config.run.teacher_steps
        steps, guidance = config.student.steps, student_guidance(config, teacher.model.config)
        self.dataset, self.work, self.seed, self.steps = dataset, reporter.work, config.train.seed, steps
        interval = config.teacher.guidance_interval
        self.few = report.few_step_ways(teacher.model, schedule, steps, guidance, interval)
        self.many = report.many_step_ways(teacher.model, schedule, teacher_steps, guidance, interval) if teacher_steps else []
        self.few, self.many = ([replace(way, guide=teacher.guide) for way in ways] for ways in (self.few, self.many))
        self.best = 0  # of `many`
        self.scores: dict[str, str] = {}  # of the teacher's ways, by caption, once they are measured
        self.shown: dict[str, Any] = {}  # the teacher's images, which are always the same ones

    @contextlib.contextmanager
    def _teacher_at_hand(self) -> Iterator[None]:
        """The teacher and its guide on the device: beside networks that are sharded they rest on the CPU."""
        rests = next(self.networks[0].parameters()).device
        for network in self.networks:
            network.to(self.device)
        try:
            yield
        finally:
            for network in self.networks:
                network.to(rests)

    def finish(self, model: AnyModel, folder: Path, scorer: Scorer | None) -> dict[str, Any] | None:
        """The scores: the teacher in many steps, the teacher in k, the student in k."""
        if scorer is None or not self.many:
            return None
        with self._teacher_at_hand():
            many = report.measured(self.many, scorer, self.seed, self.teacher)
            self.best = report.best(many)
            self.scores = {way.caption: f"{scorer.name} {row.value:.3g}" for way, row in zip(self.many, many, strict=True)}
            few = [*self.few, report.Drawn("student", model, self.steps)]
            rest = report.measured(few, scorer, self.seed, self.teacher)
        self.scores |= {way.caption: f"{scorer.name} {row.value:.3g}" for way, row in zip(self.few, rest)}
        return {"comparison": {"figure": scorer.name, "best": self.best, "rows": report.as_table([*many, *rest])}}

    def picture(self, model: AnyModel, seed: int, scores: dict[str, str] = {}) -> Image.Image:
        """The best many-step teacher, the teacher in k steps as the student, and the student, from the same noise."""
        many = self.many[self.best : self.best + 1]
        ways = [*many, self.few[0], report.Drawn("student", model, self.steps)]
        with self._teacher_at_hand():
            return report.side_by_side(ways, self.dataset, seed, self.shown, scores | self.scores, self.work)


def _check(start: Start) -> None:
    check_data(start.source, start.dataset, start.reporter.note)
    if not start.asked.data.name:
        check_same_data(start.source, start.config.data, start.dataset)


def _task(start: Start) -> Task:
    start.reporter.note(description(start.config, start.source))
    for note in start.source.notes:
        start.reporter.note(f"teacher: {note}")
    return distill_task(start.config, start.source, start.model_config, start.dataset, start.reporter, start.accelerator)


def _data_of_teacher(table: dict[str, Any]) -> tuple[str, int | None]:
    """The data that the teacher's file names, and the size of its images; nothing of another project's file, which is not read."""
    try:
        model = read_config(find_model(str(table.get("teacher", {}).get("name", ""))))
    except MmgenError:
        return "", None
    return model.data + " with captions" * (model.text is not None), model.resolution


def _work(config: DistillConfig) -> tuple[Work, int]:
    """A teacher with guidance is evaluated twice; its guide is taken to be as large as it. A state of the student's own takes (k - 1) / 2 of its steps on average."""
    alternating, student = config.loss.method == "alternating", config.student
    guided = bool(student.guidance_range) or config.teacher.guidance not in (0, 1)
    work = ALTERNATING if alternating else INSTANT
    work = replace(work, forward=work.forward + student.rollouts * (student.steps - 1) / 2)
    if config.teacher.guide:
        work = replace(work, forward=work.forward + 1, frozen=work.frozen + 1)
    elif guided:
        forward, backward = (1.0, 0.0) if alternating else (1.5, 0.5)  # what `cost` counts for the teacher
        work = replace(work, forward=work.forward + forward, backward=work.backward + backward)
    return replace(work, back=1 if student.lora else 2), 1 if alternating else GROUP


def _trains(config: DistillConfig) -> list[tuple[str, Adapters | None]]:
    """What is trained, and what could be instead."""
    rank, half = config.student.lora or USUAL_RANK, half_base(config) is not None
    lora = Adapters((rank, config.student.lora_auxiliary or rank), config.student.lora_targets)
    ways = [("all weights", None), (f"LoRA of rank {rank}", lora)]
    if config.train.precision in ("bf16", "fp16") and config.loss.method == "alternating":
        ways.append((f"LoRA of rank {rank}, base in half precision", replace(lora, half=True)))
    chosen = ways[1 + half if config.student.lora else 0]
    return [chosen, *(way for way in ways if way is not chosen)]


TRAINING = Training(
    config=DistillConfig,
    resolve=resolve,
    model_config=lambda config, shape, source: student_model_config(config, source, shape),
    task=_task,
    work=_work,
    trains=_trains,
    find=find_teacher,
    data=lambda config: replace(config.data, num_classes=None),  # `check_data` compares the classes with the teacher's
    check=_check,
    notes=_needs_teacher,
    data_name=_data_of_teacher,
    watch=lambda config: "moment_gap" if config.loss.method == "alternating" else "loss",
)
