"""The networks of diffusers' text-to-image pipelines as one of ours. diffusers itself computes them, so that they give what they
give there; attention processors are left as they are.

Jacobian-vector products are exact (`losses.moment_matching.forward_derivative`), since attention is then computed plainly.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError, shortened
from ..system.files import parse_json
from .conditions import Condition, Text
from .keyed_dropout import run_block
from .text import TextSettings

_COUNTS, _MOST_LAYERS = ("num_layers", "layers_per_block", "transformer_layers_per_block"), 512
GUIDANCE_WIDTH = 256  # of the embedding of w in a student that is told it, as in latent consistency models


@dataclass(frozen=True, kw_only=True)
class DiffusersTextSettings:
    """The architecture, in diffusers' words."""

    kind: Literal["diffusers_text"] = "diffusers_text"
    model: Literal["UNet2DConditionModel", "PixArtTransformer2DModel", "SD3Transformer2DModel", "SanaTransformer2DModel"]
    config: str  # its config.json: JSON with sorted keys
    image_resolution: int  # of the decoded images, which some networks are told
    gradient_checkpointing: bool = False  # recompute blocks in the backward pass: same result, less memory

    limits: ClassVar = {"image_resolution": (1, 2**14)}
    null_class: ClassVar = True

    def check(self, resolution: int) -> None:
        """Left to diffusers, but that there is no end of layers. Raises ConfigError."""
        try:
            found = parse_json(self.config)
            counts = [one for key in _COUNTS for one in _listed(found.get(key) or 1)]
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"network.config of a {self.model} is no JSON of its settings: {shortened(error)}") from error
        if not all(type(one) is int and 0 < one <= _MOST_LAYERS for one in counts):
            raise ConfigError(f"network.config of a {self.model} has impossible numbers of layers: at most {_MOST_LAYERS}")

    @property
    def takes_guidance(self) -> bool:
        """Whether it is told w, as students of `student.guidance_range` are."""
        return bool(json.loads(self.config).get("time_cond_proj_dim"))


def _listed(value: Any) -> list[Any]:
    return [inner for one in value for inner in _listed(one)] if isinstance(value, list) else [value]


def told_guidance(settings: DiffusersTextSettings) -> DiffusersTextSettings:
    """The network with an input for w, of the times' embedding. Raises ConfigError where diffusers has none."""
    if settings.model != "UNet2DConditionModel":
        raise ConfigError(f"student.guidance_range: a {settings.model} has no input for guidance; Stable Diffusion's and SDXL's have one")
    config = json.loads(settings.config) | {"time_cond_proj_dim": GUIDANCE_WIDTH}
    return replace(settings, config=json.dumps(config, sort_keys=True))


