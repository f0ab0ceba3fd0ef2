"""`.pt` files of guided-diffusion (Dhariwal & Nichol, arXiv:2105.05233) and of consistency_models (Song et al.,
arXiv:2303.01469): weights of ADM's U-Net, and nothing else.

What the weights cannot tell (resolution, heads, order of q, k and v, noise schedule) is what both projects give as flags on
the command line, so a preset here is a published line of flags. For other models the user's own flags can be the preset:
"--image_size 64 --num_channels 128 ...", in the words and with the defaults of the two projects.

original                                        ours
time_embed.0 / .2                               time_mlp.linear0 / .linear1
label_emb.weight                                label_embed.weight            transposed
input_blocks.0.0                                encoder.RxR_conv
input_blocks.N.0, .1                            encoder.X                     residual block, its attention
middle_block.0, .1, .2                          decoder.RxR_in0, its attention, decoder.RxR_in1
output_blocks.N.0, .1, last                     decoder.X                     residual block, its attention, upsampling
  in_layers.0 / .2, emb_layers.1                  norm0 / conv0, affine
  out_layers.0 / .3, skip_connection              norm1 / conv1, skip
  norm, qkv, proj_out                             norm2, qkv, proj            one-dimensional kernels in guided-diffusion
out.0 / out.2                                   out_norm / out_conv
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from dataclasses import dataclass

from torch import Tensor

from ..models.denoiser import DenoiserSettings
from ..errors import ConfigError, ModelError, nearest
from ..models.config import ModelConfig, SamplingSettings
from ..networks import ADMSettings
from .family import Converted, ConvertOptions
from .mapping import assign, cast, expected_state
from .reading import Found

_LSUN = (
    "--attention_resolutions 32,16,8 --class_cond False --diffusion_steps 1000 --dropout 0.1 --image_size 256 "
    "--learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 "
    "--resblock_updown True --use_fp16 True --use_scale_shift_norm True"
)
_CM_IMAGENET = (
    "--attention_resolutions 32,16,8 --class_cond True --use_scale_shift_norm True --image_size 64 --num_channels 192 "
    "--num_head_channels 64 --num_res_blocks 3 --resblock_updown True --use_fp16 True --sigma_min 0.002 --sigma_max 80"
)
_CM_LSUN = (
    "--attention_resolutions 32,16,8 --class_cond False --use_scale_shift_norm False --image_size 256 --num_channels 256 "
    "--num_head_channels 64 --num_res_blocks 2 --resblock_updown True --use_fp16 True --sigma_min 0.002 --sigma_max 80"
)
_EDM, _CD, _CT = (f" --training_mode {mode}" for mode in ("edm", "consistency_distillation", "consistency_training"))

PRESETS = {  # README of guided-diffusion; scripts/launch.sh of consistency_models
    "adm-imagenet64": "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --dropout 0.1 --image_size 64 "
    "--learn_sigma True --noise_schedule cosine --num_channels 192 --num_head_channels 64 --num_res_blocks 3 "
    "--resblock_updown True --use_new_attention_order True --use_fp16 True --use_scale_shift_norm True",
    "adm-imagenet128": "--attention_resolutions 32,16,8 --class_cond True --image_size 128 --learn_sigma True "
    "--noise_schedule linear --num_channels 256 --num_heads 4 --num_res_blocks 2 --resblock_updown True --use_fp16 True "
    "--use_scale_shift_norm True",
    "adm-imagenet256": "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 256 "
    "--learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 "
    "--resblock_updown True --use_fp16 True --use_scale_shift_norm True",
    "adm-imagenet256-uncond": "--attention_resolutions 32,16,8 --class_cond False --diffusion_steps 1000 --image_size 256 "
    "--learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 "
    "--resblock_updown True --use_fp16 True --use_scale_shift_norm True",
    "adm-imagenet512": "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 512 "
    "--learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 "
    "--resblock_updown True --use_fp16 False --use_scale_shift_norm True",
    "lsun-bedroom": _LSUN,
    "lsun-cat": _LSUN,
    "lsun-horse": _LSUN,
    "lsun-horse-nodropout": _LSUN.replace("--dropout 0.1", "--dropout 0.0"),
    "edm-imagenet64": _CM_IMAGENET + " --dropout 0.1" + _EDM,
    "edm-bedroom256": _CM_LSUN + " --dropout 0.1" + _EDM,
    "edm-cat256": _CM_LSUN + " --dropout 0.1" + _EDM,
    "cd-imagenet64": _CM_IMAGENET + " --dropout 0.0" + _CD,
    "cd-bedroom256": _CM_LSUN + " --dropout 0.0" + _CD,
    "cd-cat256": _CM_LSUN + " --dropout 0.0" + _CD,
    "ct-imagenet64": _CM_IMAGENET + " --dropout 0.0" + _CT,
    "ct-bedroom256": _CM_LSUN + " --dropout 0.0" + _CT,
    "ct-cat256": _CM_LSUN + " --dropout 0.0" + _CT,
}
LINSPACE = (
    "timesteps are respaced from 999 to 0 as guided-diffusion does (--grid linspace; ancestral has the posterior's variance, "
    "not the learned one)"
)
CLASSES = 1000  # --class_cond True: both projects know ImageNet's only


@dataclass(frozen=True)
class Flags:
    """The flags that say what a model is, under their published names and with their published defaults."""

    image_size: int = 64
    num_channels: int = 128
    num_res_blocks: int = 2
    channel_mult: str = ""
    attention_resolutions: str = "16,8"
    num_heads: int = 4
    num_head_channels: int = -1
    use_scale_shift_norm: bool = True
    use_new_attention_order: bool = False
    resblock_updown: bool = False
    class_cond: bool = False
    learn_sigma: bool = False
    dropout: float = 0.0
    use_fp16: bool = False  # how it was computed; here and below: taken, and of no effect
    use_checkpoint: bool = False
    # guided-diffusion
    diffusion_steps: int = 1000
    noise_schedule: str = "linear"
    predict_xstart: bool = False
    rescale_timesteps: bool = False
    # consistency_models, which --training_mode shows it to be
    training_mode: str = ""
    sigma_min: float = 0.002
    sigma_max: float = 80.0


_MULT = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}
_PRECONDITIONS = {"edm": "edm_cm", "consistency_distillation": "cm", "consistency_training": "cm"}


def family(found: Found) -> str | None:
    """ADM's U-Net, "adm", or that of consistency models, which has no learned variance among the channels that it puts out.

    That of latent diffusion has the same names and cross-attention besides.
    """
    there = {"input_blocks.0.0.weight", "time_embed.0.weight"} <= found.tensors.keys()
    if not there or any(".transformer_blocks." in key for key in found.tensors):
        return None
    first, last = found.tensors["input_blocks.0.0.weight"], found.tensors.get("out.2.weight")
    same = last is not None and first.ndim == last.ndim == 4 and len(last) == first.shape[1]
    return "consistency" if same else "adm"


def convert(found: Found, options: ConvertOptions) -> Converted:
    """The network and its denoiser, from the shapes of the weights and a preset for what they do not tell.

    Raises ConfigError for a preset that does not exist, ModelError where it contradicts the weights.
    """
    if not any(key.startswith("output_blocks.") for key in found.tensors):
        raise ModelError(f"{found.path} is a classifier of guided-diffusion's, which has no output blocks: it makes no images")
    if not options.preset:
        raise ConfigError(
            f"{found.path} holds weights of ADM's U-Net, which do not say what model they are of: name it with --preset, or give "
            f"its flags as the preset. {nearest('', PRESETS)}"
        )
    flags = read_flags(options.preset)
    config = _config(found, flags, options.preset)
    kind, original = ("consistency", _wide) if flags.training_mode else ("adm", _narrow)
    names = original_names(config)
    state = assign(found, config, names.__getitem__, ours=_ours, original=original)
    sampled = (LINSPACE,) if kind == "adm" else ()
    return Converted(config, cast(state, options.precision), {}, kind, sampled=sampled)


def original_state(config: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under the original names and in the original shapes."""
    names, original = original_names(config), _narrow if config.denoiser.precondition == "discrete" else _wide
    return {names[key]: original(key, value).contiguous() for key, value in state.items()}


