"""Texts as a pipeline of diffusers has them: its own tokenizers and encoders, called by its own `encode_prompt`.

Only the text parts are loaded, float32, from safetensors, and no code of the folder is run. The null is the pipeline's own: ""
encoded (Sana's without its instruction), or zeros where SDXL says `force_zeros_for_empty_prompt`.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, ModelError, nearest, shortened
from ..system.files import at_home, read_json, sha256_of
from .hub_folder import hub_folder
from .quiet import quiet_libraries

# Pipelines whose encoders are CLIP's alone: a caption costs 2 % of the denoiser's work, and 0.1 to 0.3 MB to keep
CLIP_ONLY = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
# and those with T5 or Gemma, with the tokens that these give unless the settings say otherwise
LENGTHS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300, "StableDiffusion3Pipeline": 256, "SanaPipeline": 300}
PIPELINES = (*CLIP_ONLY, *LENGTHS)
WITH_SIZES = ("StableDiffusionXLPipeline",)  # which also know an image's original size and crop
_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel", "Gemma2Model")
_FILES = ["model_index.json", "transformer/config.json", "text_encoder*/*.json", "text_encoder*/*.safetensors", "tokenizer*/*"]
_SUFFIXES = (".safetensors", ".json", ".txt", ".model")  # of the files that decide what a text becomes
_INDEX = "model_index.json"

Encoded = tuple[Tensor, Tensor, Tensor | None]  # tokens float32 [N, L, D], mask bool [N, L], pooled [N, P]; on the CPU or the device


@dataclass(frozen=True)
class PipelineEncoder:
    """The text parts of a pipeline. `length`: of its tokens; None: the pipeline's own."""

    pipeline: Any
    name: str  # its class
    sha256: str
    length: int | None = None

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], device: str = "cpu") -> Encoded:
        """What the network is given for these prompts."""
        self._move(device)
        with quiet_libraries():
            found = self.pipeline.encode_prompt(prompt=list(texts), do_classifier_free_guidance=False, **self._arguments(device))
        return self._sorted(found, negative=False)

    @torch.no_grad()
    def null(self, negative: str = "", device: str = "cpu") -> Encoded:
        """What guidance leads away from, one row: a negative prompt, or the pipeline's own where it is ""."""
        self._move(device)
        prompt = negative or (None if self.name in (*CLIP_ONLY, "StableDiffusion3Pipeline") else "")
        given = {"prompt": ["a"], "negative_prompt": [prompt] if prompt is not None else None}
        with quiet_libraries():
            found = self.pipeline.encode_prompt(do_classifier_free_guidance=True, **given, **self._arguments(device))
        return self._sorted(found, negative=True)

    def count_cut(self, texts: Sequence[str]) -> int:
        """How many of the texts none of the encoders reads to the end."""
        if not texts:
            return 0
        prepared, limits = self._prepared(texts), self._limits()
        with quiet_libraries():
            lengths = [[len(ids) for ids in one(prepared, truncation=False)["input_ids"]] for one, _ in limits]
        return sum(all(n > most for n, (_, most) in zip(row, limits)) for row in zip(*lengths, strict=True))

    def count_kept(self, texts: Sequence[str]) -> int:
        """Of how many tokens under the mask these texts consist."""
        if self.name not in ("PixArtAlphaPipeline", "PixArtSigmaPipeline", "SanaPipeline"):  # without a mask
            return len(texts) * (self.length or self(["a"])[0].shape[1])
        ((tokenizer, most),) = self._limits()
        fewer = most - (self.length or LENGTHS[self.name])  # those of an instruction, which are not kept
        with quiet_libraries():
            return sum(min(len(ids), most) - fewer for ids in tokenizer(self._prepared(texts), truncation=False)["input_ids"])

    def _prepared(self, texts: Sequence[str]) -> list[str]:
        """As the tokenizer sees them."""
        if self.name in CLIP_ONLY or self.name == "StableDiffusion3Pipeline":
            return list(texts)
        prepared, instruction = self.pipeline._text_preprocessing(list(texts)), self._arguments().get("complex_human_instruction")
        return prepared if instruction is None else ["\n".join(instruction) + text for text in prepared]

    def _limits(self) -> list[tuple[Any, int]]:
        """Each tokenizer and the most tokens that its encoder takes."""
        parts, arguments = self.pipeline, self._arguments()
        if self.name in CLIP_ONLY:
            both = [getattr(parts, name, None) for name in ("tokenizer", "tokenizer_2")]
            return [(one, one.model_max_length) for one in both if one is not None]
        most = arguments["max_sequence_length"]
        if self.name == "StableDiffusion3Pipeline":
            clip = [(one, parts.tokenizer_max_length) for one in (parts.tokenizer, parts.tokenizer_2)]
            return clip + ([(parts.tokenizer_3, most)] if parts.text_encoder_3 is not None else [])
        if self.name == "SanaPipeline":
            most += len(parts.tokenizer.encode("\n".join(arguments["complex_human_instruction"]))) - 2
        return [(parts.tokenizer, most)]

    def _move(self, device: str) -> None:
        for part in vars(self.pipeline).values():
            if isinstance(part, torch.nn.Module):
                part.to(device)

    def _arguments(self, device: str = "cpu") -> dict[str, Any]:
        given: dict[str, Any] = {"device": torch.device(device), "num_images_per_prompt": 1}
        if self.name == "StableDiffusion3Pipeline":
            given |= {"prompt_2": None, "prompt_3": None}
        if self.name in LENGTHS:
            clip = self.pipeline.tokenizer_max_length if self.name == "StableDiffusion3Pipeline" else 0
            given["max_sequence_length"] = LENGTHS[self.name] if self.length is None else self.length - clip
        if self.name == "SanaPipeline":
            given["complex_human_instruction"] = inspect.signature(type(self.pipeline).__call__).parameters["complex_human_instruction"].default
        return given

    def _sorted(self, found: tuple[Tensor | None, ...], negative: bool) -> Encoded:
        """`encode_prompt` gives what a prompt and a negative one become in turn, tokens first; then masks, or pooled vectors."""
        if self.name in ("PixArtAlphaPipeline", "PixArtSigmaPipeline", "SanaPipeline"):  # both of the prompt, both of the negative
            tokens, mask = found[2:] if negative else found[:2]
            return tokens.float(), mask.bool(), None
        tokens, *pooled = found[negative::2]
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return tokens.float(), mask, pooled[0].float() if pooled else None


