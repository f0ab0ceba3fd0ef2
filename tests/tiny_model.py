"""A model small enough for any test."""

from __future__ import annotations

from pathlib import Path

import torch

from mmgen.models.denoiser import Denoiser, DenoiserSettings
from mmgen.diffusion.flow_map import FlowMapSettings
from mmgen.models.config import ModelConfig
from mmgen.models.files import load_model, save_model
from mmgen.models.flow_model import FlowModel
from mmgen.networks import UNetSettings

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def make_model(path: Path, **config) -> Path:
    """A tiny model with random weights, of which none is zero, so that images depend on times and labels."""
    network = UNetSettings(model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,))
    flow = FlowMapSettings(t_min=0.006, t_max=0.994)
    config = ModelConfig(network=network, flow=flow, resolution=8, data="digits", **config)
    torch.manual_seed(0)
    model = FlowModel(config)
    for weight in model.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.3)
    save_model(path, config, model.network.state_dict())
    return path


def awaken(path: Path) -> Path:
    """The model in the file, with the layers that begin almost at zero drawn anew, so that images depend on the condition."""
    model = load_model(path)
    for weight in model.network.parameters():
        if weight.abs().max() < 1e-3:
            torch.nn.init.normal_(weight, std=0.3)
    save_model(path, model.config, model.network.state_dict())
    return path


def changed(path: Path) -> Path:
    """The model in the file with other weights."""
    model = load_model(path)
    for weight in model.network.parameters():
        weight.mul_(1.3)
    save_model(path, model.config, model.network.state_dict())
    return path


def make_denoiser(path: Path, denoiser: DenoiserSettings = DenoiserSettings(), **config) -> Path:
    """Likewise a denoiser."""
    small = UNetSettings(model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,))
    config = ModelConfig(**{"network": small, "resolution": 8, **config}, flow=None, denoiser=denoiser, data="digits")
    torch.manual_seed(0)
    model = Denoiser(config)
    for weight in model.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.3)
    save_model(path, config, model.network.state_dict())
    return path
