"""What loading a model leaves undone: torch's compiler is not imported, and no weight is drawn only to be overwritten."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import mmgen
from mmgen.models.build import build_model
from mmgen.models.config import ModelConfig
from mmgen.models.denoiser import DenoiserSettings
from mmgen.models.files import save_model
from mmgen.networks import ADMSettings, DiTSettings, EDM2Settings, UNetSettings, UViTSettings
from mmgen.networks.conditions import Labels
from mmgen.networks.empty import fill, without_weights

SMALL = {"model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}
NETWORKS = {
    "unet": UNetSettings(**SMALL),
    "fourier": UNetSettings(**SMALL, embedding="fourier"),
    "adm": ADMSettings(**SMALL, channels_per_head=16),
    "edm2": EDM2Settings(**SMALL, channels_per_head=16),
    "dit": DiTSettings(hidden_size=32, depth=2, num_heads=2),
    "uvit": UViTSettings(
        model_channels=16, channel_mult=(1, 2), num_blocks=(1,), depth=1, channels_per_head=16, emb_channels=32
    ),
}  # fmt: skip


def written(folder, network):
    """A denoiser in a file, and the denoiser."""
    model = build_model(ModelConfig(network, None, 8, 3, num_classes=4, denoiser=DenoiserSettings())).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # layers that begin at zero would hide a difference
            parameter.normal_(std=0.1)
    save_model(folder / "model.safetensors", model.config, model.network.state_dict())
    return model


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_a_loaded_network_is_the_one_that_was_saved(tmp_path, network):
    """All tensors, those that are in no file as well: it computes the same. Nothing is drawn from torch's generator."""
    model = written(tmp_path, network)
    before = torch.get_rng_state()
    loaded = mmgen.load(tmp_path)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(model.network.buffers(), loaded.network.buffers(), strict=True))
    x, sigma, label = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 3.0], dtype=torch.float64), Labels(torch.tensor([0, 3]), 4)
    with torch.no_grad():
        assert torch.equal(loaded.denoise(x, sigma, label), model.denoise(x, sigma, label))


def test_a_network_without_all_of_its_weights_is_refused():
    with without_weights():
        layer = torch.nn.BatchNorm1d(3)
        layer.register_buffer("constant", torch.ones(3), persistent=False)
    with pytest.raises(RuntimeError, match="no values for constant"):
        fill(layer, torch.nn.BatchNorm1d(3).state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unet", "dit", "uvit"])
def test_loading_and_sampling_import_no_compiler(tmp_path, kind):
    """2.6 of the 2.8 seconds that a load took in version 0.1."""
    written(tmp_path, NETWORKS[kind])
    code = (
        "import sys, mmgen; from mmgen.__main__ import main\n"
        f"mmgen.load({str(tmp_path)!r}).sample(2, steps=2).images\n"
        f"sys.argv = ['mmgen', 'sample', {str(tmp_path)!r}, '--num', '2', '--steps', '2', '--out', {str(tmp_path / 'out')!r}]\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
        "print([name for name in ('torch._dynamo', 'torch._inductor', 'sympy', 'datasets') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip().endswith("[]"), result.stdout
