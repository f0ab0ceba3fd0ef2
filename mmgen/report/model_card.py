"""The model card: what a model is, where its weights come from, under which licence, and how to sample from it."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from .. import __version__
from ..diffusion.preconditioning import preconditioning
from ..models.config import ModelConfig

# Licence of a family's published weights: (the hub's identifier, the text). Models of diffusers each have their own.
LICENCES = {
    "edm": ("cc-by-nc-sa-4.0", "CC BY-NC-SA 4.0: not for commercial use"),
    "edm2": ("cc-by-nc-sa-4.0", "CC BY-NC-SA 4.0: not for commercial use"),
    "dit": ("cc-by-nc-4.0", "CC BY-NC 4.0: not for commercial use"),
    "adm": ("mit", "MIT"),
    "consistency": ("mit", "MIT"),
    "sit": ("mit", "MIT"),
    "repa": ("mit", "MIT"),
}
SOURCES = {  # where a family's weights were published, and the paper
    "imm": ("https://huggingface.co/lumaai/imm", "2503.07565"),
    "edm": ("https://github.com/NVlabs/edm", "2206.00364"),
    "edm2": ("https://github.com/NVlabs/edm2", "2312.02696"),
    "adm": ("https://github.com/openai/guided-diffusion", "2105.05233"),
    "consistency": ("https://github.com/openai/consistency_models", "2303.01469"),
    "dit": ("https://github.com/facebookresearch/DiT", "2212.09748"),
    "sit": ("https://github.com/willisma/SiT", "2401.08740"),
    "repa": ("https://github.com/sihyun-yu/REPA", "2410.06940"),
}


def model_card(config: ModelConfig, provenance: dict[str, Any]) -> str:
    """Markdown with the YAML header of the hub.

    `provenance` has, where known: `file` (the source's name), its `sha256`, `container` and `family`, the `mmgen_version` that
    converted it, `left_out` (tensor -> reason), `weights` ("ema" or "model") and the card's `repository` (user/name). A model without
    a `family` was trained by mmgen.
    """
    family = provenance.get("family")
    name = provenance.get("repository", "user/name")
    title = name.split("/")[-1] if "repository" in provenance else f"mmgen model{f' ({family})' if family else ''}"
    sections = [_header(config, family), f"# {title}", _summary(config, family)]
    sections += ["## Sample", _sampling(config, name)]
    sections += ["## Where the weights come from", _origin(config, provenance)]
    sections += ["## Licence", _licence(family)]
    return "\n\n".join(sections) + "\n"


def _header(config: ModelConfig, family: str | None) -> str:
    tags = ["image-generation", "flow-map" if config.flow else "diffusion", *([family] if family else [])]
    tags += ["class-conditional"] if config.num_classes else ["text-to-image"] if config.text is not None else []
    if family == "imm" or (family is None and config.flow):
        tags.append("inductive-moment-matching")
    task = "unconditional-image-generation" if config.text is None else "text-to-image"
    lines = ["---", "library_name: mmgen", f"pipeline_tag: {task}", "tags:"]
    lines += [f"- {tag}" for tag in tags]
    if family in LICENCES:
        lines.append(f"license: {LICENCES[family][0]}")
    elif family is not None:
        lines += ["license: other", "license_name: unknown-see-the-source"]
    return "\n".join([*lines, "---"])


def _summary(config: ModelConfig, family: str | None) -> str:
    side = config.latents.resolution if config.latents else config.resolution
    channels = {1: "grey", 3: "colour"}.get(3 if config.latents else config.channels, f"{config.channels}-channel")
    kind = "A flow map: one to eight steps" if config.flow else "A denoiser: a diffusion or flow model, sampled in many steps"
    classes = f"{config.num_classes} classes" if config.num_classes else "no classes"
    classes = classes if config.text is None else f"of a text (encoder: {config.text.encoder})"
    lines = [f"{kind}. Draws {side} x {side} {channels} images, {classes}."]
    if config.latents:
        shape = f"{config.channels} x {config.resolution} x {config.resolution}"
        lines.append(f"It generates latents ({shape}), which the autoencoder `{config.latents.vae}` decodes.")
    if config.class_names:
        some = ", ".join(config.class_names[:10]) + (", ..." if len(config.class_names) > 10 else "")
        lines.append(f"Classes: {some}")
    if family in SOURCES:
        lines.append(f"Method: [arXiv:{SOURCES[family][1]}](https://arxiv.org/abs/{SOURCES[family][1]}).")
    return "\n".join(lines)


def _sampling(config: ModelConfig, name: str) -> str:
    install = (
        "pip install 'mmgen[latents]'" if config.latents or config.network.kind.startswith("diffusers") else "pip install mmgen"
    )
    if config.flow:
        options, python = "--steps 1,2,4", "steps=2"
    elif preconditioning(config.denoiser).is_consistency:
        options, python = "--steps 1,2", "steps=2"
    elif preconditioning(config.denoiser).sampler == "ddim":
        options, python = "--sampler ddim --steps 50", 'sampler="ddim", steps=50'
    else:
        options, python = "--sampler heun --steps 18", 'sampler="heun", steps=18'
    if config.text is not None:
        options, python = f'{options} --prompt "TEXT"', f'{python}, prompts=("TEXT",)'
    return "\n".join(
        [
            "```bash",
            install,
            f"mmgen sample hf://{name} {options} --num 64 --out samples/",
            "```",
            "",
            "```python",
            "import mmgen",
            "",
            f'model = mmgen.load("hf://{name}")',
            f"images = model.sample(64, {python}).images  # uint8 [64, channels, height, width]",
            "```",
        ]
    )


def _origin(config: ModelConfig, provenance: dict[str, Any]) -> str:
    if "family" not in provenance:
        rows = {"trained by": f"mmgen {__version__}", "data": config.data} | _plain(config.training)
        return _table({key: value for key, value in rows.items() if value not in ("", None)})
    rows = {key: provenance.get(key) for key in ("file", "sha256", "container", "family", "weights")}
    if provenance["family"] in SOURCES:
        rows["published at"] = SOURCES[provenance["family"]][0]
    rows["converted by"] = f"mmgen {provenance.get('mmgen_version', __version__)}"
    text = _table({key: value for key, value in rows.items() if value})
    left_out = Counter(provenance.get("left_out", {}).values())
    if left_out:
        text += "\n\nNot converted:\n"
        text += "".join(f"\n* {reason} ({count} {'entry' if count == 1 else 'entries'})" for reason, count in left_out.items())
    for key, title in (
        ("assumed", "Assumed, because neither the file nor an option says so"),
        ("sampled", "Sampled as the original is"),
    ):
        if provenance.get(key):
            text += f"\n\n{title}:\n" + "".join(f"\n* {sentence}" for sentence in provenance[key])
    return text


def _plain(training: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in training.items() if isinstance(value, str | int | float) and not isinstance(value, bool)}


def _table(rows: dict[str, Any]) -> str:
    def cell(value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value)
        return text.replace("|", "\\|").replace("\n", " ")

    return "\n".join(["| | |", "|---|---|", *(f"| {cell(key)} | {cell(value)} |" for key, value in rows.items())])


def _licence(family: str | None) -> str:
    if family is None:
        return "Not stated. Whoever trained the model chooses one that the training data allow."
    where = f" Source: {SOURCES[family][0]}" if family in SOURCES else ""
    if family in LICENCES:
        return f"{LICENCES[family][1]}, as for the published weights. Weights trained by others may have another licence.{where}"
    return f"Unknown: see the source of the weights.{where}"
