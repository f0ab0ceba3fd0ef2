"""Whose checkpoint a file is, by what is in it, and what mmgen can do with it: behind `mmgen convert` and `mmgen inspect`."""

from __future__ import annotations

import re
from collections import Counter
from types import ModuleType
from typing import Any, NamedTuple

from .. import __version__
from ..errors import ConfigError, ModelError, nearest
from . import adm, diffusers, dit, edm, edm2, imm, pipelines
from .family import Converted, ConvertOptions
from .model_folders import FUSE
from .reading import Found


class Family(NamedTuple):
    title: str
    module: ModuleType | None = None  # with `family`, `convert` and `original_state`; None: mmgen's own
    options: tuple[str, ...] = ()  # those of guide_all, heads and num_classes that it takes


# A further family is a file and a line here. The modules are asked in this order which of their families a file is of, if any.
FAMILIES = {  # by name, which is also Converted.family
    "mmgen": Family("mmgen's own"),
    "imm": Family("Inductive Moment Matching (lumaai/imm)", imm, ("heads", "num_classes")),
    "edm2": Family("EDM2 (NVlabs/edm2)", edm2),
    "edm": Family("EDM (NVlabs/edm)", edm),
    "diffusers-text": Family("text-to-image pipeline of diffusers", pipelines),
    "diffusers-unet2d": Family("UNet2DModel of diffusers", diffusers),
    "diffusers-dit": Family("DiT of diffusers", diffusers),
    "dit": Family("DiT (facebookresearch/DiT)", dit, ("guide_all", "heads", "num_classes")),
    "sit": Family("SiT (willisma/SiT)", dit, ("guide_all", "heads", "num_classes")),
    "repa": Family("REPA (sihyun-yu/REPA)", dit, ("heads", "num_classes")),
    "adm": Family("ADM (openai/guided-diffusion)", adm),
    "consistency": Family("consistency models (openai/consistency_models)", adm),
}
UNSUPPORTED = {  # recognised, so that it is not taken for another: a title, and why or what goes on
    "lightningdit": ("LightningDiT (hustvl/LightningDiT)", ", whose rotary positions, RMS norms and SwiGLU no network of mmgen has"),
    "lora": ("LoRA without its model", f": {FUSE}"),
}
_LORA = re.compile(r"lora[._](A|B|down|up)\b")  # names of peft, diffusers and others
_PRECISIONS = ("fp32", "fp16")


def family_of(found: Found) -> str | None:
    """A name in FAMILIES or UNSUPPORTED, from the names of the tensors and what the file says; None for a file of none of them."""
    if "mmgen" in found.arguments:
        return "mmgen"
    modules = dict.fromkeys(family.module for family in FAMILIES.values() if family.module is not None)
    name = next((name for module in modules if (name := module.family(found)) is not None), None)
    return "lora" if name is None and any(_LORA.search(key) for key in found.tensors) else name


