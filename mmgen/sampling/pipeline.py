"""`mmgen.pipeline(model)`: IMM models and students behind the interface of diffusers' pipelines, without diffusers.

>>> pipe = mmgen.pipeline("runs/digits-imm")
>>> pipe(class_labels=[3, 5], num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0].save("3.png")
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import ConfigError, in_python
from ..models.build import AnyModel
from ..models.files import MODEL_FILE, save_model
from ..report.model_card import model_card
from ..report.push import CARD, CONVERTED, Pushed, push
from .drawing import SampleSettings, draw
from .loading import load
from .prompts import checked

OUTPUTS = ("pil", "np", "pt")


@dataclass
class PipelineOutput:
    """As diffusers': `images` is a list of PIL images, float32 [N, H, W, C] from 0 to 1, or float32 [N, C, H, W]."""

    images: list[Image.Image] | np.ndarray | torch.Tensor

    def __getitem__(self, i: int) -> Any:
        return (self.images,)[i]


class Pipeline:
    """Draws images in few steps. Made by `pipeline`."""

    def __init__(self, model: AnyModel) -> None:
        self.model = model

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    def to(self, device: torch.device | str) -> Pipeline:
        self.model.to(device)
        return self

    @in_python()
    def __call__(
        self,
        batch_size: int | None = None,  # how many images; None: one, or one for each class label or prompt
        num_inference_steps: int | None = None,  # None: the model's own
        *,
        class_labels: int | str | Sequence[int | str] | None = None,  # numbers or names; None: as in the training data
        prompt: str | Sequence[str] | None = None,  # of a model of text: what to draw, in turn; None: captions of its training data
        negative_prompt: str | None = None,  # of a model of text with guidance
        guidance_scale: float | None = None,  # w; None: the model's own
        generator: torch.Generator | int | None = None,  # or a seed; None: other images at every call
        output_type: str = "pil",  # or "np", "pt"
        return_dict: bool = True,  # False: a tuple of the images
        callback: Callable[[float], None] | None = None,  # called with the number of images drawn so far
        **settings: Any,  # of `SampleSettings`: sampler, grid, churn ...
    ) -> PipelineOutput | tuple:
        """Raises ConfigError for what does not suit the model."""
        if output_type not in OUTPUTS:
            raise ConfigError(f"output_type {output_type!r} is not possible: {', '.join(OUTPUTS)}")
        classes: Any = "random"
        if class_labels is not None:
            labels = [class_labels] if isinstance(class_labels, int | str) else list(class_labels)
            classes, batch_size = labels, len(labels) if batch_size is None else batch_size
        prompts = () if prompt is None else checked([prompt] if isinstance(prompt, str) else prompt, "prompt")
        if prompts and batch_size is None:
            batch_size = len(prompts)
        count = 1 if batch_size is None else batch_size
        if not isinstance(count, int) or count < 1:
            raise ConfigError(f"batch_size must be a whole number of at least 1, not {count!r}")
        chosen = SampleSettings(
            steps=num_inference_steps, seed=_seed(generator), classes=classes, guidance=guidance_scale,
            prompts=prompts, negative=(negative_prompt or "").strip(), **settings,
        )
        images = draw(self.model, chosen, range(count), callback)[0]
        shown = _as(images, output_type)
        return PipelineOutput(shown) if return_dict else (shown,)

    def save_pretrained(self, folder: str | os.PathLike, push_to_hub: bool = False, repo_id: str | None = None, **more: Any) -> None:
        """Writes model.safetensors, which holds all settings, and a model card, for `mmgen.load` and `mmgen.pipeline`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(folder / MODEL_FILE, self.config, self.model.network.state_dict())
        if not (folder / CARD).exists():
            (folder / CARD).write_text(model_card(self.config, self.config.training.get(CONVERTED, {})), encoding="utf-8")
        if push_to_hub:
            push(folder, repo_id or folder.resolve().name, **more)

    def push_to_hub(self, repo_id: str, *, private: bool = False, commit_message: str | None = None) -> Pushed:
        """Uploads the model and its card, as `mmgen push` does."""
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            save_model(Path(folder) / MODEL_FILE, self.config, self.model.network.state_dict())
            return push(folder, repo_id, private=private, message=commit_message)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **options: Any) -> Pipeline:
        return cls(load(path, **options))


def pipeline(model: AnyModel | str | os.PathLike, **options: Any) -> Pipeline:
    """A pipeline of a loaded model, or of whatever `mmgen.load` opens (options: ema, device)."""
    return Pipeline.from_pretrained(model, **options) if isinstance(model, str | os.PathLike) else Pipeline(model)


def _seed(generator: torch.Generator | int | None) -> int:
    """A generator gives the next number that it draws, so that its next call draws other images."""
    if isinstance(generator, int):
        return generator
    where = "cpu" if generator is None else generator.device
    return int(torch.randint(2**31, (1,), generator=generator, device=where))


def _as(images: torch.Tensor, output_type: str) -> Any:
    if output_type == "pt":
        return images.float() / 255
    pixels = images.permute(0, 2, 3, 1).numpy()
    if output_type == "np":
        return pixels.astype(np.float32) / 255
    return [Image.fromarray(one[..., 0] if one.shape[-1] == 1 else one) for one in pixels]
