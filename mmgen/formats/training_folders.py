"""Folders that a training leaves: of accelerate, DeepSpeed, torch.distributed and diffusers' scripts. Where in them the weights
are, or what the folder is and which command makes weights of it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from ..errors import ModelError

_COMPONENTS = ("unet", "transformer")
_DEEPSPEED = re.compile(r"mp_rank_\d+_model_states\.pt")
_ZERO3 = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")


def weights_place(folder: Path, weights: str) -> tuple[Path, dict[str, str]]:
    """(the file or folder with the weights, what is left out), which is the folder itself unless a training wrote it.

    Raises ModelError, naming what the folder is and how to go on, where the weights are in shards or there are several models.
    """
    names = {path.name for path in folder.iterdir()}
    if ".metadata" in names and any(name.endswith(".distcp") for name in names):
        raise _sharded(folder)
    for name in sorted(names):
        if name.startswith("pytorch_model_fsdp") and (folder / name / ".metadata").is_file():
            raise _sharded(folder / name)
    if (folder / "latest").is_file() and (inner := _tagged(folder)) is not None:
        return _deepspeed(inner, folder)
    if any(_DEEPSPEED.fullmatch(name) or _ZERO3.fullmatch(name) for name in names):
        return _deepspeed(folder, folder.parent)
    for first, second in (("model.safetensors", "model_1.safetensors"), ("pytorch_model.bin", "pytorch_model_1.bin")):
        if {first, second} <= names:
            raise ModelError(
                f"{folder} is a state of accelerate with several models, {first} and {second}: give one of the files, such as "
                f"{folder / second}"
            )
    if not {"model_index.json", "config.json"} & names:
        return _of_diffusers(folder, names, weights)
    return folder, {}


def _sharded(folder: Path) -> ModelError:
    return ModelError(
        f"{folder} is a checkpoint of torch.distributed (DCP), in shards: make one file of it with `python -m "
        f"torch.distributed.checkpoint.format_utils dcp_to_torch {shlex.quote(str(folder))} weights.pt`, and give that"
    )


def _tagged(folder: Path) -> Path | None:
    """The folder that DeepSpeed's file `latest` names, if it is one beside it."""
    try:
        tag = (folder / "latest").read_text()[:200].strip()
    except (OSError, UnicodeDecodeError):
        return None
    return folder / tag if tag and Path(tag).name == tag and tag not in (".", "..") and (folder / tag).is_dir() else None


def _deepspeed(folder: Path, root: Path) -> tuple[Path, dict[str, str]]:
    names, top = sorted(path.name for path in folder.iterdir()), shlex.quote(str(root))
    whole = [name for name in names if _DEEPSPEED.fullmatch(name)]
    if any(_ZERO3.fullmatch(name) for name in names):
        raise ModelError(
            f"{folder} is a checkpoint of DeepSpeed's ZeRO-3, in shards: make one file of it with `python {top}/zero_to_fp32.py "
            f"{top} OUT`, and give the file in OUT"
        )
    if len(whole) != 1:
        raise ModelError(f"{folder} is a checkpoint of DeepSpeed with {len(whole)} parts of the model: only whole ones are read")
    return folder / whole[0], {name: "optimizer state" for name in names if name.endswith("_optim_states.pt")}


def _of_diffusers(folder: Path, names: set[str], weights: str) -> tuple[Path, dict[str, str]]:
    """A checkpoint-N of diffusers' training scripts, which keeps the network and its average in folders."""
    for component in _COMPONENTS:
        there = [name for name in (f"{component}_ema", component) if (folder / name / "config.json").is_file()]
        if there:
            chosen = component if weights == "model" and component in there else there[0]
            others = {name: "the other of the network and its average" for name in there if name != chosen}
            return folder / chosen, others
    numbered = [(int(match[1]), name) for name in names if (match := re.fullmatch(r"checkpoint-(\d+)", name))]
    if numbered and not any(name.endswith((".safetensors", ".bin")) for name in names):
        raise ModelError(
            f"{folder} is the folder of a training with {len(numbered)} checkpoints: give one of them, such as the newest, "
            f"{folder / max(numbered)[1]}"
        )
    return folder, {}
