"""The many-step teacher: a denoiser, diffusion or flow matching, that `mmgen distill` makes few-step students of."""

from __future__ import annotations

from ..method import Method, Option, Training


def _training() -> Training:
    from .objective import TRAINING

    return TRAINING


TEACHER = Method(
    name="train-teacher",
    help="""Train a diffusion or flow-matching model: a teacher for `mmgen distill`.

    Without --data it trains on the 1,797 handwritten digits that come with mmgen, in minutes. The same command resumes an
    interrupted run. Prediction, schedule and weighting are settings: --set denoiser.prediction=eps --set
    denoiser.schedule.name=ddpm_linear --set loss.weighting=min_snr.

    Example: mmgen train-teacher --data cifar10 --max-time 8h
    """,
    training=_training,
    options=(
        Option("text_encoder", "text.encoder", str, "Frozen encoder (transformers) of --text.", "FOLDER", is_path=True, group="Images"),
    ),
    next_commands=("mmgen sample {folder} --num 64 --out samples/", "mmgen distill --teacher {folder} --steps 8"),
)