def read_flags(preset: str) -> Flags:
    """The flags of a preset, or of a line of them. Raises ConfigError for an unknown preset or flag, or an impossible value."""
    if not preset.startswith("-"):
        if preset not in PRESETS:
            raise ConfigError(f"there is no preset {preset!r}: {nearest(preset, PRESETS)}")
        preset = PRESETS[preset]
    words = shlex.split(preset.replace("=", " "))
    types = {f.name: type(f.default) for f in dataclasses.fields(Flags)}
    given = {}
    if len(words) % 2:
        raise ConfigError(f"the flags {preset!r} are not pairs of a name and a value, such as --image_size 64")
    for flag, value in zip(words[::2], words[1::2], strict=True):
        name = flag.removeprefix("--")
        if name not in types:
            raise ConfigError(f"{flag} is no flag that describes a model: {nearest(name, types, '--')}")
        try:
            given[name] = {"true": True, "false": False}[value.lower()] if types[name] is bool else types[name](value)
        except (KeyError, ValueError) as error:
            raise ConfigError(f"{flag} cannot be {value!r}: it takes a {types[name].__name__}") from error
    return Flags(**given)


def _config(found: Found, flags: Flags, preset: str) -> ModelConfig:
    """The model that the flags describe, compared with what the shapes of the tensors tell. Raises ModelError, ConfigError."""
    name = "these flags" if preset.startswith("-") else f"the preset {preset}"
    if not flags.resblock_updown:
        raise ConfigError("models with --resblock_updown False (resampling by plain convolutions) are not supported")
    for flag in ("predict_xstart", "rescale_timesteps"):
        if getattr(flags, flag):
            raise ConfigError(f"models with --{flag} True are not supported")
    try:
        mult = tuple(map(float, flags.channel_mult.split(",") if flags.channel_mult else _MULT[flags.image_size]))
        attention = tuple(int(side) for side in flags.attention_resolutions.split(","))
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{name} needs --channel_mult such as 1,2,2 and --attention_resolutions such as 16,8") from error
    if flags.image_size % 2 ** (len(mult) - 1) or flags.image_size < 1 or flags.diffusion_steps < 1:
        raise ConfigError(f"{name}: --image_size {flags.image_size} cannot be halved {len(mult) - 1} times, or has no steps")
    if flags.num_head_channels < 1 and flags.num_heads < 1:
        raise ConfigError(f"{name} needs --num_head_channels or --num_heads")
    in_image = [flags.image_size >> level for level in range(len(mult))]
    first, head, table = (found.tensors.get(f"{key}.weight") for key in ("input_blocks.0.0", "out.2", "label_emb"))
    if first is None or first.ndim != 4 or head is None:
        raise ModelError(f"{found.path} lacks the first or last convolution of ADM's U-Net (input_blocks.0.0, out.2)")
    channels = first.shape[1]
    if channels == 6 and len(head) in (3, 6):
        raise ModelError(f"{found.path} enlarges images (it takes two at once): mmgen has no use for it")
    classes = 0 if table is None else len(table)
    if table is not None and not preset.startswith("-") and classes != CLASSES:
        raise ModelError(f"{found.path} is not a model of {name}: it has {classes} classes, and the preset {CLASSES}")
    # What the shapes tell against what the flags say
    told = _told(found)
    said = {
        "num_channels": flags.num_channels,
        "num_res_blocks": flags.num_res_blocks,
        "channel_mult": [int(m * flags.num_channels) for m in mult],
        "attention_resolutions": [side in attention for side in in_image],
        "use_scale_shift_norm": flags.use_scale_shift_norm,
        "learn_sigma": flags.learn_sigma,
        "class_cond": flags.class_cond,
    }
    for flag, value in said.items():
        if told[flag] != value:
            raise ModelError(
                f"{found.path} is not a model of {name}: by its weights it has {_words(flag, told[flag])}, where the preset has "
                f"{_words(flag, value)}"
            )
    # The flash attention of consistency_models splits q, k and v in the new order, whatever the flag
    network = ADMSettings(
        model_channels=flags.num_channels, channel_mult=mult, num_blocks=flags.num_res_blocks,
        attn_resolutions=tuple(side for side in attention if side in in_image),
        channels_per_head=flags.num_head_channels if flags.num_head_channels > 0 else 64,
        num_heads=0 if flags.num_head_channels > 0 else flags.num_heads,
        qkv_order="new" if flags.use_new_attention_order or flags.training_mode else "legacy",
        scale_shift_norm=flags.use_scale_shift_norm, channels_per_group=1, null_class=False, learn_sigma=flags.learn_sigma,
        dropout=flags.dropout,
    )  # fmt: skip
    return ModelConfig(
        network=network, flow=None, denoiser=_denoiser(flags), resolution=flags.image_size, channels=channels,
        num_classes=classes, sampling=SamplingSettings() if flags.training_mode else SamplingSettings(grid="linspace"),
    )  # fmt: skip


