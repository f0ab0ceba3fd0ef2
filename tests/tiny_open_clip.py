"""A CLIP with small random weights in open_clip's layout; and two towers of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_encoder import make_encoder


def save_open_clip(folder: Path, weights: bool = True) -> Path:
    import open_clip

    folder.mkdir(parents=True)
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8, "head_width": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    preprocess = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    if weights:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
            for parameter in model.parameters():
                parameter.data.add_(0.2 * torch.randn_like(parameter))
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


class _Images(torch.nn.Module):
    def forward(self, x):
        return x.float().mean((2, 3)) / 255 - 0.5


class _Texts(torch.nn.Module):
    def forward(self, pooled):
        return pooled[:, :3]


def save_towers(folder: Path) -> Path:
    """The mean colour of an image, and the first three of a tiny encoder's features."""
    make_encoder(folder / "encoder")
    torch.jit.script(_Images()).save(str(folder / "images.pt"))
    torch.jit.script(_Texts()).save(str(folder / "texts.pt"))
    (folder / "towers.json").write_text(json.dumps({"text_encoder": "encoder", "length": 6}))
    return folder
