"""Files in the layouts of the original code, for tests of reading them, with a trap inside: pickles whose embedded source text
leaves a mark where it is executed.

`golden_state(name)` gives the weights of an original network, the `write_...` functions store them as the original code does.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import json
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden import settings, state
from torch import Tensor, nn

golden_state = state  # original key -> tensor of tests/golden/NAME.json
golden_settings = settings

BUFFERS = ("resample_filter", "freqs", "phases")  # last parts of the keys that are buffers in the original networks


def source(mark: Path | str | None) -> str:
    """Embedded source text: creates the file `mark` when it is executed."""
    return f"open({str(mark)!r}, 'w').close()\n" if mark else "raise AssertionError('embedded source was executed')\n"


def _reconstruct_persistent_obj(meta: dict) -> Any:
    """What the original does when such a file is opened with pickle: it executes the source that comes with it."""
    exec(meta["module_src"], {})
    return types.SimpleNamespace(**meta["state"])


class EasyDict(dict):
    pass


class Format(str, enum.Enum):
    NCHW = "NCHW"


_FAKES = {
    "torch_utils.persistence": [_reconstruct_persistent_obj],
    "dnnlib.util": [EasyDict],
    "timm.layers.format": [Format],
    "timm.layers.patch_embed": [type("PatchEmbed", (nn.Module,), {})],
    "timm.layers.mlp": [type("Mlp", (nn.Module,), {})],
    "timm.models.vision_transformer": [type("Attention", (nn.Module,), {})],
}
for _module, _members in _FAKES.items():
    for _member in _members:
        _member.__module__, _member.__qualname__ = _module, _member.__name__
PatchEmbed, Mlp, Attention = (_FAKES[name][0] for name in list(_FAKES)[3:])


@contextlib.contextmanager
def original_modules() -> Iterator[None]:
    """Modules of the original code can be imported within, as pickle demands for writing (and for opening) such a file."""
    names = {".".join(name.split(".")[: i + 1]) for name in _FAKES for i in range(name.count(".") + 1)}
    before = {name: sys.modules.get(name) for name in names}
    try:
        for name in sorted(names):
            module = types.ModuleType(name)
            for member in _FAKES.get(name, []):
                setattr(module, member.__name__, member)
            sys.modules[name] = module
        yield
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


class Persistent(nn.Module):
    """An object of a class under EDM's @persistence.persistent_class: stored with its source text."""

    def __init__(self, class_name: str, init_kwargs: dict | None = None, mark: Path | str | None = None, **attributes: Any):
        super().__init__()
        self.__dict__.update(attributes, _init_args=(), _init_kwargs=dict(init_kwargs or {}))
        self.__dict__["_hidden"] = (class_name, source(mark))

    def __reduce__(self) -> tuple:
        contents = dict(self.__dict__)
        class_name, text = contents.pop("_hidden")
        meta = {"type": "class", "version": 6, "module_src": text, "class_name": class_name, "state": contents}
        return _reconstruct_persistent_obj, (meta,), None

    __reduce_ex__ = lambda self, protocol: self.__reduce__()  # noqa: E731 - nn.Module has none of its own


def build_modules(top: nn.Module, tensors: dict[str, Tensor], *, persistent: bool, mark: Path | str | None = None) -> nn.Module:
    """Adds tensors under their dotted keys, with modules between: persistent ones as in EDM, or torch's and timm's as in DiT."""
    for key, value in tensors.items():
        node = top
        *path, last = key.split(".")
        for i, name in enumerate(path):
            if name not in node._modules:
                node._modules[name] = _module(name, path[i + 1 :], value, persistent, mark)
            node = node._modules[name]
        if last in BUFFERS:
            node.register_buffer(last, value.clone())
        else:
            node._parameters[last] = nn.Parameter(value.clone(), requires_grad=False)
    return top


