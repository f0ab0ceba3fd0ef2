"""diffusers' text-to-image pipelines with small random weights, saved by diffusers itself: `tiny_pipeline(kind, folder)`.

Latents are 4 x 8 x 8 and images 3 x 16 x 16 (`latent_side`). Tokenizers know single letters; texts are 12 tokens, of T5 and Gemma as many as asked.
`call_options(kind)` is what the pipeline's call needs besides for images of this size.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LENGTH = 12  # tokens of CLIP
SIDE, SANA_SIDE = 8, 16  # of the latents; SanaPipeline wants images of multiples of 32
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
_LETTERS = string.ascii_lowercase + string.digits + string.punctuation


def tiny_pipeline(kind: str, folder: Path | str, seed: int = 0, **changes: Any) -> str:
    """Saves a random pipeline of one of KINDS in the folder, and returns it. `changes`: to the config of its network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = KINDS[kind](**changes)
        for name in ("unet", "transformer"):
            for parameter in getattr(pipeline, name).parameters() if hasattr(pipeline, name) else ():
                if not parameter.any() or parameter.std() < 0.05:
                    torch.nn.init.normal_(parameter, std=0.1)
    pipeline.save_pretrained(folder)
    return str(folder)


def latent_side(kind: str) -> int:
    return {"pixart_alpha_1024": 128, "sana": SANA_SIDE}.get(kind, SIDE)


def call_options(kind: str) -> dict[str, Any]:
    side = 2 * latent_side(kind)
    binning = {"use_resolution_binning": False, "clean_caption": False} if kind.startswith(("pixart", "sana")) else {}
    return {"height": side, "width": side, **binning}


def _clip(hidden: int = 8, projection: int | None = None, pad: str = "<|endoftext|>") -> tuple[Any, Any]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    words = [*_LETTERS, *(letter + "</w>" for letter in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], pad_token=pad, model_max_length=LENGTH)
    sizes = dict(hidden_size=hidden, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=LENGTH)
    ids = dict(vocab_size=len(words), bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=1)
    config = CLIPTextConfig(**sizes, **ids, projection_dim=projection or 8)
    return tokenizer, (CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config)


def _t5(hidden: int = 8) -> tuple[Any, Any]:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in _LETTERS)]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)
    sizes = dict(d_model=hidden, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=len(tokenizer))
    return tokenizer, T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))