def _denoiser(flags: Flags) -> DenoiserSettings:
    if flags.training_mode:
        if flags.training_mode not in _PRECONDITIONS:
            raise ConfigError(
                f"--training_mode {flags.training_mode} is not supported: {nearest(flags.training_mode, _PRECONDITIONS)}"
            )
        return DenoiserSettings(
            _PRECONDITIONS[flags.training_mode], sigma_min=flags.sigma_min, sigma_max=flags.sigma_max, clip=True
        )
    if flags.noise_schedule not in ("linear", "cosine"):
        raise ConfigError(
            f"--noise_schedule {flags.noise_schedule} is not possible: {nearest(flags.noise_schedule, ['linear', 'cosine'])}"
        )
    scale = 1000 / flags.diffusion_steps  # Both ends of the linear betas belong to 1000 steps
    return DenoiserSettings(
        "discrete", betas=flags.noise_schedule, beta_start=scale * 1e-4, beta_end=scale * 0.02,
        num_timesteps=flags.diffusion_steps, clip=True,
    )  # fmt: skip


def _told(found: Found) -> dict:
    """What the shapes tell of the flags. In `output_blocks` every num_res_blocks + 1 blocks end with upsampling, a second
    residual block, but for the last."""
    tensors = found.tensors
    count = {part: 1 + max((int(key.split(".")[1]) for key in tensors if re.match(rf"{part}\.\d+\.", key)), default=-1)
             for part in ("input_blocks", "output_blocks")}  # fmt: skip
    ups = [
        n for n in range(count["output_blocks"]) if any(f"output_blocks.{n}.{i}.in_layers.2.weight" in tensors for i in (1, 2))
    ]
    blocks = ups[0] if ups else count["output_blocks"] - 1
    firsts = [1 + level * (blocks + 1) for level in range(len(ups) + 1)]
    emb, affine, conv = (
        tensors.get(key)
        for key in ("time_embed.0.weight", "input_blocks.1.0.emb_layers.1.weight", "input_blocks.1.0.in_layers.2.weight")
    )
    widths = [tensors.get(f"input_blocks.{n}.0.out_layers.3.weight") for n in firsts]
    if affine is None or conv is None or any(width is None for width in widths):
        raise ModelError(f"{found.path} is not ADM's U-Net: its blocks are not in ADM's order")
    return {
        "num_channels": emb.shape[1],
        "num_res_blocks": blocks,
        "channel_mult": [len(width) for width in widths],
        "attention_resolutions": [f"input_blocks.{n}.1.qkv.weight" in tensors for n in firsts],
        "use_scale_shift_norm": len(affine) == 2 * len(conv),
        "learn_sigma": len(tensors["out.2.weight"]) == 2 * tensors["input_blocks.0.0.weight"].shape[1],
        "class_cond": "label_emb.weight" in tensors,
    }