def _module(name: str, below: list[str], value: Tensor, persistent: bool, mark: Path | str | None) -> nn.Module:
    if name in ("enc", "dec"):
        return nn.ModuleDict()
    if persistent:
        if below:
            return Persistent("UNetBlock", {"in_channels": 1}, mark, skip_scale=np.sqrt(0.5), num_heads=0)
        return Persistent("Conv2d" if value.ndim == 4 else "Linear" if value.ndim == 2 else "GroupNorm", {"eps": 1e-6}, mark)
    if name == "x_embedder":
        module = PatchEmbed()
        module.output_fmt = Format.NCHW
        return module
    if name == "attn":
        return Attention()
    if name == "mlp" and below and below[0].startswith("fc"):
        return Mlp()
    if below and below[0].isdigit():
        return nn.Sequential() if name in ("mlp", "adaLN_modulation") else nn.ModuleList()
    if below:
        return Persistent("DiTBlock", {}, mark) if name.isdigit() else Persistent(name.title().replace("_", ""), {}, mark)
    kind = {4: nn.Conv2d(1, 1, 1), 2: nn.Linear(1, 1), 1: nn.LayerNorm(1)}[value.ndim] if value.ndim else nn.Identity()
    kind._parameters.clear()
    return kind


def persistent_network(
    tensors: dict[str, Tensor],
    class_name: str,
    init_kwargs: dict,
    *,
    inner: str = "model",
    inner_class: str = "SongUNet",
    inner_kwargs: dict | None = None,
    mark: Path | str | None = None,
    **attributes: Any,
) -> Persistent:
    """A preconditioner around a network, both with their constructor arguments; the keys of `tensors` start with `inner`."""
    wrapper = ("img_resolution", "img_channels", "model_type", "use_fp16", "sigma_min", "sigma_max", "sigma_data")
    wrapper += ("noise_schedule", "f_type", "T", "eps", "temb_type", "time_scale", "mixed_precision", "logvar_channels")
    if inner_kwargs is None:
        channels = {k: init_kwargs["img_channels"] for k in ("in_channels", "out_channels") if "img_channels" in init_kwargs}
        inner_kwargs = {k: v for k, v in init_kwargs.items() if k not in wrapper or k == "img_resolution"} | channels
    top = Persistent(class_name, init_kwargs, mark, **attributes)
    top._modules[inner] = Persistent(inner_class, inner_kwargs, mark)
    return build_modules(top, tensors, persistent="DiT" not in inner_class, mark=mark)


def write_pickle(path: Path, content: Any, protocol: int | None = None) -> Path:
    """Plain pickle, as EDM, EDM2 and IMM store their snapshots."""
    with original_modules(), open(path, "wb") as file:
        pickle.dump(content, file, protocol)
    return Path(path)


def write_edm_pickle(
    path: Path,
    tensors: dict[str, Tensor],
    class_name: str = "EDMPrecond",
    init_kwargs: dict | None = None,
    *,
    inner_class: str = "SongUNet",
    mark: Path | str | None = None,
    extra: dict | None = None,
    protocol: int | None = None,
    **attributes: Any,
) -> Path:
    """An EDM or IMM network snapshot: {"ema", "loss_fn", "augment_pipe", "dataset_kwargs"}.

    `init_kwargs` are the wrapper's, such as img_resolution, img_channels, label_dim, model_type, model_channels; the network's
    follow from them. `attributes`: those that the constructor keeps (sigma_data=0.5). `extra`: more entries. `mark`: the file
    that executing the embedded source would create."""
    given = {"img_resolution": 8, "img_channels": 3, "label_dim": 0} if init_kwargs is None else init_kwargs
    ema = persistent_network(tensors, class_name, given, inner_class=inner_class, mark=mark, **attributes)
    augment = build_modules(Persistent("AugmentPipe", {"p": 0.12}, mark), {"Hz_geom": torch.ones(12)}, persistent=True)
    data = EasyDict(class_name="training.dataset.ImageFolderDataset", path="cifar10-32x32.zip", use_labels=True)
    content = {"ema": ema, "loss_fn": Persistent("EDMLoss", {}, mark, sigma_data=0.5), "augment_pipe": augment}
    return write_pickle(path, {**content, "dataset_kwargs": data, **(extra or {})}, protocol)