@lru_cache(maxsize=1)
def pipeline_encoder(path: str, name: str, length: int | None = None) -> PipelineEncoder:
    """The text parts of the pipeline in a folder or repository, which must be of the class `name`.

    Raises ConfigError where diffusers or transformers is missing, and ModelError with one sentence for what is not whole, of
    another class, or not safe to read.
    """
    folder = text_folder(path)
    index = read_index(folder, path, name)
    parts = {part: _load(folder / part, kind, part, path) for part, kind in _text_parts(index).items()}
    _check_parts(index, parts, name, path)
    pipeline_class = _class_of("diffusers", name)
    others = [key for key in inspect.signature(pipeline_class.__init__).parameters if key not in ("self", *parts)]
    options = {"requires_safety_checker": False, "add_watermarker": False,
               "force_zeros_for_empty_prompt": index.get("force_zeros_for_empty_prompt", True)}  # fmt: skip
    with quiet_libraries():
        pipeline = pipeline_class(**parts, **{key: options.get(key) for key in others})
    if name == "StableDiffusion3Pipeline" and parts.get("text_encoder_3") is None:  # zeros stand for T5, as wide as this says
        pipeline.transformer = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=_joint_width(folder, path)))
    encoder = PipelineEncoder(pipeline, name, text_sha256(folder), length)
    if name in CLIP_ONLY and length not in (None, pipeline.tokenizer_2.model_max_length if name in WITH_SIZES else pipeline.tokenizer.model_max_length):
        raise ConfigError(f"text.length is {length}, and the encoders of {path} give {encoder(['a'])[0].shape[1]} tokens: leave it out")
    return encoder


def text_folder(path: str) -> Path:
    """The folder of a pipeline: on this machine, or the hub's cache filled with the text parts. Raises ModelError."""
    folder = at_home(path)
    return folder if folder.exists() else hub_folder(path, _FILES, lambda found: (found / _INDEX).is_file())


def read_index(folder: Path, path: str, name: str | None = None) -> dict[str, Any]:
    """model_index.json of a pipeline that mmgen knows, of the class `name` if given. Raises ModelError."""
    try:
        index = read_json(folder / _INDEX)
        found = index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = "it has no model_index.json" if not (folder / _INDEX).is_file() else shortened(error)
        raise ModelError(f"{path} is not the folder of a pipeline of diffusers: {what}") from error
    if found not in PIPELINES:
        raise ModelError(f"{path} is a pipeline of the class {shortened(found)}, which mmgen does not know: {nearest(str(found), PIPELINES)}")
    if name not in (None, found):
        raise ModelError(f"{path} is a {found}, and the model's texts are encoded by a {name}")
    return index