def _words(flag: str, value: object) -> str:
    if flag == "channel_mult":
        return f"levels of {', '.join(map(str, value))} channels"
    if flag == "attention_resolutions":
        return f"attention at levels {', '.join(str(i) for i, there in enumerate(value) if there) or 'none'} of {len(value)}"
    return f"{flag} {value}"


_RESIDUAL = {
    "norm0": "in_layers.0", "conv0": "in_layers.2", "affine": "emb_layers.1", "norm1": "out_layers.0", "conv1": "out_layers.3",
    "skip": "skip_connection",
}  # fmt: skip
_ATTENTION = {"norm2": "norm", "qkv": "qkv", "proj": "proj_out"}


def original_names(config: ModelConfig) -> dict[str, str]:
    """Our key -> the original one, for every tensor of the network."""
    blocks = _blocks(config)
    ends = {
        "time_mlp.linear0": "time_embed.0", "time_mlp.linear1": "time_embed.2", "label_embed": "label_emb",
        f"encoder.{config.resolution}x{config.resolution}_conv": "input_blocks.0.0", "out_norm": "out.0", "out_conv": "out.2",
    }  # fmt: skip
    names = {}
    for key in expected_state(config):
        layer, kind = key.rsplit(".", 1)
        if layer in ends:
            names[key] = f"{ends[layer]}.{kind}"
        else:
            block, part = layer.rsplit(".", 1)
            residual, attention = blocks[block]
            names[key] = f"{residual}.{_RESIDUAL[part]}.{kind}" if part in _RESIDUAL else f"{attention}.{_ATTENTION[part]}.{kind}"
    return names