def with_guidance_input(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """A state dict as that of `network`, which has an input for w where the other has none: zero, so that it begins as the other."""
    key = "model.time_embedding.cond_proj.weight"
    wanted = network.state_dict().get(key)
    return state if wanted is None or key in state else {**state, key: torch.zeros_like(wanted)}


class DiffusersText(nn.Module):
    """x float [N, C, R, R], times float64 [N] -> float [N, C or 2 C, R, R]: the second half is a learned variance.

    `condition`: a `Text` of the pipeline's encoders; None is the pipeline's null, which is kept in buffers. Its tensors are named as
    diffusers names them, after "model.". Raises ConfigError where diffusers is not installed or does not know the architecture.
    """

    supports = frozenset({"text"})

    def __init__(
        self, settings: DiffusersTextSettings, resolution: int, channels: int, num_classes: int = 0, text: TextSettings | None = None
    ) -> None:
        super().__init__()
        if text is None or not text.pipeline:
            raise ConfigError(f"a {settings.model} draws what a text says: its model needs the text settings of a pipeline")
        self.settings, self.text, self.checkpoints = settings, text, False
        self.model = _build(settings)
        found, expected = _sizes(settings.model, self.model.config), (channels, text.width, text.pooled)
        if found != expected:
            raise ConfigError(
                f"the {settings.model} has (channels, width of a token, width of the text's vector) = {found}, not {expected}"
            )
        self.register_buffer("null_tokens", torch.zeros(1, text.length, text.width))
        self.register_buffer("null_mask", torch.ones(1, text.length, dtype=torch.bool))
        if text.pooled:
            self.register_buffer("null_pooled", torch.zeros(1, text.pooled))

    def set_null(self, null: Text) -> None:
        """The pipeline's null: one row."""
        for name, buffer in self.named_buffers(recurse=False):
            buffer.copy_(getattr(null, name.removeprefix("null_")))

    def null(self) -> Text:
        """The pipeline's null, one row."""
        return Text(self.null_tokens, self.null_mask, self.null_pooled if self.text.pooled else None)

    def forward(
        self, x: Tensor, t: Tensor, s: Tensor | None = None, condition: Condition | None = None, augment: Tensor | None = None
    ) -> Tensor:
        if s is not None or augment is not None:
            raise ValueError(f"{self.settings.model} takes neither a second time nor an augmentation label")
        if self.settings.gradient_checkpointing and not self.checkpoints:
            self.model.enable_gradient_checkpointing()
            for module in self.model.modules():  # with the parameters that a `functional_call` has put in the place of a block's own
                if hasattr(module, "_gradient_checkpointing_func"):
                    module._gradient_checkpointing_func = lambda block, *inputs: run_block(block, True, *inputs)
            self.checkpoints = True
        text = self._checked(condition, t)
        arguments = _ARGUMENTS[self.settings.model](self.model, t, text, text.tokens.to(x.dtype), self.settings.image_resolution)
        return self.model(x, return_dict=False, **arguments)[0]

    def _checked(self, condition: Condition | None, like: Tensor) -> Text:
        """The condition, or the null for every image of `like` [N]. Raises ConfigError for another network's."""
        if condition is None:
            return self.null()[torch.zeros_like(like, dtype=torch.int64)]
        if not isinstance(condition, Text):
            raise ConfigError(f"this network is conditioned on text, not on {type(condition).__name__}")
        pooled = 0 if condition.pooled is None else condition.pooled.shape[1]
        given, expected = (*condition.tokens.shape[1:], pooled), (self.text.length, self.text.width, self.text.pooled)
        if given != expected:
            raise ConfigError(
                f"this network takes texts of (tokens, width, vector) = {expected}, and these are {given}: encode them for it"
            )
        return condition


def guidance_embedding(w: Tensor, width: int) -> Tensor:
    """What a network is told of w [N], float32 [N, width]: w - 1 as diffusers' pipelines embed it (get_guidance_scale_embedding)."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=w.device) * -(math.log(10000.0) / (half - 1)))
    angles = (1000 * (w - 1)).float()[:, None] * frequencies
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


def _unet(model: nn.Module, t: Tensor, text: Text, tokens: Tensor, side: int) -> dict[str, Any]:
    given: dict[str, Any] = {"timestep": t, "encoder_hidden_states": tokens}
    if width := model.config.time_cond_proj_dim:
        w = torch.ones_like(t) if text.guidance is None else text.guidance
        given["timestep_cond"] = guidance_embedding(w, width).to(tokens.dtype)
    if model.config.addition_embed_type == "text_time":  # SDXL
        if (sizes := text.sizes) is None:  # of the whole image: made on the device, nothing is copied there
            sizes = torch.full((len(t), 6), side, dtype=torch.float32, device=t.device)
            sizes[:, 2:4] = 0
        given["added_cond_kwargs"] = {"text_embeds": text.pooled.to(tokens.dtype), "time_ids": sizes.to(tokens.dtype)}
    return given


def _pixart(model: nn.Module, t: Tensor, text: Text, tokens: Tensor, side: int) -> dict[str, Any]:
    sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if model.use_additional_conditions:
        sizes = {"resolution": tokens.new_full((len(t), 2), side), "aspect_ratio": tokens.new_ones(len(t), 1)}
    masked = {"encoder_hidden_states": tokens, "encoder_attention_mask": text.mask}
    return {"timestep": t, **masked, "added_cond_kwargs": sizes}


def _sd3(model: nn.Module, t: Tensor, text: Text, tokens: Tensor, side: int) -> dict[str, Any]:
    return {"timestep": t, "encoder_hidden_states": tokens, "pooled_projections": text.pooled.to(tokens.dtype)}


def _sana(model: nn.Module, t: Tensor, text: Text, tokens: Tensor, side: int) -> dict[str, Any]:
    masked = {"encoder_hidden_states": tokens, "encoder_attention_mask": text.mask}
    return {"timestep": t * model.config.timestep_scale, **masked}


# A further network is a function here and a line in each of the next three places.
_ARGUMENTS = {
    "UNet2DConditionModel": _unet,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "SanaTransformer2DModel": _sana,
}


def _sizes(name: str, config: Any) -> tuple[int, int, int]:
    """Channels, the width of a token, and that of the vector for the whole text, 0 where there is none."""
    width = {
        "UNet2DConditionModel": "cross_attention_dim",
        "PixArtTransformer2DModel": "caption_channels",
        "SD3Transformer2DModel": "joint_attention_dim",
        "SanaTransformer2DModel": "caption_channels",
    }[name]
    pooled = 0
    if name == "UNet2DConditionModel" and config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    if name == "SD3Transformer2DModel":
        pooled = config.pooled_projection_dim
    return config.in_channels, config[width], pooled


def _build(settings: DiffusersTextSettings) -> nn.Module:
    """The network of diffusers. Built without weights, tables that no file holds are computed nonetheless."""
    try:
        import diffusers

        kind = getattr(diffusers, settings.model)
    except ImportError as error:
        raise ConfigError("this model is run by diffusers, which is not installed: pip install 'mmgen[latents]'") from error
    except AttributeError as error:
        raise ConfigError(f"this version of diffusers has no {settings.model}: pip install -U diffusers") from error
    try:
        config = json.loads(settings.config)
        model = kind.from_config(config)
        stored = model.state_dict().keys()
        if tables := [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in stored]:
            with torch.device("cpu"):
                small = dict(kind.from_config({**config, "num_layers": 1}).named_buffers())
            for name in tables:
                module, _, last = name.rpartition(".")
                model.get_submodule(module).register_buffer(last, small[name], persistent=False)
        return model
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise ConfigError(f"diffusers cannot build the {settings.model} of this model: {error}") from error