def convert(found: Found, options: ConvertOptions = ConvertOptions()) -> Converted:
    """The model under mmgen's names, by the family that it is of.

    Raises ModelError where no family is recognised, or where its tensors or settings are not what its family's are, and
    ConfigError where an option is missing, unknown or contradicts the file.
    """
    if options.precision not in (None, *_PRECISIONS):
        raise ConfigError(f"unknown precision {options.precision!r}: {nearest(options.precision, _PRECISIONS)}")
    for name, value in (("--heads", options.heads), ("--num-classes", options.num_classes)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")
    family = family_of(found)
    if family == "mmgen":
        raise ModelError(f"{found.path} is a model of mmgen's already: sample from it as it is")
    if family in UNSUPPORTED:
        raise ModelError(f"{found.path} is a {''.join(UNSUPPORTED[family])}")
    if family is None:
        first = ", ".join(ascii(key[:60])[1:-1] for key in list(found.tensors)[:3])
        known = ", ".join(known.title for name, known in FAMILIES.items() if name != "mmgen")
        raise ModelError(f"{found.path} is of no family that mmgen knows (its tensors: {first} ...); known: {known}")
    taken = FAMILIES[family].options
    if options.guide_all and "guide_all" not in taken:
        raise ConfigError(f"--guide-all is for DiT and SiT files, and {found.path} is none: leave it out")
    if (options.heads or options.num_classes) and "heads" not in taken:
        raise ConfigError(f"--heads and --num-classes are for DiT and its kin, and {found.path} says these itself: leave them out")
    try:
        return FAMILIES[family].module.convert(found, options)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise ModelError(
            f"{found.path} says of its network what {FAMILIES[family].title} never does ({type(error).__name__}: {str(error)[:100]})"
        ) from error


def complete(converted: Converted) -> Converted:
    """With what of its state other parts than the network have to make, which `convert` leaves at 0: a pipeline's null."""
    return pipelines.with_null(converted) if converted.family == pipelines.NAME else converted


def provenance(found: Found, converted: Converted, weights: str) -> dict[str, Any]:
    """Where a converted model comes from, for its config and its card."""
    return {
        "file": found.path.name,
        "sha256": found.sha256,
        "container": found.container,
        "family": converted.family,
        "mmgen_version": __version__,
        "weights": weights,
        "left_out": found.left_out | converted.left_out,
        "assumed": list(converted.assumed),
        "sampled": list(converted.sampled),
    }


def describe(found: Found, options: ConvertOptions = ConvertOptions()) -> dict[str, Any]:
    """What `mmgen inspect` says of a file: words, numbers, and a list under "left out" and "mmgen can"."""
    family = family_of(found)
    numbers = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in found.tensors.values())
    rows: dict[str, Any] = {
        "file": str(found.path),
        "container": found.container,
        "family": _family_words(found, family),
        "tensors": len(found.tensors),
        "numbers in them": sum(tensor.numel() for tensor in found.tensors.values()),
        "precision": ", ".join(f"{dtype} ({count})" if len(numbers) > 1 else dtype for dtype, count in numbers.most_common()),
    }
    if name := found.arguments.get("class_name"):
        inner = found.arguments.get("modules", {}).values()
        rows["class"] = ", ".join([name, *(module["class_name"] for module in inner)])
    rows |= {"left out": [f"{key}: {reason}" for key, reason in found.left_out.items()], "sha256": found.sha256}
    if family is None:
        return rows | {"mmgen can": ["nothing: it is of no family that mmgen knows"]}
    if family == "mmgen":
        return rows | _shape(found.arguments["mmgen"].get("config", {})) | {"mmgen can": ["sample from it: mmgen sample"]}
    try:
        converted = convert(found, options)
    except ConfigError as error:
        if family == "dit":  # SiT's tensors have the same names
            rows["family"] = "DiT or SiT"
        if family in ("adm", "consistency") and not options.preset:  # nor do those two
            rows["family"] = "ADM or consistency models"
        return rows | {"mmgen can": [f"convert it, once told more: {error}"]}
    except ModelError as error:
        return rows | {"mmgen can": [f"not convert it: {error}"]}
    config = converted.config
    rows["family"] = FAMILIES[converted.family].title
    shape = {"resolution": config.resolution, "channels": config.channels, "num_classes": config.num_classes, "text": config.text}
    rows["left out"] += [f"{key}: {reason}" for key, reason in converted.left_out.items()]
    rows |= {"assumed": list(converted.assumed), "sampling": list(converted.sampled)}
    return rows | _shape(shape) | {"mmgen can": _abilities(converted)}


def _family_words(found: Found, family: str | None) -> str:
    """The family in words; a class of diffusers that is none of the supported ones by its own name."""
    from .diffusers_dit import is_dit

    config = found.arguments.get("config")
    name = str(config.get("_class_name", "")) if isinstance(config, dict) else ""
    if family in ("diffusers-unet2d", "diffusers-dit") and name and name != "UNet2DModel" and not is_dit(config):
        return f"{ascii(name)[1:-1]} of diffusers"
    if family == pipelines.NAME and not found.arguments.get("model_index") and name:  # the network of a pipeline alone
        return f"{ascii(name)[1:-1]} of diffusers"
    return FAMILIES[family].title if family in FAMILIES else UNSUPPORTED.get(family, ("unknown",))[0]


def _shape(config: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(config, dict) or "resolution" not in config:
        return {}
    side, classes = config["resolution"], config.get("num_classes")
    return {"draws": f"{config.get('channels')} x {side} x {side}" + (f", {classes} classes" if classes else ", of a text" if config.get("text") else ", without classes")}


def _abilities(converted: Converted) -> list[str]:
    from .diffusers import pipeline_of
    from .pipeline_export import scheduler_of

    kind = "a flow map" if converted.config.denoiser is None else "a denoiser"
    able = [f"convert it to {kind}, and sample from that: mmgen convert, mmgen sample"]
    try:
        if converted.family == pipelines.NAME:
            scheduler_of(converted.config)
        else:
            pipeline_of(converted.config, converted.state)
        able.append("write it as a folder of diffusers: mmgen convert --to diffusers")
    except ConfigError as error:
        able.append(f"not write it for diffusers: {error}")
    return [*able, "write it back under its original names: mmgen convert --to pt"]
