"""What a family of checkpoints is asked for, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from torch import Tensor

from ..report.push import CONVERTED

if TYPE_CHECKING:
    from ..models.config import ModelConfig


@dataclass(frozen=True)
class ConvertOptions:
    """What the user says about a file, where the file does not say it itself."""

    type: str | None = None  # "sit" or "dit", where keys cannot tell
    preset: str | None = None  # names what an ADM file does not hold
    precision: str | None = None  # None: as in the file; "fp32", "fp16"
    heads: int | None = None  # attention heads of a transformer, whose tensors do not tell
    num_classes: int | None = None  # of a transformer: whether the last class embedding is that of no class
    guide_all: bool = False  # DiT and SiT: guidance on all channels, not on the first three as their code has it


def words_of(options: ConvertOptions) -> str:
    """The options that are given, as on the command line.

    >>> words_of(ConvertOptions(heads=4, guide_all=True))
    '--heads, --guide-all'
    """
    given = (option.name for option in fields(options) if getattr(options, option.name) != option.default)
    return ", ".join(f"--{name.replace('_', '-')}" for name in given)


@dataclass(frozen=True)
class Converted:
    """A model under our names. Every tensor of the original is in `state` or in `left_out`."""

    config: ModelConfig
    state: dict[str, Tensor]  # under our key names, dtype as in the file
    left_out: dict[str, str]  # original tensor name -> the reason
    family: str  # "edm", "edm2", "adm", "consistency", "dit", "sit", "imm", "diffusers-unet2d" ...
    assumed: tuple[str, ...] = ()  # facts that neither the file nor an option says, a sentence each
    sampled: tuple[str, ...] = ()  # where sampling follows the original's way, a sentence each


def origin_of(config: ModelConfig) -> str | None:
    """The family whose names a model's tensors have: that of what it was converted from, also through its teacher."""
    teacher = config.training.get("distilled", {})
    origin = config.training.get(CONVERTED) or (teacher.get(CONVERTED) if isinstance(teacher, dict) else None) or {}
    return "imm" if config.flow is not None else origin.get("family")


def instead(config: ModelConfig) -> str:
    """What can be done with a model that diffusers has no class for."""
    return "use --to pt for its original names" if origin_of(config) else "sample from it with mmgen"
