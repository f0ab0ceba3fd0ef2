"""What is asked of an encoding into latents: its settings, and whether a folder can be continued with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..encoders.pipeline import PipelineParts
from ..encoders.vae import IMM_MEAN, Vae
from ..errors import ConfigError, DataError, nearest
from ..system.files import TEMPORARY, read_json
from .cache import check_options
from .content import Watched
from .decoding import Plan
from .image_source import ImageSource
from .latent_texts import TextTask
from .latents import FORMAT, JOB, RECORD, is_latents, read_record, shard_file
from .resolve import locate

NORMALISATIONS = ("auto", "imm", "measure")
DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class EncodingSettings:
    """What `mmgen cache-latents` is asked for."""

    resolution: int | None = None  # side of the images after ADM's resize and crop; unset: their own
    dtype: Literal["float16", "float32"] = "float16"  # of the moments on disk
    xflip: bool = False  # each image's mirror image is encoded after it, as an image of its own
    normalisation: Literal["auto", "imm", "measure"] = "auto"  # auto: IMM's constants for its VAE, else measured
    on_corrupt: str = "stop"
    batch_size: int = 32  # images that the VAE sees at a time
    text: bool = False  # their captions are kept beside the latents

    def check(self) -> None:
        """Raises ConfigError where a setting is impossible."""
        check_options(self.resolution, None, self.on_corrupt)
        for name, value, valid in (("dtype", self.dtype, DTYPES), ("normalisation", self.normalisation, NORMALISATIONS)):
            if value not in valid:
                raise ConfigError(f"--{name} {value!r} is unknown: {nearest(value, valid)}")
        if self.batch_size < 1:
            raise ConfigError(f"--batch-size must be at least 1, not {self.batch_size}")


@dataclass(frozen=True)
class Task:
    """What all parts of an encoding share."""

    source: ImageSource
    name: str  # the name of the source
    reading: dict[str, Any]  # the split and columns that were asked for
    watched: Watched  # the source, hashed as it is read
    vae: Vae
    out: Path
    settings: EncodingSettings
    plan: Plan  # how images are decoded
    normalisation: str  # imm, measure or pipeline
    pipeline: PipelineParts | None = None  # that the latents are for
    texts: TextTask | None = None  # the captions

    @property
    def rows_per_image(self) -> int:
        return 2 if self.settings.xflip else 1

    @property
    def row(self) -> tuple[int, int, int]:
        """Shape of the moments of one image."""
        side = self.plan.resolution // self.vae.factor
        return self.vae.channels * (2 if self.vae.kind == "kl" else 1), side, side

    def file(self, shard: int) -> Path:
        return shard_file(self.out, shard)

    def digests_file(self, shard: int) -> Path:
        """SHA-256 of each of the shard's encoded images."""
        return self.file(shard).with_suffix(".sha256")

    def skipped_file(self, shard: int) -> Path:
        """[[number in the source, name], ...] of the shard's images that cannot be read, if there are any."""
        return self.file(shard).with_suffix(".skipped.json")


def choose_normalisation(vae: Vae, name: str, pipeline: PipelineParts | None) -> str:
    """imm, measure or pipeline. Raises ConfigError where IMM's constants cannot be this VAE's."""
    if pipeline is not None:
        if name != "auto":
            raise ConfigError(f"--normalisation {name}: latents for a pipeline have its own scaling, leave it out")
        return "pipeline"
    if name == "imm" and (vae.kind != "kl" or vae.channels != len(IMM_MEAN)):
        raise ConfigError(f"--normalisation imm is for Stable Diffusion's VAE of 4 channels, not {vae.source}: use measure")
    return name if name != "auto" else "imm" if vae.is_imm else "measure"


def job_of(task: Task) -> dict[str, Any]:
    """What must be the same for a folder to be continued."""
    source, settings = task.source, task.settings
    return {
        "format": FORMAT,
        "source": {"word": task.name, "place": locate(task.name), "reading": task.reading,
                   "fingerprint": source.fingerprint, "description": source.description},
        "images": source.length,
        "resolution": task.plan.resolution,
        "on_corrupt": settings.on_corrupt,
        "vae": task.vae.path,
        "vae_sha256": task.vae.sha256,
        "normalisation": task.normalisation,
        "dtype": settings.dtype,
        "xflip": settings.xflip,
        **({} if task.texts is None else {"text": task.texts.job(), "captions": True}),
    }


def is_whole(out: Path, job: dict[str, Any]) -> bool:
    """Whether all is done already. Raises DataError where the folder holds something else."""
    if not is_latents(out):
        if out.exists() and (not out.is_dir() or any(not p.name.startswith(TEMPORARY) for p in out.iterdir())):
            raise DataError(f"{out} holds something else than latents: give another --out")
        return False
    whole = (out / RECORD).is_file()
    try:
        found = read_record(out)["job"] if whole else read_json(out / JOB)
        old, new = ({**one, "source": one["source"]["fingerprint"], "vae": ""} for one in (found, job))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{out} holds a damaged {JOB} ({error!r}): delete the folder, or give another --out") from error
    for key in {**old, **new}:
        if old.get(key) != new.get(key):
            if key in ("text", "captions"):
                raise DataError(f"{out} holds latents with other texts, or those of another pipeline: give another --out")
            if key == "vae_sha256":
                raise DataError(f"{out} holds latents of another VAE than {job['vae']}: give another --out")
            shown = ("other images", "these") if key == "source" else (old.get(key), new.get(key))
            raise DataError(f"{out} holds latents with {key} = {shown[0]}, not {shown[1]}: give another --out")
    return whole
