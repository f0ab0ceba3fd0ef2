"""The settings of `mmgen distill`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from .sections import (
    CAPTIONS, READING, DataSettings, OptimizerSettings, RunSettings, TrainSettings, build, check_shared, check_steps, require, require_positive,
)  # fmt: skip
from ..diffusion.preconditioning import DenoiserSettings, preconditioning
from ..errors import ConfigError
from ..losses.moment_matching import MomentSettings
from ..models.config import ModelConfig, is_conditional
from ..networks import NETWORKS, NetworkSettings
from ..networks.diffusers_text import told_guidance
from ..diffusion.schedules import ScheduleSettings
from ..system.schema import from_dict

# Adam as the paper has it (arXiv:2406.04103): no momentum, since the student's loss changes its direction with the auxiliary
_ADAM = OptimizerSettings(
    name="adam", lr=2e-6, beta1=0.0, beta2=0.99, eps=1e-12, warmup_images=1000 * 2048, decay="linear", grad_clip=1.0
)

MOST_RANK = 4096
_READING = (*READING, *CAPTIONS, "leave_out", "xflip")  # what a student takes over from its teacher
_UNSAID = DataSettings()


@dataclass(frozen=True)
class TeacherChoice:
    name: str = ""  # file, run folder or hub repository, as on the command line
    sha256: str = ""  # of its file, filled in: a run goes on with the same teacher only
    guidance: float = 1.0  # w of its classifier-free guidance, which the student learns to do without; 1: none
    guidance_interval: tuple[float, ...] = ()  # LOW, HIGH: the sigma at which it acts (2404.07724); none: everywhere
    guide: str = ""  # a worse version of the teacher, which guidance leads away from in place of the null (2406.02507)
    guide_sha256: str = ""  # of its file, filled in
    # Of another project's file, what it does not say, as for `mmgen convert`
    type: str | None = None
    preset: str | None = None
    heads: int | None = None
    num_classes: int | None = None


@dataclass(frozen=True)
class StudentSettings:
    steps: int = 8  # k, of its sampler
    schedule: ScheduleSettings | None = None  # unset: the teacher's own process
    shift: float = 1.0  # of that schedule: more than 1 has more of its steps at high noise (2606.30414 shifts for 2 steps)
    noise_channels: int = 0  # normal noise beside the image, as the student's own randomness (2603.20155; for 1 and 2 steps)
    dropout: float = 0.0  # of the student, also when sampling: likewise (2606.30414 has 0.1)
    rollouts: float = 0.0  # share of the images that begin at states of its own sampler, not at noised data (2605.18190 has such)
    rollouts_after: int = 0  # images of the training before the first of them
    lora: int = 0  # rank of the adapters that are trained in place of all weights (LoRA); 0: all weights
    lora_auxiliary: int = 0  # of the auxiliary's, or of the directions of the instant method; 0: as lora
    lora_targets: tuple[str, ...] = ()  # ends of the names of the layers that get adapters; none: see networks/lora.py
    # (least, largest) w that the student is told, one drawn for each image and given to the teacher, in place of teacher.guidance
    # (2210.03142, section 3.1). None given: w is fixed
    guidance_range: tuple[float, ...] = ()
    stochasticity: float | None = None  # when sampling, 1 DDPM's, 0 DDIM's; unset: that of its training, loss.stochasticity


@dataclass(frozen=True)
class DistillRunSettings(RunSettings):
    eval_steps: tuple[int, ...] = ()  # numbers of steps shown and measured; none: the student's
    teacher_steps: int = 256  # evaluations of the teacher at its best, for the table and picture at the end; 0: leave that out


@dataclass(frozen=True)
class DistillConfig:
    """All settings of `mmgen distill`, a section each."""

    teacher: TeacherChoice = TeacherChoice()
    student: StudentSettings = StudentSettings()
    loss: MomentSettings = MomentSettings()
    data: DataSettings = DataSettings(name="", label_dropout=0.0, caption_dropout=0.0)  # name unset: the data set that the teacher's file names
    optimizer: OptimizerSettings = _ADAM
    train: TrainSettings = TrainSettings(batch_size=2048, max_images=200_000 * 2048, ema_betas=())
    run: DistillRunSettings = DistillRunSettings()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def resolve(*tables: dict[str, Any]) -> DistillConfig:
    """One config from tables of rising precedence; what depends on other settings is filled in, what cannot be is refused."""
    config = build(DistillConfig, *tables)
    run = dataclasses.replace(config.run, eval_steps=config.run.eval_steps or (config.student.steps,))
    config = dataclasses.replace(config, run=run)
    check(config)
    return config


def check(config: DistillConfig) -> None:
    """Raises ConfigError for values that are impossible, alone or together."""
    student, loss, train = config.student, config.loss, config.train
    require_positive({
        "student.steps": student.steps, "student.shift": student.shift, "loss.sigma_data": loss.sigma_data,
        "loss.min_snr_gamma": loss.min_snr_gamma, "loss.stochasticity": loss.stochasticity,
    })  # fmt: skip
    check_steps(student.steps, "student.steps")  # before run.eval_steps, which has them where nothing else is said
    check_steps(max(config.run.teacher_steps, 1), "run.teacher_steps")
    check_shared(config)
    ends = config.teacher.guidance_interval
    require(
        not ends or (len(ends) == 2 and 0 <= ends[0] < ends[1]),
        f"teacher.guidance_interval must be [LOW, HIGH] with 0 <= LOW < HIGH (sigma), not {list(ends)}",
    )
    guides = config.teacher.guidance != 1 or student.guidance_range
    require(not ends or guides, "teacher.guidance_interval needs teacher.guidance: set both, or leave it out")
    if config.teacher.guide:
        require(config.teacher.guidance != 1, "teacher.guide needs teacher.guidance: set both, or leave it out")
    require(math.isfinite(config.teacher.guidance), f"teacher.guidance must be a number, not {config.teacher.guidance}")
    require(
        config.data.augment == 0,
        "data.augment is for teachers: a student learns to draw images as they are, leave it out",
    )
    require(loss.stochasticity <= 1, f"loss.stochasticity must be at most 1, not {loss.stochasticity}")
    require(
        loss.posterior == "conditional" or loss.stochasticity == 1,
        "loss.posterior unconditional has no stochasticity: leave loss.stochasticity at 1",
    )
    if ends := student.guidance_range:
        require(
            len(ends) == 2 and 0 < ends[0] < ends[1] < math.inf,
            f"student.guidance_range is the least and the largest w, such as [1, 8], not {list(ends)}",
        )
        w = config.teacher.guidance
        require(w == 1, f"student.guidance_range takes the place of teacher.guidance, which is {w:g} here or in the preset: set that to 1")
    require(student.noise_channels >= 0, f"student.noise_channels cannot be negative, and is {student.noise_channels}")
    require(0 <= student.dropout < 1, f"student.dropout must be at least 0 and less than 1, not {student.dropout}")
    require(0 <= student.rollouts <= 1, f"student.rollouts must be from 0 to 1, not {student.rollouts}")
    require(student.rollouts_after >= 0, f"student.rollouts_after cannot be negative, and is {student.rollouts_after}")
    require(loss.auxiliary_updates >= 1, f"loss.auxiliary_updates must be at least 1, not {loss.auxiliary_updates}")
    own = 1.0 if student.stochasticity is None else student.stochasticity
    require(0 <= own <= 1, f"student.stochasticity must be from 0 to 1, not {own}")
    _check_lora(config)
    instant = loss.method == "instant"
    require(
        not instant or train.frozen_precision == "full",
        "train.frozen_precision half is of the alternating method: the instant one takes a derivative of the teacher, which needs full precision",
    )
    for name, value, default in (("preconditioner", loss.preconditioner, "identity"), ("jvp", loss.jvp, "auto")):
        require(instant or value == default, f"loss.{name} is of the instant method: set loss.method=instant, or leave it out")
    require(not instant or loss.auxiliary_updates == 1, "loss.auxiliary_updates is of the alternating method: leave it out")
    require(
        not instant or train.batch_size % 2 == 0,
        f"train.batch_size {train.batch_size} must be even: the instant method takes two minibatches of half as many images",
    )
    require(
        not instant or config.run.batch_per_device == "auto" or config.run.batch_per_device > 1,
        "run.batch_per_device must be at least 2: the instant method has an image of each minibatch in a pass",
    )
    require(config.run.teacher_steps >= 0, f"run.teacher_steps cannot be negative, and is {config.run.teacher_steps}")


def _check_lora(config: DistillConfig) -> None:
    student = config.student
    for name in ("lora", "lora_auxiliary"):
        require(0 <= getattr(student, name) <= MOST_RANK, f"student.{name} must be a rank from 0 to {MOST_RANK}, not {getattr(student, name)}")
    if not student.lora:
        for name in ("lora_auxiliary", "lora_targets"):
            require(not getattr(student, name), f"student.{name} is for LoRA: set student.lora to a rank such as 64, or leave it out")
        return
    for name, used in (
        ("student.guidance_range", bool(student.guidance_range)), ("student.noise_channels", student.noise_channels > 0), ("student.dropout", student.dropout > 0),
        ("train.init", bool(config.train.init)), ("run.compile", config.run.compile),
    ):  # fmt: skip
        require(not used, f"{name} and student.lora exclude each other: leave one of them out")


def settled(
    config: DistillConfig, teacher: ModelConfig, sha256: str, has_null_class: bool, guide_sha256: str = ""
) -> DistillConfig:
    """The config with what follows from the teacher: its data set, its shape, whether there are classes.

    Raises ConfigError where the two contradict each other, or the teacher names no data set and the config neither.
    """
    data, guidance = config.data, config.teacher.guidance
    if not data.name:
        data = _as_the_teacher(data, teacher)
    name = data.name or teacher.data
    require(bool(name), "the teacher's file does not name the data set that it was trained on: give one with --data")
    for key, wanted, own in (
        ("resolution", data.resolution, teacher.resolution), ("channels", data.channels, teacher.channels),
    ):  # fmt: skip
        require(wanted in (None, own), f"data.{key} is {wanted}, but the teacher's is {own}: leave it out")
    if guidance != 1 and not config.teacher.guide:
        require(is_conditional(teacher), f"teacher.guidance {guidance:g} needs a class-conditional teacher or one of text, and this is neither")
        require(has_null_class, f"teacher.guidance {guidance:g} needs a teacher that knows images without a class or text too")
    if config.student.guidance_range:
        require(is_conditional(teacher), "student.guidance_range needs a class-conditional teacher or one of text, and this is neither")
        require(has_null_class, "student.guidance_range needs a teacher that knows images without a class or text too")
        require(
            _tells_itself(teacher.network) or "second_time" in NETWORKS[type(teacher.network)].supports,
            f"student.guidance_range: a network of kind {teacher.network.kind!r} has no input for w: give teacher.guidance",
        )
        student_network(config.student, teacher.network)  # which refuses where it must
    if data.label_dropout > 0:
        require(
            teacher.num_classes == 0 or has_null_class, "data.label_dropout needs a teacher that knows images without a class"
        )
    require(data.caption_dropout == 0 or has_null_class, "data.caption_dropout needs a teacher that knows images without a text")
    for key in () if teacher.text is not None else ("text", *CAPTIONS, "leave_out"):
        require(not getattr(data, key), f"data.{key} is of captions, and the teacher takes none: leave it out")
    if config.student.dropout > 0 and not hasattr(teacher.network, "dropout"):
        instead = "take student.noise_channels" if "extra_channels" in NETWORKS[type(teacher.network)].supports else "leave it out"
        raise ConfigError(f"student.dropout: a network of kind {teacher.network.kind!r} has none; {instead}")
    data = dataclasses.replace(
        data, name=name, resolution=teacher.resolution, channels=teacher.channels, conditional=teacher.num_classes > 0,
        num_classes=teacher.num_classes or None, text=teacher.text is not None,
    )  # fmt: skip
    return dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, sha256=sha256, guide_sha256=guide_sha256), data=data)


def _as_the_teacher(data: DataSettings, teacher: ModelConfig) -> DataSettings:
    """Which images of its data set the teacher was trained on, where nothing else is said: split, columns, mirror images."""
    own = from_dict(DataSettings, {k: v for k, v in teacher.training.get("config", {}).get("data", {}).items() if k in _READING})
    unsaid = [key for key in _READING if getattr(data, key) == getattr(_UNSAID, key)]
    return dataclasses.replace(data, **{key: getattr(own, key) for key in unsaid})


def student_schedule(
    student: StudentSettings, teacher: DenoiserSettings, usual: ScheduleSettings | None = None
) -> ScheduleSettings:
    """The schedule that a student is trained and sampled on; `discrete` has the teacher's timesteps where it has any.

    usual: the one that the teacher is sampled on where that is another than its process, as flows with a shift are.
    """
    process = preconditioning(teacher).process
    schedule = student.schedule or usual or process
    if schedule.name == process.name == "discrete":
        schedule = dataclasses.replace(process, shift=schedule.shift)
    return dataclasses.replace(schedule, shift=schedule.shift * student.shift)


def student_network(student: StudentSettings, network: NetworkSettings) -> NetworkSettings:
    """The teacher's network with the student's dropout, where it has any; of diffusers with an input for w where it is told one."""
    if student.guidance_range and _tells_itself(network):
        return told_guidance(network)
    return dataclasses.replace(network, dropout=student.dropout) if hasattr(network, "dropout") else network


def student_denoiser(student: StudentSettings, teacher: ModelConfig) -> DenoiserSettings:
    """The teacher's coordinates, x_hat not clipped, the student's own randomness, and whether it is told w."""
    return dataclasses.replace(
        teacher.denoiser, clip=False, noise_channels=student.noise_channels, noise_dropout=student.dropout > 0,
        told_guidance=bool(student.guidance_range) and not _tells_itself(teacher.network),
    )  # fmt: skip


def _tells_itself(network: NetworkSettings) -> bool:
    """Whether the network has, or lacks, an input for w by its own settings, as those of diffusers' pipelines do."""
    return hasattr(network, "takes_guidance")
