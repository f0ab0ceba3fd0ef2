"""Where the weights are: folders of diffusers in both layouts, in one file or in shards, and repositories of the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import ModelError, shortened
from ..system.files import at_home, exists, read_json
from ..models.files import MODEL_FILE
from ..models.missing_run import missing_run

COMPONENTS = ("unet", "transformer")
_STEMS = ("diffusion_pytorch_model", "pytorch_model", "model")
_ENDINGS = ("safetensors", "safetensors.index.json", "bin", "bin.index.json", "fp16.safetensors", "fp16.bin")
BESIDE = re.compile(r"\.(fp16|non_ema)\.|\.(bin|msgpack|h5|onnx|onnx_data|bin\.index\.json)$")  # weights a second time
FUSE = "fuse them in diffusers (`pipe.fuse_lora()`), save the pipeline, and give that"
_LORA = ("adapter_config.json", "pytorch_lora_weights.safetensors")  # of peft, of diffusers
_SINGLE = (".pkl", ".pt", ".pth", ".bin", ".ckpt", ".safetensors")


@dataclass(frozen=True)
class Folder:
    """A folder of diffusers, or one with a model of mmgen."""

    files: list[Path]  # the shards of the weights; one file mostly
    arguments: dict[str, Any] = field(default_factory=dict)  # "config", "scheduler", "model_index"
    left_out: dict[str, str] = field(default_factory=dict)
    weight_map: dict[str, str] | None = None  # of shards: key -> file name


def weights_file(names: Collection[str]) -> str | None:
    """The file of weights among the names in a folder, safetensors before bin; an index where they are in shards."""
    for ending in _ENDINGS:
        for stem in _STEMS:
            if f"{stem}.{ending}" in names:
                return f"{stem}.{ending}"
    return None


def holds_weights(path: Path) -> bool:
    """Whether a file or folder is a model of anybody's, by its names alone; nothing in it is read."""
    if not path.is_dir():
        return path.is_file() and path.suffix.lower() in _SINGLE
    there = {one.name for one in path.iterdir()}
    parts = (f"{component}{end}" for component in COMPONENTS for end in ("", "_ema"))
    return "model_index.json" in there or weights_file(there) is not None or any((path / part / "config.json").is_file() for part in parts)


def model_folder(folder: Path) -> Folder:
    """What a folder holds. Raises ModelError, with one sentence, where it holds no model."""
    pipeline = _json(folder / "model_index.json")
    inside, left_out = folder, {}
    if pipeline is not None:
        inner = [folder / name for name in COMPONENTS if (folder / name / "config.json").is_file()]
        if not inner and not (folder / "config.json").is_file():
            raise ModelError(f"{folder} is a pipeline without a unet or transformer folder, which are what mmgen reads")
        inside = inner[0] if inner else folder
        for name, kind in pipeline.items():
            if isinstance(kind, list) and name not in (inside.name, "scheduler") and (folder / name).is_dir():
                left_out[name] = _role(name, any(str(part).startswith("text_encoder") for part in pipeline))
    config = _json(inside / "config.json")
    name = weights_file({path.name for path in inside.iterdir()})
    if name is None and any((inside / one).is_file() for one in _LORA):
        raise ModelError(f"{inside} is a LoRA without its model: {FUSE}")
    if name is None:
        raise ModelError(f"{inside} is a folder without weights: it has no diffusion_pytorch_model.safetensors or .bin")
    arguments = {} if config is None else {"config": config}
    above = [parent / "scheduler" for parent in (inside.parent.parent, inside.parent) if _has_pipeline(parent)]
    for scheduler in (inside, folder / "scheduler", *above):
        if (found := _json(scheduler / "scheduler_config.json")) is not None and config is not None:
            arguments["scheduler"] = found
    if pipeline is not None:
        arguments["model_index"] = pipeline
    if not name.endswith(".json"):
        return Folder([inside / name], arguments, left_out)
    weight_map = _weight_map(inside / name)
    return Folder([inside / shard for shard in sorted(set(weight_map.values()))], arguments, left_out, weight_map)


def _role(part: str, by_text: bool) -> str:
    """What a part of a pipeline beside the network is for."""
    if by_text and part.startswith(("vae", "text_encoder", "tokenizer")):
        return f"{'decodes latents' if part == 'vae' else 'encodes texts'}: used where it is"
    return "decodes latents: give it as --vae" if part == "vae" else "another part of the pipeline"


