"""A student by LoRA as weights that diffusers loads into its teacher's pipeline: `pipe.load_lora_weights(FOLDER)`."""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch import Tensor

from ..errors import ConfigError
from ..models.config import ModelConfig
from ..system.files import replacing_folder
from ..system.tensor_files import save_tensors
from .pipeline_export import scheduler_of
from .pipelines import PIPELINES, PREFIX

WEIGHTS = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
_WITHOUT = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")  # diffusers loads no LoRA weights into them


def write_lora(config: ModelConfig, state: dict[str, Tensor], folder: str | os.PathLike) -> None:
    """The weights, the scheduler that samples the student exactly and a README.md with the call, atomically. Raises ConfigError.

    config: of the student; state: its adapter, whose scale alpha / rank is 1, as diffusers takes it to be.
    """
    if config.text is None or not config.text.pipeline:
        raise ConfigError("--lora-only is for students of diffusers' text-to-image pipelines, and this is none: leave it out")
    name = config.text.pipeline
    if name in _WITHOUT:
        raise ConfigError(f"diffusers loads no LoRA weights into a {name}: leave out --lora-only, then the whole pipeline is written")
    scheduler, part = scheduler_of(config), PIPELINES[name].part
    tensors = {f"{part}.{key.removeprefix(PREFIX)}": value.contiguous() for key, value in state.items()}
    with replacing_folder(folder) as temporary:
        save_tensors(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / "scheduler").mkdir()
        (temporary / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(_card(config, scheduler["_class_name"], Path(folder).name), encoding="utf-8")


def _card(config: ModelConfig, scheduler: str, name: str) -> str:
    steps, base = config.sampling.student_steps, config.text.encoder
    return "\n".join([
        "---", "library_name: diffusers", "pipeline_tag: text-to-image", f"base_model: {base}", "tags: [lora]", "---", "", f"# {name}", "",
        f"LoRA weights that make {base} a student of {steps} step{'s' * (steps > 1)}, by moment matching "
        "([arXiv:2406.04103](https://arxiv.org/abs/2406.04103)), written by mmgen.", "",
        "```python", f"from diffusers import DiffusionPipeline, {scheduler}", "",
        f'pipe = DiffusionPipeline.from_pretrained("{base}")',
        f'pipe.scheduler = {scheduler}.from_pretrained("{name}", subfolder="scheduler")',
        f'pipe.load_lora_weights("{name}")',
        f'image = pipe("a red fox in snow", num_inference_steps={steps}, guidance_scale=1).images[0]', "```", "",
        "`guidance_scale=1` is needed: the teacher's guidance is built in. Negative prompts have no effect. "
        f"The scheduler in this folder samples the student exactly with {steps} step{'s' * (steps > 1)}; others do not.", "",
    ])  # fmt: skip
