"""A text-to-image model as the folder of a pipeline of diffusers: DiffusionPipeline.from_pretrained(FOLDER) draws as mmgen does.

The network is the model's; autoencoder, text encoders and tokenizers are copied from the pipeline that it was made of; a student has
the scheduler that samples it exactly, and a README.md with the call.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from ..encoders.pipeline_text import LENGTHS, text_sha256
from ..encoders.pipeline_vae import vae_config
from ..encoders.vae import WEIGHTS
from ..errors import ModelError
from ..models.config import ModelConfig
from ..system.files import read_json, replacing_folder, sha256_of
from ..system.tensor_files import save_tensors
from .diffusers_scheduler import write_flow, write_scheduler
from .model_folders import BESIDE, locate
from .pipelines import PIPELINES, original_state

_VERSION = "0.32.0"  # of diffusers, the oldest that has all these pipelines
_SCHEDULER = "scheduler"


def scheduler_of(config: ModelConfig) -> dict[str, Any] | None:
    """scheduler_config.json of a student; None for a teacher, which keeps its own. Raises ConfigError for what diffusers would sample
    otherwise than mmgen."""
    if config.sampling.student_steps is None:
        return None
    if config.denoiser.precondition == "schedule":
        return write_flow(config.sampling, config.denoiser)
    return write_scheduler(config.denoiser, config.sampling, "DDPMScheduler")


def write_pipeline(config: ModelConfig, state: dict[str, Tensor], folder: str | os.PathLike) -> None:
    """Writes the folder, atomically. Raises ConfigError as `scheduler_of`, and ModelError where the pipeline that the model was made of
    is not there or has changed, before anything is written."""
    scheduler, source = scheduler_of(config), source_of(config)
    index = read_json(source / "model_index.json")
    part = PIPELINES[config.text.pipeline].part
    copied = [path for path in sorted(source.iterdir()) if path.is_dir() and path.name in index and path.name != part]
    copied = [path for path in copied if scheduler is None or path.name != _SCHEDULER]
    if scheduler is not None:
        index[_SCHEDULER] = ["diffusers", scheduler["_class_name"]]
    network = {"_class_name": config.network.model, "_diffusers_version": _VERSION, **json.loads(config.network.config)}
    with replacing_folder(folder) as temporary:
        _write_json(temporary / "model_index.json", index)
        _write_json(temporary / part / "config.json", network)
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in original_state(config, state).items()}
        save_tensors(tensors, temporary / part / WEIGHTS, metadata={"format": "pt"})
        if scheduler is not None:
            _write_json(temporary / _SCHEDULER / "scheduler_config.json", {**scheduler, "_diffusers_version": _VERSION})
        for path in copied:
            _copy(path, temporary / path.name)
        (temporary / "README.md").write_text(card(config, Path(folder).name), encoding="utf-8")


def source_of(config: ModelConfig) -> Path:
    """The folder of the pipeline that a model was made of, or the one in $MMGEN_ENCODER. Raises ModelError where it has changed."""
    path = os.environ.get("MMGEN_ENCODER") or config.text.encoder
    hint = "the model's text encoders and autoencoder are copied from there; $MMGEN_ENCODER may name another place of it"
    try:
        source = locate(path)
        if not source.is_dir():
            raise ModelError(f"{path} is no folder of a pipeline")
        texts, name = text_sha256(source), config.latents.vae
        vae_config(source, str(path))
        decoder = sha256_of(source / "vae" / WEIGHTS)
    except ModelError as error:
        raise ModelError(f"{error}; {hint}") from error
    for what, found, wanted in (("text encoders", texts, config.text.sha256), ("autoencoder", decoder, config.latents.vae_sha256)):
        if wanted and found != wanted:
            raise ModelError(f"{path} has other {what} than the model was trained with ({name}): bring those back; {hint}")
    return source


def card(config: ModelConfig, name: str) -> str:
    """README.md: what it is, and the exact call."""
    sampling, side = config.sampling, config.latents.resolution
    steps, told = sampling.student_steps, sampling.guidance_range
    usual = PIPELINES[config.text.pipeline].guidance
    w = f"{sampling.guidance:g}" if told or steps is None else "1"
    arguments = [f"num_inference_steps={steps or 50}", f"guidance_scale={w}", *_arguments(config)]
    lines = [
        "---", "library_name: diffusers", "pipeline_tag: text-to-image", "---", "", f"# {name}", "",
        f"A {config.text.pipeline} for {side} x {side} images, written by mmgen from `{config.text.encoder}`.",
        "" if steps is None else f"Its network is a student of {steps} step{'s' * (steps > 1)}, by moment matching "
        "([arXiv:2406.04103](https://arxiv.org/abs/2406.04103)).",
        "", "```python", "from diffusers import DiffusionPipeline", "", f'pipe = DiffusionPipeline.from_pretrained("{name}")',
        f'image = pipe("a red fox in snow", {", ".join(arguments)}).images[0]', "```", "",
    ]  # fmt: skip
    if steps is not None and told:
        lines += [
            f"`guidance_scale` is told to the network and costs nothing: any from {told[0]:g} to {told[1]:g}. Negative prompts have no "
            "effect.",
        ]  # fmt: skip
    elif steps is not None:
        lines += [
            "`guidance_scale=1` is needed: the teacher's guidance is built in. The pipeline's default "
            f"({usual:g}) would guide a second time, evaluate the network twice and give other, oversaturated images. Negative prompts "
            "have no effect.",
        ]  # fmt: skip
    if steps is not None:
        lines += [f"The scheduler in this folder samples the student exactly with {steps} steps; others do not."]
    return "\n".join(lines) + "\n"


def _arguments(config: ModelConfig) -> list[str]:
    """What the call needs beside steps and guidance, where the model is not as the pipeline has it by default."""
    name, side = config.text.pipeline, config.latents.resolution
    found = [f"height={side}", f"width={side}"] if name == "SanaPipeline" and side != 1024 else []
    if name in ("PixArtAlphaPipeline", "PixArtSigmaPipeline", "SanaPipeline") and config.text.length != LENGTHS[name]:
        found.append(f"max_sequence_length={config.text.length}")
    return found


def _copy(source: Path, target: Path) -> None:
    """A part's files, links followed; weights a second time, in half precision or another format, stay behind."""
    files = [path for path in sorted(source.iterdir()) if path.is_file()]
    whole = any(path.name.endswith((".safetensors", ".safetensors.index.json")) and not BESIDE.search(path.name) for path in files)
    target.mkdir()
    for path in files:
        if not (whole and BESIDE.search(path.name)):
            shutil.copyfile(path, target / path.name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