def write_edm2_pickle(
    path: Path,
    tensors: dict[str, Tensor],
    init_kwargs: dict | None = None,
    *,
    mark: Path | str | None = None,
    encoder: str = "StandardRGBEncoder",
    extra: dict | None = None,
    protocol: int | None = None,
    **attributes: Any,
) -> Path:
    """An EDM2 snapshot or post-hoc EMA: {"ema": Precond, "encoder", "loss_fn", "dataset_kwargs"}; keys start with "unet.", or are
    those of the uncertainty ("logvar_fourier.freqs", "logvar_linear.weight")."""
    given = {"img_resolution": 8, "img_channels": 3, "label_dim": 0} if init_kwargs is None else init_kwargs
    ema = persistent_network(tensors, "Precond", given, inner="unet", inner_class="UNet", mark=mark, **attributes)
    latents = {} if encoder == "StandardRGBEncoder" else {"scale": np.full(4, 0.1, np.float32), "_vae": None}
    content = {
        "ema": ema,
        "encoder": Persistent(encoder, {}, mark, **latents),
        "loss_fn": Persistent("EDM2Loss", {"P_mean": -0.8}, mark),
        "dataset_kwargs": EasyDict(class_name="training.dataset.ImageFolderDataset", resolution=64),
    }
    return write_pickle(path, {**content, **(extra or {})}, protocol)


def write_pt(
    path: Path,
    tensors: dict[str, Tensor],
    *,
    wrap: str | None = None,
    namespace: dict | None = None,
    prefix: str = "",
    extra: dict | None = None,
    legacy: bool = False,
) -> Path:
    """torch.save of a state dict: flat, or as `wrap` ("ema") beside `extra` and argparse.Namespace(**namespace) as "args".
    `prefix`: put before every key ("module."). `legacy`: the format from before torch 1.6."""
    content: dict[str, Any] = {prefix + key: value for key, value in tensors.items()}
    if wrap:
        content = {wrap: content}
    if namespace is not None:
        content["args"] = argparse.Namespace(**namespace)
    torch.save({**content, **(extra or {})}, path, _use_new_zipfile_serialization=not legacy)
    return Path(path)


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    from safetensors.torch import save_file

    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=metadata)
    return Path(path)


def write_diffusers(
    folder: Path,
    tensors: dict[str, Tensor],
    config: dict,
    scheduler: dict | None = None,
    *,
    component: str | None = "unet",
    flat: bool = False,
    kind: str = "safetensors",
    shards: int = 1,
) -> Path:
    """A diffusers folder; `config` needs _class_name. component None: the model's own folder, without a pipeline. flat: the first
    layout, where the files of a pipeline lie in one folder. kind: "safetensors" or "bin". Returns the pipeline's folder."""
    folder = Path(folder)
    place = folder if flat or component is None else folder / component
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(config))
    if component is not None:
        pipeline = "DiTPipeline" if component == "transformer" else "DDPMPipeline"
        index = {"_class_name": pipeline, component: ["diffusers", config["_class_name"]]}
        if scheduler:
            index["scheduler"] = ["diffusers", scheduler.get("_class_name", "DDPMScheduler")]
        (folder / "model_index.json").write_text(json.dumps(index))
    if scheduler:
        where = folder if flat or component is None else folder / "scheduler"
        where.mkdir(exist_ok=True)
        (where / "scheduler_config.json").write_text(json.dumps(scheduler))
    stem = "diffusion_pytorch_model"
    if shards == 1:
        _write_weights(place / f"{stem}.{kind}", tensors, kind)
        return folder
    keys, weight_map = list(tensors), {}
    for i in range(shards):
        name = f"{stem}-{i + 1:05d}-of-{shards:05d}.{kind}"
        weight_map.update(dict.fromkeys(keys[i::shards], name))
        _write_weights(place / name, {key: tensors[key] for key in keys[i::shards]}, kind)
    (place / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return folder


def _write_weights(path: Path, tensors: dict[str, Tensor], kind: str) -> None:
    write_safetensors(path, tensors) if kind == "safetensors" else torch.save(tensors, path)
