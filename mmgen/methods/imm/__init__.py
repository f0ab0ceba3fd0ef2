"""Inductive Moment Matching (Zhou et al., arXiv:2503.07565): a one- to eight-step generator from images, in one stage."""

from __future__ import annotations

from ..method import Method, Option, Training


def _training() -> Training:
    from .objective import TRAINING

    return TRAINING


IMM = Method(
    name="train-imm",
    help="""Train a one- to eight-step generator with Inductive Moment Matching (arXiv:2503.07565).

    Without --data it trains on the 1,797 handwritten digits that come with mmgen, in minutes. The same command resumes an
    interrupted run. On several GPUs: accelerate launch -m mmgen train-imm ...

    Example: mmgen train-imm --data cifar10 --max-time 30m
    """,
    training=_training,
    options=(
        Option("teacher", "teacher.name", str, "Denoiser to distil, for a consistency model.", "MODEL",
               is_path=True, group="Images"),
        Option("text_encoder", "text.encoder", str, "Frozen encoder (transformers) of --text.", "FOLDER", is_path=True, group="Images"),
    ),
    next_commands=("mmgen sample {folder} --steps 1,2,4 --num 64 --out samples/",),
)
