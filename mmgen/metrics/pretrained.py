"""Networks of `transformers`: DINOv2 features, and the two towers of CLIP.

Weights come from a local folder or a hub id, as safetensors only: pickled weights are never read.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..encoders.hub_folder import hub_folder
from ..encoders.quiet import quiet_libraries
from ..errors import ConfigError, ModelError, shortened
from ..system.files import sha256_of
from .towers import Towers

DINOV2 = "facebook/dinov2-large"
_WEIGHTS = "model.safetensors"
_FILES = ["*.json", "merges.txt", _WEIGHTS]  # of a repository, those that are downloaded
_DINOV2_SIZE = 224
_DINOV2_OFFSET = 0.1  # of DINOv2's own code, which interpolates its positions by (n + 0.1) / m and not n / m
_IMAGENET_MEAN = (123.675, 116.28, 103.53)  # 255 times 0.485, 0.456, 0.406
_IMAGENET_STD = (58.395, 57.12, 57.375)  # 255 times 0.229, 0.224, 0.225
_OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
_OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
_FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


@dataclass(frozen=True)
class Dinov2:
    """`extract` takes uint8 [N, 3, H, W] to features float32 [N, D]; `is_large`: ViT-L/14, the network of FD-DINOv2."""

    name: str
    sha256: str
    is_large: bool
    extract: Callable[[Tensor], Tensor]


def build_dinov2(path: str = "dinov2", device: torch.device | str = "cpu") -> Dinov2:
    """DINOv2 features as FD-DINOv2 takes them: the class token after the last layer norm, of images of 224 x 224.

    Oquab et al. (2023, arXiv:2304.07193); as a metric: Stein et al. (2023, arXiv:2306.04675); images resized by torch's
    bicubic with antialias in float and not clipped, as EDM2 (2024, arXiv:2312.02696). The position embeddings are
    interpolated as in DINOv2's published code and not as in transformers, which would be other features by a percent.

    Args:
        path: "dinov2" (facebook/dinov2-large), or a folder or hub id.

    Raises ConfigError where transformers is missing, ModelError where the weights are, or are of another architecture.
    """
    transformers = _transformers()
    path = DINOV2 if path == "dinov2" else path
    folder = _folder(path)
    model, digest = _load(transformers.Dinov2Model, "dinov2", folder, path, ignored=("embeddings.mask_token",))
    config = model.config
    if _DINOV2_SIZE % config.patch_size:
        raise ModelError(f"{path} has patches of {config.patch_size}, which do not divide {_DINOV2_SIZE}: not a DINOv2 model")
    _fix_positions(model, _DINOV2_SIZE // config.patch_size)
    model = model.to(device)
    mean, std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (_IMAGENET_MEAN, _IMAGENET_STD))

    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        size = (_DINOV2_SIZE, _DINOV2_SIZE)
        resized = functional.interpolate(images.float(), size, mode="bicubic", align_corners=False, antialias=True)
        return model(pixel_values=(resized - mean) / std).last_hidden_state[:, 0]

    is_large = (config.hidden_size, config.num_hidden_layers, config.patch_size) == (1024, 24, 14)
    return Dinov2(_name(path), digest, is_large, extract)


def clip_towers(path: str, device: torch.device | str = "cpu") -> Towers:
    """Both towers of a CLIP, from a folder or hub id such as openai/clip-vit-base-patch16. Texts are cut at the model's length.

    Images are brought to the model as its own preprocessor_config.json says, but on the device: resized in float, rounded
    to whole levels as an 8-bit resize does, cropped at the centre, normalised.

    Raises ConfigError where transformers is missing, ModelError where the weights are, or the preprocessing is unknown.
    """
    transformers = _transformers()
    folder = _folder(path)
    model, digest = _load(transformers.CLIPModel, "clip", folder, path)
    model = model.to(device)
    with quiet_libraries(), _readable(path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        settings, _ = transformers.CLIPImageProcessor.get_image_processor_dict(folder, local_files_only=True)
    prepare = _preprocessor(settings, path, device)
    longest = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def images(batch: Tensor) -> Tensor:
        return model.visual_projection(model.vision_model(pixel_values=prepare(batch.to(device))).pooler_output)

    @torch.no_grad()
    def texts(batch: list[str]) -> Tensor:
        tokens = tokenizer(batch, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(device)
        output = model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return model.text_projection(output.pooler_output)

    return Towers(_name(path), digest, True, model.config.projection_dim, images, texts)


def _preprocessor(settings: dict[str, Any], path: str, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """uint8 [N, 3, H, W] to float32 [N, 3, S, S] by the settings of a CLIP preprocessor."""
    resample = settings.get("resample", 3)
    if resample not in _FILTERS:
        raise ModelError(f"{path} resizes by Pillow's filter {resample}, and only 2 (bilinear) and 3 (bicubic) are known here")
    size, crop = settings.get("size", 224), settings.get("crop_size", 224)
    size = {"shortest_edge": size} if isinstance(size, int) else size
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    mean, std = (
        torch.tensor(settings.get(key, default), dtype=torch.float32, device=device).view(1, 3, 1, 1)
        for key, default in (("image_mean", _OPENAI_MEAN), ("image_std", _OPENAI_STD))
    )

    def prepare(images: Tensor) -> Tensor:
        x = images.float()
        if settings.get("do_resize", True):
            target = _target(tuple(x.shape[2:]), size)
            x = functional.interpolate(x, target, mode=_FILTERS[resample], align_corners=False, antialias=True)
            x = x.round().clamp(0, 255)
        if settings.get("do_center_crop", True):
            x = _centre_crop(x, crop["height"], crop["width"])
        if settings.get("do_rescale", True):
            x = x * settings.get("rescale_factor", 1 / 255)
        return (x - mean) / std if settings.get("do_normalize", True) else x

    return prepare


def _target(shape: tuple[int, int], size: dict[str, int]) -> tuple[int, int]:
    if "shortest_edge" not in size:
        return size["height"], size["width"]
    short, long = min(shape), max(shape)
    edge = size["shortest_edge"]
    other = int(edge * long / short)
    return (edge, other) if shape[0] <= shape[1] else (other, edge)


def _centre_crop(x: Tensor, height: int, width: int) -> Tensor:
    missing_y, missing_x = max(0, height - x.shape[2]), max(0, width - x.shape[3])
    if missing_y or missing_x:  # zeros around
        x = functional.pad(x, (missing_x // 2, missing_x - missing_x // 2, missing_y // 2, missing_y - missing_y // 2))
    top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
    return x[:, :, top : top + height, left : left + width]


def _fix_positions(model: torch.nn.Module, side: int) -> None:
    """Brings the position embeddings to a grid of `side` x `side` once, as DINOv2's published code does at each call."""
    table = model.embeddings.position_embeddings.detach().float()  # [1, 1 + M*M, D], the class token's first
    grid = math.isqrt(table.shape[1] - 1)
    if grid == side:
        return
    patches = table[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    scale = (side + _DINOV2_OFFSET) / grid
    patches = functional.interpolate(patches, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    fixed = torch.cat([table[:, :1], patches.permute(0, 2, 3, 1).reshape(1, side * side, -1)], dim=1)
    model.embeddings.position_embeddings = torch.nn.Parameter(fixed, requires_grad=False)


def _load(
    model_class: Any, model_type: str, folder: Path, path: str, ignored: tuple[str, ...] = ()
) -> tuple[torch.nn.Module, str]:
    """A model in float32, every weight of which comes from the file, and the file's SHA-256."""
    from transformers import AutoConfig

    with quiet_libraries(), _readable(path):
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != model_type:
            raise ModelError(f"{path} is a model of the type {config.model_type!r}, not {model_type!r}")
        model, report = model_class.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    missing = [key for key in report["missing_keys"] if key not in ignored]
    if missing or report["mismatched_keys"]:
        odd = [*missing, *(key if isinstance(key, str) else key[0] for key in report["mismatched_keys"])]
        raise ModelError(
            f"{folder / _WEIGHTS} does not fit its config.json: {', '.join(sorted(odd)[:3])} missing or of another shape"
        )
    return model.to(torch.float32).eval().requires_grad_(False), sha256_of(folder / _WEIGHTS)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("this needs transformers: pip install 'mmgen[clip]'") from error
    return transformers


def _folder(path: str) -> Path:
    """The folder of a model: `path` itself, or the hub's cache of it, filled by download where it is not complete."""

    def lacks(folder: Path) -> list[str]:
        return [name for name in ("config.json", _WEIGHTS) if not (folder / name).is_file()]

    folder = Path(path) if Path(path).is_dir() else hub_folder(path, _FILES, lambda found: not lacks(found))
    if missing := lacks(folder):
        raise ModelError(f"{path} holds no {missing[0]}: it takes a model saved by transformers, as safetensors in one file")
    return folder


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"cannot load {path}: {shortened(error, 300)}") from error


def _name(path: str) -> str:
    return Path(path).resolve().name if Path(path).exists() else path.rpartition("/")[2]
