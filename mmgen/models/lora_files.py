"""Files of adapters alone: what a student by LoRA adds to its teacher, beside the model file in which it is merged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from torch import Tensor

from ..errors import ConfigError, ModelError, shortened
from ..system.files import parse_json, replacing
from ..system.schema import from_dict
from ..system.tensor_files import save_tensors
from .config import ModelConfig, check_config
from .files import MODEL_FILE

LORA_KEY = "mmgen_lora"  # of the header


def lora_file(model_file: Path) -> Path:
    """Where the adapter lies beside a model file of a run: lora.safetensors, lora-best.safetensors ..."""
    return model_file.with_name(model_file.name.replace(Path(MODEL_FILE).stem, "lora", 1))


def save_lora(file: Path, rank: int, config: ModelConfig, state: dict[str, Tensor]) -> None:
    """Writes one .safetensors file, atomically. state: that of a `networks.lora.Adapted`; config: of the student."""
    header = {"rank": rank, "config": dataclasses.asdict(config)}
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    with replacing(file) as temporary:
        save_tensors(tensors, temporary, metadata={LORA_KEY: json.dumps(header)})


def read_lora(file: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The student's config and its adapter. Raises ModelError where it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            header = parse_json((opened.metadata() or {})[LORA_KEY])
            state = {key: opened.get_tensor(key) for key in opened.keys()}
        config = from_dict(ModelConfig, header["config"])
        check_config(config)
        return config, state
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise ModelError(f"{file} cannot be read as a file of adapters: {shortened(error, 300)}") from error
