"""mmgen: few-step image generators by moment matching.

>>> import mmgen
>>> run = mmgen.train_imm(data="digits", out="runs/digits-imm")
>>> samples = run.load().sample(64, steps=2, output="pil")

Importing it loads no torch: the functions here do, when they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import in_python

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from .formats.convert import Written
    from .methods.python import Run
    from .metrics.results import Report
    from .sampling.loading import Denoiser, FlowModel
    from .sampling.pipeline import Pipeline

    PathOrName = str | os.PathLike

__version__ = "0.2.0.dev0"
__all__ = [
    "Labels", "__version__", "convert", "distill", "fid", "load", "neon", "pipeline", "train_imm", "train_teacher",
]  # fmt: skip


def train_imm(
    data: PathOrName | None = None,
    *,
    preset: str | None = None,
    settings: Mapping[str, Any] | None = None,
    out: PathOrName | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = True,
    device: str = "auto",
    max_time: str | None = None,
) -> Run:
    """Trains, or resumes, a one- to eight-step generator with Inductive Moment Matching, as `mmgen train-imm` does.

    Args:
        data: a folder of images, a hub dataset ...; None: the digits that come with mmgen.
        preset: the recipe; None: by the data.
        settings: any setting, {"loss.k": 12, "train.max_images": 64_000} or {"loss": {"k": 12}}.
        out: the run's folder; None: runs/PRESET, with a suffix where settings differ.
        callback: called with every line of the log, such as {"images": 51200, "loss": 0.31, ...}, and {"note": text}.
        progress: show a bar.
        device: auto (a GPU if any), cpu or cuda.
        max_time: finish after this long, such as "30m".

    Raises mmgen.errors.MmgenError, with one sentence, for whatever is wrong.

    >>> run = mmgen.train_imm(data="cifar10", settings={"train.max_images": 1_000_000})
    >>> run.folder, run.results["values"], run.load().sample(16).images
    """
    from .methods import IMM
    from .methods.python import train

    options = {"preset": preset, "settings": settings, "out": out, "callback": callback}
    return train(IMM, {"data.name": data}, progress=progress, device=device, max_time=max_time, **options)


def train_teacher(data: PathOrName | None = None, **options: Any) -> Run:
    """Trains, or resumes, a diffusion or flow-matching model, as `mmgen train-teacher` does.

    options: preset, settings, out, callback, progress, device and max_time, as of `train_imm`.

    >>> run = mmgen.train_teacher("photos/", settings={"train.max_images": 1_000_000})
    """
    from .methods import TEACHER
    from .methods.python import train

    return train(TEACHER, {"data.name": data}, **options)


def distill(teacher: PathOrName, *, steps: int | None = None, data: PathOrName | None = None, **options: Any) -> Run:
    """Distils a teacher into a student of few steps, as `mmgen distill` does.

    Args:
        teacher: a run folder, a model file, what `mmgen convert` reads, or a hub repository.
        steps: of the student; None: the preset's.
        data: None: what the teacher was trained on.
        options: preset, settings, out, callback, progress, device and max_time, as of `train_imm`.

    >>> run = mmgen.distill("runs/digits-teacher", steps=4, settings={"loss.method": "instant"})
    """
    from .methods import DISTILLATION
    from .methods.python import train

    return train(DISTILLATION, {"teacher.name": teacher, "student.steps": steps, "data.name": data}, **options)


def neon(model: PathOrName, *, weight: float = 1.0, **options: Any) -> Path:
    """Improves a trained model by training on its own samples and leading away from that, as `mmgen neon` does; the new model's file.

    options: num, steps, images, lr, ema, out, device and progress, as of the command. What is there already is not done again.

    >>> mmgen.load(mmgen.neon("runs/digits-imm", weight=0.5, lr=1e-4)).sample(16)
    """
    from .methods.python import improve

    return improve(model, weight=weight, **options)


def load(model: PathOrName, **options: Any) -> FlowModel | Denoiser:
    """Loads a model from a file, a run folder, a hub repository or another project's checkpoint: see `sampling.loading.load`.

    >>> samples = mmgen.load("runs/digits-imm").sample(64, steps=2, output="pil")
    """
    from .sampling.loading import load

    return load(model, **options)


def fid(samples: PathOrName | Sequence[PathOrName], **options: Any) -> Report:
    """Computes FID and other scores of images, or of a model's samples, as `mmgen fid` does: see `metrics.python.fid`.

    >>> mmgen.fid("samples/", ref="cifar10").scores
    {'fid10k': 12.3}
    """
    from .metrics.python import fid

    return fid(samples, **options)


@in_python()
def convert(source: PathOrName, out: PathOrName, *, to: str = "mmgen", weights: str = "ema", overwrite: bool = False, lora_only: bool = False,
            **options: Any) -> Written:  # fmt: skip
    """Converts a checkpoint of another project to mmgen's file, or back, as `mmgen convert` does.

    options: type, preset, precision, heads, num_classes, guide_all, of `formats.family.ConvertOptions`.

    >>> mmgen.convert("edm-cifar10-32x32-cond-vp.pkl", "edm-cifar10.safetensors").left_out
    """
    from .formats.convert import convert_file
    from .formats.family import ConvertOptions
    from .system.schema import from_keywords

    return convert_file(source, out, from_keywords(ConvertOptions, options, "option"), to=to, weights=weights, overwrite=overwrite, lora_only=lora_only)


def pipeline(model: FlowModel | Denoiser | PathOrName, **options: Any) -> Pipeline:
    """A model behind the interface of diffusers' pipelines: see `sampling.pipeline`.

    >>> mmgen.pipeline("runs/digits-imm")(class_labels=[3, 5], num_inference_steps=2).images
    """
    from .sampling.pipeline import pipeline

    return pipeline(model, **options)


def __getattr__(name: str) -> Any:
    """`mmgen.Labels`, the condition of a class-conditional model."""
    if name == "Labels":
        from .networks.conditions import Labels

        return Labels
    raise AttributeError(f"module 'mmgen' has no attribute {name!r}")