def _blocks(config: ModelConfig) -> dict[str, tuple[str, str]]:
    """Our block -> (its residual block, its attention) in the original."""
    settings, result = config.network, {}
    levels = range(len(settings.channel_mult))
    sides = [f"{config.resolution >> level}x{config.resolution >> level}" for level in levels]
    n = 1
    for level in levels:
        for name in ([f"{sides[level]}_down"] if level else []) + [
            f"{sides[level]}_block{i}" for i in range(settings.num_blocks)
        ]:
            result[f"encoder.{name}"] = f"input_blocks.{n}.0", f"input_blocks.{n}.1"
            n += 1
    result[f"decoder.{sides[-1]}_in0"] = "middle_block.0", "middle_block.1"
    result[f"decoder.{sides[-1]}_in1"] = "middle_block.2", ""
    n = 0
    for level in reversed(levels):
        for i in range(settings.num_blocks + 1):
            result[f"decoder.{sides[level]}_block{i}"] = f"output_blocks.{n}.0", f"output_blocks.{n}.1"
            n += 1
        if level:  # upsampling ends a level in the original, and begins the next one here
            attention = (config.resolution >> level) in settings.attn_resolutions
            result[f"decoder.{sides[level - 1]}_up"] = f"output_blocks.{n - 1}.{1 + attention}", ""
    return result


def _ours(key: str, tensor: Tensor) -> Tensor:
    if key == "label_embed.weight":
        return tensor.t()
    return tensor.unsqueeze(-1) if _in_attention(key) and tensor.ndim == 3 else tensor


def _wide(key: str, tensor: Tensor) -> Tensor:
    """As consistency_models has it."""
    return tensor.t() if key == "label_embed.weight" else tensor


def _narrow(key: str, tensor: Tensor) -> Tensor:
    """As guided-diffusion has it, with the kernels of the attention one-dimensional."""
    return tensor.squeeze(-1) if _in_attention(key) else _wide(key, tensor)


def _in_attention(key: str) -> bool:
    return key.endswith((".qkv.weight", ".proj.weight"))
