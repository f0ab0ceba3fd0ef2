"""The parts of a pipeline of diffusers around its network: text encoders and autoencoder."""

from __future__ import annotations

from dataclasses import dataclass

from ..models.latents import LatentSettings
from ..networks.text import TextSettings
from ..system.files import at_home
from .pipeline_text import read_index, text_folder
from .pipeline_vae import pipeline_latents
from .text import described


@dataclass(frozen=True)
class PipelineParts:
    text: TextSettings  # described
    latents: LatentSettings  # with the pipeline's own scaling


def pipeline_parts(name: str, resolution: int) -> PipelineParts:
    """Of the pipeline in a folder or repository, for images of this size. Raises ModelError with one sentence for what is missing."""
    folder = text_folder(name)
    path = str(at_home(name).absolute()) if at_home(name).exists() else name.removeprefix("hf://")
    kind = read_index(folder, name)["_class_name"]
    return PipelineParts(described(TextSettings(encoder=path, pipeline=kind)), pipeline_latents(folder, path, resolution))