def _gemma(hidden: int = 8) -> tuple[Any, Any]:
    from tokenizers.processors import TemplateProcessing
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.printable.strip()]
    tokenizer = GemmaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    begin = TemplateProcessing(single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", words.index("<bos>"))])
    tokenizer.backend_tokenizer.post_processor = begin
    sizes = dict(hidden_size=hidden, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    return tokenizer, Gemma2Model(Gemma2Config(**sizes, head_dim=4, vocab_size=len(tokenizer), sliding_window=64))


def _vae(scale: float, shift: float | None = None, channels: int = 4) -> Any:
    from diffusers import AutoencoderKL

    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    sizes = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=channels, sample_size=2 * SIDE)
    sd3 = {} if shift is None else {"use_quant_conv": False, "use_post_quant_conv": False}
    return AutoencoderKL(**blocks, **sizes, scaling_factor=scale, shift_factor=shift, **sd3)


def _unet(**changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    blocks = dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    sizes = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=2, cross_attention_dim=8)
    return UNet2DConditionModel(**{**blocks, **sizes, "sample_size": SIDE, **changes})


def _stable_diffusion(scheduler: Any, **changes: Any) -> Any:
    from diffusers import StableDiffusionPipeline

    tokenizer, encoder = _clip()
    parts = dict(vae=_vae(0.18215), text_encoder=encoder, tokenizer=tokenizer, unet=_unet(**changes), scheduler=scheduler)
    none = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return StableDiffusionPipeline(**parts, **none)


def _sd15(**changes: Any) -> Any:
    from diffusers import PNDMScheduler

    given = dict(skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    return _stable_diffusion(PNDMScheduler(**SCALED, **given), **changes)


def _sd21(zero_snr: bool = False, **changes: Any) -> Any:
    from diffusers import DDIMScheduler

    given = dict(prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    zero = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing") if zero_snr else {}
    return _stable_diffusion(DDIMScheduler(**SCALED, **given, **zero), **{"use_linear_projection": True, **changes})


def _sdxl(**changes: Any) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    tokenizer, encoder = _clip()
    tokenizer_2, encoder_2 = _clip(projection=8, pad="!")
    added = dict(addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=8 + 6 * 4)
    unet = _unet(**{"cross_attention_dim": 16, "use_linear_projection": True, **added, **changes})
    texts = dict(text_encoder=encoder, text_encoder_2=encoder_2, tokenizer=tokenizer, tokenizer_2=tokenizer_2)
    scheduler = EulerDiscreteScheduler(**SCALED, steps_offset=1, timestep_spacing="leading")
    return StableDiffusionXLPipeline(vae=_vae(0.13025), **texts, unet=unet, scheduler=scheduler, add_watermarker=False)


def _pixart(name: str, scale: float, **changes: Any) -> Any:
    import diffusers

    tokenizer, encoder = _t5()
    sizes = dict(num_attention_heads=2, attention_head_dim=6, num_layers=2, in_channels=4, out_channels=8, cross_attention_dim=12)
    network = dict(caption_channels=8, norm_num_groups=4, sample_size=SIDE, patch_size=2, interpolation_scale=1)
    transformer = diffusers.PixArtTransformer2DModel(**{**sizes, **network, **changes})
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    parts = dict(vae=_vae(scale), text_encoder=encoder, tokenizer=tokenizer, transformer=transformer, scheduler=scheduler)
    return getattr(diffusers, name)(**parts)


def _pixart_1024(**changes: Any) -> Any:
    """Latents of 128 x 128, which the pipeline gives their resolution and aspect ratio."""
    return _pixart("PixArtAlphaPipeline", 0.18215, **{"sample_size": 128, "patch_size": 32, **changes})


def _sd3(**changes: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    (tokenizer, encoder), (tokenizer_2, encoder_2), (tokenizer_3, encoder_3) = _clip(projection=8), _clip(8, 8, "!"), _t5(24)
    sizes = dict(sample_size=SIDE, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=4)
    texts = dict(num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=8, pooled_projection_dim=16)
    transformer = SD3Transformer2DModel(**{**sizes, **texts, "pos_embed_max_size": 6, **changes})
    encoders = dict(text_encoder=encoder, text_encoder_2=encoder_2, text_encoder_3=encoder_3)
    tokenizers = dict(tokenizer=tokenizer, tokenizer_2=tokenizer_2, tokenizer_3=tokenizer_3)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(transformer, scheduler, _vae(1.5305, 0.0609), **encoders, **tokenizers)


def _sana(**changes: Any) -> Any:
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    tokenizer, encoder = _gemma()
    sides = {f"{side}_block_types": ("ResBlock", "EfficientViTBlock") for side in ("encoder", "decoder")}
    sides |= {f"{side}_block_out_channels": (8, 8) for side in ("encoder", "decoder")}
    sides |= {f"{side}_qkv_multiscales": ((), (5,)) for side in ("encoder", "decoder")}
    sides |= {f"{side}_layers_per_block": (1, 1) for side in ("encoder", "decoder")}
    kinds = dict(downsample_block_type="Conv", upsample_block_type="interpolate")
    vae = AutoencoderDC(latent_channels=4, attention_head_dim=2, **sides, **kinds, scaling_factor=0.41407)
    sizes = dict(in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=4, patch_size=1)
    texts = dict(num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8)
    transformer = SanaTransformer2DModel(**{**sizes, **texts, "sample_size": SANA_SIDE, **changes})
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(tokenizer, encoder, vae, transformer, scheduler)


KINDS: dict[str, Callable[..., Any]] = {
    "sd15": _sd15,
    "sd21": _sd21,
    "sd21_zero_snr": lambda **changes: _sd21(zero_snr=True, **changes),
    "sdxl": _sdxl,
    "pixart_alpha": lambda **changes: _pixart("PixArtAlphaPipeline", 0.18215, **changes),
    "pixart_alpha_1024": _pixart_1024,
    "pixart_sigma": lambda **changes: _pixart("PixArtSigmaPipeline", 0.13025, **changes),
    "sd3": _sd3,
    "sana": _sana,
}
