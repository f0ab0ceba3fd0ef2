"""The families of pixels, for tests."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from golden import settings, state

from mmgen.formats import adm, edm, edm2, imm
from mmgen.formats.family import Converted, ConvertOptions
from mmgen.formats.reading import Found
from mmgen.models.denoiser import Denoiser
from mmgen.models.flow_model import FlowModel
from mmgen.networks import build_network

IMM = {
    "imm_ddpmpp_simple_edm_fm": "SongUNet",
    "imm_ddpmpp_simple_edm_cosine_stride": "SongUNet",
    "imm_ddpmpp_identity_fm_cond": "SongUNet",
    "imm_dit_euler_fm_stride": "DiT",
}
EDM = {"edm_ddpmpp_cond": "SongUNet", "edm_ncsnpp_cond": "SongUNet", "edm_adm_cond": "DhariwalUNet"}
ADM_FLAGS = (
    "--image_size 8 --num_channels 32 --channel_mult 1,2 --num_res_blocks 1 --attention_resolutions 4 --num_head_channels 16 "
    "--use_scale_shift_norm True --resblock_updown True --use_new_attention_order True --class_cond True --learn_sigma True"
)
CM_FLAGS = ADM_FLAGS.replace("--use_new_attention_order True", "").replace("--learn_sigma True", "--training_mode ")


def found(tensors: dict, arguments: dict | None = None) -> Found:
    return Found(Path("some/file.pkl"), "a test", tensors, arguments or {}, {}, "0" * 64)


def pickled(name: str, class_name: str, inner_class: str, tensors: dict | None = None, **own) -> Found:
    """What a pickle of a golden network holds. `own`: arguments of the wrapper alone."""
    g = settings(name)
    shape = {"img_resolution": g["resolution"], "img_channels": g["channels"], "label_dim": g["num_classes"]}
    channels = {"in_channels": g["channels"], "out_channels": g["channels"]}
    network = {key: g[key] for key in ("model_channels", "channel_mult", "num_blocks", "attn_resolutions", "augment_dim",
                                       "channel_mult_noise", "resample_filter", "depth", "hidden_size", "patch_size",
                                       "num_heads") if key in g}  # fmt: skip
    for ours, theirs in (("embedding", "embedding_type"), ("encoder", "encoder_type")):
        if ours in g:
            network[theirs] = g[ours]
    if "dit" not in name:
        network["dropout"] = 0.13
    inner = {"img_resolution": g["resolution"], "label_dim": g["num_classes"], **channels, **network}
    modules = {"model": {"class_name": inner_class, "init_kwargs": inner}}
    wrapper = {**shape, "model_type": inner_class, **network, **own}
    return found(tensors or state(name), {"class_name": class_name, "init_kwargs": wrapper, "modules": modules})


def official_imm(name: str) -> Found:
    g = settings(name)
    own = {
        "noise_schedule": g["schedule"], "f_type": g["parametrization"], "sigma_data": g["sigma_data"], "T": g["T"],
        "eps": g["eps"], "temb_type": {"s": "identity", "t-s": "stride"}[g["second_time"]], "time_scale": g["time_scale"],
    }  # fmt: skip
    return pickled(name, "IMMPrecond", IMM[name], **own)


def consistency_tensors() -> dict:
    """ADM's golden weights in the shapes of consistency_models, with the head of three channels."""
    tensors = {}
    for key, value in state("adm_unet_learn_sigma").items():
        wide = key.endswith(("qkv.weight", "proj_out.weight"))
        tensors[key] = value.unsqueeze(-1) if wide else value[:3] if key.startswith("out.2") else value
    return tensors


def edm2_tensors(dtype: torch.dtype = torch.float16) -> tuple[dict, dict]:
    """(tensors, arguments) of a small EDM2 pickle with random weights."""
    inner = {"img_resolution": 8, "img_channels": 3, "label_dim": 10, "model_channels": 16, "channel_mult": [1, 2],
             "num_blocks": 1, "attn_resolutions": [4], "channels_per_head": 8, "dropout": 0.1}  # fmt: skip
    small = edm2.EDM2Settings(model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=8)
    torch.manual_seed(0)
    network = build_network(small, resolution=8, channels=3, num_classes=10, second_time=False)
    tensors = {f"unet.{key}": (value + 0.3 * (value.ndim == 0)).to(dtype) for key, value in network.state_dict().items()}
    tensors |= {"logvar_fourier.freqs": torch.randn(128).to(dtype), "logvar_fourier.phases": torch.rand(128).to(dtype),
                "logvar_linear.weight": torch.randn(1, 128).to(dtype)}  # fmt: skip
    wrapper = {**inner, "use_fp16": True, "sigma_data": 0.5}
    return tensors, {"class_name": "Precond", "init_kwargs": wrapper,
                     "modules": {"unet": {"class_name": "UNet", "init_kwargs": inner}}}  # fmt: skip


def iddpm() -> Found:
    """The golden ADM as a network that learns its variance, with the table of noise levels."""
    tensors = state("edm_adm_cond")
    tensors |= {f"model.out_conv.{k}": torch.cat([tensors[f"model.out_conv.{k}"]] * 2) for k in ("weight", "bias")}
    given = pickled("edm_adm_cond", "iDDPMPrecond", "DhariwalUNet", {**tensors, "u": edm.noise_levels()}, C_1=0.001)
    given.arguments["modules"]["model"]["init_kwargs"]["out_channels"] = 6
    return given


FILES = {
    **{name: functools.partial(official_imm, name) for name in IMM},
    **{name: functools.partial(pickled, name, "EDMPrecond", inner) for name, inner in EDM.items()},
    "vp": lambda: pickled("edm_ddpmpp_cond", "VPPrecond", "SongUNet"),
    "ve": lambda: pickled("edm_ncsnpp_cond", "VEPrecond", "SongUNet"),
    "iddpm": iddpm,
    "edm2": lambda: found(*edm2_tensors()),
    "adm": lambda: found(state("adm_unet_learn_sigma")),
    "consistency": lambda: found(consistency_tensors()),
    "edm of consistency_models": lambda: found(consistency_tensors()),
}
PRESET = {
    "adm": ADM_FLAGS,
    "consistency": CM_FLAGS + "consistency_training",
    "edm of consistency_models": CM_FLAGS + "edm",
}


def family_of(given: Found):
    """The one family that recognises a file."""
    matching = [module for module in (edm, edm2, adm, imm) if module.family(given)]
    assert len(matching) == 1
    return matching[0]


def converted(name: str, given: Found | None = None) -> Converted:
    given = given or FILES[name]()
    return family_of(given).convert(given, ConvertOptions(preset=PRESET.get(name)))


def network_of(result: Converted) -> FlowModel | Denoiser:
    model = (FlowModel if result.config.flow else Denoiser)(result.config)
    model.network.load_state_dict(result.state)
    return model.eval()