def text_sha256(folder: Path) -> str:
    """The SHA-256 of a pipeline's text parts: of the names and contents of their weights, settings and vocabularies."""
    index = read_index(folder, str(folder))
    digest = hashlib.sha256(f"{index['_class_name']} {index.get('force_zeros_for_empty_prompt')}\n".encode())
    for part in sorted(_text_parts(index)):
        for path in sorted(p for p in (folder / part).glob("*") if p.suffix in _SUFFIXES and ".fp16." not in p.name):
            digest.update(f"{part}/{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def _text_parts(index: dict[str, Any]) -> dict[str, str]:
    """Names of the text parts that the pipeline has -> their classes of transformers. Raises ModelError for another library's."""
    found = {}
    for part, value in index.items():
        if not part.startswith(("text_encoder", "tokenizer")) or value in (None, [None, None]):
            continue
        if not (isinstance(value, list) and len(value) == 2 and value[0] == "transformers" and isinstance(value[1], str)):
            raise ModelError(f"the pipeline's {part} is {shortened(value)}: only encoders and tokenizers of transformers are read")
        found[part] = value[1]
    return found


def _check_parts(index: dict[str, Any], parts: dict[str, Any], name: str, path: str) -> None:
    """Raises ModelError where a text part is missing that cannot be done without."""
    needed = {
        "StableDiffusionXLPipeline": ("text_encoder_2", "tokenizer_2"),
        "StableDiffusion3Pipeline": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    }.get(name, ("text_encoder", "tokenizer"))
    if missing := [part for part in needed if part not in parts]:
        raise ModelError(f"{path} has no {missing[0]} (null in its {_INDEX}), without which no text can be encoded: fetch the whole pipeline")


def _load(folder: Path, kind: str, part: str, path: str) -> Any:
    is_encoder = part.startswith("text_encoder")
    if not (kind in _ENCODERS if is_encoder else kind.endswith(("Tokenizer", "TokenizerFast")) and kind.isidentifier()):
        raise ModelError(f"the {part} of {path} is a {shortened(kind)}, which mmgen does not read")
    if not folder.is_dir():
        raise ModelError(f"{path} has no folder {part}, which its {_INDEX} names: fetch the whole pipeline")
    try:
        found = _class_of("transformers", kind)
        if not is_encoder:
            return found.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _check_weights(folder, part, path)
        with quiet_libraries():
            model, report = found.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True,
                dtype=torch.float32,
            )  # fmt: skip
    except (ModelError, ConfigError):
        raise
    except Exception as error:  # whatever transformers, tokenizers and safetensors raise for what they cannot read
        raise ModelError(f"the {part} of {path} cannot be read: {shortened(error, 300)}") from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"the {part} of {path} is not whole: its weights lack {', '.join(missing[:3])}")
    return model.float().eval().requires_grad_(False)


def _check_weights(folder: Path, part: str, source: str) -> None:
    """Raises ModelError unless there are weights in full precision as safetensors."""
    names = [path.name for path in folder.iterdir()]
    if any(name.endswith((".safetensors", ".safetensors.index.json")) and ".fp16." not in name for name in names):
        return
    variant = next((name for name in names if ".fp16." in name), None)
    pickled = next((name for name in names if name.endswith(".bin")), None)
    if variant is not None:
        raise ModelError(
            f"the {part} of {source} holds weights in half precision only ({variant}): fetch model.safetensors too, or load the "
            "pipeline with variant='fp16' in diffusers and save it again with save_pretrained"
        )
    if pickled is not None:
        raise ModelError(
            f"the {part} of {source} holds only {pickled}, a pickle, which is not read: load the pipeline in diffusers and save it "
            "again with save_pretrained"
        )
    raise ModelError(f"the {part} of {source} holds no weights (model.safetensors): fetch the whole pipeline")


def _joint_width(folder: Path, path: str) -> int:
    try:
        return int(read_json(folder / "transformer" / "config.json")["joint_attention_dim"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} has no T5 encoder, and no transformer/config.json that says how wide its texts are") from error


def _class_of(library: str, name: str) -> Any:
    try:
        module = __import__(library)
        return getattr(module, name)
    except ImportError as error:
        raise ConfigError("the text encoders of a pipeline need diffusers and transformers: pip install 'mmgen[latents,clip]'") from error
    except AttributeError as error:
        raise ModelError(f"this version of {library} has no {shortened(name)}") from error
