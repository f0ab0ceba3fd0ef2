"""The architectures of well-known text-to-image models, without weights: their networks' config.json, as published with them."""

from __future__ import annotations

import json

from mmgen.diffusion.preconditioning import DenoiserSettings
from mmgen.models.config import ModelConfig
from mmgen.models.latents import LatentSettings
from mmgen.networks.diffusers_text import DiffusersTextSettings
from mmgen.networks.text import TextSettings

_SD15 = {
    "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip
_SDXL = {
    "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}  # fmt: skip
_PIXART = {
    "sample_size": 64, "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
    "patch_size": 2, "cross_attention_dim": 1152, "caption_channels": 4096, "interpolation_scale": 1,
}  # fmt: skip
_SD3 = {
    "sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "in_channels": 16, "out_channels": 16,
    "patch_size": 2, "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}  # fmt: skip
# name: (network, config, pipeline, side of the images, channels of the latents, tokens, width, pooled)
_MODELS = {
    "sd15": ("UNet2DConditionModel", _SD15, "StableDiffusionPipeline", 512, 4, 77, 768, 0),
    "sdxl": ("UNet2DConditionModel", _SDXL, "StableDiffusionXLPipeline", 1024, 4, 77, 2048, 1280),
    "pixart": ("PixArtTransformer2DModel", _PIXART, "PixArtAlphaPipeline", 512, 4, 120, 4096, 0),
    "sd3": ("SD3Transformer2DModel", _SD3, "StableDiffusion3Pipeline", 1024, 16, 333, 4096, 2048),
}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ATTENTION_OF_TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # SD3's
NAMES = tuple(_MODELS)


def real_model(name: str) -> ModelConfig:
    model, config, pipeline, side, channels, length, width, pooled = _MODELS[name]
    network = DiffusersTextSettings(model=model, config=json.dumps(config, sort_keys=True), image_resolution=side)
    text = TextSettings(encoder=name, pipeline=pipeline, length=length, width=width, pooled=pooled)
    latents = LatentSettings(vae=name, vae_sha256="", mean=(0.0,) * channels, std=(1.0,) * channels, target_std=1.0, resolution=side)
    return ModelConfig(
        network=network, flow=None, denoiser=DenoiserSettings(), resolution=side // 8, channels=channels, text=text, latents=latents
    )
