"""What diffusers' pipelines do in a call, and what mmgen does from the same noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from mmgen.models.denoiser import Denoiser
from mmgen.sampling.drawing import _NOISE, SampleSettings, _draw_batch, draw_condition, plan
from mmgen.system.random import keys, normal
from tiny_pipelines import call_options

COUNT = 2  # images of a call


@dataclass
class Step:
    t: torch.Tensor
    output: torch.Tensor  # of the network, guided
    z: torch.Tensor


def open_pipeline(folder: Any, dtype: torch.dtype = torch.float32) -> Any:
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(dtype)
    if type(pipe).__name__ == "SanaPipeline":
        pipe.text_encoder.float()  # in float64 Gemma's own mask makes NaN of what is padded
    return pipe


def noises(model: Denoiser, number: int, seed: int = 0) -> torch.Tensor:
    """What mmgen draws for images number 0 and 1 in step `number`; 0 is where sampling begins."""
    return normal(keys(seed, torch.arange(COUNT), _NOISE + number), model.image_shape, torch.float64)


def called(pipe: Any, kind: str, model: Denoiser, prompts: list[str], steps: int, **options: Any) -> tuple[torch.Tensor, list[Step]]:
    """Latents by the pipeline's own call from mmgen's noises, and what its scheduler was given in each step."""
    taken: list[Step] = []
    step = pipe.scheduler.step

    def recorded(output: torch.Tensor, t: Any, z: torch.Tensor, *args: Any, **more: Any) -> Any:
        taken.append(Step(torch.as_tensor(t), output, z))
        return step(output, t, z, *args, **more)

    drawn = iter(range(1, steps + 2))

    def noise(shape: Any, *args: Any, dtype: torch.dtype = torch.float32, **more: Any) -> torch.Tensor:
        return noises(model, next(drawn)).to(dtype)

    dtype = next((getattr(pipe, "unet", None) or pipe.transformer).parameters()).dtype
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ddpm", "dpmsolver_multistep"):
            patch.setattr(f"diffusers.schedulers.scheduling_{name}.randn_tensor", noise)
        patch.setattr(pipe.scheduler, "step", recorded)
        given = {"prompt": prompts, "latents": noises(model, 0).to(dtype), "num_inference_steps": steps, "output_type": "latent"}
        found = pipe(**given, **call_options(kind), **options).images
    return found, taken


def drawn_by_mmgen(model: Denoiser, prompts: list[str], **settings: Any) -> torch.Tensor:
    chosen = plan(model.config, SampleSettings(prompts=tuple(prompts), **settings))
    index = torch.arange(COUNT)
    return _draw_batch(model, chosen, index, draw_condition(model.config, chosen, index))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