def _has_pipeline(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def _weight_map(path: Path) -> dict[str, str]:
    found = (_json(path) or {}).get("weight_map")
    if not isinstance(found, dict) or not found or any(type(name) is not str for name in found.values()):
        raise ModelError(f"{path} lists no weights: fetch it again")
    for name in set(found.values()):
        if PurePosixPath(name).name != name or "\\" in name or name in (".", ".."):
            raise ModelError(f"{path} names a file outside its folder, {ascii(name[:100])}: not opened")
        if not (path.parent / name).is_file():
            raise ModelError(f"{path.parent} lacks {name}, a part of the weights: fetch it again")
    return found


def _json(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: fetch it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no settings: fetch it again")
    return content


def locate(source: str | os.PathLike) -> Path:
    """The file or folder that a name means: a path, hf://user/name, user/name, or hf://user/name/file for one file of it.

    A run folder of mmgen's means the model in it. Of a repository, only the settings and one set of weights are fetched. Raises
    ModelError saying where it looked.
    """
    path = at_home(source)
    if exists(path):
        return path / MODEL_FILE if (path / MODEL_FILE).is_file() and (path / "log.jsonl").is_file() else path
    given = str(source)
    repository, _, file = given.removeprefix("hf://").partition("/")
    name, _, file = file.partition("/")
    if (sentence := missing_run(given)) is not None:
        raise ModelError(sentence)
    local = given.startswith(("/", ".", "~")) or not name or (not given.startswith("hf://") and (file or name.endswith(_SINGLE)))
    if local:
        raise ModelError(
            f"there is no file or folder {source if len(given) < 1000 else shortened(given)}: give one, or a hub repository as hf://user/name"
        )
    return _fetch(f"{repository}/{name}", file)


def _fetch(repository: str, file: str) -> Path:
    from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download

    try:
        if file:
            return Path(hf_hub_download(repository, file))
        try:
            wanted = _wanted(HfApi().list_repo_files(repository), repository)
            escaped = [re.sub(r"([*?[])", r"[\1]", name) for name in wanted]
            folder = Path(snapshot_download(repository, allow_patterns=escaped))
        except (ModelError, errors.HfHubHTTPError, errors.HFValidationError):
            raise
        except Exception:  # the hub cannot be reached, which httpx and requests say in their own ways: what is in the cache?
            folder = Path(snapshot_download(repository, local_files_only=True))
            names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
            wanted = _wanted(names, repository)
        return folder / wanted[0] if len(wanted) == 1 else folder
    except ModelError:
        raise
    except Exception as error:  # huggingface_hub's own, and those of requests or httpx, by version
        looked = f"there is no file or folder {repository}, and the hub repository {repository}"
        raise ModelError(f"{looked} {_reason(file, error)}") from error


def _reason(file: str, error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        return "is not in the local cache and the hub cannot be reached"
    if isinstance(error, errors.GatedRepoError):
        return "asks for a token: accept its terms on its page, then run `hf auth login`"
    if isinstance(error, errors.EntryNotFoundError):
        return f"holds no {file}"
    return f"cannot be read ({type(error).__name__}): check the name, or run `hf auth login` for a private one"


def _wanted(names: list[str], repository: str) -> list[str]:
    """The files of a repository to fetch: the settings and one set of weights; or the only checkpoint there."""
    for prefix in (*(f"{component}/" for component in COMPONENTS), ""):
        here = [name.removeprefix(prefix) for name in names if name.startswith(prefix) and "/" not in name.removeprefix(prefix)]
        weights = weights_file(here)
        if weights is None or (prefix and "config.json" not in here):
            continue
        ending = weights.removesuffix(".index.json")
        shards = [n for n in here if n.endswith(Path(ending).suffix) and "-of-" in n] if weights != ending else []
        settings = ("model_index.json", "config.json", "scheduler_config.json", "scheduler/scheduler_config.json")
        others = [n for n in names if n.startswith(("text_encoder", "tokenizer", "vae/")) and not BESIDE.search(n)]
        others = others if any(n.startswith("text_encoder") for n in others) else []  # of a pipeline of texts: all its parts
        return [
            prefix + weights, *(prefix + n for n in shards), *others, *{n for n in names if n in (*settings, prefix + "config.json")}
        ]  # fmt: skip
    single = [name for name in names if name.endswith(_SINGLE)]
    if len(single) == 1:
        return single
    if not single:
        raise ModelError(f"the hub repository {repository} holds no weights that mmgen reads")
    choice = ", ".join(f"hf://{repository}/{name}" for name in single[:6])
    raise ModelError(f"the hub repository {repository} holds several files of weights: choose one of {choice}")
