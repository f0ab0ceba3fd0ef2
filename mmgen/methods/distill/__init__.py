"""Moment matching distillation (Salimans et al., arXiv:2406.04103): a few-step student of a diffusion or flow teacher."""

from __future__ import annotations

from ..method import Method, Option, Training

_FACTS = "Teacher of another project (defaults: as its file says)"


def _training() -> Training:
    from .method import TRAINING

    return TRAINING


DISTILLATION = Method(
    name="distill",
    help="""Distil a diffusion or flow-matching teacher into a student of 1 to 8 steps (arXiv:2406.04103).

    The student starts as a copy of the teacher. At the end, a table compares the teacher at many and at few steps with the
    student. The same command resumes an interrupted run.

    Example: mmgen distill --teacher runs/digits-teacher --steps 8

    Another project's teacher:

        mmgen distill --teacher edm-cifar10-32x32-cond-vp.pkl --data cifar10
    """,
    training=_training,
    next_commands=("mmgen sample {folder} --num 64 --out samples/",),
    heading="Teacher and student (defaults: the preset's)",
    options=(
        Option("teacher", "teacher.name", str, "A run folder, a model file, what `mmgen convert` reads, or a hub repository. Required.",
               "MODEL", is_path=True),
        Option("steps", "student.steps", int, "Number of steps of the student, 1 to 8."),
        Option("method", "loss.method", str,
               "alternating (algorithm 2: with an auxiliary denoiser) or instant (algorithm 3: with the teacher's Jacobian).",
               choices=("alternating", "instant")),
        Option("guidance", "teacher.guidance", float, "The teacher's guidance, baked in; 1 is none."),
        Option("guide", "teacher.guide", str, "Guide away from this worse version of it.", "MODEL", is_path=True),
        Option("posterior", "loss.posterior", str,
               "How samples are noised again: conditional (given z_t) or unconditional (ablation).",
               choices=("conditional", "unconditional")),
        Option("schedule", "student.schedule.name", str,
               "Noise schedule: fm, vp_cosine, ddpm_linear, edm or discrete. Default: the teacher's.",
               choices=("fm", "vp_cosine", "ddpm_linear", "edm", "discrete")),
        Option("lora", "student.lora", int,
               "Train LoRA adapters of this rank, such as 64, in place of all weights."),
        Option("shift", "student.shift", float, "Above 1: more of the steps at high noise, for 1 or 2 steps."),
        Option("dropout", "student.dropout", float, "Dropout of the student, also while sampling, for 1 or 2 steps."),
        Option("noise_channels", "student.noise_channels", int, "Extra input channels of noise, for 1 or 2 steps."),
        Option("teacher_steps", "run.teacher_steps", int,
               "Teacher evaluations in the final comparison; 0 for none. Default: 256."),
        Option("teacher_type", "teacher.type", str, "sit, dit or repa, where tensors do not tell.", group=_FACTS),
        Option("teacher_preset", "teacher.preset", str, "ADM: the published flags.", group=_FACTS),
        Option("teacher_heads", "teacher.heads", int, "DiT and its kin: attention heads.", group=_FACTS),
        Option("teacher_num_classes", "teacher.num_classes", int, "DiT and its kin: classes, without the null.", group=_FACTS),
        Option("data", "data.name", str, "As for `mmgen train-teacher`. Default: what the teacher was trained on.", "DATA", group="Images"),
    ),
    without=("resolution", "channels", "conditional", "text"),
)  # fmt: skip
