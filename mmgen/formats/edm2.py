"""EDM2's pickled networks and their post-hoc EMAs (Karras et al., arXiv:2312.02696).

original                              ours
unet.X                                X             all names are the same
logvar_fourier.*, logvar_linear.*     (left out)    the uncertainty of the training loss, of no use to sampling

Files hold float16 weights; networks compute in the precision of their inputs and normalise the weights in float32, as the
original does. Networks on latents (4 channels; ImageNet-512) become denoisers of latents, with the published autoencoder and whitening: no file
names them.
What could not be compared with the original is said in `networks/edm2.py`.
"""

from __future__ import annotations

from torch import Tensor

from ..models.denoiser import DenoiserSettings
from ..models.latents import LatentSettings
from ..models.config import ModelConfig
from ..networks import EDM2Settings
from .family import Converted, ConvertOptions
from .mapping import assign, cast, check_sizes, known, module, require
from .reading import Found

LOGVAR_REASON = "the uncertainty of the training loss, which sampling does not use"

# Arguments of the published classes, with their defaults
_UNET = {
    "img_resolution": None, "img_channels": None, "label_dim": None, "model_channels": 192, "channel_mult": [1, 2, 3, 4],
    "channel_mult_noise": None, "channel_mult_emb": None, "num_blocks": 3, "attn_resolutions": [16, 8], "label_balance": 0.5,
    "concat_balance": 0.5, "resample_filter": [1, 1], "channels_per_head": 64, "dropout": 0.0, "res_balance": 0.3,
    "attn_balance": 0.3, "clip_act": 256,
}  # fmt: skip
_PRECOND = {"use_fp16": True, "sigma_data": 0.5, "logvar_channels": 128, **_UNET}


def family(found: Found) -> str | None:
    return "edm2" if "unet.emb_fourier.freqs" in found.tensors else None


def convert(found: Found, options: ConvertOptions) -> Converted:
    """A denoiser from the constructor arguments in the file. Raises ModelError."""
    a = known(found, module(found, "unet")["init_kwargs"], _UNET, "EDM2's U-Net")
    check_sizes(found, a, "EDM2's U-Net")
    wrapper = known(found, found.arguments.get("init_kwargs", {}), _PRECOND, "EDM2's Precond")
    a["resample_filter"] = list(a["resample_filter"])
    require(found, a, {"resample_filter": [1, 1]}, "EDM2's U-Net")
    noise, emb = ((a[name] or 0) * a["model_channels"] for name in ("channel_mult_noise", "channel_mult_emb"))
    network = EDM2Settings(
        model_channels=a["model_channels"], channel_mult=tuple(a["channel_mult"]), noise_channels=noise, emb_channels=emb,
        num_blocks=a["num_blocks"], attn_resolutions=tuple(a["attn_resolutions"]), channels_per_head=a["channels_per_head"],
        dropout=float(a["dropout"]), label_balance=float(a["label_balance"]), concat_balance=float(a["concat_balance"]),
        res_balance=float(a["res_balance"]), attn_balance=float(a["attn_balance"]),
        clip_activations=None if a["clip_act"] is None else float(a["clip_act"]),
    )  # fmt: skip
    config = ModelConfig(
        network=network, flow=None, denoiser=DenoiserSettings("edm", sigma_data=float(wrapper["sigma_data"])),
        resolution=a["img_resolution"], channels=a["img_channels"], num_classes=a["label_dim"],
        latents=published_latents(a["img_resolution"]) if a["img_channels"] == 4 else None,
        null_trained=False if a["label_dim"] else None,  # its classes are never hidden in training
    )  # fmt: skip
    assumed = ["sigma_min 0.002 and sigma_max 80, EDM2's defaults for sampling"]
    if config.latents is not None:
        assumed.append("the autoencoder and the whitening of its latents are those of the published models")
    left_out = {key: LOGVAR_REASON for key in found.tensors if key.startswith(("logvar_fourier.", "logvar_linear."))}
    state = assign(found, config, lambda key: f"unet.{key}", left_out=left_out)
    return Converted(config, cast(state, options.precision), left_out, "edm2", tuple(assumed))


def published_latents(resolution: int) -> LatentSettings:
    """The autoencoder and whitening of the published latent models: Stable Diffusion's, given pixels in [0, 1]."""
    return LatentSettings(
        vae="stabilityai/sd-vae-ft-mse", vae_sha256="", mean=(5.81, 3.25, 0.12, -2.15), std=(4.17, 4.62, 3.71, 3.28),
        target_std=0.5, pixels="unit", resolution=8 * resolution,
    )  # fmt: skip


def original_state(config: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under NVIDIA's names; the uncertainty (`logvar_*`) is not among them."""
    return {f"unet.{key}": value for key, value in state.items()}
